"""What the metrics say, in words, by rules that the page prints too (``page.html``).

Metrics are those of ``results/metrics.json``; any of them may be missing.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from ruamel.yaml import YAML

from stages.evaluation import catalogue, paired, statistics
from stages.evaluation.catalogue import ACCURACY, METRICS, is_known, shown, with_interval
from stages.evaluation.statistics import FEW_GROUPS as FEW_IMAGES
from stages.evaluation.statistics import LEVEL
from stages.reporting.markup import rows_of

Verdict = Literal["better", "worse", "unclear"]

_WORDS = YAML(typ="safe", pure=True).load(Path(__file__).with_suffix(".yaml"))

# The rules' numbers.
HIGH_BASE = 0.9  # base_accuracy from which there was little to learn
SHORTCUT = 0.6  # share of pairs that a judge without the image may tell apart
MORE_UNFINISHED = 0.05  # rise of the share of answers that hit max_new_tokens
MOST = 0.5  # of the win rate's lead over one half; of the pairs
IMAGES = {"blank": "a blank image", "shuffled": "another pair's image"}


# one figure


def verdict(values: Mapping[str, Any], key: str) -> Verdict:
    """What the interval of one metric says alone, as of the win rate, which the page is about."""
    if (one := _member(values, key, key, "")) is None:
        return "unclear"
    return _judged(statistics.direction(one.low, one.high, null=one.null), one.better)


def _judged(found: statistics.Direction, better: catalogue.Better | None) -> Verdict:
    if found == "unclear" or better is None:
        return "unclear"
    return "better" if found == better else "worse"


# the family of figures that may warn


@dataclass(frozen=True)
class Member:
    """A figure that may warn, with its interval; ``least`` is how far from ``null`` it must be."""

    name: str
    better: catalogue.Better
    low: float
    value: float
    high: float
    p_value: float | None
    warning: str
    null: float = 0
    least: float = 0


def family(values: Mapping[str, Any], slices: pd.DataFrame | None = None) -> list[Member]:
    """All that may get worse and has an interval."""
    found = [
        _member(values, key, key, warning.format(with_interval(values, key)))
        for key, warning in _WORDS["warnings"].items()
    ]
    for row in rows_of(slices):
        told = (
            f"In the slice {row['by']} = {row['slice']} training raised rejected over chosen: win "
            f"rate {with_interval(row, 'win_rate')} of {row['pairs']} pairs."
        )
        found.append(_member(row, "win_rate", f"{row['by']}: {row['slice']}", told))
    for task in paired.read_tasks(values):
        change = task.change
        if task.better and change.low is not None and change.high is not None:
            ends = change.low, change.difference, change.high
            figure = catalogue.FIGURE.difference.with_interval(change.difference, *ends[::2])
            told = f"{task.task} got worse: {task.metric} {figure}."
            name = f"{task.task}/{task.metric}"
            found.append(Member(name, task.better, *ends, change.p_value, told))
    return [member for member in found if member]


def _member(values: Mapping[str, Any], key: str, name: str, warning: str) -> Member | None:
    """A metric of the catalogue; of a control, which has no better way, lower is better."""
    metric = METRICS[key]
    low, value, high = (values.get(each) for each in (f"{key}_low", key, f"{key}_high"))
    if not (is_known(low) and is_known(value) and is_known(high)):
        return None
    return Member(
        name=name,
        better=metric.better or "lower",
        low=low,
        value=value,
        high=high,
        p_value=values.get(metric.p_value),
        warning=warning,
        null=metric.null,
        least=MORE_UNFINISHED if key == catalogue.UNFINISHED.change else 0,
    )


def judged(members: Iterable[Member], confidence: float = LEVEL) -> dict[str, Verdict]:
    """What can be said of each member of a family, by name, with one correction for all."""
    known = list(members)
    found = {}
    for one in known:
        ends = statistics.widened(one.low, one.value, one.high, confidence, len(known))
        p_value = None if one.p_value is None else one.p_value * len(known)
        way = statistics.direction(*ends, p_value, null=one.null)
        enough = abs(one.value - one.null) > one.least
        found[one.name] = _judged(way, one.better) if enough else "unclear"
    return found


# the page's first sentences


def title(values: Mapping[str, Any]) -> str:
    """The bold sentence: what training did, in view of the controls and the shortcuts."""
    found = verdict(values, "win_rate")
    if found == "worse":
        return "Training raised rejected over chosen."
    if found == "unclear":
        return "No clear change of preference."
    named = [name for name, _ in _shortcuts(values) if name]
    also = f", and {named[0]} tells most pairs apart" if named else ""
    return f"Training raised chosen over rejected, {_looks(values)}{also}."


def _looks(values: Mapping[str, Any]) -> str:
    """Whether the image was needed, by the controls."""
    without = [rate for way in IMAGES if is_known(rate := values.get(f"win_rate_{way}"))]
    if not without:
        return "but no control says whether it looks at the image"
    if max(without) - 0.5 > MOST * (values["win_rate"] - 0.5):
        return "but mostly without looking at the image"
    over = [f"win_rate_over_{way}" for way in IMAGES if f"win_rate_over_{way}" in values]
    if any(verdict(values, key) != "better" for key in over):
        return "but nothing shows that it looks at the image"
    low = (values.get(f"win_rate_{way}_low") for way in IMAGES)
    if any(is_known(end) and end > 0.5 for end in low):
        return "in part without looking at the image"
    return "and it looks at the image"


def _shortcuts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What tells more than ``SHORTCUT`` of the pairs apart without the image: its name in the
    title, if it has one there, and its note."""
    longer = values.get("longer_wins")
    if is_known(longer) and max(longer, 1 - longer) > SHORTCUT:
        which = "longer" if longer > 0.5 else "shorter"
        yield (
            "length alone",
            f"Length gives chosen away: always preferring the {which} answer is right in "
            f"{shown('longer_wins', max(longer, 1 - longer))} of the pairs. Part of the wins may "
            "be length.",
        )
    for key, (name, judge) in _WORDS["judges"].items():
        if is_known(share := values.get(key)) and share > SHORTCUT:
            yield (
                name,
                f"A shortcut: {judge} is right in {with_interval(values, key)} of the pairs. Part "
                "of the wins may need no image.",
            )


