"""The train stage with the real ``llamafactory-cli``: what an interruption costs, and what not.

Each training loads LLaMA-Factory in a process of its own (20 to 60 s), so there are as few as can
be: one that is let alone, one that is killed, and its second half.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow

STEPS, SAVE_STEPS = 8, 2


class Project:
    """A folder that the train stage runs in."""

    def __init__(self, folder, formatted, images, model):
        self.folder = folder
        self.arguments = [
            *("--formatted-data", str(formatted)),
            *("--images", str(images)),
            *("--model", str(model)),
            *("--out", "models/adapter"),
            *("--curves", "reports/curves"),
        ]

    def start(self):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",  # nobody there: training must not care
            "HF_DATASETS_CACHE": str(self.folder.parent / "datasets"),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "stages.train", *self.arguments],
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
        (folder,) = (self.folder / "models" / "training").iterdir()
        return folder

    @property
    def adapter(self):
        return self.folder / "models" / "adapter"


@pytest.fixture(scope="module")
def project(formatted_dir, pairs_dir, model_dir, write_params, tmp_path_factory):
    """``project("name")`` is a new project on the shared data set."""
    root = tmp_path_factory.mktemp("train")

    def make(name):
        (root / name).mkdir()
        set_params(root / name, write_params)
        return Project(root / name, formatted_dir, pairs_dir / "images", model_dir)

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
    assert "reward margin at step 1: 0 " in output
    train = pd.read_csv(made.folder / "reports/curves/train.csv")
    assert list(train["step"]) == list(range(1, STEPS + 1))
    assert train["reward_margin"][0] == 0
    assert train["reward_margin"].iloc[-1] != 0  # the policy has left the reference
    assert {"loss", "reward_accuracy", "chosen_logps", "learning_rate"} <= set(train.columns)
    validation = pd.read_csv(made.folder / "reports/curves/validation.csv")
    assert list(validation["step"]) == [4, 8]
    assert not list(made.workspace.glob("checkpoint-*"))
    assert str(made.folder) not in (made.adapter / "llamafactory.yaml").read_text()


def test_a_tracking_server_that_is_down_costs_a_message(untouched):
    _, output = untouched
    assert "Training goes on without it" in output


@pytest.fixture(scope="module")
def killed(project):
    """A training that was killed outright between its checkpoints and its end."""
    made = project("killed")
    process = made.start()
    end = time.monotonic() + 400
    while not list(made.folder.glob("models/training/*/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.01)
    # The stage first, as the machine would have it; then its training, which is on its own by now.
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    for child in map(int, children):
        os.killpg(child, signal.SIGKILL)
    process.communicate()
    return made


@pytest.fixture(scope="module")
def resumed(killed, write_params):
    """The killed training: what another beta printed first, then the same training's second run."""
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


def test_a_changed_beta_starts_clean(resumed):
    line, _ = resumed
    assert line.rstrip().endswith("a clean start")


def test_an_interrupted_training_goes_on_from_its_checkpoint(resumed, killed):
    _, output = resumed
    assert "resuming from checkpoint-" in output
    step = int(output.partition("resuming from checkpoint-")[2].split()[0])
    assert SAVE_STEPS <= step < STEPS
    train = pd.read_csv(killed.folder / "reports/curves/train.csv")
    assert list(train["step"]) == list(range(1, STEPS + 1))


def test_it_ends_with_the_bytes_of_one_that_nothing_interrupted(resumed, killed, untouched):
    for path in untouched[0].adapter.iterdir():
        assert (killed.adapter / path.name).read_bytes() == path.read_bytes(), path.name
    curves = [made.folder / "reports/curves/validation.csv" for made in (killed, untouched[0])]
    assert curves[0].read_bytes() == curves[1].read_bytes()
