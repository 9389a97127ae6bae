"""What the metrics say: in numbers as text, in words, and in tables.

The words follow from the numbers by the rules of ``verdict`` and ``concerns``, which the report
prints too. Metrics are those of ``reports/metrics.json``; any of them may be missing.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import pandas as pd

from stages.evaluation.metrics import MEANING
from stages.evaluation.statistics import FEW_GROUPS as FEW_IMAGES

# The rules' numbers.
HIGH_BASE = 0.9  # base_accuracy from which there was little to learn
LENGTH_GIVEAWAY = 0.15  # distance of longer_wins from one half
MORE_UNFINISHED = 0.05  # rise of the share of answers that hit max_new_tokens
SURE = 0.05  # a change of what is right or wrong needs a p-value below this as well
LOWER_IS_BETTER = ("repetition", "unfinished")  # of the project's own shares

# numbers as text

_SHARES = (
    *("win_rate", "accuracy", "correct", "longer_wins", "length_explained"),
    *("repetition", "unfinished", "same_answers"),
)
_LM_EVAL_SHARES = ("acc", "exact_match", "f1", "precision", "recall", "ratio", "unclear")
DASH = "\N{EN DASH}"
NO_BREAK = "\N{NO-BREAK SPACE}"


def is_known(value: Any) -> TypeGuard[float]:
    """Whether a metric is there: a number that is neither NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)


def is_share(key: str) -> bool:
    """Whether a metric lies between 0 and 1 (or, for a difference, between -1 and 1)."""
    if "p_value" in key:
        return False
    if key.startswith("lm_eval/"):
        return any(name in key.split("/")[2] for name in _LM_EVAL_SHARES)
    return any(name in key for name in _SHARES)


def is_difference(key: str) -> bool:
    return "change" in key or "win_rate_over_" in key


def shown(key: str, value: Any) -> str:
    """A metric as text, by its name: 98.4%, +25.9 points, 1,000, +0.46."""
    if not is_known(value):
        return DASH
    if isinstance(value, int):
        return f"{value:,}"
    if "p_value" in key:
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
    if is_share(key):
        return f"{signed(100 * value, 1)} points" if is_difference(key) else percent(value)
    return signed(value, 2) if is_difference(key) or "margin" in key else number(value)


def interval(values: Mapping[str, Any], key: str) -> str:
    """``[97.4, 99.2]``, in the unit of the metric; empty where it has none."""
    low, high = values.get(f"{key}_low"), values.get(f"{key}_high")
    if not (is_known(low) and is_known(high)):
        return ""
    factor, digits = (100, 1) if is_share(key) else (1, 2)
    ends = [minus(f"{factor * end:.{digits}f}") for end in (low, high)]
    return f"[{ends[0]},{NO_BREAK}{ends[1]}]"


def with_interval(values: Mapping[str, Any], key: str) -> str:
    return f"{shown(key, values.get(key))} {interval(values, key)}".strip()


def percent(value: Any, digits: int = 1) -> str:
    return f"{minus(f'{100 * value:.{digits}f}')}%" if is_known(value) else DASH


def number(value: Any, digits: int = 2) -> str:
    return minus(f"{value:,.{digits}f}") if is_known(value) else DASH


def signed(value: float, digits: int) -> str:
    text = f"{value:+,.{digits}f}"
    return minus(text) if float(text.replace(",", "")) else text[1:]


def minus(text: str) -> str:
    """With a real minus sign, and no minus before a rounded zero."""
    return text.replace("-", "\N{MINUS SIGN}" if text.strip("-0.,") else "")


# words from numbers

TITLES = {
    "better": "Training raised chosen over rejected.",
    "worse": "Training raised rejected over chosen.",
    "unclear": "No clear change of preference.",
}


def verdict(values: Mapping[str, Any], key: str, null: float = 0.0) -> str:
    """``better`` if the metric's whole interval is above ``null``, ``worse`` if all of it is
    below; ``unclear`` otherwise, and where there is no interval. Where the metric has a p-value
    of McNemar's test, that must be below ``SURE`` too: with few changed pairs a bootstrap leaves
    0 out too easily.
    """
    low, high = values.get(f"{key}_low"), values.get(f"{key}_high")
    p_value = values.get(key.replace("/change", "/p_value").replace("_change", "_p_value"))
    if "change" in key and is_known(p_value) and p_value >= SURE:
        return "unclear"
    if is_known(low) and low > null:
        return "better"
    return "worse" if is_known(high) and high < null else "unclear"


