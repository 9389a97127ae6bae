"""The numbers of metrics.json, held against sums done by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stages.answers import off_policy
from stages.core.errors import UserError
from stages.evaluation import catalogue, metrics, statistics
from stages.evaluation.catalogue import HEADLINE, KEYS, METRICS
from stages.params.params import Evaluate, Generation

SETTINGS = Evaluate(
    confidence=0.95,
    resamples=500,
    seed=0,
    controls=0,
    lm_eval={},
    task_files=Path("tasks"),
    generation=Generation(prompts=0, questions=0, max_new_tokens=8, engine="transformers"),
)
BETA = 0.5
PAIRS = [
    {"id": name, "group": group, "origin": "o", "kind": "k", "messages": []}
    for name, group in (("a", "g1"), ("b", "g1"), ("c", "g2"), ("d", "g3"))
]
# Answers of 5 and 4 tokens, but d's: 2 and 4.
LENGTHS = {
    "chosen_tokens": [5, 5, 5, 2],
    "rejected_tokens": [4, 4, 4, 4],
    "image_tokens": [16, 16, 16, 20],
}
REFERENCE = pd.DataFrame(
    {
        "id": list("abcd"),
        "chosen_logps": [-10.0, -10.0, -10.0, -8.0],
        "rejected_logps": [-10.0, -4.0, -8.0, -8.0],
    }
    | LENGTHS
)
# Changes by training: chosen +2, 0, -3, -1; rejected -1, 0, 0, -4.
POLICY = pd.DataFrame(
    {
        "id": list("abcd"),
        "chosen_logps": [-8.0, -10.0, -13.0, -9.0],
        "rejected_logps": [-11.0, -4.0, -8.0, -12.0],
    }
    | LENGTHS
)


@pytest.fixture
def scores():
    return metrics.score(PAIRS, POLICY, REFERENCE, BETA)


def test_rewards_and_margins_by_hand(scores):
    assert list(scores["id"]) == list("abcd")
    assert list(scores["chosen_reward"]) == [1.0, 0.0, -1.5, -0.5]
    assert list(scores["rejected_reward"]) == [-0.5, 0.0, 0.0, -2.0]
    assert list(scores["reward_margin"]) == [1.5, 0.0, -1.5, 1.5]


def test_metrics_by_hand(scores):
    found = metrics.of_pairs(scores, SETTINGS)
    assert found["pairs"] == 4
    assert found["images"] == 3
    assert found["win_rate"] == (2 + 0.5) / 4  # b is a tie
    assert found["ties"] == 1
    assert found["reward_margin"] == 1.5 / 4
    assert found["chosen_logps_change"] == -2 / 4
    assert found["rejected_logps_change"] == -5 / 4
    # Per token, base: -2 > -2.5; -2 < -1; -2 = -2 (a tie); -4 < -2.
    assert found["base_accuracy"] == (1 + 0 + 0.5 + 0) / 4
    # Tuned: -1.6 > -2.75; -2 < -1; -2.6 < -2; -4.5 < -3.
    assert found["tuned_accuracy"] == 1 / 4
    assert found["accuracy_change"] == -0.5 / 4
    assert (found["accuracy_gained"], found["accuracy_lost"]) == (0, 1)
    assert found["accuracy_p_value"] == 1.0


def many(images, differences, margins):
    """Scores of one pair an image, as far as ``of_length`` reads them."""
    tokens = {"chosen_tokens": 5 + pd.Series(differences), "rejected_tokens": 5}
    groups = [f"g{i}" for i in range(images)]
    return pd.DataFrame({"group": groups, "reward_margin": margins, **tokens})


def test_length_controls_by_hand():
    found = metrics.of_length(many(29, [-1] * 10 + [0] * 10 + [1] * 9, [1.0] * 29), SETTINGS)
    assert found["longer_wins"] == pytest.approx((9 + 5) / 29, abs=1e-6)
    # Margins that are exactly the difference in length, and nothing else.
    differences = [-2, -1, 1, 2, 3] * 4
    found = metrics.of_length(many(20, differences, [float(d) for d in differences]), SETTINGS)
    assert found["win_rate_without_length"] == 0.5  # every remainder is a tie


def test_rates_of_few_images_and_rates_of_one_have_wilsons_interval(scores):
    found = metrics.of_pairs(scores, SETTINGS)
    expected = statistics.wilson_interval(0.625 * 3, 3)  # each image one trial
    ends = (found["win_rate_low"], found["win_rate_high"])
    assert ends == pytest.approx(expected, abs=1e-6)
    found = metrics.of_pairs(scores.assign(reward_margin=1.0), SETTINGS)
    assert found["win_rate"] == found["win_rate_high"] == 1.0
    assert found["win_rate_low"] == pytest.approx(statistics.wilson_interval(3, 3)[0], abs=1e-6)


def shown_other(scores):
    """Pairs a and c again: a ties with a grey image, and c wins with another pair's."""
    sample = scores[scores["id"].isin(["a", "c"])]
    return metrics.with_controls(
        scores,
        {
            "blank": sample.assign(reward_margin=[0.0, -1.0], tuned_margin=[1.0, -1.0]),
            "shuffled": sample.assign(reward_margin=[1.0, 1.0], tuned_margin=[-1.0, -1.0]),
        },
    )


