"""Two experiments side by side: differences, refusals and words, by hand."""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stages.answers.task_results import Results
from stages.commands import compare, seeds
from stages.commands.compare import CHOSEN, PREFERENCE, RIGHT, WIN_RATE, Experiment
from stages.core.errors import UserError
from stages.evaluation import paired, statistics
from stages.evaluation.paired import Change
from stages.params.params import flattened
from tests.test_lm_eval import results_of
from tests.test_metrics import SETTINGS

PARAMETERS: dict[str, Any] = {
    "evaluate": {"confidence": 0.95, "resamples": 500, "seed": 0},
    "train": {"beta": 0.1, "lora_rank": 8},
}
MARGINS = (1.0, 2.0, -1.0, -2.0)
MOVED = (1.0, 2.0, 3.0, -2.0)  # one lost pair is won


def row(number: int, **content: str) -> dict[str, Any]:
    texts = {"question": f"q{number}?", "chosen": f"yes {number}", "rejected": f"no {number}"}
    texts |= content
    return {
        "id": f"id{number}",
        "group": f"image{number}",
        "messages": [{"role": "user", "content": f"<image>{texts['question']}"}],
        "chosen": {"role": "assistant", "content": texts["chosen"]},
        "rejected": {"role": "assistant", "content": texts["rejected"]},
        "images": [f"image{number}.jpg"],
    }


def scores(margins: tuple[float, ...] = MARGINS, **changed: Any) -> pd.DataFrame:
    """Pairs of those margins in nats; the reference gives -10 and -10, chosen goes up by 1."""
    n = len(margins)
    return pd.DataFrame(
        {
            "id": [f"id{i}" for i in range(n)],
            "group": [f"image{i}" for i in range(n)],
            "policy_chosen_logps": -9.0,
            "policy_rejected_logps": [-9.0 - m for m in margins],
            "reference_chosen_logps": -10.0,
            "reference_rejected_logps": -10.0,
            "chosen_tokens": 4,
            "rejected_tokens": 4,
            "tuned_margin": [m / 4 for m in margins],
        }
    ).assign(**changed)


def answers(right: tuple[bool, ...]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "id": [f"q{i}" for i in range(len(right))] + ["id0"],
            "of": ["question"] * len(right) + ["pair"],
            "image": [f"other{i}" for i in range(len(right))] + ["image0"],
            "question": ["what?"] * len(right) + ["q0?"],
            "truth": ["red"] * len(right) + [None],
            "tuned_correct": [*right, None],
        }
    )


def experiment(
    name: str = "main",
    margins: tuple[float, ...] = MARGINS,
    right: tuple[bool, ...] = (),
    parameters: dict[str, Any] | None = None,
    **changes: Any,
) -> Experiment:
    made = Experiment(
        name=name,
        commit="abc1234",
        parameters=flattened(parameters or PARAMETERS),
        scores=scores(margins),
        answers=answers(right),
        probed=Results({}, {}),
        pairs=[row(i) for i in range(len(margins))],
    )
    return dataclasses.replace(made, **changes)


def named(before: Experiment, after: Experiment) -> dict[str, Change]:
    return {each.name: each.change for each in compare.measures(before, after)[0]}


# the figures


def test_differences_are_after_minus_before_pair_by_pair():
    before, after = experiment(right=(True, False)), experiment(margins=MOVED, right=(False, True))
    found = named(before, after)
    wins = found[WIN_RATE]
    assert (wins.before, wins.after, wins.difference) == (0.5, 0.75, 0.25)
    assert (wins.gained, wins.lost, wins.p_value) == (1, 0, 1.0)
    assert found[PREFERENCE].difference == 0.25
    assert found[RIGHT].difference == found[CHOSEN].difference == 0


def test_the_interval_is_the_bootstrap_of_the_difference_with_the_settings_of_the_parameters():
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=60), rng.normal(0.5, size=60)
    before, after = experiment(margins=tuple(first)), experiment(margins=tuple(second))
    found = named(before, after)[WIN_RATE]
    gap = statistics.outcomes(second) - statistics.outcomes(first)
    groups = [f"image{i}" for i in range(60)]
    expected = statistics.bootstrap_intervals({"gap": gap}, groups, before.settings)["gap"]
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    shuffled = dataclasses.replace(after, scores=after.scores.sample(frac=1, random_state=0))
    assert named(before, shuffled)[WIN_RATE] == found


