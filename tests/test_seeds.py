"""Settings over their seeds: what is compared, what is refused, and the words."""

import dataclasses

import pytest

from stages.commands.seeds import over_seeds
from stages.core.errors import UserError
from tests.test_comparison import PARAMETERS, experiment, scores


def member(name, beta, seed, won, n=60, **changed):
    """An experiment that wins ``won`` of its pairs, the first ones."""
    parameters = PARAMETERS | {"train": {"beta": beta, "lora_rank": 8, "seed": seed}}
    margins = tuple(1.0 if i < won else -1.0 for i in range(n))
    return experiment(name, margins, parameters=parameters, **changed)


def setting(name, beta, won, **changed):
    return [member(f"{name}-{i}", beta, i, each, **changed) for i, each in enumerate(won)]


def test_the_mean_and_the_spread_are_those_of_the_seeds():
    text = over_seeds([setting("cold", 0.1, (30, 36, 33))])
    assert "3 seeds: cold-0 (0), cold-1 (1), cold-2 (2)" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| win rate"))
    assert [cell.strip() for cell in row.split("|")][2:6] == ["60", "cold-0", "55.0%", "5.0 points"]
    assert "- win rate over the base: 55.0% [" in text
    assert "right answers" not in text


@pytest.mark.parametrize(
    ("cold", "warm", "told", "chance"),
    [
        (
            (30, 30, 30),
            (57, 57, 57),
            "higher in warm-0, +45.0 points",
            "Seeds make 0% of the variance, test images the rest: more test images narrow",
        ),
        ((20, 50, 30), (55, 25, 45), "no difference can be told", "more seeds narrow the interval"),
    ],
)
def test_two_settings_are_compared_with_what_seeds_and_images_add(cold, warm, told, chance):
    text = over_seeds([setting("cold", 0.1, cold), setting("warm", 0.2, warm)])
    assert "train.beta  0.1 → 0.2" in text
    for measure in ("win rate over the base", "preference accuracy"):
        (line,) = (line for line in text.splitlines() if line.startswith(f"- {measure}"))
        assert told in line
        assert chance in line


def test_right_answers_are_compared_where_all_were_asked_the_same():
    asked = setting("cold", 0.1, (30, 30), right=(True, False, True))
    assert "- right answers: " in over_seeds([asked])
    other = over_seeds([[asked[0], member("cold-1", 0.1, 1, 30, right=(True,))]])
    assert "- Note: right answers are left out" in other


def test_another_reference_leaves_the_win_rate_out():
    one, two = setting("cold", 0.1, (30, 30))
    moved = scores([1.0] * 30 + [-1.0] * 30).assign(
        reference_chosen_logps=-12.0, reference_rejected_logps=-12.0
    )
    text = over_seeds([[one, dataclasses.replace(two, scores=moved)]])
    assert "- preference accuracy" in text
    assert "- win rate over" not in text
    assert "references differ" in text


def test_a_setting_of_one_seed_and_one_setting_twice_are_refused():
    cold = setting("cold", 0.1, (30, 31))
    with pytest.raises(UserError, match=r"only experiment of its setting .*make seeds N=3"):
        over_seeds([cold[:1]])
    with pytest.raises(UserError, match=r"differ in train\.seed alone"):
        over_seeds([cold, [cold[1], cold[0]]])
    with pytest.raises(UserError, match="are not the same"):
        over_seeds([cold, setting("warm", 0.2, (30, 31), n=61)])