def test_image_controls_compare_the_same_pairs(scores):
    table = shown_other(scores)
    assert list(table["reward_margin_blank"].isna()) == [False, True, False, True]
    found = metrics.of_images(table, SETTINGS)
    assert found["control_pairs"] == 2
    assert found["win_rate_blank"] == 0.25
    assert found["win_rate_over_blank"] == 0.25  # a: 1 - 0.5; c: 0 - 0
    assert found["win_rate_shuffled"] == 1.0
    assert found["win_rate_over_shuffled"] == -0.5
    assert found["tuned_accuracy_blank"] == 0.5
    assert found["tuned_accuracy_shuffled"] == 0.0
    assert metrics.of_images(scores, SETTINGS) == {}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (REFERENCE.iloc[1:], "3 of the 4 test pairs"),
        *((REFERENCE.assign(**{c: REFERENCE[c] + [0, 0, 1, 0]}), c) for c in LENGTHS),
    ],
)
def test_a_reference_of_other_pairs_or_tokens_is_refused(reference, message):
    with pytest.raises(UserError, match=rf"{message}.*dvc repro -f reference baseline"):
        metrics.score(PAIRS, POLICY, reference, BETA)


GRADED = pd.DataFrame(
    {
        "image": ["g1", "g1", "g2"],
        "truth": ["no", "red", "no"],
        "base_correct": [True, False, False],
        "tuned_correct": [True, True, False],
    }
)
ANSWERED = pd.DataFrame(
    {
        "image": ["g1", "g2"],
        "base_answer": ["a red shape", "so so so so so so"],
        "tuned_answer": ["a red shape", "it is teal"],
        "base_tokens": [3, 24],
        "tuned_tokens": [3, 4],
        "base_finished": [True, False],
        "tuned_finished": [True, True],
    }
)


