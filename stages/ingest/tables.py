"""Tabular sources: Parquet, JSON and JSON Lines files, read row by row as records.

Files are read in the order of their names. Parquet and JSON Lines are read a piece at a time:
memory depends on neither their number nor their size. The largest piece is a page of a Parquet
file; pyarrow and pandas write up to 1,024 rows into one, whatever their size: 60 MB for images of
60 kB. A JSON list holds text and paths only, and is read at once.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.errors import UserError
from stages.dataset.pairs import Record
from stages.ingest import named

SUFFIXES = (".parquet", ".jsonl", ".json")
_BATCH_BYTES = 2**21  # of rows made into Python objects at once; 16 MB take twice as long
_PEEK = 100  # rows of JSON looked at for the names of the columns
_IMAGE = "an image (bytes, a struct of bytes and path, or a relative path)"


def files(raw: Path) -> list[Path]:
    """The data files below ``raw`` (a folder) in the order they are read; hidden ones are not data.

    Raises:
        UserError: there are none.
    """
    found = [
        path
        for path in raw.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.name != "SOURCE.json"
        and not any(part.startswith(".") for part in path.relative_to(raw).parts)
        and path.is_file()
    ]
    if not found:
        raise UserError(
            f"{raw} holds no {', '.join(SUFFIXES)} file; "
            "check data.source (for a Hub repository, its files)"
        )
    return sorted(found, key=lambda path: path.relative_to(raw).as_posix())


def count(raw: Path) -> int | None:
    """The number of rows below ``raw``, or None if only reading them all would tell (JSON)."""
    paths = files(raw)
    if any(path.suffix.lower() != ".parquet" for path in paths):
        return None
    return sum(_open(path).metadata.num_rows for path in paths)


def records(raw: Path, columns: Mapping[str, str | None]) -> Iterator[Record]:
    """Every row of every data file below ``raw``.

    ``columns`` gives the column for each of image, question, chosen, rejected, origin, kind; the
    last two may be None. The image is an encoded file: bytes, a struct of bytes and path (as the
    datasets library stores it), or the path of a file relative to the folder of the data file.

    Raises:
        UserError: a file is damaged, lacks a column, has one of a wrong type, or names an image
            outside its folder. Parquet files are all checked before the first row is given.
    """
    paths = files(raw)
    for path in paths:
        if path.suffix.lower() == ".parquet":
            _check_schema(path, columns)
    for path in paths:
        name = path.relative_to(raw).as_posix()
        read = _parquet_rows if path.suffix.lower() == ".parquet" else _json_rows
        rows = read(path, columns)
        for number, row in enumerate(rows, start=1):
            yield _record(row, columns, folder=path.parent, where=f"{name} row {number}")


def _record(
    row: Mapping[str, Any], columns: Mapping[str, str | None], *, folder: Path, where: str
) -> Record:
    values = {field: row.get(column) for field, column in columns.items() if column is not None}
    for field in ("question", "chosen", "rejected"):
        if not isinstance(values[field], str | None):
            raise UserError(
                f"{where}: column '{columns[field]}' holds {type(values[field]).__name__}, "
                f"not text; name a column of text in data.columns.{field}"
            )
    image, note = _image(values["image"], folder=folder, where=where, column=columns["image"])
    return Record(
        where=where,
        images=None if image is None else (image,),
        question=values["question"],
        chosen=values["chosen"],
        rejected=values["rejected"],
        origin=_label(values.get("origin")),
        kind=_label(values.get("kind")),
        note=note,
    )


def _label(value: object) -> str:
    return "" if value is None else str(value)


def _image(
    value: object, *, folder: Path, where: str, column: str | None
) -> tuple[bytes | None, str]:
    """The encoded image, or None and the reason."""
    path = None
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
    if isinstance(value, str):
        path, value = value, None
    if isinstance(value, bytes):
        return (value, "") if value else (None, "no bytes")
    if value is None and not path:
        return None, ""
    if value is not None or not isinstance(path, str):
        raise UserError(
            f"{where}: column '{column}' holds {type(value).__name__}, not {_IMAGE}; "
            "name another one in data.columns.image"
        )
    return _read_file(folder, path, where)


def _read_file(folder: Path, path: str, where: str) -> tuple[bytes | None, str]:
    # Judged by its letters, not by what it resolves to: DVC itself may link files to its cache.
    if named.leads_out(path):
        raise UserError(
            f"{where}: image path {named.shown(path)} leaves the folder of its data file; "
            "put the images next to the file and make their paths relative to it"
        )
    found = named.find(folder, path)
    if isinstance(found, str):
        return None, found
    try:
        return found.read_bytes() or None, f"{path} is empty"
    except OSError as error:
        return None, f"{path}: {error.strerror}"


# Parquet


def _open(path: Path) -> pq.ParquetFile:
    try:
        # A buffer, not all of a column chunk: a shard of 2,000 images is often one of 130 MB.
        return pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    message = " ".join(str(error).split())[:200]
    return UserError(
        f"{path} is truncated or not a Parquet file ({message}); delete it and fetch it again"
    )


def _check_schema(path: Path, columns: Mapping[str, str | None]) -> None:
    schema = _open(path).schema_arrow
    _check_names(path, schema.names, columns)
    for field, column in columns.items():
        if column is None:
            continue
        kind = schema.field(column).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if field == "image":
            fits = _is_bytes(value) or _is_text(value)
            if pa.types.is_struct(value):
                fits = bool({"bytes", "path"} & {inner.name for inner in value})
            wanted = _IMAGE
        else:
            fits = _is_text(value) or pa.types.is_null(value) or field in ("origin", "kind")
            wanted = "text"
        if not fits:
            raise UserError(
                f"{path}: column '{column}' holds {kind}, not {wanted}; "
                f"name another one in data.columns.{field} (it has {', '.join(schema.names)})"
            )


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _parquet_rows(path: Path, columns: Mapping[str, str | None]) -> Iterator[dict[str, Any]]:
    wanted = sorted({column for column in columns.values() if column is not None})
    file = _open(path)
    metadata = file.metadata
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    rows = _BATCH_BYTES * metadata.num_rows // max(size, 1)
    try:
        for batch in file.iter_batches(min(max(rows, 1), 1024), columns=wanted):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


# JSON


def _json_rows(path: Path, columns: Mapping[str, str | None]) -> Iterator[dict[str, Any]]:
    with _text(path) as file:
        start = file.read(2**20).lstrip()[:1]
    # Both kinds of content go by the name .json; a list starts with a bracket.
    rows = _objects(path, _items(path) if start == "[" else _lines(path))
    first = list(itertools.islice(rows, _PEEK))
    if first:
        names = list(dict.fromkeys(name for row in first for name in row))
        _check_names(path, names, columns)
    return itertools.chain(first, rows)


@contextlib.contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it") from None


def _objects(path: Path, rows: Iterable[object]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number} is not a JSON object with a key for each column")
        yield row


def _lines(path: Path) -> Iterator[object]:
    with _text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise UserError(
                        f"{path} line {number} is not valid JSON ({error}); a data file is one "
                        "object per line or one list of objects, keep others out by data.source"
                    ) from None


def _items(path: Path) -> list[object]:
    """The items of a JSON list, read at once: 3.3 times the file in memory, which holds text."""
    with _text(path) as file:
        try:
            items: list[object] = json.load(file)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({error}); export it again") from None
    return items


def _check_names(path: Path, names: list[str], columns: Mapping[str, str | None]) -> None:
    for field, column in columns.items():
        if column is not None and column not in names:
            raise UserError(
                f"{path} has no column '{column}'; it has {', '.join(names)}: "
                f"set data.columns.{field} to the one that holds the {field}"
                + (", or to null" if field in ("origin", "kind") else "")
            )
