"""Every metric of ``results/metrics.json``: its meaning, its unit, how it is read and judged.

One entry for each key, in the file's order. The ends of an interval have no entry of their own:
``<key>_low`` and ``<key>_high`` are in the unit of their key. The keys of lm-eval's tasks are read
by ``stages.evaluation.paired``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeGuard

Better = Literal["higher", "lower"]
ENDS = ("low", "high")
DASH = "\N{EN DASH}"


def is_known(value: Any) -> TypeGuard[float]:
    """Whether a metric is there: a number that is neither NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True)
class Unit:
    """How a value reads: ``factor`` times the value with ``digits``, then ``suffix``.

    ``least``: smaller values read as "< least". ``change``: the unit of a difference of two values,
    where that is another one.
    """

    name: str
    digits: int = 2
    signed: bool = False
    factor: float = 1
    suffix: str = ""
    least: float = 0
    change: "Unit | None" = None

    @property
    def difference(self) -> "Unit":
        return self.change or self

    def text(self, value: Any) -> str:
        """``98.4%``, ``+25.9 points``, ``1,000``; a dash for what is not known."""
        if not is_known(value):
            return DASH
        if self.least and value < self.least:
            return f"< {self.least:g}"
        return self._number(value, self.digits) + self.suffix

    def interval(self, low: Any, high: Any) -> str:
        """``[97.4, 99.2]``; empty where an end is not known.

        An end near 0 has as many digits as it takes not to show it as 0, which the rules ask for.
        """
        if not (is_known(low) and is_known(high)):
            return ""
        digits = next(
            (
                digits
                for digits in range(self.digits, self.digits + 4)
                if all(end == 0 or round(self.factor * end, digits) for end in (low, high))
            ),
            self.digits,
        )
        return f"[{self._number(low, digits)}, {self._number(high, digits)}]"

    def with_interval(self, value: Any, low: Any, high: Any) -> str:
        """``98.4% [97.4, 99.2]``: the text of every figure, wherever it is shown."""
        return f"{self.text(value)} {self.interval(low, high)}".strip()

    def _number(self, value: float, digits: int) -> str:
        text = f"{self.factor * value:{'+' if self.signed else ''},.{digits}f}"
        if not text.strip("+-0.,"):
            text = text.lstrip("+-")  # 0 has no sign, nor has what is rounded to it
        return text.replace("-", "\N{MINUS SIGN}")


COUNT = Unit("count", digits=0)
POINTS = Unit("points", digits=1, signed=True, factor=100, suffix=" points")
SHARE = Unit("share", digits=1, factor=100, suffix="%", change=POINTS)  # of rows
FRACTION = Unit("fraction", digits=1, factor=100, suffix="%", change=POINTS)  # of something else
NATS = Unit("nats", signed=True)
LOG_PROB = Unit("nats", change=NATS)
MARGIN = Unit("nats times beta", signed=True)
TOKENS = Unit("tokens", change=Unit("tokens", signed=True))
P_VALUE = Unit("p-value", digits=3, least=0.001)
# Of lm-eval's metrics only their authors know the unit.
_NAME = "as lm-eval prints it"
FIGURE = Unit(_NAME, digits=3, change=Unit(_NAME, digits=3, signed=True))


@dataclass(frozen=True)
class Metric:
    """One key of the file.

    ``null``: its value where training changed nothing. ``needs``: what a run must have for the key
    to be there. ``rows``: the key that counts what it is a mean or a count of. ``p_value``: the key
    of its McNemar test. ``alarm``: for a control, what value would be bad and what it would show.
    ``title``: its name for people, where it is shown large.
    """

    key: str
    meaning: str
    unit: Unit = COUNT
    interval: bool = False
    better: Better | None = None
    null: float = 0
    needs: str = ""
    rows: str = "pairs"
    p_value: str = ""
    alarm: str = ""
    title: str = ""


