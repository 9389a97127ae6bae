"""Text for people."""

from collections.abc import Iterable


def readable(count: int) -> str:
    """A size in bytes: ``8.9 GB``, ``120.1 kB``, ``17 bytes``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def shown(value: object, most: int = 100) -> str:
    """A user's value as a message may print it: on one line, ``most`` characters of it at most.

    A base64 image in a column of paths once made a message of 209,844 characters.
    """
    if isinstance(value, bytes | bytearray | list | tuple | dict):
        text = f"{type(value).__name__} of {len(value):,}"
    else:
        text = str(value)[: most + 1]
    text = " ".join(text.split()) if text.strip() else repr(text)
    # Neither half a surrogate, which no terminal can be sent, nor what moves its cursor.
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def listed(names: Iterable[str], most: int = 20, longest: int = 40) -> str:
    """Names joined by commas, each cut at ``longest`` characters, and how many more there are."""
    found = list(names)
    text = ", ".join(shown(name, longest) for name in found[:most])
    return text + (f" and {len(found) - most:,} more" if len(found) > most else "")
