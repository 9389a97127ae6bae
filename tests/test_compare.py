"""Compare: differences, refusals and words by hand; revisions in a real Git and DVC repository."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stages import compare
from stages.compare import Measure, Results
from stages.core.errors import UserError
from stages.evaluation import statistics

PARAMETERS = {
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


def results(
    name: str = "main",
    margins: tuple[float, ...] = (1.0, 2.0, -1.0, -2.0),
    right: tuple[bool, ...] = (),
    parameters: dict[str, Any] | None = None,
    **changes: Any,
) -> Results:
    made = Results(
        name=name,
        commit="abc1234",
        parameters=compare.flat(parameters or PARAMETERS),
        metrics={"win_rate": statistics.win_rate(list(margins)).rate},
        scores=scores(list(margins)),
        answers=answers(list(right)),
        rows=[row(i) for i in range(len(margins))],
    )
    return dataclasses.replace(made, **changes)


def measure(**changes: Any) -> Measure:
    test = statistics.McNemar(gained=20, lost=2, unchanged=78, odds=10.0, p_value=0.0001)
    plain = Measure("win rate", "share", 0.5, 0.68, 0.18, 0.1, 0.26, 100, 100, test)
    return dataclasses.replace(plain, **changes)


def named(comparison: compare.Comparison) -> dict[str, Measure]:
    return {found.name: found for found in comparison.measures}


# the figures


def test_differences_are_after_minus_before_pair_by_pair():
    # two wins of four, then three: one lost pair is won, and nothing is lost
    before = results(margins=(1.0, 2.0, -1.0, -2.0), right=(True, False))
    after = results(margins=(1.0, 2.0, 3.0, -2.0), right=(False, True))
    found = named(compare.compare(before, after))
    wins = found["win rate"]
    assert (wins.before, wins.after, wins.difference) == (0.5, 0.75, 0.25)
    assert wins.test is not None
    assert (wins.test.gained, wins.test.lost, wins.test.p_value) == (1, 0, 1.0)
    assert found["preference accuracy, per token"].difference == 0.25
    assert found["right answers"].difference == 0
    assert found["change of chosen log-prob"].difference == 0


def test_the_interval_is_the_bootstrap_of_the_difference_with_the_settings_of_the_parameters():
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=60), rng.normal(0.5, size=60)
    before, after = results(margins=tuple(first)), results(margins=tuple(second))
    found = named(compare.compare(before, after))["win rate"]
    gap = statistics.outcomes(second) - statistics.outcomes(first)
    groups = sorted(f"image{i}" for i in range(60))
    order = np.argsort([f"id{i}" for i in range(60)])
    expected = statistics.bootstrap_interval(gap[order], groups, seed=0, resamples=500, level=0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.rows, found.images) == (60, 60)


def test_the_order_of_rows_does_not_matter():
    after = results(margins=(1.0, -3.0, 2.0, 5.0))
    shuffled = dataclasses.replace(after, scores=after.scores.iloc[[2, 0, 3, 1]])
    assert compare.compare(results(), shuffled) == compare.compare(results(), after)


def test_another_beta_changes_neither_the_win_rate_nor_a_margin_that_is_shown():
    stronger = {**PARAMETERS, "train": {"beta": 0.4, "lora_rank": 8}}
    moved = (1.0, 2.0, 3.0, -2.0)
    same = compare.compare(results(), results(margins=moved))
    other = compare.compare(
        results(), results(margins=moved, parameters=stronger, scores=scores(list(moved), 0.4))
    )
    assert other.parameters == (("train.beta", "0.1", "0.4"),)
    assert other.measures == same.measures
    assert other.gained == same.gained
    assert (other.gained[0].before, other.gained[0].after) == (-1.0, 3.0)


def test_a_reference_within_rounding_is_the_same_and_one_beyond_is_not():
    table = scores([1.0, -1.0])
    far = table.copy()
    near = table.assign(reference_chosen_logps=-9.9985)  # of 10 nats
    far.loc[1, "reference_rejected_logps"] = -9.5
    assert compare.reference_difference(table, near) == 0
    assert compare.reference_difference(table, far) == pytest.approx(0.5)


def test_against_another_reference_only_figures_without_reference_are_given():
    table = scores([1.0, 2.0, -1.0, -2.0])
    table = table.assign(reference_chosen_logps=-10.5, reference_rejected_logps=-10.5)
    found = compare.compare(results(), results(scores=table, right=()))
    assert list(named(found)) == ["preference accuracy, per token"]
    assert found.flipped_by[0] == "preference accuracy, per token"
    assert "the references differ, by up to 0.5 nats" in found.notes[0]


def test_right_answers_to_different_questions_are_not_compared():
    found = compare.compare(results(right=(True, False)), results(right=(True,)))
    assert "right answers" not in named(found)
    assert any("2 and 1 questions" in note for note in found.notes)


def test_pairs_of_one_image_have_no_interval_and_no_verdict():
    before, after = results(), results(margins=(1.0, 2.0, 3.0, 4.0))
    for one in (before, after):
        one.scores["group"] = "same"
    found = named(compare.compare(before, after))["win rate"]
    assert found.low is None
    assert "no difference can be told" in compare.verdict(found, 0.95)


# flips


def test_flips_are_sorted_by_size_and_a_tie_that_becomes_a_win_is_gained():
    ids = ["id0", "id1", "id2", "id3", "id4"]
    before = np.array([-1.0, 0.0, 2.0, 1.0, -5.0])
    after = np.array([1.0, 0.5, -9.0, 0.5, -1.0])
    gained, lost = compare.flips(ids, before, after, [row(i) for i in range(5)])
    assert [flip.id for flip in gained] == ["id0", "id1"]
    assert [(flip.id, flip.before, flip.after) for flip in lost] == [("id2", 2.0, -9.0)]
    assert gained[0].question == "q0?"
    assert (gained[0].chosen, gained[0].rejected) == ("yes 0", "no 0")


def test_at_most_ten_flips_are_shown_and_all_are_counted():
    margins = tuple(float(i + 1) for i in range(12))
    lost = compare.compare(results(margins=margins), results(margins=tuple(-m for m in margins)))
    text = compare.render(lost)
    assert "Pairs lost in win rate: 12, the 10 largest changes" in text
    assert text.count("    pair ") == 10
    assert "id11" in text  # the largest
    assert "    pair      id0\n" not in text


# words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "win rate: higher after by 18.00 points [+10.00, +26.00]."),
        ({"difference": -0.1, "low": -0.2, "high": -0.01}, "lower after by 10.00 points"),
        ({"low": -0.01}, "no difference can be told, the interval [-1.00, +26.00] includes 0."),
        ({"low": 0.0}, "no difference can be told"),
        ({"difference": 0.0, "low": 0.0, "high": 0.0}, "the same"),
        ({"low": None, "high": None}, "no difference can be told"),
        ({"unit": "nats", "test": None}, "higher after by 0.180 nats [+0.100, +0.260]."),
    ],
)
def test_a_difference_is_told_only_where_the_interval_leaves_0_out(changes, words):
    assert words in compare.verdict(measure(**changes), 0.95)


def test_four_pairs_lost_and_none_gained_are_no_difference_though_the_bootstrap_leaves_0_out():
    n = 400
    before, after = np.ones(n), np.ones(n)
    after[:4] = 0
    settings = {"seed": 0, "resamples": 4000, "confidence": 0.95}
    (found,) = compare.measured({"win rate": (before, after)}, np.arange(n), settings)
    assert found.high is not None
    assert found.high < 0
    assert "no difference can be told" in compare.verdict(found, 0.95)
    assert "p = 0.12" in compare.verdict(found, 0.95)


def test_one_pair_lost_gives_an_interval_that_ends_at_0_and_not_a_rounding_error_before_it():
    n = 799
    before, after = np.ones(n), np.ones(n)
    after[17] = 0
    settings = {"seed": 0, "resamples": 2000, "confidence": 0.95}
    (found,) = compare.measured({"accuracy": (before, after)}, np.arange(n), settings)
    assert found.high == 0


def test_data_can_not_break_the_page_or_reach_the_terminal():
    nasty = "a\n\n# heading\x1b[31m | ```" + "x" * 500
    moved = results(margins=(1.0, 2.0, 3.0, -2.0))
    rows = [row(i, question=nasty, chosen="<b>c</b>", rejected="r") for i in range(4)]
    text = compare.render(
        compare.compare(results(rows=rows), dataclasses.replace(moved, rows=rows))
    )
    assert "\x1b" not in text
    shown = [line for line in text.splitlines() if "heading" in line]
    assert shown
    assert all(line.startswith("    question") and len(line) < 250 for line in shown)
    assert all(line.startswith("    ") for line in text.splitlines() if "<b>" in line)


def test_tables_are_aligned_and_have_a_cell_for_each_column():
    text = compare.render(compare.compare(results(right=(True,)), results(right=(False,))))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in rows}) == 1
    assert {line.count("|") for line in rows} == {10}


def test_lm_eval_tasks_that_both_have_are_listed_without_a_verdict():
    before, after = results(), results()
    before = dataclasses.replace(before, metrics={**before.metrics, "lm_eval/pope/acc/tuned": 0.8})
    after = dataclasses.replace(
        after, metrics={**after.metrics, "lm_eval/pope/acc/tuned": 0.9, "lm_eval/x/acc/tuned": 1.0}
    )
    found = compare.compare(before, after)
    assert found.tasks == (("pope/acc", 0.8, 0.9),)
    assert "| pope/acc " in compare.render(found)


# refusals


def test_other_test_pairs_are_refused_with_how_many_are_common_and_why():
    other = {**PARAMETERS, "preprocess": {"split_key": "b"}}
    after = results(name="split", margins=(1.0, 2.0), parameters=other)
    with pytest.raises(UserError, match=r"main has 4, split 2, 2 of them in common.*split_key"):
        compare.compare(results(), after)


def test_the_same_ids_with_another_image_or_text_are_refused():
    rows = [row(i) for i in range(4)]
    rows[2]["images"] = ["replaced.jpg"]
    with pytest.raises(UserError, match="1 of 4 common test pairs have another text or image"):
        compare.compare(results(), results(rows=rows))


def test_the_same_pairs_as_other_tokens_are_refused():
    table = scores([1.0, 2.0, -1.0, -2.0])
    table.loc[0, "chosen_tokens"] = 5
    with pytest.raises(UserError, match="became other tokens"):
        compare.compare(results(), results(scores=table))


def test_files_of_different_runs_are_refused():
    with pytest.raises(UserError, match=r"win rate of 0\.5000, the metrics say 0\.9"):
        compare.compare(results(), results(metrics={"win_rate": 0.9}))
    with pytest.raises(UserError, match="not of the pairs in its test set"):
        compare.compare(results(rows=[row(7)]), results())


def test_parameters_that_were_changed_after_the_run_are_noticed():
    lock = {
        "stages": {
            "train": {"params": {"params.yaml": {"train": {"beta": 0.1}, "model.bits": None}}},
            "fetch": {"params": {"other.yaml": {"train": {"beta": 7}}}},
        }
    }
    ran = {"train": {"beta": 0.1}, "model": {"bits": None}, "evaluate": {"seed": 0}}
    assert compare.stale(ran, lock) == ()
    changed = {"train": {"beta": 0.2, "seed": 1}, "model": {"bits": 4}}
    assert compare.stale(changed, lock) == ("model.bits", "train.beta", "train.seed")


def test_flat_keeps_lists_and_empty_sections_as_values():
    assert compare.flat({"a": {"b": [1, {"c": 2}], "d": {}}, "e": None}) == {
        "a.b": [1, {"c": 2}],
        "a.d": {},
        "e": None,
    }


# a real repository


# Stands for the evaluate stage: results that follow from train.beta alone.
STAGE = """
import json, sys
from pathlib import Path
import pandas as pd
from ruamel.yaml import YAML

