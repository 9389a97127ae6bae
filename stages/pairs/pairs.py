"""A preference pair: the record a source yields, the names of pairs, and the split of each."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

SPLITS = ("train", "validation", "test")
IMAGE_PLACEHOLDER = "<image>"  # an image's place in a pair's texts, as LLaMA-Factory spells it


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


def prompt(row: Record) -> list[str]:
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


# Which split a pair belongs to


def split_of(group: str, *, key: str, validation: float, test: float) -> str:
    """The split of a group: ``train``, ``validation`` or ``test``.

    A keyed hash of the group's name is read as a number in [0, 1): below ``test`` it is test, below
    ``test + validation`` validation, else train. The answer depends on nothing else, so an image
    is never on two sides, and adding data moves nothing. ``key`` has at most 64 bytes.
    """
    digest = hashlib.blake2b(group.encode(), key=key.encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < test:
        return "test"
    return "validation" if position < test + validation else "train"


def joined(shown: Iterable[Sequence[str]]) -> dict[str, str]:
    """The group of each image, where pairs show several: those that share a pair are one group.

    Args:
        shown: the images' own groups, for each pair.

    Returns:
        For each of them the smallest name among all that pairs link it to, directly or through
        other pairs. Otherwise a pair of a train and a test image would be on both sides.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = name = parent[above]
        return name

    for names in shown:
        for name in names:
            first, second = sorted((root(names[0]), root(name)))
            parent[second] = first
    return {name: root(name) for name in parent}


def sides(
    groups: Sequence[str], published: Sequence[str], drawn: Callable[[str], str]
) -> list[str]:
    """The split of each pair, by its group and the split in which it was published ("": in none).

    What was published stays on its side. A side that was not published at all is drawn from train,
    as all sides are where nothing was published. A group that was published on several sides is
    on the strictest of them: test before validation before train.

    Args:
        drawn: ``split_of`` for a group.
    """
    missing = set(SPLITS) - set(published)
    strictest: dict[str, str] = {}
    for group, side in zip(groups, published, strict=True):
        if not side or (side == "train" and drawn(group) in missing):
            side = drawn(group)
        strictest[group] = max(strictest.get(group, side), side, key=SPLITS.index)
    return [strictest[group] for group in groups]
