"""Tabular sources: the data files below a folder, read row by row as records.

Files are read in the order of their names. How a file holds rows is ``formats``' to know, which
column holds what ``layouts``', and what image a cell means ``pictures``'. An odd cell costs its
row; where most of the first rows are odd, it is the column that is wrong, and the run stops.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.core.errors import UserError
from stages.core.text import listed, shown
from stages.pairs import formats, layouts, pictures, suffixes
from stages.pairs.files import CODE, FETCHED, PICKLES, Contents, Folder, suffix, walk
from stages.pairs.formats import Row, Table
from stages.pairs.layouts import Fields, Layout, Odd, Unreadable
from stages.pairs.pairs import Record
from stages.pairs.suffixes import NOT_DATA, SUFFIXES, ending, is_hidden, published_split

_SAMPLE = 100  # first rows of a file that tell an odd column from an odd cell
_WITH_HEADER = (".parquet", ".arrow", ".csv", ".tsv")  # their columns are known without reading on
_IMAGE = "an image (bytes, a struct of bytes and path, or a relative path)"


@dataclass(frozen=True)
class Reading:
    """How one source's tables are read: what its entry in ``data.sources`` says of them.

    ``columns`` gives the column for each of image, question, chosen, rejected, origin and kind; all
    but question, chosen and rejected may be None. ``remap`` are rules for the names of images: what
    begins with the first begins with the second instead. ``datasets`` are entries of
    LLaMA-Factory's ``dataset_info.json``; None: all that hold preferences.
    """

    columns: Mapping[str, str | None]
    remap: tuple[tuple[str, str], ...] = ()
    datasets: tuple[str, ...] | None = None


def contents(path: Path, reading: Reading) -> Contents:
    """What a source holds: ``path`` is a folder, or one table with the images that its rows name.

    check, fetch and preprocess all ask here, so that they say the same.

    Raises:
        UserError: there is nothing, no table, or a link that leads out of the folder.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; name a file or a folder")
    if path.is_file() and ending(path.name):
        folder = Folder(path.parent, reading.remap)
        found = {folder.find(name, "") for name in named_files(path, reading)}
        images = (each.relative_to(path.parent) for each in found if isinstance(each, Path))
        return Contents(path.parent, (path.name,), tuple(sorted(i.as_posix() for i in images)))
    left_out: dict[str, str] = {}
    tables, others = [], []
    for name in walk(path) if path.is_dir() else []:
        base = name.rpartition("/")[2]
        if base in NOT_DATA:
            others += [name] * (base != FETCHED)
        elif suffix(name) in PICKLES | CODE:
            left_out[name] = "it can run code"
        elif base.startswith(("cache-", "indices")) and suffix(name) == ".arrow":
            left_out[name] = "the datasets library keeps what it computed there"
        elif ending(name):
            tables.append(name)
        else:
            others.append(name)
    beside = [name for name in tables if ending(name) != ".tar"]
    if beside:
        left_out |= {name: "a tar beside tables" for name in tables if name not in beside}
    single = [name for name in beside if suffix(name) == ".json" and _is_object(path / name)]
    if len(single) < len(beside):
        left_out |= {name: "it is one JSON object and not rows" for name in single}
    tables = [name for name in tables if name not in left_out]
    if not tables:
        kinds = ", ".join(SUFFIXES[:4])
        raise UserError(f"{path} holds no {kinds}, … file; name the file or folder that does")
    return Contents(path, tuple(tables), tuple(others), left_out)


def _is_object(path: Path) -> bool:
    return formats.open_table(path).is_one_object


def files(raw: Path) -> list[Path]:
    """The data files below ``raw`` in the order they are read; hidden ones are not data.

    ``raw`` may be a data file itself.

    Raises:
        UserError: there are none.
    """
    if raw.is_file() and ending(raw.name):
        return [raw]
    there = {path.relative_to(raw).as_posix(): path for path in raw.rglob("*")}
    found = suffixes.tables(name for name, path in there.items() if _is_data(path, raw))
    if not found:
        raise UserError(
            f"{raw} holds no {', '.join(SUFFIXES[:4])}, … file; "
            "check data.source (for a Hub repository, its files)"
        )
    return [there[name] for name in sorted(found)]


