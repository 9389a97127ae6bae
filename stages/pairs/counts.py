"""What preprocess counts: by label, and whether anything is left to train and test on."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages.core.errors import UserError
from stages.core.text import shown
from stages.pairs.split import split_of

_MOST_LABELS = 50  # origins or kinds counted one by one in the report
# Rows whose pair is there all the same, or was kept for the evaluation.
_NOT_LOST = {"exact_duplicate", "image_in_held_out_questions"}
# What most likely helps where a reason is the most frequent one.
_FIX = "data/pairs would hold too little; check data.source and data.columns"
_FIXES = {
    "missing_field": "check data.columns, and the images' names",
    "empty_answer": "check data.columns",
    "identical_answers": "check data.columns",
    "text_only": "preprocess.wanted.text_only: true takes pairs without an image",
    "too_many_images": "raise preprocess.wanted.images",
    "too_many_turns": "raise preprocess.wanted.turns",
    "system_prompt": "preprocess.wanted.system_prompt: true takes them",
    "undecodable_image": "convert the images to PNG or JPEG",
    "image_too_large": "raise preprocess.max_input_pixels",
    "image_too_slow": "write the images again as PNG or as JPEG with fewer scans",
    "image_too_small": "lower preprocess.min_side",
}


def by_label(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by a label from the data, under names that are safe as parts of a metric's name.

    DVC joins names by dots, so "coco/v1.0" becomes "coco_v1_0"; where two labels would meet, the
    later one gets a number. No label is "none"; "other" sums up all but the 50 most frequent.
    """
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named: dict[str, int] = {}
    for label, number in sorted(ranked[:_MOST_LABELS]):
        name = base = re.sub(r"[^\w-]+", "_", label).strip("_")[:80] or "none"
        suffix = 2
        while name in named:
            name, suffix = f"{base}_{suffix}", suffix + 1
        named[name] = number
    if rest := sum(number for _, number in ranked[_MOST_LABELS:]):
        named["other"] = named.get("other", 0) + rest
    return named


def check(counts: Mapping[str, Any], folder: Path, chosen: Any) -> None:
    """Refuse to go on with nothing, with too little, or with a split that is empty.

    Args:
        folder: where the tables were written.
        chosen: the section ``preprocess`` of the parameters.

    Raises:
        UserError: says which, with the counts, the first row left out, and the fix.
    """
    lost = sum(n for reason, n in counts["left_out"].items() if reason not in _NOT_LOST)
    if not counts["rows_in"]:
        raise UserError("the source is empty: it has files, but no row; check data.source")
    if not counts["rows_kept"] or lost > chosen.max_dropped * counts["rows_in"]:
        raise UserError(_too_many(counts, lost, chosen.max_dropped, folder))
    empty = [name for name, number in counts["pairs_by_split"].items() if not number]
    if not chosen.validation and "validation" in empty:
        empty.remove("validation")
    if empty:
        pairs = pq.read_table(folder / "pairs.parquet", columns=["group"])
        groups = list(dict.fromkeys(pairs["group"].to_pylist()))
        change = _smallest_change(groups, chosen.split_key, chosen.validation, chosen.test)
        raise UserError(
            f"no pair fell into the {' and the '.join(empty)} split: the split goes by image, and "
            f"there are {len(groups)} to share out (validation {chosen.validation:g}, test "
            f"{chosen.test:g}); {change}"
        )


def _too_many(counts: Mapping[str, Any], lost: int, max_dropped: float, folder: Path) -> str:
    found = {reason: n for reason, n in counts["left_out"].items() if n}
    reasons = ", ".join(f"{n} {reason}" for reason, n in found.items())
    rows = pq.read_table(folder / "left_out.parquet").to_pylist()
    first = next(row for row in rows if row["reason"] not in _NOT_LOST or not counts["rows_kept"])
    most = max(found, key=lambda reason: found[reason])
    if counts["rows_kept"]:
        text = f"{lost} of the {counts['rows_in']} rows can't be used ({reasons}), more than "
        text += f"preprocess.max_dropped ({max_dropped:g}) allows"
    else:
        text = f"none of the {counts['rows_in']} rows could be used ({reasons})"
    detail = shown(first["detail"], 300)
    return f"{text}; the first, {shown(first['where'])}: {detail}; {_FIXES.get(most, _FIX)}"


def _smallest_change(groups: list[str], key: str, validation: float, test: float) -> str:
    """What to set so that no split is empty: the nearest shares, or else another key."""
    wanted = {"train", "test"} | ({"validation"} if validation else set())
    if len(groups) < len(wanted):
        more = f"add images: {len(wanted)} are the fewest that make {len(wanted)} splits"
        return more + (", or 2 with preprocess.validation: 0" if validation else "")
    groups = groups[:1000]
    steps = [step / 20 for step in range(1, 19)]
    shares = [(v, t) for v in (steps if validation else [0.0]) for t in steps if v + t < 0.99]
    shares.sort(key=lambda pair: abs(pair[0] - validation) + abs(pair[1] - test))
    for name in (key, *(f"{key[:60]}-{number}" for number in range(2, 50))):
        for v, t in [(validation, test), *shares]:
            if {split_of(group, key=name, validation=v, test=t) for group in groups} >= wanted:
                change = [f"preprocess.split_key: {name}"] if name != key else []
                if (v, t) != (validation, test):
                    change += [f"preprocess.validation: {v:g}", f"preprocess.test: {t:g}"]
                return f"set {' and '.join(change)}, or add images"
    return "add images"
