"""The win rate of parts of the test pairs: by origin, question type, text, tokens, length
and what both answers have in common."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from stages.evaluation import metrics, statistics
from stages.evaluation.catalogue import ENOUGH_IMAGES
from stages.params.params import Evaluate

BINS = 4  # of a number, each with about equally many pairs
TOO_FEW = "too few pairs"
_RATE = ("win_rate", "win_rate_low", "win_rate_high")
_ACCURACIES = {"base_accuracy": "base_margin", "tuned_accuracy": "tuned_margin"}


def table(scores: pd.DataFrame, settings: Evaluate) -> pd.DataFrame:
    """One row a slice: ``by``, ``slice``, both as ``label``, ``pairs``, ``images``, ``win_rate``
    with its interval (``_low``, ``_high``), ``base_accuracy``, ``tuned_accuracy``, ``note``.

    A slice of fewer than ``ENOUGH_IMAGES`` images has no figures and says so in ``note``.
    """
    rows = []
    for by, name, part in _parts(scores):
        images = part["group"].nunique()
        row: dict[str, Any] = {"by": by, "slice": name, "label": f"{by}: {name}"}
        row |= {"pairs": len(part), "images": images}
        row |= dict.fromkeys((*_RATE, *_ACCURACIES)) | {"note": TOO_FEW}
        if images >= ENOUGH_IMAGES:
            figures = metrics.with_intervals(
                {"win_rate": statistics.outcomes(part["reward_margin"])}, part["group"], settings
            )
            for key, margin in _ACCURACIES.items():
                figures[key] = float(statistics.outcomes(part[margin]).mean())
            row |= {key: float(f"{value:.6g}") for key, value in figures.items()} | {"note": ""}
        rows.append(row)
    return pd.DataFrame(rows)


def _parts(scores: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    for column, by in (("origin", "origin"), ("kind", "question type"), ("text", "text")):
        for name, part in scores.groupby(column, sort=True):
            computed = str(name).startswith(("=", "+", "-", "@"))  # by a spreadsheet
            yield by, f"'{name}" if computed else str(name), part
    lengths = scores[["chosen_tokens", "rejected_tokens"]].sum(axis=1) / 2
    for by, values in (
        ("image tokens", scores["image_tokens"]),
        ("answer length", lengths),
        ("length difference", scores["chosen_tokens"] - scores["rejected_tokens"]),
        ("words in common", scores["in_common"]),
    ):
        for name, chosen in bins(values.to_numpy(dtype=float)):
            yield by, name, scores[chosen]


def bins(values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Name and mask of shape (n,) of at most ``BINS`` bins of about equally many values.

    Equal values share a bin. Named by the smallest and largest value inside: ``9 to 11``, or
    ``9`` where they are equal.
    """
    edges = np.unique(np.quantile(values, np.arange(1, BINS) / BINS, method="lower"))
    place = np.searchsorted(edges, values, side="left")
    for i in np.unique(place):
        inside = place == i
        low, high = values[inside].min(), values[inside].max()
        yield (f"{low:g}" if low == high else f"{low:g} to {high:g}"), inside
