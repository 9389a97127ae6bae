"""Kind ``several``: more than one source in one run, each of a kind of its own.

Each is fetched into a folder by its name, with a ``SOURCE.json`` of its own, and read one after the
other. A row says which source it is of, in its place and, unless it has one, as its origin. What
two of them hold is kept once: preprocess looks for duplicates among all rows.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from stages.core.errors import UserError, did_you_mean
from stages.core.schema import SourceSection
from stages.sources import manifest
from stages.sources.kind import About, Kind
from stages.sources.licences import strictest
from stages.sources.manifest import MANIFEST, Part, Source

if TYPE_CHECKING:  # pyarrow takes longer to import than all of the parameters
    from stages.pairs.pairs import Question, Record

# Columns of a table where a source names no others.
COLUMNS: dict[str, str | None] = {
    "image": "image",
    "question": "question",
    "chosen": "chosen",
    "rejected": "rejected",
    "origin": None,
    "kind": None,
}
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")]


class SeveralSource(SourceSection):
    """Sources by name: each a section as it would be alone, and ``columns`` where its tables have
    others than ``COLUMNS``."""

    kind: Literal["several"]
    sources: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]

    @model_validator(mode="after")
    def _each_is_a_source(self) -> "SeveralSource":
        if len({name.lower() for name in self.sources}) < len(self.sources):
            raise PydanticCustomError("source", "two sources have names that differ in case alone")
        for name in self.sources:
            section(self, name)
        return self

    def columns(self, name: str) -> dict[str, str | None]:
        """The columns of one source's tables."""
        return {**COLUMNS, **(self.sources[name].get("columns") or {})}


def section(source: SeveralSource, name: str) -> SourceSection:
    """One source's own section, checked.

    Raises:
        PydanticCustomError: naming what is wrong with it.
    """
    from stages.sources.kinds import KINDS

    values = dict(source.sources[name])
    columns = values.pop("columns", None)
    tag = values.get("kind")
    known = [kind for kind in KINDS if kind != KIND.tag]
    if tag not in known:
        hint = did_you_mean(str(tag), known)
        raise _problem(name, f"kind {str(tag)!r:.60} must be one of {', '.join(known)}{hint}")
    if columns is not None and KINDS[tag].read is not None:
        raise _problem(name, f"columns are of tables, and kind {tag} has none; leave them out")
    if not isinstance(columns, dict | None) or not all(
        isinstance(column, str) or (column is None and key in ("origin", "kind"))
        for key, column in (columns or {}).items()
    ):
        raise _problem(name, "columns maps image, question, … to names of columns")
    if unknown := [key for key in columns or () if key not in COLUMNS]:
        hint = did_you_mean(str(unknown[0]), COLUMNS)
        raise _problem(name, f"unknown key 'columns.{unknown[0]!s:.60}'{hint}")
    try:
        return KINDS[tag].section.model_validate(values)
    except ValidationError as error:
        problems = [
            _explained(detail, list(KINDS[tag].section.model_fields)) for detail in error.errors()
        ]
        raise _problem(name, "; ".join(problems)) from None


def _explained(detail: ErrorDetails, known: list[str]) -> str:
    """One of pydantic's errors, without the value that was given: it may hold a password."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{key}'{did_you_mean(key, known)}"
    if detail["type"] == "missing":
        return f"key '{key}' is missing"
    return f"'{key}': {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _problem(name: str, problem: str) -> PydanticCustomError:
    where = f"sources.{name}: {problem}"
    return PydanticCustomError("source", "{problem}", {"problem": where})


def fetch_data(source: SeveralSource, out: Path) -> Source:
    """Fetch each source into its folder.

    Raises:
        UserError: one can't be fetched; the message names it.
    """
    from stages.sources.kinds import KINDS

    manifest.begin(out)
    parts, files = [], []
    for name in source.sources:
        own = section(source, name)
        kind = KINDS[own.kind]
        with _named(f"data.source.sources.{name}"):
            fetched = kind.fetch_data(own, out / name)
        columns = source.columns(name) if kind.read is None else None
        parts.append(
            Part(
                name,
                fetched.kind,
                fetched.repo,
                fetched.revision,
                fetched.commit,
                fetched.licence,
                columns,
            )
        )
        files += [replace(file, path=f"{name}/{file.path}") for file in fetched.files]
        files.append(manifest.described(out, f"{name}/{MANIFEST}"))
    repo = ", ".join(part.repo or part.name for part in parts)
    licence = strictest(part.licence for part in parts)
    return manifest.finish(
        out, Source("several", repo, None, None, licence, tuple(files), tuple(parts))
    )


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Puts the name of a source before what is wrong with it."""
    try:
        yield
    except UserError as error:
        text = str(error).replace("data.columns", f"{where}.columns")
        text = text.replace("data.source.image_urls", f"{where}.image_urls")
        raise UserError(f"{where}: {text}".replace(": data.source.", ": ")) from None


def read(raw: Path) -> "tuple[Iterator[Record], Iterator[Question]]":
    """Rows and held-out questions of one source after the other."""
    parts = manifest.read(raw).parts
    both = [_read(raw, part) for part in parts]
    return (
        itertools.chain.from_iterable(records for records, _ in both),
        itertools.chain.from_iterable(questions for _, questions in both),
    )


def _read(raw: Path, part: Part) -> "tuple[Iterator[Record], Iterator[Question]]":
    from stages.pairs import tables
    from stages.sources.kinds import KINDS

    own = KINDS[part.kind].read
    if own is not None:
        records, questions = own(raw / part.name)
    else:
        records, questions = (
            tables.records(raw / part.name, tables.Reading(part.columns or COLUMNS)),
            iter(()),
        )

    def of_this_source() -> "Iterator[Record]":
        with _named(f"data.source.sources.{part.name}"):
            for row in records:
                where = f"{part.name}: {row.where}"
                yield replace(row, where=where, origin=row.origin or part.name)

    return of_this_source(), (replace(q, where=f"{part.name}: {q.where}") for q in questions)


def _alone(fetched: Source, part: Part) -> Source:
    """What one source's own ``SOURCE.json`` says."""
    start = f"{part.name}/"
    files = tuple(file for file in fetched.files if file.path.startswith(start))
    return Source(part.kind, part.repo, part.revision, part.commit, part.licence, files)


def _name(source: SeveralSource, fetched: Source) -> str:
    from stages.sources.kinds import KINDS

    own = {
        part.name: _alone(fetched, part) for part in fetched.parts if part.name in source.sources
    }
    return ", ".join(
        f"{name} ({KINDS[alone.kind].name(section(source, name), alone)})"
        for name, alone in own.items()
    )


def _words(fetched: Source) -> str:
    from stages.sources.kinds import KINDS

    return "several sources: " + "; ".join(
        f"`{part.name}`, {KINDS[part.kind].words(_alone(fetched, part))}"
        f" ({part.licence or 'licence unknown'})"
        for part in fetched.parts
    )


def _about(fetched: Source) -> About | None:
    from stages.sources.kinds import KINDS

    known = [about for p in fetched.parts if (about := KINDS[p.kind].about(_alone(fetched, p)))]
    if not known:
        return None
    notes = dict.fromkeys(about.note for about in known)
    citations = dict.fromkeys(name for about in known for name in about.citations)
    return About(known[0].language, " ".join(notes), tuple(citations))


KIND = Kind(
    section=SeveralSource,
    fetch_data=fetch_data,
    read=read,
    name=_name,
    words=_words,
    about=_about,
)