def test_another_beta_changes_neither_the_win_rate_nor_a_margin_that_is_shown():
    stronger = {**PARAMETERS, "train": {"beta": 0.4, "lora_rank": 8}}
    same = compare.render(experiment(), experiment(margins=MOVED))
    other = compare.render(experiment(), experiment(margins=MOVED, parameters=stronger))
    assert "    none\n" in same
    assert other == same.replace("    none\n", "    train.beta  0.1 → 0.4\n")
    assert "    margin    -1.000 → +3.000\n" in same


def test_against_another_reference_only_figures_without_reference_are_given():
    before = experiment()
    near = experiment(scores=scores(reference_chosen_logps=-9.9985))  # of 10 nats: rounding
    far = experiment(scores=scores(reference_rejected_logps=[-10, -10.5, -10, -10]))
    assert WIN_RATE in named(before, near)
    assert list(named(before, far)) == [PREFERENCE]
    text = compare.render(before, far)
    assert "Note: win rates and changes of log-probs are left out, because the ref" in text
    assert "## Pairs" not in text


@pytest.mark.parametrize(
    ("lost", "n", "images", "interval"),
    [
        (4, 400, 400, True),  # the bootstrap leaves 0 out, but McNemar's p is 0.125
        (1, 799, 799, True),  # it ends at 0, not a rounding error before it
        (4, 4, 1, False),  # all pairs are of one image
    ],
)
def test_few_pairs_lost_and_none_gained_are_no_difference(lost, n, images, interval):
    before, after = np.ones(n), np.ones(n)
    after[:lost] = 0
    how = SETTINGS.model_copy(update={"resamples": 4000})
    columns, labels = {"wins": (before, after)}, np.arange(n) % images
    found = paired.changes(columns, labels, how, tested=["wins"])["wins"]
    assert (found.low is not None) is interval
    assert (found.high == 0) is (lost == 1)
    assert statistics.direction(found.low, found.high, found.p_value) == "unclear"


def test_flips_are_sorted_by_size_counted_and_ten_are_shown():
    before = experiment(margins=(-1.0, 0.0, 2.0, 1.0, -5.0))
    after = experiment(margins=(1.0, 0.5, -9.0, 0.5, -1.0))
    assert compare.flips(before, after) == {
        "gained": [(row(0), -1.0, 1.0), (row(1), 0.0, 0.5)],  # a tie becomes a win
        "lost": [(row(2), 2.0, -9.0)],
    }
    margins = tuple(float(i + 1) for i in range(12))
    all_lost = experiment(margins=tuple(-m for m in margins))
    text = compare.render(experiment(margins=margins), all_lost)
    assert "Pairs lost in chosen-versus-rejected win rate: 12, the 10 largest changes" in text
    assert text.count("    pair ") == 10
    assert "id11" in text  # the largest
    assert "    pair      id0\n" not in text


# the page