def turned(found: str) -> str:
    """A verdict on a metric of which less is better."""
    return {"better": "worse", "worse": "better"}.get(found, found)


def headline(values: Mapping[str, Any]) -> str:
    """What was found, in one sentence or two, each figure with its interval."""
    pairs, images = values.get("pairs", 0), values.get("images")
    of = f"{pairs:,} held-out pairs" + (f" ({images:,} images)" if images != pairs else "")
    wins = with_interval(values, "win_rate")
    said = {
        "better": f"raised chosen over rejected in {wins} of them",
        "worse": f"raised chosen over rejected in only {wins} of them, less than half",
        "unclear": f"raised chosen over rejected in {wins} of them, which is not clearly more or "
        "less than half",
    }[verdict(values, "win_rate", 0.5)]
    text = f"On {of} the tuned model {said}"
    if is_known(values.get("base_accuracy")) and is_known(values.get("tuned_accuracy")):
        text += (
            f"; it gives chosen the higher log-prob per token in "
            f"{with_interval(values, 'tuned_accuracy')}, the base in "
            f"{with_interval(values, 'base_accuracy')}"
        )
    text += "."
    if is_known(values.get("base_correct")) and is_known(values.get("tuned_correct")):
        text += (
            f" Of {values.get('questions', 0):,} held-out questions it answers "
            f"{with_interval(values, 'tuned_correct')} right, the base "
            f"{with_interval(values, 'base_correct')}."
        )
    return text


@dataclass(frozen=True)
class Concern:
    """Something that a reader should know before quoting the headline."""

    warning: bool  # else a note
    text: str


RULES = (
    "“Raised” or “better” needs a whole interval on the good side, “worse” a whole interval on the "
    "bad side, and for what is right or wrong a p-value of McNemar's test below "
    f"{SURE:g} as well; everything else is “not clear”.",
    "A warning is given where chosen_logps_change is below 0; where accuracy_change or "
    "correct_change is “worse”; where a task of lm-eval is, with a p-value below "
    f"{SURE:g} divided by the number of its metrics that can be judged; where the win rate with a "
    "blank or another image is above one half with its whole interval, or the win rate is and "
    "win_rate_over_blank or win_rate_over_shuffled is not above 0; where a slice's win rate is "
    "below one half with its whole interval; where repetition_change is above 0 with its whole "
    "interval; where the share of unfinished answers rose by more than "
    f"{100 * MORE_UNFINISHED:.0f} points.",
    f"A note is given where base_accuracy is {percent(HIGH_BASE, 0)} or more; where longer_wins is "
    f"more than {100 * LENGTH_GIVEAWAY:.0f} points from one half; where pairs are tied; where "
    f"there are fewer than {FEW_IMAGES} test images.",
)


def concerns(values: Mapping[str, Any], slices: pd.DataFrame | None = None) -> list[Concern]:
    """Warnings, then notes, by the ``RULES``."""
    found = [
        *_log_prob_concerns(values),
        *_change_concerns(values),
        *_image_concerns(values),
        *_slice_concerns(slices),
        *_answer_concerns(values),
        *_notes(values),
    ]
    return sorted(found, key=lambda concern: not concern.warning)


def _log_prob_concerns(values: Mapping[str, Any]) -> Iterable[Concern]:
    change = values.get("chosen_logps_change")
    if is_known(change) and change < 0:
        sure = "" if verdict(values, "chosen_logps_change") == "worse" else ", not clearly"
        yield Concern(
            True,
            f"Chosen answers lost probability{sure}: "
            f"{with_interval(values, 'chosen_logps_change')} nats on average. DPO can widen the "
            "margin that way too; train.pref_ftx holds chosen up.",
        )


