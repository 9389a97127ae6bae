"""Are two outputs the same: to the bit, within rounding, or different? By what kind of file it is.

Another processor or GPU adds in another order, so numbers move in their last digits. What may move,
and by how much, is stated here, in ``BOUNDS``.
"""

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

Verdict = Literal["same bits", "same within rounding", "different"]
SAME: Verdict = "same bits"
ROUNDING: Verdict = "same within rounding"
DIFFERENT: Verdict = "different"


@dataclass(frozen=True)
class Bound:
    """Two numbers agree if they differ by at most ``absolute`` + ``relative`` times the first."""

    relative: float
    absolute: float

    def holds(self, one: Any, other: Any) -> bool:
        a, b = np.asarray(other, dtype=float), np.asarray(one, dtype=float)
        return np.allclose(a, b, self.relative, self.absolute, equal_nan=True)


# By the end of a file's name. Log-probs and margins (Parquet, nats) to 0.5% and 0.02; rates, curves
# and counts (JSON, CSV) to 1% and 0.02, so that a few pairs near a tie may change sides.
BOUNDS: Mapping[str, Bound] = {
    ".parquet": Bound(0.005, 0.02),
    ".json": Bound(0.01, 0.02),
    ".csv": Bound(0.01, 0.02),
}
WEIGHTS = 0.05  # ‖a - b‖ / ‖a‖ of all tensors of a safetensors file
# What is written from numbers for people. It may differ where the numbers moved within rounding
# (another pair comes first in a gallery), and must not where none moved.
SHOWN = (".html", ".md", ".png", ".svg")


@dataclass(frozen=True)
class Compared:
    """One output. ``why`` names the first file that differs, and how."""

    path: str
    verdict: Verdict
    why: str = ""


def outputs(committed: Mapping[str, Path], made: Mapping[str, Path]) -> list[Compared]:
    """Each output's committed content against what was made now. A path that does not exist has no
    content to compare: it is different.
    """
    found = [one(path, before, made[path]) for path, before in committed.items()]
    moved = any(each.verdict == ROUNDING for each in found)
    if moved:
        found = [
            Compared(each.path, ROUNDING, "written from numbers that moved within rounding")
            if each.verdict == DIFFERENT and each.path.endswith(SHOWN)
            else each
            for each in found
        ]
    return found


def one(path: str, before: Path, after: Path) -> Compared:
    for content, what in ((before, "committed"), (after, "new")):
        if not content.exists():
            return Compared(path, DIFFERENT, f"another hash, and no {what} content to compare")
    files = [{p.relative_to(root).as_posix(): p for p in _files(root)} for root in (before, after)]
    only = sorted(files[0].keys() ^ files[1].keys())
    if only:
        side = "no longer made" if only[0] in files[0] else "new"
        return Compared(path, DIFFERENT, f"{only[0] or path} is {side}")
    rounded = ""
    for name in sorted(files[0]):
        a, b = files[0][name], files[1][name]
        if a.read_bytes() == b.read_bytes():
            continue
        named = name if name != "." else path
        if reason := _difference(named, a, b):
            return Compared(path, DIFFERENT, f"{named}: {reason}")
        rounded = rounded or named
    return Compared(path, ROUNDING, rounded) if rounded else Compared(path, SAME)


def _files(root: Path) -> Iterator[Path]:
    yield from [root] if root.is_file() else (p for p in sorted(root.rglob("*")) if p.is_file())


def _difference(name: str, a: Path, b: Path) -> str:
    """What is more than rounding between two files that are not the same; empty if nothing is."""
    suffix = Path(name).suffix
    try:
        if suffix == ".safetensors":
            return _of_weights(a, b)
        if suffix == ".parquet":
            return _of_tables(pd.read_parquet(a), pd.read_parquet(b), BOUNDS[suffix])
        if suffix == ".json":
            one, other = (json.loads(path.read_text("utf-8")) for path in (a, b))
            return _of_values(one, other, BOUNDS[suffix])
        if suffix == ".csv":
            return _of_values(_cells(a), _cells(b), BOUNDS[suffix])
    except (ValueError, OSError) as error:
        return f"can't be read ({type(error).__name__})"
    return "other bytes"


def _of_weights(a: Path, b: Path) -> str:
    from safetensors.numpy import load_file

    one, other = load_file(a), load_file(b)
    if one.keys() != other.keys():
        return "other tensors"
    apart = math.sqrt(sum(float(np.square(one[k] - other[k]).sum()) for k in one))
    size = math.sqrt(sum(float(np.square(one[k]).sum()) for k in one)) or 1.0
    return "" if apart / size <= WEIGHTS else f"the weights are {100 * apart / size:.1f}% apart"


def _of_tables(a: pd.DataFrame, b: pd.DataFrame, bound: Bound) -> str:
    if list(a.columns) != list(b.columns) or len(a) != len(b):
        return "other columns or another number of rows"
    for column in a:
        one, other = a[column], b[column]
        if pd.api.types.is_float_dtype(one) and pd.api.types.is_float_dtype(other):
            if not bound.holds(one, other):
                return f"{column} differs by up to {(one - other).abs().max():.3g}"
        elif one.astype(str).tolist() != other.astype(str).tolist():
            return f"{column} has other values"
    return ""


def _of_values(a: Any, b: Any, bound: Bound, at: str = "") -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{at or 'it'} has other keys"
        pairs = [(f"{at}.{key}".lstrip("."), a[key], b[key]) for key in a]
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{at or 'it'} has {len(b)} entries, not {len(a)}"
        pairs = [(f"{at}[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    elif _is_number(a) and _is_number(b):
        return "" if bound.holds(a, b) else f"{at or 'it'} is {b}, not {a}"
    else:
        return "" if a == b else f"{at or 'it'} is {str(b)[:60]}, not {str(a)[:60]}"
    return next((found for at, x, y in pairs if (found := _of_values(x, y, bound, at))), "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cells(path: Path) -> list[Any]:
    """Cells one after the other, numbers as such, with the ends of rows between them."""
    with path.open(encoding="utf-8", newline="") as file:
        return [cell for row in csv.reader(file) for cell in [*map(_number, row), "\n"]]


def _number(cell: str) -> Any:
    return float(cell) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", cell) else cell
