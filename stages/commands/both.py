"""Base and tuned as one loaded model, for the commands that put questions to them.

The adapter is switched off for the base. Tokens are those of training and evaluation
(``stages.model.scoring``), and texts and pictures of users are data as those of the data set are.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core import console
from stages.core.errors import UserError
from stages.model import formatted, scoring, tokens
from stages.pairs import images
from stages.pairs.refusals import Refusal
from stages.params.params import Params

MODELS = ("base", "tuned")
LONGEST = 2**17  # tokens; a question of one's own is not bound by format.cutoff_len


@dataclass(frozen=True)
class Both:
    """Both models, and the strings that no text may hold (``Tokenization.markers``)."""

    policy: scoring.Policy
    p: Params
    markers: Sequence[str]

    @contextlib.contextmanager
    def as_(self, name: str) -> Iterator[None]:
        """While it lasts, the model is ``base`` or ``tuned``."""
        with self.policy.model.disable_adapter() if name == "base" else contextlib.nullcontext():
            yield

    def clean(self, text: str) -> str:
        """A text without special tokens, as the format stage makes it."""
        return formatted.neutralised(text, self.markers)

    def stored(self, picture: bytes, folder: Path) -> str:
        """The name of a picture in ``folder``, stored as the preprocess stage would store it.

        Raises:
            UserError: preprocess would leave it out.
        """
        found = images.store(picture, folder=folder, limits=self.p.preprocess)
        if isinstance(found, Refusal):
            raise UserError(f"the image can't be used ({found.detail})")
        return found.name

    def answer(
        self, name: str, row: dict[str, Any], folder: Path, most: int, **options: Any
    ) -> scoring.Answer:
        """What ``base`` or ``tuned`` answers to a formatted prompt in at most so many tokens;
        ``options`` as for ``scoring.answer``."""
        options |= {"max_new_tokens": most, "batch_tokens": LONGEST, "label": ""}
        with self.as_(name):
            return scoring.answer(self.policy, [row], folder, **options)[0]


def load(model: Path, adapter: Path, p: Params) -> Both:
    """Both models; a prompt may have up to ``LONGEST`` tokens.

    Raises:
        UserError: as ``scoring.load``.
    """
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # its notes would stand between the answers
    p = p.model_copy(update={"format": p.format.model_copy(update={"cutoff_len": LONGEST})})
    with console.logged(Path(os.devnull)):
        return Both(scoring.load(model, p, adapter), p, tokens.load(model, p).markers)
