"""The train stage: when it trains, and with the real program what an interruption costs.

Each real training loads LLaMA-Factory in a process of its own (20 to 60 s), so there are as few as
can be: one that is let alone, one that is killed, and its second half.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock

from stages import train
from stages.core.errors import UserError
from stages.model import formatted, reference_logps, scoring
from stages.params import params
from stages.tuning import process
from stages.tuning.inside.sitecustomize import PROJECT, REFERENCE
from tests.repository import processes_with, wait_for
from tests.test_full_disk import HAS_NAMESPACES, twice

ROOT = Path(__file__).parent.parent

STEPS, SAVE_STEPS = 8, 2

# when it trains, with a process that only leaves what a training leaves


class Stage:
    """A project in which ``launch`` is replaced: ``run()`` runs the stage."""

    def __init__(self, folder):
        self.out, self.curves = folder / "models/adapter", folder / "reports/curves"
        self.folder, self.launched, self.margin = folder, 0, 0.0
        self.compares = True

    def run(self):
        return train.main(
            self.folder / "formatted",
            self.folder / "images",
            self.folder / "base",
            self.folder / "reference",
            self.out,
            self.curves,
        )

    def launch(self, arguments, folder, environment, watch):
        self.launched += 1
        step = {"step": 1, "epoch": 0.1, "loss": 0.69, "rewards/margins": self.margin}
        step |= {"logps/chosen": -9.0, "logps/rejected": -9.0}
        self.environment = environment
        if self.compares:
            (folder / "first_batch.json").write_text("{}")
        watch(step)
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "adapter_config.json").write_text("{}")
        (folder / "checkpoint-1").mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [step]}))


@pytest.fixture
def stage(tmp_path, monkeypatch, write_params):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody there
    write_params(tmp_path / "params.yaml")
    for name in ("formatted/train", "formatted/validation", "formatted/dataset_info"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").write_text("[]")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "SOURCE.json").write_text("{}")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen3_vl"}')
    looked_up = reference_logps.made_with(tmp_path / "base", params.load(), dtype="float32")
    nothing = pd.DataFrame(columns=["key", *scoring.LOGPS])
    reference_logps.write(tmp_path / "reference", nothing, looked_up)
    made = Stage(tmp_path)
    monkeypatch.setattr(process, "launch", made.launch)
    return made


def test_an_adapter_of_the_same_fingerprint_is_trained_again_only_if_that_is_forced(
    stage, capfd, write_params, monkeypatch
):
    assert stage.run() == {"device": "cpu"}
    assert {path.name for path in stage.curves.iterdir()} == {
        *("train.csv", "validation.csv", "first_batch.json")
    }
    assert capfd.readouterr().err.count("The training continues without them") == 1
    assert stage.run() == {}  # its diary says nothing of a device
    assert "nothing to train" in capfd.readouterr().out
    assert stage.launched == 1
    write_params(stage.folder / "params.yaml", **{"train.beta": 0.2})
    stage.run()
    assert stage.launched == 2
    monkeypatch.setattr(train, "is_forced", lambda: True)
    stage.run()
    assert stage.launched == 3


def test_an_experiment_that_comes_back_to_a_finished_training_takes_it_up(
    stage, capfd, write_params
):
    for beta in (0.1, 0.2, 0.1):
        write_params(stage.folder / "params.yaml", **{"train.beta": beta})
        stage.run()
    assert "finished in an earlier experiment" in capfd.readouterr().out
    assert stage.launched == 2
    assert "pref_beta: 0.1" in (stage.out / "llamafactory.yaml").read_text()


def test_a_damaged_adapter_is_published_again_and_trained_again_where_none_is_left(stage):
    stage.run()
    weights = stage.out / "adapter_model.safetensors"
    weights.write_bytes(b"weight")
    stage.run()
    assert (weights.read_bytes(), stage.launched) == (b"weights", 1)
    (kept,) = stage.folder.glob("models/training/*/adapter_model.safetensors")
    kept.write_bytes(b"weight")
    weights.write_bytes(b"weight")
    stage.run()
    assert (weights.read_bytes(), stage.launched) == (b"weights", 2)


def test_missing_curves_come_from_the_log_and_without_it_from_another_training(stage):
    stage.run()
    kept = (stage.curves / "train.csv").read_bytes()
    (stage.curves / "train.csv").unlink()
    stage.run()
    assert (stage.curves / "train.csv").read_bytes() == kept
    assert stage.launched == 1
    (stage.curves / "train.csv").unlink()
    (log,) = stage.folder.glob("models/training/*/trainer_state.json")
    log.unlink()
    stage.run()
    assert (stage.curves / "train.csv").read_bytes() == kept
    assert stage.launched == 2


def test_the_training_is_told_to_share_prompts_and_where_the_reference_is(stage, write_params):
    stage.run()
    assert Path(stage.environment[REFERENCE]) == stage.folder / "reference"
    assert Path(stage.environment[PROJECT], "stages", "tuning", "trainer.py").is_file()
    write_params(stage.folder / "params.yaml", **{"train.bf16": True})
    stage.run()
    assert REFERENCE not in stage.environment
    assert PROJECT in stage.environment
    write_params(stage.folder / "params.yaml", **{"train.shared_prefix": False})
    stage.compares = False
    stage.run()
    assert not {REFERENCE, PROJECT} & set(stage.environment)
    assert stage.launched == 3
    assert not (stage.curves / "first_batch.json").exists()


def test_a_training_that_does_not_share_prompts_as_asked_ends_at_its_first_step(stage):
    stage.compares = False
    with pytest.raises(UserError, match=r"wrote no .*first_batch\.json.*shared_prefix: false"):
        stage.run()
    assert not stage.out.exists()


def test_a_margin_at_step_1_ends_the_training_before_it_leaves_anything(stage):
    stage.margin = 0.3
    with pytest.raises(UserError, match=r"margin at step 1 is 0\.3, not about 0"):
        stage.run()
    assert not stage.out.exists()
    assert not list(stage.folder.glob("models/training/*/trainer_state.json"))


def test_a_second_process_waits_and_takes_up_what_the_first_trained(stage, capfd):
    stage.run()
    (fingerprint,) = (path.name for path in stage.folder.glob("models/training/[!.]*"))
    shutil.rmtree(stage.out)
    with FileLock(stage.folder / f"models/training/.{fingerprint}.lock"):
        thread = threading.Thread(target=stage.run)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
    thread.join()
    assert "finished in an earlier experiment" in capfd.readouterr().out
    assert stage.launched == 1


# the real one


class Project:
    """A folder that the train stage runs in."""

    def __init__(self, folder, formatted, images, model, looked_up):
        self.folder = folder
        self.arguments = [
            *("--formatted-data", str(formatted)),
            *("--images", str(images)),
            *("--model", str(model)),
            *("--reference", str(looked_up)),
            *("--out", "models/adapter"),
            *("--curves", "reports/curves"),
        ]

    def start(self, *words, **more):
        """The stage, or other words for Python, in the project."""
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",  # nobody there: training must not care
            "HF_DATASETS_CACHE": str(self.folder.parent / "datasets"),
            **more,
        }
        return subprocess.Popen(
            [sys.executable, *(words or ("-m", "stages.train", *self.arguments))],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self):
        process = self.start()
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output[-3000:]
        return output

    @property
    def workspace(self):
        (folder,) = (self.folder / "models" / "training").glob("[!.]*")
        return folder

    @property
    def adapter(self):
        return self.folder / "models" / "adapter"


@pytest.fixture(scope="module")
def project(base, formatted_dir, pairs_dir, model_dir, params_with, write_params, tmp_path_factory):
    """``project("name")`` is a new project on the shared data set."""
    root = tmp_path_factory.mktemp("train")
    shutil.copytree(model_dir, root / "base")
    (root / "base" / "SOURCE.json").write_text("{}")
    images = pairs_dir / "images"
    tables = []
    for split in ("train", "validation"):
        pairs = formatted.read(formatted_dir, split)
        tables.append(scoring.log_probs(base, pairs, images, batch_tokens=4096, label=split))
    made_with = reference_logps.made_with(root / "base", params_with(), dtype="float32")
    reference_logps.write(root / "reference", pd.concat(tables), made_with)

    def make(name):
        (root / name).mkdir()
        set_params(root / name, write_params)
        return Project(root / name, formatted_dir, images, root / "base", root / "reference")

    return make


def set_params(folder, write_params, **more):
    values = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 3,
        "logging_steps": 1,
        "eval_steps": 4,
        "preprocessing_num_workers": 1,
    }
    write_params(
        folder / "params.yaml",
        **{f"train.{name}": value for name, value in (values | more).items()},
    )


@pytest.fixture(scope="module")
def untouched(project):
    """A training that nothing disturbed, and its output."""
    made = project("untouched")
    return made, made.run()


@pytest.mark.slow
def test_a_training_leaves_adapter_configuration_and_curves(untouched):
    made, output = untouched
    assert {path.name for path in made.adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "llamafactory.yaml",
        "fingerprint.json",
    }
    fingerprint = json.loads((made.adapter / "fingerprint.json").read_text())["fingerprint"]
    assert made.workspace.name == fingerprint
    assert f"training {fingerprint}: a clean start" in output
    assert "reward margin at step 1: " in output
    assert output.count("The training continues without them") == 1  # the tracking server is down
    compared = json.loads((made.folder / "reports/curves/first_batch.json").read_text())
    assert compared["reference"] == "cached"
    assert 0 < compared["policy_difference"] < 1e-3
    assert compared["reference_difference"] < 1e-3
    train = pd.read_csv(made.folder / "reports/curves/train.csv")
    assert list(train["step"]) == list(range(1, STEPS + 1))
    assert abs(train["reward_margin"][0]) < 1e-4
    assert abs(train["reward_margin"].iloc[-1]) > 1e-2  # the policy has left the reference
    assert {"loss", "reward_accuracy", "chosen_logps", "learning_rate"} <= set(train.columns)
    validation = pd.read_csv(made.folder / "reports/curves/validation.csv")
    assert list(validation["step"]) == [4, 8]
    assert not list(made.workspace.glob("checkpoint-*"))
    events = [json.loads(line) for line in (made.workspace / "events.jsonl").open()]
    state = json.loads((made.workspace / "trainer_state.json").read_text())
    assert {event.pop("max_steps") for event in events} == {STEPS}
    assert events[:-1] == state["log_history"]  # the last evaluation comes after the state
    assert str(made.folder) not in (made.adapter / "llamafactory.yaml").read_text()


def kill_once_there(made, pattern):
    """Start a training and kill it, with SIGKILL, once such a file is in its folder."""
    process = made.start()
    end = time.monotonic() + 400
    while not any(made.folder.glob(f"models/training/*/{pattern}")):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < end, f"{pattern} never came"
        time.sleep(0.001)
    # The stage first, as the machine would have it; then at once what it started.
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    for child in map(int, children):
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def killed(project):
    """A training that was killed outright while it wrote its third checkpoint."""
    made, writing = project("killed"), f"checkpoint-{3 * SAVE_STEPS}"
    kill_once_there(made, f"{writing}/*")
    # Where the kill came too late, it is made to have come before the last file.
    (made.workspace / writing / "trainer_state.json").unlink(missing_ok=True)
    return made


@pytest.fixture(scope="module")
def resumed(killed, write_params):
    """What another beta printed first, and the killed training, resumed to its end."""
    set_params(killed.folder, write_params, beta=0.2)
    other = killed.start()
    assert other.stdout is not None
    line = next(line for line in other.stdout if line.startswith("training "))
    other.send_signal(signal.SIGTERM)
    other.communicate(timeout=60)
    clean = killed.folder / "models/training" / line.split()[1].rstrip(":")
    assert clean.exists()
    clean.rename(killed.folder / "another")
    set_params(killed.folder, write_params)
    return line, killed.run()


@pytest.mark.slow
def test_a_killed_training_resumes_from_its_last_complete_checkpoint(resumed, killed):
    line, output = resumed
    assert line.rstrip().endswith("a clean start")  # of another beta
    assert "resuming from checkpoint-" in output
    step = int(output.partition("resuming from checkpoint-")[2].split()[0])
    assert step == 2 * SAVE_STEPS  # the one that was being written is not taken
    train = pd.read_csv(killed.folder / "reports/curves/train.csv")
    assert list(train["step"]) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_it_ends_with_the_bytes_of_one_that_nothing_interrupted(resumed, killed, untouched):
    for path in untouched[0].adapter.iterdir():
        assert (killed.adapter / path.name).read_bytes() == path.read_bytes(), path.name
    curves = [made.folder / "reports/curves/validation.csv" for made in (killed, untouched[0])]
    assert curves[0].read_bytes() == curves[1].read_bytes()


@pytest.mark.rehearsal
@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ray"), reason="ray is one of the extras")
def test_two_workers_of_ray_have_the_curve_of_one_process_and_leave_no_process(
    project, untouched, write_params
):
    made = project("ray")
    set_params(made.folder, write_params, per_device_train_batch_size=1)
    # As train.gpus: 2 says it where there are GPUs.
    two = "from stages.params.params import Train; Train.processes = 2; from stages import train; "
    code = f"{two}from stages.core import command; command.run(train.main)"
    with tempfile.TemporaryDirectory() as short:  # Ray's sockets are below it
        started = made.start("-c", code, *made.arguments, USE_RAY="1", RAY_TMPDIR=short)
        said, _ = started.communicate(timeout=500)
        assert started.returncode == 0, said[-3000:]
        wait_for(lambda: not processes_with("RAY_TMPDIR", short))  # Ray's own end a moment later
    curves = [pd.read_csv(p.folder / "reports/curves/train.csv") for p in (made, untouched[0])]
    assert list(curves[0]["step"]) == list(curves[1]["step"]) == list(range(1, STEPS + 1))
    assert (curves[0]["loss"] - curves[1]["loss"]).abs().max() < 1e-4


@pytest.mark.rehearsal
@pytest.mark.slow
@pytest.mark.skipif(not HAS_NAMESPACES, reason="this machine allows no mount namespace")
def test_a_full_disk_ends_it_after_its_first_checkpoint_and_with_room_it_resumes(
    project, untouched, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody there
    made = project("full")
    words = [sys.executable, "-m", "stages.train", *made.arguments]
    disk = ("size=1400k", "size=200m")  # a checkpoint takes 0.8 MB
    first, second, said = twice(words, made.folder, disk, at="models/training")
    assert (first, second) == (1, 0), said[-3000:]
    told = said.partition(" resuming from ")[0].rpartition("error: ")[2]
    assert "Traceback" not in told  # as the stage tells it
    assert "free some space, then run the same command again" in told
    assert f"resuming from checkpoint-{SAVE_STEPS}" in said
    for path in untouched[0].adapter.iterdir():
        assert (made.adapter / path.name).read_bytes() == path.read_bytes(), path.name
