"""From an MLflow run back to what made it: a real Git and DVC repository, a remote, a fresh clone.

The stages stand for the pipeline's: data that follow from a parameter, an adapter that follows from
another, and an evaluation that completes the run.
"""

import json
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.commands import revisions
from stages.core.errors import UserError
from stages.tracking import way_back
from tests.repository import ROOT, attempt, call
from tests.test_comparison import experiment
from tests.test_secrets import PLANTED, leaks

STAGES = """
import json, pathlib, sys
from ruamel.yaml import YAML

p = YAML(typ="safe", pure=True).load(pathlib.Path("params.yaml").read_text())
if sys.argv[1] == "data":
    pathlib.Path("data/pairs").mkdir(parents=True, exist_ok=True)
    pathlib.Path("data/pairs/pairs.txt").write_text(str(p["preprocess"]))
if sys.argv[1] == "train":
    pathlib.Path("models/adapter").mkdir(parents=True, exist_ok=True)
    pathlib.Path("models/adapter/weights").write_text(json.dumps(p["train"]))
    pathlib.Path("models/adapter/fingerprint.json").write_text('{"fingerprint": "0123"}')
    pathlib.Path("reports/curves").mkdir(parents=True, exist_ok=True)
    pathlib.Path("reports/curves/train.csv").write_text(f"step,loss\\n1,{p['train']['beta']}\\n")
    if p["train"]["beta"] == 9:
        from stages.tracking import runs
        with runs.Live("9"):
            raise ValueError("the GPU ran out of memory\\nlower the batch size")
if sys.argv[1] == "evaluate":
    pathlib.Path("reports/results").mkdir(parents=True, exist_ok=True)
    rate = p["train"]["beta"] + p["train"]["seed"] / 100
    pathlib.Path("reports/results/metrics.json").write_text(json.dumps({"win_rate": rate}))
    if TRACKED:
        from stages.tracking import runs
        runs.complete_run(
            json.dumps(p["train"]), parameters=p, metrics={"win_rate": rate},
            curves=pathlib.Path("reports/curves"), artifacts=[], datasets=[])
    else:
        from stages.tracking import way_back
        way_back.write(pathlib.Path(KEPT))
"""
PIPELINE = """
stages:
  preprocess:
    cmd: python stage.py data
    deps: [stage.py]
    params: [preprocess]
    outs: [data/pairs]
  train:
    cmd: python stage.py train
    deps: [stage.py, data/pairs]
    params: [train]
    outs: [{models/adapter: {persist: true}}, {reports/curves: {cache: false, persist: true}}]
  evaluate:
    cmd: python stage.py evaluate
    deps: [stage.py, models/adapter]
    params: [train]
    outs: [{reports/results: {cache: false}}]
"""


