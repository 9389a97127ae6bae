"""The encoded image that a cell of a table means: bytes, base64, a data URL, or a file's name."""

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.core.text import readable, shown
from stages.pairs.files import MOST_CHARACTERS
from stages.pairs.formats import MOST_BYTES, Unreadable
from stages.pairs.layouts import Odd

_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{64,}={0,2}\s*")
_DATA_URL = re.compile(r"data:[\w.+/-]*(;[\w=-]+)*;base64,", re.ASCII)
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]{1,20}://")


def encoded(cell: Any, find: Callable[[str], Path | str]) -> bytes | str:
    """An encoded image, or why there is none, as when its file is missing.

    Args:
        find: the file that a name means, or why there is none.

    Raises:
        Odd: it is nothing that could be an image, which speaks of its column rather than its row.
    """
    name = None
    if isinstance(cell, Mapping):
        name, cell = cell.get("path") or cell.get("url"), cell.get("bytes")
    if isinstance(cell, Unreadable):
        raise Odd(f"the image {cell.why}")
    if isinstance(cell, str):
        name, cell = cell, None
    if cell is None and isinstance(name, str) and name:
        cell = _from_text(name, find)
    if isinstance(cell, str):
        return cell
    if cell is None and not name:
        return "no image"
    if not isinstance(cell, bytes | bytearray):
        kind = type(name if cell is None else cell).__name__
        raise Odd(f"the image holds {kind}, not bytes, a struct of bytes and path, or a path")
    if len(cell) > MOST_BYTES:
        return f"the image is of {readable(len(cell))}, and {readable(MOST_BYTES)} is the most"
    return bytes(cell) or "no bytes"


def _from_text(text: str, find: Callable[[str], Path | str]) -> bytes | str:
    if found := _DATA_URL.match(text[:100]):
        return _from_base64(text[found.end() :]) or f"{shown(text, 60)} is not valid base64"
    if text.startswith("data:"):
        return f"{shown(text, 60)} is a data URL without base64"
    path = find(text) if len(text) <= MOST_CHARACTERS else f"{shown(text, 60)!r} is no file's name"
    if isinstance(path, str) and _URL.match(text[:30]):
        raise Odd(
            f"the image {shown(text)!r} is an address, and nothing is downloaded while rows are "
            "read; img2dataset downloads images and writes tar files that are read here"
        )
    if isinstance(path, str):  # base64 of a JPEG begins with "/9j/", as a path could
        return (_BASE64.fullmatch(text) and _from_base64(text)) or path
    try:
        size = path.stat().st_size
        return path.read_bytes() if size <= MOST_BYTES else f"{shown(text)} is {readable(size)}"
    except OSError as error:
        return f"{shown(text)}: {error.strerror}"


def _from_base64(text: str) -> bytes | None:
    packed = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True) or None
    except (binascii.Error, ValueError):
        return None