# warnings and notes


def concerns(
    values: Mapping[str, Any], slices: pd.DataFrame | None = None, confidence: float = LEVEL
) -> list[tuple[Literal["warning", "note"], str]]:
    """What a reader should know before quoting the headline: warnings, then notes, by the page's
    rules; the intervals are at ``confidence``."""
    members = family(values, slices)
    told = judged(members, confidence)
    warnings = [one.warning for one in members if told[one.name] == "worse"]
    warnings += _image_warnings(values, told)
    return [
        *(("warning", text) for text in warnings),
        *(("note", text) for text in _notes(values, told)),
    ]


def _image_warnings(values: Mapping[str, Any], told: Mapping[str, Verdict]) -> Iterable[str]:
    for way, image in IMAGES.items():
        over = f"win_rate_over_{way}"
        if (
            told.get(f"win_rate_{way}") != "worse"
            and verdict(values, "win_rate") == "better"
            and is_known(values.get(over))
            and verdict(values, over) != "better"
        ):
            yield (
                "Nothing shows that the preference depends on the image: the win rate is not "
                f"clearly higher than with {image} ({with_interval(values, over)})."
            )


def _notes(values: Mapping[str, Any], told: Mapping[str, Verdict]) -> Iterable[str]:
    base, chosen = values.get(ACCURACY.base), values.get("chosen_logps_change")
    if is_known(base) and base >= HIGH_BASE:
        yield (
            f"The base already ordered {with_interval(values, ACCURACY.base)} of the pairs "
            "rightly: there was little to learn."
        )
    if is_known(chosen) and chosen < 0 and told.get("chosen_logps_change") != "worse":
        yield (
            "Chosen answers lost probability, not clearly: "
            f"{with_interval(values, 'chosen_logps_change')} nats on average."
        )
    yield from (note for _, note in _shortcuts(values))
    seen, pairs = values.get("seen_text_pairs", 0), values.get("pairs", 0)
    if pairs and seen > MOST * pairs:
        yield (
            f"Images are held out, texts are not: {seen:,} of the {pairs:,} test pairs have "
            "question, chosen and rejected word for word in a training pair. The slice of new "
            "texts shows the others."
        )
    rare = values.get("off_policy_chosen")
    if is_known(rare) and rare > MOST:
        yield (
            f"The answers are another model's: in {shown('off_policy_chosen', rare)} of the pairs "
            "the base finds chosen less likely per token than 99% of its own answers, by "
            f"{shown('off_policy_distance', values['off_policy_distance'])} nats at the median. "
            "DPO gained more on pairs nearer to a base's own answers (arXiv 2501.09695)."
        )
    if number := values.get("contradictory_pairs"):
        yield (
            f"The data contradicts itself: {number:,} pairs have the same image and question as "
            "another, with the answers swapped."
        )
    if number := values.get("near_duplicate_images"):
        yield (
            f"Images of test pairs that look the same as one of another split: {number:,}. Their "
            "pairs are not entirely held out."
        )
    detectable = values.get("win_rate_detectable")
    if verdict(values, "win_rate") == "unclear" and is_known(detectable):
        yield (
            "No clear change is not no change: this test split shows a win rate that differs from "
            f"50% by {100 * detectable:.1f} points in four of five cases, and smaller ones less "
            "often."
        )
    images = values.get("images")
    if is_known(images) and images < FEW_IMAGES:
        yield f"Few test images ({images:,}): read every figure with great care."
    if values.get("ties"):
        yield f"{values['ties']:,} pairs are tied (margin exactly 0) and count as half a win."
