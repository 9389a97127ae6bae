"""Which split a pair belongs to: train, validation or test."""

import hashlib
from collections.abc import Callable, Iterable, Sequence

from stages.pairs.pairs import SPLITS


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
