"""What runs inside ``llamafactory-cli``, in real interpreters with a LLaMA-Factory of ten lines.

The real one is met in ``test_train.py``.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from stages.tuning import process
from stages.tuning.config import INSIDE
from stages.tuning.inside import sitecustomize

TUNER = """
    from transformers import State

    def _training_function(config):
        for step in (1, 2):
            for callback in config["callbacks"]:
                callback.on_log(None, State([{"step": step, "loss": 0.5}]), None)
        print("trained with", len(config["callbacks"]))

    def run_exp():
        _training_function({"args": {}, "callbacks": []})

    class Worker:  # as under Ray
        def train(self):
            _training_function({"args": {}, "callbacks": []})
"""
TRANSFORMERS = """
    import os

    class TrainerCallback: pass

    class State:
        max_steps = 2

        def __init__(self, log_history):
            self.log_history = log_history
            self.is_world_process_zero = os.environ.get("RANK", "0") == "0"
"""
RUN = "from llamafactory.train.tuner import run_exp; run_exp()"


@pytest.fixture
def packages(tmp_path):
    """A folder for the path, with what stands for LLaMA-Factory and transformers."""
    folder = tmp_path / "packages"
    write(folder / "llamafactory" / "__init__.py", "")
    write(folder / "llamafactory" / "train" / "__init__.py", "")
    write(folder / "llamafactory" / "train" / "tuner.py", TUNER)
    write(folder / "transformers.py", TRANSFORMERS)
    return folder


def write(file, code):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(code))


def python(code, packages, events, **more):
    """Run it as the train stage runs its process; the last lines of both streams."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(packages)} | more
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | process.inside(events, environment),
        cwd=packages,  # where no ``stages`` is
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    "code", [RUN, "from llamafactory.train import tuner; tuner.Worker().train()"]
)
def test_every_way_to_train_writes_its_steps(packages, tmp_path, code):
    assert python(code, packages, tmp_path / "events") == ("trained with 1\n", "")
    lines = (tmp_path / "events").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": n, "loss": 0.5, "max_steps": 2} for n in (1, 2)
    ]


RAY = """
    def init(): pass

    class Group:
        def __init__(self, bundles):
            self.bundles = bundles

        def wait(self, seconds):
            return len(self.bundles) <= 2

    class util:
        placement_group = staticmethod(lambda bundles, strategy: Group(bundles))
        get_node_ip_address = staticmethod(lambda: "10.0.0.1")
"""
ON_RAY = """
    import os

    def get_device_name(): return "gpu"
    def get_placement_group(count): raise SystemExit("ten CPUs for each of them")
    def get_ray_head_node_ip(): raise SystemExit("no dashboard")
    def get_ray_remote_config_for_worker(**given): return given | {"num_cpus": 10, "num_gpus": 1}

    def _ray_training_function(ray_args, config):
        group, bundle = get_placement_group(99)
        print(group.bundles == [bundle] * 2, bundle, get_ray_head_node_ip())
        print(get_ray_remote_config_for_worker(rank=1))
        _training_function(config)
        print(os.getcwd())

    def run_exp():
        class ray_args:
            ray_num_workers = int(os.environ["WORKERS"])
        _ray_training_function(ray_args, {"callbacks": []})
"""


def test_ray_is_asked_for_a_device_and_a_cpu_for_each_worker_and_trains_in_our_folder(
    packages, tmp_path
):
    write(packages / "ray.py", RAY)
    write(packages / "llamafactory" / "train" / "tuner.py", TUNER + ON_RAY)
    events, there = tmp_path / "events", {"TRAINING_FOLDER": str(tmp_path)}
    said, _ = python(RUN, packages, events, WORKERS="2", **there)
    assert said.splitlines() == [
        "True {'CPU': 1, 'GPU': 1} 10.0.0.1",
        "{'rank': 1, 'num_cpus': 1, 'num_gpus': 1}",
        "trained with 1",
        str(tmp_path),
    ]
    with pytest.raises(subprocess.CalledProcessError) as failed:
        python(RUN, packages, events, WORKERS="3", **there)
    assert "RuntimeError: Ray had no 3 x {'CPU': 1, 'GPU': 1} to give" in failed.value.stderr


def test_only_the_first_process_of_all_writes_and_nobody_without_the_variable(packages, tmp_path):
    assert python(RUN, packages, tmp_path / "events", RANK="1") == ("trained with 1\n", "")
    assert not (tmp_path / "events").exists()
    environment = {"PYTHONPATH": f"{INSIDE}{os.pathsep}{packages}"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("trained with 0\n", "")


def test_the_sitecustomize_that_it_hides_still_runs(packages, tmp_path):
    write(packages / "sitecustomize.py", "import sys; sys.theirs = __file__")
    code = f"import sys, sitecustomize; print(sys.theirs, sitecustomize.__file__); {RUN}"
    shown, _ = python(code, packages, tmp_path / "events")
    theirs = str(packages / "sitecustomize.py")
    assert shown == f"{theirs} {theirs}\ntrained with 1\n"
    write(packages / "sitecustomize.py", "1 / 0")
    shown, error = python(RUN, packages, tmp_path / "events")
    assert shown == "trained with 1\n"
    assert "ZeroDivisionError" in error  # Python's own message


def test_a_step_that_can_not_be_written_costs_a_line_and_not_the_training(packages, tmp_path):
    shown, error = python(RUN, packages, tmp_path / "no/such/folder/events")
    assert shown == "trained with 1\n"
    for line in error.splitlines():
        assert line.startswith(f"{INSIDE / 'sitecustomize.py'}: [Errno 2]")


TRAINER = """
    from llamafactory.train.dpo import trainer

    def _training_function(config):
        print("trained by", trainer.CustomDPOTrainer)

    def run_exp():
        _training_function({"args": {}, "callbacks": []})
"""


def test_the_trainer_that_is_wanted_takes_the_place_of_stock_or_the_training_ends(
    packages, tmp_path
):
    write(packages / "llamafactory" / "train" / "tuner.py", TRAINER)
    write(packages / "llamafactory" / "train" / "dpo" / "__init__.py", "")
    write(packages / "llamafactory" / "train" / "dpo" / "trainer.py", "CustomDPOTrainer = 'stock'")
    ours = tmp_path / "project" / "stages" / "tuning" / "trainer.py"
    write(ours.parents[1] / "__init__.py", "")
    write(ours.with_name("__init__.py"), "")
    write(ours, "SharedPrefixTrainer = 'ours'")
    events = tmp_path / "events"
    assert python(RUN, packages, events) == ("trained by stock\n", "")
    wanted = process.shared_prefix(None)
    wanted[sitecustomize.PROJECT] = str(tmp_path / "project")
    assert python(RUN, packages, events, **wanted) == ("trained by ours\n", "")
    ours.unlink()
    with pytest.raises(subprocess.CalledProcessError) as ended:
        python(RUN, packages, events, **wanted)
    assert "trained by" not in ended.value.stdout
    write(ours, "SharedPrefixTrainer = 'ours'")
    other = TRAINER.replace("_training_function", "trains_otherwise")
    write(packages / "llamafactory" / "train" / "tuner.py", other)
    with pytest.raises(subprocess.CalledProcessError):
        python(RUN, packages, events, **wanted)
