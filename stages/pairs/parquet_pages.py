"""How large the pages of a Parquet file are, read from its headers without decoding anything.

pyarrow reads a page at once and does not say how large one is. Its own metadata of a column can't
be asked for: of a damaged one pyarrow 25 aborts the process ("terminate called after throwing").
So footer and page headers are read here, in Thrift's compact protocol (parquet.thrift gives the
numbers of the fields).
"""

import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_MOST_FOOTER = 2**26  # bytes; ten row groups a second are read of it
_MOST_HEADER = 2**16
_MOST_PAGES = 100_000
_DEEPEST = 16
_DICTIONARY = 2  # the type of a page


@dataclass(frozen=True)
class Sizes:
    """Bytes once decompressed, of the columns asked for: all of them, the largest page and which
    column it is of, and the largest dictionary, which is more than any value that it repeats."""

    total: int = 0
    page: int = 0
    column: str = ""
    dictionary: int = 0


def sizes(path: Path, wanted: Collection[str]) -> Sizes | None:
    """The sizes of the columns named; None: the headers can't be read, as pyarrow will say."""
    try:
        with path.open("rb") as file:
            return _sizes(file, wanted)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):
        return None


def _sizes(file: BinaryIO, wanted: Collection[str]) -> Sizes | None:
    file.seek(-8, 2)
    length, magic = struct.unpack("<I4s", file.read(8))
    if magic != b"PAR1" or length > _MOST_FOOTER:
        return None
    file.seek(-8 - length, 2)
    footer, _ = _struct(file.read(length), 0)
    total, dictionary, largest, left = 0, 0, (0, ""), _MOST_PAGES
    for group in footer[4]:
        for column in group[1]:
            meta = column[3]
            name = meta[3][0].decode("utf-8", "replace")
            if name not in wanted:
                continue
            total += meta[6]
            at = min(meta[9], meta.get(11) or meta[9])
            end = at + meta[7]
            while at < end and left:
                left -= 1
                page, taken = _page(file, at)
                at += taken + max(page[3], 0)
                largest = max(largest, (page[2], name))
                if page[1] == _DICTIONARY:
                    dictionary = max(dictionary, page[2])
    return Sizes(total, *largest, dictionary)


def _page(file: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """A page's header, and how many bytes it takes."""
    for size in (256, _MOST_HEADER):
        file.seek(at)
        try:
            return _struct(file.read(size), 0)
        except LookupError:  # statistics made it longer
            continue
    raise ValueError("a header without an end")


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Fields by number, and where the structure ends."""
    if depth > _DEEPEST:
        raise ValueError("too deep")
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _whole(data, at)
        fields[number], at = _value(data, at, head & 15, depth, in_list=False)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int, *, in_list: bool) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false: in a list a byte each
        return kind == 1, at + in_list
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _whole(data, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _unsigned(data, at)
        if at + length > len(data):
            raise IndexError("cut")
        return data[at : at + length], at + length
    if kind in (9, 10):
        size, inner = data[at] >> 4, data[at] & 15
        at += 1
        if size == 15:
            size, at = _unsigned(data, at)
        items = []
        for _ in range(size):
            item, at = _value(data, at, inner, depth + 1, in_list=True)
            items.append(item)
        return items, at
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise ValueError(f"type {kind}")


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number without an end")


def _whole(data: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at
