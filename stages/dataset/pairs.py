"""A preference pair: the record a source yields, and the table that later stages read."""

import hashlib
from dataclasses import dataclass

import pyarrow as pa

SPLITS = ("train", "validation", "test")

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


def row_id(*fields: str) -> str:
    """16 hexadecimal digits that name a row by its content, the same on every machine.

    Each field goes in with its length, so that ("ab", "c") and ("a", "bc") differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for field in fields:
        encoded = field.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
