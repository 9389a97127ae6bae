"""The numbers of ``reports/metrics.json``: what each key means, and how it follows from the scores.

Log-probs are in nats, margins and rewards in units of beta nats, shares between 0 and 1. Keys that
end in ``_low`` and ``_high`` are the interval of the key before, at ``evaluate.confidence``, by
bootstrap over images (``stages.evaluation.statistics``).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from stages.evaluation import statistics
from stages.parameters.params import Evaluate
from stages.probing import grading

ENOUGH_IMAGES = 10  # a group of pairs with fewer distinct images than this gets no rate

# Every key of metrics.json but the _low and _high of those in WITH_INTERVAL, in the file's order.
# After them come the results of lm-eval's tasks, see stages.probing.lm_eval.
MEANING = {
    # of all test pairs
    "pairs": "test pairs scored",
    "images": "distinct images among them; the bootstrap draws these",
    "win_rate": "share of pairs whose reward margin is above 0, a tie counted half",
    "win_rate_wilson_low": "lower end of Wilson's interval of win_rate, each image one trial",
    "win_rate_wilson_high": "its upper end; the interval to read below some 30 images",
    "ties": "pairs whose reward margin is exactly 0",
    "reward_margin": "mean of beta·[(log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)]",
    "reward_margin_p05": "5% of the reward margins are below this",
    "reward_margin_p25": "25% of the reward margins are below this",
    "reward_margin_p50": "the median reward margin",
    "reward_margin_p75": "75% of the reward margins are below this",
    "reward_margin_p95": "95% of the reward margins are below this",
    "chosen_logps_change": "mean of (log π - log π_ref)(chosen); below 0 chosen lost probability",
    "rejected_logps_change": "mean of (log π - log π_ref)(rejected)",
    "base_accuracy": "share of pairs where the base gives chosen the higher log-prob per token",
    "tuned_accuracy": "share of pairs where tuned gives chosen the higher log-prob per token",
    "accuracy_change": "tuned_accuracy - base_accuracy, pair by pair",
    "accuracy_gained": "pairs that the tuned model orders better than the base",
    "accuracy_lost": "pairs that the tuned model orders worse than the base",
    "accuracy_p_value": "exact two-sided McNemar test that gained and lost are equally likely",
    "base_accuracy_summed": "as base_accuracy, by summed log-prob, which favours short answers",
    "tuned_accuracy_summed": "as tuned_accuracy, by summed log-prob",
    "accuracy_change_summed": "tuned_accuracy_summed - base_accuracy_summed, pair by pair",
    "accuracy_p_value_summed": "McNemar's test of accuracy_change_summed",
    # controls: length
    "longer_wins": "share of pairs whose chosen has more tokens: what preferring length scores",
    "pairs_chosen_shorter": "pairs whose chosen has fewer tokens than rejected",
    "win_rate_chosen_shorter": "win rate where chosen has fewer tokens",
    "pairs_equal_length": "pairs of answers with equally many tokens",
    "win_rate_equal_length": "win rate where both have equally many tokens",
    "pairs_chosen_longer": "pairs whose chosen has more tokens",
    "win_rate_chosen_longer": "win rate where chosen has more tokens",
    "win_rate_without_length": "win rate of what remains of the margins after a fit to length",
    "win_rate_at_equal_length": "win rate at equal length, by a logistic fit to the difference",
    "length_explained": "share of the margins' variance that the difference in length explains",
    # controls: the image
    "control_pairs": "test pairs that were scored again with another image in place of their own",
    "win_rate_blank": "win rate of the control pairs with a grey image of the same size",
    "win_rate_over_blank": "win rate with the own image - win_rate_blank, pair by pair",
    "tuned_accuracy_blank": "tuned_accuracy with the grey image",
    "win_rate_shuffled": "win rate of the control pairs with the image of another pair",
    "win_rate_over_shuffled": "win rate with the own image - win_rate_shuffled, pair by pair",
    "tuned_accuracy_shuffled": "tuned_accuracy with the image of another pair",
    # generated answers
    "answers": "questions of test pairs that both models answered greedily",
    "base_answer_tokens": "mean length of the base's answers in tokens",
    "tuned_answer_tokens": "mean length of the tuned model's answers in tokens",
    "answer_tokens_change": "tuned_answer_tokens - base_answer_tokens, question by question",
    "base_repetition": "mean share of the base's word 4-grams that its answer had already said",
    "tuned_repetition": "mean share of the tuned model's word 4-grams that were already said",
    "repetition_change": "tuned_repetition - base_repetition, question by question",
    "base_unfinished": "share of the base's answers that max_new_tokens cut",
    "tuned_unfinished": "share of the tuned model's answers that max_new_tokens cut",
    "unfinished_change": "tuned_unfinished - base_unfinished, question by question",
    "same_answers": "share of questions to which both gave the same answer",
    # graded answers
    "questions": "held-out questions with known answers that both models answered",
    "constant_correct": "share that always giving the most frequent true answer gets right",
    "base_correct": "share of the questions that the base answers correctly",
    "tuned_correct": "share of the questions that the tuned model answers correctly",
    "correct_change": "tuned_correct - base_correct, question by question",
    "correct_gained": "questions that only the tuned model answers correctly",
    "correct_lost": "questions that only the base answers correctly",
    "correct_p_value": "exact two-sided McNemar test that gained and lost are equally likely",
}
WITH_INTERVAL = (
    "win_rate",
    "reward_margin",
    "chosen_logps_change",
    "rejected_logps_change",
    "base_accuracy",
    "tuned_accuracy",
    "accuracy_change",
    "base_accuracy_summed",
    "tuned_accuracy_summed",
    "accuracy_change_summed",
    "longer_wins",
    "win_rate_chosen_shorter",
    "win_rate_equal_length",
    "win_rate_chosen_longer",
    "win_rate_without_length",
    "win_rate_blank",
    "win_rate_over_blank",
    "tuned_accuracy_blank",
    "win_rate_shuffled",
    "win_rate_over_shuffled",
    "tuned_accuracy_shuffled",
    "base_answer_tokens",
    "tuned_answer_tokens",
    "answer_tokens_change",
    "base_repetition",
    "tuned_repetition",
    "repetition_change",
    "base_unfinished",
    "tuned_unfinished",
    "unfinished_change",
    "base_correct",
    "tuned_correct",
    "correct_change",
)
# Those that are the share of something, with an interval that can be Wilson's.
RATES = frozenset(
    key
    for key in WITH_INTERVAL
    if not any(part in key for part in ("_change", "_over_", "margin", "tokens", "repetition"))
)
# Keys that a run can lack: it has no such pairs, or was told to make none.
OPTIONAL = frozenset(
    {
        *("win_rate_chosen_shorter", "win_rate_equal_length", "win_rate_chosen_longer"),
        *("win_rate_without_length", "win_rate_at_equal_length", "length_explained"),
        *(
            key
            for key in MEANING
            if key.endswith(("_blank", "_shuffled")) or key == "control_pairs"
        ),
        *(k for k in MEANING if any(w in k for w in ("answer_tokens", "repetition", "unfinished"))),
        *("answers", "same_answers"),
        *("questions", *(key for key in MEANING if "correct" in key)),
    }
)
MODELS = ("base", "tuned")
MARGIN_QUANTILES = {f"reward_margin_p{q:02}": q / 100 for q in (5, 25, 50, 75, 95)}


def score(
    pairs: Iterable[Mapping[str, Any]], policy: pd.DataFrame, reference: pd.DataFrame, beta: float
) -> pd.DataFrame:
    """One row a pair: both models' log-probs, the rewards and the reward margin.

    ``policy`` and ``reference`` are tables of ``scoring.to_table``; rows of ``reference`` may stand
    in any order. ``base_margin`` and ``tuned_margin`` are each model's preference margin per token.

    Raises:
        ValueError: the reference lacks a pair or counted other tokens: it was made from other data.
    """
    about = pd.DataFrame(
        [{k: pair[k] for k in ("id", "group", "origin", "kind")} for pair in pairs]
    )
    logps = ["chosen_logps", "rejected_logps"]
    lengths = ["chosen_tokens", "rejected_tokens", "image_tokens"]
    table = about.merge(
        policy.rename(columns={c: f"policy_{c}" for c in logps}), on="id", validate="1:1"
    )
    table = table.merge(
        reference[["id", *logps, *lengths]].rename(
            columns={c: f"reference_{c}" for c in (*logps, *lengths)}
        ),
        on="id",
        validate="1:1",
    )
    if len(table) != len(about):
        raise ValueError(f"the reference has {len(table)} of the {len(about)} test pairs")
    for column in lengths:
        if not (table[column] == table.pop(f"reference_{column}")).all():
            raise ValueError(
                f"reference and policy differ in {column}: they were not given the same tokens"
            )
    for side in ("chosen", "rejected"):
        table[f"{side}_reward"] = statistics.implicit_reward(
            table[f"policy_{side}_logps"], table[f"reference_{side}_logps"], beta
        )
    table["reward_margin"] = statistics.reward_margin(
        table["policy_chosen_logps"],
        table["policy_rejected_logps"],
        table["reference_chosen_logps"],
        table["reference_rejected_logps"],
        beta,
    )
    for model, prefix in (("base", "reference"), ("tuned", "policy")):
        table[f"{model}_margin"] = statistics.preference_margin(
            table[f"{prefix}_chosen_logps"],
            table[f"{prefix}_rejected_logps"],
            table["chosen_tokens"],
            table["rejected_tokens"],
        )
    return table


def with_controls(scores: pd.DataFrame, controlled: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The scores with columns ``reward_margin_<way>`` and ``tuned_margin_<way>`` from scores of a
    sample of the same pairs shown another image; NaN outside the sample.
    """
    for way, table in controlled.items():
        margins = table[["id", "reward_margin", "tuned_margin"]]
        scores = scores.merge(
            margins.set_index("id").add_suffix(f"_{way}").reset_index(),
            on="id",
            how="left",
            validate="1:1",
        )
    return scores


