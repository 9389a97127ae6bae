"""Templates, and texts that others wrote, made fit for one line, one cell or one block."""

import re
from pathlib import Path, PureWindowsPath
from typing import Any

import pandas as pd

from stages.evaluation import catalogue

_INTERVAL = re.compile(r"(\[[^\s\]]+,) ([^\s\]]+\])")  # which a line must not break


def filled(template: Path, **values: Any) -> str:
    """A Jinja template with its values: escaped in HTML, without doubled blank lines in Markdown.

    Templates know metrics by ``catalogue.shown``, ``interval`` and ``with_interval``.
    """
    import jinja2

    is_page = template.suffix == ".html"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=is_page,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {each.__name__: each for each in (cell, code, fenced, literal, one_line)}
    environment.filters["count"] = catalogue.COUNT.text
    environment.filters["capitalized"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["unbroken"] = lambda text: _INTERVAL.sub("\\1\N{NO-BREAK SPACE}\\2", text)
    environment.tests["known"] = catalogue.is_known
    for each in (catalogue.shown, catalogue.interval, catalogue.with_interval):
        environment.globals[each.__name__] = each
    text = environment.get_template(template.name).render(values)
    return text if is_page else re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def text_of(value: Any) -> str:
    """A cell of a table as text; nothing for what is absent."""
    return "" if value is None or value != value else str(value)


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
