"""Files as rows: Parquet, Arrow, JSON, JSON Lines, CSV, TSV and tar, a piece at a time.

Memory is bounded by what a value, a line or a page may have, not by the file. The largest piece is
a page of a Parquet file: pyarrow and pandas write up to 1,024 rows into one, whatever their size,
60 MB for images of 60 kB. Rows are made into Python objects ``_BATCH_BYTES`` at a time, counted
as they are once decoded: 3 MB that a dictionary holds once can be the value of a thousand rows.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.core.errors import UserError
from stages.core.text import readable, shown
from stages.pairs import parquet_pages
from stages.pairs.layouts import Unreadable
from stages.pairs.suffixes import ending, is_hidden

MOST_BYTES = 2**27  # of an encoded image or of any other file that a row brings: 134 MB
_BATCH_BYTES = 2**21  # of rows made into Python objects at once; 16 MB take twice as long
_DECODED_BYTES = 2**27  # at most, where a dictionary repeats large values; takes five times this
_PAGE_BYTES = 2**30  # of a Parquet page, which is read at once and takes 1.4 times this
_LINE_BYTES = 2**28  # of one line of JSON: room for an image in base64
_LIST_BYTES = 2**30  # of a file that is one JSON value, which is read at once: 3.3 times in memory
_PEEK = 100  # rows of a file without a header looked at for its columns

Row = Mapping[str, Any] | Unreadable


@dataclass(frozen=True)
class Table:
    """A data file, opened. ``rows`` gives its rows; of the columns named, at least.

    ``schema`` and ``count`` are there where the file says them without being read. A JSON file that
    ``is_one_object`` was taken for a single row.
    """

    path: Path
    names: tuple[str, ...]
    rows: Callable[[Collection[str]], Iterator[Row]]
    schema: pa.Schema | None = None
    count: int | None = None
    is_one_object: bool = False


def open_table(path: Path) -> Table:
    """The table in a file, by its name's ending.

    Raises:
        UserError: it is damaged, or something else than its name says.
    """
    table = _OPEN[f".{ending(path.name).split('.')[1]}"](path)
    twice = {name for name in table.names if table.names.count(name) > 1}
    if twice:
        raise UserError(
            f"{path} has more than one column '{shown(min(twice), 40)}'; rename all but one"
        )
    return table


# Parquet


def _parquet(path: Path) -> Table:
    file = _open_parquet(path)
    with _damaged(path, "a Parquet file"):
        schema = file.schema_arrow
        names = tuple(schema.names)
    rows = file.metadata.num_rows
    return Table(path, names, lambda wanted: _parquet_rows(path, wanted), schema, rows)


def _open_parquet(path: Path) -> pq.ParquetFile:
    with _damaged(path, "a Parquet file"):
        # A buffer, not all of a column chunk: a shard of 2,000 images is often one of 130 MB.
        return pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)


def _parquet_rows(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    file = _open_parquet(path)
    with _damaged(path, "a Parquet file"):
        tops = {*wanted, *(name.partition(".")[0] for name in wanted)}  # of fields of structs
        size = _rows_at_once(path, file.metadata.num_rows, tops)
        for batch in file.iter_batches(size, columns=sorted(wanted)):
            average = batch.nbytes // max(batch.num_rows, 1)
            yield from _values(batch, max(1, _BATCH_BYTES // max(average, 1)))


def text_columns(path: Path) -> list[str]:
    """The columns of a Parquet file that hold text, fields of structs by their path."""
    schema = _open_parquet(path).schema
    leaves = [schema.column(i) for i in range(len(schema))]
    return [leaf.path for leaf in leaves if str(leaf.logical_type) == "String"]


def _rows_at_once(path: Path, count: int, wanted: Collection[str]) -> int:
    """So many that they are ``_BATCH_BYTES`` on average and ``_DECODED_BYTES`` at worst.

    Raises:
        UserError: a page is too large to be read at once.
    """
    sizes = parquet_pages.sizes(path, wanted)
    if sizes is None:
        return 1
    if sizes.page > _PAGE_BYTES:
        raise UserError(
            f"{path}: column '{shown(sizes.column, 40)}' keeps {readable(sizes.page)} in one page, "
            f"and {readable(_PAGE_BYTES)} can be read at once; write the file again with "
            "row_group_size=100"
        )
    average = _BATCH_BYTES * count // max(sizes.total, 1)
    # A dictionary of 1,024 photographs, 44 MB, can't be told from one value of 44 MB: eight rows at
    # once read the former nearly as fast as 48 do, and hold 350 MB of the latter.
    widest = max(sizes.dictionary, 1)
    least = 8 if widest <= _DECODED_BYTES // 2 else 1
    return max(1, min(average, max(_DECODED_BYTES // widest, least), 1024))


# Arrow, as the datasets library saves it


def _arrow(path: Path) -> Table:
    with _damaged(path, "an Arrow file"), _arrow_batches(path) as (schema, _):
        names = tuple(schema.names)
    return Table(path, names, lambda wanted: _arrow_rows(path, wanted), schema)


@contextlib.contextmanager
def _arrow_batches(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    with pa.memory_map(str(path)) as source:
        try:
            stream = pa.ipc.open_stream(source)
            yield stream.schema, iter(stream)
            return
        except pa.ArrowInvalid:
            source.seek(0)
            if source.read(6) != b"ARROW1":
                raise
        file = pa.ipc.open_file(source)
        yield file.schema, (file.get_batch(i) for i in range(file.num_record_batches))


def _arrow_rows(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    with _damaged(path, "an Arrow file"), _arrow_batches(path) as (_, batches):
        for batch in batches:
            part = _checked(batch.select([name for name in batch.schema.names if name in wanted]))
            widest = sum(_widest(column) for column in part.columns)
            yield from _values(part, max(1, min(_BATCH_BYTES // max(widest, 1), 1024)))


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, none of whose offsets leads out of it: a wrong one would read any memory."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        # Text that is not UTF-8 costs its row, not the file: taken as bytes, decoded one by one.
        plain = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
        columns = [c.view(plain[c.type]) if c.type in plain else c for c in batch.columns]
        fields = [
            f.with_type(c.type).with_metadata({"text": "1"}) if f.type in plain else f
            for f, c in zip(batch.schema, columns, strict=True)
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))
        batch.validate(full=True)
    return batch


def _widest(values: pa.Array) -> int:
    """Bytes of the largest value once it is decoded; a guess from above."""
    kind, types = values.type, pa.types
    if types.is_dictionary(kind):
        return _widest(values.dictionary)
    if types.is_run_end_encoded(kind):
        return _widest(values.values)
    if types.is_struct(kind):
        return sum(_widest(values.field(i)) for i in range(kind.num_fields))
    if not len(values):
        return 1
    if types.is_nested(kind):
        if types.is_map(kind) or types.is_union(kind):
            return _DECODED_BYTES
        return int(pc.max(pc.list_value_length(values)).as_py() or 0) * _widest(values.values)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return _DECODED_BYTES  # many can look at the same bytes
    if types.is_primitive(kind) or types.is_null(kind) or types.is_fixed_size_binary(kind):
        return 16 + values.nbytes // len(values)
    return int(pc.max(pc.binary_length(values)).as_py() or 0)


def _values(batch: pa.RecordBatch, step: int) -> Iterator[Row]:
    texts = {field.name for field in batch.schema if field.metadata and b"text" in field.metadata}
    for start in range(0, batch.num_rows, step):
        part = batch.slice(start, step)
        try:
            rows = part.to_pylist()
        except (ValueError, OverflowError):  # one cell is not UTF-8, or no date that Python has
            rows = [
                {name: _value(part.column(name)[i]) for name in part.schema.names}
                for i in range(part.num_rows)
            ]
        for row in rows:
            for name in texts:
                row[name] = _decoded(row[name])
            yield row


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Unreadable("is not UTF-8 text")
    except (ValueError, OverflowError):
        return Unreadable("holds a value that can't be read")


def _decoded(value: bytes | None) -> str | Unreadable | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return Unreadable("is not UTF-8 text")


@contextlib.contextmanager
def _damaged(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        message = shown(" ".join(str(error).split()), 200)
        raise UserError(
            f"{path} is truncated or not {what} ({message}); delete it and fetch it again"
        ) from None


# JSON


def _json(path: Path) -> Table:
    """A list, which starts with a bracket, or an object per line; both go by the name .json.

    One object over all of the file is neither, unless its ``data`` is the list.
    """
    single = None if ".jsonl" in ending(path.name) else _single(path)
    is_one_object = False
    if isinstance(single, dict):
        is_one_object = not isinstance(single.get("data"), list)
        content: Any = [single] if is_one_object else single["data"]
    else:
        content = _items(path) if _starts_with(path, b"[") else None

    def rows() -> Iterator[Row]:
        return _objects(path, _lines(path) if content is None else content)

    return Table(path, _names(rows()), lambda wanted: rows(), is_one_object=is_one_object)


def _names(rows: Iterable[Row]) -> tuple[str, ...]:
    first = itertools.islice(rows, _PEEK)
    return tuple(dict.fromkeys(n for row in first if isinstance(row, Mapping) for n in row))


def _single(path: Path) -> object:
    """The one JSON object that makes up a file, or None."""
    if _starts_with(path, b"["):
        return None
    with _binary(path) as file:
        lines = (line for line in iter(lambda: file.readline(_LINE_BYTES), b"") if line.strip())
        first, second = next(lines, b""), next(lines, None)
    try:
        value = _loaded(first)
        return None if second else value
    except (ValueError, RecursionError):
        with _binary(path) as file:
            content = _all(file)
    with contextlib.suppress(ValueError, RecursionError):
        return _loaded(content)
    return None


def _all(file: BinaryIO) -> bytes:
    """The file, or more than ``_LIST_BYTES`` of it; ``read`` would reserve as much at once."""
    content = bytearray()
    while (piece := file.read(2**20)) and len(content) <= _LIST_BYTES:
        content += piece
    return bytes(content)


def _objects(path: Path, rows: Iterable[object]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number} is not a JSON object with a key for each column")
        yield row


def _lines(path: Path) -> Iterator[object]:
    with _binary(path) as file:
        # Not str.splitlines: U+2028 and U+0085 are line ends to it and data to JSON.
        for number, line in enumerate(iter(lambda: file.readline(_LINE_BYTES + 1), b""), start=1):
            if len(line) > _LINE_BYTES:
                raise UserError(
                    f"{path} line {number} is longer than {readable(_LINE_BYTES)}; write one "
                    "object per line, and name large images by their paths"
                )
            if line.strip():
                yield parsed(line, f"{path} line {number}")


def _items(path: Path) -> list[object]:
    """The items of a JSON list, read at once: 3.3 times the file in memory."""
    with _binary(path) as file:
        content = _all(file)
    if len(content) > _LIST_BYTES:
        raise UserError(
            f"{path} is a JSON list of more than {readable(_LIST_BYTES)}, which is read at once; "
            "write one object per line"
        )
    items: list[object] = parsed(content, str(path))
    return items


def json_rows(content: bytes, name: str) -> Iterator[tuple[str, Any]]:
    """Where each value is and the value, of a list, or of one a line; one object has no rows.

    Raises:
        UserError: it is not valid JSON.
    """
    if content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        rows = enumerate(parsed(content, name), start=1)
        yield from ((f"{name} row {number}", row) for number, row in rows)
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        where = f"{name} line {number}"
        try:
            if line.strip():
                yield where, parsed(line, where)
        except UserError:
            with contextlib.suppress(ValueError, RecursionError):
                _loaded(content)  # one object over several lines
                return
            raise


def parsed(content: bytes, where: str) -> Any:
    """A JSON value; ``where`` is what messages call it.

    Raises:
        UserError: it is not valid JSON, or nested too deeply.
    """
    try:
        return _loaded(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error.reason}); convert it") from None
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else shown(error)
        raise UserError(
            f"{where} is not valid JSON ({why}); a data file is one object per line or "
            "one list of objects, keep others out by data.source"
        ) from None


def _loaded(content: bytes) -> Any:
    return json.loads(_text(content), parse_int=_whole_number)


def _whole_number(digits: str) -> int | Unreadable:
    """Python refuses to make integers of more than 4,300 digits."""
    if len(digits) > 1000:
        return Unreadable(f"holds a number of {len(digits):,} digits")
    return int(digits)


def _text(content: bytes) -> str:
    return content.decode("utf-8-sig")


def _starts_with(path: Path, start: bytes) -> bool:
    with _binary(path) as file:
        return file.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(start)


@contextlib.contextmanager
def _binary(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked."""
    name = path.name.lower()
    try:
        with contextlib.ExitStack() as stack:
            if name.endswith(".gz"):
                yield stack.enter_context(gzip.open(path))  # type: ignore[misc]
            elif name.endswith(".zst"):
                packed = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
                yield io.BufferedReader(stack.enter_context(packed))
            else:
                yield stack.enter_context(path.open("rb"))
    except (EOFError, zlib.error, OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is truncated or damaged ({shown(error)}); delete it and fetch it again"
        ) from None


