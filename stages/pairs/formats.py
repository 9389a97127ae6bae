"""Files as rows: Parquet, JSON, JSON Lines, CSV, TSV, webdataset's tar, a piece at a time.

pyarrow, json, csv and tarfile read the files, and pyarrow unpacks text. What is held at once is
bounded, counted as it is unpacked: a line or a JSON value by ``MOST_LINE``, a header by
``MOST_COLUMNS``, what a row of a tar brings by ``MOST_BYTES``, Parquet by ``_ROWS``.
"""

import contextlib
import csv
import io
import itertools
import json
import re
import tarfile
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.errors import UserError, readable, shown
from stages.pairs.files import ending, is_hidden

MOST_BYTES = 2**27  # of an encoded image, and of all files of a row of a tar: 134 MB
MOST_LINE = 2**26  # characters of a line or a JSON value, images in base64 included: 67 MB
MOST_COLUMNS = 10_000
PEEK = 100  # first rows of a file that tell what it holds
_ROWS = 32  # at once: 32 photographs are some 5 MB
_PIECE = 2**20  # characters of JSON at once
_BETWEEN = re.compile(r"[\s,]*")  # JSON values
# What a file is that begins so, where its name says that it is text.
_NO_TEXT = {
    **{b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text", b"PA": "a Parquet file"},
    **{b"PK": "an Excel file or a zip archive", b"\x1f\x8b": "packed by gzip"},
}
_NO_CELLS = {"\0": "UTF-16 or no text", "[": "JSON", "{": "JSON", "<": "a web page"}
_BROKEN = (
    *(pa.ArrowException, tarfile.TarError, csv.Error, OSError),
    *(EOFError, ValueError, RecursionError),
)


@dataclass(frozen=True)
class Unreadable:
    """Stands in a row for a cell, or for the row, that its file's reader could make nothing of."""

    why: str


Row = Mapping[str, Any] | Unreadable


@dataclass(frozen=True)
class Table:
    """A data file, opened. ``rows`` gives its rows; of the columns named, at least."""

    path: Path
    names: tuple[str, ...]
    rows: Callable[[Collection[str]], Iterator[Row]]


def open_table(path: Path) -> Table:
    """The table in a file, by its name's ending.

    Raises:
        UserError: it is damaged, something else than its name says, or beyond a limit.
    """
    kind = f".{ending(path.name).split('.')[1]}"

    def rows(wanted: Collection[str]) -> Iterator[Row]:
        number = 0
        try:
            for row in _READ[kind](path, wanted):
                yield row
                number += 1
        except _BROKEN as error:
            raise _damaged(path, error, f" after row {number:,}" if number else "") from None

    try:
        if kind in _HEADER:
            names = _HEADER[kind](path)
        else:
            first = list(itertools.islice(rows(()), PEEK))
            names = list(dict.fromkeys(n for row in first if isinstance(row, Mapping) for n in row))
            if first and not names:
                raise ValueError(getattr(first[0], "why", "its rows have no keys"))
    except _BROKEN as error:
        raise _damaged(path, error, "") from None
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path} has more than one column {min(twice)!r:.60}; rename all but one")
    if len(names) > MOST_COLUMNS:
        raise UserError(f"{path} has {len(names):,} columns; at most {MOST_COLUMNS:,} are read")
    return Table(path, tuple(names), rows)


def _damaged(path: Path, error: Exception, after: str) -> UserError:
    """What a library raises over a file, as one sentence."""
    why = "it is nested too deeply" if isinstance(error, RecursionError) else shown(error, 200)
    if isinstance(error, UnicodeDecodeError):
        with path.open("rb") as file:
            kind = _NO_TEXT.get(file.read(2), "not UTF-8 text")
        why = f"it is {kind}; save text as UTF-8 (in Excel: CSV UTF-8)"
    return UserError(
        f"{path} can't be read{after} ({why}); get it again if it is cut or damaged, or remove it "
        "if it is not a table"
    )


# Parquet


