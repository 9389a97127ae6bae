"""The prompts that base and tuned both answer, and their answers side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stages.answers.grading import is_correct
from stages.core.errors import UserError
from stages.model import formatted
from stages.model.checkpoint import Checkpoint
from stages.params.params import Params


def selected(formatted_data: Path, p: Params) -> list[dict[str, Any]]:
    """The formatted rows that every model is asked, as many as ``evaluate.generation`` says.

    ``of`` is "pair" for a sample of test pairs, "question" for one of the held-out questions with
    known answers.
    """
    pairs, questions = (formatted.read(formatted_data, name) for name in ("test", "questions"))
    return [
        row | {"of": of}
        for of, rows, count in (
            ("pair", pairs, p.evaluate.generation.prompts),
            ("question", questions, p.evaluate.generation.questions),
        )
        for row in formatted.sample(rows, count)
    ]


def answers(
    checkpoint: Checkpoint, asked: Sequence[dict[str, Any]], images: Path, *, label: str
) -> pd.DataFrame:
    """``Checkpoint.answers``, one row a prompt, with ``of``."""
    most = checkpoint.p.evaluate.generation.max_new_tokens
    table = checkpoint.answers(asked, images, max_new_tokens=most, label=label)
    table.insert(1, "of", pd.Series([row["of"] for row in asked], dtype="str"))
    return table


def beside_each_other(
    asked: Sequence[dict[str, Any]], base: pd.DataFrame, tuned: pd.DataFrame
) -> pd.DataFrame:
    """One row a prompt: what was asked, both answers, and whether each is right where that is
    known.

    Raises:
        UserError: base and tuned did not answer the same prompts.
    """
    rows = [
        {
            "id": row["id"],
            "of": row["of"],
            "image": row["images"][0] if row["images"] else "",
            "kind": row["kind"],
            "question": formatted.question(row),
            "truth": row.get("answer"),
        }
        for row in asked
    ]
    key = ["id", "of"]
    table = pd.DataFrame(rows, columns=[*key, "image", "kind", "question", "truth"])
    for name, given in (("base", base), ("tuned", tuned)):
        if set(given[key].itertuples(index=False)) != set(table[key].itertuples(index=False)):
            raise UserError(
                f"the {name} model answered other prompts; `dvc repro -f baseline` asks again"
            )
        named = given.set_index(key).add_prefix(f"{name}_").reset_index()
        table = table.merge(named, on=key, validate="1:1")
        table[f"{name}_correct"] = [
            None if truth is None else is_correct(question, truth, answer)
            for question, truth, answer in zip(
                table["question"], table["truth"], table[f"{name}_answer"], strict=True
            )
        ]
    return table
