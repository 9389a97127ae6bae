"""One source's tables, read row by row as records.

Files are read in the order of their names. How a file holds rows is ``formats``' to know, which
column holds what ``layouts``', and which file a name means ``files``'. An odd cell costs its row;
where most of the first rows are odd, it is the column that is wrong, and the run stops.

``asked`` is always the source's entry in ``data.sources`` (``sources.source.Tables``): the columns'
names, ``remap``, and ``datasets``, the entries of a ``dataset_info.json`` that are wanted.
"""

import base64
import binascii
import contextlib
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from stages.core.errors import UserError, did_you_mean, listed, readable, shown
from stages.pairs import formats, layouts
from stages.pairs.files import (
    CODE,
    FETCHED,
    MOST_CHARACTERS,
    PICKLES,
    SUFFIXES,
    Folder,
    ending,
    suffix,
    walk,
)
from stages.pairs.formats import MOST_BYTES, PEEK, Table, Unreadable
from stages.pairs.layouts import Layout, Odd, unread
from stages.pairs.pairs import Record

# Words that say a split, as the datasets library reads names.
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{64,}={0,2}\s*")
_DATA_URL = re.compile(r"data:[\w.+/-]*(;[\w=-]+)*;base64,", re.ASCII)
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]{1,20}://")
_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}
_ARCHIVES = {".zip", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".bz2", ".xz"}
_OTHER_TABLES = {".arrow", ".feather", ".ndjson", ".ods", ".orc", ".xls", ".xlsx"}
# Written beside the data by the tools that write it; they hold no rows.
_INFO = "dataset_info.json"
_NOT_DATA = {_INFO, "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class Contents:
    """What a folder, or a single table, holds. Names are POSIX paths below ``root``, sorted.

    ``tables`` are read, some of them by a layout that ``described`` gives; ``others`` belong to
    them: images, whatever their suffix, and descriptions. fetch copies both. ``left_out`` says of
    each other file why it is neither.
    """

    root: Path
    tables: tuple[str, ...]
    others: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    described: Mapping[str, Layout] = field(default_factory=dict)


def contents(path: Path, asked: Any) -> Contents:
    """What a source holds: ``path`` is a folder, or one table with the images that its rows name.

    check, fetch and preprocess all ask here, so that they say the same.

    Raises:
        UserError: there is nothing, no table, or a link that leads out of the folder.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; name a file or a folder")
    if path.is_file() and ending(path.name):
        return _with_images(Contents(path.parent, (path.name,)), asked)
    names = [name for name in (walk(path) if path.is_dir() else ()) if name != FETCHED]
    left_out = {name: "it can run code" for name in names if suffix(name) in PICKLES | CODE}
    packed = [name for name in names if suffix(name) in _ARCHIVES]
    left_out |= dict.fromkeys(packed, "an archive; unpack it there")
    others = [name for name in names if suffix(name) in _OTHER_TABLES]
    left_out |= dict.fromkeys(others, "a table of a kind that is not read; save it as Parquet")
    tables = [name for name in names if ending(name) and PurePosixPath(name).name not in _NOT_DATA]
    infos = [name for name in names if PurePosixPath(name).name == _INFO]
    described = _described(path, infos, tables, asked.datasets)
    archives = [name for name in tables if ending(name) == ".tar"]
    lists = [name for name in tables if name.removesuffix(".parquet") + ".tar" in archives]
    for few, why in (
        ([name for name in tables if name not in described], f"not in {_INFO}"),
        (lists, "img2dataset's list of what is in the tar of that name"),
        ([name for name in tables if _is_no_table(path / name, asked)], "an object, not rows"),
        (archives, "a tar beside tables, perhaps of images"),
    ):
        if len(few) < len(tables):
            left_out |= dict.fromkeys(few, why)
            tables = [name for name in tables if name not in left_out]
    if not tables:
        arrow = any(suffix(name) == ".arrow" for name in names)
        raise UserError(
            f"{path} holds no {', '.join(SUFFIXES[:4])}, … file; name the file or folder that does"
            + ", or write one by `datasets.load_from_disk(…).to_parquet(…)`" * arrow
        )
    rest = tuple(name for name in names if name not in {*tables, *left_out})
    return Contents(path, tuple(tables), rest, left_out, described)


def _with_images(there: Contents, asked: Any) -> Contents:
    """A table alone, and the files that its rows name."""
    folder = Folder(there.root, asked.remap)
    found: set[str] = set()

    def noted(name: str) -> str:
        path = folder.find(name)
        found.update([path.relative_to(there.root).as_posix()] if isinstance(path, Path) else [])
        return "not read here"

    for table in opened(there, asked):
        deque(table.records(noted), maxlen=0)
    return replace(there, others=tuple(sorted(found)))


def _is_no_table(path: Path, asked: Any) -> bool:
    """Whether a JSON file is one object that is no pair: annotations, or a description."""
    if suffix(path.name) == ".json":
        with contextlib.suppress(UserError):  # what is wrong is said where the table is opened
            table = formats.open_table(path)
            few = list(itertools.islice(table.rows(()), 2))
            return len(few) == 1 and layouts.choose(table.names, asked.columns.model_dump()) is None
    return False


def records(raw: Path, asked: Any) -> Iterator[Record]:
    """Every row of every table of one source: ``raw`` is its folder, or a single table.

    Where a table has other columns than ``asked``, its layout is looked for (see ``layouts``).

    Raises:
        UserError: a table is damaged, lacks a column, or has one that holds something else; what is
            wrong with any of them is said before the first row is given.
    """
    there = contents(raw, asked)
    folder = Folder(there.root, asked.remap)
    found = opened(there, asked)
    if ignored := {n for one in found for n in one.table.names if n not in one.layout.columns}:
        print(f"columns that are not read: {listed(sorted(ignored))}")
    for table in found:
        yield from table.records(partial(folder.find, beside=os.path.dirname(table.name)))
    for start in folder.remap:
        if start not in folder.used:
            raise UserError(f"remap: no image's name begins with {start!r:.100}")
    for named, place in itertools.islice(folder.guessed.items(), 3):
        print(f"images named {shown(named)}/… were found in {place or '.'}")


@dataclass(frozen=True)
class Opened:
    """A table that can be read: its name below the source, its layout, the split of its rows."""

    name: str
    table: Table
    layout: Layout
    split: str = ""

    def records(self, find: Callable[[str], Path | str]) -> Iterator[Record]:
        """Its rows; ``find`` gives the file that a name means."""
        encoded = partial(image_of, find=find)
        wanted = (
            self.layout.columns | self.layout.unread.keys() | set(filter(unread, self.table.names))
        )
        wanted &= {*self.table.names}
        for number, row in enumerate(self.table.rows(wanted), start=1):
            where = f"{self.name} row {number}"
            try:
                yield layouts.record(row, self.layout, where, self.split, encoded)
            except Odd as error:
                yield Record(where, None, None, None, None, note=str(error), reason=error.reason)


def opened(there: Contents, asked: Any) -> list[Opened]:
    """The tables of a source that have rows.

    Raises:
        UserError: says of each table that can't be read why.
    """
    found, problems = [], []
    sides = {name: published_split(name) for name in there.tables}
    divided = len({*sides.values()}) > 1 and "" not in sides.values()
    for name in there.tables:
        try:
            table = formats.open_table(there.root / name)
            if table.names:
                layout = _layout(table, there.described.get(name), asked)
                found.append(Opened(name, table, layout, sides[name] if divided else ""))
                _refuse_odd(found[-1], Folder(there.root, asked.remap))
        except UserError as error:
            problems.append(str(error))
    if problems:
        more = f"; so {len(problems)} of {len(there.tables)} tables" * (len(problems) > 1)
        raise UserError("; ".join(problems[:3]) + more)
    return found


def _layout(table: Table, described: Layout | None, asked: Any) -> Layout:
    """Raises ``UserError`` where the table lacks a column."""
    layout = described or layouts.choose(table.names, asked.columns.model_dump())
    wanted = asked.columns.model_dump() if layout is None or layout.name == layouts.OWN else {}
    if described:
        wanted = {part: getattr(described, part) for part in ("prompt", "chosen", "rejected")}
    first = list(itertools.islice(table.rows(table.names), PEEK))
    lacking = layouts.missing(table.names, wanted, first)
    if layout is None or lacking:
        raise UserError(f"{table.path} {lacking}")
    return layout


def _refuse_odd(table: Opened, folder: Folder) -> None:
    """Refuse a table most of whose first rows can't be read: the column is wrong, not the cell."""
    first = list(itertools.islice(table.records(folder.find), PEEK))
    odd = [row for row in first if row.question is row.chosen is row.rejected is None and row.note]
    if sum(row.reason == "missing_field" for row in odd) * 2 > len(first):
        raise UserError(
            f"{table.table.path} row {first.index(odd[0]) + 1}: {odd[0].note} (so {len(odd)} of "
            f"its first {len(first)} rows can't be used); name other columns in `columns`"
        )


def published_split(name: str) -> str:
    """The split that a file's name or its folder's says, its last word of several; else empty."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_WORDS[word] for word in reversed(words) if word in _WORDS), "")


# LLaMA-Factory's dataset_info.json


def _described(
    root: Path, infos: Sequence[str], tables: Collection[str], datasets: Sequence[str] | None
) -> dict[str, Layout]:
    """The layouts of the tables that a ``dataset_info.json`` describes as preferences.

    ``infos`` are such files below ``root``. ``datasets`` are the entries that are wanted; None: all
    that hold preferences.

    Raises:
        UserError: an entry that is wanted is missing, or its file.
    """
    found: dict[str, Layout] = {}
    known: dict[str, tuple[str, dict[str, Any]]] = {}  # by the name of the entry
    for info in infos:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            entries = json.loads((root / info).read_text(encoding="utf-8"))
            of_files = (name for name, entry in entries.items() if "file_name" in entry)
            known |= {name: (info, entries[name]) for name in of_files}
    folder = Folder(root)
    for name in known if datasets is None else datasets:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"{_INFO} in {root} has no entry {name!r} with a file_name{hint}")
        info, entry = known[name]
        given = {**(entry.get("columns") or {}), **(entry.get("tags") or {})}
        if datasets is None and not (entry.get("ranking") or {"chosen", "rejected"} <= {*given}):
            continue
        beside, place = os.path.dirname(info), str(entry["file_name"])
        path = folder.find(place, beside)
        inside = os.path.join(beside, place, "")
        file = path.relative_to(root).as_posix() if isinstance(path, Path) else None
        there = [table for table in tables if table == file or table.startswith(inside)]
        if not there:
            raise UserError(
                f"{root / info} describes {name!r} by the file {place!r:.100}, which is not among "
                f"the tables ({listed(tables, 5)}); add it, or name other entries in `datasets`"
            )
        found |= dict.fromkeys(there, _layout_of(name, given, entry.get("formatting", "alpaca")))
    return found


def _layout_of(name: str, given: Mapping[str, str], formatting: str) -> Layout:
    """By the names of columns and tags that an entry gives, and LLaMA-Factory's own for others."""
    alpaca = formatting == "alpaca"
    prompt = ("prompt", "instruction") if alpaca else ("messages", "conversations")
    return Layout(
        f"{name} of {_INFO}",
        prompt=given.get(*prompt),
        more=given.get("query", "input") if alpaca else "",
        chosen=given.get("chosen", "chosen"),
        rejected=given.get("rejected", "rejected"),
        image=given.get("images", "images"),
        system=given.get("system", "system"),
        role=(given.get("role_tag", "from"),),
        content=(given.get("content_tag", "value"),),
        roles={given.get(f"{role}_tag", tag).lower(): role for role, tag in _ROLES.items()},
        dataset=name,
        unread={column: unread(part) for part, column in given.items()},
    )


# Cells of images


def image_of(cell: Any, find: Callable[[str], Path | str]) -> bytes | str:
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
        return f"the image has {readable(len(cell))}; at most {readable(MOST_BYTES)} are read"
    return bytes(cell) or "no bytes"


def _from_text(text: str, find: Callable[[str], Path | str]) -> bytes | str:
    if found := _DATA_URL.match(text[:100]):
        return _from_base64(text[found.end() :]) or f"{shown(text, 60)} is not valid base64"
    if text.startswith("data:"):
        return f"{shown(text, 60)} is a data URL without base64"
    path = find(text) if len(text) <= MOST_CHARACTERS else f"{shown(text, 60)!r} is not a file name"
    if isinstance(path, str) and _URL.match(text[:30]):
        raise Odd(
            f"the image {shown(text)!r} is an address, and preprocess downloads nothing; download "
            "the images into tars with img2dataset (docs/guide.md)"
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
