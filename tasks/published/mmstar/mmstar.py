"""MMStar for lm-eval: a strict letter, where harnesses search the answer for one or ask a judge."""

from typing import Any

from tasks.published import data_sets
from tasks.published.grades import letter


def in_hash_order(dataset: Any) -> Any:
    """The data set lists the questions by category."""
    return data_sets.in_hash_order(dataset, "index")


def graded(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """``accuracy``: 1 for the right letter. ``unclear``: 1 for no letter, or more than one."""
    chosen = letter(answers[0])
    return {
        "accuracy": float(chosen == doc["answer"].strip()),
        "unclear": float(chosen is None),
    }
