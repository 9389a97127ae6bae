"""The files of a folder of data, and which of them a row means."""

import os
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from stages.core.errors import UserError
from stages.core.text import shown
from stages.pairs.suffixes import is_hidden

FETCHED = "SOURCE.json"  # what fetch writes last into a folder that it has filled
INFO = "dataset_info.json"  # LLaMA-Factory's description of tables
# Formats that can run code when they are loaded, and programs.
PICKLES = frozenset(
    {".bin", ".ckpt", ".dill", ".h5", ".joblib", ".keras"}
    | {".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
)
CODE = frozenset(
    {".bat", ".dll", ".dylib", ".exe", ".jar", ".ps1", ".py", ".pyc", ".pyd", ".sh", ".so"}
)
MOST_CHARACTERS = 1000  # of a file's name, folders included


@dataclass(frozen=True)
class Contents:
    """What a folder, or a single table, holds. Names are POSIX paths below ``root``, sorted.

    ``tables`` are read; ``others`` belong to them: images, whatever their suffix, and descriptions;
    fetch copies both. ``left_out`` says of each other file why it is neither.
    """

    root: Path
    tables: tuple[str, ...]
    others: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


def walk(root: Path) -> list[str]:
    """Relative POSIX paths of the visible files under ``root``, sorted.

    No link may lead out of it, but for those of a folder that fetch has filled, which DVC may link
    to its cache, and of one in the Hugging Face cache, whose files are links to its ``blobs``.

    Raises:
        UserError: a link leads out of ``root``, or to a folder.
    """
    real = root.resolve()
    homes = [real]
    if real.parent.name == "snapshots":
        homes += [real.parents[1] / "blobs", real.parents[2] / "blobs"]
    fetched = (root / FETCHED).is_file()
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]
        for name in subfolders:
            if (Path(folder) / name).is_symlink():
                raise UserError(
                    f"{Path(folder) / name} is a link to a folder, and only what lies inside "
                    f"{root} is read; put the folder itself there"
                )
        for name in files:
            path = Path(folder) / name
            if is_hidden(name) or not path.is_file():
                continue
            inside = any(path.resolve().is_relative_to(home) for home in homes)
            if path.is_symlink() and not inside and not fetched:
                raise UserError(
                    f"{path} is a link that leads out of {root}; put the file itself there"
                )
            found.append(path.relative_to(root).as_posix())
    return sorted(found)


def suffix(name: str) -> str:
    """``.json`` of ``data/Rows.JSON``."""
    return PurePosixPath(name).suffix.lower()


class Folder:
    """The files below ``root``, found by the names that rows give them.

    A name is one relative to its table or to ``root``, or becomes one by a rule of ``remap`` (what
    begins with the first begins with the second instead). Letter case, backslashes and the two
    spellings of accents do not matter where that leaves one file. Any other name, as one of another
    machine, means the file that alone has the longest tail of it.
    """

    def __init__(self, root: Path, remap: Iterable[tuple[str, str]] = ()) -> None:
        self.root = root
        self.remap = tuple(remap)

    def find(self, name: str, beside: str) -> Path | str:
        """The file that ``name`` means in a table of the folder ``beside`` (``""``: ``root``), or
        why there is none."""
        for start, new in self.remap:
            if name.startswith(start):
                name = new + name.removeprefix(start)
                break
        parts = _parts(name)
        if not parts or len(name) > MOST_CHARACTERS:
            return f"{shown(name)} can't be a file's name"
        for top in dict.fromkeys((beside, "")):
            path = self.root.joinpath(top, *parts)
            if ".." not in parts and not os.path.isabs(name) and path.is_file():
                return path
        return f"{shown(name)}: no such file"


def _parts(name: str) -> list[str]:
    """Folders and file of a name, in order."""
    return [part for part in os.path.normpath(name.replace("\\", "/")).split("/") if part]


def key(name: str) -> str:
    """What two spellings of a file's name have in common."""
    return unicodedata.normalize("NFC", name).casefold()
