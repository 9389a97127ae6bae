"""What the scores of pairs amount to: rewards, rates, intervals, tests, power, length control.

Pure functions of arrays, one number a pair. Log-probs are natural logarithms, summed over an
answer's tokens (nats) unless said otherwise. Empty, wrongly shaped and non-finite input is a
``ValueError``: a NaN compares as "not greater", and would pass for a loss.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.params.params import Evaluate

Floats = NDArray[np.float64]
Direction = Literal["higher", "lower", "unclear"]

LEVEL = 0.95
POWER = 0.8  # the chance with which a change that is called detectable is found
FEW_GROUPS = 30  # with fewer, percentile intervals are too narrow
SURE = 0.05  # a change of what is right or wrong needs a p-value below this
_CELLS = 2_000_000  # of a chunk of resamples times groups: 16 MB, which stays near the cache


@dataclass(frozen=True)
class Interval:
    """A mean over pairs in ``groups`` groups, and its interval, all in the mean's unit."""

    estimate: float
    low: float
    high: float
    groups: int


@dataclass(frozen=True)
class McNemar:
    """``gained`` pairs went up, ``lost`` down."""

    gained: int
    lost: int
    p_value: float


# rewards and margins, one number a pair


def implicit_reward(policy_logps: ArrayLike, reference_logps: ArrayLike, beta: float) -> Floats:
    """DPO's implicit reward, beta · (log π(y|x) - log π_ref(y|x)), shape (n,), nats times beta.

    The part that depends on the prompt alone cancels in every reward margin, r(chosen) -
    r(rejected), the argument of the sigmoid in DPO's loss, and is left out. Source: Rafailov et al.
    2023 (arXiv 2305.18290), equations 5 and 7.
    """
    if not (np.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a finite number above 0, not {beta}")
    policy, reference = _columns(policy_logps=policy_logps, reference_logps=reference_logps)
    return beta * (policy - reference)


def preference_margin(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    chosen_tokens: ArrayLike,
    rejected_tokens: ArrayLike,
) -> Floats:
    """log π(chosen) - log π(rejected) per token, shape (n,), of one model without a reference.

    Means per token take away most of the sum's bias to short answers.
    """
    chosen, rejected, of_chosen, of_rejected = _columns(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
    )
    if min(of_chosen.min(), of_rejected.min()) < 1:
        raise ValueError("chosen_tokens, rejected_tokens: an answer has at least one token")
    return chosen / of_chosen - rejected / of_rejected


def outcomes(margins: ArrayLike) -> Floats:
    """1 where a margin is above 0, ½ where it is exactly 0, else 0; shape (n,).

    Their mean is the win rate. An untrained model ties everywhere and has 50%.
    """
    (values,) = _columns(margins=margins)
    return 0.5 * (np.sign(values) + 1.0)


# intervals and tests


def bootstrap_intervals(
    columns: Mapping[str, ArrayLike],
    groups: Sequence[object] | NDArray[np.generic],
    how: Evaluate,
) -> dict[str, Interval]:
    """Percentile intervals of the means of several columns, from the same resamples of groups.

    ``columns``: name to (n,) numbers, one a pair; ``groups``: (n,) labels, the pair's image. G
    groups are drawn with replacement from the G there are; a resample's mean is the ratio of sums
    Σ_g c_g S_g / Σ_g c_g N_g (c_g: times drawn, S_g: the group's sum, N_g: its pairs). Pairs of one
    image share what makes it hard, so resampling pairs would give intervals that are too narrow.
    To compare two models pass the per-pair difference: what both find hard cancels.

    Raises ``ValueError`` for fewer than two groups. Source: Davison & Hinkley 1997, Bootstrap
    Methods, 3.8 and 5.3.1; Field & Welsh 2007 for clusters.
    """
    values = np.stack(_columns(**columns), axis=1)
    labels = np.asarray(groups)
    if labels.shape != (len(values),):
        raise ValueError(f"groups: shape {labels.shape}, but the columns have {len(values)} values")
    names, member = np.unique(labels, return_inverse=True)
    count = len(names)
    if count < 2:
        raise ValueError("groups: an interval needs at least two groups")

    # Means are taken about the overall mean, so that large equal values don't cancel badly.
    centre = values.mean(axis=0)
    sums = np.zeros((count, values.shape[1] + 1))
    np.add.at(sums[:, :-1], member, values - centre)
    sums[:, -1] = np.bincount(member, minlength=count)
    means = np.empty((how.resamples, values.shape[1]))
    generator = np.random.Generator(np.random.PCG64(how.seed))
    for rows in chunks(how.resamples, count):
        drawn = generator.integers(0, count, size=(len(means[rows]), count))
        drawn += np.arange(len(drawn))[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        totals = times.astype(np.float64) @ sums
        means[rows] = totals[:, :-1] / totals[:, -1:]
    low, high = np.quantile(means, tails(how), axis=0) + centre
    return {
        name: Interval(float(centre[i]), float(low[i]), float(high[i]), count)
        for i, name in enumerate(columns)
    }


def wilson_interval(successes: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a share, (low, high); ``successes`` may hold halves from ties.

    (p + z²/2n ± z·√(p(1-p)/n + z²/4n²)) / (1 + z²/n), p = successes / n. Right for independent
    pairs; where images repeat, the cautious choice of ``n`` is the number of images. Source: Wilson
    1927; Brown, Cai & DasGupta 2001 for small n.
    """
    from scipy.special import ndtri  # 0.3 s that importing this module need not cost

    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and n ≥ 1, not {successes} of {n}")
    z = float(ndtri((1 + level) / 2))
    p = successes / n
    middle = p + z * z / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The ends at 0 and n wins are exactly 0 and 1; rounding would miss them by a hair.
    low = 0.0 if successes == 0 else max(0.0, (middle - half) / scale)
    high = 1.0 if successes == n else min(1.0, (middle + half) / scale)
    return float(low), float(high)


def rate_bounds(interval: Interval, level: float = LEVEL) -> tuple[float, float]:
    """(low, high) of a share's ``interval``: the bootstrap's, or Wilson's with each group as one
    trial where the bootstrap's can't be trusted: with fewer than ``FEW_GROUPS`` groups, and at a
    rate of 0 or 1, where it has no width.
    """
    if interval.groups >= FEW_GROUPS and 0 < interval.estimate < 1:
        return interval.low, interval.high
    return wilson_interval(interval.estimate * interval.groups, interval.groups, level)


def mcnemar(before: ArrayLike, after: ArrayLike) -> McNemar:
    """Exact two-sided McNemar test that a change gains as many pairs as it loses.

    ``before`` and ``after``: (n,) outcomes (0, ½, 1) of the same pairs, taken as independent (see
    ``direction``). A pair is gained where after is above before, lost where below; under the null
    gained ~ Binomial(gained + lost, ½), the sign test where there are ties. Source: McNemar 1947;
    Conover 1999, 3.5.
    """
    from scipy.stats import binomtest

    first, second = _columns(before=before, after=after)
    if not np.isin([first, second], (0.0, 0.5, 1.0)).all():
        raise ValueError("before, after: outcomes are 0, 0.5 or 1")
    gained, lost = int((second > first).sum()), int((second < first).sum())
    moved = gained + lost
    p_value = float(binomtest(gained, moved).pvalue) if moved else 1.0
    return McNemar(gained, lost, p_value)


def direction(
    low: float | None, high: float | None, p_value: float | None = None, *, null: float = 0.0
) -> Direction:
    """The one rule for what can be said of a figure: that it is ``higher`` or ``lower`` than
    ``null``, or that it is ``unclear``, which is not equal.

    The interval from ``low`` to ``high`` must leave ``null`` out and the ``p_value`` of McNemar's
    test, if there is one, be below ``SURE``. It takes both: the interval knows that rows of one
    image belong together; the test knows that 4 lost and none gained can be chance (p = 0.125),
    where the bootstrap, which draws none of the 4 in only 2% of its resamples, leaves 0 out.
    """
    if low is None or high is None or (p_value is not None and p_value >= SURE):
        return "unclear"
    if low > null:
        return "higher"
    return "lower" if high < null else "unclear"


def widened(
    low: float, estimate: float, high: float, level: float, tests: int
) -> tuple[float, float]:
    """An interval at ``level``, wide enough that of so many at most ``SURE`` miss in any one place.

    Each side is stretched by t(1 - SURE / (2·tests)) / z(½ + level/2), never shrunk, so a skewed
    interval stays so; t is Student's of ``FEW_GROUPS`` images, with which normal tails are too
    thin (``benchmarks.coverage``). Source: Bonferroni; Dunn 1961.
    """
    from scipy.special import ndtri, stdtrit

    quantile = float(stdtrit(FEW_GROUPS - 1, 1 - SURE / (2 * tests)))
    stretch = max(1.0, quantile / float(ndtri((1 + level) / 2)))
    return estimate - stretch * (estimate - low), estimate + stretch * (high - estimate)


# what a test split can detect


def detectable(
    outcomes: ArrayLike,
    groups: Sequence[object] | NDArray[np.generic],
    *,
    level: float = LEVEL,
) -> tuple[float, float]:
    """The smallest distance of the win rate from one half that intervals at ``level`` over images
    tell from no change with a chance of ``POWER``; and how many pairs of different images would say
    as much.

    Only the base's outcomes (1, ½ or 0 a pair) and the images of the pairs go in: power computed
    from the tuned model's own result would only repeat its p-value (Hoenig & Heisey 2001). With D
    the ``design_effect``, c = t(½ + level/2) + t(POWER) of Student's distribution with one degree
    of freedom less than images, and k = c²·D/n, δ² = k·(¼ - δ²): the variance of a share that is δ
    away from one half.

    Raises ``ValueError`` for fewer than two images. Source: Lachin 1981 for sample sizes; Kish
    1965, 8.2, for the design effect.
    """
    from scipy.special import stdtrit

    values, images = np.asarray(outcomes, dtype=np.float64), len(set(map(str, groups)))
    if images < 2:
        raise ValueError(f"groups: there must be at least two images, not {images}")
    count = len(values) / design_effect(values, groups)
    quantile = float(np.sum(stdtrit(images - 1, [0.5 + level / 2, POWER])))
    k = quantile**2 / count
    return float(np.sqrt(k / 4 / (1 + k))), count


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


# what length explains


def without_length(margins: ArrayLike, length_differences: ArrayLike) -> Floats:
    """The margins, shape (n,), less what the length difference d (chosen - rejected) explains:
    margin - slope · d of the least squares margin = intercept + slope · d.
    """
    values, lengths = _columns(margins=margins, length_differences=length_differences)
    spread = lengths - lengths.mean()
    slope = float(spread @ values / (spread @ spread)) if np.ptp(lengths) else 0.0
    residual = values - slope * lengths
    residual[np.abs(residual) <= 1e-9 * np.abs(values).max()] = 0.0  # rounding is not a preference
    return residual


def chunks(resamples: int, groups: int) -> Iterator[slice]:
    """Slices of the resamples, of at most ``_CELLS`` numbers for that many groups."""
    step = max(1, _CELLS // groups)
    for start in range(0, resamples, step):
        yield slice(start, start + step)


def tails(how: Evaluate) -> list[float]:
    """The quantiles that an interval runs from and to."""
    return [(1 - how.confidence) / 2, (1 + how.confidence) / 2]


def _columns(**columns: ArrayLike) -> list[Floats]:
    """Each as float64 of one common shape (n,), n ≥ 1, all finite; else a ``ValueError``."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    n = len(next(iter(arrays.values())))
    for name, array in arrays.items():
        if array.shape != (n,) or n == 0:
            raise ValueError(f"{name}: of shape ({n or 'n ≥ 1'},), not {array.shape}")
        if not np.isfinite(array).all():
            at = int(np.argmin(np.isfinite(array)))
            raise ValueError(f"{name}: value {at} is {array[at]}")
    return list(arrays.values())
