"""Two experiments side by side: differences, refusals and words, by hand."""

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stages.answers.task_results import Results
from stages.commands import comparison
from stages.commands.comparison import (
    CHOSEN,
    PREFERENCE,
    RIGHT,
    WIN_RATE,
    Column,
    Comparison,
    Experiment,
    Measure,
)
from stages.core.errors import UserError
from stages.evaluation import statistics
from stages.evaluation.catalogue import NATS, SHARE
from stages.evaluation.paired import Change
from stages.params.params import flattened
from tests.test_metrics import SETTINGS

PARAMETERS: dict[str, Any] = {
    "evaluate": {"confidence": 0.95, "resamples": 500, "seed": 0},
    "train": {"beta": 0.1, "lora_rank": 8},
}


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


def scores(margins: list[float], beta: float = 0.1) -> pd.DataFrame:
    """Pairs of those margins in nats; the reference gives -10 and -10, chosen goes up by 1."""
    n = len(margins)
    return pd.DataFrame(
        {
            "id": [f"id{i}" for i in range(n)],
            "group": [f"image{i}" for i in range(n)],
            "policy_chosen_logps": [-9.0] * n,
            "policy_rejected_logps": [-9.0 - m for m in margins],
            "reference_chosen_logps": [-10.0] * n,
            "reference_rejected_logps": [-10.0] * n,
            "chosen_tokens": [4] * n,
            "rejected_tokens": [4] * n,
            "tuned_margin": [m / 4 for m in margins],
            "reward_margin": [beta * m for m in margins],
        }
    )


def answers(right: list[bool]) -> pd.DataFrame:
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
    margins: tuple[float, ...] = (1.0, 2.0, -1.0, -2.0),
    right: tuple[bool, ...] = (),
    parameters: dict[str, Any] | None = None,
    **changes: Any,
) -> Experiment:
    made = Experiment(
        name=name,
        commit="abc1234",
        parameters=flattened(parameters or PARAMETERS),
        metrics={"win_rate": statistics.outcomes(list(margins)).mean()},
        scores=scores(list(margins)),
        answers=answers(list(right)),
        probed=Results({}, {}),
        pairs=[row(i) for i in range(len(margins))],
    )
    return dataclasses.replace(made, **changes)


def measure(unit: Any = SHARE, **changed: Any) -> Measure:
    plain = Change(0.5, 0.68, 0.18, 0.1, 0.26, gained=20, lost=2, p_value=0.0001)
    return Measure("win rate", unit, dataclasses.replace(plain, **changed), 100)


def named(found: Comparison) -> dict[str, Change]:
    return {measure.name: measure.change for measure in found.measures}


# the figures


def test_differences_are_after_minus_before_pair_by_pair():
    # two wins of four, then three: one lost pair is won, and nothing is lost
    before = experiment(margins=(1.0, 2.0, -1.0, -2.0), right=(True, False))
    after = experiment(margins=(1.0, 2.0, 3.0, -2.0), right=(False, True))
    found = named(comparison.compare(before, after))
    wins = found[WIN_RATE]
    assert (wins.before, wins.after, wins.difference) == (0.5, 0.75, 0.25)
    assert (wins.gained, wins.lost, wins.p_value) == (1, 0, 1.0)
    assert found[PREFERENCE].difference == 0.25
    assert found[RIGHT].difference == 0
    assert found[CHOSEN].difference == 0


def test_the_interval_is_the_bootstrap_of_the_difference_with_the_settings_of_the_parameters():
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=60), rng.normal(0.5, size=60)
    before, after = experiment(margins=tuple(first)), experiment(margins=tuple(second))
    found = named(comparison.compare(before, after))[WIN_RATE]
    gap = statistics.outcomes(second) - statistics.outcomes(first)
    groups = [f"image{i}" for i in range(60)]
    how = before.settings
    expected = statistics.bootstrap_intervals({"gap": gap}, groups, how)["gap"]
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    shuffled = dataclasses.replace(after, scores=after.scores.sample(frac=1, random_state=0))
    assert named(comparison.compare(before, shuffled))[WIN_RATE] == found