def of_pairs(scores: pd.DataFrame, settings: Evaluate) -> dict[str, float]:
    """Metrics of scored pairs: the keys of ``MEANING`` up to those of length."""
    accuracy = {model: statistics.outcomes(scores[f"{model}_margin"]) for model in MODELS}
    summed = {
        model: statistics.outcomes(
            scores[f"{prefix}_chosen_logps"] - scores[f"{prefix}_rejected_logps"]
        )
        for model, prefix in zip(MODELS, ("reference", "policy"), strict=True)
    }
    wins = statistics.win_rate(scores["reward_margin"])
    images = scores["group"].nunique()
    low, high = statistics.wilson_interval(wins.rate * images, images, settings.confidence)
    test, test_summed = (
        statistics.mcnemar(accuracy["base"], accuracy["tuned"]),
        statistics.mcnemar(summed["base"], summed["tuned"]),
    )
    margins = statistics.summary(scores["reward_margin"], tuple(MARGIN_QUANTILES.values()))
    values: dict[str, float] = {
        "pairs": len(scores),
        "images": images,
        "win_rate_wilson_low": low,
        "win_rate_wilson_high": high,
        "ties": wins.ties,
        "accuracy_gained": test.gained,
        "accuracy_lost": test.lost,
        "accuracy_p_value": test.p_value,
        "accuracy_p_value_summed": test_summed.p_value,
    } | {name: margins.quantiles[q] for name, q in MARGIN_QUANTILES.items()}
    means = {
        "win_rate": statistics.outcomes(scores["reward_margin"]),
        "reward_margin": scores["reward_margin"],
        "chosen_logps_change": scores["policy_chosen_logps"] - scores["reference_chosen_logps"],
        "rejected_logps_change": scores["policy_rejected_logps"]
        - scores["reference_rejected_logps"],
        "base_accuracy": accuracy["base"],
        "tuned_accuracy": accuracy["tuned"],
        "accuracy_change": accuracy["tuned"] - accuracy["base"],
        "base_accuracy_summed": summed["base"],
        "tuned_accuracy_summed": summed["tuned"],
        "accuracy_change_summed": summed["tuned"] - summed["base"],
    }
    return _ordered(values | _with_intervals(means, scores["group"], settings))


