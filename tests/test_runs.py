"""MLflow runs: one for each experiment, and no failure of MLflow that costs a result.

Tests that need MLflow itself are marked slow: importing it and making a database take 20 s.
"""

import base64
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from stages.commands import log
from stages.core.errors import UserError
from stages.evaluation.catalogue import HEADLINE
from stages.tracking import runs
from tests.repository import free_port, wait_for

FINGERPRINT = "0123456789abcdef"
PASSWORD = "hunter2-and-more"
ROOT = Path(__file__).parent.parent
FILES = ["dvc.lock", "params.yaml", "reports"]
CURVES = {
    "train/loss": [(1, 0.69), (2, 0.5), (3, 0.4)],
    "train/reward_margin": [(2, 0.3)],
    "validation/loss": [(3, 0.45)],
}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    # What is set where there is nothing must not outlive the test.
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in runs.QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.1)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project without parameters and metrics that is the working directory."""
    folder = tmp_path / "project"
    for name in ("reports/curves", "reports/results", "adapter"):
        (folder / name).mkdir(parents=True)
    (folder / "reports" / "curves" / "train.csv").write_text(
        "step,epoch,loss,reward_margin\n1,0.1,0.69,\n2,0.2,0.5,0.3\n3,0.3,0.4,nan\n"
    )
    (folder / "reports" / "curves" / "validation.csv").write_text("step,epoch,loss\n3,0.3,0.45\n")
    (folder / "reports" / "report.html").write_text("<p>report</p>")
    out = {"path": "reports/curves", "md5": "c.dir"}
    (folder / "dvc.lock").write_text(json.dumps({"stages": {"train": {"outs": [out]}}}))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def made_at_once(tmp_path_factory):
    """A project in which two processes met no database (20 s), once, and what they printed."""
    folder = tmp_path_factory.mktemp("made_at_once")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", "from stages.tracking import runs; print(runs.connect()[1])"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    return folder, [process.communicate()[0] for process in processes]


@pytest.fixture
def database(project, made_at_once):
    """The project with a database in it, in which nothing was logged."""
    shutil.copyfile(made_at_once[0] / "mlflow.db", project / "mlflow.db")
    with sqlite3.connect(project / "mlflow.db") as edit:  # artifacts go beside the database
        edit.execute(
            "update experiments set artifact_location = ? where name = ?",
            ((project / "mlartifacts").as_uri(), runs.EXPERIMENT),
        )
    return project / "mlflow.db"


def outcome(fingerprint=FINGERPRINT, parameters=None, metrics=None, files=("reports/report.html",)):
    """Leave an experiment's results in the working folder."""
    parameters = parameters or {"train": {"beta": 0.1, "lora_target": ["q", "v"], "seed": None}}
    metrics = metrics or {"win_rate": 0.93, "pairs": 1000, "odds": None}
    Path("params.yaml").write_text(json.dumps(parameters))
    Path("reports/results/metrics.json").write_text(json.dumps(metrics))
    Path("adapter/fingerprint.json").write_text(json.dumps({"fingerprint": fingerprint}))
    places = (Path("reports/results"), Path("reports/curves"), Path("adapter"))
    return *places, [Path(file) for file in files]


def complete(name="brave-cat", fingerprint=FINGERPRINT, **changes):
    runs.log_outcome(*outcome(fingerprint, **changes), name=name)


def logged():
    """Every run of the experiment, oldest first."""
    client, experiment = runs.connect()
    return sorted(client.search_runs([experiment]), key=lambda run: run.info.start_time)


def curves(run, keys=CURVES):
    history = {key: runs.connect()[0].get_metric_history(run.info.run_id, key) for key in keys}
    return {key: sorted((p.step, p.value) for p in points) for key, points in history.items()}


def files(run, folder=None):
    return [file.path for file in runs.connect()[0].list_artifacts(run.info.run_id, folder)]


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (f"https://me:{PASSWORD}@host:8443/mlflow", "https://host:8443/mlflow"),
        ("sqlite:////somewhere/else.db", "sqlite:////somewhere/else.db"),
        ("sqlite:///other.db", "sqlite:///{project}/other.db"),
        (" ", "sqlite:///{project}/mlflow.db"),
    ],
)
def test_the_address_is_the_environments_without_its_password(project, monkeypatch, given, used):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    # An experiment in DVC's temporary copies tracks into the real project.
    copy = project / ".dvc/tmp/exps/standalone/tmpab12"
    copy.mkdir(parents=True)
    for folder in (project, copy):
        monkeypatch.chdir(folder)
        assert runs.tracking_uri() == used.format(project=project)