@dataclass(frozen=True)
class Both:
    """What is measured of base and of tuned; ``meaning`` has a place for ``{model}``."""

    stem: str
    title: str
    meaning: str
    change: str
    unit: Unit = SHARE
    better: Better | None = "higher"
    p_value: str = ""
    needs: str = ""
    rows: str = "pairs"

    @property
    def base(self) -> str:
        return f"base_{self.stem}"

    @property
    def tuned(self) -> str:
        return f"tuned_{self.stem}"

    def metrics(self) -> tuple[Metric, ...]:
        mean = partial(_mean, better=self.better, needs=self.needs, rows=self.rows)
        by = "pair" if self.rows == "pairs" else "question"
        difference = f"{self.tuned} - {self.base}, {by} by {by}"
        base, tuned = (self.meaning.format(model=m) for m in ("the base", "the tuned model"))
        return (
            mean(self.base, base, self.unit),
            mean(self.tuned, tuned, self.unit, title=self.title),
            mean(self.change, difference, self.unit.difference, p_value=self.p_value),
        )


_mean = partial(Metric, interval=True)
_win_rate = partial(_mean, unit=SHARE, better="higher", null=0.5)
_VALIDATION = "validation pairs"
_of_validation = partial(_mean, unit=SHARE, better="higher", needs=_VALIDATION, rows="val_pairs")
_of_split = partial(Metric, needs="at least two images")

ENOUGH_IMAGES = 10  # a group of pairs with fewer distinct images than this gets no rate
_CONTROLS = "`evaluate.controls` above 0"
_ANSWERS = "`evaluate.generation.prompts` above 0"
_of_own = partial(Metric, needs=_ANSWERS, rows="own_answers")
_QUESTIONS = "a data set with known answers, `evaluate.generation.questions` above 0"
_MCNEMAR = "exact two-sided McNemar test that gained and lost are equally likely"

ACCURACY = Both(
    "accuracy",
    "Preference accuracy",
    "share of pairs where {model} gives chosen the higher log-prob per token, a tie counted half",
    "accuracy_change",
    p_value="accuracy_p_value",
)
_of_answers = partial(Both, needs=_ANSWERS, rows="answers")
ANSWER_TOKENS = _of_answers(
    "answer_tokens",
    "Answer tokens",
    "mean length of {model}'s answers in tokens",
    "answer_tokens_change",
    TOKENS,
    better=None,
)
REPETITION = _of_answers(
    "repetition",
    "Repetition",
    "mean share of {model}'s word 4-grams that its answer had already said",
    "repetition_change",
    FRACTION,
    better="lower",
)
UNFINISHED = _of_answers(
    "unfinished",
    "Unfinished",
    "share of {model}'s answers that max_new_tokens cut",
    "unfinished_change",
    better="lower",
)
CORRECT = Both(
    "correct",
    "Right answers",
    "share of the questions that {model} answers correctly",
    "correct_change",
    p_value="correct_p_value",
    needs=_QUESTIONS,
    rows="questions",
)
BOTH = (ACCURACY, ANSWER_TOKENS, REPETITION, UNFINISHED, CORRECT)
WAYS = {  # what the control pairs show in place of their image, and what a high win rate then means
    "blank": ("a grey image of the same size", "the image is not needed to win"),
    "shuffled": ("the image of another pair", "any image does"),
}


def _of_images(way: str, image: str, as_high: str) -> tuple[Metric, ...]:
    mean = partial(_mean, needs=_CONTROLS, rows="control_pairs")
    of = f"of the control pairs with {image}"
    return (
        mean(
            f"win_rate_{way}",
            f"win rate {of}",
            SHARE,
            null=0.5,
            alarm=f"As high as the win rate: {as_high}.",
        ),
        mean(
            f"win_rate_over_{way}",
            f"win rate with the own image - win_rate_{way}, pair by pair",
            POINTS,
            better="higher",
            alarm="0 inside the interval: the model may not look at the image.",
        ),
        *(
            mean(
                f"{both}_{way}",
                f"{both} {of}",
                SHARE,
                alarm=f"As high as {both}: the text alone gives chosen away.",
            )
            for both in (ACCURACY.base, ACCURACY.tuned)
        ),
    )


