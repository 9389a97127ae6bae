"""What preprocess counts: by label, and whether anything is left to train and test on."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages.core.errors import UserError
from stages.core.text import shown
from stages.pairs.refusals import REASONS

_MOST_LABELS = 50  # origins or kinds counted one by one in the report
# Rows whose pair is there nevertheless, or was kept for the evaluation.
_NOT_LOST = {"exact_duplicate", "image_in_held_out_questions"}


def by_label(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by a label from the data, under names that are safe as parts of a metric's name.

    DVC joins names by dots, so "coco/v1.0" becomes "coco_v1_0", with which "coco/v1_0" is counted.
    No label is "none"; "other" sums up all but the 50 most frequent.
    """
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named: Counter[str] = Counter()
    for place, (label, number) in enumerate(ranked):
        name = re.sub(r"[^\w-]+", "_", label).strip("_")[:80] or "none"
        named[name if place < _MOST_LABELS else "other"] += number
    return dict(sorted(named.items()))


def check(counts: Mapping[str, Any], folder: Path, chosen: Any) -> None:
    """Refuse to go on with nothing, with too little, or with a split that is empty.

    Args:
        folder: where the tables were written.
        chosen: the section ``preprocess`` of the parameters.

    Raises:
        UserError: says which, with the counts, the first row left out, and what helps.
    """
    rows, kept = counts["rows_in"], counts["rows_kept"]
    found = {reason: number for reason, number in counts["left_out"].items() if number}
    lost = {reason: number for reason, number in found.items() if reason not in _NOT_LOST}
    if not rows:
        raise UserError("the source is empty: it has files, but no row; check data.sources")
    if not kept or sum(lost.values()) > chosen.max_dropped * rows:
        reasons = ", ".join(f"{number} {reason}" for reason, number in found.items())
        left_out = pq.read_table(folder / "left_out.parquet").to_pylist()
        first = next(row for row in left_out if row["reason"] in lost or not kept)
        what = (
            f"{sum(lost.values())} of the {rows} rows can't be used ({reasons}), more than "
            f"preprocess.max_dropped ({chosen.max_dropped:g}) allows"
            if kept
            else f"none of the {rows} rows could be used ({reasons})"
        )
        most = max(found, key=lambda reason: found[reason])
        raise UserError(
            f"{what}; the first, {shown(first['where'])}: {shown(first['detail'], 300)}; "
            f"{most}: {REASONS[most]}"
        )
    wanted = ["train", "test", *(["validation"] if chosen.validation else [])]
    if empty := [name for name in wanted if not counts["pairs_by_split"][name]]:
        raise UserError(
            f"no pair fell into the {' and the '.join(empty)} split: the split goes by image, and "
            f"there are {counts['unique_images']}; add images, change preprocess.validation or "
            "preprocess.test, or draw another split by another preprocess.split_key"
        )
