"""Ask: a question about a picture to base and tuned, answered side by side.

    python -m stages ask --image photo.jpg --question "What is on the table?"
    python -m stages ask --pairs 5    # the test pairs whose margin the training changed most
    python -m stages ask              # in a terminal: goes on asking

In: the base, the adapter, a picture of yours or the test pairs. Out, in the terminal: both answers
while they are made, then the log-prob of each under both models. Nothing is kept.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.commands import asking, outputs
from stages.commands.asking import Asked, Models
from stages.commands.outputs import Places
from stages.core import command
from stages.core.errors import UserError
from stages.model import formatted
from stages.params import params


def main(image: str = "", question: str = "", pairs: int = 0, max_new_tokens: int = 256) -> None:
    p, at = params.load(), outputs.read()
    goes_on = not (image or question or pairs)
    if goes_on and not sys.stdin.isatty():
        raise UserError(
            "nothing was asked; give --image and --question (make ask IMAGE=photo.jpg "
            'QUESTION="…"), or --pairs 5, or run it in a terminal'
        )
    if image and not question:
        raise UserError("--image needs a --question")
    if pairs < 0:
        raise UserError(f"--pairs is {pairs}; it is a number of test pairs")
    outputs.require(at.model, at.adapter)
    with tempfile.TemporaryDirectory() as folder:
        # What can fail early, before the models are loaded.
        names = [asking.picture(Path(image), Path(folder), p)] if image else []
        rows = most_changed(at, pairs) if pairs else []
        print("loading the models …", file=sys.stderr, flush=True)
        models = asking.load(at.model, at.adapter, p)
        for row, table in rows:
            show_pair(row, at.images, table)
            show(models, row, at.images, max_new_tokens)
        if question:
            row = asking.prompt(models, question, names)
            show(models, row, Path(folder), max_new_tokens)
        if goes_on:
            converse(models, Path(folder), max_new_tokens)


def converse(models: Models, folder: Path, max_new_tokens: int) -> None:
    """Ask until the input ends; a mistake in a question costs that question alone."""
    import readline  # noqa: F401  line editing for input()

    print("A picture and a question at a time; an empty picture keeps the last one, Ctrl-D ends.")
    names: list[str] = []
    while True:
        try:
            file = input("\npicture:  ").strip()
            if file:
                names = [asking.picture(Path(file).expanduser(), folder, models.p)]
            if question := input("question: ").strip():
                show(models, asking.prompt(models, question, names), folder, max_new_tokens)
        except UserError as error:
            print(f"error: {error}")
        except EOFError:
            print()
            return


def show(models: Models, row: dict[str, Any], folder: Path, max_new_tokens: int) -> None:
    """Print both answers as they come, and their log-probs."""
    begun: set[str] = set()

    def write(name: str, text: str) -> None:
        if name not in begun:
            begun.add(name)
            print(f"{name + ':':7}", end="")
        print(text, end="", flush=True)

    print(log_probs(asking.ask(models, row, folder, max_new_tokens=max_new_tokens, write=write)))


def log_probs(answers: Mapping[str, Asked]) -> str:
    """A table of both answers' log-probs under both models; one row if the answers are the same."""
    from tabulate import tabulate

    same = answers["base"].text == answers["tuned"].text
    rows = [
        [
            "the answer of both" if same else f"{name}'s answer",
            f"{asked.under_base:z.2f}",
            f"{asked.under_tuned:z.2f}",
            asked.tokens,
            "" if asked.finished else "cut off",
        ]
        for name, asked in answers.items()
        if not (same and name == "base")
    ]
    header = ["log-prob, nats", "under base", "under tuned", "tokens", ""]
    aligned = ("left", "right", "right", "right", "left")
    return tabulate(rows, header, colalign=aligned, disable_numparse=True)


def most_changed(at: Places, count: int) -> list[tuple[dict[str, Any], Mapping[str, float]]]:
    """Test pairs whose reward margin is furthest from 0, with their scores.

    Raises:
        UserError: there are no scores yet, or they are not of the test pairs.
    """
    import pandas as pd

    table = at.details / "scores.parquet"
    outputs.require(table)
    scores = pd.read_parquet(table).set_index("id")
    rows = {row["id"]: row for row in formatted.read(at.formatted_data, "test")}
    if missing := set(scores.index) - rows.keys():
        raise UserError(
            f"{table} scores pairs that are not in {at.formatted_data}, such as {min(missing)}; "
            "`dvc repro` makes both again"
        )
    order = scores["reward_margin"].abs().sort_values(ascending=False, kind="stable").index[:count]
    return [(rows[each], scores.loc[each].to_dict()) for each in order]


def show_pair(row: Mapping[str, Any], images: Path, scores: Mapping[str, float]) -> None:
    """Print what a test pair asks, its answers, and how the training moved their log-probs."""
    print(f"\n{', '.join(str(images / name) for name in row['images'])}")
    print(f"question: {formatted.question(row)}")
    for side in ("chosen", "rejected"):
        before, after = (scores[f"{who}_{side}_logps"] for who in ("reference", "policy"))
        print(f"{side + ':':10}{row[side]['content']}  [{before:z.2f} → {after:z.2f} nats]")


if __name__ == "__main__":
    command.run(main)
