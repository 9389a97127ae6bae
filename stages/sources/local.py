"""Kind ``path``: files of this machine, copied as they are.

They are tables with their images, an archive of these, or the folder of a base model.
"""

import re
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from stages.core import command, console
from stages.core.errors import UserError, listed, readable, shown
from stages.pairs.files import walk
from stages.sources import base_model, source
from stages.sources.source import PARTIAL, Kind, Source, SourceSection, Tables, is_permitted

MODEL_FILES = re.compile(r".*\.(json|safetensors|txt|jinja|bin|pt|pth|py)")  # of a base model
MOST = 200 * 10**9  # bytes that an archive may unpack to


class PathModel(SourceSection):
    """A folder on this machine; its licence is what the user says, null where unknown."""

    kind: Literal["path"]
    path: Path
    licence: str | None


class PathData(PathModel, Tables):
    """A table with its images, a folder of these, or an archive of it."""


def fetch_data(asked: PathData, out: Path) -> Source:
    """Copy tables with their images into ``out``; an archive is unpacked there.

    What a folder or a table brings, ``pairs.tables.contents`` decides.

    Raises:
        UserError: nothing there, nothing usable there, or a link that leads out of the folder.
    """
    from stages.pairs.tables import contents

    path = asked.path.expanduser()
    refuse_nested(path, out)
    if is_archive(path):
        source.begin(out)
        path = unpacked(path, out / PARTIAL / path.name)
    for each in (path, *(path / name for name in walk(path))):
        source.refuse_lfs_pointer(each, str(each))  # else its table is "not valid JSON"
    found = contents(path, asked)
    if found.left_out:
        why = (f"{each} ({reason})" for each, reason in found.left_out.items())
        print(f"{path}: left out: {listed(why, 5, longest=200)}")
    names = filter(is_permitted, (*found.tables, *found.others))
    files = {name: found.root / name for name in names}
    return copy_all(files, out, kind="path", licence=asked.licence)


def fetch_model(asked: PathModel, out: Path, *, allow_pickle: bool, allow_code: bool) -> Source:
    """Copy a model folder's own files (no subfolders) that a base model needs into ``out``.

    Raises:
        UserError: it is no model that later stages can use (see ``base_model``).
    """
    path = asked.path.expanduser()
    refuse_nested(path, out)
    found = [name for name in walk(path) if "/" not in name]
    names = [
        name
        for name in found
        if MODEL_FILES.fullmatch(name)
        and is_permitted(name, allow_pickle=allow_pickle, allow_code=allow_code)
    ]
    base_model.check_model(path, names, name=str(path))
    base_model.check_weights_exist(str(path), names, found, allow_pickle)
    base_model.check_weights(path, names, name=str(path))
    files = {name: path / name for name in names}
    return copy_all(files, out, kind="path", licence=asked.licence)


def copy_all(files: Mapping[str, Path], out: Path, **facts: Any) -> Source:
    """Bring files, by their names in ``out``, there, leaving alone those that are there already.

    ``facts`` are fields of ``SOURCE.json``.

    Raises:
        UserError: the disk has no room.
    """
    source.begin(out)
    described = [source.described(path, name) for name, path in sorted(files.items())]
    missing = [file for file in described if not source.is_there(out / file.path, file)]
    source.check_room(out, sum(file.size for file in missing), what="the source")
    # Links of an archive first, while what they lead to is still there.
    missing.sort(key=lambda file: not files[file.path].is_symlink())
    for file in console.counted(missing, len(missing), "copying", "files"):
        path = files[file.path]
        if path.is_symlink() or not path.is_relative_to(out / PARTIAL):
            path = Path(shutil.copyfile(path, out / PARTIAL / "copying"))
        source.place(path, out, file.path)
    return source.finish(out, Source(files=tuple(described), **facts))


def is_archive(path: Path) -> bool:
    """Whether a file is to be unpacked: a zip or a packed tar. A plain tar is a table."""
    return path.is_file() and _format(path) not in (None, "tar")


def unpacked(path: Path, folder: Path) -> Path:
    """The folder, filled with an archive's files after their sizes were summed.

    Raises:
        UserError: it is damaged, needs a password, has a member that leads out, or is too large.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        total = 0
        for size in _sizes(path):
            total += size
            if total > MOST:
                raise UserError(f"{path} would unpack to more than {readable(MOST)}; split it")
        source.check_room(folder, total, what=f"{path}, unpacked,")
        tar_only: Any = {} if _format(path) == "zip" else {"filter": "data"}
        shutil.unpack_archive(path, folder, _format(path), **tar_only)
    except UserError:
        raise
    except Exception as error:  # the readers of archives have a dozen of their own
        if isinstance(error, OSError) and error.errno in command.DISK:
            raise
        raise UserError(
            f"{path} can't be unpacked ({shown(error)}); pack it again, with plain files only and "
            "no password"
        ) from None
    return folder


def _format(path: Path) -> str | None:
    """The name that ``shutil`` has for an archive's format, by the file's name."""
    name = path.name.lower()
    known = ((kind, ends) for kind, ends, _ in shutil.get_unpack_formats())
    return next((kind for kind, ends in known if name.endswith(tuple(ends))), None)


def _sizes(path: Path) -> Iterator[int]:
    if _format(path) == "zip":
        with zipfile.ZipFile(path) as packed:
            yield from (info.file_size for info in packed.infolist())
    else:
        with tarfile.open(path) as packed:
            yield from (info.size for info in packed)


def refuse_nested(path: Path, out: Path) -> None:
    """Refuse a source that holds the folder to be filled from it.

    Raises:
        UserError: it does.
    """
    if out.resolve().is_relative_to(path.resolve()):
        raise UserError(f"{path} contains {out}, the folder that fetch fills; name another folder")


KIND = Kind(
    section=PathData,
    model_section=PathModel,
    fetch_data=fetch_data,
    fetch_model=fetch_model,
)
