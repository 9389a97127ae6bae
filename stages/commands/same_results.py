"""Are two outputs the same: to the bit, within rounding, or different? By what kind of file it is.

Another processor or GPU adds in another order, so numbers move in their last digits. What may move,
and by how much, is stated here, in ``BOUNDS``.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

Verdict = Literal["same bits", "same within rounding", "different"]
SAME: Verdict = "same bits"
ROUNDING: Verdict = "same within rounding"
DIFFERENT: Verdict = "different"

# Relative and absolute, by the end of a file's name. Log-probs and margins (Parquet, nats) to 0.5%
# and 0.02; rates, curves and counts (JSON, CSV) to 1% and 0.02, so that a few pairs near a tie may
# change sides.
BOUNDS: Mapping[str, tuple[float, float]] = {
    ".parquet": (0.005, 0.02),
    ".json": (0.01, 0.02),
    ".csv": (0.01, 0.02),
}
WEIGHTS = 0.05  # ‖a - b‖ / ‖a‖ of all tensors of a safetensors file
# What is written from numbers for people. It may differ where the numbers moved within rounding
# (another pair comes first in a gallery), and must not where none moved.
SHOWN = (".html", ".md", ".png", ".svg")


def outputs(
    committed: Mapping[str, Path], made: Mapping[str, Path]
) -> dict[str, tuple[Verdict, str]]:
    """Of each output the verdict, and the first file that differs, and how. A path that does not
    exist has no content to compare: it is different.
    """
    found = {path: output(path, before, made[path]) for path, before in committed.items()}
    if any(verdict == ROUNDING for verdict, _ in found.values()):
        for path, (verdict, _) in found.items():
            if verdict == DIFFERENT and path.endswith(SHOWN):
                found[path] = (ROUNDING, "written from numbers that moved within rounding")
    return found


def output(path: str, before: Path, after: Path) -> tuple[Verdict, str]:
    for content, what in ((before, "committed"), (after, "new")):
        if not content.exists():
            return DIFFERENT, f"another hash, and no {what} content to compare"
    old, new = _files(before), _files(after)
    if only := sorted(old.keys() ^ new.keys()):
        return DIFFERENT, f"{only[0]} is {'gone' if only[0] in old else 'new'}"
    rounded = ""
    for name in sorted(old):
        if old[name].read_bytes() != new[name].read_bytes():
            named = path if name == "." else name
            if why := _difference(old[name], new[name], Path(named).suffix):
                return DIFFERENT, f"{named}: {why}"
            rounded = rounded or named
    return (ROUNDING, rounded) if rounded else (SAME, "")


def _files(root: Path) -> dict[str, Path]:
    found = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path for path in found}


def _difference(before: Path, after: Path, suffix: str) -> str:
    """What is more than rounding between two files that are not the same; empty if nothing is."""
    if suffix not in (*BOUNDS, ".safetensors"):
        return "other bytes"
    try:
        a, b = _arrays(before, suffix), _arrays(after, suffix)
    except (ValueError, OSError) as error:
        return f"can't be read ({type(error).__name__})"
    for key in [*a, *b]:
        if key not in a or key not in b or a[key].shape != b[key].shape:
            return f"{key or 'it'} is in one of them alone, or has another length"
    if suffix == ".safetensors":
        apart = sum(float(np.square(a[key] - b[key]).sum()) for key in a) ** 0.5
        share = apart / (sum(float(np.square(values).sum()) for values in a.values()) ** 0.5 or 1.0)
        return "" if share <= WEIGHTS else f"the weights are {share:.1%} apart"
    for key, x in a.items():
        if not _agree(x, b[key], *BOUNDS[suffix]):
            told = f"is {b[key][0]}, not {x[0]}" if len(x) == 1 else "has other values"
            return f"{key or 'it'} {told}"
    return ""


def _agree(a: Any, b: Any, relative: float, absolute: float) -> bool:
    """Numbers differ by at most ``absolute`` + ``relative`` times the first; the rest is equal."""
    if a.dtype.kind in "iuf" and b.dtype.kind in "iuf":
        return np.allclose(b, a, relative, absolute, equal_nan=True)
    return bool(a.equals(b))


def _arrays(path: Path, suffix: str) -> dict[str, Any]:
    """All that a file holds: tensors by name, columns by name, values of JSON by their place."""
    if suffix == ".safetensors":
        from safetensors.numpy import load_file

        return dict(load_file(path))
    if suffix == ".json":
        return {
            at: pd.Series([value]) for at, value in _leaves(json.loads(path.read_text("utf-8")))
        }
    return dict(pd.read_parquet(path) if suffix == ".parquet" else pd.read_csv(path))


def _leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested JSON by their dotted place."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{at}.{key}".lstrip("."))
    else:
        yield at, value
