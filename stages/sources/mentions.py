"""The files next to a table that its rows name, whatever their suffix."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.ingest import named
from stages.ingest.suffixes import ending
from stages.sources.names import CODE, PICKLES, is_hidden, suffix

_LONGEST = 2**26  # characters of a first line; one that is longer is a document
_ROWS_IN_IT = re.compile(r'\s*\{\s*"data"\s*:\s*\[')


def files_named_in(table: Path, root: Path) -> set[str]:
    """Files below ``root`` that a table names in any text, by paths relative to the table.

    Relative POSIX paths. A name that leads out of ``root``, or to nothing, is left to preprocess,
    which counts that row as one without an image; so is what is hidden, a table, pickle or code.

    Raises:
        UserError: the table is not UTF-8 text or not valid JSON.
    """
    folder, real = table.parent, root.resolve()
    heads = named.entries(folder)
    found: dict[str, str | None] = {}
    for text in _texts(table):
        if text in found or not 0 < len(text) <= named.MOST or "\n" in text:
            continue
        found[text] = None
        if named.leads_out(text) or named.key(named.parts(text)[0]) not in heads:
            continue
        path = named.find(folder, text)
        if isinstance(path, Path) and path.resolve().is_relative_to(real):
            name = path.relative_to(root).as_posix()
            if not is_hidden(name) and not ending(name) and suffix(name) not in PICKLES | CODE:
                found[text] = name
    return {name for name in found.values() if name}


def holds_no_rows(table: Path) -> bool:
    """Whether a JSON file is one object, as annotations and descriptions of a data set are."""
    if table.suffix.lower() != ".json":
        return False
    try:
        with table.open(encoding="utf-8-sig", newline="\n") as file:
            line = "\n"
            while line.isspace():
                line = file.readline(_LONGEST)
            if not line.lstrip().startswith("{") or _ROWS_IN_IT.match(line):
                return False
            if len(line) == _LONGEST:
                return True
            try:
                json.loads(line)
            except (ValueError, RecursionError):  # it goes on below its first line
                return not _ROWS_IN_IT.match(line + file.read(200))
            return not any(text.strip() for text in file)
    except (OSError, UnicodeDecodeError):
        return False


def json_lines(file: Iterable[str], what: str) -> Iterator[tuple[int, Any]]:
    """Line number and value of each line of JSON Lines; ``what`` names the file in messages.

    Raises:
        UserError: a line is not valid JSON.
    """
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, parsed(line, f"{what} line {number}")


def parsed(text: str, what: str) -> Any:
    """A JSON value. An integer of a hundred digits or more is infinity: Python refuses 5,000.

    Raises:
        UserError: it is not valid JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text, parse_int=_number)
    except RecursionError:
        raise UserError(f"{what} is nested too deeply to be data; keep it out") from None
    except ValueError as error:
        raise UserError(f"{what} is not valid JSON ({error}); export it again") from None


def _number(digits: str) -> float:
    return int(digits) if len(digits) < 100 else float("inf")


def _texts(table: Path) -> Iterator[str]:
    """Every text that a table holds."""
    from stages.ingest import formats

    if ending(table.name) == ".parquet":
        return _parquet_texts(table)
    opened = formats.open_table(table)
    return (text for row in opened.rows(opened.names) for text in texts_in(row))


def texts_in(row: Any) -> Iterator[str]:
    """Every text of a row or a cell, those in lists and objects included."""
    values = [row]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
        elif isinstance(value, str):
            yield value


def _parquet_texts(table: Path) -> Iterator[str]:
    """Every text of a Parquet file, those in structs and lists included; no bytes are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from stages.ingest import formats

    try:
        with pq.ParquetFile(table, pre_buffer=False) as file:
            leaves = (file.schema.column(i) for i in range(len(file.schema)))
            columns = [leaf.path for leaf in leaves if str(leaf.logical_type) == "String"]
            names = {path.split(".")[0] for path in columns}
            rows = formats.rows_at_once(table, file.metadata.num_rows, names) if columns else 0
            for batch in file.iter_batches(rows, columns=columns) if columns else ():
                for column in batch.columns:
                    yield from _arrow_texts(column)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return  # what is wrong with it, reading it says


def _arrow_texts(column: Any) -> Iterator[str]:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        yield from _arrow_texts(column.dictionary)
    elif pa.types.is_struct(kind):
        for inner in column.flatten():
            yield from _arrow_texts(inner)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _arrow_texts(column.flatten())
    else:
        yield from (text for text in column.unique().to_pylist() if isinstance(text, str))
