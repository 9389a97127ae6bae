"""Gone into ``formats``; here until ``sources`` imports from there."""

from collections.abc import Iterable

from stages.pairs.formats import ending, is_hidden

__all__ = ["ending", "is_hidden", "tables"]


def tables(names: Iterable[str]) -> list[str]:
    return [name for name in names if ending(name)]