_ENTRIES = (
    # of all test pairs
    Metric("pairs", "test pairs scored"),
    Metric("images", "distinct images among them; the bootstrap draws these"),
    _win_rate(
        "win_rate",
        "share of pairs whose implicit reward margin is above 0, a tie counted half",
        title="Chosen-versus-rejected win rate",
    ),
    Metric("ties", "pairs whose reward margin is exactly 0"),
    _mean(
        "reward_margin",
        "mean of beta·[(log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)]",
        MARGIN,
        better="higher",
        title="Reward margin",
    ),
    _mean(
        "chosen_logps_change",
        "mean of (log π - log π_ref)(chosen); below 0 chosen lost probability",
        NATS,
        better="higher",
        title="Chosen log-prob",
    ),
    _mean("rejected_logps_change", "mean of (log π - log π_ref)(rejected)", NATS),
    *ACCURACY.metrics(),
    Metric("accuracy_gained", "pairs that the tuned model orders better than the base"),
    Metric("accuracy_lost", "pairs that the tuned model orders worse than the base"),
    Metric("accuracy_p_value", _MCNEMAR, P_VALUE),
    # what the split can show, whatever was trained
    _of_split(
        "independent_pairs",
        "pairs of different images that would say as much as these, by how alike the base treats "
        "the pairs of an image",
    ),
    _of_split(
        "win_rate_detectable",
        "smallest distance of the win rate from one half that this split shows in 4 of 5 cases",
        POINTS,
    ),
    # controls: length
    _mean(
        "longer_wins",
        "share of pairs whose chosen has more tokens: what preferring length scores",
        SHARE,
        alarm="Far from 50%: length alone tells chosen from rejected.",
    ),
    _win_rate(
        "win_rate_without_length",
        "win rate of what remains of the margins after a fit to length",
        needs=f"{ENOUGH_IMAGES} images, and differences in length on both sides of 0 or at 0",
        alarm="Far below the win rate: much of it is length.",
    ),
    # shortcuts: what tells chosen from rejected, or contradicts it, in the data alone
    _mean(
        "first_words_wins",
        "share of pairs in which chosen is picked by a judge that learned from the training pairs "
        "and reads only the answers' first three words",
        SHARE,
        alarm="Far above 50%: how an answer begins tells chosen from rejected.",
    ),
    _mean(
        "bag_of_words_wins",
        "share of pairs in which chosen is picked by a judge that learned from the training pairs "
        "and knows only which words the answers have",
        SHARE,
        alarm="Far above 50%: words alone tell chosen from rejected.",
    ),
    Metric("audited_pairs", "pairs of all splits"),
    Metric(
        "contradictory_pairs",
        "pairs with the same image and question as another, whose answers are swapped",
        rows="audited_pairs",
        alarm="Above 0: the data contradicts itself, and these pairs can't all be won.",
    ),
    Metric("audited_images", "images of test pairs"),
    Metric(
        "near_duplicate_images",
        "images of test pairs that look the same as one of another split",
        rows="audited_images",
        alarm="Above 0: training saw something of what is tested.",
    ),
    Metric(
        "seen_text_pairs",
        "pairs whose question and both answers are word for word those of a training pair",
        alarm="Most of the pairs: images are held out, texts are not.",
    ),
    # are the answers such as the base gives?
    Metric(
        "own_answers", "questions of test pairs that the base answered to an end", needs=_ANSWERS
    ),
    _of_own(
        "off_policy_distance",
        "median of the base's log-prob per token of its own answer - that of chosen",
        NATS,
    ),
    _of_own(
        "off_policy_chosen",
        "share of pairs whose chosen has a lower log-prob per token than 99% of the base's own "
        "answers",
        SHARE,
    ),
    _of_own(
        "off_policy_rejected",
        "share of these pairs where the base gives rejected the higher log-prob per token",
        SHARE,
    ),
    # controls: the image
    Metric("control_pairs", "test pairs scored again with another image", needs=_CONTROLS),
    *(metric for way, words in WAYS.items() for metric in _of_images(way, *words)),
    # generated answers
    Metric("answers", "questions of test pairs that both models answered greedily", needs=_ANSWERS),
    *ANSWER_TOKENS.metrics(),
    *REPETITION.metrics(),
    *UNFINISHED.metrics(),
    Metric(
        "same_answers", "share of answers that are equal", SHARE, needs=_ANSWERS, rows="answers"
    ),
    # graded answers
    Metric("questions", "held-out questions that both models answered", needs=_QUESTIONS),
    Metric(
        "constant_correct",
        "share that always giving the most frequent true answer gets right",
        SHARE,
        needs=_QUESTIONS,
        rows="questions",
    ),
    *CORRECT.metrics(),
    Metric("correct_gained", "questions that only the tuned model gets right", needs=_QUESTIONS),
    Metric("correct_lost", "questions that only the base gets right", needs=_QUESTIONS),
    Metric("correct_p_value", _MCNEMAR, P_VALUE, needs=_QUESTIONS),
    # of the validation pairs: what settings are chosen by
    Metric("val_pairs", "validation pairs scored", needs=_VALIDATION, rows="val_pairs"),
    _of_validation("val_win_rate", "win_rate of the validation pairs", null=0.5),
    _of_validation("val_base_accuracy", "base_accuracy of the validation pairs"),
    _of_validation("val_tuned_accuracy", "tuned_accuracy of the validation pairs"),
)
METRICS: Mapping[str, Metric] = {metric.key: metric for metric in _ENTRIES}
# Every key that the file can have, lm-eval's aside, in its order.
KEYS = tuple(
    key
    for metric in METRICS.values()
    for key in (metric.key, *(f"{metric.key}_{end}" for end in ENDS if metric.interval))
)