def of_length(scores: pd.DataFrame, settings: Evaluate) -> dict[str, float]:
    """What length could explain of the win rate. A group with too few images has no rate, and
    nothing is fitted where no difference in length is 0 or around it.
    """
    difference = scores["chosen_tokens"] - scores["rejected_tokens"]
    values: dict[str, float] = {}
    means = {"longer_wins": statistics.outcomes(difference)}
    if scores["group"].nunique() >= ENOUGH_IMAGES and difference.min() <= 0 <= difference.max():
        control = statistics.length_control(scores["reward_margin"], difference)
        means["win_rate_without_length"] = statistics.outcomes(control.residual)
        values["win_rate_at_equal_length"] = control.logistic_rate
        values["length_explained"] = control.explained
    values |= _with_intervals(means, scores["group"], settings)
    for name, those in (
        ("chosen_shorter", scores[difference < 0]),
        ("equal_length", scores[difference == 0]),
        ("chosen_longer", scores[difference > 0]),
    ):
        values[f"pairs_{name}"] = len(those)
        if those["group"].nunique() >= ENOUGH_IMAGES:
            wins = {f"win_rate_{name}": statistics.outcomes(those["reward_margin"])}
            values |= _with_intervals(wins, those["group"], settings)
    return _ordered(values)


def of_images(scores: pd.DataFrame, settings: Evaluate) -> dict[str, float]:
    """What the win rate is when another image is shown, from the columns of ``with_controls``."""
    ways = [way for way in ("blank", "shuffled") if f"reward_margin_{way}" in scores]
    if not ways:
        return {}
    sample = scores.dropna(subset=[f"reward_margin_{way}" for way in ways])
    own = statistics.outcomes(sample["reward_margin"])
    means = {}
    for way in ways:
        other = statistics.outcomes(sample[f"reward_margin_{way}"])
        means[f"win_rate_{way}"] = other
        means[f"win_rate_over_{way}"] = own - other
        means[f"tuned_accuracy_{way}"] = statistics.outcomes(sample[f"tuned_margin_{way}"])
    values: dict[str, float] = {"control_pairs": len(sample)}
    return _ordered(values | _with_intervals(means, sample["group"], settings))


