"""Ask: a question about a picture to base and tuned, answered side by side.

    make ask IMAGE=photo.jpg QUESTION="What is on the table?"

In: the base, the adapter, a picture of yours. Out, in the terminal: both answers while they are
made, then the log-prob of each under both models: what training did to these very words. Pictures
are prepared as preprocess does and answers are greedy, so the report counts the same answers.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.commands import both, outputs
from stages.commands.both import Both
from stages.core import command
from stages.core.errors import UserError
from stages.model import formatted, scoring
from stages.params import params


def main(question: str = "", image: str = "", max_new_tokens: int = 256) -> None:
    if not question.strip():
        raise UserError('nothing was asked: make ask IMAGE=photo.jpg QUESTION="…"')
    p, at = params.load(), outputs.read()
    outputs.require(at.model, at.adapter)
    try:
        picture = Path(image).read_bytes() if image else b""
    except OSError as error:
        raise UserError(f"{image} can't be read ({error.strerror}); name a picture") from None
    if not picture:
        print("asked without a picture; IMAGE=photo.jpg shows one", file=sys.stderr)
    print("loading the models …", file=sys.stderr, flush=True)
    models = both.load(at.model, at.adapter, p)
    with tempfile.TemporaryDirectory() as folder:
        ask(models, question, picture, Path(folder), max_new_tokens)


def ask(models: Both, question: str, picture: bytes, folder: Path, most: int) -> None:
    """Print both answers while they are made, and their log-probs."""
    from transformers import TextStreamer

    names = [models.stored(picture, folder)] if picture else []
    row = formatted.prompt(question, names, clean=models.clean)
    answers = {}
    for name in both.MODELS:
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
            options: Any = {"batch_tokens": both.LONGEST, "label": ""}
            under.append(scoring.log_probs(models.policy, [pair], folder, **options))
    rows = [
        [
            f"{name}'s answer",
            *(f"{getattr(found, side)[0]:z.2f}" for found in under),
            getattr(under[0], f"{side}_tokens")[0],
            "" if answers[name].finished else "cut off",
        ]
        for name, side in sides.items()
    ]
    header = ["log-prob, nats", "under base", "under tuned", "tokens", ""]
    aligned = ("left", "right", "right", "right", "left")
    return tabulate(rows, header, colalign=aligned, disable_numparse=True)


if __name__ == "__main__":
    command.run(main)