# DVC's metrics: at most eight, under names so short that `dvc exp show` fits 120 columns. First
# what settings are chosen by, then what is reported of the chosen one.
HEADLINE = {
    "val_win_rate": "val_win_rate",
    "val_acc": "val_tuned_accuracy",
    "win_rate": "win_rate",
    "base_acc": ACCURACY.base,
    "tuned_acc": ACCURACY.tuned,
    "correct": CORRECT.tuned,  # else what lm-eval's first task gives, see metrics.headline
    "chosen_logps": "chosen_logps_change",
    "margin": "reward_margin",
}


def of_both_models(values: Mapping[str, Any]) -> list[Both]:
    """What of ``BOTH`` a run has."""
    return [both for both in BOTH if both.base in values and both.tuned in values]


def controls(values: Mapping[str, Any]) -> list[Metric]:
    """What else could have made the wins; each says what it would show if it had."""
    return [metric for key, metric in METRICS.items() if metric.alarm and key in values]


def about(key: str) -> Metric:
    """The entry of a key, or of the key that it is an end of."""
    return METRICS[key if key in METRICS else key.rpartition("_")[0]]


def shown(key: str, value: Any) -> str:
    """A metric as text in its unit: ``98.4%``, ``+25.9 points``, ``1,000``, ``+0.46``."""
    return about(key).unit.text(value)


def interval(values: Mapping[str, Any], key: str) -> str:
    """``[97.4, 99.2]``, in the unit of the metric; empty where it has none."""
    return about(key).unit.interval(*(values.get(f"{key}_{end}") for end in ENDS))


def with_interval(values: Mapping[str, Any], key: str) -> str:
    return f"{shown(key, values.get(key))} {interval(values, key)}".strip()


def in_words(values: Mapping[str, Any]) -> str:
    """The figures that come first, in a line, with their intervals."""
    found = [
        f"chosen-versus-rejected win rate {with_interval(values, 'win_rate')} of "
        f"{values['pairs']:,} held-out pairs"
    ]
    found += [
        f"{both.title.lower()} {with_interval(values, both.base)} → "
        f"{with_interval(values, both.tuned)}"
        for both in (ACCURACY, CORRECT)
        if both.tuned in values
    ]
    return "; ".join(found)