p = YAML(typ="safe", pure=True).load(Path("params.yaml").read_text())
n, won = 40, int(100 * p["train"]["beta"])
Path("data/formatted").mkdir(parents=True, exist_ok=True)
Path("reports").mkdir(exist_ok=True)
rows = [
    {"id": f"id{i}", "group": f"g{i}", "messages": [{"content": f"<image>q{i}"}],
     "chosen": {"content": "c"}, "rejected": {"content": "r"}, "images": [f"g{i}.jpg"]}
    for i in range(n)
]
Path("data/formatted/test.json").write_text(json.dumps(rows))
margins = [1.0 if i < won else -1.0 for i in range(n)]
pd.DataFrame({
    "id": [r["id"] for r in rows], "group": [r["group"] for r in rows],
    "policy_chosen_logps": -9.0, "policy_rejected_logps": [-9.0 - m for m in margins],
    "reference_chosen_logps": -10.0, "reference_rejected_logps": -10.0,
    "chosen_tokens": 4, "rejected_tokens": 4,
    "reward_margin": [p["train"]["beta"] * m for m in margins],
}).to_parquet("reports/scores.parquet")
pd.DataFrame({"id": ["a"], "of": ["pair"], "image": ["g0"], "question": ["q"], "truth": [None],
              "tuned_correct": [None]}).to_parquet("reports/answers.parquet")