def _is_data(path: Path, raw: Path) -> bool:
    # The datasets library keeps what it has computed in cache-….arrow next to the data.
    cached = path.name.startswith(("cache-", "indices")) and path.suffix == ".arrow"
    return (
        ending(path.name) != ""
        and path.name not in NOT_DATA
        and not is_hidden(path.relative_to(raw).as_posix())
        and not cached
        and path.is_file()
    )


def count(raw: Path) -> int | None:
    """The number of rows below ``raw``, or None if only reading them all would tell."""
    paths = files(raw)
    if any(ending(path.name) != ".parquet" for path in paths):
        return None
    return sum(formats.open_table(path).count or 0 for path in paths)


def records(raw: Path, reading: Reading) -> Iterator[Record]:
    """Every row of every table of one source: ``raw`` is its folder, or a single table.

    Where a file has other columns than ``reading``, its layout is looked for (see ``layouts``).

    Raises:
        UserError: a file is damaged, lacks a column, or has one of a wrong type. Files that say
            their columns at their start are all checked before the first row is given.
    """
    columns = reading.columns
    paths = files(raw)
    raw = raw.parent if raw.is_file() else raw
    published = _published(paths, raw)
    for path in paths:
        if ending(path.name) in _WITH_HEADER:
            opened(path, columns)
    for path in paths:
        table, layout = opened(path, columns)
        name = path.relative_to(raw).as_posix()
        if layout is not None:
            folders = tuple(dict.fromkeys((path.parent, raw)))
            read = partial(_record, layout=layout, folders=folders, split=published[path])
            yield from _records(table, layout, read, name)


def named_files(table: Path, reading: Reading) -> Iterator[str]:
    """The names that a table's rows give their image files, as they are written there.

    ``files.Folder`` finds what each means.

    Raises:
        UserError: the table is damaged, or holds no pairs.
    """
    opened_table, layout = opened(table, reading.columns)
    for row in opened_table.rows(layout.columns) if layout else ():
        cells: tuple[Any, ...] = ()
        with contextlib.suppress(Odd):
            if not isinstance(row, Unreadable) and layout:
                cells = layouts.fields(row, layout).images or ()
        for cell in cells:
            name = cell.get("path") if isinstance(cell, Mapping) else cell
            if isinstance(name, str) and len(name) < 1000:
                yield name


def _records(table: Table, layout: Layout, read: Any, name: str) -> Iterator[Record]:
    """A table's rows, unless most of the first are odd.

    Raises:
        UserError: they are; it is said of the first of them why.
    """
    number, odd, why = 0, 0, ""
    for number, row in enumerate(table.rows(layout.columns), start=1):
        where = f"{name} row {number}"
        try:
            yield read(row, where)
        except Odd as error:
            odd, why = odd + 1, why or f"row {number}: {error}"
            yield Record(where, None, None, None, None, note=str(error))
        if number == _SAMPLE:
            _refuse_odd(table.path, odd, number, why)
    if number < _SAMPLE:
        _refuse_odd(table.path, odd, number, why)


def _refuse_odd(path: Path, odd: int, seen: int, why: str) -> None:
    if odd * 2 > seen:
        raise UserError(
            f"{path} {why} (so {odd} of its first {seen} rows can't be used); "
            "name other columns in data.columns"
        )


def _published(paths: list[Path], raw: Path) -> dict[Path, str]:
    """The split that each file was published in by its name or its folder's, as ``datasets`` reads
    them (``test-00000.parquet``, ``validation/rows.jsonl``); empty where that names fewer than two.
    """
    found = {}
    for path in paths:
        found[path] = published_split(path.relative_to(raw).as_posix())
    several = len({*found.values()} - {""}) > 1 and "" not in found.values()
    return found if several else dict.fromkeys(paths, "")


