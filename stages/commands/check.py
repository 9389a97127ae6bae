"""Check: what preprocess would make of the first rows of ``data.sources``, before a run.

    python -m stages check
    python -m stages check --rows 5000

In: ``params.yaml``. Local sources are read where they are (archives are unpacked for it); of one on
the Hub, what ``fetch`` left in ``data/raw``. Out: on standard output, the columns, three rows of
each source, what would be left out and why, the sizes and the splits. It ends with an error where
the run would stop, and says what would help.
"""

import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages import preprocess
from stages.core import command
from stages.core.errors import UserError
from stages.core.text import readable, shown
from stages.pairs import counts, refusals, tables
from stages.pairs.pairs import Record
from stages.params import params
from stages.sources import kinds, source
from stages.sources.hub import HubData
from stages.sources.local import PathData, is_archive
from stages.sources.source import Tables

_FILES = 5  # whose columns are shown
_ROWS = 3  # of each source, shown in full


def main(raw: Path = Path("data/raw"), rows: int = 1000) -> None:
    settings = params.load()
    sources = settings.data.sources
    with tempfile.TemporaryDirectory() as scratch:
        places = {}
        for name, asked in sources.items():
            with kinds.of(name):
                places[name] = _place(name, asked, raw / name, Path(scratch, "raw", name))
                if isinstance(asked, Tables):
                    _print_files(places[name], asked.reading)
        each = [kinds.read({name: places[name]}, {name: sources[name]}) for name in sources]
        folder = Path(scratch, "pairs")
        folder.mkdir()
        print(f"the first rows, of at most {rows:,} of a source:")
        counted = preprocess.fill(
            folder,
            itertools.chain(*(_printed(itertools.islice(found, rows)) for found, _, _ in each)),
            itertools.chain(*(itertools.islice(questions, rows) for _, questions, _ in each)),
            settings.preprocess,
        )
        _print_outcome(counted, folder)
        counts.check(counted, folder, settings.preprocess)
    print("nothing found that would stop the run")


def _place(name: str, asked: Any, raw: Path, scratch: Path) -> Path:
    """Where the rows can be read.

    Raises:
        UserError: nowhere yet.
    """
    if isinstance(asked, PathData) and not isinstance(asked.path, list):
        path = asked.path.expanduser()
        if not is_archive(path):
            print(f"{name}: {shown(path)}, read where it is")
            return path
    if not isinstance(asked, HubData):
        kinds.KINDS[asked.kind].fetch_data(asked, scratch)
        print(f"{name}: what fetch would make of it")
        return scratch
    there = source.read(raw) if (raw / source.FETCHED).is_file() else None
    if there is None or (there.kind, there.repo) != (asked.kind, asked.repo):
        raise UserError(
            f"{raw} does not hold it yet; run `dvc repro fetch@{name}`, then this again"
        )
    print(f"{name}: {raw}, as fetch left it")
    return raw


def _print_files(place: Path, reading: tables.Reading) -> None:
    found = tables.contents(place, reading)
    paths = [found.root / name for name in found.tables]
    size = readable(sum(path.stat().st_size for path in paths))
    print(f"data files: {len(paths):,}, {size}")
    for path in paths[:_FILES]:
        table, layout = tables.opened(path, reading.columns)
        rows = "" if table.count is None else f", {table.count:,} rows"
        known = layout.name if layout else "nothing: it is empty"
        print(f"  {shown(path.name)}{rows}, read as {known}")
        first = next(iter(table.rows(table.names)), {})
        for name in table.names:
            kind = table.schema.field(name).type if table.schema is not None else None
            value = first.get(name) if isinstance(first, dict) else None
            used = "  <-" if layout and name in layout.columns else ""
            print(f"    {shown(name, 40)}: {shown(kind or type(value).__name__, 60)}{used}")


def _printed(rows: Iterable[Record]) -> Iterator[Record]:
    """The rows; of the first ones, what they hold is printed."""
    for number, row in enumerate(rows):
        if number < _ROWS:
            images = [readable(len(image)) for image in row.images or ()]
            print(f"  {shown(row.where)}: images: {', '.join(images) or row.note or 'none'}")
            if row.system:
                print(f"    system: {shown(row.system)}")
            for user, assistant in row.history:
                print(f"    earlier: {shown(user)} / {shown(assistant)}")
            for field in ("question", "chosen", "rejected"):
                print(f"    {field}: {shown(getattr(row, field))}")
        yield row


def _print_outcome(counted: dict[str, Any], folder: Path) -> None:
    print(f"{counted['rows_in']:,} rows read, {counted['rows_kept']:,} kept")
    if counted["rows_left_out"]:
        print(f"left out: {counted['rows_left_out']:,}")
    first: dict[str, dict[str, str]] = {}
    for row in pq.read_table(folder / "left_out.parquet").to_pylist():
        first.setdefault(row["reason"], row)
    for reason, number in counted["left_out"].items():
        if number:
            example = first[reason]
            print(f"  {number:,} {reason}: {refusals.REASONS[reason]}")
            print(f"    the first, {shown(example['where'])}: {shown(example['detail'], 300)}")
    pairs = pq.read_table(folder / "pairs.parquet")
    if pairs.num_rows:
        sides = [
            size
            for row in pairs.select(["widths", "heights"]).to_pylist()
            for size in zip(row["widths"], row["heights"], strict=True)
        ]
        if sides:
            small, large = min(sides, key=math.prod), max(sides, key=math.prod)
            many = f"{counted['unique_images']:,} distinct images"
            print(f"{many}, {small[0]}x{small[1]} to {large[0]}x{large[1]} pixels as kept")
        for field in ("question", "chosen", "rejected"):
            lengths = sorted(len(text) for text in pairs[field].to_pylist())
            middle, most = lengths[len(lengths) // 2], lengths[-1]
            print(f"{field}: {middle:,} characters (median), at most {most:,}")
        for field in ("origin", "kind"):
            labels = Counter(pairs[field].to_pylist()).most_common(5)
            if labels != [("", pairs.num_rows)]:
                print(f"{field}: {', '.join(f'{shown(name, 40)} ({n:,})' for name, n in labels)}")
    splits = counted["pairs_by_split"].items()
    print("splits of these rows: " + ", ".join(f"{name} {number:,}" for name, number in splits))


if __name__ == "__main__":
    command.run(main)
