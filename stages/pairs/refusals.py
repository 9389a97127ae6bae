"""Why a row is left out: every reason (``refusals.yaml``), and the checks that need no decoded
image."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.pairs.pairs import Question, Record

# What each reason means, in the order of asking.
REASONS: dict[str, str] = YAML(typ="safe", pure=True).load(Path(__file__).with_suffix(".yaml"))
# NUL, or half of a surrogate pair: JSON's escapes allow it, UTF-8 not.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Refusal:
    """Why a row is left out: one of ``REASONS``, and what exactly was found."""

    reason: str
    detail: str


def advice(reason: str) -> str:
    """What a reason means and what helps; a name that is none of ``REASONS`` is the user's own."""
    return REASONS.get(reason, f"an answer matches preprocess.refuse.{reason}")


def refusal(row: Record, wanted: Any, patterns: Mapping[str, str]) -> Refusal | None:
    """What is wrong with a row, or why it is not wanted, as far as it shows without decoding an
    image. ``wanted`` and ``patterns`` are ``preprocess.wanted`` and ``preprocess.refuse``.
    """
    if found := text_refusal(row):
        return found
    images, turns = len(row.images or ()), len(row.history) + 1
    if not images and not wanted.text_only:
        return Refusal("text_only", "no image")
    if images > wanted.images:
        return Refusal("too_many_images", f"{images} images")
    if turns > wanted.turns:
        return Refusal("too_many_turns", f"{turns} turns")
    if row.system and not wanted.system_prompt:
        return Refusal("system_prompt", row.system[:80])
    for name, pattern in patterns.items():
        for side, text in (("chosen", row.chosen), ("rejected", row.rejected)):
            if match := re.search(pattern, text or ""):
                return Refusal(name, f"{side}: {match[0][:80]}")
    return None


def text_refusal(row: Record | Question) -> Refusal | None:
    """What is wrong with the row's fields, as far as it shows without decoding an image."""
    if isinstance(row, Record):
        answers = {"chosen": row.chosen, "rejected": row.rejected}
        others = {"origin": row.origin, "kind": row.kind, "system": row.system}
        others["history"] = "".join(text for turn in row.history for text in turn)
    else:
        answers, others = {"answer": row.answer}, {"kind": row.kind}
    texts = {"question": row.question, **answers}
    missing = ["image"] * (row.images is None) + [n for n, text in texts.items() if text is None]
    if missing:
        note = getattr(row, "note", "")
        if note and len(missing) == 4:  # the row could not be read
            return Refusal(getattr(row, "reason", "missing_field"), note)
        return Refusal("missing_field", ", ".join(missing) + (f" ({note})" if note else ""))
    for name, text in {**texts, **others}.items():
        if _NO_TEXT.search(text or ""):
            return Refusal("missing_field", f"{name} is not valid Unicode text")
    if not (row.question or "").strip():
        return Refusal("missing_field", "question is blank")
    # Equal letters in other bytes are the same answer: é in one character, or in two.
    said = {
        name: unicodedata.normalize("NFC", text or "").strip() for name, text in answers.items()
    }
    if blank := [name for name, text in said.items() if not text]:
        return Refusal("empty_answer", ", ".join(blank))
    if len(said) > 1 and len(set(said.values())) == 1:
        return Refusal("identical_answers", said["chosen"][:80])
    return None
