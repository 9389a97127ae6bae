"""Ask base and tuned a question about a picture, and show both answers.

    make ask IMAGE=photo.jpg QUESTION="What is on the table?"

In: the base, the adapter, a picture of yours. Out, in the terminal: both answers while they are
made, then the log-prob of each under both models: what training did to these very words. Both are
one loaded model, whose adapter is switched off for the base. Texts and pictures are prepared as
those of the data set are and answers are greedy, so the report counts the same answers.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.commands import ADAPTER, BASE, require
from stages.core import command, console
from stages.core.errors import UserError
from stages.model import formatted, scoring, tokens
from stages.pairs import images
from stages.pairs.refusals import Refusal
from stages.params import params
from stages.params.params import Params

MODELS = ("base", "tuned")
LONGEST = 2**17  # tokens; a question of one's own is not bound by format.cutoff_len


def main(question: str = "", image: str = "", max_new_tokens: int = 256) -> None:
    if not question.strip():
        raise UserError('nothing was asked: make ask IMAGE=photo.jpg QUESTION="…"')
    try:
        picture = Path(image).read_bytes() if image else b""
    except OSError as error:
        raise UserError(f"{image} can't be read ({error.strerror}); name a picture") from None
    if not picture:
        print("asked without a picture; IMAGE=photo.jpg shows one", file=sys.stderr)
    models = load(params.load())
    with tempfile.TemporaryDirectory() as folder:
        ask(models, question, picture, Path(folder), max_new_tokens)


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


def load(p: Params, base: Path = BASE, adapter: Path = ADAPTER) -> Both:
    """Base and tuned, for prompts of up to ``LONGEST`` tokens.

    Raises:
        UserError: they are not here, or as ``scoring.load``.
    """
    require(base, adapter)
    print("loading the models …", file=sys.stderr, flush=True)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # its notes would stand between the answers
    p = p.model_copy(update={"format": p.format.model_copy(update={"cutoff_len": LONGEST})})
    with console.logged(Path(os.devnull)):
        return Both(scoring.load(base, p, adapter), p, tokens.load(base, p).markers)


def ask(models: Both, question: str, picture: bytes, folder: Path, most: int) -> None:
    """Print both answers while they are made, and their log-probs."""
    from transformers import TextStreamer

    names = [models.stored(picture, folder)] if picture else []
    row = formatted.prompt(question, names, clean=models.clean)
    answers = {}
    for name in MODELS:
        print(f"{name + ':':7}", end="", flush=True)
        tokenizer = models.policy.tokenizer
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        answers[name] = models.answer(name, row, folder, most, streamer=streamer)
    print(log_probs(models, row, answers, folder))


def log_probs(
    models: Both, row: dict[str, Any], answers: Mapping[str, scoring.Answer], folder: Path
) -> str:
    """A table of both answers' summed log-probs (nats) under both models, end of turn included."""
    from tabulate import tabulate

    sides = {"base": "rejected", "tuned": "chosen"}
    pair = {"id": "asked", **row} | {
        side: {"role": "assistant", "content": answers[name].text} for name, side in sides.items()
    }
    under = []
    for name in sides:
        with models.as_(name):
            options: Any = {"batch_tokens": LONGEST, "label": ""}
            under.append(scoring.log_probs(models.policy, [pair], folder, **options))
    if not all(np.isfinite(found[scoring.LOGPS].to_numpy()).all() for found in under):
        raise UserError(
            "the log-probs are no numbers, so weights are broken; `dvc checkout models` brings "
            "those of the last run"
        )
    rows = [
        [
            f"{name}'s answer",
            *(f"{found[f'{side}_logps'][0]:z.2f}" for found in under),
            under[0][f"{side}_tokens"][0],
            "" if answers[name].finished else "cut off",
        ]
        for name, side in sides.items()
    ]
    header = ["log-prob, nats", "under base", "under tuned", "tokens", ""]
    aligned = ("left", "right", "right", "right", "left")
    return tabulate(rows, header, colalign=aligned, disable_numparse=True)


if __name__ == "__main__":
    command.run(main)
