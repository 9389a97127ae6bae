"""Text for people."""


def readable(count: int) -> str:
    """A size in bytes: ``8.9 GB``, ``120.1 kB``, ``17 bytes``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
