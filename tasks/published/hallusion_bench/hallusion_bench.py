"""HallusionBench for lm-eval: its three accuracies, graded by a rule where the paper asks GPT-4.

``aAcc`` counts questions, ``fAcc`` figures, ``qAcc`` questions over all figures of a set. They are
no versions of one number: a leaderboard that writes "HallusionBench" averages the three, a paper
quotes ``aAcc``. A figure, and a question, is one of its set, of its subcategory, of its category,
as in the benchmark's own script; grouped by less, different ones fall together.
"""

from collections.abc import Sequence
from typing import Any

from tasks.published import data_sets
from tasks.published.grades import said

SET = ("category", "subcategory", "set_id")
TRUTH = {"1": "yes", "0": "no"}


def in_hash_order(dataset: Any) -> Any:
    """Sets stay together: a limit cuts at most one."""
    return data_sets.in_hash_order(dataset, *SET)


def graded(doc: dict[str, Any], answers: list[str]) -> dict[str, float | tuple[str, bool]]:
    """Every metric's value for one question; of ``fAcc`` and ``qAcc``, whose it is and whether it
    is right.
    """
    word = said(answers[0])
    right = word == TRUTH[doc["gt_answer"].strip()]
    of = " ".join(str(doc[column]) for column in SET)
    return {
        "aAcc": float(right),
        "fAcc": (f"{of} {doc['figure_id']}", right),
        "qAcc": (f"{of} {doc['question_id']}", right),
        "yes_ratio": float(word == "yes"),
        "unclear": float(word is None),
    }


def all_right(answers: Sequence[tuple[str, bool]]) -> float:
    """The share of groups in which every answer is right; 0 of none."""
    wrong = {group for group, right in answers if not right}
    groups = {group for group, _ in answers}
    return 1 - len(wrong) / len(groups) if groups else 0.0
