"""Tracking: one run for each experiment, and no failure of MLflow that costs a result.

Tests that need MLflow itself are marked slow: importing it and making a database take 20 s.
"""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

from stages.core.errors import UserError
from stages.tracking import runs as tracking

FINGERPRINT = "0123456789abcdef"
PASSWORD = "hunter2-and-more"
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _no_tracking_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "DVC_")):
            monkeypatch.delenv(name)
    # What _client sets by default must not outlive the test.
    for name, value in tracking._QUIET.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project that is the working directory, as for every stage."""
    folder = tmp_path / "project"
    (folder / "reports" / "training").mkdir(parents=True)
    (folder / "reports" / "training" / "train.csv").write_text(
        "step,epoch,loss,reward_margin\n1,0.1,0.69,\n2,0.2,0.5,0.3\n3,0.3,0.4,0.6\n"
    )
    (folder / "reports" / "training" / "validation.csv").write_text("step,epoch,loss\n3,0.3,0.45\n")
    (folder / "reports" / "report.html").write_text("<p>report</p>")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def empty_project(tmp_path_factory):
    """A folder in which MLflow made its database (20 s), once, and what it printed meanwhile."""
    folder = tmp_path_factory.mktemp("empty_project")
    code = (
        "import pathlib as p, stages.tracking.runs as t; t._client(p.Path()).search_experiments()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return folder, done.stdout


@pytest.fixture
def database(project, empty_project):
    (project / "mlflow.db").write_bytes((empty_project[0] / "mlflow.db").read_bytes())
    return project / "mlflow.db"


def record(name="brave-cat", **changes):
    values = {
        "name": name,
        "parameters": {"train": {"beta": 0.1, "lora_target": ["q", "v"], "seed": None}},
        "metrics": {"win_rate": 0.93, "pairs": 1000, "odds": None},
        "curves": Path("reports/training"),
        "tags": {"git.commit": "c0ffee"},
        "artifacts": (Path("reports/report.html"),),
        "datasets": (
            tracking.Dataset("pairs", "d41d8cd98f00b204e9800998ecf8427e.dir", "easy-vqa"),
        ),
    }
    return tracking.RunRecord(**(values | changes))


def runs(root=Path()):
    """Every run of the experiment, oldest first."""
    client = tracking._client(root)
    found = client.get_experiment_by_name(tracking.EXPERIMENT)
    return sorted(
        client.search_runs([found.experiment_id]) if found else [], key=lambda r: r.info.start_time
    )


def curve(run, key):
    history = tracking._client(Path()).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in history)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# where things are


@pytest.mark.parametrize("below", [".dvc/tmp/exps/tmpab12", ".dvc/tmp/exps/standalone/tmpab12/sub"])
def test_an_experiment_in_a_temporary_copy_tracks_into_the_real_project(tmp_path, below):
    copy = tmp_path / below
    copy.mkdir(parents=True)
    assert tracking.project_root(copy) == tmp_path.resolve()
    assert tracking.tracking_uri(copy) == f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    assert tracking.tracking_uri(tmp_path) == tracking.tracking_uri(copy)


def test_a_project_that_lives_below_some_dvc_folder_is_its_own_root(tmp_path):
    folder = tmp_path / ".dvc" / "tmp"
    folder.mkdir(parents=True)
    assert tracking.project_root(folder) == folder.resolve()


def test_the_address_is_the_environments_without_its_password(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{PASSWORD}@host:8443/mlflow")
    assert tracking.tracking_uri(tmp_path) == "https://host:8443/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////somewhere/else.db")
    assert tracking.tracking_uri(tmp_path) == "sqlite:////somewhere/else.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert tracking.tracking_uri(tmp_path) == f"sqlite:///{tmp_path.resolve()}/other.db"


# what is shown


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


def git(folder, *arguments):
    subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments],
        check=True,
        capture_output=True,
    )


def test_provenance_says_what_a_result_came_from(project, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "brave-cat")
    lock = {
        "schema": "2.0",
        "stages": {
            "preprocess": {"outs": [{"path": "data/pairs", "md5": "aa.dir"}]},
            "train": {"outs": [{"path": "models/adapter", "md5": "bb.dir"}]},
            "evaluate": {"outs": [{"path": "reports/metrics.json", "md5": "cc"}]},
        },
    }
    (project / "dvc.lock").write_text(json.dumps(lock))
    (project / "data" / "raw").mkdir(parents=True)
    source = {"kind": "hub", "repo": "me/pairs", "commit": "f" * 40, "licence": None}
    (project / "data" / "raw" / "SOURCE.json").write_text(json.dumps(source))
    (project / "reports" / "metrics.json").write_text("{}")
    (project / "params.yaml").write_text("beta: 0.1\n")
    git(project, "init", "-q", "-b", "main")
    git(project, "add", "dvc.lock", "reports/metrics.json", "params.yaml")
    git(project, "commit", "-qm", "first")
    tags = tracking.provenance()
    assert len(tags.pop("git.commit")) == 40
    assert tags == {
        "git.branch": "main",
        "git.state": "clean",
        "dvc.experiment": "brave-cat",
        "dvc.md5.data/pairs": "aa.dir",
        "dvc.md5.models/adapter": "bb.dir",
        "data.kind": "hub",
        "data.repo": "me/pairs",
        "data.commit": "f" * 40,
    }
    # What a run of the pipeline itself changes does not make it dirty; a parameter does.
    (project / "reports" / "metrics.json").write_text('{"win_rate": 1}')
    (project / "dvc.lock").write_text(json.dumps(lock) + "\n")
    assert tracking.provenance()["git.state"] == "clean"
    (project / "params.yaml").write_text("beta: 0.2\n")
    assert tracking.provenance()["git.state"] == "dirty: params.yaml"
    # The repository's index may say otherwise, as it does in DVC's temporary copies.
    git(project, "update-index", "--assume-unchanged", "params.yaml")
    assert tracking.provenance()["git.state"] == "dirty: params.yaml"
    assert tracking.experiment_name() == "brave-cat"
    monkeypatch.delenv("DVC_EXP_NAME")
    assert tracking.experiment_name().startswith("workspace-")


def test_provenance_works_in_a_temporary_copy_and_in_a_project_below_the_repository(tmp_path):
    origin = tmp_path / "repository"
    (origin / "sub").mkdir(parents=True)
    (origin / "sub" / "params.yaml").write_text("beta: 0.1\n")
    git(origin, "init", "-q", "-b", "main")
    git(origin, "add", ".")
    git(origin, "commit", "-qm", "first")
    copy = origin / "sub" / ".dvc" / "tmp" / "exps" / "tmp1"
    git(tmp_path, "clone", "-q", str(origin), str(copy))
    (copy / "sub" / "params.yaml").write_text("beta: 0.2\n")
    there, here = tracking.provenance(copy / "sub"), tracking.provenance(origin / "sub")
    assert there["git.commit"] == here["git.commit"]
    assert there["git.state"] == "dirty: params.yaml"
    assert here["git.state"] == "clean"


def test_provenance_without_a_repository_is_silent(project, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(project.parent))
    assert tracking.provenance() == {}
    assert tracking.experiment_name() == "workspace-uncommitted"


# the pieces


def test_parameters_are_flattened_and_long_values_shortened_visibly():
    assert tracking._flat(
        {"a": {"b": {"c": 1}, "d": [1, "x"]}, "e": None, "f": "s", "g": 5e-6}
    ) == {
        "a.b.c": "1",
        "a.d": '[1, "x"]',
        "e": "null",
        "f": "s",
        "g": "5e-06",
    }
    assert tracking._short("x" * 50, 50) == "x" * 50
    assert tracking._short("x" * 51, 50) == "x" * 31 + "... (51 characters)"
    assert tracking._key("rewards/margins (β)") == "rewards/margins ___"


def test_curves_are_read_from_a_folder_or_from_one_file_with_a_split_column(project, tmp_path):
    expected = [
        ("train/loss", 1, 0.69),
        ("train/loss", 2, 0.5),
        ("train/reward_margin", 2, 0.3),
        ("train/loss", 3, 0.4),
        ("train/reward_margin", 3, 0.6),
        ("validation/loss", 3, 0.45),
    ]
    assert list(tracking._curves(project / "reports" / "training")) == expected
    single = tmp_path / "training.csv"
    single.write_text(
        "step,epoch,split,loss\n1,0.1,train,0.69\n3,0.3,validation,0.45\n4,0.4,train,nan\n"
    )
    assert list(tracking._curves(single)) == [expected[0], expected[-1]]


def test_a_fingerprint_that_could_not_stand_in_a_query_is_refused():
    with pytest.raises(ValueError, match="fingerprint"):
        tracking.open_run("x' or tags.a = 'b", "name")


def test_a_missing_artifact_and_a_metric_that_is_no_number_are_the_callers_mistakes(project):
    with pytest.raises(FileNotFoundError):
        tracking.complete_run(FINGERPRINT, record(artifacts=(Path("reports/absent.html"),)))
    with pytest.raises(ValueError, match="win_rate"):
        tracking.complete_run(FINGERPRINT, record(metrics={"win_rate": "high"}))


# an unreachable server


def test_an_unreachable_server_costs_seconds_and_one_message(project, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:{free_port()}")
    start = time.monotonic()
    assert tracking.open_run(FINGERPRINT, "brave-cat") is None
    assert time.monotonic() - start < 5
    said = capsys.readouterr()
    assert "Training goes on" in said.err
    assert PASSWORD not in said.err + said.out


def test_a_server_that_never_answers_is_given_up_on(project, monkeypatch, capsys):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(runs, "PROBE_SECONDS", 0.3)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert tracking.open_run(FINGERPRINT, "brave-cat") is None
        assert time.monotonic() - start < 3
    assert "does not answer (timed out)" in capsys.readouterr().err


def test_what_could_not_be_logged_is_kept_in_the_real_project_with_copies(
    project, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:{free_port()}")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    copy = project / ".dvc" / "tmp" / "exps" / "tmp1"
    copy.mkdir(parents=True)
    (project / "reports").rename(copy / "reports")
    monkeypatch.chdir(copy)
    parameters = {"token": "hf_abcdefgh", "output": f"{copy}/models", "other": f"{project}/x"}
    tracking.complete_run(FINGERPRINT, record(parameters=parameters))
    tracking.complete_run(FINGERPRINT, record(parameters=parameters))
    said = capsys.readouterr().err
    assert "python -m stages.tracking.runs" in said
    (kept,) = (project / "reports" / "mlflow_pending").glob("*/record.json")
    assert (kept.parent / "artifacts" / "report.html").read_text() == "<p>report</p>"
    assert (kept.parent / "curves" / "training" / "validation.csv").is_file()
    assert (project / "reports" / "mlflow_pending" / ".gitignore").read_text() == "*\n"
    text = kept.read_text()
    assert json.loads(text)["parameters"] == {"token": "***", "output": "./models", "other": "./x"}
    for secret in (PASSWORD, "hf_abcdefgh", str(project)):
        assert secret not in said + text
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match="still there") as raised:
        tracking.main()
    assert PASSWORD not in str(raised.value)
    assert kept.is_file()


def test_a_report_joins_the_record_that_waits(project, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    tracking.complete_run(FINGERPRINT, record())
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "curve.svg").write_text("<svg/>")
    for _ in range(2):  # a second time changes nothing
        tracking.attach(FINGERPRINT, (tmp_path / "figures",), "brave-cat")
    (kept,) = (project / "reports" / "mlflow_pending").glob("*/record.json")
    assert json.loads(kept.read_text())["artifacts"] == ["report.html", "figures"]
    assert (kept.parent / "artifacts" / "figures" / "curve.svg").read_text() == "<svg/>"
    _, waiting = tracking._kept(kept)
    assert all(path.exists() for path in waiting.artifacts)


def test_a_report_that_no_server_takes_is_a_message(project, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    (tmp_path / "report.html").write_text("<p>")
    tracking.attach(FINGERPRINT, (tmp_path / "report.html",), "brave-cat")
    assert "report.html could not be added to the run" in capsys.readouterr().err


def post(environment, path, body):
    request = urllib.request.Request(
        environment["MLFLOW_TRACKING_URI"] + path, json.dumps(body).encode(), method="POST"
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.loads(answer.read())


def test_the_relay_answers_at_once_whether_there_is_a_run_a_server_or_sense_in_the_request(
    project, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.05)
    point = {"key": "loss", "value": 0.5, "timestamp": 1, "step": 1}
    for run in (None, "a" * 32):
        start = time.monotonic()
        with tracking.live(run) as environment:
            for _ in range(20):
                post(environment, "/api/2.0/mlflow/runs/log-batch", {"metrics": [point]})
            assert post(environment, "/anything", ["no", "object"]) == {}
            answer = post(environment, "/api/2.0/mlflow/runs/update", {})
            assert answer["run_info"]["run_id"] == environment["MLFLOW_RUN_ID"]
            time.sleep(0.3)
        assert time.monotonic() - start < 3
    said = capsys.readouterr().err
    assert said.count("live curves pause") == 1  # one message, however often it failed


# MLflow itself, with its database


@pytest.mark.slow
def test_an_experiment_is_one_run_with_all_that_evaluate_knows(database):
    run_id = tracking.open_run(FINGERPRINT, "brave-cat")
    with tracking.live(run_id, {"loss": "loss", "rewards/margins": "reward_margin"}) as environment:
        points = [
            {"key": "loss", "value": 0.69, "timestamp": 1, "step": 1},
            {"key": "eval_loss", "value": 0.45, "timestamp": 2, "step": 3},
            {"key": "rewards/margins", "value": 0.3, "timestamp": 2, "step": 2},
            {"key": "train_runtime", "value": 9.0, "timestamp": 2, "step": 3},
        ]
        post(environment, "/api/2.0/mlflow/runs/log-batch", {"metrics": points})
    (run,) = runs()
    assert run.info.status == "RUNNING"
    assert run.data.tags["state"] == "trained"
    assert curve(run, "validation/loss") == [(3, 0.45)]
    assert "train_runtime" not in str(run.data.metrics)
    tracking.complete_run(FINGERPRINT, record())
    tracking.complete_run(FINGERPRINT, record())  # the same again changes nothing
    (run,) = runs()
    assert (run.info.run_id, run.info.run_name) == (run_id, "brave-cat")
    assert run.info.status == "FINISHED"
    assert run.data.params["train.beta"] == "0.1"
    assert (run.data.metrics["win_rate"], run.data.metrics["pairs"]) == (0.93, 1000)
    assert "odds" not in run.data.metrics
    assert curve(run, "win_rate") == [(0, 0.93)]
    assert curve(run, "train/loss") == [(1, 0.69), (2, 0.5), (3, 0.4)]
    assert curve(run, "train/reward_margin") == [(2, 0.3), (3, 0.6)]
    assert curve(run, "validation/loss") == [(3, 0.45)]
    assert run.data.tags["git.commit"] == "c0ffee"
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest[:8]) == ("pairs", "d41d8cd9")
    (artifact,) = tracking._client(Path()).list_artifacts(run_id)
    assert artifact.path == "report.html"
    assert list(Path("mlartifacts").rglob("report.html"))


@pytest.mark.slow
def test_files_are_added_to_the_completed_run_of_their_experiment(database, tmp_path, capsys):
    (tmp_path / "card.md").write_text("card")
    tracking.attach(FINGERPRINT, (tmp_path / "card.md",), "brave-cat")
    assert "it has no completed run brave-cat" in capsys.readouterr().err
    for name in ("brave-cat", "calm-dog"):
        tracking.complete_run(FINGERPRINT, record(name))
    tracking.attach(FINGERPRINT, (tmp_path / "card.md",), "brave-cat")
    found = {
        run.info.run_name: [
            file.path for file in tracking._client(Path()).list_artifacts(run.info.run_id)
        ]
        for run in runs()
    }
    assert found == {"brave-cat": ["card.md", "report.html"], "calm-dog": ["report.html"]}


@pytest.mark.slow
def test_a_finished_training_under_another_name_gives_a_run_of_its_own_with_the_curves(database):
    tracking.open_run(FINGERPRINT, "brave-cat")
    tracking.complete_run(FINGERPRINT, record("brave-cat"))
    tracking.complete_run(FINGERPRINT, record("calm-dog"))  # DVC did not train again
    first, second = runs()
    assert (first.info.run_name, second.info.run_name) == ("brave-cat", "calm-dog")
    assert curve(first, "train/loss") == curve(second, "train/loss")
    # Another result of the same training does not overwrite the first.
    tracking.complete_run(FINGERPRINT, record("brave-cat", metrics={"win_rate": 0.5}))
    assert sorted(run.data.metrics["win_rate"] for run in runs()) == [0.5, 0.93, 0.93]
    # And another training is another run.
    tracking.complete_run("f" * 16, record("brave-cat"))
    assert len(runs()) == 4


@pytest.mark.slow
def test_a_training_without_evaluation_is_taken_over_by_the_experiment_that_evaluates_it(database):
    run_id = tracking.open_run(FINGERPRINT, "workspace-abc1234")
    with tracking.live(run_id):
        pass
    tracking.complete_run(FINGERPRINT, record("brave-cat"))
    (run,) = runs()
    assert (run.info.run_id, run.info.run_name) == (run_id, "brave-cat")


@pytest.mark.slow
def test_a_training_that_runs_elsewhere_is_not_taken_over(database):
    tracking.open_run(FINGERPRINT, "brave-cat")
    tracking.complete_run(FINGERPRINT, record("calm-dog"))
    assert [run.info.status for run in runs()] == ["RUNNING", "FINISHED"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_training_that_broke_off_resumes_in_the_same_run(database, error, status):
    run_id = tracking.open_run(FINGERPRINT, "brave-cat")
    with pytest.raises(error), tracking.live(run_id):
        raise error
    assert [run.info.status for run in runs()] == [status]
    assert tracking.open_run(FINGERPRINT, "brave-cat") == run_id
    assert [run.info.status for run in runs()] == ["RUNNING"]
    assert tracking.open_run(FINGERPRINT, "calm-dog") != run_id


@pytest.mark.slow
def test_a_crash_in_the_middle_of_logging_is_repaired_by_logging_again(database, monkeypatch):
    from mlflow import MlflowClient

    def fail(*_, **__):
        raise ConnectionResetError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", fail)
        tracking.complete_run(FINGERPRINT, record())
    assert [run.data.tags["state"] for run in runs()] == ["trained"]
    (Path("reports") / "report.html").write_text("overwritten by the next experiment")
    tracking.main()
    (run,) = runs()
    assert run.data.tags["state"] == "complete"
    assert curve(run, "train/loss") == [(1, 0.69), (2, 0.5), (3, 0.4)]
    (file,) = Path("mlartifacts").rglob("report.html")
    assert file.read_text() == "<p>report</p>"
    assert not list(tracking.PENDING.glob("*/record.json"))
    tracking.complete_run(FINGERPRINT, record())
    assert len(runs()) == 1


@pytest.mark.slow
def test_many_parameters_long_values_and_odd_names_are_logged(database):
    parameters = {f"key {i} (β)": "x" * 7000 for i in range(230)}
    metrics = {f"slice/{i}": float(i) for i in range(1500)} | {"undefined": float("nan")}
    tags = {f"tag {i} é": "y" * 6000 for i in range(120)}
    tracking.complete_run(FINGERPRINT, record(parameters=parameters, metrics=metrics, tags=tags))
    (run,) = runs()
    assert len(run.data.params) == 230
    assert run.data.params["key 7 ___"].endswith("(7000 characters)")
    assert run.data.metrics["slice/1499"] == 1499
    assert sum(key.startswith("tag ") for key in run.data.tags) == 120


@pytest.mark.slow
def test_a_new_database_is_made_in_silence_and_nothing_is_written_beside_it(empty_project):
    folder, printed = empty_project
    assert printed == ""
    assert [path.name for path in folder.iterdir()] == ["mlflow.db"]


@pytest.mark.slow
def test_transformers_own_callback_writes_live_curves_and_survives_the_death_of_mlflow(
    database, monkeypatch, capsys
):
    """A real Trainer with report_to: mlflow; the database vanishes while it trains."""
    script = textwrap.dedent("""
        import pathlib, sys, time, torch
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(1, 1)
            def forward(self, x, labels=None):
                out = self.layer(x)
                return {"loss": ((out - labels) ** 2).mean(), "logits": out}

        class Wait(TrainerCallback):
            def on_log(self, args, state, control, **_):
                if state.global_step == 2:
                    pathlib.Path("logged").touch()
                    while not pathlib.Path("go").exists():
                        time.sleep(0.05)

        data = [{"x": torch.ones(1), "labels": torch.zeros(1)}] * 4
        arguments = TrainingArguments(
            "out", report_to="mlflow", logging_steps=1, max_steps=4, use_cpu=True,
            per_device_train_batch_size=1, save_strategy="no", eval_strategy="steps", eval_steps=2,
        )
        Trainer(
            Model(), arguments, train_dataset=data, eval_dataset=data, callbacks=[Wait()]
        ).train()
        pathlib.Path("trained").touch()
    """)
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.2)
    run_id = tracking.open_run(FINGERPRINT, "brave-cat")
    kept = database.read_bytes()
    with (
        tracking.live(run_id, {"loss": "loss", "grad_norm": "grad_norm"}) as environment,
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        deadline = time.monotonic() + 120
        while (
            not Path("logged").exists() and time.monotonic() < deadline and process.poll() is None
        ):
            time.sleep(0.05)
        while time.monotonic() < deadline and process.poll() is None:
            with sqlite3.connect(database) as look:
                found = look.execute("select key, step from metrics").fetchall()
            if ("train/loss", 1) in found:
                break
            time.sleep(0.05)
        assert ("train/loss", 1) in found  # live: the training still waits at step 2
        database.write_bytes(b"no database any more " * 100)
        Path("go").touch()
        output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 0, output
    assert Path("trained").exists()
    assert "live curves pause" in capsys.readouterr().err
    database.write_bytes(kept)
    for side in database.parent.glob("mlflow.db-*"):
        side.unlink()
    tracking.complete_run(FINGERPRINT, record())
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert curve(run, "train/loss") == [(1, 0.69), (2, 0.5), (3, 0.4)]
    assert {key.split("/")[0] for key in run.data.params} == {
        "train.beta",
        "train.lora_target",
        "train.seed",
    }


@pytest.mark.slow
def test_a_real_server_with_a_password_in_its_address_takes_a_run_and_leaks_nothing(
    database, tmp_path, monkeypatch, capfd
):
    port = free_port()
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
            *("--workers", "1", "--backend-store-uri", f"sqlite:///{database}"),
            *("--artifacts-destination", str(tmp_path / "artifacts")),
        ],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:{port}")
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline:
                try:
                    tracking._probe(tracking.tracking_uri())
                    break
                except ConnectionError:
                    time.sleep(0.2)
            with monkeypatch.context() as patch:
                patch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
                run_id = tracking.open_run(FINGERPRINT, "brave-cat")
                with tracking.live(run_id):
                    pass
                tracking.complete_run(FINGERPRINT, record())
                (run,) = runs()
        finally:
            server.terminate()
            for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
                os.environ.pop(name, None)
    assert run.info.status == "FINISHED"
    assert curve_in(database, run_id, "train/loss") == [(1, 0.69), (2, 0.5), (3, 0.4)]
    assert list((tmp_path / "artifacts").rglob("report.html"))
    said = "".join(capfd.readouterr())
    assert f"http://127.0.0.1:{port}/#/experiments/" in said
    assert PASSWORD not in said
    assert PASSWORD.encode() not in database.read_bytes()


def curve_in(database, run_id, key):
    with sqlite3.connect(database) as look:
        return look.execute(
            "select step, value from metrics where run_uuid = ? and key = ? order by step",
            (run_id, key),
        ).fetchall()