def _change_concerns(values: Mapping[str, Any]) -> Iterable[Concern]:
    for key, what in (
        ("accuracy_change", "Preference accuracy fell"),
        ("correct_change", "Right answers became fewer"),
    ):
        if verdict(values, key) == "worse":
            yield Concern(True, f"{what}: {with_interval(values, key)}.")
    tasks = lm_eval(values)
    judged = sum(row.p_value is not None for row in tasks)
    for row in tasks:
        sure = row.p_value is None or row.p_value < SURE / judged
        if row.verdict == "worse" and sure:
            yield Concern(True, f"{row.task} got worse: {row.metric} {row.change}.")


def _image_concerns(values: Mapping[str, Any]) -> Iterable[Concern]:
    wins = values.get("win_rate")
    for image, what in (("blank", "a blank image"), ("shuffled", "another pair's image")):
        key, over = f"win_rate_{image}", f"win_rate_over_{image}"
        if verdict(values, key, 0.5) == "better" and is_known(wins) and wins > 0.5:
            yield Concern(
                True,
                f"Some pairs are won without looking: with {what} the win rate is still "
                f"{with_interval(values, key)}.",
            )
        elif (
            verdict(values, "win_rate", 0.5) == "better"
            and is_known(values.get(over))
            and verdict(values, over) != "better"
        ):
            yield Concern(
                True,
                "Nothing shows that the preference depends on the image: the win rate is not "
                f"clearly higher than with {what} ({with_interval(values, over)}).",
            )


def _slice_concerns(slices: pd.DataFrame | None) -> Iterable[Concern]:
    rows = records(slices)
    for row in rows:
        if verdict(row, "win_rate", 0.5) == "worse":
            yield Concern(
                True,
                f"In the slice {row.get('by')} = {row.get('slice')} training raised rejected over "
                f"chosen: win rate {with_interval(row, 'win_rate')} of {row.get('pairs')} pairs.",
            )


def _answer_concerns(values: Mapping[str, Any]) -> Iterable[Concern]:
    if verdict(values, "repetition_change") == "better":  # more of it
        yield Concern(
            True,
            f"Answers repeat themselves more: {with_interval(values, 'tuned_repetition')}, the "
            f"base's {with_interval(values, 'base_repetition')}.",
        )
    base, tuned = (values.get(f"{model}_unfinished") for model in ("base", "tuned"))
    if is_known(base) and is_known(tuned) and tuned - base > MORE_UNFINISHED:
        yield Concern(
            True,
            f"More answers do not come to an end: {percent(tuned)}, the base's {percent(base)}.",
        )


def _notes(values: Mapping[str, Any]) -> Iterable[Concern]:
    base = values.get("base_accuracy")
    if is_known(base) and base >= HIGH_BASE:
        yield Concern(
            False,
            f"The base already ordered {with_interval(values, 'base_accuracy')} of the pairs "
            "rightly: there was little to learn.",
        )
    longer = values.get("longer_wins")
    if is_known(longer) and abs(longer - 0.5) > LENGTH_GIVEAWAY:
        which = "longer" if longer > 0.5 else "shorter"
        yield Concern(
            False,
            f"Length gives chosen away: always preferring the {which} answer is right in "
            f"{percent(max(longer, 1 - longer))} of the pairs. Part of the wins may be length.",
        )
    images = values.get("images")
    if is_known(images) and images < FEW_IMAGES:
        yield Concern(False, f"Few test images ({images:,}): read every figure with great care.")
    if values.get("ties"):
        yield Concern(
            False, f"{values['ties']:,} pairs are tied (margin exactly 0) and count as half a win."
        )


# tables of metrics

_STEMS = {
    "accuracy": "Preference accuracy",
    "accuracy_summed": "Preference accuracy, summed",
    "correct": "Right answers",
}

