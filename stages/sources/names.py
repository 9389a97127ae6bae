"""What a file's name says of it, and which files may be fetched. Nothing is loaded to find out."""

import fnmatch
import posixpath
from collections.abc import Sequence

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
# Formats that can run code when loaded.
PICKLES = frozenset(
    {".bin", ".ckpt", ".dill", ".h5", ".joblib", ".keras"}
    | {".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
)
CODE = frozenset(
    {".bat", ".dll", ".dylib", ".exe", ".jar", ".ps1", ".py", ".pyc", ".pyd", ".sh", ".so"}
)


def suffix(name: str) -> str:
    """``.json`` of ``data/Rows.JSON``."""
    return posixpath.splitext(name)[1].lower()


def is_weights(name: str) -> bool:
    """Whether a model's weights may be in it."""
    return suffix(name) in PICKLES | {".safetensors"}


def matches(name: str, patterns: Sequence[str]) -> bool:
    """As huggingface_hub's ``allow_patterns``: "*" also crosses "/", "folder/" is all of it."""
    return any(fnmatch.fnmatchcase(name, f"{p}*" if p.endswith("/") else p) for p in patterns)


def is_permitted(name: str, *, allow_pickle: bool, allow_code: bool) -> bool:
    """Whether it may be fetched: not what can run code when loaded, unless that is trusted."""
    return (allow_pickle or suffix(name) not in PICKLES) and (
        allow_code or suffix(name) not in CODE
    )
