"""The prompts that base and tuned both answer, and their answers as a table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from stages import formatted, scoring
from stages.params import Params


@dataclass(frozen=True)
class Prompts:
    """``pairs``: a sample of test pairs. ``questions``: held-out questions with known answers."""

    pairs: list[dict[str, Any]]
    questions: list[dict[str, Any]]


def chosen(formatted_data: Path, p: Params) -> Prompts:
    """The same sample for every model, as large as ``evaluate.generation`` says."""
    return Prompts(
        formatted.sample(formatted.read(formatted_data, "test"), p.evaluate.generation.prompts),
        formatted.sample(
            formatted.read(formatted_data, "questions"), p.evaluate.generation.questions
        ),
    )


def answers(
    policy: scoring.Policy, asked: Prompts, images: Path, p: Params, *, label: str
) -> pd.DataFrame:
    """Greedy answers, one row a prompt: ``id``, ``of`` ("pair" or "question"), ``answer``."""
    rows = [*asked.pairs, *asked.questions]
    texts = scoring.answer(
        policy,
        rows,
        images,
        max_new_tokens=p.evaluate.generation.max_new_tokens,
        batch_size=2 * p.scoring.batch_size,
        label=label,
    )
    of = ["pair"] * len(asked.pairs) + ["question"] * len(asked.questions)
    return pd.DataFrame({"id": [row["id"] for row in rows], "of": of, "answer": texts}, dtype="str")
