"""What preprocess counts: by label, and whether anything is left to train and test on."""

import re
from collections.abc import Mapping
from typing import Any

from stages.core.errors import UserError

_MOST_LABELS = 50  # origins or kinds counted one by one in the report


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


def check(counts: Mapping[str, Any], fractions: Mapping[str, float]) -> None:
    """Refuse to go on with nothing, or with a split that was asked for and is empty.

    Raises:
        UserError: says which, with the reasons and the fix.
    """
    if not counts["rows_kept"]:
        reasons = [f"{number} {reason}" for reason, number in counts["left_out"].items() if number]
        raise UserError(
            f"none of the {counts['rows_in']} rows could be used "
            f"({', '.join(reasons) or 'the source is empty'}); "
            "check data.source, data.columns and the image limits in preprocess"
        )
    for name, number in counts["pairs_by_split"].items():
        fraction = fractions.get(name)
        if number or fraction == 0:
            continue
        fix = f"raise preprocess.{name}" if fraction else "lower preprocess.validation or .test"
        raise UserError(
            f"no pair fell into the {name} split: {counts['unique_images']} distinct images are "
            f"too few for validation {fractions['validation']:g} and test {fractions['test']:g}; "
            f"{fix}, or add images"
        )
