"""Settings over their seeds: what is compared, what is refused, and the words."""

import dataclasses

import pytest

from stages.core.errors import UserError
from stages.reporting import seeds
from stages.reporting.comparison import PREFERENCE, RIGHT, WIN_RATE
from tests.test_comparison import PARAMETERS, experiment, scores


def member(name, beta, seed, won, n=60, **changed):
    """An experiment that wins ``won`` of its pairs, the first ones."""
    parameters = PARAMETERS | {"train": {"beta": beta, "lora_rank": 8, "seed": seed}}
    margins = tuple(1.0 if i < won else -1.0 for i in range(n))
    return experiment(name, margins, parameters=parameters, **changed)


def setting(name, beta, won, **changed):
    return [member(f"{name}-{i}", beta, i, each, **changed) for i, each in enumerate(won)]


def test_the_mean_and_the_spread_are_those_of_the_seeds():
    found = seeds.compare([setting("cold", 0.1, (30, 36, 33))])
    win_rate = found.figures[0]
    assert win_rate.name == WIN_RATE
    assert win_rate.alone[0].estimate == pytest.approx(0.55)
    assert win_rate.alone[0].spreads[0] == pytest.approx(0.05)
    text = seeds.render(found)
    assert "3 seeds: cold-0 (0), cold-1 (1), cold-2 (2)" in text
    assert "55.0%" in text
    assert "5.0 points" in text


def test_two_settings_are_compared_with_what_seeds_and_images_add():
    found = seeds.compare([setting("cold", 0.1, (30, 30, 30)), setting("warm", 0.2, (57, 57, 57))])
    text = seeds.render(found)
    assert "train.beta  0.1 → 0.2" in text
    assert "higher in warm-0, +45.0 points" in text
    assert "Test images make 100% of the variance: more of them narrow" in text
    assert {figure.name for figure in found.figures} == {WIN_RATE, PREFERENCE}


def test_where_seeds_differ_more_than_settings_no_difference_is_told():
    found = seeds.compare([setting("cold", 0.1, (20, 50, 30)), setting("warm", 0.2, (55, 25, 45))])
    text = seeds.render(found)
    assert "no difference can be told" in text
    assert "more seeds narrow the interval, more test images hardly do" in text


def test_right_answers_are_compared_where_all_were_asked_the_same():
    asked = setting("cold", 0.1, (30, 30), right=(True, False, True))
    assert seeds.compare([asked]).figures[-1].name == RIGHT
    other = [asked[0], member("cold-1", 0.1, 1, 30, right=(True,))]
    assert seeds.compare([other]).figures[-1].name == PREFERENCE


def test_another_reference_leaves_the_win_rate_out():
    one, two = setting("cold", 0.1, (30, 30))
    moved = scores([1.0] * 30 + [-1.0] * 30).assign(
        reference_chosen_logps=-12.0, reference_rejected_logps=-12.0
    )
    found = seeds.compare([[one, dataclasses.replace(two, scores=moved)]])
    assert [figure.name for figure in found.figures] == [PREFERENCE]
    assert "references differ" in seeds.render(found)


def test_a_setting_of_one_seed_and_one_setting_twice_are_refused():
    cold = setting("cold", 0.1, (30, 31))
    with pytest.raises(UserError, match=r"only experiment of its setting .*-S train.seed=1,2,3"):
        seeds.compare([cold[:1]])
    with pytest.raises(UserError, match=r"differ in train\.seed alone"):
        seeds.compare([cold, [cold[1], cold[0]]])
    with pytest.raises(UserError, match="test pairs are not the same"):
        seeds.compare([cold, setting("warm", 0.2, (30, 31), n=61)])
