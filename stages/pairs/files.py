"""The files of a folder of data, and which of them a row means."""

import itertools
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath

from stages.core.errors import UserError, shown

FETCHED = "SOURCE.json"  # what fetch writes last into a folder that it has filled
# Formats that can run code when they are loaded, and programs.
PICKLES = frozenset(
    {".bin", ".ckpt", ".dill", ".h5", ".joblib", ".keras"}
    | {".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
)
CODE = frozenset(
    {".bat", ".dll", ".dylib", ".exe", ".jar", ".ps1", ".py", ".pyc", ".pyd", ".sh", ".so"}
)
MOST_CHARACTERS = 1000  # of a file's name, folders included
_TEXT = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (
    *(".parquet", ".tar"),
    *(f"{suffix}{packed}" for suffix in _TEXT for packed in ("", ".gz", ".zst")),
)


def walk(root: Path) -> list[str]:
    """Relative POSIX paths of the visible files under ``root``, sorted.

    Raises:
        UserError: one is a link that leads out of ``root``, or to a folder.
    """
    found = dict(_visible(root))
    if out := next((name for name, leads_out in found.items() if leads_out), None):
        raise UserError(
            f"{root / out} links to a folder or out of {root}; put the files themselves there"
        )
    return sorted(found)


def _visible(root: Path) -> Iterator[tuple[str, bool]]:
    """The visible files under ``root``, and whether each is a link that leads out of it.

    A link may lead out of a folder that fetch has filled, since DVC may link files to its cache,
    and from one in the Hugging Face cache to its ``blobs``.
    """
    fetched, real = (root / FETCHED).is_file(), root.resolve()
    homes = [real, *(above / "blobs" for above in real.parents[1:3] if "snapshots" in real.parts)]
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]
        links = [name for name in subfolders if Path(folder, name).is_symlink()]
        for name in [*links, *(name for name in files if not is_hidden(name))]:
            path = Path(folder, name)
            if path.is_file() or name in links:
                leads_out = path.is_symlink() and not (
                    name not in links
                    and (fetched or any(path.resolve().is_relative_to(home) for home in homes))
                )
                yield path.relative_to(root).as_posix(), leads_out


def ending(name: str) -> str:
    """``.json.gz`` of ``data/Rows.JSON.gz``, or the empty string if no rows are read from it."""
    lower = name.lower()
    return max((suffix for suffix in SUFFIXES if lower.endswith(suffix)), key=len, default="")


def is_hidden(name: str) -> bool:
    """Whether it, or a folder above it, is one that a system keeps for itself."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def suffix(name: str) -> str:
    """``.json`` of ``data/Rows.JSON``."""
    return PurePosixPath(name).suffix.lower()


class Folder:
    """The files below ``root``, found by the names that rows give them.

    A name is relative to the folder of its table or to ``root``, or becomes so by a rule of
    ``remap``: what begins with the first begins with the second instead. Letter case, backslashes
    and the two spellings of accents do not matter where that leaves one file. Any other name, as
    one of another machine, means the file that alone has the longest end of it, and its folder is
    that file's from then on (``guessed``). No two folders become one, and none becomes one whose
    files are found as they are named, so that two names never mean one file by a guess.
    """

    def __init__(self, root: Path, remap: Iterable[Mapping[str, str]] = ()) -> None:
        self.root = root
        self.remap = {rule["from"]: rule["to"] for rule in remap}
        self.used: set[str] = set()  # the rules of remap that fit a name
        self.guessed: dict[str, str] = {}
        self._as_named: set[str] = set()  # folders in which files are found as they are named

    @cached_property
    def _by_path(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in sorted(name for name, leads_out in _visible(self.root) if not leads_out):
            found.setdefault(key(path), []).append(path)
        return found

    @cached_property
    def _by_base(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key, paths in self._by_path.items():
            found.setdefault(key.rpartition("/")[2], []).extend(paths)
        return found

    def find(self, name: str, beside: str = "") -> Path | str:
        """The file that ``name`` means in a table of folder ``beside``, or why there is none."""
        start = next((start for start in self.remap if name.startswith(start)), "")
        self.used.add(start)
        path = self.remap.get(start, "") + name.removeprefix(start)
        found = self._at(path, beside) or self._at(path, "")
        folder, base = os.path.split(name.replace("\\", "/"))
        if found:
            self._as_named |= {folder, os.path.dirname(found[0])}
        elif folder in self.guessed:
            found = self._at(base, self.guessed[folder])
        elif not start:
            found = self._by_end(folder, base)
        if len(found) == 1:
            return self.root / found[0]
        why = f" may be any of {', '.join(map(shown, found[:3]))}" if found else ": no such file"
        return f"{shown(name)!r}{why}"

    def _at(self, name: str, beside: str) -> list[str]:
        """The files that a path below ``beside`` may mean."""
        path = os.path.normpath(os.path.join(beside, name.replace("\\", "/")))
        found = self._by_path.get(key(path), [])
        return [path] if path in found else found

    def _by_end(self, folder: str, base: str) -> list[str]:
        """The files that have the longest end of a name. One of two paths has to be the end of the
        other, unless the name is absolute and the last two of its parts are the same."""
        asked = key(f"{folder}/{base}").lstrip("/").split("/")
        absolute = folder.startswith("/") or folder[1:2] == ":"
        shared: dict[int, list[str]] = {}
        for path in self._by_base.get(asked[-1], ()):
            own = key(path).split("/")
            pairs = zip(reversed(asked), reversed(own), strict=False)
            length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if length in (len(asked), len(own)) or (absolute and length > 1):
                shared.setdefault(length, []).append(path)
        found = shared[max(shared)] if shared else []
        if len(found) == 1:
            place = os.path.dirname(found[0])
            if {folder, place} & self._as_named or place in self.guessed.values():
                return []
            self.guessed[folder] = place
        return found


def key(path: str) -> str:
    """What two spellings of a path have in common."""
    return unicodedata.normalize("NFC", path).casefold()
