"""Which split an image belongs to: train, validation or test."""

import hashlib


def split_of(group: str, *, key: str, validation: float, test: float) -> str:
    """The split of an image group: ``train``, ``validation`` or ``test``.

    A keyed hash of the group's name is read as a number in [0, 1): below ``test`` it is test, below
    ``test + validation`` validation, else train. The answer depends on nothing else, so an image
    is never on two sides, and adding data moves nothing. ``key`` has at most 64 bytes.
    """
    digest = hashlib.blake2b(group.encode(), key=key.encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < test:
        return "test"
    return "validation" if position < test + validation else "train"
