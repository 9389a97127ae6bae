"""The file that a row names, found the same way by fetch, which copies it, and by preprocess.

A name is first taken as it is written. Where there is no such file, what differs between systems is
looked past, part by part: backslashes for slashes, upper and lower case, and accents in one
character or in two (macOS writes the latter). Only a file that is the one match is taken.
"""

import os
import unicodedata
from functools import lru_cache
from pathlib import Path

SHOWN = 100  # characters of a name that a message repeats
MOST = 1000  # characters that a name can have, folders included


def find(folder: Path, name: str) -> Path | str:
    """The file below ``folder`` that ``name`` means, or why there is none.

    ``name`` is relative to ``folder``. It may not lead out of it: that is the caller's to refuse
    (``leads_out``). Links are followed, as DVC itself may link files to its cache.
    """
    if len(name) > MOST:
        return f"{shown(name)} can't be a file name"
    try:
        name.encode()
        path = folder / os.path.normpath(name)
        if path.is_file():
            return path
        path = folder
        for part in parts(name):
            if not (path / part).exists():
                alike = entries(path).get(key(part), ())
                if len(alike) > 1:
                    named = ", ".join(shown(each) for each in alike[:3])
                    return f"{shown(name)} may be any of {named}; write it as the file is written"
                if not alike:
                    return f"{shown(name)}: no such file"
                part = alike[0]
            path /= part
        return path if path.is_file() else f"{shown(name)} is not a file"
    except UnicodeEncodeError:  # half a surrogate pair
        return f"{shown(name)} can't be a file name"
    except OSError as error:  # a name that is too long, a loop of links, a folder without access
        return f"{shown(name)}: {error.strerror}"


def leads_out(name: str) -> bool:
    """Whether a name is absolute, climbs out of the folder that it is relative to, or is cut."""
    return (
        "\0" in name
        or os.path.isabs(name)
        or name.startswith("\\")
        or name[1:3] in (":\\", ":/")
        or os.pardir in parts(name)[:1]
    )


def shown(name: str) -> str:
    """A name for a message: one line, printable, at most 100 characters of it."""
    return repr(name if len(name) <= SHOWN else f"{name[:SHOWN]}…")


def parts(name: str) -> list[str]:
    """Folders and file of a name, in order."""
    return [part for part in os.path.normpath(name.replace("\\", "/")).split("/") if part]


def key(part: str) -> str:
    """What two spellings of a file's or a folder's name have in common."""
    return unicodedata.normalize("NFC", part).casefold()


def entries(folder: Path) -> dict[str, list[str]]:
    """The names in a folder, by ``key``."""
    return _entries(folder, folder.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _entries(folder: Path, _changed: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        found.setdefault(key(name), []).append(name)
    return found
