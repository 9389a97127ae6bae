"""A preference pair: the record a source yields, and the table that later stages read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

SPLITS = ("train", "validation", "test")
IMAGE_PLACEHOLDER = "<image>"  # an image's place in a pair's texts, as LLaMA-Factory spells it

# Rows of data/pairs/pairs.parquet; images are relative to data/pairs/images/, in the order of the
# prompt, and their sizes are in pixels. ``history`` is the turns before the question.
PAIRS = pa.schema(
    {
        "id": pa.string(),
        "images": pa.list_(pa.string()),
        "widths": pa.list_(pa.int32()),
        "heights": pa.list_(pa.int32()),
        "system": pa.string(),
        "history": pa.list_(pa.struct({"user": pa.string(), "assistant": pa.string()})),
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


@dataclass(frozen=True)
class Record:
    """One row as a source has it, before any check.

    ``where`` says which row it is ("train-00.parquet row 17"), for messages and the list of
    rows left out. ``images`` are encoded files (PNG, JPEG, …) in the order of the prompt, none of
    them for a text alone. What the source lacks is ``None``. ``origin`` is the data set the row
    came from, ``kind`` its question type; both may be empty. ``note`` is the source's word on what
    is missing, and ``reason`` what that counts as. ``system`` is the system prompt, ``history`` the
    turns before the question, each what the user and then the assistant said. ``split`` is that in
    which the data set was published, one of ``SPLITS``, or empty. ``ended``: a text that ends an
    assistant's turn was taken off its answers.
    """

    where: str
    images: tuple[bytes, ...] | None
    question: str | None
    chosen: str | None
    rejected: str | None
    origin: str = ""
    kind: str = ""
    note: str = ""
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    split: str = ""
    reason: str = "missing_field"
    ended: bool = False


@dataclass(frozen=True)
class Question:
    """A held-out question about one image whose true answer the data set knows; used to grade
    generated answers."""

    where: str
    images: tuple[bytes, ...]
    question: str
    answer: str
    kind: str = ""


def pair_id(row: Record, images: Sequence[str]) -> str:
    """Names a pair by its content: its images, each named by theirs, and all of its texts."""
    return row_id(*images, *_prompt(row), str(row.chosen), str(row.rejected))


def prompt_id(row: Record) -> str:
    """Names what a pair without images asks."""
    return row_id(*_prompt(row))


def _prompt(row: Record) -> list[str]:
    """What a prompt says, each text before its question after the role that says it."""
    said = ["system", row.system] if row.system else []
    for user, assistant in row.history:
        said += ["user", user, "assistant", assistant]
    return [*said, str(row.question)]


def row_id(*fields: str) -> str:
    """16 hexadecimal digits that name a row by its content, the same on every machine.

    Each field goes in with its length, so that ("ab", "c") and ("a", "bc") differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for field in fields:
        encoded = field.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
