"""What the kinds of sources share: the folder that a source becomes, and what a kind has to say.

The folder holds what upstream published and ``SOURCE.json``, which is written last: if it is there,
the folder is complete. Until then the folder holds ``.partial``, where files are completed before
they are moved to their place in one step: an existing file is never written into, because with
DVC's link types it may be the cache's own.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from stages.core.errors import UserError, readable
from stages.pairs.files import CODE, FETCHED, PICKLES, suffix
from stages.pairs.pairs import Question, Record

PARTIAL = ".partial"


@dataclass(frozen=True)
class File:
    """One fetched file: path relative to the folder (POSIX), size in bytes, sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """What ``SOURCE.json`` says. Unknown facts are ``None``; no time, host or absolute path."""

    kind: str
    repo: str | None = None
    revision: str | None = None  # as asked: a branch, a tag or a commit
    commit: str | None = None  # what that was, or a package's version
    licence: str | None = None
    files: tuple[File, ...] = ()
    patterns: tuple[str, ...] = ()  # by which a repository's files were chosen; written if any


def read(folder: Path) -> Source:
    """The ``SOURCE.json`` of a fetched folder.

    Raises:
        UserError: there is none, so the folder is incomplete or not a fetched one.
    """
    try:
        values = json.loads((folder / FETCHED).read_text(encoding="utf-8"))
        files = tuple(File(**file) for file in values["files"])
        return Source(**{**values, "files": files, "patterns": tuple(values.get("patterns", ()))})
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / FETCHED} is missing or damaged; run `dvc repro -f fetch` to fetch the "
            "sources again"
        ) from None


def begin(out: Path) -> None:
    """Make ``out`` ready to be filled; a folder with other content is refused, not cleared.

    Raises:
        UserError: it holds something else.
    """
    ours = (out / FETCHED).exists() or (out / PARTIAL).exists()
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise UserError(
            f"{out} holds files that fetch did not put there; move them away or delete the folder"
        )
    (out / PARTIAL).mkdir(parents=True, exist_ok=True)
    (out / FETCHED).unlink(missing_ok=True)  # from here on the folder is incomplete


def check_room(out: Path, needed: int, *, what: str) -> None:
    """Refuse what the disk of ``out`` has no room for; ``needed`` are bytes.

    Raises:
        UserError: says how much is needed and how much is free.
    """
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{what} needs {readable(needed)} on the disk of {out} (a cached copy would need as "
            f"much again), but {readable(free)} are free; make room first"
        )


def place(completed: Path, out: Path, name: str) -> None:
    """Move a complete file from ``out``'s own ``.partial`` to ``out/name``."""
    target = out / name
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(completed, target)


def finish(out: Path, source: Source) -> Source:
    """Clear ``out`` of what the source does not have, and write ``SOURCE.json``."""
    shutil.rmtree(out / PARTIAL)
    keep = {file.path for file in source.files}
    for path in sorted(out.rglob("*"), reverse=True):  # a folder comes after what it holds
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(out).as_posix() not in keep:
            path.unlink()
    values = asdict(source)
    if not source.patterns:
        del values["patterns"]
    files = sorted(values.pop("files"), key=lambda file: str(file["path"]))
    head = json.dumps(values, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(file, ensure_ascii=False)}" for file in files)
    (out / FETCHED).write_text(f'{head},\n "files": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    return source


def described(path: Path, name: str) -> File:
    """A file as it is, under its name in the folder."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(name, path.stat().st_size, digest)


def is_there(path: Path, file: File) -> bool:
    """Whether there is a file of this size and content."""
    return (
        path.is_file() and path.stat().st_size == file.size and described(path, file.path) == file
    )


def refuse_lfs_pointer(path: Path, name: str) -> None:
    """Refuse the few lines that Git keeps in place of a large file.

    Raises:
        UserError: it is one; ``name`` says of what.
    """
    start = b"version https://git-lfs.github.com/spec/"
    if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(start):
        raise UserError(
            f"{name} is a Git LFS pointer, not the file itself; run `git lfs pull` in its "
            "repository"
        )


def is_permitted(name: str, *, allow_pickle: bool = False, allow_code: bool = False) -> bool:
    """Whether a file may be fetched: not what can run code when loaded, unless that is trusted."""
    kind = suffix(name)
    return (allow_pickle or kind not in PICKLES) and (allow_code or kind not in CODE)


# Sections of params.yaml


class Section(BaseModel):
    """A part of ``params.yaml``: immutable, complete, and closed to unknown keys."""

    # Strict: 1 is not true, and "0.1" is not a number.
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class SourceSection(Section):
    """A source of data or of a base model: ``kind`` names its kind, which has keys of its own."""

    model_config = ConfigDict(strict=False)  # a text becomes a path

    kind: Any


class Columns(Section):
    """Names of a table's columns; ``image``, ``origin`` and ``kind`` may be null."""

    model_config = ConfigDict(strict=True)

    image: str | None = "image"
    question: str = "question"
    chosen: str = "chosen"
    rejected: str = "rejected"
    origin: str | None = None
    kind: str | None = None

    @model_validator(mode="after")
    def _four_columns(self) -> "Columns":
        if len({self.image, self.question, self.chosen, self.rejected}) < 4:
            raise PydanticCustomError(
                "columns", "image, question, chosen and rejected must name four columns"
            )
        return self


# A rule for images' names: what begins with ``from`` begins with ``to`` instead.
Remap = Annotated[dict[Literal["from", "to"], str], Field(min_length=2)]


class Tables(SourceSection):
    """A source of tables, and how they are read (``pairs.tables``)."""

    columns: Columns = Columns()
    remap: tuple[Remap, ...] = ()
    datasets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Kind:
    """How one kind of source is written in params.yaml, fetched and read.

    section, model_section: the keys in params.yaml, one of them ``kind: Literal["its name"]``; no
        ``model_section``: it has no models.
    fetch_data: ``fetch_data(section, out)`` fills ``out`` through ``begin`` and ``finish``.
    fetch_model: ``fetch_model(section, out, allow_pickle=…, allow_code=…)``.
    read: records and held-out questions of a fetched folder; None: tables (``pairs.tables``).
    """

    section: type[SourceSection]
    fetch_data: Callable[[Any, Path], Source]
    fetch_model: Callable[..., Source] | None = None
    model_section: type[SourceSection] | None = None
    read: Callable[[Path], tuple[Iterator[Record], Iterator[Question]]] | None = None

    @property
    def tag(self) -> str:
        """Its name in params.yaml and SOURCE.json."""
        return str(get_args(self.section.model_fields["kind"].annotation)[0])
