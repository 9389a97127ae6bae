"""A preference pair: the record a source yields, and the table that later stages read."""

import hashlib
from dataclasses import dataclass

import pyarrow as pa

SPLITS = ("train", "validation", "test")

# Why a row can be left out, in the order of asking: a row counts under the first that holds.
REASONS = {
    "missing_field": "a field is absent or is not valid text, or question is blank",
    "empty_answer": "chosen or rejected is blank",
    "identical_answers": "chosen and rejected are equal, white space at the ends aside",
    "undecodable_image": "the image file is truncated, damaged, or of no known format",
    "image_too_large": "its header declares more than preprocess.max_input_pixels; not decoded",
    "image_too_small": "the image's shorter side is below preprocess.min_side",
    "image_in_held_out_questions": "it belongs to the questions kept for the evaluation",
    "exact_duplicate": "image, question, chosen and rejected all equal those of an earlier row",
}

# Rows of data/pairs/pairs.parquet; image is relative to data/pairs/images/.
PAIRS = pa.schema(
    {
        "id": pa.string(),
        "image": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "question": pa.string(),
        "chosen": pa.string(),
        "rejected": pa.string(),
        "origin": pa.string(),
        "kind": pa.string(),
        "group": pa.string(),
        "split": pa.string(),
    }
)
QUESTIONS = pa.schema({name: pa.string() for name in ("id", "image", "question", "answer", "kind")})
LEFT_OUT = pa.schema({name: pa.string() for name in ("where", "reason", "detail")})


@dataclass(frozen=True)
class Record:
    """One row as a source has it, before any check.

    ``where`` says which row it is ("train-00.parquet row 17"), for messages and the list of
    rows left out. ``image`` is the encoded file (PNG, JPEG, …). What the source lacks is ``None``.
    ``origin`` is the data set the row came from, ``kind`` its question type; both may be empty.
    ``note`` is the source's word on why ``image`` is ``None``, if it has one.
    """

    where: str
    image: bytes | None
    question: str | None
    chosen: str | None
    rejected: str | None
    origin: str = ""
    kind: str = ""
    note: str = ""


@dataclass(frozen=True)
class Question:
    """A held-out question whose true answer the data set knows; used to grade generated answers."""

    where: str
    image: bytes
    question: str
    answer: str
    kind: str = ""


@dataclass(frozen=True)
class Refusal:
    """Why a row is left out: one of ``REASONS``, and what exactly was found."""

    reason: str
    detail: str


def text_refusal(row: Record | Question) -> Refusal | None:
    """What is wrong with the row's fields, as far as can be told without decoding the image."""
    if isinstance(row, Record):
        texts = {"question": row.question, "chosen": row.chosen, "rejected": row.rejected}
        labels = {"origin": row.origin, "kind": row.kind}
    else:
        texts, labels = {"question": row.question, "answer": row.answer}, {"kind": row.kind}
    missing = [name for name, text in texts.items() if text is None]
    if row.image is None:
        missing.insert(0, "image")
    if missing:
        note = getattr(row, "note", "")
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


def row_id(*fields: str) -> str:
    """16 hexadecimal digits that name a row by its content, the same on every machine.

    Each field goes in with its length, so that ("ab", "c") and ("a", "bc") differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for field in fields:
        encoded = field.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