def cells(text: str, name: str) -> list[str]:
    """Of the row of a table that begins with this name."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip().replace("\N{MINUS SIGN}", "-") for cell in line.split("|")[2:-1]]


def answered(values: list[float], of: str = "i") -> Results:
    """One task ``t`` with a metric of those values, each of its own image."""
    return results_of({"acc": values}, [f"{of}{i}" for i in range(len(values))])


def test_a_row_has_both_figures_their_difference_and_whether_it_can_be_told():
    before = experiment(
        margins=(1.0,) * 20 + (-1.0,) * 20, probed=answered([0.0] * 20 + [1.0] * 20)
    )
    after = experiment(margins=(1.0,) * 40, probed=answered([1.0] * 40))
    text = compare.render(before, after)
    rows, old, new, difference, _, *rest = cells(text, "chosen-versus-rejected win rate")
    assert (rows, old, new, difference) == ("40", "50.0%", "100.0%", "+50.0 points")
    assert rest == ["20", "0", "< 0.001", "higher"]
    assert cells(text, CHOSEN)[-4:] == ["", "", "", "unclear"]
    assert cells(text, "t acc")[3] == "+0.500"
    assert cells(compare.render(after, before), "t acc")[-1] == "lower"
    one_image = [dataclasses.replace(e, scores=e.scores.assign(group="g")) for e in (before, after)]
    assert cells(compare.render(*one_image), PREFERENCE)[4:] == [
        *("none", "20", "0", "< 0.001", "unclear")
    ]
    other = compare.render(before, experiment(margins=(1.0,) * 40, probed=answered([1.0], of="x")))
    assert "t: left out, because the two answered different documents" in other
    assert "lm-eval" not in other


def test_data_can_not_break_the_page_or_reach_the_terminal():
    nasty = "a\n\n# heading\x1b[31m | ```" + "x" * 500
    rows = [row(i, question=nasty, chosen="<b>c</b>", rejected="r") for i in range(4)]
    text = compare.render(experiment(pairs=rows), experiment(margins=MOVED, pairs=rows))
    assert "\x1b" not in text
    shown = [line for line in text.splitlines() if "heading" in line]
    assert shown
    assert all(line.startswith("    question") and len(line) < 250 for line in shown)
    assert all(line.startswith("    ") for line in text.splitlines() if "<b>" in line)
    found, _ = compare.measures(experiment(), experiment())
    table = compare.table([dataclasses.replace(found[0], name="a | b\n")], "95%")
    assert len(table.splitlines()) == 3
    assert {line.replace("\\|", "").count("|") for line in table.splitlines()} == {11}


# refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {
                "name": "split",
                "margins": (1.0, 2.0),
                "parameters": PARAMETERS | {"preprocess": {"split_key": "b"}},
            },
            r"pairs of main \(4\) and split \(2\) are not the same.*differ in preprocess.split_key",
        ),
        ({"pairs": [row(i, chosen="other") for i in range(4)]}, "none of them: the data changed"),
        ({"scores": scores(chosen_tokens=5)}, "not the same in texts, images and tokens"),
        ({"pairs": [row(7)]}, "of different runs; `dvc repro`"),
    ],
)
def test_other_pairs_and_files_of_different_runs_are_refused(changed, message):
    with pytest.raises(UserError, match=message):
        compare.measures(experiment(), experiment(**changed))


# over seeds


def setting(name, beta, won, n=60, **changed):
    """Experiments of different seeds that win so many of their pairs, the first ones."""
    return [
        experiment(
            f"{name}-{seed}",
            tuple(1.0 if i < each else -1.0 for i in range(n)),
            parameters=PARAMETERS | {"train": {"beta": beta, "lora_rank": 8, "seed": seed}},
            **changed,
        )
        for seed, each in enumerate(won)
    ]


def test_the_mean_and_the_spread_are_those_of_the_seeds():
    text = seeds.over_seeds([setting("cold", 0.1, (30, 36, 33))])
    assert "3 seeds: cold-0 (0), cold-1 (1), cold-2 (2)" in text
    assert cells(text, "chosen-versus-rejected win rate")[:4] == [
        "60",
        "cold-0",
        "55.0%",
        "5.0 points",
    ]
    assert "right answers" not in text


@pytest.mark.parametrize(
    ("cold", "warm", "difference", "includes_0", "by_seeds"),
    [
        ((30, 30, 30), (57, 57, 57), "+45.0 points", False, "0%"),
        ((20, 50, 30), (55, 25, 45), "+13.9 points", True, "9"),
    ],
)
def test_two_settings_are_compared_with_what_seeds_and_images_add(
    cold, warm, difference, includes_0, by_seeds
):
    text = seeds.over_seeds([setting("cold", 0.1, cold), setting("warm", 0.2, warm)])
    assert "train.beta  0.1 → 0.2" in text
    rows = [line for line in text.splitlines() if "| difference " in line]
    assert len(rows) == 2  # win rate, preference accuracy
    for row in rows:
        *_, figure, spread, interval, share, _ = (cell.strip() for cell in row.split("|"))
        assert (figure, spread) == (difference, "")
        assert ("\N{MINUS SIGN}" in interval) is includes_0
        assert share.startswith(by_seeds)


def test_right_answers_are_compared_where_all_were_asked_the_same():
    asked = setting("cold", 0.1, (30, 30), right=(True, False, True))
    assert cells(seeds.over_seeds([asked]), "right answers")[0] == "3"
    (_, other) = setting("cold", 0.1, (30, 30), right=(True,))
    assert "Note: right answers are left out" in seeds.over_seeds([[asked[0], other]])


def test_a_setting_of_one_seed_and_one_setting_twice_are_refused():
    cold = setting("cold", 0.1, (30, 31))
    with pytest.raises(UserError, match=r"only experiment of its setting .*-S train.seed=1,2,3"):
        seeds.over_seeds([cold[:1]])
    with pytest.raises(UserError, match=r"differ in train\.seed alone"):
        seeds.over_seeds([cold, [cold[1], cold[0]]])
    with pytest.raises(UserError, match="are not the same"):
        seeds.over_seeds([cold, setting("warm", 0.2, (30, 31), n=61)])