def of_answers(answers: pd.DataFrame, settings: Evaluate) -> dict[str, float]:
    """Length and repetition of both models' answers to the questions of test pairs: columns
    ``image``, and ``answer``, ``tokens`` and ``finished`` of base and tuned.
    """
    if answers.empty:
        return {}
    means: dict[str, Any] = {}
    for name, of_model in (
        ("answer_tokens", lambda model: answers[f"{model}_tokens"].astype(float)),
        ("repetition", lambda model: answers[f"{model}_answer"].map(grading.repetition)),
        ("unfinished", lambda model: 1.0 - answers[f"{model}_finished"].astype(float)),
    ):
        base, tuned = (of_model(model) for model in MODELS)
        means |= {f"base_{name}": base, f"tuned_{name}": tuned, f"{name}_change": tuned - base}
    values: dict[str, float] = {"answers": len(answers)}
    values["same_answers"] = float((answers["base_answer"] == answers["tuned_answer"]).mean())
    return _ordered(values | _with_intervals(means, answers["image"], settings))


def of_questions(graded: pd.DataFrame, settings: Evaluate) -> dict[str, float]:
    """Right answers, from graded ones: columns ``image``, ``truth``, ``base_correct``,
    ``tuned_correct``.

    Empty where the data set knows no true answers.
    """
    if graded.empty:
        return {}
    base, tuned = (graded[f"{model}_correct"].astype(float) for model in MODELS)
    test = statistics.mcnemar(base, tuned)
    means = {"base_correct": base, "tuned_correct": tuned, "correct_change": tuned - base}
    values: dict[str, float] = {
        "questions": len(graded),
        "constant_correct": float(graded["truth"].value_counts(normalize=True).max()),
        "correct_gained": test.gained,
        "correct_lost": test.lost,
        "correct_p_value": test.p_value,
    }
    return _ordered(values | _with_intervals(means, graded["image"], settings))


