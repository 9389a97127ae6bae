"""The folder that a fetched source becomes: what upstream published, and ``SOURCE.json``.

``SOURCE.json`` is written last: if it is there, the folder is complete. Until then the folder holds
``.partial``, where files are completed before they are moved to their place in one step: an
existing file is never written into, because with DVC's link types it may be the cache's own.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.core.text import readable

MANIFEST = "SOURCE.json"
PARTIAL = ".partial"


@dataclass(frozen=True)
class File:
    """One fetched file: path relative to the folder (POSIX), size in bytes, sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """One of several sources, in a folder of its own by its ``name``; the rest as of ``Source``.

    ``columns`` are those of its tables (see ``pairs.tables``); None: it has no tables.
    """

    name: str
    kind: str
    repo: str | None
    revision: str | None
    commit: str | None
    licence: str | None
    columns: Mapping[str, str | None] | None


@dataclass(frozen=True)
class Source:
    """What ``SOURCE.json`` says. Unknown facts are ``None``; no time, host or absolute path."""

    kind: str
    repo: str | None
    revision: str | None  # as asked: a branch, a tag or a commit
    commit: str | None  # what that was, or a package's version
    licence: str | None
    files: tuple[File, ...]
    parts: tuple[Part, ...] = ()  # where it is several; written only then

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


def read(folder: Path) -> Source:
    """The ``SOURCE.json`` of a fetched folder.

    Raises:
        UserError: there is none, so the folder is incomplete or not a fetched one.
    """
    try:
        return parse(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / MANIFEST} is missing or damaged; run `dvc repro -f fetch` to fetch the "
            "sources again"
        ) from None


def parse(values: Mapping[str, Any]) -> Source:
    """What ``SOURCE.json`` holds, as a ``Source``."""
    files = tuple(File(**file) for file in values["files"])
    parts = tuple(Part(**part) for part in values.get("parts", ()))
    return Source(**{**values, "files": files, "parts": parts})


def begin(out: Path) -> None:
    """Make ``out`` ready to be filled; a folder with other content is refused, not cleared.

    Raises:
        UserError: it is a file, holds something else, or can't be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; the source is fetched into a folder of that name")
    ours = (out / MANIFEST).exists() or (out / PARTIAL).exists()
    if out.exists() and any(out.iterdir()) and not ours:
        raise UserError(
            f"{out} holds files that fetch did not put there; move them away or delete the folder"
        )
    try:
        (out / PARTIAL).mkdir(parents=True, exist_ok=True)
        (out / MANIFEST).unlink(missing_ok=True)  # from here on the folder is incomplete
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror})") from None


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
    for folder, subfolders, files in os.walk(out, topdown=False):
        for name in files:
            path = Path(folder) / name
            if path.relative_to(out).as_posix() not in keep:
                path.unlink()
        for name in subfolders:
            path = Path(folder) / name
            if path.is_symlink():
                path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()
    values = asdict(source)
    if not source.parts:
        del values["parts"]
    files_ = sorted(values.pop("files"), key=lambda file: str(file["path"]))
    head = json.dumps(values, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(file, ensure_ascii=False)}" for file in files_)
    (out / MANIFEST).write_text(f'{head},\n "files": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    return source


def described(folder: Path, name: str) -> File:
    """A file below ``folder``, as it is."""
    return File(name, size_of(folder / name), sha256_of(folder / name))


def is_there(path: Path, file: File) -> bool:
    """Whether there is a file of this size and content."""
    return size_of(path) == file.size and path.is_file() and sha256_of(path) == file.sha256


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size_of(path: Path) -> int:
    """Size in bytes; 0 if there is no file."""
    return path.stat().st_size if path.is_file() else 0


def refuse_lfs_pointer(path: Path, name: str) -> None:
    """Refuse the few lines that Git keeps in place of a large file.

    Raises:
        UserError: it is one; ``name`` says of what.
    """
    if size_of(path) < 1024 and path.read_bytes().startswith(
        b"version https://git-lfs.github.com/spec/"
    ):
        raise UserError(
            f"{name} is a Git LFS pointer, not the file itself; run `git lfs pull` in its "
            "repository"
        )
