"""Revisions of a real Git and DVC repository: what is read of them, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.answers import task_results
from stages.commands import compare, seeds
from stages.core.errors import UserError
from tests.repository import call
from tests.test_compare import PARAMETERS, answered, cells, experiment

ROOT = Path(__file__).parent.parent
STAGE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests import test_revisions
test_revisions.evaluate()
"""


def evaluate() -> None:
    """Stands for the evaluate stage: results that follow from train.beta alone."""
    won = int(100 * YAML(typ="safe", pure=True).load(Path("params.yaml"))["train"]["beta"])
    wins = [float(i < won) for i in range(40)]
    made = experiment(margins=tuple(2 * win - 1 for win in wins), probed=answered(wins))
    for folder in ("data/formatted", "reports/details"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    Path("data/formatted/test.json").write_text(json.dumps(made.pairs))
    made.scores.to_parquet("reports/details/scores.parquet")
    made.answers.to_parquet("reports/details/answers.parquet")
    task_results.write(made.probed, Path("reports/details/lm_eval"))


PIPELINE = """
stages:
  evaluate:
    cmd: >-
      python stage.py --formatted-data data/formatted --details reports/details
    deps: [stage.py]
    params: [train.beta, evaluate]
    outs: [data/formatted, reports/details]
"""


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
    return project


@pytest.mark.slow
def test_a_commit_a_tag_a_branch_and_an_experiment_are_read_though_only_the_cache_has_them(
    here, capsys
):
    shutil.rmtree(here / "data")
    shutil.rmtree(here / "reports" / "details")
    commit = call("git", "rev-parse", "main", folder=here).strip()
    names = (commit, commit[:7], "main", "beta-0.2", "HEAD")
    won = {
        name: int((compare.load(name).scores["tuned_margin"] > 0).sum())
        for name in (*names, "tuned")
    }
    assert won == dict.fromkeys(names, 20) | {"tuned": 40}
    assert compare.load("beta-0.2").commit == commit[:7]
    compare.main("main", "tuned")
    text = capsys.readouterr().out
    assert cells(text, "chosen-versus-rejected win rate")[3] == "+50.0 points"
    assert cells(text, "t acc")[3] == "+0.500"
    assert "train.beta  0.2 → 0.4" in text


@pytest.mark.slow
def test_the_workspace_is_the_files_as_they_are(here, capsys):
    call("dvc", "checkout", "--quiet", folder=here)
    compare.main("tuned", "workspace")
    printed = capsys.readouterr().out
    assert "after   workspace (the files here)" in printed
    assert cells(printed, "chosen-versus-rejected win rate")[3] == "-50.0 points"


@pytest.mark.slow
def test_a_revision_without_results_is_refused_with_how_to_get_them(here, tmp_path, monkeypatch):
    how = r".*dvc exp list --all-commits.*dvc fetch --all-commits.*dvc exp pull.*dvc repro"
    for name in ("tuend", "empty"):
        with pytest.raises(UserError, match=f"^{name} can't be compared{how}"):
            compare.load(name)
    call("git", "clone", "--quiet", str(here), str(tmp_path / "clone"), folder=tmp_path)
    for folder, name in (("clone", "beta-0.2"), ("clone", "workspace"), ("", "workspace")):
        monkeypatch.chdir(tmp_path / folder)
        with pytest.raises(UserError, match=f"^{name} can't be compared{how}"):
            compare.load(name)


def test_where_results_are_is_read_from_the_command_of_the_stage():
    cmd = "python -m stages.evaluate --details reports/d --formatted-data data/f"
    assert compare.options(cmd) == {"details": "reports/d", "formatted-data": "data/f"}
    pipeline = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())
    given = compare.options(pipeline["stages"][compare.STAGE]["cmd"])
    assert set(compare.NEEDED) <= given.keys()


@pytest.mark.slow
def test_the_seeds_of_a_setting_are_read_and_compared(here, capsys):
    run = ("dvc", "exp", "run", "--quiet", "-S", "+train.seed=1")
    try:
        call(*run, "-n", "again", folder=here)
        call("git", "checkout", "--quiet", "--force", "main", folder=here)
        call(*run, "-S", "train.beta=0.4", "-n", "tuned-again", folder=here)
    finally:
        call("git", "checkout", "--quiet", "--force", "main", folder=here)
        call("dvc", "checkout", "--quiet", "--force", folder=here)
    seeds.main("main tuned")
    printed = capsys.readouterr().out
    assert "2 seeds: main (None), again (1)" in printed
    assert "2 seeds: tuned (None), tuned-again (1)" in printed
    assert "| +50.0 points |" in printed
    with pytest.raises(UserError, match="takes one revision, or two in quotes"):
        seeds.main("a b c")
