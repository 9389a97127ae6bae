"""The prompts that base and tuned both answer, and their answers side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from stages.answers.grading import is_correct
from stages.core.errors import UserError
from stages.model import formatted
from stages.model.checkpoint import Checkpoint
from stages.params.params import Params


@dataclass(frozen=True)
class Prompts:
    """``pairs``: a sample of test pairs. ``questions``: held-out questions with known answers."""

    pairs: list[dict[str, Any]]
    questions: list[dict[str, Any]]


def selected(formatted_data: Path, p: Params) -> Prompts:
    """The same sample for every model, as large as ``evaluate.generation`` says."""
    return Prompts(
        formatted.sample(formatted.read(formatted_data, "test"), p.evaluate.generation.prompts),
        formatted.sample(
            formatted.read(formatted_data, "questions"), p.evaluate.generation.questions
        ),
    )


def answers(checkpoint: Checkpoint, asked: Prompts, images: Path, *, label: str) -> pd.DataFrame:
    """``Checkpoint.answers``, one row a prompt, with ``of``: "pair" or "question"."""
    table = checkpoint.answers(
        [*asked.pairs, *asked.questions],
        images,
        max_new_tokens=checkpoint.p.evaluate.generation.max_new_tokens,
        label=label,
    )
    of = ["pair"] * len(asked.pairs) + ["question"] * len(asked.questions)
    table.insert(1, "of", pd.Series(of, dtype="str"))
    return table


def beside_each_other(asked: Prompts, base: pd.DataFrame, tuned: pd.DataFrame) -> pd.DataFrame:
    """One row a prompt: what was asked, both answers, and whether each is right where that is
    known.

    Raises:
        UserError: base and tuned did not answer the same prompts.
    """
    rows = [
        {
            "id": row["id"],
            "of": of,
            "image": row["images"][0] if row["images"] else "",
            "kind": row["kind"],
            "question": formatted.question(row),
            "truth": row.get("answer"),
        }
        for of, asked_rows in (("pair", asked.pairs), ("question", asked.questions))
        for row in asked_rows
    ]
    table = pd.DataFrame(rows, columns=["id", "of", "image", "kind", "question", "truth"])
    asked_for = set(map(tuple, table[["id", "of"]].to_numpy()))
    for name, given in (("base", base), ("tuned", tuned)):
        if set(map(tuple, given[["id", "of"]].to_numpy())) != asked_for:
            raise UserError(
                f"the {name} model answered other prompts; `dvc repro -f baseline` asks again"
            )
        named = given.set_index(["id", "of"]).add_prefix(f"{name}_").reset_index()
        table = table.merge(named, on=["id", "of"], validate="1:1")
        table[f"{name}_correct"] = [
            None if truth is None else is_correct(question, truth, answer)
            for question, truth, answer in zip(
                table["question"], table["truth"], table[f"{name}_answer"], strict=True
            )
        ]
    return table
