"""Kind ``path``: a local table with its images, or the folder of a base model."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError
from tqdm import tqdm

from stages.core.errors import UserError
from stages.core.schema import SourceSection
from stages.core.text import listed, readable
from stages.pairs import suffixes
from stages.pairs.suffixes import is_hidden
from stages.sources import addresses, base_model, manifest, web_images
from stages.sources.kind import Kind
from stages.sources.manifest import MANIFEST, PARTIAL, Source
from stages.sources.mentions import files_named_in, holds_no_rows
from stages.sources.names import IMAGES, is_permitted, matches, suffix

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")  # all that a base model needs
_A_TABLE = "a parquet, arrow, JSON, JSONL, CSV, TSV or tar file"


class LocalSource(SourceSection):
    """A local file or folder; its licence is what the user says, null where unknown."""

    kind: Literal["path"]
    path: Path
    licence: str | None

    @model_validator(mode="after")
    def _a_path_and_no_address(self) -> "LocalSource":
        if addresses.is_remote(str(self.path)):
            problem = addresses.problem_with(str(self.path)) or "it is an address, and not a path"
            text = f"path: {problem} (kind sharegpt takes addresses; kind path takes none)"
            raise PydanticCustomError("address", "{problem}", {"problem": text})
        return self


class LocalData(LocalSource):
    """Of data; ``image_urls`` is the column whose addresses are downloaded, null for none."""

    image_urls: str | None = None


def fetch_data(source: LocalData, out: Path) -> Source:
    """Copy a local table, or a local folder's tables, with the images next to them, into ``out``.

    With each table go the files that its rows name, whatever their suffix, by paths relative to
    it, inside the folder; of a folder also all other images, if it has any table but parquet. JSON
    files of a folder that hold no rows (annotations, descriptions) stay behind if there are others.
    Relative paths stay as they are. Hidden files, pickles and code are not copied. The images at
    addresses in the column ``image_urls`` are downloaded.

    Raises:
        UserError: nothing there, nothing usable there, or a link that leads out of the folder.
    """
    path = source.path.expanduser()
    if not path.exists():
        raise UserError(f"data.source.path: {path} does not exist; name {_A_TABLE}, or a folder")
    if path.is_dir():
        refuse_nested(path, out)
        root, found = path, walk(path)
        tables = _with_rows(root, suffixes.tables(found))
        with_images = any(suffix(name) != ".parquet" for name in tables)
        images = {name for name in found if with_images and suffix(name) in IMAGES}
    else:
        root, images = path.parent, set()
        tables = suffixes.tables([path.name])
    if not tables:
        packed = suffix(path.name) in {".zip", ".tar", ".gz", ".tgz", ".7z"}
        raise UserError(
            f"data.source.path: {path} is not and does not hold {_A_TABLE}"
            + ("; unpack the archive first" if packed else "")
        )
    for name in tables:
        images |= files_named_in(root / name, root)
    names = [*tables, *images]
    urls = source.image_urls
    return copy_all(root, names, out, kind="path", licence=source.licence, image_urls=urls)


def fetch_model(source: LocalSource, out: Path, *, allow_pickle: bool, allow_code: bool) -> Source:
    """Copy a local model folder's own files (no subfolders) that a base model needs into ``out``.

    Raises:
        UserError: not a folder, or not a model that later stages can use (see ``check``).
    """
    path = source.path.expanduser()
    if not path.is_dir():
        raise UserError(
            f"model.source.path: {path} is not a folder; name the folder that holds config.json"
        )
    refuse_nested(path, out)
    found = [name for name in walk(path) if "/" not in name]
    patterns = [
        *MODEL_FILES,
        *(("*.bin", "*.pt", "*.pth") if allow_pickle else ()),
        *(("*.py",) if allow_code else ()),
    ]
    names = [
        name
        for name in found
        if matches(name, patterns)
        and is_permitted(name, allow_pickle=allow_pickle, allow_code=allow_code)
    ]
    base_model.check_model(path, names, name=str(path), allow_pickle=allow_pickle)
    base_model.check_weights_exist(str(path), names, found, allow_pickle)
    base_model.check_weights(path, names, name=str(path))
    return copy_all(path, names, out, kind="path", licence=source.licence)


def copy_all(
    root: Path,
    names: Iterable[str],
    out: Path,
    *,
    kind: str,
    repo: str | None = None,
    commit: str | None = None,
    licence: str | None = None,
    image_urls: str | None = None,
) -> Source:
    """Copy the named files of ``root`` into ``out``, leaving alone those that are there already.

    Raises:
        UserError: one can't be read or written, is a Git LFS pointer, or the disk has no room.
    """
    names = sorted(set(names) - {MANIFEST})
    manifest.begin(out)
    try:
        files = []
        for name in names:
            path = root / name
            manifest.refuse_lfs_pointer(path, str(path))
            files.append(manifest.described(root, name))
        missing = [file for file in files if not manifest.is_there(out / file.path, file)]
        manifest.check_room(out, sum(file.size for file in missing), what=str(root))
        quiet = len(missing) < 100
        for file in tqdm(missing, desc=f"copying {kind}", unit="file", disable=quiet):
            shutil.copyfile(root / file.path, out / PARTIAL / "copying")
            manifest.place(out / PARTIAL / "copying", out, file.path)
    except OSError as error:
        raise UserError(f"{error.filename or root} can't be copied ({error.strerror})") from None
    files += web_images.bring(out, names, image_urls)
    return manifest.finish(out, Source(kind, repo, None, commit, licence, tuple(files)))


def _with_rows(root: Path, tables: list[str]) -> list[str]:
    """The tables but for those that hold no rows, unless none would be left."""
    without = [name for name in tables if holds_no_rows(root / name)]
    if not without or len(without) == len(tables):
        return tables
    names = listed(without, 5, longest=200)
    print(f"left out, because they are one JSON object and not rows: {names}")
    return [name for name in tables if name not in without]


def walk(root: Path) -> list[str]:
    """Relative POSIX paths of the visible files under ``root``, sorted; no link may lead out.

    The one exception is a folder of the Hugging Face cache, whose files are links to its ``blobs``.

    Raises:
        UserError: a link leads out of ``root``, or to a folder.
    """
    real = root.resolve()
    homes = [real]
    if real.parent.name == "snapshots":
        homes += [real.parents[1] / "blobs", real.parents[2] / "blobs"]
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]
        for name in subfolders:
            if (Path(folder) / name).is_symlink():
                raise UserError(
                    f"{Path(folder) / name} is a link to a folder, and only what lies inside "
                    f"{root} is copied; put the folder itself there"
                )
        for name in files:
            path = Path(folder) / name
            if is_hidden(name) or not path.is_file():
                continue
            if path.is_symlink() and not any(path.resolve().is_relative_to(home) for home in homes):
                raise UserError(
                    f"{path} is a link that leads out of {root}; put the file itself there"
                )
            found.append(path.relative_to(root).as_posix())
    return sorted(found)


def refuse_nested(source: Path, out: Path) -> None:
    """Refuse a source that holds the folder to be filled from it.

    Raises:
        UserError: it does.
    """
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"{source} holds {out}, the folder to be filled from it; name a folder next to it"
        )


def _name(source: LocalSource, _: Source) -> str:
    """The folder as the project knows it; of one outside, only its name: the way there is a
    machine's own."""
    path = source.path
    outside = path.is_absolute() or ".." in path.parts or str(path).startswith("~")
    return path.name if outside else path.as_posix()


def _words(fetched: Source) -> str:
    many = f"{len(fetched.files):,}, {readable(fetched.size)}"
    return f"local files ({many}), published nowhere that is known here"


KIND = Kind(
    section=LocalData,
    model_section=LocalSource,
    fetch_data=fetch_data,
    fetch_model=fetch_model,
    name=_name,
    words=_words,
)