def _parquet(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    # A buffer, not all of a column chunk: a shard of 2,000 images is often one of 130 MB.
    file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    for batch in file.iter_batches(_ROWS, columns=sorted(wanted)):
        for start in range(0, batch.num_rows, 8):  # as Python objects, they are there twice
            part = batch.slice(start, 8)
            try:
                yield from part.to_pylist()
            except (ValueError, OverflowError):  # one cell is not UTF-8, or no date of Python's
                for i in range(part.num_rows):
                    yield {name: _value(part.column(name)[i]) for name in part.schema.names}


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        is_text = isinstance(error, UnicodeDecodeError)
        return Unreadable("is not UTF-8 text" if is_text else "holds a value that can't be read")


# JSON


@contextlib.contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    packed = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    # By its descriptor: pyarrow takes no name that is not UTF-8.
    with path.open("rb") as file, pa.input_stream(file, compression=packed) as stream:
        yield io.TextIOWrapper(stream, "utf-8-sig", newline="")


def _json(path: Path, _: Collection[str]) -> Iterator[Row]:
    """The objects of a list, of one after the other, or of the list in one object's ``data``."""
    with _text(path) as text:
        values = _json_values(text)
        first = list(itertools.islice(values, 2))
        whole = first[0] if len(first) == 1 and isinstance(first[0], dict) else {}
        lists = [name for name, value in whole.items() if isinstance(value, list) and value]
        first = whole["data"] if lists == ["data"] else first
        for number, row in enumerate(itertools.chain(first, values), start=1):
            if not isinstance(row, dict):
                raise ValueError(f"row {number} is not a JSON object with a key for each column")
            yield row


def _json_values(text: TextIO) -> Iterator[Any]:
    """The items of a text that is a JSON list, or else its values, as on lines of their own.

    Raises:
        ValueError: it is no JSON, or a value is larger than ``MOST_LINE``.
    """
    scan = json.JSONDecoder(object_pairs_hook=_each_key_once).raw_decode
    waiting, line, end, why = "", 1, None, ""
    while True:
        piece = text.read(max(_PIECE, len(waiting)))
        waiting += piece
        if end is None and waiting.lstrip():
            end = "]" if waiting.lstrip()[0] == "[" else ""
            waiting = waiting.replace("[", " ", 1) if end else waiting
        at = _BETWEEN.match(waiting).end()  # type: ignore[union-attr]
        try:
            while at < len(waiting):
                value, after = scan(waiting, at)
                yield value
                at = _BETWEEN.match(waiting, after).end()  # type: ignore[union-attr]
        except json.JSONDecodeError as error:  # unless the rest of a value is still to come
            why = f"line {line + waiting.count(chr(10), 0, error.pos)}: {error.msg}"
        line += waiting.count("\n", 0, at)
        waiting = waiting[at:]
        if len(waiting) > MOST_LINE or (not piece and waiting.strip() != (end or "")):
            raise ValueError(f"not valid JSON, or a value above {readable(MOST_LINE)}: {why}")
        if not piece:
            return


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


# CSV and TSV


def _csv(path: Path, _: Collection[str]) -> Iterator[Row]:
    names, options = _dialect(path)
    last = max((i for i, name in enumerate(names, start=1) if name), default=0)
    for row in itertools.islice(_cells(path, options), 1, None):
        if [cell.strip("\ufeff ") for cell in row] == names:
            yield Unreadable("it repeats the header, as where files were joined")
        elif len(row) < last or any(row[last:]):
            yield Unreadable(f"it has {len(row)} cells, and the header has {last}")
        else:
            yield {name: cell or None for name, cell in zip(names, row, strict=False) if name}


def _dialect(path: Path) -> tuple[list[str], dict[str, Any]]:
    """The names of a file's columns, and the options by which csv reads it.

    A name is empty where the column has none: the index that pandas writes, Excel's empty columns.
    Quotes in a TSV file are text where they can't be quotes, and each line has the header's cells.
    """
    with _text(path) as text:
        head = text.readline(MOST_LINE)
        head = text.readline(MOST_LINE) if head.startswith("sep=") else head  # Excel's own line
    if other := next((what for sign, what in _NO_CELLS.items() if sign in head.lstrip()[:2]), ""):
        raise ValueError(f"it is {other}")
    usual = "\t" if ending(path.name).startswith(".tsv") else ","
    delimiter = next((sign for sign in (usual, *"\t;,") if sign in head), usual)
    options = {"delimiter": delimiter, "skipinitialspace": f"{delimiter} " in head, "strict": True}
    names = [name.strip() for name in next(_cells(path, options), [])]
    if delimiter == "\t":
        try:
            deque(_cells(path, options), maxlen=0)
        except csv.Error:
            plain = options | {"quoting": csv.QUOTE_NONE}
            if all(len(row) == len(names) for row in _cells(path, plain)):
                options = plain
    return names, options


def _cells(path: Path, options: Mapping[str, Any]) -> Iterator[list[str]]:
    """The rows of a file, header first.

    Raises:
        csv.Error: a quote closes nowhere or in a later row, and would swallow rows.
    """
    csv.field_size_limit(MOST_LINE)
    lines: list[str] = []  # of a row
    start, width = 1, 0
    with _text(path) as text:
        reader = csv.reader(_lines(text, lines), **options)
        try:
            for row in reader:
                if len(lines) > 1 and (len(row) < width or _swallows(lines, len(row), options)):
                    raise csv.Error("a quote closes in a later row")
                if row and not (start == 1 and row[0].startswith("sep=")):
                    width = width or sum(map(bool, row))
                    yield row
                start = reader.line_num + 1
                lines.clear()
        except csv.Error as error:
            raise csv.Error(f"the row of line {start}: {error}; quotes must close") from None


def _lines(text: TextIO, noted: list[str]) -> Iterator[str]:
    """The lines, each also appended to ``noted``."""
    blank = 0
    for line in iter(lambda: text.readline(MOST_LINE + 1), ""):
        blank = blank + len(line) if line.isspace() else 0
        if max(len(line), blank) > MOST_LINE:
            raise ValueError(f"a line or a run of blank ones is above {readable(MOST_LINE)}")
        noted.append(line)
        yield line


def _swallows(lines: list[str], width: int, options: Mapping[str, Any]) -> bool:
    """Whether lines that a quote joins are rows: one begins as the first does, or two that follow
    each other have as many cells as the row, one of them alike."""
    cells = [
        [re.sub(r"\d+", "0", cell.strip('" \r\n')) for cell in line.split(options["delimiter"])]
        for line in lines
    ]
    if any(len(each) > 1 and each[0] == cells[0][0] for each in cells[1:]):
        return True
    rows = [each if len(each) == width else [] for each in cells]
    return any(
        one and one == other
        for pair in itertools.pairwise(rows)
        for one, other in zip(*pair, strict=False)
    )


# tar, as webdataset writes it


def _tar(path: Path, _: Collection[str]) -> Iterator[Row]:
    """One row for each key: the files ``0001.jpg``, ``0001.json``, …, which follow each other.

    The keys of a JSON object are columns, a text file's column is its ending. An image is
    ``image``; of several, ``images`` is the list.
    """
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        plain = (each for each in archive if each.isreg() and not is_hidden(each.name))
        for _key, members in itertools.groupby(plain, key=lambda member: _sample_key(member.name)):
            yield _sample(archive, members)
        file.seek(archive.offset)  # tarfile ends quietly where a header is missing or damaged
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("the end of the archive is missing, or a header is damaged")
        while rest := file.read(2**20):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("more follows its end, as where archives were joined")


def _sample_key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _sample(archive: tarfile.TarFile, members: Iterable[tarfile.TarInfo]) -> Row:
    row: dict[str, Any] = {}
    images: list[bytes] = []
    room = MOST_BYTES
    for member in members:
        end = member.name.rpartition("/")[2].partition(".")[2].lower()
        if ending(member.name) and not end.endswith("json"):
            raise ValueError(f"it holds {shown(member.name)}, a table; unpack it, or pack a tar.gz")
        room -= member.size
        if room < 0:
            return Unreadable(f"its files are larger than {readable(MOST_BYTES)}")
        content = archive.extractfile(member).read()  # type: ignore[union-attr]
        try:
            if end.endswith("json"):
                value = json.loads(content)
                row |= value if isinstance(value, dict) else {end: value}
            elif end.endswith("txt"):
                row[end.removesuffix(".txt")] = content.decode("utf-8-sig")
            else:
                images.append(content)
        except (ValueError, RecursionError) as error:
            return Unreadable(f"{shown(member.name)} is not what its name says ({shown(error)})")
    if images:
        row |= {"image": images[0]} if len(images) == 1 else {"images": images}
    return row


_READ: dict[str, Callable[[Path, Collection[str]], Iterator[Row]]] = {
    **{".parquet": _parquet, ".tar": _tar},
    **{".jsonl": _json, ".json": _json, ".csv": _csv, ".tsv": _csv},
}
_HEADER: dict[str, Callable[[Path], list[str]]] = {
    ".parquet": lambda path: list(pq.read_schema(path).names),
    **dict.fromkeys((".csv", ".tsv"), lambda path: [name for name in _dialect(path)[0] if name]),
}
