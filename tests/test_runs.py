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
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stages.commands import sync
from stages.core.errors import UserError
from stages.evaluation.catalogue import HEADLINE
from stages.tracking import failures, runs, shared_view

FINGERPRINT = "0123456789abcdef"
PASSWORD = "hunter2-and-more"
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "DVC_")):
            monkeypatch.delenv(name)
    # What is set where there is nothing must not outlive the test.
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in runs.QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.1)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project that is the working directory, as for every stage."""
    folder = tmp_path / "project"
    (folder / "reports" / "curves").mkdir(parents=True)
    (folder / "reports" / "curves" / "train.csv").write_text(
        "step,epoch,loss,reward_margin\n1,0.1,0.69,\n2,0.2,0.5,0.3\n3,0.3,0.4,nan\n"
    )
    (folder / "reports" / "curves" / "validation.csv").write_text("step,epoch,loss\n3,0.3,0.45\n")
    (folder / "reports" / "report.html").write_text("<p>report</p>")
    (folder / "train.json").write_text("[]")
    monkeypatch.chdir(folder)
    return folder


CURVES = {
    "train/loss": [(1, 0.69), (2, 0.5), (3, 0.4)],
    "train/reward_margin": [(2, 0.3)],
    "validation/loss": [(3, 0.45)],
}


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


def complete(name="brave-cat", fingerprint=FINGERPRINT, **changes):
    values: dict[str, Any] = {
        "parameters": {"train": {"beta": 0.1, "lora_target": ["q", "v"], "seed": None}},
        "metrics": {"win_rate": 0.93, "pairs": 1000, "odds": None},
        "curves": Path("reports/curves"),
        "artifacts": [Path("reports/report.html")],
        "datasets": [Path("train.json")],
    }
    runs.complete_run(fingerprint, name=name, **(values | changes))


def logged():
    """Every run of the experiment, oldest first."""
    client, experiment = runs.connect()
    return sorted(client.search_runs([experiment]), key=lambda run: run.info.start_time)


def curve(run, key):
    history = runs.connect()[0].get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in history)


def files(run):
    return [file.path for file in runs.connect()[0].list_artifacts(run.info.run_id)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def wait_until_told(capfd, words):
    """What is said on standard error until it has these words."""
    said = ""

    def told():
        nonlocal said
        said += capfd.readouterr().err
        return words in said

    wait_for(told)
    return said


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
    assert runs.tracking_uri() == used.format(project=project)
    # An experiment in DVC's temporary copies tracks into the real project.
    copy = project / ".dvc/tmp/exps/standalone/tmpab12"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert runs.tracking_uri() == used.format(project=project)


def test_what_is_not_there_or_no_number_is_the_callers_mistake(project):
    with pytest.raises(FileNotFoundError):
        complete(artifacts=[Path("reports/absent.html")])
    with pytest.raises(ValueError, match="high"):
        complete(metrics={"win_rate": "high"})
    assert not runs.pending()


def test_to_read_a_run_where_there_is_no_database_makes_none_and_names_the_fix(project, tmp_path):
    with pytest.raises(UserError, match=r"there is no \./mlflow\.db;.*set MLFLOW_TRACKING_URI to"):
        runs.download("brave-cat", "way_back", tmp_path / "target")
    assert not list(project.glob("mlflow*"))
    assert not (project / "mlartifacts").exists()


@pytest.mark.slow
def test_to_read_a_run_makes_no_experiment(database, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    with pytest.raises(UserError, match=r"has no experiment another; .*MLFLOW_TRACKING_URI"):
        runs.download("brave-cat", "way_back", tmp_path / "target")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    assert runs.connect()[0].get_experiment_by_name("another") is None


# a server that is not there


@pytest.fixture
def dead(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:{free_port()}")


def test_a_dead_server_costs_one_message(dead, capsys):
    start = time.monotonic()
    with runs.Live(FINGERPRINT) as live:
        for step in range(20):
            live.log(step, "train", {"loss": 0.5})
            time.sleep(0.05)
    assert time.monotonic() - start < 4
    said = capsys.readouterr()
    assert said.err.count("MLflow") == said.err.count("Training goes on without it") == 1
    assert PASSWORD not in said.err + said.out


def test_a_server_that_never_answers_is_given_up_on(project, monkeypatch, capsys):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(runs, "PROBE_SECONDS", 0.3)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        complete()
        assert time.monotonic() - start < 3
    assert "does not answer (timed out)" in capsys.readouterr().err


def test_what_could_not_be_logged_waits_in_the_real_project_with_copies(
    dead, project, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    copy = project / ".dvc" / "tmp" / "exps" / "tmp1"
    copy.mkdir(parents=True)
    for name in ("reports", "train.json"):
        (project / name).rename(copy / name)
    monkeypatch.chdir(copy)
    parameters = {"token": "hf_abcdefgh", "output": f"{copy}/models", "other": f"{project}/x"}
    for _ in range(2):  # the second time changes nothing
        complete(parameters=parameters)
    said = capsys.readouterr().err
    assert "`make sync` logs it later" in said
    (folder,) = runs.pending()
    assert folder.is_relative_to(project / "reports" / "mlflow_pending")
    assert (folder / "artifacts" / "report.html").read_text() == "<p>report</p>"
    assert (folder / "curves" / "validation.csv").is_file()
    text = (folder / "record.json").read_text()
    assert json.loads(text)["parameters"] == {"token": "***", "output": "./models", "other": "./x"}
    for secret in (PASSWORD, "hf_abcdefgh", str(project)):
        assert secret not in said + text

    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "curve.svg").write_text("<svg/>")
    for _ in range(2):  # the report joins what waits
        runs.attach(FINGERPRINT, (tmp_path / "figures",), "brave-cat")
    assert (folder / "artifacts" / "figures" / "curve.svg").read_text() == "<svg/>"
    runs.attach("f" * 16, (tmp_path / "figures",), "brave-cat")
    assert "figures could not be added to the run" in capsys.readouterr().err

    monkeypatch.chdir(project)
    with pytest.raises(UserError, match="still there") as raised:
        sync.main()
    assert PASSWORD not in str(raised.value)
    assert runs.pending() == [folder]


def test_nothing_that_waits_is_said_too(project, capsys):
    sync.main()
    assert "nothing waits" in capsys.readouterr().out


# MLflow itself, with its database


@pytest.mark.slow
def test_two_processes_can_make_one_database_at_once_and_in_silence(made_at_once):
    folder, printed = made_at_once
    assert printed == ["1\n", "1\n"]  # both found or made the same experiment
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


@pytest.mark.slow
def test_an_experiment_is_one_run_with_all_that_evaluate_knows(database, capsys):
    with runs.Live(FINGERPRINT, "brave-cat") as live:
        live.log(1, "train", {"loss": 0.69})
        live.log(3, "validation", {"loss": 0.45})
        wait_for(lambda: logged() and "validation/loss" in logged()[0].data.metrics)
        (run,) = logged()  # live: the training still runs
        assert (run.info.status, run.data.tags["state"]) == ("RUNNING", "training")
        live.log(2, "train", {"reward_margin": 0.3})
    (run,) = logged()
    assert (run.info.status, run.data.tags["state"]) == ("RUNNING", "trained")
    assert curve(run, "train/reward_margin") == [(2, 0.3)]
    for _ in range(2):  # the same again changes nothing
        complete()
        (last,) = logged()
        assert (last.info.run_id, last.info.run_name) == (run.info.run_id, "brave-cat")
        assert (last.info.status, last.data.tags["state"]) == ("FINISHED", "complete")
        assert last.data.params == {
            "train.beta": "0.1",
            "train.lora_target": '["q", "v"]',
            "train.seed": "null",
        }
        assert curve(last, "win_rate") == [(0, 0.93)]
        assert last.data.metrics["evaluation/pairs"] == 1000
        assert not {"odds", "evaluation/odds", "pairs"} & set(last.data.metrics)
        description = last.data.tags["mlflow.note.content"]
        assert "Win rate 93.0%" in description
        assert f"python -m stages restore {last.info.run_id}" in description
        assert {key: curve(last, key) for key in CURVES} == CURVES
        (used,) = last.inputs.dataset_inputs
        assert used.dataset.name == "train"
        assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "train")]
        assert used.dataset.digest == "d751713988987e9331980363e24189ce"  # md5sum of []
        assert files(last) == ["report.html", "way_back"]
    assert list(Path("mlartifacts").rglob("report.html"))
    assert not runs.pending()
    assert capsys.readouterr().err.count("logged as brave-cat (`make ui` shows it)") == 2


@pytest.mark.slow
def test_files_are_added_to_the_completed_run_of_their_experiment(database, tmp_path, capsys):
    (tmp_path / "card.md").write_text("card")
    runs.attach(FINGERPRINT, (tmp_path / "card.md",), "brave-cat")
    assert "it has no completed run brave-cat" in capsys.readouterr().err
    for name in ("brave-cat", "calm-dog"):
        complete(name)
    runs.attach(FINGERPRINT, (tmp_path / "card.md",), "brave-cat")
    runs.attach(FINGERPRINT, (tmp_path / "card.md",), "workspace-abc")  # as after ``restore``
    told = "no completed run workspace-abc, only brave-cat, calm-dog of this training;"
    assert told in capsys.readouterr().err
    found = {run.info.run_name: files(run) for run in logged()}
    assert found == {
        "brave-cat": ["card.md", "report.html", "way_back"],
        "calm-dog": ["report.html", "way_back"],
    }


@pytest.mark.slow
def test_another_name_result_or_training_is_another_run(database):
    with runs.Live(FINGERPRINT, "brave-cat"):
        pass
    complete("brave-cat")
    complete("calm-dog")  # DVC did not train again
    first, second = logged()
    assert (first.info.run_name, second.info.run_name) == ("brave-cat", "calm-dog")
    assert curve(second, "train/loss") == CURVES["train/loss"]
    complete("brave-cat", metrics={"win_rate": 0.5})
    assert sorted(run.data.metrics["win_rate"] for run in logged()) == [0.5, 0.93, 0.93]
    complete("brave-cat", fingerprint="f" * 16)
    assert len(logged()) == 4
    with runs.Live(FINGERPRINT, "brave-cat"):  # `-f`: the completed one is left alone
        pass
    assert len(logged()) == 5


@pytest.mark.slow
def test_only_a_training_that_ended_is_taken_over_by_the_experiment_that_evaluates_it(database):
    with runs.Live(FINGERPRINT, "workspace-abc1234"):
        wait_for(logged)
        complete("calm-dog")  # it runs elsewhere: a run of its own
        assert [run.info.run_name for run in logged()] == ["workspace-abc1234", "calm-dog"]
    complete("brave-cat")
    assert [run.info.run_name for run in logged()] == ["brave-cat", "calm-dog"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_training_that_broke_off_resumes_in_the_same_run(database, error, status):
    with pytest.raises(error), runs.Live(FINGERPRINT, "brave-cat"):
        raise error("the last lines that it printed")
    (run,) = logged()
    assert run.info.status == status
    why = {"FAILED": "the last lines that it printed", "KILLED": "the same command continues"}
    assert why[status] in run.data.tags["mlflow.note.content"]
    with runs.Live(FINGERPRINT, "brave-cat"):
        wait_for(lambda: logged()[0].info.status == "RUNNING")
    assert [again.info.run_id for again in logged()] == [run.info.run_id]


@pytest.mark.slow
def test_a_stage_that_fails_after_the_training_says_so_in_its_run(database, monkeypatch):
    name = "brave-cat"
    monkeypatch.setenv("DVC_EXP_NAME", name)
    with runs.Live(FINGERPRINT, name):
        pass
    adapter = Path("adapter")
    adapter.mkdir()

    @failures.reported
    def stage(adapter, error):
        raise error

    for fingerprint, error in ((FINGERPRINT, ValueError("no such task")), ("f" * 16, OSError("x"))):
        (adapter / "fingerprint.json").write_text(json.dumps({"fingerprint": fingerprint}))
        with pytest.raises(type(error)):
            stage(adapter, error)
    (run,) = logged()  # of a training without a run, nothing is made
    assert (run.info.status, run.data.tags["state"]) == ("FAILED", "trained")
    assert "no such task" in run.data.tags["mlflow.note.content"]
    complete(name)
    (run,) = logged()
    assert run.info.status == "FINISHED"


@pytest.mark.slow
def test_a_stage_that_fails_before_the_training_is_a_failed_run_that_the_next_attempt_takes_up(
    database, monkeypatch
):
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    monkeypatch.setenv("DVC_STAGE", "dvc.yaml:preprocess")

    @failures.reported
    def stage(error):
        raise error

    def fail(error):
        with pytest.raises(type(error)):
            stage(error)

    fail(ValueError("a slip in dvc repro"))
    assert logged() == []
    monkeypatch.setenv("DVC_EXP_NAME", "brave-cat")
    fail(KeyboardInterrupt())
    assert logged() == []
    fail(UserError("data/raw: no such column"))
    fail(UserError("data/raw: no column 'image'\nname it in data.columns"))
    (run,) = logged()
    assert (run.info.status, run.info.run_name) == ("FAILED", "brave-cat")
    told = run.data.tags["mlflow.note.content"]
    assert told == "`preprocess`\n\n    data/raw: no column 'image'\n    name it in data.columns"
    with runs.Live(FINGERPRINT):
        pass
    fail(UserError("no memory"))  # DVC may run baseline after the training
    assert [each.info.status for each in logged()] == ["FAILED"]
    complete("brave-cat")
    assert [each.info.status for each in logged()] == ["FINISHED"]
    assert logged()[0].info.run_id == run.info.run_id


@pytest.mark.slow
def test_the_shared_view_has_the_headline_and_the_parameters_that_differ(database):
    for beta in (0.1, 0.2):
        complete(f"beta-{beta}", f"{beta:016}", parameters={"train": {"beta": beta, "rank": 8}})
    client, experiment = runs.connect()
    path = shared_view.keep()
    assert path == f"#/experiments/{experiment}/runs?viewStateShareKey=headline"
    tag = client.get_experiment(experiment).tags["mlflow.sharedViewState.headline"]
    columns = json.loads(tag)["selectedColumns"]
    assert columns[: len(HEADLINE)] == [f"metrics.`{key}`" for key in HEADLINE]
    assert "params.`train.beta`" in columns
    assert "params.`train.rank`" not in columns


@pytest.mark.slow
def test_the_machine_is_watched_where_it_is_asked_for(database, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with runs.Live(FINGERPRINT, "brave-cat"):
        wait_for(lambda: logged() and any("system/" in key for key in logged()[0].data.metrics))
    (run,) = logged()
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert run.info.status == "RUNNING"


@pytest.mark.slow
def test_name_and_password_are_sent_to_the_server_and_a_wrong_one_is_told(project, monkeypatch):
    asked = []

    class Guarded(BaseHTTPRequestHandler):
        def do_GET(self):
            given = self.headers.get("Authorization", "")
            asked.append((self.path, given))
            right = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
            known = self.path == "/health" or given == f"Basic {right}"
            body = json.dumps({"experiment": {"experiment_id": "7", "name": "x"}}).encode()
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(body if known else b"You are not authenticated")

        def log_message(self, *_):
            pass

    guarded = ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=guarded.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{guarded.server_port}")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        assert runs.connect()[1] == "7"
        assert any(path != "/health" for path, _ in asked)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password")
        with pytest.raises(Exception, match="401") as raised:
            runs.connect()
        assert "wrong-password" not in runs.reason(raised.value)
    finally:
        guarded.shutdown()


@pytest.mark.slow
def test_a_failure_in_the_middle_of_logging_is_repaired_by_logging_again(database, monkeypatch):
    from mlflow import MlflowClient

    def fail(*_, **__):
        raise ConnectionResetError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", fail)
        complete()
    assert [run.data.tags["state"] for run in logged()] == ["trained"]
    (Path("reports") / "report.html").write_text("overwritten by the next experiment")
    sync.main()
    (run,) = logged()
    assert run.data.tags["state"] == "complete"
    assert curve(run, "win_rate") == [(0, 0.93)]
    assert {key: curve(run, key) for key in CURVES} == CURVES
    (file,) = Path("mlartifacts").rglob("report.html")
    assert file.read_text() == "<p>report</p>"
    assert not runs.pending()


@pytest.mark.slow
def test_many_parameters_long_values_and_odd_names_are_logged(database):
    parameters = {f"key {i} (β)": "x" * 7000 for i in range(230)}
    metrics = {f"slice/{i}": float(i) for i in range(1500)} | {"undefined": float("nan")}
    for _ in range(2):
        complete(parameters=parameters, metrics=metrics)
    (run,) = logged()
    assert len(run.data.params) == 230
    assert 5000 < len(run.data.params["key 7 ___"]) <= 6000
    assert run.data.metrics["evaluation/slice/1499"] == 1499
    assert len(curve(run, "evaluation/undefined")) == 1


# a server


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


def points(database):
    with sqlite3.connect(database) as look:
        return look.execute("select key, step, value from metrics order by key, step").fetchall()


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
    with runs.Live(FINGERPRINT, "brave-cat") as live:
        with server(*served):
            live.log(1, "train", {"loss": 0.69})
            wait_for(lambda: points(database) == [("train/loss", 1, 0.69)])
            # A second batch is sent only once the answer to the first has come: a server that is
            # killed before is, to the thread, one that never came.
            live.log(1, "train", {"begun": 1.0})
            wait_for(lambda: points(database)[0] == ("train/begun", 1, 1.0))
            capfd.readouterr()  # the server may have come after the first attempt
        live.log(2, "train", {"loss": 0.5})
        said = wait_until_told(capfd, "MLflow")
        complete()
        (waiting,) = runs.pending()
        with server(*served):
            live.log(3, "train", {"loss": 0.4})
            wait_for(lambda: points(database)[-1:] == [("train/loss", 3, 0.4)])
            sync.main()
            (run,) = logged()
            assert run.info.status == "FINISHED"
            assert {key: curve(run, key) for key in CURVES} == CURVES
            assert files(run) == ["report.html", "way_back"]
    said += "".join(capfd.readouterr())
    assert said.count("Training goes on without it") == 2  # one for each time that it went
    assert not waiting.exists()
    assert f"http://127.0.0.1:{port}/#/experiments/" in said
    assert PASSWORD not in said
    assert PASSWORD.encode() not in database.read_bytes()
