"""POPE for lm-eval: the order of its questions, how answers are read, and its metrics.

Differences from the code that figures elsewhere come from. POPE's own script takes every answer
without "no" or "not" for a yes. lmms-eval takes only the bare word, so that "Yes." counts as wrong,
leaves unclear answers out of recall, and computes ``yes_ratio`` of the true answers, where it is
always one half. Here an unclear answer is wrong, is no yes, and misses an object that is there.
"""

import functools
import io
import re
from collections.abc import Sequence
from typing import Any

from stages.dataset import formatted

Pair = tuple[bool, bool]  # (the object is there, the answer is yes)


def in_hash_order(dataset: Any) -> Any:
    """The questions in hash order: the data set lists six of each image in a row.

    Images stay encoded until they are asked for: 9,000 decoded ones would fill 8 GB.
    """
    from datasets import Image

    ids = zip(dataset["question_id"], dataset["id"], strict=True)
    rows = [{"id": f"{question} {other}", "at": at} for at, (question, other) in enumerate(ids)]
    order = [row["at"] for row in formatted.sample(rows, len(rows))]
    return dataset.cast_column("image", Image(decode=False)).select(order, keep_in_memory=True)


def image(doc: dict[str, Any]) -> list[Any]:
    """The image of a question, decoded."""
    return [_decoded(doc["image"]["bytes"])]


@functools.lru_cache(maxsize=512)  # POPE asks 18 questions of each of its 500 images
def _decoded(content: bytes) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as opened:
        return opened.convert("RGB")


def said(answer: str) -> str | None:
    """``yes``, ``no`` or, for an answer that is neither, None.

    A yes or no at its beginning decides; else a denial anywhere in the first sentence, then a yes.
    """
    words = re.findall(r"[a-z']+", answer.lower().replace("\u2019", "'").split(".")[0])
    if words[:1] in (["yes"], ["no"]):
        return words[0]
    if any(word in ("no", "not") or word.endswith("n't") for word in words):
        return "no"
    return "yes" if "yes" in words else None


def graded(doc: dict[str, Any], answers: list[str]) -> dict[str, float | Pair]:
    """Every metric's value for one question; precision, recall and F1 are made of pairs."""
    word, truth = said(answers[0]), doc["answer"].strip().lower()
    pair = truth == "yes", word == "yes"
    return {
        "accuracy": float(word == truth),
        "precision": pair,
        "recall": pair,
        "f1": pair,
        "yes_ratio": float(word == "yes"),
        "unclear": float(word is None),
    }


def precision(pairs: Sequence[Pair]) -> float:
    """The share of yes answers where the object is there; 0 without any yes."""
    return _ratio(_hits(pairs), sum(yes for _, yes in pairs))


def recall(pairs: Sequence[Pair]) -> float:
    """The share of objects that are there which were seen; 0 where none is there."""
    return _ratio(_hits(pairs), sum(there for there, _ in pairs))


def f1(pairs: Sequence[Pair]) -> float:
    """The harmonic mean of precision and recall: 2·hits / (yes answers + objects there)."""
    return _ratio(2 * _hits(pairs), sum(there + yes for there, yes in pairs))


def _hits(pairs: Sequence[Pair]) -> int:
    return sum(there and yes for there, yes in pairs)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
