"""The numbers of ``reports/metrics.json``: what each key means, and how it follows from the scores.

Log-probs are in nats, margins and rewards in units of beta nats, shares between 0 and 1. Keys that
end in ``_low`` and ``_high`` are the interval of the key before, at ``evaluate.confidence``, by
bootstrap over images (``stages.statistics``).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from stages import statistics
from stages.params import Evaluate

# Every key of metrics.json but the _low and _high of those in WITH_INTERVAL, in the file's order.
MEANING = {
    "pairs": "test pairs scored",
    "images": "distinct images among them; the bootstrap draws these",
    "win_rate": "share of pairs whose reward margin is above 0, a tie counted half",
    "ties": "pairs whose reward margin is exactly 0",
    "reward_margin": "mean of beta·[(log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)]",
    "chosen_logps_change": "mean of (log π - log π_ref)(chosen); below 0 chosen lost probability",
    "rejected_logps_change": "mean of (log π - log π_ref)(rejected)",
    "base_accuracy": "share of pairs where the base gives chosen the higher log-prob per token",
    "tuned_accuracy": "the same share for the tuned model",
    "accuracy_change": "tuned_accuracy - base_accuracy, pair by pair",
    "accuracy_gained": "pairs that the tuned model orders better than the base",
    "accuracy_lost": "pairs that it orders worse",
    "accuracy_p_value": "exact two-sided McNemar test that gained and lost are equally likely",
    "base_accuracy_summed": "as base_accuracy, by summed log-prob, which favours short answers",
    "tuned_accuracy_summed": "as tuned_accuracy, by summed log-prob",
    "longer_wins": "share of pairs whose chosen has more tokens: what preferring length scores",
    "questions": "held-out questions with known answers that both models answered",
    "base_correct": "share of them that the base answers correctly",
    "tuned_correct": "share that the tuned model answers correctly",
    "correct_change": "tuned_correct - base_correct, question by question",
}
WITH_INTERVAL = (
    "win_rate",
    "reward_margin",
    "chosen_logps_change",
    "rejected_logps_change",
    "base_accuracy",
    "tuned_accuracy",
    "accuracy_change",
    "base_correct",
    "tuned_correct",
    "correct_change",
)
QUESTION_KEYS = ("questions", "base_correct", "tuned_correct", "correct_change")


def score(
    pairs: Iterable[Mapping[str, Any]], policy: pd.DataFrame, reference: pd.DataFrame, beta: float
) -> pd.DataFrame:
    """One row a pair: both models' log-probs, the rewards and the reward margin.

    ``policy`` and ``reference`` have columns ``id``, ``chosen_logps``, ``rejected_logps``,
    ``chosen_tokens``, ``rejected_tokens``; rows of ``reference`` may stand in any order.

    Raises:
        ValueError: the reference lacks a pair or counted other tokens: it was made from other data.
    """
    about = pd.DataFrame(
        [{k: pair[k] for k in ("id", "group", "origin", "kind")} for pair in pairs]
    )
    logps = ["chosen_logps", "rejected_logps"]
    lengths = ["chosen_tokens", "rejected_tokens"]
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
    return table


def of_pairs(scores: pd.DataFrame, settings: Evaluate) -> dict[str, float]:
    """Metrics of scored pairs: every key of ``MEANING`` but the ``QUESTION_KEYS``."""
    accuracy = {
        model: statistics.outcomes(
            statistics.preference_margin(
                scores[f"{prefix}_chosen_logps"],
                scores[f"{prefix}_rejected_logps"],
                scores["chosen_tokens"],
                scores["rejected_tokens"],
            )
        )
        for model, prefix in (("base", "reference"), ("tuned", "policy"))
    }
    summed = {
        model: statistics.win_rate(
            scores[f"{prefix}_chosen_logps"] - scores[f"{prefix}_rejected_logps"]
        )
        for model, prefix in (("base", "reference"), ("tuned", "policy"))
    }
    wins = statistics.win_rate(scores["reward_margin"])
    test = statistics.mcnemar(accuracy["base"], accuracy["tuned"])
    values: dict[str, float] = {
        "pairs": len(scores),
        "images": scores["group"].nunique(),
        "ties": wins.ties,
        "accuracy_gained": test.gained,
        "accuracy_lost": test.lost,
        "accuracy_p_value": test.p_value,
        "base_accuracy_summed": summed["base"].rate,
        "tuned_accuracy_summed": summed["tuned"].rate,
        "longer_wins": statistics.longer_wins(
            scores["chosen_tokens"], scores["rejected_tokens"]
        ).rate,
    }
    means = {
        "win_rate": statistics.outcomes(scores["reward_margin"]),
        "reward_margin": scores["reward_margin"],
        "chosen_logps_change": scores["policy_chosen_logps"] - scores["reference_chosen_logps"],
        "rejected_logps_change": scores["policy_rejected_logps"]
        - scores["reference_rejected_logps"],
        "base_accuracy": accuracy["base"],
        "tuned_accuracy": accuracy["tuned"],
        "accuracy_change": accuracy["tuned"] - accuracy["base"],
    }
    return _ordered(values | _with_intervals(means, scores["group"], settings))


def of_questions(graded: pd.DataFrame, settings: Evaluate) -> dict[str, float]:
    """The ``QUESTION_KEYS`` from graded answers: columns ``image``, ``base_correct``,
    ``tuned_correct``.

    Empty where the data set knows no true answers.
    """
    if graded.empty:
        return {}
    means = {
        "base_correct": graded["base_correct"].astype(float),
        "tuned_correct": graded["tuned_correct"].astype(float),
        "correct_change": graded["tuned_correct"].astype(float)
        - graded["base_correct"].astype(float),
    }
    values: dict[str, float] = {"questions": len(graded)}
    return _ordered(values | _with_intervals(means, graded["image"], settings))


def _with_intervals(
    means: Mapping[str, Any], groups: "pd.Series[Any]", settings: Evaluate
) -> dict[str, float]:
    """Means with their intervals; without intervals where all rows share one image."""
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
        flat |= {
            name: interval.estimate,
            f"{name}_low": interval.low,
            f"{name}_high": interval.high,
        }
    return flat


def _ordered(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics in the order of ``MEANING``, each followed by its interval; 6 digits."""
    return {
        key: float(f"{values[key]:.6g}") if isinstance(values[key], float) else values[key]
        for name in MEANING
        for key in (name, f"{name}_low", f"{name}_high")
        if key in values
    }


def in_words(metrics: Mapping[str, float]) -> str:
    """The headline, and a warning where the chosen answers lost probability."""
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
    return "\n".join(lines)