CONTROLS = {
    "longer_wins": "Far from 50%: length alone tells chosen from rejected.",
    "length_explained": "Large: the margins follow from the difference in length.",
    "win_rate_without_length": "Far below the win rate: much of it is length.",
    "win_rate_at_equal_length": "Far below the win rate: much of it is length.",
    "win_rate_chosen_shorter": "Far below the win rate: the model prefers longer answers.",
    "win_rate_equal_length": "Far below the win rate: it needs length to tell the two apart.",
    "win_rate_chosen_longer": "Far above the win rate: the model prefers longer answers.",
    "win_rate_blank": "As high as the win rate: the image is not needed to win.",
    "win_rate_over_blank": "0 inside the interval: the model may not look at the image.",
    "win_rate_shuffled": "As high as the win rate: any image does.",
    "win_rate_over_shuffled": "0 inside the interval: the model may not look at the image.",
    "tuned_accuracy_blank": "As high as tuned_accuracy: the text alone gives chosen away.",
    "tuned_accuracy_shuffled": "As high as tuned_accuracy: the text alone gives chosen away.",
}
_COUNTED_WITH = {
    "win_rate_chosen_shorter": "pairs_chosen_shorter",
    "win_rate_equal_length": "pairs_equal_length",
    "win_rate_chosen_longer": "pairs_chosen_longer",
    "win_rate_blank": "control_pairs",
    "win_rate_over_blank": "control_pairs",
    "win_rate_shuffled": "control_pairs",
    "win_rate_over_shuffled": "control_pairs",
    "tuned_accuracy_blank": "control_pairs",
    "tuned_accuracy_shuffled": "control_pairs",
}


@dataclass(frozen=True)
class Comparison:
    """A metric of both models. ``bars`` are its estimates and intervals, if it is a share."""

    name: str
    key: str
    meaning: str
    base: str
    base_interval: str
    tuned: str
    tuned_interval: str
    change: str
    change_interval: str
    verdict: str
    bars: tuple[tuple[str, float, float, float], ...]


@dataclass(frozen=True)
class Single:
    """A metric of its own."""

    key: str
    meaning: str
    value: str
    interval: str
    pairs: str = ""
    bad: str = ""


@dataclass(frozen=True)
class Task:
    """A metric of lm-eval for both models."""

    task: str
    metric: str
    base: str
    tuned: str
    change: str
    verdict: str
    p_value: float | None


def comparisons(values: Mapping[str, Any]) -> list[Comparison]:
    """One row for every ``base_x`` that has a ``tuned_x``."""
    rows = []
    for key in bare_keys(values):
        stem = key.removeprefix("base_")
        tuned = f"tuned_{stem}"
        if stem == key or tuned not in values:
            continue
        change = change_key(stem)
        difference = {change: values.get(change, _difference(values.get(tuned), values.get(key)))}
        rows.append(
            Comparison(
                name=_STEMS.get(stem, stem.replace("_", " ").capitalize()),
                key=stem,
                meaning=meaning_of(key),
                base=shown(key, values[key]),
                base_interval=interval(values, key),
                tuned=shown(tuned, values[tuned]),
                tuned_interval=interval(values, tuned),
                change=shown(change, difference[change]),
                change_interval=interval(values, change),
                verdict=_judged(values, stem),
                bars=bars(values, key, tuned),
            )
        )
    return rows


def _judged(values: Mapping[str, Any], stem: str) -> str:
    if not is_share(stem):
        return "unclear"  # longer answers are neither better nor worse
    found = verdict(values, change_key(stem))
    return turned(found) if stem in LOWER_IS_BETTER else found


def change_key(stem: str) -> str:
    """accuracy_summed → accuracy_change_summed, correct → correct_change."""
    first, _, rest = stem.partition("_")
    return f"{first}_change_{rest}" if first == "accuracy" and rest else f"{stem}_change"


def _difference(one: Any, other: Any) -> Any:
    return one - other if is_known(one) and is_known(other) else None


def bars(values: Mapping[str, Any], *keys: str) -> tuple[tuple[str, float, float, float], ...]:
    """For a chart in a table's cell: (model, estimate, low, high), each between 0 and 1."""
    found = []
    for key in keys:
        value = values[key]
        if not (is_known(value) and isinstance(value, float) and is_share(key)):
            return ()
        low, high = (values.get(f"{key}_{end}", value) for end in ("low", "high"))
        shares = [min(1.0, max(0.0, end)) for end in (value, low, high)]
        found.append((key.partition("_")[0], shares[0], shares[1], shares[2]))
    return tuple(found)


def singles(values: Mapping[str, Any]) -> list[Single]:
    """Every metric that no other table shows."""
    compared = {key for stem in _stems(values) for key in (f"base_{stem}", f"tuned_{stem}")}
    compared |= {change_key(stem) for stem in _stems(values)}
    elsewhere = compared | CONTROLS.keys() | set(_COUNTED_WITH.values())
    return [
        Single(key, meaning_of(key), shown(key, values[key]), interval(values, key))
        for key in bare_keys(values)
        if key not in elsewhere and not key.startswith("lm_eval/")
    ]


