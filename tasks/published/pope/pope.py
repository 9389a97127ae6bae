"""POPE for lm-eval: its metrics.

Differences from the code that figures elsewhere come from. POPE's own script takes every answer
without "no" or "not" for a yes. lmms-eval takes only the bare word, so that "Yes." counts as wrong,
leaves unclear answers out of recall, and computes ``yes_ratio`` of the true answers, where it is
always one half. Here an unclear answer is wrong, is no yes, and misses an object that is there.
"""

from typing import Any

from tasks.published import data_sets
from tasks.published.grades import said


def in_hash_order(dataset: Any) -> Any:
    """The data set lists six questions of each image in a row."""
    return data_sets.in_hash_order(dataset, "question_id", "id")


def graded(doc: dict[str, Any], answers: list[str]) -> dict[str, float | tuple[int, int]]:
    """Every metric's value for one question; those of precision, recall and F1 are part and whole.

    F1 is the harmonic mean of precision and recall: 2·hits / (yes answers + objects there).
    """
    word, truth = said(answers[0]), doc["answer"].strip()
    there, yes = truth == "yes", word == "yes"
    hit = int(there and yes)
    return {
        "accuracy": float(word == truth),
        "precision": (hit, int(yes)),
        "recall": (hit, int(there)),
        "f1": (2 * hit, there + yes),
        "yes_ratio": float(yes),
        "unclear": float(word is None),
    }