def test_right_answers_are_counted():
    found = metrics.of_questions(GRADED, SETTINGS)
    assert found["questions"] == 3
    assert found["base_correct"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["tuned_correct"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["correct_change"] == pytest.approx(1 / 3, abs=1e-6)
    assert (found["correct_gained"], found["correct_lost"]) == (1, 0)
    assert found["constant_correct"] == pytest.approx(2 / 3, abs=1e-6)  # always "no"
    assert found["correct_p_value"] == 1.0
    assert metrics.of_questions(GRADED.iloc[:0], SETTINGS) == {}


def test_validation_pairs_have_the_same_measures_to_choose_by(scores):
    found, test = metrics.of_validation(scores, SETTINGS), metrics.of_pairs(scores, SETTINGS)
    assert found["val_pairs"] == 4
    for key in ("win_rate", "win_rate_low", "base_accuracy", "tuned_accuracy"):
        assert found[f"val_{key}"] == test[key]


def test_answers_are_measured():
    found = metrics.of_answers(ANSWERED, SETTINGS)
    assert found["answers"] == 2
    assert (found["base_answer_tokens"], found["tuned_answer_tokens"]) == (13.5, 3.5)
    # "so" six times: three 4-grams, all the same, so two of three were said before.
    assert found["base_repetition"] == pytest.approx((0 + 2 / 3) / 2, abs=1e-6)
    assert found["tuned_repetition"] == 0
    assert (found["base_unfinished"], found["tuned_unfinished"]) == (0.5, 0.0)
    assert found["answer_tokens_change"] == -10
    assert found["repetition_change"] == pytest.approx(-1 / 3, abs=1e-6)
    assert found["unfinished_change"] == -0.5
    assert found["same_answers"] == 0.5
    assert metrics.of_answers(ANSWERED.iloc[:0], SETTINGS) == {}


@pytest.fixture
def all_metrics(scores):
    judged = {name: statistics.outcomes([1, -1, 1, 1]) for name in ("first_words", "bag_of_words")}
    counts = dict.fromkeys(
        (
            *("audited_pairs", "contradictory_pairs", "audited_images", "near_duplicate_images"),
            "seen_text_pairs",
        ),
        0,
    )
    enough = many(30, [-1] * 10 + [0] * 10 + [1] * 10, [1.0] * 30)
    return (
        metrics.of_pairs(scores, SETTINGS)
        | metrics.of_split(scores, SETTINGS)
        | metrics.of_length(enough, SETTINGS)
        | metrics.of_shortcuts(judged, counts, scores["group"], SETTINGS)
        | off_policy.figures(pd.DataFrame({"chosen": [-1.0], "rejected": [-2.0], "own": [0.0]}))
        | metrics.of_images(shown_other(scores), SETTINGS)
        | metrics.of_answers(ANSWERED, SETTINGS)
        | metrics.of_questions(GRADED, SETTINGS)
        | metrics.of_validation(scores, SETTINGS)
    )


def test_what_the_data_show_and_give_away(scores):
    split = pd.DataFrame({"group": range(800), "base_margin": np.tile([1.0, -1.0], 400)})
    found = metrics.of_split(split, SETTINGS)
    assert found["independent_pairs"] == 800
    assert found["win_rate_detectable"] == pytest.approx(0.0493, abs=1e-4)
    assert metrics.of_split(split.assign(group="g"), SETTINGS) == {}
    judged = {"bag_of_words": np.array([1.0, 1.0, 0.5, 0.0])}
    found = metrics.of_shortcuts(judged, {"audited_pairs": 9}, ["a", "b", "c", "d"], SETTINGS)
    assert (found["bag_of_words_wins"], found["audited_pairs"]) == (0.625, 9)


def test_the_catalogue_has_every_key_in_its_order_and_no_other(all_metrics):
    assert tuple(all_metrics) == KEYS


def test_a_metric_that_the_catalogue_lacks_is_an_error():
    judged = {"bag_of_words": [1.0, 0.0]}
    with pytest.raises(KeyError, match="audited_words has no entry in evaluation/catalogue"):
        metrics.of_shortcuts(judged, {"audited_words": 1}, ["a", "b"], SETTINGS)


def test_what_a_run_can_lack_says_what_it_needs(scores, all_metrics):
    least = metrics.of_pairs(scores, SETTINGS) | metrics.of_length(scores, SETTINGS)
    least |= {key: all_metrics[key] for key in METRICS if key.endswith("_words_wins")}
    least |= {
        key: 0
        for key in METRICS
        if key.startswith(("audited_", "contradictory_", "near_", "seen_"))
    }
    assert set(least) & set(METRICS) == {m.key for m in METRICS.values() if not m.needs}


def test_one_image_gives_no_intervals_instead_of_a_crash(scores):
    found = metrics.of_pairs(scores.assign(group="g1"), SETTINGS)
    assert found["images"] == 1
    assert found["win_rate"] == 0.625
    assert not [key for key in found if key.endswith(("_low", "_high"))]
    assert "chosen-versus-rejected win rate 62.5% of 4 held-out pairs" in catalogue.in_words(found)


def test_the_headline_has_four_digits_and_falls_back_on_lm_evals_first_task(all_metrics):
    found = metrics.headline(all_metrics)
    assert tuple(found) == tuple(HEADLINE)
    assert found["correct"] == round(all_metrics["tuned_correct"], 4)
    without = {key: value for key, value in all_metrics.items() if "correct" not in key}
    assert "correct" not in metrics.headline(without)
    tasks = {
        f"lm_eval/{task}/{metric}/{what}": value
        for task, metric, value in (("a", "acc", 0.71234), ("a", "f1", 0.2), ("b", "acc", 0.3))
        for what in ("base", "tuned", "change")
    }
    assert metrics.headline(without | tasks)["correct"] == 0.7123
    assert metrics.headline(all_metrics | tasks) == found
