"""The numbers of ``results/metrics.json``: how each follows from scores and answers.

``stages.evaluation.catalogue`` says what each key means. Intervals are at
``evaluate.confidence``, by bootstrap over images (``stages.evaluation.statistics``).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from stages.answers import grading
from stages.core.errors import UserError
from stages.evaluation import catalogue, paired, statistics
from stages.evaluation.catalogue import ENOUGH_IMAGES, METRICS, SHARE, WAYS, Both
from stages.params.params import Evaluate

MODELS = ("base", "tuned")
LOGPS = ("chosen_logps", "rejected_logps")
CURE = "`dvc repro -f reference baseline` makes the base's log-probs again"
LENGTHS = ("chosen_tokens", "rejected_tokens", "image_tokens")


def score(
    pairs: Iterable[Mapping[str, Any]], policy: pd.DataFrame, reference: pd.DataFrame, beta: float
) -> pd.DataFrame:
    """One row a pair: both models' log-probs, the rewards and the reward margin.

    ``policy`` and ``reference`` are tables of ``scoring.log_probs``; rows of ``reference`` may be
    in any order. ``base_margin`` and ``tuned_margin`` are each model's preference margin per token.

    Raises:
        UserError: the reference lacks a pair or counted other tokens: it was made from other data.
    """
    rows = [{key: pair[key] for key in ("id", "group", "origin", "kind")} for pair in pairs]
    table = pd.DataFrame(rows)
    for name, given in (("policy", policy), ("reference", reference)):
        known = given.set_index("id")[[*LOGPS, *LENGTHS]].add_prefix(f"{name}_")
        table = table.merge(known, left_on="id", right_index=True, validate="1:1")
    if len(table) != len(rows):
        raise UserError(f"the reference has {len(table)} of the {len(rows)} test pairs; {CURE}")
    table = table.rename(columns={f"policy_{column}": column for column in LENGTHS})
    for column in LENGTHS:
        if not (table[column] == table.pop(f"reference_{column}")).all():
            raise UserError(
                f"reference and policy differ in {column}: they were not given the same tokens; "
                f"{CURE}"
            )
    for side in ("chosen", "rejected"):
        table[f"{side}_reward"] = statistics.implicit_reward(
            table[f"policy_{side}_logps"], table[f"reference_{side}_logps"], beta
        )
    table["reward_margin"] = table["chosen_reward"] - table["rejected_reward"]
    for model, prefix in (("base", "reference"), ("tuned", "policy")):
        table[f"{model}_margin"] = statistics.preference_margin(
            table[f"{prefix}_chosen_logps"],
            table[f"{prefix}_rejected_logps"],
            table["chosen_tokens"],
            table["rejected_tokens"],
        )
    return table


def with_controls(scores: pd.DataFrame, controlled: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The scores with the margins of a sample of the same pairs shown another image, in columns
    such as ``reward_margin_<way>``; NaN outside the sample.
    """
    for way, table in controlled.items():
        margins = table.set_index("id")[["reward_margin", "base_margin", "tuned_margin"]]
        scores = scores.join(margins.add_suffix(f"_{way}"), on="id")
    return scores


def of_pairs(scores: pd.DataFrame, settings: Evaluate) -> dict[str, float]:
    """Metrics of all scored pairs: the catalogue's keys up to those of length."""
    policy, reference = (
        {side: scores[f"{of}_{side}_logps"] for side in ("chosen", "rejected")}
        for of in ("policy", "reference")
    )
    accuracy = [statistics.outcomes(scores[f"{model}_margin"]) for model in MODELS]
    wins = statistics.outcomes(scores["reward_margin"])
    test = statistics.mcnemar(*accuracy)
    values: dict[str, float] = {
        "pairs": len(scores),
        "images": scores["group"].nunique(),
        "ties": int((wins == 0.5).sum()),
        "accuracy_gained": test.gained,
        "accuracy_lost": test.lost,
        "accuracy_p_value": test.p_value,
    }
    means = {
        "win_rate": wins,
        "reward_margin": scores["reward_margin"],
        "chosen_logps_change": policy["chosen"] - reference["chosen"],
        "rejected_logps_change": policy["rejected"] - reference["rejected"],
        **_both(catalogue.ACCURACY, *accuracy),
    }
    return _ordered(values | with_intervals(means, scores["group"], settings))


def _both(both: Both, base: Any, tuned: Any) -> dict[str, Any]:
    """Values of single rows of base, of tuned, and of their difference."""
    return {both.base: base, both.tuned: tuned, both.change: tuned - base}


def of_split(scores: pd.DataFrame, settings: Evaluate) -> dict[str, float]:
    """What the test pairs can show, by how alike the base treats those of an image."""
    groups, of_base = scores["group"].to_numpy(), statistics.outcomes(scores["base_margin"])
    if len(set(groups)) < 2:
        return {}
    win_rate, pairs = statistics.detectable(of_base, groups, level=settings.confidence)
    return _ordered({"win_rate_detectable": win_rate, "independent_pairs": round(pairs)})


def of_length(scores: pd.DataFrame, settings: Evaluate) -> dict[str, float]:
    """What length could explain of the win rate; nothing is fitted where no difference in length
    is 0 or around it.
    """
    difference = scores["chosen_tokens"] - scores["rejected_tokens"]
    means = {"longer_wins": statistics.outcomes(difference)}
    if scores["group"].nunique() >= ENOUGH_IMAGES and difference.min() <= 0 <= difference.max():
        without = statistics.without_length(scores["reward_margin"], difference)
        means["win_rate_without_length"] = statistics.outcomes(without)
    return _ordered(with_intervals(means, scores["group"], settings))