# CSV and TSV


def _csv(path: Path) -> Table:
    delimiter = "\t" if ending(path.name).startswith(".tsv") else ","
    names = next(_cells(path, delimiter), [])
    if len(names) == 1 and ";" in names[0]:  # as Excel writes where a comma is for decimals
        delimiter = ";"
        names = next(_cells(path, delimiter), [])

    def rows(_: Collection[str]) -> Iterator[Row]:
        return _by_name(names, itertools.islice(_cells(path, delimiter), 1, None))

    return Table(path, tuple(names), rows)


def _cells(path: Path, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(_LINE_BYTES)
    with _binary(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter)
        try:
            yield from (row for row in reader if row)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} line {reader.line_num} is not UTF-8 text ({error.reason}); convert it"
            ) from None
        except csv.Error as error:
            raise UserError(
                f"{path} line {reader.line_num} is not valid CSV ({shown(error)}); export it again"
            ) from None


def _by_name(names: list[str], rows: Iterable[list[str]]) -> Iterator[Row]:
    for row in rows:
        if len(row) == len(names):
            yield dict(zip(names, (cell or None for cell in row), strict=True))
        else:
            yield Unreadable(f"it has {len(row)} cells, and the header {len(names)}")


# tar, as webdataset writes it


def _tar(path: Path) -> Table:
    return Table(path, _names(_samples(path)), lambda wanted: _samples(path))


