"""A preference pair: the record a source yields, the table every later stage reads, and its split."""

import hashlib
from dataclasses import dataclass

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Record:
    """One row as a source has it, before any check.

    ``where`` says where the row stands ("train-00.parquet row 17"), for messages and the list of rows
    left out. ``image`` is the encoded file (PNG, JPEG, …). A field the source lacks is ``None``.
    ``origin`` is the data set the row came from, ``kind`` its question type; both may be empty.
    """

    where: str
    image: bytes | None
    question: str | None
    chosen: str | None
    rejected: str | None
    origin: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Question:
    """A held-out question whose true answer the data set knows; used to grade generated answers."""

    where: str
    image: bytes
    question: str
    answer: str
    kind: str = ""


def split_of(group: str, *, key: str, validation: float, test: float) -> str:
    """The split of an image group: ``train``, ``validation`` or ``test``.

    A keyed hash of the group's name is read as a number in [0, 1): below ``test`` it is test, below
    ``test + validation`` validation, else train. The answer depends on nothing else, so an image never
    stands on two sides, and adding data moves nothing.
    """
    digest = hashlib.blake2b(group.encode(), key=key.encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < test:
        return "test"
    return "validation" if position < test + validation else "train"