def test_another_beta_changes_neither_the_win_rate_nor_a_margin_that_is_shown():
    stronger = {**PARAMETERS, "train": {"beta": 0.4, "lora_rank": 8}}
    moved = (1.0, 2.0, 3.0, -2.0)
    same = comparison.compare(experiment(), experiment(margins=moved))
    other = comparison.compare(
        experiment(),
        experiment(margins=moved, parameters=stronger, scores=scores(list(moved), 0.4)),
    )
    assert "train.beta  0.1 → 0.4" in comparison.render(other)
    assert other.measures == same.measures
    assert other.gained == same.gained == ((row(2), -1.0, 3.0),)


def test_against_another_reference_only_figures_without_reference_are_given():
    table = scores([1.0, -1.0])
    near = table.assign(reference_chosen_logps=-9.9985)  # of 10 nats: rounding
    assert comparison.reference_difference(table, near) == 0
    far = scores([1.0, 2.0, -1.0, -2.0])
    far.loc[1, "reference_rejected_logps"] = -10.5
    found = comparison.compare(experiment(), experiment(scores=far))
    assert list(named(found)) == [PREFERENCE]
    assert found.margin.startswith("tuned log-prob per token of chosen")
    assert "the references differ, by up to 0.5 nats" in found.notes[0]


def test_right_answers_to_different_questions_are_not_compared():
    found = comparison.compare(experiment(right=(True, False)), experiment(right=(True,)))
    assert RIGHT not in named(found)
    assert "right answers are left out, because not all were asked the same" in found.notes[0]


def test_pairs_of_one_image_have_no_interval_and_no_verdict():
    before, after = experiment(), experiment(margins=(1.0, 2.0, 3.0, 4.0))
    for one in (before, after):
        one.scores["group"] = "same"
    (found, *_) = comparison.compare(before, after).measures
    assert found.change.low is None
    assert "no difference can be told" in comparison.sentence(found)


# flips


def test_flips_are_sorted_by_size_and_a_tie_that_becomes_a_win_is_gained():
    ids = ["id0", "id1", "id2", "id3", "id4"]
    before = np.array([-1.0, 0.0, 2.0, 1.0, -5.0])
    after = np.array([1.0, 0.5, -9.0, 0.5, -1.0])
    gained, lost = comparison.flips(ids, before, after, [row(i) for i in range(5)])
    assert gained == ((row(0), -1.0, 1.0), (row(1), 0.0, 0.5))
    assert lost == ((row(2), 2.0, -9.0),)


def test_at_most_ten_flips_are_shown_and_all_are_counted():
    margins = tuple(float(i + 1) for i in range(12))
    lost = comparison.compare(
        experiment(margins=margins), experiment(margins=tuple(-m for m in margins))
    )
    text = comparison.render(lost)
    assert "Pairs lost in win rate over the base: 12, the 10 largest changes" in text
    assert text.count("    pair ") == 10
    assert "id11" in text  # the largest
    assert "    pair      id0\n" not in text


# words


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "win rate: higher after, +18.0 points [+10.0, +26.0]."),
        ({"difference": -0.1, "low": -0.2, "high": -0.01}, "lower after, -10.0 points"),
        ({"low": -0.01}, "no difference can be told, the interval [-1.0, +26.0] includes 0."),
        ({"low": 0.0}, "no difference can be told"),
        ({"p_value": 0.125}, "20 gained and 2 lost can be chance (p = 0.125)"),
        ({"low": None, "high": None}, "no difference can be told"),
        ({"unit": NATS, "p_value": None}, "higher after, +0.18 [+0.10, +0.26]."),
    ],
)
def test_a_difference_is_told_only_where_interval_and_test_tell_it(changed, words):
    assert words in comparison.sentence(measure(**changed)).replace("\N{MINUS SIGN}", "-")