def _samples(path: Path) -> Iterator[Row]:
    """One row for each key: the files ``0001.jpg``, ``0001.json``, …, which follow each other.

    The keys of a JSON object are columns, a text file's column is its ending. An image is
    ``image``; of several, ``images`` is the list.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            plain = (each for each in archive if each.isreg() and not is_hidden(each.name))
            for _, members in itertools.groupby(plain, key=lambda member: _key(member.name)):
                yield _sample(archive, members)
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is truncated or not a tar file ({shown(error)}); delete it and fetch it again"
        ) from None


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _sample(
    archive: tarfile.TarFile, members: Iterable[tarfile.TarInfo]
) -> dict[str, Any] | Unreadable:
    row: dict[str, Any] = {}
    images: list[bytes] = []
    room = MOST_BYTES
    for member in members:
        end = member.name.rpartition("/")[2].partition(".")[2]
        room -= member.size
        if room < 0:
            return Unreadable(f"its files are larger than {readable(MOST_BYTES)}")
        stream = archive.extractfile(member)
        content = stream.read() if stream else b""
        if end.endswith("json"):
            try:
                value = _loaded(content)
            except (ValueError, RecursionError) as error:
                return Unreadable(f"{shown(member.name)} is not valid JSON ({shown(error)})")
            row |= value if isinstance(value, dict) else {end: value}
        elif end.endswith("txt"):
            try:
                row[end.removesuffix(".txt")] = _text(content)
            except UnicodeDecodeError:
                row[end.removesuffix(".txt")] = Unreadable("is not UTF-8 text")
        else:
            images.append(content)
    if images:
        row |= {"image": images[0]} if len(images) == 1 else {"images": images}
    return row


_OPEN = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".tar": _tar,
}