def opened(path: Path, columns: Mapping[str, str | None]) -> tuple[Table, Layout | None]:
    """A data file and its layout; None: it has no rows and no columns.

    Raises:
        UserError: it is damaged, or its columns hold no pairs; the message proposes others.
    """
    table = formats.open_table(path)
    if not table.names:
        return table, None
    layout = layouts.choose(table.names, columns)
    lacking = layouts.missing(table.names, columns)
    if table.is_one_object and (layout is None or (layout.name == "data.columns" and lacking)):
        raise UserError(
            f"{path} is one JSON object with {listed(table.names, 6)}, not rows; a data file is "
            "one object per line or a list of objects, keep others out by data.source"
        )
    if lacking and (layout is None or layout.name == "data.columns"):
        raise UserError(f"{path} {lacking}")
    assert layout is not None
    if table.schema is not None:
        _check_types(path, table.schema, layout)
    return table, layout


def _record(
    row: Row, where: str, *, layout: Layout, folders: tuple[Path, ...], split: str
) -> Record:
    if isinstance(row, Unreadable):
        raise Odd(row.why)
    encoded = partial(pictures.encoded, folders=folders)
    return record(where, layouts.fields(row, layout), encoded, split)


def record(where: str, fields: Fields, encoded: Callable[[Any], bytes | str], split: str) -> Record:
    """A row's fields and images; ``encoded`` gives the image that a cell means, or why there is
    none.

    Raises:
        Odd: a cell is nothing that could be an image.
    """
    found: list[bytes] = []
    note = "" if fields.images is not None else "no image"
    for cell in fields.images or ():
        image = encoded(cell)
        if isinstance(image, str):
            note = note or image
        else:
            found.append(image)
    return Record(
        where=where,
        images=None if note else tuple(found),
        question=fields.question,
        chosen=fields.chosen,
        rejected=fields.rejected,
        origin=fields.origin,
        kind=fields.kind,
        note=note,
        system=fields.system,
        history=fields.history,
        split=split,
    )


# Columns whose type says before any row is read that they hold something else

_LISTS = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
_BYTES = ("binary", "large_binary", "binary_view", "fixed_size_binary")
_TEXTS = ("string", "large_string", "string_view")


def _check_types(path: Path, schema: pa.Schema, layout: Layout) -> None:
    parts = {"image": layout.image, "question": layout.prompt}
    parts |= {"chosen": layout.chosen, "rejected": layout.rejected}
    for part, column in parts.items():
        if not column:
            continue
        kind = schema.field(column).type
        fits = _may_be_image(kind) if part == "image" else _may_be_text(kind)
        if not fits:
            raise UserError(
                f"{path}: column '{shown(column, 40)}' holds {shown(kind)}, not "
                f"{_IMAGE if part == 'image' else 'text'}; name another one in "
                f"data.columns.{part} (it has {listed(schema.names)})"
            )


def _may_be_image(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    if _is(kind, *_LISTS):
        return _may_be_image(kind.value_type)
    if pa.types.is_struct(kind):
        return bool({"bytes", "path", "url"} & {inner.name for inner in kind})
    return _is(kind, *_BYTES, *_TEXTS, "null")


def _may_be_text(kind: pa.DataType) -> bool:
    """Text, or a message with its text, or a list of messages."""
    kind = _plain(kind)
    if _is(kind, *_LISTS):
        return pa.types.is_struct(_plain(kind.value_type)) and _may_be_text(kind.value_type)
    if pa.types.is_struct(kind):
        return bool({"content", "value"} & {inner.name for inner in kind})
    return _is(kind, *_TEXTS, "null")


def _plain(kind: pa.DataType) -> pa.DataType:
    packed = pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind)
    return kind.value_type if packed else kind


def _is(kind: pa.DataType, *names: str) -> bool:
    return any(getattr(pa.types, f"is_{name}")(kind) for name in names)
