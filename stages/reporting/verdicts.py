"""What the metrics say, in words, by rules that the page prints too.

Metrics are those of ``results/metrics.json``; any of them may be missing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from stages.evaluation import catalogue, paired, statistics
from stages.evaluation.catalogue import ACCURACY, CORRECT, METRICS, is_known, shown, with_interval
from stages.evaluation.statistics import FEW_GROUPS as FEW_IMAGES
from stages.evaluation.statistics import SURE, Direction
from stages.reporting.markup import rows_of

Verdict = Literal["better", "worse", "unclear"]

# The rules' numbers.
HIGH_BASE = 0.9  # base_accuracy from which there was little to learn
SHORTCUT = 0.6  # share of pairs that a judge without the image may tell apart
MORE_UNFINISHED = 0.05  # rise of the share of answers that hit max_new_tokens

TITLES: Mapping[Verdict, str] = {
    "better": "Training raised chosen over rejected.",
    "worse": "Training raised rejected over chosen.",
    "unclear": "No clear change of preference.",
}


def direction(values: Mapping[str, Any], key: str) -> Direction:
    """Whether a metric is above or below what it is where training changed nothing."""
    metric = METRICS[key]
    low, high, p_value = (
        value if is_known(value) else None
        for value in (values.get(name) for name in (f"{key}_low", f"{key}_high", metric.p_value))
    )
    return statistics.direction(low, high, p_value, null=metric.null)


def judged(found: Direction, better: catalogue.Better | None) -> Verdict:
    """Whether going that way is good; ``unclear`` where neither way is."""
    if found == "unclear" or better is None:
        return "unclear"
    return "better" if found == better else "worse"


def verdict(values: Mapping[str, Any], key: str) -> Verdict:
    return judged(direction(values, key), METRICS[key].better)


def headline(values: Mapping[str, Any]) -> str:
    """What was found, in one sentence or two, each figure with its interval."""
    pairs, images = values.get("pairs", 0), values.get("images")
    of = f"{pairs:,} held-out pairs" + (f" ({images:,} images)" if images != pairs else "")
    wins = with_interval(values, "win_rate")
    raised = {
        "better": f"raised chosen over rejected in {wins} of them",
        "worse": f"raised chosen over rejected in only {wins} of them, less than half",
        "unclear": f"raised chosen over rejected in {wins} of them, which is not clearly more or "
        "less than half",
    }[verdict(values, "win_rate")]
    text = f"On {of} the tuned model {raised}"
    if is_known(values.get(ACCURACY.base)) and is_known(values.get(ACCURACY.tuned)):
        text += (
            f"; it gives chosen the higher log-prob per token in "
            f"{with_interval(values, ACCURACY.tuned)}, the base in "
            f"{with_interval(values, ACCURACY.base)}"
        )
    text += "."
    if is_known(values.get(CORRECT.base)) and is_known(values.get(CORRECT.tuned)):
        text += (
            f" Of {values.get('questions', 0):,} held-out questions it answers "
            f"{with_interval(values, CORRECT.tuned)} right, the base "
            f"{with_interval(values, CORRECT.base)}."
        )
    return text


@dataclass(frozen=True)
class Concern:
    """Something that a reader should know before quoting the headline."""

    warning: bool  # else a note
    text: str


RULES = (
    "“Raised” and “better” need an interval that lies entirely on the good side, “worse” one "
    "entirely on the bad side, and for what is right or wrong a p-value of McNemar's test below "
    f"{SURE:g} as well; everything else is “not clear”.",
    "There is a warning where chosen_logps_change is below 0; where accuracy_change or "
    "correct_change is “worse”; where a task of lm-eval is, with a p-value below "
    f"{SURE:g} divided by the number of its metrics that can be judged; where the win rate with a "
    "blank or another image is clearly above one half, or the win rate is and "
    "win_rate_over_blank or win_rate_over_shuffled is not clearly above 0; where a slice's win "
    "rate is clearly below one half; where repetition_change is clearly above 0; where the share "
    f"of unfinished answers rose by more than {100 * MORE_UNFINISHED:.0f} points.",
    f"There is a note where base_accuracy is {100 * HIGH_BASE:.0f}% or more; where a shortcut "
    f"tells more than {100 * SHORTCUT:.0f}% of the pairs apart: length (longer_wins, either way), "
    "first_words_wins, bag_of_words_wins or base_accuracy_blank; where pairs contradict each "
    "other; where images of test pairs look like others; where pairs are tied; where "
    f"there are fewer than {FEW_IMAGES} test images; where the win rate is “not clear”.",
)


def concerns(values: Mapping[str, Any], slices: pd.DataFrame | None = None) -> list[Concern]:
    """Warnings, then notes, by the ``RULES``."""
    warnings = (*_change_warnings(values), *_image_warnings(values), *_slice_warnings(slices))
    return [
        *(Concern(True, text) for text in (*warnings, *_answer_warnings(values))),
        *(Concern(False, text) for text in (*_base_notes(values), *_data_notes(values))),
        *(Concern(False, text) for text in _split_notes(values)),
    ]


def _change_warnings(values: Mapping[str, Any]) -> Iterable[str]:
    change = values.get("chosen_logps_change")
    if is_known(change) and change < 0:
        sure = "" if verdict(values, "chosen_logps_change") == "worse" else ", not clearly"
        yield (
            f"Chosen answers lost probability{sure}: "
            f"{with_interval(values, 'chosen_logps_change')} nats on average. DPO can widen the "
            "margin that way too; train.pref_ftx holds chosen up."
        )
    for both, what in (
        (ACCURACY, "Preference accuracy fell"),
        (CORRECT, "Right answers became fewer"),
    ):
        if verdict(values, both.change) == "worse":
            yield f"{what}: {with_interval(values, both.change)}."
    yield from map(got_worse, worse_tasks(paired.read_tasks(values)))


def worse_tasks(found: Iterable[paired.TaskChange]) -> list[paired.TaskChange]:
    """Those that got worse, by the ``RULES``."""
    tasks = [one for one in found if one.better]
    tested = sum(one.change.p_value is not None for one in tasks)
    return [
        one
        for one in tasks
        if judged(one.change.direction, one.better) == "worse"
        and (one.change.p_value is None or one.change.p_value < SURE / tested)
    ]


def got_worse(one: paired.TaskChange) -> str:
    """A sentence on such a task."""
    change = one.change
    figure = catalogue.FIGURE.difference.with_interval(change.difference, change.low, change.high)
    return f"{one.task} got worse: {one.metric} {figure}."


def _image_warnings(values: Mapping[str, Any]) -> Iterable[str]:
    wins = values.get("win_rate")
    for image, what in (("blank", "a blank image"), ("shuffled", "another pair's image")):
        key, over = f"win_rate_{image}", f"win_rate_over_{image}"
        if direction(values, key) == "higher" and is_known(wins) and wins > 0.5:
            yield (
                f"Some pairs are won without looking: with {what} the win rate is still "
                f"{with_interval(values, key)}."
            )
        elif (
            verdict(values, "win_rate") == "better"
            and is_known(values.get(over))
            and verdict(values, over) != "better"
        ):
            yield (
                "Nothing shows that the preference depends on the image: the win rate is not "
                f"clearly higher than with {what} ({with_interval(values, over)})."
            )


def _slice_warnings(slices: pd.DataFrame | None) -> Iterable[str]:
    for row in rows_of(slices):
        if verdict(row, "win_rate") == "worse":
            yield (
                f"In the slice {row.get('by')} = {row.get('slice')} training raised rejected over "
                f"chosen: win rate {with_interval(row, 'win_rate')} of {row.get('pairs')} pairs."
            )


def _answer_warnings(values: Mapping[str, Any]) -> Iterable[str]:
    repeated = catalogue.REPETITION
    if verdict(values, repeated.change) == "worse":
        yield (
            f"Answers repeat themselves more: {with_interval(values, repeated.tuned)}, the base's "
            f"{with_interval(values, repeated.base)}."
        )
    keys = (catalogue.UNFINISHED.base, catalogue.UNFINISHED.tuned)
    base, tuned = (values.get(key) for key in keys)
    if is_known(base) and is_known(tuned) and tuned - base > MORE_UNFINISHED:
        before, after = (shown(key, values[key]) for key in keys)
        yield f"More answers do not come to an end: {after}, the base's {before}."


def _base_notes(values: Mapping[str, Any]) -> Iterable[str]:
    base = values.get(ACCURACY.base)
    if is_known(base) and base >= HIGH_BASE:
        yield (
            f"The base already ordered {with_interval(values, ACCURACY.base)} of the pairs "
            "rightly: there was little to learn."
        )


def _split_notes(values: Mapping[str, Any]) -> Iterable[str]:
    """What so many test pairs can't show."""
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


