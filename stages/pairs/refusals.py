"""Why a row is left out: every reason, and the checks that need no decoded image."""

from dataclasses import dataclass

import pyarrow as pa

from stages.pairs.pairs import Question, Record

# Why a row can be left out, in the order of asking: a row counts under the first that holds.
REASONS = {
    "missing_field": "a field is absent or is not valid text, its image can't be found, or "
    "question is blank",
    "empty_answer": "chosen or rejected is blank",
    "identical_answers": "chosen and rejected are equal, white space at the ends aside",
    "text_only": "it has no image, and preprocess.wanted.text_only is false",
    "too_many_images": "it has more images than preprocess.wanted.images",
    "too_many_turns": "it has more turns than preprocess.wanted.turns",
    "system_prompt": "it has a system prompt, and preprocess.wanted.system_prompt is false",
    "undecodable_image": "the image file is truncated, damaged, or of no known format",
    "image_too_large": "its header declares more than preprocess.max_input_pixels; not decoded",
    "image_too_slow": "a JPEG of more than 100 scans, or a JPEG 2000 of more than a quarter of "
    "preprocess.max_input_pixels",
    "image_too_small": "the image's shorter side is below preprocess.min_side",
    "image_in_held_out_questions": "it belongs to the questions kept for the evaluation",
    "exact_duplicate": "image, question, chosen and rejected all equal those of an earlier row",
}

# Rows of data/pairs/left_out.parquet.
LEFT_OUT = pa.schema({name: pa.string() for name in ("where", "reason", "detail")})


@dataclass(frozen=True)
class Refusal:
    """Why a row is left out: one of ``REASONS``, and what exactly was found."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Wanted:
    """Which pairs are wanted: without an image too; images in a prompt, and questions in it, those
    of the history included, at most; with a system prompt of their own too."""

    text_only: bool
    images: int
    turns: int
    system_prompt: bool


def shape_refusal(row: Record, wanted: Wanted) -> Refusal | None:
    """Why a row with nothing wrong in it is of no wanted shape."""
    images, turns = len(row.images or ()), len(row.history) + 1
    if not images and not wanted.text_only:
        return Refusal("text_only", "no image")
    if images > wanted.images:
        return Refusal("too_many_images", f"{images} images")
    if turns > wanted.turns:
        return Refusal("too_many_turns", f"{turns} turns")
    if row.system and not wanted.system_prompt:
        return Refusal("system_prompt", row.system[:80])
    return None


def text_refusal(row: Record | Question) -> Refusal | None:
    """What is wrong with the row's fields, as far as can be told without decoding an image."""
    if isinstance(row, Record):
        texts = {"question": row.question, "chosen": row.chosen, "rejected": row.rejected}
        labels = {"origin": row.origin, "kind": row.kind, "system": row.system}
        labels["history"] = "".join(text for turn in row.history for text in turn)
    else:
        texts, labels = {"question": row.question, "answer": row.answer}, {"kind": row.kind}
    missing = [name for name, text in texts.items() if text is None]
    if row.images is None:
        missing.insert(0, "image")
    if missing:
        note = getattr(row, "note", "")
        if note and len(missing) == 4:  # the row could not be read
            return Refusal("missing_field", note)
        return Refusal("missing_field", ", ".join(missing) + (f" ({note})" if note else ""))
    for name, text in {**texts, **labels}.items():
        if not _is_unicode(text or ""):
            return Refusal("missing_field", f"{name} is not valid Unicode text")
    if not (row.question or "").strip():
        return Refusal("missing_field", "question is blank")
    answers = {name: (text or "").strip() for name, text in texts.items() if name != "question"}
    blank = [name for name, text in answers.items() if not text]
    if blank:
        return Refusal("empty_answer", ", ".join(blank))
    if len(answers) > 1 and len(set(answers.values())) == 1:
        return Refusal("identical_answers", answers["chosen"][:80])
    return None


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can spell it, unlike half a surrogate pair, which JSON's escapes allow."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
