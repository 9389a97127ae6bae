"""What a test split can detect, before anything is trained on the others.

Only the base's outcomes and the images of the pairs go in, so the numbers belong to the split: they
are the same for every experiment on it. Power computed from the tuned model's own result would only
repeat its p-value (Hoenig & Heisey 2001).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.evaluation.statistics import LEVEL

POWER = 0.8


@dataclass(frozen=True)
class Detectable:
    """The smallest changes that are found with a chance of ``POWER``, as fractions.

    ``win_rate``: its distance from one half. ``accuracy``: a rise above the base's accuracy.
    ``independent_pairs``: how many pairs of different images would say as much.
    """

    win_rate: float
    accuracy: float
    independent_pairs: float


def detectable(
    outcomes: ArrayLike,
    groups: Sequence[object] | NDArray[np.generic],
    *,
    level: float = LEVEL,
    power: float = POWER,
) -> Detectable:
    """What intervals at ``level`` over images tell from no change, with a chance of ``power``.

    ``outcomes``: (n,) of the base's preference accuracy (1, ½ or 0 a pair); ``groups``: (n,), the
    image of each. With D the design effect (``design_effect``), c = t(½ + level/2) + t(power) of
    Student's distribution with one degree of freedom less than images, and k = c²·D/n:

    - win rate ½ ± δ:  δ² = k·(¼ - δ²), the variance of a share that is δ away from one half.
    - accuracy p → q = p + δ:  δ² = k·(p(1-p) + q(1-q)), the variance of the paired difference if
      base and tuned went right and wrong independently. Training changes a part of the pairs only,
      so its variance is smaller, and the smallest change that is found is at most this.

    Raises ``ValueError`` for fewer than two images. Source: Lachin 1981 for sample sizes; Kish
    1965, 8.2, for the design effect; Connor 1987 for paired shares.
    """
    from scipy.special import stdtrit

    values, images = np.asarray(outcomes, dtype=np.float64), len(set(map(str, groups)))
    if images < 2:
        raise ValueError(f"groups: there must be at least two images, not {images}")
    if not 0 < level < 1 or not 0.5 <= power < 1:
        raise ValueError(f"level must be in (0, 1), power in [0.5, 1), not {level} and {power}")
    count = len(values) / design_effect(values, groups)
    quantile = float(np.sum(stdtrit(images - 1, [0.5 + level / 2, power])))
    k = quantile**2 / count
    base = float(values.mean())
    spread = base * (1 - base)
    linear = k * (1 - 2 * base)
    rise = (linear + np.sqrt(linear**2 + 8 * k * (1 + k) * spread)) / (2 * (1 + k))
    return Detectable(float(np.sqrt(k / 4 / (1 + k))), float(rise), count)


def design_effect(outcomes: ArrayLike, groups: Sequence[object] | NDArray[np.generic]) -> float:
    """By how much images that hold several pairs widen the variance of a mean; at least 1.

    Σ_g (Σ_{i in g} (x_i - m))² / Σ_i (x_i - m)²: exactly 1 where each pair has its own image. Where
    all outcomes are the same, pairs of an image are taken to agree entirely: Σ_g n_g² / n.
    """
    values = np.asarray(outcomes, dtype=np.float64)
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    apart = values - values.mean()
    total = float(np.square(apart).sum())
    if total == 0:
        apart, total = np.ones_like(values), float(len(values))
    return max(1.0, float(np.square(np.bincount(member, weights=apart)).sum()) / total)