# a server that is not there


def test_a_server_that_is_dead_or_silent_costs_one_message(project, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:{free_port()}")
    start = time.monotonic()
    with runs.Live(FINGERPRINT) as live:
        for step in range(20):
            live.log(step, "train", {"loss": 0.5})
            time.sleep(0.05)
    said = capsys.readouterr().err
    assert said.count("MLflow") == said.count("The training continues without them") == 1
    runs.complete_run(*outcome())
    assert time.monotonic() - start < 5
    more = capsys.readouterr().err
    assert "Nothing is lost: `make log` logs it later" in more
    copy = project / ".dvc/tmp/exps/standalone/tmpab12"
    shutil.copytree(project, copy, ignore=lambda *_: [".dvc"])
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_EXP_NAME", "brave-cat")
    runs.complete_run(*outcome())
    more += capsys.readouterr().err
    assert "`dvc exp apply brave-cat` and `make log NAME=brave-cat` logs it later" in more
    assert PASSWORD not in said + more
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(runs, "PROBE_SECONDS", 0.3)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        runs.complete_run(*outcome())
    assert "does not answer (timed out)" in capsys.readouterr().err


# MLflow itself, with its database


@pytest.mark.slow
def test_two_processes_can_make_one_database_at_once_and_in_silence(made_at_once):
    folder, printed = made_at_once
    assert printed == ["1\n", "1\n"]  # both found or made the same experiment
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


@pytest.mark.slow
def test_an_experiment_is_one_run_with_all_that_its_folder_holds(database, tmp_path, capsys):
    with runs.Live(FINGERPRINT, "brave-cat") as live:
        live.log(1, "train", {"loss": 0.69})
        live.log(3, "validation", {"loss": 0.45})
        wait_for(lambda: logged() and "validation/loss" in logged()[0].data.metrics)
        (run,) = logged()  # live: the training still runs
        assert run.info.status == "RUNNING"
        live.log(2, "train", {"reward_margin": 0.3})
    (run,) = logged()
    assert run.info.status == "FINISHED"
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "loss.png").write_text("png")
    for name in ("brave-cat", "workspace-abc"):  # the same again changes nothing
        complete(name, files=("reports/report.html", tmp_path / "figures"))
        (last,) = logged()
        assert (last.info.run_id, last.info.run_name) == (run.info.run_id, "brave-cat")
        assert last.info.status == "FINISHED"
        assert last.data.params == {
            "train.beta": "0.1",
            "train.lora_target": '["q", "v"]',
            "train.seed": "null",
        }
        assert curves(last, ["win_rate"]) == {"win_rate": [(0, 0.93)]}
        assert last.data.metrics["evaluation/pairs"] == 1000
        assert not {"odds", "evaluation/odds", "pairs"} & set(last.data.metrics)
        assert "Win rate 93.0%" in last.data.tags["mlflow.note.content"]
        assert curves(last) == CURVES
        assert files(last) == FILES
        names = ["reports/curves", "reports/figures", "reports/report.html"]
        assert files(last, "reports") == names
    assert list(Path("mlartifacts").rglob("loss.png"))
    runs.complete_run(*outcome())
    assert "logged as brave-cat (`make ui` shows it)" in capsys.readouterr().err


@pytest.mark.slow
def test_another_result_or_training_is_another_run(database):
    with runs.Live(FINGERPRINT, "brave-cat"):
        pass
    complete("brave-cat")
    complete("calm-dog", metrics={"win_rate": 0.5})  # DVC did not train again
    first, second = logged()
    assert (first.info.run_name, second.info.run_name) == ("brave-cat", "calm-dog")
    assert curves(second) == CURVES
    complete("brave-cat", fingerprint="f" * 16)
    assert len(logged()) == 3
    with runs.Live(FINGERPRINT, "brave-cat"):  # `-f`: the completed one is left alone
        pass
    assert len(logged()) == 4


