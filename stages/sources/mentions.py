"""The files next to a table that its rows name, whatever their suffix."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.pairs import named
from stages.pairs.suffixes import ending, is_hidden
from stages.sources.names import CODE, PICKLES, suffix

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


def _texts(table: Path) -> Iterator[str]:
    """Every text that a table holds; of a Parquet file no bytes are read."""
    from stages.pairs import formats

    is_parquet = ending(table.name) == ".parquet"
    try:
        opened = formats.open_table(table)
        wanted = formats.text_columns(table) if is_parquet else opened.names
        for row in opened.rows(wanted) if wanted else ():
            yield from texts_in(row)
    except UserError:
        if not is_parquet:
            raise  # else what is wrong with it, reading it says


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