@pytest.mark.parametrize(("lost", "n", "p_value"), [(4, 400, "0.125"), (1, 799, None)])
def test_few_pairs_lost_and_none_gained_are_no_difference(lost, n, p_value):
    """Of 4 lost the bootstrap leaves 0 out; of one it ends at 0, not a rounding error before it."""
    before, after = np.ones(n), np.ones(n)
    after[17 : 17 + lost] = 0
    how = SETTINGS.model_copy(update={"resamples": 4000})
    found = comparison.compared("wins", Column(SHARE, [before, after], np.arange(n)), how)
    assert (found.change.high == 0) is (p_value is None)
    assert found.change.direction == "unclear"
    assert (p_value or "includes 0") in comparison.sentence(found)


def test_data_can_not_break_the_page_or_reach_the_terminal():
    nasty = "a\n\n# heading\x1b[31m | ```" + "x" * 500
    moved = experiment(margins=(1.0, 2.0, 3.0, -2.0))
    rows = [row(i, question=nasty, chosen="<b>c</b>", rejected="r") for i in range(4)]
    text = comparison.render(
        comparison.compare(experiment(pairs=rows), dataclasses.replace(moved, pairs=rows))
    )
    assert "\x1b" not in text
    shown = [line for line in text.splitlines() if "heading" in line]
    assert shown
    assert all(line.startswith("    question") and len(line) < 250 for line in shown)
    assert all(line.startswith("    ") for line in text.splitlines() if "<b>" in line)
    found = comparison.compare(experiment(right=(True,)), experiment(right=(False,)))
    table = comparison.table([*found.measures, dataclasses.replace(measure(), name="a | b\n")], "")
    assert len(table.splitlines()) == 2 + 5
    assert {line.replace("\\|", "").count("|") for line in table.splitlines()} == {10}


def answered(values: list[float], shown: str = "these") -> Results:
    """One task ``t`` with a metric of those values, each of its own image."""
    document = {
        "results": {"t": {"acc,none": float(np.mean(values))}},
        "higher_is_better": {"t": {"acc": True}},
        "datasets": {"t": {"shown": shown}},
    }
    rows = [
        {"doc_id": i, "images": [f"i{i}"], "filter": "none", "metrics": {"acc": value}}
        for i, value in enumerate(values)
    ]
    return Results(document, {"t": rows})


def test_lm_eval_tasks_are_paired_document_by_document_if_they_are_the_same():
    before = experiment(probed=answered([0.0] * 20 + [1.0] * 20))
    found = comparison.compare(before, experiment(probed=answered([1.0] * 40)))
    (task,) = found.tasks
    assert (task.name, task.rows, task.change.difference) == ("t acc", 40, 0.5)
    assert (task.change.gained, task.change.lost) == (20, 0)
    assert "- t acc: higher after, +0.500 [" in comparison.render(found)
    other = comparison.compare(before, experiment(probed=answered([1.0] * 40, shown="others")))
    assert other.tasks == ()
    assert other.notes == ("t: left out, the two did not answer the same documents",)


# refusals


def moved(column: str, value: float) -> pd.DataFrame:
    table = scores([1.0, 2.0, -1.0, -2.0])
    table[column] = table[column].astype(float)
    table.loc[0, column] = value
    return table


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
        ({"scores": moved("chosen_tokens", 5)}, "not the same in texts, images and tokens"),
        ({"metrics": {"win_rate": 0.9}}, "scores, metrics and test pairs are of different runs"),
        ({"pairs": [row(7)]}, "of different runs; `dvc repro`"),
    ],
)
def test_other_pairs_and_files_of_different_runs_are_refused(changed, message):
    with pytest.raises(UserError, match=message):
        comparison.compare(experiment(), experiment(**changed))


def test_nan_never_passes_for_a_loss():
    with pytest.raises(ValueError, match="policy_logps: value 0 is nan"):
        comparison.compare(experiment(), experiment(scores=moved("policy_chosen_logps", math.nan)))