@pytest.mark.slow
def test_only_a_training_that_ended_is_taken_over_by_the_experiment_that_evaluates_it(database):
    with runs.Live(FINGERPRINT, "workspace-abc1234"):
        wait_for(lambda: logged() and logged()[0].info.status == "RUNNING")
        complete("calm-dog")  # it runs elsewhere: a run of its own
    complete("brave-cat", metrics={"win_rate": 0.5})
    assert [run.info.run_name for run in logged()] == ["brave-cat", "calm-dog"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status", "why"),
    [
        (RuntimeError, "FAILED", "the last lines that it printed"),
        (KeyboardInterrupt, "KILLED", "the same command continues"),
    ],
)
def test_a_training_that_broke_off_resumes_in_the_same_run(database, error, status, why):
    with pytest.raises(error), runs.Live(FINGERPRINT, "brave-cat"):
        raise error("the last lines that it printed")
    (run,) = logged()
    assert run.info.status == status
    assert why in run.data.tags["mlflow.note.content"]
    with runs.Live(FINGERPRINT, "brave-cat"):
        wait_for(lambda: logged()[0].info.status == "RUNNING")
    assert [again.info.run_id for again in logged()] == [run.info.run_id]


@pytest.mark.slow
def test_a_failure_in_the_middle_of_logging_is_repaired_by_logging_again(database, monkeypatch):
    from mlflow import MlflowClient

    def fail(*_, **__):
        raise ConnectionResetError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", fail)
        with pytest.raises(ConnectionResetError):
            complete()
    assert [run.info.status for run in logged()] == ["RUNNING"]
    complete()
    (run,) = logged()
    assert run.info.status == "FINISHED"
    assert curves(run, [*CURVES, "win_rate"]) == CURVES | {"win_rate": [(0, 0.93)]}
    assert files(run) == FILES


@pytest.mark.slow
def test_many_parameters_long_values_and_odd_names_are_logged(database):
    parameters = {f"key {i} (β)": "x" * 7000 for i in range(230)}
    metrics = {"win_rate": 0.9} | {f"slice/{i}": float(i) for i in range(1500)}
    for _ in range(2):
        complete(parameters=parameters, metrics=metrics)
    (run,) = logged()
    assert len(run.data.params) == 230
    assert 5000 < len(run.data.params["key 7 ___"]) <= 6000
    assert run.data.metrics["evaluation/slice/1499"] == 1499


@pytest.mark.slow
def test_the_view_has_the_headline_and_the_parameters_that_differ(database, capsys):
    for beta in (0.1, 0.2):
        complete(f"beta-{beta}", f"{beta:016}", parameters={"train": {"beta": beta, "rank": 8}})
    client, experiment = runs.connect()
    port = free_port()
    log.main(ui_port=port)
    path = f"#/experiments/{experiment}/runs?viewStateShareKey=headline"
    assert capsys.readouterr().out == f"http://127.0.0.1:{port}/{path}\n"
    tag = client.get_experiment(experiment).tags["mlflow.sharedViewState.headline"]
    columns = json.loads(tag)["selectedColumns"]
    figures = [f"metrics.`{key}`" for key in HEADLINE]
    first, rest = figures[: log.FIRST], figures[log.FIRST :]
    assert columns[: len(figures) + 1] == [*first, "params.`train.beta`", *rest]
    assert "params.`train.rank`" not in columns


def test_a_port_that_is_taken_is_one_sentence(project):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} .*`make ui PORT={port + 1}`"):
            log.main(ui_port=port)


@pytest.mark.slow
def test_a_deleted_experiment_is_restored_as_the_message_says_or_another_is_named(
    database, monkeypatch, capsys
):
    client, experiment = runs.connect()
    client.delete_experiment(experiment)
    runs.complete_run(*outcome())
    said = capsys.readouterr().err
    restore = f"mlflow experiments restore --experiment-id {experiment}"
    assert f"was deleted: `{restore}` brings it back, or name another one" in said
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
        complete()
    subprocess.run([sys.executable, "-m", *restore.split()], check=True, capture_output=True)
    complete()
    assert len(logged()) == 1


# servers


