"""Show what preprocess would make of the first rows of ``data.sources``, before a run.

    python -m stages check
    python -m stages check --rows 5000

In: ``params.yaml``. Local sources are read where they are (archives are unpacked for it); of one on
the Hub, what ``fetch`` left in ``data/raw``. Out: on standard output, the columns, three rows of
each source, what would be left out and why, and the splits. It ends with an error where
the run would stop, and says what would help.
"""

import itertools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stages import preprocess
from stages.core import command
from stages.core.errors import UserError, listed, readable, shown
from stages.pairs import output, tables
from stages.pairs.pairs import Record
from stages.pairs.refusals import advice
from stages.params import params
from stages.sources import kinds, source
from stages.sources.hub import HubData
from stages.sources.local import PathData, is_archive
from stages.sources.source import Tables

_SHOWN = 3  # tables, and rows of each source


def main(raw: Path = Path("data/raw"), rows: int = 1000) -> None:
    settings = params.load()
    sources = settings.data.sources
    with tempfile.TemporaryDirectory() as scratch:
        places = {}
        for name, asked in sources.items():
            with kinds.of(name):
                places[name] = _place(name, asked, raw / name, Path(scratch, "raw", name))
                if isinstance(asked, Tables):
                    _print_tables(places[name], asked)
        each = [kinds.read({name: places[name]}, {name: sources[name]}) for name in sources]
        folder = Path(scratch, "pairs")
        folder.mkdir()
        print(f"the first rows, out of at most {rows:,} of each source:")
        counted = preprocess.fill(
            folder,
            itertools.chain(*(_printed(itertools.islice(found, rows)) for found, _ in each)),
            itertools.chain(*(itertools.islice(questions, rows) for _, questions in each)),
            settings.preprocess,
        )
        _print_outcome(counted, folder)
        output.check(counted, folder, settings.preprocess)
    print("nothing found that would stop the run")


def _place(name: str, asked: Any, raw: Path, scratch: Path) -> Path:
    """Where the rows can be read.

    Raises:
        UserError: nowhere yet.
    """
    if isinstance(asked, PathData):
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
        raise UserError(f"it is not in {raw} yet; run `dvc repro fetch@{name}`, then this again")
    print(f"{name}: {raw}, as fetch left it")
    return raw


def _print_tables(place: Path, asked: Tables) -> None:
    there = tables.contents(place, asked)
    size = readable(sum((there.root / name).stat().st_size for name in there.tables))
    print(f"tables: {len(there.tables):,}, {size}; other files: {len(there.others):,}")
    if there.left_out:
        print(f"left out: {listed((f'{n} ({why})' for n, why in there.left_out.items()), 5, 200)}")
    for one in tables.opened(there, asked)[:_SHOWN]:
        print(f"  {shown(one.name)}, read as {one.layout.name}")
        first = next(one.table.rows(one.table.names), None)
        for name in one.table.names:
            value = first.get(name) if isinstance(first, dict) else None
            used = "  <-" if name in one.layout.columns else ""
            print(f"    {shown(name, 40)}: {type(value).__name__}{used}")


def _printed(rows: Iterable[Record]) -> Iterator[Record]:
    """The rows; of the first ones, what they hold is printed."""
    for number, row in enumerate(rows):
        if number < _SHOWN:
            images = [readable(len(image)) for image in row.images or ()]
            print(f"  {shown(row.where)}: images: {', '.join(images) or row.note or 'none'}")
            said = {"system": row.system} if row.system else {}
            said |= {f"turn {i}": " / ".join(turn) for i, turn in enumerate(row.history, start=1)}
            texts = {name: getattr(row, name) for name in ("question", "chosen", "rejected")}
            for name, text in {**said, **texts}.items():
                print(f"    {name}: {shown(text)}")
        yield row


def _print_outcome(counted: dict[str, Any], folder: Path) -> None:
    print(f"{counted['rows_in']:,} rows read, {counted['rows_kept']:,} kept")
    if not_asked := counted.get("questions_left_out"):
        print(f"held-out questions left out: {not_asked}")
    rows = output.rows_left_out(counted, folder)
    for reason, number in counted["left_out"].items():
        if number:
            first = next(row for row in rows if row["reason"] == reason)
            print(f"  {number:,} {reason}: {advice(reason)}")
            print(f"    the first, {shown(first['where'])}: {shown(first['detail'], 300)}")
    print(f"distinct images: {counted['unique_images']:,}")
    splits = counted["pairs_by_split"].items()
    print("splits of these rows: " + ", ".join(f"{name} {number:,}" for name, number in splits))


if __name__ == "__main__":
    command.run(main)
