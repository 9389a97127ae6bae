"""Experiments of a real Git and DVC repository in one MLflow store, and the way from a run back to
what made it: in a fresh clone, by the lines of the guide.
"""

import json
import re

import pytest
from ruamel.yaml import YAML

from tests.contracts import ROOT
from tests.repository import REPORTED, STAGES, attempt, call, clone, commit_and_push, hashes, make
from tests.test_secrets import PLANTED, leaks

pytestmark = [pytest.mark.slow, pytest.mark.rehearsal]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, s3):
    """A project whose remote is on S3, and what its commands need: experiments ran in the
    workspace, in a copy and from the queue, where one failed."""
    folder = tmp_path_factory.mktemp("tracked")
    project = make(folder, f"TRACKED = True\n{STAGES}", REPORTED)
    needs = {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "", "MLFLOW_DISABLE_TELEMETRY": "true"}
    needs |= {**PLANTED, "DVC_SITE_CACHE_DIR": str(folder / "site")}
    needs |= {"AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (("url", "s3://shared/store"), ("endpointurl", s3)):
        call("dvc", "remote", "modify", "-q", "storage", name, value, folder=project)
    call("dvc", "repro", "--quiet", folder=project, **needs)
    commit_and_push(project, **needs)
    run = ("dvc", "exp", "run", "--quiet", "-S")
    call(*run, "train.beta=0.4", "-n", "tuned", folder=project, **needs)
    call("dvc", "push", "--quiet", folder=project, **needs)
    call("git", "checkout", "--quiet", "--force", "main", folder=project)
    call("dvc", "checkout", "--quiet", folder=project)
    call(*run, "train.seed=1", "--temp", "-n", "copy", folder=project, **needs)
    call(*run, "train.seed=2", "--queue", "-n", "queued", folder=project, **needs)
    call(*run, "train.beta=9", "--queue", "-n", "broken", folder=project, **needs)
    attempt("dvc", "exp", "run", "--run-all", "-j", "1", folder=project, **needs)
    return project, needs


@pytest.fixture
def logged(tracked, monkeypatch):
    """The runs by name, in the project as the working folder."""
    from stages.tracking import runs

    project, needs = tracked
    monkeypatch.chdir(project)
    for name, value in needs.items():
        monkeypatch.setenv(name, value)
    client, experiment = runs.connect()
    return {run.info.run_name: run for run in client.search_runs([experiment])}


def test_experiments_of_workspace_copy_and_queue_are_runs_of_one_store(logged, tracked):
    status = {name: run.info.status for name, run in logged.items()}
    assert status | {"broken": "FAILED"} == status
    for name in ("tuned", "copy", "queued"):
        assert status[name] == "FINISHED"
    changed = {name: logged[name].data.tags["changed"] for name in ("tuned", "queued")}
    assert changed == {"tuned": "train.beta=0.4", "queued": "train.seed=2"}
    assert "lower the batch size" in logged["broken"].data.tags["mlflow.note.content"]
    assert "ran out of memory" in call("dvc", "queue", "logs", "broken", folder=tracked[0])


def test_no_password_or_token_is_in_what_dvc_and_experiments_leave(tracked):
    project, needs = tracked
    said = attempt("dvc", "push", "--verbose", folder=project, **needs)
    assert said.returncode == 0
    for kept in (".dvc/config", ".dvc/tmp/exps/run", ".dvc/tmp/exps/celery", "mlflow.db"):
        assert (project / kept).exists()
    assert leaks(project.parent, said.stdout, said.stderr) == []  # DVC's cache of the machine, too


def test_the_lines_of_the_guide_lead_from_a_run_back_to_what_made_it(logged, tracked, tmp_path):
    project, needs = tracked
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"(?s)### From a run back .*?```sh\n(.*?)```", text)
    run = logged["tuned"]
    lines = lines.replace("COMMIT", run.data.tags["git.commit"]).replace("RUN", run.info.run_id)
    here = clone(project, tmp_path / "clone")
    store = {**needs, "MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}"}
    call("bash", "-ec", lines, folder=here, **store)
    assert YAML(typ="safe").load((here / "params.yaml").read_text())["train"]["beta"] == 0.4
    assert json.loads((here / "models/adapter/weights").read_text())["beta"] == 0.4
    assert hashes(here)["models/adapter"] == run.data.tags["dvc.md5.models/adapter"]
    assert (here / "reports/curves/train.csv").read_text() == "step,loss\n1,0.4\n"
    assert json.loads((here / "reports/results/metrics.json").read_text()) == {"win_rate": 0.82}
    assert (here / "reports/report.html").read_text() == "<p>0.82</p>"
    assert set(json.loads(call("dvc", "status", "--json", folder=here))) == {"report"}
    call("dvc", "repro", "--quiet", folder=here, **store)
    assert (here / "reports/report.html").read_text() == "<p>0.82</p>"


def test_what_the_working_folder_holds_is_logged_later_and_once(logged, tracked, tmp_path):
    project, needs = tracked
    here = clone(project, tmp_path / "clone")
    call("dvc", "pull", "--quiet", folder=here, **needs)
    text = (here / "params.yaml").read_text()
    (here / "params.yaml").write_text(text.replace("beta: 0.1", "beta: 0.6"))
    away = {**needs, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    done = attempt("dvc", "repro", folder=here, **away)
    assert done.returncode == 0
    assert done.stderr.count("MLflow") == 1
    assert "`make log` logs it later" in done.stderr
    store = {**needs, "MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}"}
    log = ("python", "-m", "stages", "log", "--name", "late")
    for _ in range(2):
        assert "MLflow: logged as late" in call(*log, folder=here, **store)
    from stages.tracking import runs

    client, known = runs.connect()
    (run,) = client.search_runs([known], "tags.experiment = 'late'")
    assert run.data.metrics["win_rate"] == pytest.approx(0.6 + 0.42)
    assert run.data.params["train.beta"] == "0.6"
    (here / "params.yaml").write_text(text.replace("beta: 0.1", "beta: 0.7"))
    done = attempt(*log, folder=here, **store)
    assert "results of something else: evaluate, report, train would run again" in done.stderr
