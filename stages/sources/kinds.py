"""The kinds of sources there are, and the rows of those in ``data.sources``, one after the other.

A new kind is one more file in this folder, and its name here.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.pairs.pairs import Question, Record
from stages.sources import easyvqa, hub, local
from stages.sources.source import Kind, SourceSection

# By the name that params.yaml and SOURCE.json give it.
KINDS: dict[str, Kind] = {kind.tag: kind for kind in (hub.KIND, local.KIND, easyvqa.KIND)}


def read(
    places: Mapping[str, Path], sources: Mapping[str, SourceSection]
) -> tuple[Iterator[Record], Iterator[Question]]:
    """Rows and held-out questions of all sources.

    ``places`` says where each is. A row without an origin is of the source that it is from. Where
    there are several, its ``where`` names that too.
    """
    from stages.pairs import tables  # pyarrow takes longer to import than all of the parameters

    def named(rows: Iterator[Any], name: str) -> Iterator[Any]:
        with of(name):
            for row in rows:
                where = f"{name}: {row.where}" if len(sources) > 1 else row.where
                origin = {"origin": row.origin or name} if isinstance(row, Record) else {}
                yield replace(row, where=where, **origin)

    records, questions = [], []
    for name, asked in sources.items():
        own = KINDS[asked.kind].read
        with of(name):
            rows, held_out = (
                own(places[name]) if own else (tables.records(places[name], asked), iter(()))
            )
        records.append(named(rows, name))
        questions.append(named(held_out, name))
    return chain(*records), chain(*questions)


@contextmanager
def of(name: str) -> Iterator[None]:
    """Put the name of a source before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"data.sources.{name}: {error}") from None