def _data_notes(values: Mapping[str, Any]) -> Iterable[str]:
    """What pairs give away without the image, and where they contradict or repeat each other."""
    longer = values.get("longer_wins")
    if is_known(longer) and max(longer, 1 - longer) > SHORTCUT:
        which = "longer" if longer > 0.5 else "shorter"
        yield (
            f"Length gives chosen away: always preferring the {which} answer is right in "
            f"{shown('longer_wins', max(longer, 1 - longer))} of the pairs. Part of the wins may "
            "be length."
        )
    for key, judge in (
        ("first_words_wins", "a judge that knows the answers' first three words"),
        ("bag_of_words_wins", "a judge that knows which words the answers have"),
        ("base_accuracy_blank", "the base with a blank image"),
    ):
        share = values.get(key)
        if is_known(share) and share > SHORTCUT:
            yield (
                f"A shortcut: {judge} is right in {with_interval(values, key)} of the pairs. Part "
                "of the wins may need no image."
            )
    if values.get("contradictory_pairs"):
        number = shown("contradictory_pairs", values["contradictory_pairs"])
        yield (
            f"The data contradicts itself: {number} pairs have the same image and question as "
            "another, with the answers swapped."
        )
    if values.get("near_duplicate_images"):
        number = shown("near_duplicate_images", values["near_duplicate_images"])
        yield (
            f"Images of test pairs that look the same as one of another split: {number}. Their "
            "pairs are not entirely held out."
        )
