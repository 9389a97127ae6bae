"""One question to base and tuned: both answers as they are made, and their log-probs.

Base and tuned are one loaded model, with the adapter switched off and on. The tokens are those of
training and evaluation (``stages.model.scoring``), and answers are greedy, so what is shown here is
what the report counts.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from stages.core.errors import UserError
from stages.model import formatted, scoring, tokens
from stages.pairs import images
from stages.pairs.refusals import Refusal
from stages.params.params import Params

MODELS = ("base", "tuned")
UNCUT = 2**17  # tokens; a question of one's own is not bound by format.cutoff_len


@dataclass(frozen=True)
class Asked:
    """An answer, and its summed log-prob (nats) under base and tuned, end of turn included.

    ``tokens`` are those that the log-prob sums over.
    """

    text: str
    finished: bool
    tokens: int
    under_base: float
    under_tuned: float


@dataclass(frozen=True)
class Models:
    """Base and tuned in one model, and the strings that a question must not hold."""

    policy: scoring.Policy
    p: Params
    markers: list[str]

    @contextlib.contextmanager
    def as_(self, name: str) -> Iterator[None]:
        """While it lasts, the model is ``base`` or ``tuned``."""
        with self.policy.model.disable_adapter() if name == "base" else contextlib.nullcontext():
            yield


def load(model: Path, adapter: Path, p: Params) -> Models:
    """Both models; a prompt may have up to ``UNCUT`` tokens.

    Raises:
        UserError: as ``scoring.load``.
    """
    p = p.model_copy(update={"format": p.format.model_copy(update={"cutoff_len": UNCUT})})
    with _quiet():
        markers = tokens.load(model, p).markers
        return Models(scoring.load(model, p, adapter), p, markers)


def picture(file: Path, folder: Path, p: Params) -> str:
    """Store a picture in ``folder`` as the preprocess stage would; its name there.

    Raises:
        UserError: there is no such file, or preprocess would leave it out.
    """
    try:
        stored = images.store(file.read_bytes(), folder=folder, limits=p.preprocess)
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror}); name a picture") from None
    if isinstance(stored, Refusal):
        raise UserError(
            f"{file} can't be used ({stored.detail}); name another picture, or change its limits "
            "in the section preprocess of params.yaml"
        )
    return stored.name


def prompt(models: Models, question: str, names: list[str]) -> dict[str, Any]:
    """A row of one question about stored pictures, as the format stage makes them."""
    return formatted.prompt(
        question, names, clean=lambda text: formatted.neutralised(text, models.markers)
    )


def ask(
    models: Models,
    row: dict[str, Any],
    folder: Path,
    *,
    max_new_tokens: int,
    write: Callable[[str, str], None],
) -> dict[str, Asked]:
    """What base and tuned answer to a formatted row.

    Args:
        folder: the folder that the row's image names are relative to.
        write: called with ``base`` or ``tuned`` and each new piece of its answer's text, the last
            of which ends the line.
    """
    answers = {}
    for name in MODELS:
        with models.as_(name):
            answers[name] = _streamed(models, row, folder, max_new_tokens, name, write)
    pair = {
        "id": "asked",
        **row,
        "chosen": {"role": "assistant", "content": answers["tuned"].text},
        "rejected": {"role": "assistant", "content": answers["base"].text},
    }
    under = {}
    for name in MODELS:
        with models.as_(name), _quiet():
            under[name] = scoring.log_probs(
                models.policy, [pair], folder, batch_tokens=models.p.scoring.batch_tokens, label=""
            )
    return {
        name: Asked(
            text=answers[name].text,
            finished=answers[name].finished,
            tokens=int(getattr(under["tuned"], f"{side}_tokens")[0]),
            under_base=float(getattr(under["base"], side)[0]),
            under_tuned=float(getattr(under["tuned"], side)[0]),
        )
        for name, side in (("base", "rejected"), ("tuned", "chosen"))
    }


def _streamed(
    models: Models,
    row: dict[str, Any],
    folder: Path,
    max_new_tokens: int,
    name: str,
    write: Callable[[str, str], None],
) -> scoring.Answer:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(name, text + "\n" * stream_end)

    policy = models.policy
    streamer = Streamer(policy.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def generate(**inputs: Any) -> Any:
        return policy.model.generate(**inputs, streamer=streamer)

    # `answer` asks the model for these two alone; this way its prompts and stops are used.
    streaming = replace(
        policy, model=SimpleNamespace(device=policy.model.device, generate=generate)
    )
    with _quiet():
        (answer,) = scoring.answer(
            streaming,
            [row],
            folder,
            max_new_tokens=max_new_tokens,
            batch_tokens=UNCUT,
            label=name,
        )
    return answer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and the libraries' notes; errors are exceptions."""
    with contextlib.redirect_stderr(_nowhere()):
        yield


@functools.cache
def _nowhere() -> IO[str]:
    # Never closed: loggers that are made meanwhile keep it.
    return open(os.devnull, "w")
