"""What files' names say: which hold rows, and of which split. Imported before pyarrow is needed."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

_TEXT = (".jsonl", ".json", ".csv", ".tsv")
# All that ``stages.pairs.formats`` reads; text may be packed.
SUFFIXES = (
    *(".parquet", ".arrow", ".tar"),
    *(f"{suffix}{packed}" for suffix in _TEXT for packed in ("", ".gz", ".zst")),
)
# Written beside the data by the tools that write it; they hold no rows.
NOT_DATA = frozenset(
    {"SOURCE.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
# Words that say a split, as the datasets library reads names.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def is_hidden(name: str) -> bool:
    """Whether it, or a folder above it, is one that a system keeps for itself."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def ending(name: str) -> str:
    """``.json.gz`` of ``data/Rows.JSON.gz``, or the empty string if no rows are read from it."""
    lower = name.lower()
    return max((suffix for suffix in SUFFIXES if lower.endswith(suffix)), key=len, default="")


def tables(names: Iterable[str]) -> list[str]:
    """Those of the names that hold rows; a tar only if nothing else does: it may be of images."""
    found = [name for name in names if ending(name)]
    return [name for name in found if ending(name) != ".tar"] or found


def published_split(name: str) -> str:
    """The split that a name says, its last word of several; empty if none does."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), "")