def _with_intervals(
    means: Mapping[str, Any], groups: "pd.Series[Any]", settings: Evaluate
) -> dict[str, float]:
    """Means with their intervals; without intervals where all rows share one image. Those of
    ``RATES`` by ``statistics.rate_bounds``.
    """
    if groups.nunique() < 2:
        return {name: float(np.mean(values)) for name, values in means.items()}
    found = statistics.bootstrap_intervals(
        means,
        groups.to_numpy(),
        seed=settings.seed,
        resamples=settings.resamples,
        level=settings.confidence,
    )
    flat: dict[str, float] = {}
    for name, interval in found.items():
        low, high = interval.low, interval.high
        if name in RATES:
            low, high = statistics.rate_bounds(interval, settings.confidence)
        flat |= {name: interval.estimate, f"{name}_low": low, f"{name}_high": high}
    return flat


def _ordered(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics in the order of ``MEANING``, each followed by its interval; 6 digits."""
    return {
        key: float(f"{values[key]:.6g}") if isinstance(values[key], float) else values[key]
        for name in MEANING
        for key in (name, f"{name}_low", f"{name}_high")
        if key in values
    }


# What people compare experiments by, under names short enough for `dvc exp show`, and where each
# comes from: the first of these that a run has.
HEADLINE = {
    "win_rate": ("win_rate",),
    "win_low": ("win_rate_low",),
    "win_high": ("win_rate_high",),
    "base_acc": ("base_accuracy",),
    "tuned_acc": ("tuned_accuracy",),
    "correct": ("tuned_correct",),
    "chosen_logps": ("chosen_logps_change",),
    "margin": ("reward_margin",),
}


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """``reports/headline.json``, DVC's metrics: at most eight numbers, of four digits."""
    return {
        short: round(metrics[key], 4)
        for short, keys in HEADLINE.items()
        for key in keys
        if key in metrics
    }


def in_words(metrics: Mapping[str, float]) -> str:
    """The headline, and a note where chosen answers lost probability, or where pairs are won
    without the image.
    """
    interval = (
        f" [{metrics['win_rate_low']:.3f}, {metrics['win_rate_high']:.3f}]"
        if "win_rate_low" in metrics
        else ""
    )
    lines = [
        f"win rate {metrics['win_rate']:.3f}{interval} on {metrics['pairs']} held-out pairs; "
        f"preference accuracy {metrics['base_accuracy']:.3f} (base) → "
        f"{metrics['tuned_accuracy']:.3f} (tuned)"
    ]
    if "questions" in metrics:
        lines.append(
            f"right answers to {metrics['questions']} held-out questions: "
            f"{metrics['base_correct']:.3f} (base) → {metrics['tuned_correct']:.3f} (tuned)"
        )
    if metrics["chosen_logps_change"] < 0:
        lines.append(
            f"note: chosen answers lost {-metrics['chosen_logps_change']:.2f} nats on average; DPO "
            "widens the margin that way too (LLaMA-Factory#7643). train.pref_ftx adds a term that "
            "holds them up"
        )
    for way, what in (("blank", "a blank image"), ("shuffled", "another pair's image")):
        if metrics.get(f"win_rate_{way}_low", 0) > 0.5:
            lines.append(
                f"note: with {what} the win rate is still {metrics[f'win_rate_{way}']:.3f}: that "
                "much needs no look at the image"
            )
    return "\n".join(lines)