def of_shortcuts(
    judged: Mapping[str, Any], counts: Mapping[str, int], groups: Any, settings: Evaluate
) -> dict[str, float]:
    """What the data alone gives away, of ``shortcuts.judges`` and ``shortcuts.listed``."""
    means = {f"{name}_wins": values for name, values in judged.items()}
    return _ordered({**counts, **with_intervals(means, pd.Series(groups), settings)})


def of_validation(scores: pd.DataFrame | None, settings: Evaluate) -> dict[str, float]:
    """Win rate and accuracies of the validation pairs, to choose settings by without the test."""
    if scores is None:
        return {}
    means = {"val_win_rate": statistics.outcomes(scores["reward_margin"])}
    for model in MODELS:
        means[f"val_{model}_accuracy"] = statistics.outcomes(scores[f"{model}_margin"])
    values: dict[str, float] = {"val_pairs": len(scores)}
    return _ordered(values | with_intervals(means, scores["group"], settings))


def of_images(scores: pd.DataFrame, settings: Evaluate) -> dict[str, float]:
    """What the win rate is when another image is shown, from the columns of ``with_controls``."""
    ways = [way for way in WAYS if f"reward_margin_{way}" in scores]
    if not ways:
        return {}
    sample = scores.dropna(subset=[f"reward_margin_{way}" for way in ways])
    own = statistics.outcomes(sample["reward_margin"])
    means = {}
    for way in ways:
        other = statistics.outcomes(sample[f"reward_margin_{way}"])
        means[f"win_rate_{way}"] = other
        means[f"win_rate_over_{way}"] = own - other
        for model in MODELS:
            means[f"{model}_accuracy_{way}"] = statistics.outcomes(sample[f"{model}_margin_{way}"])
    values: dict[str, float] = {"control_pairs": len(sample)}
    return _ordered(values | with_intervals(means, sample["group"], settings))


def of_answers(answers: pd.DataFrame, settings: Evaluate) -> dict[str, float]:
    """Length and repetition of both models' answers to the questions of test pairs."""
    if answers.empty:
        return {}
    means: dict[str, Any] = {}
    for both, of_model in (
        (catalogue.ANSWER_TOKENS, lambda model: answers[f"{model}_tokens"].astype(float)),
        (catalogue.REPETITION, lambda model: answers[f"{model}_answer"].map(grading.repetition)),
        (catalogue.UNFINISHED, lambda model: 1.0 - answers[f"{model}_finished"].astype(float)),
    ):
        means |= _both(both, *map(of_model, MODELS))
    values: dict[str, float] = {"answers": len(answers)}
    values["same_answers"] = float((answers["base_answer"] == answers["tuned_answer"]).mean())
    return _ordered(values | with_intervals(means, answers["image"], settings))


def of_questions(graded: pd.DataFrame, settings: Evaluate) -> dict[str, float]:
    """Right answers; empty where the data set knows no true answers."""
    if graded.empty:
        return {}
    base, tuned = (graded[f"{model}_correct"].astype(float) for model in MODELS)
    test = statistics.mcnemar(base, tuned)
    means = _both(catalogue.CORRECT, base, tuned)
    values: dict[str, float] = {
        "questions": len(graded),
        "constant_correct": float(graded["truth"].value_counts(normalize=True).max()),
        "correct_gained": test.gained,
        "correct_lost": test.lost,
        "correct_p_value": test.p_value,
    }
    return _ordered(values | with_intervals(means, graded["image"], settings))


def with_intervals(
    means: Mapping[str, Any], groups: "pd.Series[Any]", settings: Evaluate
) -> dict[str, float]:
    """Means with their intervals, of shares by ``statistics.rate_bounds``; without intervals where
    all rows share one image.
    """
    if groups.nunique() < 2:
        return {name: float(np.mean(values)) for name, values in means.items()}
    found = statistics.bootstrap_intervals(means, groups.to_numpy(), settings)
    flat: dict[str, float] = {}
    for name, interval in found.items():
        low, high = interval.low, interval.high
        if METRICS[name].unit is SHARE:
            low, high = statistics.rate_bounds(interval, settings.confidence)
        flat |= {name: interval.estimate, f"{name}_low": low, f"{name}_high": high}
    return flat


def _ordered(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics in the catalogue's order, each followed by its interval; 6 digits.

    Raises ``KeyError`` for a metric that the catalogue does not explain.
    """
    if unknown := values.keys() - set(catalogue.KEYS):
        raise KeyError(f"{min(unknown)} has no entry in evaluation/catalogue.yaml")
    return {
        key: float(f"{values[key]:.6g}") if isinstance(values[key], float) else values[key]
        for key in catalogue.KEYS
        if key in values
    }


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """``headline.json``, DVC's metrics: the numbers of ``catalogue.HEADLINE``, to four digits.

    Where the data set has no questions of its own, ``correct`` is the first metric of lm-eval's
    first task.
    """
    values = {short: metrics[key] for short, key in catalogue.HEADLINE.items() if key in metrics}
    if "correct" not in values and (first := next(paired.read_tasks(metrics), None)):
        values["correct"] = first.change.after
    return {short: round(values[short], 4) for short in catalogue.HEADLINE if short in values}
