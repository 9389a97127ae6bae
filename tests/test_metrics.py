"""The numbers of metrics.json, held against sums done by hand."""

import math

import pandas as pd
import pytest

from stages import metrics
from stages.params import Evaluate, Generation

SETTINGS = Evaluate(
    confidence=0.95,
    resamples=500,
    seed=0,
    generation=Generation(prompts=0, questions=0, max_new_tokens=8),
)
BETA = 0.5
PAIRS = [
    {"id": name, "group": group, "origin": "o", "kind": "k", "messages": []}
    for name, group in (("a", "g1"), ("b", "g1"), ("c", "g2"), ("d", "g3"))
]
# Answers of 5 and 4 tokens, but d's: 2 and 4.
LENGTHS = {"chosen_tokens": [5, 5, 5, 2], "rejected_tokens": [4, 4, 4, 4]}
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
    # Summed, base: a and d tie, b and c lose; tuned: a and d win.
    assert found["base_accuracy_summed"] == (0.5 + 0.5) / 4
    assert found["tuned_accuracy_summed"] == 2 / 4
    assert found["longer_wins"] == 3 / 4


def test_the_order_of_the_reference_is_of_no_matter(scores):
    shuffled = pd.concat(
        [REFERENCE.iloc[::-1], REFERENCE.assign(id=[f"train {i}" for i in range(4)])]
    )
    pd.testing.assert_frame_equal(metrics.score(PAIRS, POLICY, shuffled, BETA), scores)


def test_a_reference_that_lacks_a_pair_is_refused():
    with pytest.raises(ValueError, match="3 of the 4 test pairs"):
        metrics.score(PAIRS, POLICY, REFERENCE.iloc[1:], BETA)


@pytest.mark.parametrize("column", list(LENGTHS))
def test_a_reference_of_other_tokens_is_refused(column):
    other = REFERENCE.assign(**{column: REFERENCE[column] + [0, 0, 1, 0]})
    with pytest.raises(ValueError, match=column):
        metrics.score(PAIRS, POLICY, other, BETA)


def test_a_reference_that_knows_a_pair_twice_is_refused():
    twice = pd.concat([REFERENCE, REFERENCE.iloc[:1]])
    with pytest.raises(ValueError, match="not"):
        metrics.score(PAIRS, POLICY, twice, BETA)


def test_an_untrained_policy_ties_everywhere():
    found = metrics.of_pairs(metrics.score(PAIRS, REFERENCE, REFERENCE, BETA), SETTINGS)
    assert (found["win_rate"], found["ties"], found["reward_margin"]) == (0.5, 4, 0.0)
    assert found["accuracy_change"] == 0


GRADED = pd.DataFrame(
    {
        "image": ["g1", "g1", "g2"],
        "base_correct": [True, False, False],
        "tuned_correct": [True, True, False],
    }
)


def test_right_answers_are_counted():
    found = metrics.of_questions(GRADED, SETTINGS)
    assert found["questions"] == 3
    assert found["base_correct"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["tuned_correct"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["correct_change"] == pytest.approx(1 / 3, abs=1e-6)
    assert metrics.of_questions(GRADED.iloc[:0], SETTINGS) == {}


def test_every_key_has_a_meaning_and_every_meaning_a_key_in_its_order(scores):
    found = metrics.of_pairs(scores, SETTINGS) | metrics.of_questions(GRADED, SETTINGS)
    bare = [key for key in found if not key.endswith(("_low", "_high"))]
    assert bare == list(metrics.MEANING)
    bounds = {key for key in found if key.endswith(("_low", "_high"))}
    assert bounds == {f"{key}_{end}" for key in metrics.WITH_INTERVAL for end in ("low", "high")}
    assert set(metrics.QUESTION_KEYS) == set(metrics.of_questions(GRADED, SETTINGS)) - bounds


def test_values_are_plain_numbers_within_their_intervals(scores):
    found = metrics.of_pairs(scores, SETTINGS) | metrics.of_questions(GRADED, SETTINGS)
    assert all(type(value) in (int, float) for value in found.values()), found
    for key in metrics.WITH_INTERVAL:
        assert found[f"{key}_low"] <= found[key] <= found[f"{key}_high"]


def test_one_image_gives_no_intervals_instead_of_a_crash(scores):
    found = metrics.of_pairs(scores.assign(group="g1"), SETTINGS)
    assert found["images"] == 1
    assert found["win_rate"] == 0.625
    assert not [key for key in found if key.endswith(("_low", "_high"))]
    assert "win rate 0.625 on 4 held-out pairs" in metrics.in_words(found)


def test_in_words_gives_the_headline_and_warns_when_chosen_answers_fall(scores):
    found = metrics.of_pairs(scores, SETTINGS) | metrics.of_questions(GRADED, SETTINGS)
    words = metrics.in_words(found)
    low, high = found["win_rate_low"], found["win_rate_high"]
    assert f"win rate 0.625 [{low:.3f}, {high:.3f}] on 4 held-out pairs" in words
    assert "3 held-out questions: 0.333 (base) → 0.667 (tuned)" in words
    assert "lost 0.50 nats" in words
    assert "train.pref_ftx" in words


def test_in_words_does_not_warn_when_they_rise(scores):
    rising = POLICY.assign(chosen_logps=REFERENCE["chosen_logps"] + 1)
    found = metrics.of_pairs(metrics.score(PAIRS, rising, REFERENCE, BETA), SETTINGS)
    assert math.isclose(found["chosen_logps_change"], 1.0)
    assert "lost" not in metrics.in_words(found)