def make(folder: Path, stage: str) -> Path:
    """A project in ``folder`` whose first commit was run and pushed, with a remote of each kind."""
    origin, project = folder / "origin.git", folder / "project"
    call("git", "init", "--quiet", "--bare", "--initial-branch", "main", str(origin), folder=folder)
    call("git", "clone", "--quiet", str(origin), str(project), folder=folder)
    call("git", "checkout", "--quiet", "-B", "main", folder=project)
    (project / "stage.py").write_text(stage, encoding="utf-8")
    (project / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
    (project / "params.yaml").write_text("preprocess: 1\ntrain: {beta: 0.1, seed: 42}\n")
    (project / ".gitignore").write_text("mlflow.db*\n/mlartifacts/\n__pycache__/\n")
    call("dvc", "init", "--quiet", folder=project)
    call(
        "dvc", "remote", "add", "--quiet", "-d", "storage", str(folder / "storage"), folder=project
    )
    return project


def commit_and_push(project: Path) -> None:
    call("git", "add", ".", folder=project)
    call("git", "commit", "--quiet", "-m", "Run", folder=project)
    call("git", "push", "--quiet", "origin", "main", folder=project)
    call("dvc", "push", "--quiet", folder=project)


def hashes(project: Path) -> dict[str, str]:
    lock = YAML(typ="safe").load((project / "dvc.lock").read_text())
    return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project, an experiment ``tuned`` of it, and what that experiment kept of its way back."""
    folder = tmp_path_factory.mktemp("way_back")
    kept = folder / "kept"
    stage = f"TRACKED, KEPT = False, {str(kept)!r}\n{STAGES}"
    project = make(folder, stage)
    path = {"PYTHONPATH": str(ROOT)}
    call("dvc", "repro", "--quiet", folder=project, **path)
    commit_and_push(project)
    shutil.rmtree(kept)
    (project / "dvc.yaml").write_text(PIPELINE + "# a note\n")
    call("dvc", "exp", "run", "-q", "-n", "tuned", "-S", "train.beta=0.4", folder=project, **path)
    wanted = hashes(project), (project / "params.yaml").read_text()
    call("dvc", "push", "--quiet", folder=project)
    call("git", "checkout", "--quiet", "--force", "main", folder=project)
    call("dvc", "checkout", "--quiet", folder=project)
    return project, kept, wanted


def restored(kept, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "test@example.org")
    return list(way_back.restore("tuned", kept))


def clone(project, target):
    call(
        "git",
        "clone",
        "--quiet",
        str(project.parent / "origin.git"),
        str(target),
        folder=target.parent,
    )
    return target


@pytest.mark.slow
def test_a_fresh_clone_gets_the_parameters_the_data_and_the_adapter_of_the_run(
    made, tmp_path, monkeypatch
):
    project, kept, (wanted, parameters) = made
    assert wanted["models/adapter"] != hashes(project)["models/adapter"]
    here = clone(project, tmp_path / "clone")
    said = restored(kept, here, monkeypatch)
    assert (here / "params.yaml").read_text() == parameters
    assert json.loads((here / "models/adapter/weights").read_text())["beta"] == 0.4
    found = hashes(here)
    for path in ("data/pairs", "models/adapter", "reports/curves"):
        assert found[path] == wanted[path]
    assert f"models/adapter  {wanted['models/adapter']}" in said
    assert (here / "reports/curves/train.csv").read_text() == "step,loss\n1,0.4\n"
    assert (here / "dvc.yaml").read_text().endswith("# a note\n")  # it was not committed either
    status = call("dvc", "status", folder=here)
    assert "train:" not in status
    assert "preprocess:" not in status


@pytest.mark.slow
def test_edits_here_are_never_overwritten(made, tmp_path, monkeypatch):
    project, kept, _ = made
    here = clone(project, tmp_path / "clone")
    (here / "params.yaml").write_text("preprocess: 7\ntrain: {beta: 0.1, seed: 42}\n")
    with pytest.raises(UserError, match=r"params\.yaml would be overwritten: commit or"):
        restored(kept, here, monkeypatch)
    assert "preprocess: 7" in (here / "params.yaml").read_text()


@pytest.mark.slow
def test_outputs_that_nobody_pushed_are_named(made, tmp_path, monkeypatch):
    project, kept, _ = made
    here = clone(project, tmp_path / "clone")
    call("dvc", "remote", "modify", "--local", "storage", "url", str(tmp_path / "x"), folder=here)
    with pytest.raises(
        UserError, match=r"not all outputs \(data/pairs, models/adapter\).*dvc push"
    ):
        restored(kept, here, monkeypatch)


@pytest.mark.slow
def test_a_run_whose_commit_names_no_remote_is_restored_by_the_same_call_once_one_is_added(
    made, tmp_path, monkeypatch
):
    project, kept, (wanted, parameters) = made
    here = clone(project, tmp_path / "clone")
    config = call("git", "show", "HEAD:.dvc/config", folder=here)
    (here / ".dvc/config").write_text("")
    call("git", "commit", "--quiet", "-am", "No remote", folder=here)
    older = tmp_path / "kept"
    shutil.copytree(kept, older)
    note = json.loads((kept / "way_back.json").read_text())
    commit = call("git", "rev-parse", "HEAD", folder=here).strip()
    (older / "way_back.json").write_text(json.dumps(note | {"commit": commit}))
    (here / ".dvc/config").write_text(config)
    call("git", "commit", "--quiet", "-am", "A remote", folder=here)
    with pytest.raises(UserError, match=r"not all outputs .*dvc remote add --local -d storage URL"):
        restored(older, here, monkeypatch)
    (here / "stage.py").write_text("an edit")  # one that restoring did not make
    with pytest.raises(UserError, match=r"^stage\.py would be overwritten"):
        restored(older, here, monkeypatch)
    call("git", "restore", "stage.py", folder=here)
    storage = str(project.parent / "storage")
    call("dvc", "remote", "add", "--quiet", "--local", "-d", "storage", storage, folder=here)
    assert f"models/adapter  {wanted['models/adapter']}" in restored(older, here, monkeypatch)
    assert (here / "params.yaml").read_text() == parameters
    assert (here / "dvc.yaml").read_text().endswith("# a note\n")


@pytest.mark.slow
def test_what_is_printed_goes_back_from_the_runs_commit_and_from_another(
    made, tmp_path, monkeypatch
):
    project, kept, _ = made
    here = clone(project, tmp_path / "clone")
    call("dvc", "pull", "--quiet", folder=here)
    for later in (False, True):
        if later:
            call("git", "commit", "--quiet", "--allow-empty", "-m", "Later", folder=here)
        (said,) = (line for line in restored(kept, here, monkeypatch) if "to go back" in line)
        assert ("git switch -" in said) == later
        for command in said.split("`")[1::2]:
            call(*command.split(), folder=here)
        assert call("git", "status", "--porcelain", "--branch", folder=here).startswith("## main")
        assert not way_back.changed_files(here, made=True)
        assert json.loads((here / "models/adapter/weights").read_text())["beta"] == 0.1


@pytest.mark.slow
def test_a_commit_that_is_not_here_and_a_run_without_a_way_back_are_told(
    made, tmp_path, monkeypatch
):
    project, kept, _ = made
    here = clone(project, tmp_path / "clone")
    call("git", "commit", "--quiet", "--allow-empty", "-m", "Later", folder=here)
    note = json.loads((kept / "way_back.json").read_text())
    elsewhere = tmp_path / "kept"
    shutil.copytree(kept, elsewhere)
    (elsewhere / "way_back.json").write_text(json.dumps(note | {"commit": "f" * 40}))
    with pytest.raises(UserError, match=r"f{40} that made tuned is not in this clone.*git fetch"):
        restored(elsewhere, here, monkeypatch)
    with pytest.raises(UserError, match="no way_back/ among its artifacts"):
        restored(tmp_path / "nothing", here, monkeypatch)
    said = restored(kept, here, monkeypatch)  # from a later commit, back to that of the run
    assert "without a branch" in said[0]
    assert call("git", "rev-parse", "HEAD", folder=here).strip() == note["commit"]


@pytest.mark.slow
def test_no_home_folder_and_no_password_is_kept(made, tmp_path, monkeypatch):
    project, _, _ = made
    here = clone(project, tmp_path / "clone")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    (here / "params.yaml").write_text(f"preprocess: {Path.home()}/data\ntrain: hf_abcdefgh\n")
    (here / "dvc.lock").write_text(f"stages: {{}}  # {Path.home()}/data\n")
    way_back.write(tmp_path / "kept", here)
    assert str(Path.home()) not in (tmp_path / "kept/dvc.lock").read_text()
    text = (tmp_path / "kept" / "params.yaml").read_text()
    assert text == "preprocess: ~/data\ntrain: ***\n"
    assert json.loads((tmp_path / "kept/way_back.json").read_text())["redacted"] == [
        "params.yaml",
        "dvc.lock",
    ]


def test_what_dvc_lock_says_of_a_stage_that_still_runs_is_an_earlier_results():
    out = {name: [{"path": f"data/{name}", "md5": "x"}] for name in ("a", "b", "c")}
    stages = {
        "report": {"deps": [{"path": "data/b/file"}], "outs": out["c"]},
        "evaluate": {"deps": [{"path": "data/a"}], "outs": out["b"]},
        "train": {"params": {"params.yaml": {"train.rate": 5e-06}}, "outs": out["a"]},
    }
    text = json.dumps({"schema": "2.0", "stages": stages})
    kept = YAML(typ="safe").load(way_back.without(text, "evaluate"))
    assert kept["stages"] == {"train": stages["train"]}
    assert YAML(typ="safe").load(way_back.without(text, "other"))["stages"] == stages


# with MLflow: workspace, temporary copy and queue land in one store


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A project and the runs of experiments that ran in the workspace, in a copy and from the
    queue, where one failed."""
    folder = tmp_path_factory.mktemp("tracked")
    project = make(folder, f"TRACKED, KEPT = True, ''\n{STAGES}")
    path = {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "", "MLFLOW_DISABLE_TELEMETRY": "true"}
    path |= {**PLANTED, "DVC_SITE_CACHE_DIR": str(folder / "site")}
    call("dvc", "repro", "--quiet", folder=project, **path)
    commit_and_push(project)
    run = ("dvc", "exp", "run", "--quiet", "-S")
    call(*run, "train.beta=0.4", "-n", "tuned", folder=project, **path)
    call("dvc", "push", "--quiet", folder=project)
    call("git", "checkout", "--quiet", "--force", "main", folder=project)
    call("dvc", "checkout", "--quiet", folder=project)
    call(*run, "train.seed=1", "--temp", "-n", "copy", folder=project, **path)
    call(*run, "train.seed=2", "--queue", "-n", "queued", folder=project, **path)
    call(*run, "train.beta=9", "--queue", "-n", "broken", folder=project, **path)
    attempt("dvc", "exp", "run", "--run-all", "-j", "1", folder=project, **path)
    return project, path


@pytest.fixture
def logged(tracked, monkeypatch):
    from stages.tracking import runs

    project, path = tracked
    monkeypatch.chdir(project)
    for name, value in path.items():
        monkeypatch.setenv(name, value)
    client, experiment = runs.connect()
    return {run.info.run_name: run for run in client.search_runs([experiment])}


@pytest.mark.slow
def test_experiments_of_workspace_copy_and_queue_are_runs_of_one_store(logged):
    assert {"tuned", "copy", "queued", "broken"} < set(logged)
    for name in ("tuned", "copy", "queued"):
        assert logged[name].info.status == "FINISHED"
    changed = {name: logged[name].data.tags["changed"] for name in ("tuned", "queued")}
    assert changed == {"tuned": "train.beta=0.4", "queued": "train.seed=2"}
    assert "train.beta" in logged["tuned"].data.tags["sweep"]


@pytest.mark.slow
def test_a_failed_experiment_of_the_queue_says_why_in_mlflow_and_in_its_log(logged, tracked):
    assert logged["broken"].info.status == "FAILED"
    assert "lower the batch size" in logged["broken"].data.tags["mlflow.note.content"]
    assert "ran out of memory" in call("dvc", "queue", "logs", "broken", folder=tracked[0])


@pytest.mark.slow
def test_no_secret_of_the_environment_is_in_what_experiments_leave(tracked):
    project, _ = tracked
    for kept in (".dvc/config", ".dvc/tmp/exps/run", ".dvc/tmp/exps/celery", "mlflow.db"):
        assert (project / kept).exists()
    assert leaks(project.parent) == []  # DVC's cache of the machine, too


@pytest.mark.slow
def test_seeds_of_one_setting_are_a_group_with_its_mean(logged):
    (group,) = (run for run in logged.values() if "seeds_of" in run.data.tags)
    assert group.info.run_name == "3 seeds of unchanged parameters"
    assert group.data.metrics["win_rate"] == pytest.approx(0.1 + (42 + 1 + 2) / 300)
    assert group.data.metrics["seeds/count"] == 3
    assert group.data.metrics["seeds/win_rate_sd"] == pytest.approx(0.2339, abs=1e-3)
    inside = {
        name
        for name, run in logged.items()
        if run.data.tags.get("mlflow.parentRunId") == group.info.run_id
    }
    assert len(inside) == 3
    assert {"copy", "queued"} < inside


@pytest.mark.slow
def test_a_run_id_and_a_clone_are_enough_to_get_back(logged, tracked, tmp_path):
    project, path = tracked
    here = clone(project, tmp_path / "clone")
    store = {**path, "MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}"}
    restore = ("python", "-m", "stages.commands.restore")
    said = call(*restore, logged["tuned"].info.run_id, folder=here, **store)
    assert "models/adapter" in said
    assert json.loads((here / "models/adapter/weights").read_text())["beta"] == 0.4
    lock = logged["tuned"].data.tags["dvc.md5.models/adapter"]
    assert hashes(here)["models/adapter"] == lock
    done = attempt(*restore, "nobody", folder=here, **store)
    assert "has no run nobody" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_seeds_of_a_setting_are_found_by_their_parameters(tracked, monkeypatch):
    monkeypatch.chdir(tracked[0])
    refs = call("git", "for-each-ref", "--format", "%(refname)", "refs/exps", folder=tracked[0])

    def load(name):
        revision = next((ref for ref in refs.split() if ref.endswith(f"/{name}")), name)
        text = call("git", "show", f"{revision}:params.yaml", folder=tracked[0])
        return experiment(name, parameters=YAML(typ="safe").load(text))

    monkeypatch.setattr(revisions, "load", load)
    found = revisions.seeds_of("copy")
    head = call("git", "rev-parse", "HEAD", folder=tracked[0]).strip()
    assert {one.name for one in found} == {"copy", "queued", head}
