"""The encoded image that a cell of a table means: bytes, base64, a data URL, or a file's name."""

import base64
import binascii
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from stages.core.text import readable, shown
from stages.pairs import named, web_index
from stages.pairs.formats import MOST_BYTES
from stages.pairs.layouts import Odd, Unreadable
from stages.pairs.magic import format_of

_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{64,}={0,2}\s*")
_DATA_URL = re.compile(r"data:[\w.+/-]*(;[\w=-]+)*;base64,", re.ASCII)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,20}://")


def encoded(cell: Any, folders: Sequence[Path]) -> bytes | str:
    """An encoded image, or why it can't be had, as when its file is not there.

    A name is looked for in each of ``folders`` in turn: that of the data file, then the source's.

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
    if isinstance(cell, bytes | bytearray):
        if len(cell) > MOST_BYTES:
            return f"the image is of {readable(len(cell))}, and {readable(MOST_BYTES)} is the most"
        return bytes(cell) or "no bytes"
    if cell is None and not name:
        return "no image"
    if cell is not None or not isinstance(name, str):
        kind = type(name if cell is None else cell).__name__
        raise Odd(f"the image holds {kind}, not bytes, a struct of bytes and path, or a path")
    return _from_text(name, folders)


def _from_text(text: str, folders: Sequence[Path]) -> bytes | str:
    if found := _DATA_URL.match(text[:100]):
        return _from_base64(text[found.end() :]) or f"{shown(text, 60)} is not valid base64"
    if text.startswith("data:"):
        return f"{shown(text, 60)} is a data URL without base64"
    if _URL.match(text[:30].lstrip()):
        found_at = web_index.find(folders[-1], text.strip()) if folders else None
        if found_at is None:
            raise Odd(
                f"the image {shown(text)!r} is an address, and nothing is downloaded while rows "
                "are read; set data.source.image_urls to its column, so that fetch downloads "
                "what is at https, or download the images and name them by their paths"
            )
        return found_at if isinstance(found_at, str) else found_at.read_bytes()
    # Base64 of a JPEG begins with "/9j/", as a path could; so it is what it holds that decides.
    if _BASE64.fullmatch(text) and (data := _from_base64(text)) and format_of(data):
        return data
    return _from_file(text, folders)


def _from_base64(text: str) -> bytes | None:
    packed = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True) or None
    except (binascii.Error, ValueError):
        return None


def _from_file(name: str, folders: Sequence[Path]) -> bytes | str:
    if "\0" in name or named.leads_out(name):
        raise Odd(
            f"image path {named.shown(name)} leaves the folder of its data file; put the images "
            "next to the file and make their paths relative to it" + _likely(name, folders[-1])
        )
    why = ""
    for folder in folders:
        found = named.find(folder, name)
        if isinstance(found, str):
            why = why or found
            continue
        try:
            if (size := found.stat().st_size) > MOST_BYTES:
                return f"{shown(name)} is of {readable(size)}, and {readable(MOST_BYTES)} the most"
            return found.read_bytes() or f"{shown(name)} is empty"
        except OSError as error:
            return f"{shown(name)}: {error.strerror}"
    return why + _likely(name, folders[-1])


def _likely(name: str, root: Path) -> str:
    """The one file below ``root`` that has the path's last part, as a question."""
    last = named.parts(name.replace("\0", ""))[-1:] if len(name) <= named.MOST else []
    found = _by_last_part(root).get(named.key(last[0]), ()) if last else ()
    return f" (is it {shown(found[0])}?)" if len(found) == 1 else ""


@lru_cache(maxsize=1)
def _by_last_part(root: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for folder, _, files in os.walk(root):
        for file in files:
            path = Path(folder, file).relative_to(root).as_posix()
            found.setdefault(named.key(file), []).append(path)
    return found
