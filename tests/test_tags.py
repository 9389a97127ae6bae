"""Provenance: what a result came from, and nothing that must not be shown."""

import json

import pytest

from stages.tracking import tags as tracking
from tests.repository import call

PASSWORD = "hunter2-and-more"


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def committed(folder):
    call("git", "init", "-q", "-b", "main", folder=folder)
    address = f"https://me:{PASSWORD}@host/us/pairs.git"
    call("git", "remote", "add", "origin", address, folder=folder)
    call("git", "add", ".", folder=folder)
    call("git", "commit", "-qm", "first", folder=folder)


def test_nothing_secret_and_no_home_path_is_shown(monkeypatch, tmp_path):
    home = tmp_path / "home" / "someone"
    project = home / "project"
    project.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    text = (
        f"{project}/data and {home}/other and {home}2/x with hf_abcdefgh at "
        f"https://me:{PASSWORD}@host/repo?x=1"
    )
    shown = tracking.redacted(text, project)
    assert shown == f"./data and ~/other and {home}2/x with *** at https://host/repo?x=1"


def test_provenance_says_what_a_result_came_from(project, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "brave-cat")
    outs = {"data/pairs": "aa.dir", "models/adapter": "bb.dir", "reports/metrics.json": "cc"}
    entries = [{"path": path, "md5": md5} for path, md5 in outs.items()]
    (project / "dvc.lock").write_text(json.dumps({"stages": {"all": {"outs": entries}}}))
    (project / "reports").mkdir()
    (project / "reports" / "metrics.json").write_text("{}")
    (project / "params.yaml").write_text("data: {sources: {mine: {}}}\nbeta: 0.1\n")
    committed(project)
    tags = tracking.provenance()
    assert len(tags["git.commit"]) == 40
    assert tags.pop("git.commit") == tags.pop("mlflow.source.git.commit")
    assert tags == {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.branch": "main",
        "mlflow.source.git.repoURL": "https://host/us/pairs.git",
        "git.state": "clean",
        "dvc.experiment": "brave-cat",
        "dvc.md5.data/pairs": "aa.dir",
        "dvc.md5.models/adapter": "bb.dir",
    }
    # What a run of the pipeline itself changes does not make it dirty; a parameter does.
    (project / "reports" / "metrics.json").write_text('{"win_rate": 1}')
    assert tracking.provenance()["git.state"] == "clean"
    (project / "params.yaml").write_text("beta: 0.2\n")
    assert tracking.provenance()["git.state"] == "dirty: params.yaml"
    # The repository's index may say otherwise, as it does in DVC's temporary copies.
    call("git", "update-index", "--assume-unchanged", "params.yaml", folder=project)
    assert tracking.provenance()["git.state"] == "dirty: params.yaml"
    assert tracking.experiment_name() == "brave-cat"
    monkeypatch.delenv("DVC_EXP_NAME")
    assert tracking.experiment_name().startswith("workspace-")


def test_a_run_says_which_parameters_changed(project, monkeypatch):
    (project / "params.yaml").write_text("train: {beta: 0.1, seed: 42}\n")
    committed(project)
    assert "changed" not in tracking.provenance()
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", tracking.provenance()["git.commit"])
    (project / "params.yaml").write_text("train: {beta: 0.2, seed: 1}\n")
    assert tracking.provenance()["changed"] == "train.beta=0.2, train.seed=1"


def test_provenance_without_a_repository_is_what_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert tracking.provenance(tmp_path) == {"mlflow.source.type": "LOCAL"}
    assert tracking.experiment_name(tmp_path) == "workspace-uncommitted"