@contextmanager
def server(store, port, folder, *options, **environment):
    """``mlflow server`` on a database, its artifacts in ``folder``; killed outright at the end."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
            *("--workers", "1", "--backend-store-uri", store, *options),
            *("--artifacts-destination", str(folder)),
        ],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: answers(port), 120)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port):
    try:
        runs._probe(f"http://127.0.0.1:{port}")
    except ConnectionError:
        return False
    return True


def points(database) -> list[Any]:
    with sqlite3.connect(database) as look:
        return look.execute("select key, step from metrics order by step, key").fetchall()


@pytest.mark.rehearsal
@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_loses_nothing_and_leaks_nothing(
    project, made_at_once, monkeypatch, capfd
):
    database, port = project / "served.db", free_port()
    served = f"sqlite:///{database}", port, project / "served"
    shutil.copyfile(made_at_once[0] / "mlflow.db", database)
    monkeypatch.setattr(runs, "RETRY_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "served")  # whose artifacts the server keeps
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:{port}")
    monkeypatch.setenv("DVC_EXP_NAME", "brave-cat")
    said = ""
    with runs.Live(FINGERPRINT) as live:
        with server(*served):
            live.log(1, "train", {"loss": 0.69})
            wait_for(lambda: points(database) == [("train/loss", 1)])
            # A second batch is sent only once the answer to the first has come: a server that is
            # killed before is, to the thread, one that never came.
            live.log(2, "train", {"begun": 1.0})
            wait_for(lambda: points(database)[-1] == ("train/begun", 2))
            capfd.readouterr()  # the server may have come after the first attempt
        live.log(2, "train", {"loss": 0.5})
        while "MLflow" not in said:
            said += capfd.readouterr().err
        with server(*served):
            live.log(3, "train", {"loss": 0.4})
            wait_for(lambda: points(database)[-1] == ("train/loss", 3))
            runs.complete_run(*outcome())
            (run,) = logged()
            assert run.info.status == "FINISHED"
            assert curves(run) == CURVES
            assert files(run) == FILES
    said += "".join(capfd.readouterr())
    assert "The training continues without them" in said
    assert f"http://127.0.0.1:{port}/#/experiments/" in said
    assert PASSWORD not in said
    assert PASSWORD.encode() not in database.read_bytes()


# a server as a team runs it, with MLflow's own accounts

ADMIN, ANN, BOB = "the-admins-own-1", "the-password-of-ann", "the-password-of-bob"


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """The address of a server in which ann and bob have accounts."""
    folder, port = tmp_path_factory.mktemp("team"), free_port()
    accounts = f"default_permission = READ\ndatabase_uri = sqlite:///{folder}/accounts.db\n"
    accounts += "auth_cache_ttl_seconds = 60\n"  # else each request costs a third of a second
    (folder / "accounts.ini").write_text(f"[mlflow]\n{accounts}")
    settings = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "accounts.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs the forms of this test",
    }
    address, files = f"http://127.0.0.1:{port}", folder / "files"
    with server(f"sqlite:///{folder}/runs.db", port, files, "--app-name", "basic-auth", **settings):
        for name, password in (("ann", ANN), ("bob", BOB)):
            tell(address, "2.0/mlflow/users/create", username=name, password=password)
        yield address


def tell(address, what, **values):
    """Post what only MLflow's admin may ask for."""
    request = urllib.request.Request(
        f"{address}/api/{what}",
        json.dumps(values).encode(),
        {
            "Content-Type": "application/json",
            "Authorization": f"Basic {base64.b64encode(f'admin:{ADMIN}'.encode()).decode()}",
        },
    )
    urllib.request.urlopen(request).close()


@pytest.fixture
def log_in(team, project, monkeypatch):
    """``log_in(name, password)`` as this process, in an empty project."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team)

    def log_in(name, password):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    return log_in


def run_of(name):
    (run,) = (run for run in logged() if run.info.run_name == name)
    return run


@pytest.mark.rehearsal
@pytest.mark.slow
@pytest.mark.skipif(not find_spec("flask_wtf"), reason="Flask-WTF is one of the extras")
def test_who_is_refused_is_told_once_and_logs_later(team, log_in, capfd):
    log_in("ann", "not-the-password")
    with runs.Live(FINGERPRINT, "brave-cat") as live:
        live.log(1, "train", {"loss": 0.69})
    runs.complete_run(*outcome())
    said = "".join(capfd.readouterr())
    assert said.count("set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") == 2
    assert len(said.splitlines()) == 2  # of the curves, and of the run
    log_in("ann", ANN)
    complete("brave-cat")
    assert curves(run_of("brave-cat")) == CURVES
    _, experiment = runs.connect()  # whoever makes it may write to it, and nobody else
    log_in("bob", BOB)
    bobs = outcome(metrics={"win_rate": 0.5})
    runs.complete_run(*bobs)
    said += capfd.readouterr().err
    assert "has to grant EDIT" in said
    grant = {"resource_type": "experiment", "resource_id": experiment, "permission": "EDIT"}
    tell(team, "3.0/mlflow/users/permissions/grant", username="bob", **grant)
    runs.log_outcome(*bobs, name="calm-dog")
    assert run_of("calm-dog").info.status == "FINISHED"
    said += "".join(capfd.readouterr())
    assert not any(secret in said for secret in (ADMIN, ANN, BOB, "not-the-password"))
