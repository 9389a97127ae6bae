"""Texts that others wrote, made fit for one line, one cell or one block; and rows of tables."""

import re
from pathlib import PureWindowsPath
from typing import Any

import pandas as pd


def text_of(value: Any) -> str:
    """A cell of a table as text; nothing for what is absent."""
    return "" if value is None or value != value else str(value)


def capitalized(text: str) -> str:
    """With a capital first letter, the others as they are."""
    return text[:1].upper() + text[1:]


def one_line(text: object, longest: int | None = None) -> str:
    """Printable characters of one line: data can't end a block or send codes to a terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if longest is None or len(line) <= longest else line[: longest - 1] + "…"


def cell(text: object) -> str:
    """One line for a cell of a Markdown table."""
    return one_line(text).replace("|", "\\|")


def code(text: object) -> str:
    """Inline code of one line, for a Markdown table's cell or a sentence."""
    line = cell(text) or " "
    ticks = "`" * (_longest_run(line) + 1)
    return f"{ticks} {line} {ticks}" if "`" in line else f"`{line}`"


def literal(text: str) -> str:
    """A string of Python in ASCII, with double quotes, as formatters leave it."""
    quoted = ascii(text)
    return quoted if quoted[0] == '"' else '"' + quoted[1:-1].replace('"', '\\"') + '"'


def fenced(text: str, language: str = "") -> str:
    """A block of code, with a fence longer than any inside it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def without_absolute_paths(configuration: str) -> str:
    """YAML text whose values that are paths of a machine (``/etc/ds.json``) are names only."""

    def named(found: re.Match[str]) -> str:
        return found[1] + found[2] + PureWindowsPath(found[3]).name + found[2]

    pattern = r"(?m)^(\s*(?:[\w.-]+: +|- +)+)(['\"]?)((?:/|~|[A-Za-z]:[\\/]).*?)\2[ ]*$"
    return re.sub(pattern, named, configuration)


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def rows_of(table: pd.DataFrame | None) -> list[dict[str, Any]]:
    """The rows of a table, each by its columns' names."""
    found = [] if table is None else table.to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in found]
