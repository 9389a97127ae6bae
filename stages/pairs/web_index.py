"""Images at addresses, as fetch left them: a file each by the hash of its address, and an index.

A line of the index is the file's name, why there is none (or nothing), and the address as JSON.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from stages.core.text import shown

FOLDER = "web_images"
INDEX = f"{FOLDER}/index.txt"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,20}://\S+")


def is_address(text: str) -> bool:
    """Whether a text is an address, and nothing else; of the web or not."""
    return bool(_ADDRESS.fullmatch(text))


def label(address: str) -> str:
    """An address for a message: without user, password, query and fragment, 100 characters."""
    return shown(re.sub(r"//[^/]*@", "//", re.split("[?#]", address, maxsplit=1)[0]))


def name_of(address: str) -> str:
    """The file of an address, below the folder that was fetched."""
    digest = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{FOLDER}/{digest[:32]}"


def write(path: Path, why: Mapping[str, str]) -> None:
    """Write an index: by address why it has no file, empty where it has one."""
    lines = (f"{name_of(each)}\t{why[each]}\t{json.dumps(each)}\n" for each in sorted(why))
    path.write_text("".join(lines), encoding="utf-8")


def find(raw: Path, address: str) -> Path | str | None:
    """The file of an address, or why there is none; ``None``: fetch downloaded no images."""
    if not (raw / INDEX).is_file():
        return None
    if (path := raw / name_of(address)).is_file():
        return path
    why = _missing(raw / INDEX, (raw / INDEX).stat().st_mtime_ns).get(name_of(address))
    return f"{label(address)}: {why or 'not in the column that data.source.image_urls names'}"


@lru_cache(maxsize=4)
def _missing(path: Path, _changed: int) -> dict[str, str]:
    with path.open(encoding="utf-8") as file:
        lines = (line.split("\t", 2) for line in file)
        return {name: why for name, why, _ in lines if why}