def controls(values: Mapping[str, Any]) -> list[Single]:
    """What else could have made the wins; each says what it would show if it had."""
    return [
        Single(
            key,
            meaning_of(key),
            shown(key, values[key]),
            interval(values, key),
            shown("pairs", values.get(_COUNTED_WITH.get(key, "pairs"))),
            bad,
        )
        for key, bad in CONTROLS.items()
        if key in values
    ]


def lm_eval(values: Mapping[str, Any]) -> list[Task]:
    """One row for every metric of every task: keys lm_eval/<task>/<metric>/<what>."""
    rows = []
    for key in values:
        if not (key.startswith("lm_eval/") and key.endswith("/base")):
            continue
        stem = key.removesuffix("/base")
        _, task, metric = stem.split("/", 2)
        change = f"{stem}/change"  # its bounds stand beside it: .../change_low
        better = values.get(f"{stem}/higher_is_better")
        found = verdict(values, change) if better is not None else "unclear"
        p_value = values.get(f"{stem}/p_value") if better is not None else None
        rows.append(
            Task(
                task,
                metric,
                shown(key, values[key]),
                shown(f"{stem}/tuned", values.get(f"{stem}/tuned")),
                with_interval(values, change),
                turned(found) if better == 0 else found,
                p_value if is_known(p_value) else None,
            )
        )
    return rows


def bare_keys(values: Mapping[str, Any]) -> list[str]:
    """Keys but those that are ends of another key's interval."""
    return [
        key
        for key in values
        if not any(
            key.endswith(end) and key.removesuffix(end) in values for end in ("_low", "_high")
        )
    ]


def _stems(values: Mapping[str, Any]) -> set[str]:
    return {
        stem
        for key in values
        if (stem := key.removeprefix("base_")) != key and f"tuned_{stem}" in values
    }


def meaning_of(key: str) -> str:
    return MEANING.get(key, "")


@dataclass(frozen=True)
class Tile:
    """A large number on the first screen."""

    name: str
    value: str
    interval: str
    note: str


def tiles(values: Mapping[str, Any]) -> list[Tile]:
    """At most four: win rate, accuracy, right answers, then what chosen and the margin did."""
    base = {key: f"base {shown(key, values.get(key))}" for key in ("base_accuracy", "base_correct")}
    candidates = (
        ("win_rate", "Win rate", "50% if nothing was learnt"),
        ("tuned_accuracy", "Preference accuracy", base["base_accuracy"]),
        ("tuned_correct", "Right answers", base["base_correct"]),
        ("chosen_logps_change", "Chosen log-prob", "change in nats; below 0 is a loss"),
        ("reward_margin", "Reward margin", "mean; above 0 is a win"),
    )
    found = [
        Tile(name, shown(key, values[key]), interval(values, key), note)
        for key, name, note in candidates
        if is_known(values.get(key))
    ]
    return found[:4]


def slice_rows(slices: pd.DataFrame | None) -> list[dict[str, str]]:
    """Slices as texts, for the table under the chart."""
    rows = records(slices)
    return [
        {
            "by": text_of(row.get("by")),
            "slice": text_of(row.get("slice")),
            "pairs": shown("pairs", _whole(row.get("pairs"))),
            "images": shown("images", _whole(row.get("images"))),
            "win_rate": with_interval(row, "win_rate"),
            "base": shown("base_accuracy", row.get("base_accuracy")),
            "tuned": shown("tuned_accuracy", row.get("tuned_accuracy")),
            "note": text_of(row.get("note")),
        }
        for row in rows
    ]


def _whole(value: Any) -> Any:
    return int(value) if is_known(value) else None


def text_of(value: Any) -> str:
    """A cell as text; nothing for what is absent."""
    return "" if value is None or value != value else str(value)


def records(rows: pd.DataFrame | None) -> list[dict[str, Any]]:
    """The rows of a table, each by its columns' names."""
    return (
        []
        if rows is None
        else [{str(k): v for k, v in row.items()} for row in rows.to_dict("records")]
    )
