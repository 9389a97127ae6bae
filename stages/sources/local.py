"""Kind ``path``: files of this machine, copied as they are.

They are tables with their images, an archive of these, or the folder of a base model.
"""

import re
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field
from tqdm import tqdm

from stages.core import command
from stages.core.errors import UserError
from stages.core.text import listed, readable, shown
from stages.pairs.files import ending, is_hidden, walk
from stages.sources import base_model, source
from stages.sources.source import PARTIAL, Kind, Source, SourceSection, Tables, is_permitted

MODEL_FILES = re.compile(r".*\.(json|safetensors|txt|jinja|bin|pt|pth|py)")  # of a base model
MOST = 200 * 10**9  # bytes that an archive may unpack to


class PathModel(SourceSection):
    """A folder on this machine; its licence is what the user says, null where unknown."""

    kind: Literal["path"]
    path: Path
    licence: str | None


class PathData(Tables):
    """A table, a folder or an archive, or several of these that belong together."""

    kind: Literal["path"]
    path: Path | Annotated[list[Path], Field(min_length=1)]
    licence: str | None


def fetch_data(asked: PathData, out: Path) -> Source:
    """Copy tables with their images into ``out``; archives are unpacked there.

    What a folder or a table brings, ``pairs.tables.contents`` decides. Of several paths, each
    folder or archive goes below its own name. Hidden files, pickles and code stay behind.

    Raises:
        UserError: nothing there, nothing usable there, a link that leads out of the folder, or two
            files that would have one name.
    """
    given = asked.path if isinstance(asked.path, list) else [asked.path]
    files: dict[str, Path] = {}
    for number, path in enumerate(each.expanduser() for each in given):
        refuse_nested(path, out)
        place, name = path, path.resolve().name
        if is_archive(path):
            source.begin(out)
            place = unpacked(path, out / PARTIAL / str(number) / name)
            name = name.partition(".")[0]
        if len(given) == 1:
            found = _belonging(place, asked)
        elif place.is_dir():
            found = {f"{name}/{each}": place / each for each in walk(place)}
        else:
            found = {name: place}
            with suppress(UserError):  # preprocess tells what is wrong, when all are together
                found |= _belonging(place, asked)
        for each, at in found.items():
            if files.setdefault(each, at) != at:
                raise UserError(f"path names two files {each}; put them into folders")
    for each in list(files):
        if not is_permitted(each):
            del files[each]
    if not any(map(ending, files)):
        raise UserError(
            f"none of {listed(map(str, given), 5, longest=100)} is or holds a table (Parquet, "
            "JSON, JSONL, CSV, …)"
        )
    return copy_all(files, out, kind="path", licence=asked.licence)


def _belonging(place: Path, asked: PathData) -> dict[str, Path]:
    """The files of a folder, or of a table with the images that its rows name."""
    from stages.pairs.tables import contents

    for each in (place, *(place / name for name in walk(place))):
        source.refuse_lfs_pointer(each, str(each))  # else its table is "not valid JSON"
    found = contents(place, asked.reading)
    if found.left_out:
        why = (f"{each} ({reason})" for each, reason in found.left_out.items())
        print(f"{place}: left out: {listed(why, 5, longest=200)}")
    return {name: found.root / name for name in (*found.tables, *found.others)}


def fetch_model(asked: PathModel, out: Path, *, allow_pickle: bool, allow_code: bool) -> Source:
    """Copy a model folder's own files (no subfolders) that a base model needs into ``out``.

    Raises:
        UserError: not a folder, or not a model that later stages can use (see ``base_model``).
    """
    path = asked.path.expanduser()
    if not path.is_dir():
        raise UserError(
            f"model.source.path: {path} is not a folder; name the folder that holds config.json"
        )
    refuse_nested(path, out)
    found = [name for name in walk(path) if "/" not in name]
    names = [
        name
        for name in found
        if MODEL_FILES.fullmatch(name)
        and is_permitted(name, allow_pickle=allow_pickle, allow_code=allow_code)
    ]
    base_model.check_model(path, names, name=str(path), allow_pickle=allow_pickle)
    base_model.check_weights_exist(str(path), names, found, allow_pickle)
    base_model.check_weights(path, names, name=str(path))
    files = {name: path / name for name in names}
    return copy_all(files, out, kind="path", licence=asked.licence)


def copy_all(
    files: Mapping[str, Path],
    out: Path,
    *,
    kind: str,
    repo: str | None = None,
    commit: str | None = None,
    licence: str | None = None,
) -> Source:
    """Bring files, by their names in ``out``, there, leaving alone those that are there already.

    Raises:
        UserError: one is a Git LFS pointer, or the disk has no room.
    """
    source.begin(out)
    for path in files.values():
        source.refuse_lfs_pointer(path, str(path))
    described = [source.described(path, name) for name, path in sorted(files.items())]
    missing = [file for file in described if not source.is_there(out / file.path, file)]
    source.check_room(out, sum(file.size for file in missing), what=f"the {kind} source")
    # Links of an archive first, while what they lead to is still there.
    missing.sort(key=lambda file: not files[file.path].is_symlink())
    for file in tqdm(missing, desc="copying", unit="file", disable=len(missing) < 100):
        path = files[file.path]
        if path.is_symlink() or not path.is_relative_to(out / PARTIAL):
            path = Path(shutil.copyfile(path, out / PARTIAL / "copying"))
        source.place(path, out, file.path)
    return source.finish(out, Source(kind, repo, None, commit, licence, tuple(described)))


def is_archive(path: Path) -> bool:
    """Whether a file is to be unpacked: a zip or tar, but for a tar of samples, which is a table.

    In a tar of samples (webdataset) every table shares its stem with another file.
    """
    if not path.is_file() or not _format(path):
        return False
    if not path.name.lower().endswith(".tar"):
        return True
    try:
        with tarfile.open(path) as packed:
            names = [name for name in packed.getnames() if not is_hidden(name)]
    except tarfile.TarError:
        return False  # whoever reads it as a table says what is wrong
    stems = Counter(PurePosixPath(name).with_suffix("") for name in names)
    return any(ending(name) and stems[PurePosixPath(name).with_suffix("")] == 1 for name in names)


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
                raise UserError(f"{path} would unpack to more than {readable(MOST)}; divide it")
        source.check_room(folder, total, what=f"{path}, unpacked,")
        tar_only: Any = {} if _format(path) == "zip" else {"filter": "data"}
        shutil.unpack_archive(path, folder, _format(path), **tar_only)
    except UserError:
        raise
    except Exception as error:  # the readers of archives have a dozen of their own
        if isinstance(error, OSError) and error.errno in command.DISK:
            raise
        raise UserError(
            f"{path} can't be unpacked ({shown(error)}); pack it again with plain files alone and "
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
        raise UserError(
            f"{path} holds {out}, the folder to be filled from it; name a folder next to it"
        )


def _name(asked: PathData | PathModel, _: Source) -> str:
    """The folder as the project knows it; of one outside, only its name: the way there is a
    machine's own."""

    def known(path: Path) -> str:
        outside = path.is_absolute() or ".." in path.parts or str(path).startswith("~")
        return path.name if outside else path.as_posix()

    return ", ".join(map(known, asked.path if isinstance(asked.path, list) else [asked.path]))


def _words(fetched: Source) -> str:
    many = f"{len(fetched.files):,}, {readable(fetched.size)}"
    return f"local files ({many}), published nowhere that is known here"


KIND = Kind(
    section=PathData,
    model_section=PathModel,
    fetch_data=fetch_data,
    fetch_model=fetch_model,
    name=_name,
    words=_words,
)