Path("reports/metrics.json").write_text(json.dumps({"win_rate": won / n}))
"""
PIPELINE = """
stages:
  evaluate:
    cmd: >-
      python stage.py --formatted-data data/formatted --metrics reports/metrics.json
      --scores reports/scores.parquet --answers reports/answers.parquet
    deps: [stage.py]
    params: [train.beta, evaluate]
    outs: [data/formatted, reports/scores.parquet, reports/answers.parquet]
    metrics:
      - reports/metrics.json: {cache: false}
"""


def call(*words: str, folder: Path) -> str:
    # The environment of the tests, less what a `dvc exp run` around them would have set.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "GIT_"))}
    variables = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        **{f"GIT_{who}_{what}": "test@example.org"
           for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }  # fmt: skip
    done = subprocess.run(
        words, cwd=folder, env=inherited | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Branch main (beta 0.2, tagged), branch empty (never evaluated), the experiment tuned (beta
    0.4), and a working tree as main's."""
    folder: Path = tmp_path_factory.mktemp("project")
    (folder / "stage.py").write_text(STAGE, encoding="utf-8")
    (folder / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
    (folder / "params.yaml").write_text(json.dumps(PARAMETERS), encoding="utf-8")
    call("git", "init", "--quiet", "--initial-branch", "main", folder=folder)
    call("dvc", "init", "--quiet", folder=folder)
    call("git", "add", ".", folder=folder)
    call("git", "commit", "--quiet", "-m", "Not run", folder=folder)
    call("git", "branch", "empty", folder=folder)
    (folder / "params.yaml").write_text(
        json.dumps({**PARAMETERS, "train": {"beta": 0.2, "lora_rank": 8}}), encoding="utf-8"
    )
    call("dvc", "repro", "--quiet", folder=folder)
    call("git", "add", ".", folder=folder)
    call("git", "commit", "--quiet", "-m", "beta 0.2", folder=folder)
    call("git", "tag", "beta-0.2", folder=folder)
    call("dvc", "exp", "run", "--quiet", "-n", "tuned", "-S", "train.beta=0.4", folder=folder)
    call("git", "checkout", "--quiet", "--force", "main", folder=folder)
    call("dvc", "checkout", "--quiet", folder=folder)
    return folder


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    for name in list(os.environ):
        if name.startswith("DVC_"):
            monkeypatch.delenv(name)
    return project


@pytest.mark.slow
def test_a_commit_a_tag_a_branch_and_an_experiment_are_read_though_only_the_cache_has_them(here):
    shutil.rmtree(here / "data")
    (here / "reports" / "scores.parquet").unlink()
    commit = call("git", "rev-parse", "main", folder=here).strip()
    names = (commit, commit[:7], "main", "beta-0.2", "HEAD")
    assert {name: compare.load(name).metrics["win_rate"] for name in (*names, "tuned")} == {
        **dict.fromkeys(names, 0.5),
        "tuned": 1.0,
    }
    assert compare.load("beta-0.2").commit == commit[:7]
    found = compare.compare(compare.load("main"), compare.load("tuned"))
    assert found.parameters == (("train.beta", "0.2", "0.4"),)
    assert len(found.gained) == 20
    assert "win rate: higher after by 50.00 points" in compare.render(found)


@pytest.mark.slow
def test_the_workspace_is_the_files_as_they_are_and_the_command_writes_the_page(here, capsys):
    call("dvc", "checkout", "--quiet", folder=here)
    compare.main("tuned", "workspace", here / "made" / "comparison.md")
    printed = capsys.readouterr().out
    assert "after   workspace (the files here)" in printed
    assert "win rate: lower after by 50.00 points" in printed
    assert (here / "made" / "comparison.md").read_text(encoding="utf-8") == printed

    kept = (here / "params.yaml").read_text(encoding="utf-8")
    try:  # a parameter changed without a run: what is compared is not what it says
        (here / "params.yaml").write_text(kept.replace("0.2", "0.3"), encoding="utf-8")
        assert compare.load("workspace").stale == ("train.beta",)
    finally:
        (here / "params.yaml").write_text(kept, encoding="utf-8")
    assert compare.load("workspace").stale == ()


@pytest.mark.slow
def test_a_revision_that_does_not_exist_is_refused_with_the_nearest_experiment(here):
    with pytest.raises(UserError, match=r"'tuend' is no commit.*did you mean 'tuned'\?.*main"):
        compare.load("tuend")


@pytest.mark.slow
def test_a_revision_without_results_is_refused_with_how_to_get_them(here):
    with pytest.raises(UserError, match=r"empty was not evaluated.*dvc repro"):
        compare.load("empty")
    cache, away = here / ".dvc" / "cache", here / "away"
    cache.rename(away)
    try:
        with pytest.raises(UserError, match=r"of beta-0\.2 is not in DVC's cache.*dvc fetch"):
            compare.load("beta-0.2")
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        away.rename(cache)


def test_outside_of_a_project_it_says_where_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="project's root"):
        compare.load("workspace")


def test_where_results_lie_is_read_from_the_command_of_the_stage():
    cmd = "python -m stages.evaluate --scores reports/s.parquet --formatted-data data/f"
    assert compare.options(cmd) == {"scores": "reports/s.parquet", "formatted-data": "data/f"}
    from ruamel.yaml import YAML

    pipeline = YAML(typ="safe").load((Path(__file__).parent.parent / "dvc.yaml").read_text())
    given = compare.options(pipeline["stages"][compare.STAGE]["cmd"])
    assert {"metrics", "scores", "answers", "formatted-data"} <= given.keys()


def test_nan_never_passes_for_a_loss():
    table = scores([1.0, 2.0, -1.0, -2.0])
    table.loc[0, "policy_chosen_logps"] = math.nan
    with pytest.raises(ValueError, match="policy_chosen"):
        compare.compare(results(), results(scores=table))
