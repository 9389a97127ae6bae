"""What runs inside ``llamafactory-cli``, in real interpreters with a LLaMA-Factory of ten lines.

The real one is met in ``test_train.py``.
"""

import json
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

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


def test_a_checkpoint_takes_what_is_trained_and_two_moments_of_it():
    class Weight:
        def __init__(self, count, trained):
            self.count, self.requires_grad = count, trained

        def numel(self):
            return self.count

        def element_size(self):
            return 4

    class Model:
        def parameters(self):
            return [Weight(1000, False), Weight(10, True), Weight(5, True)]

    assert sitecustomize.checkpoint_bytes(Model()) == 3 * 4 * 15


@pytest.mark.parametrize(
    "code", [RUN, "from llamafactory.train import tuner; tuner.Worker().train()"]
)
def test_every_way_to_train_writes_its_steps(packages, tmp_path, code):
    assert python(code, packages, tmp_path / "events") == ("trained with 1\n", "")
    lines = (tmp_path / "events").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": n, "loss": 0.5} for n in (1, 2)]


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


def test_only_the_first_process_of_all_writes(packages, tmp_path):
    assert python(RUN, packages, tmp_path / "events", RANK="1") == ("trained with 1\n", "")
    assert not (tmp_path / "events").exists()


def test_without_the_variable_nothing_is_changed(packages):
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


def test_the_failure_of_that_one_does_not_reach_ours(packages, tmp_path):
    write(packages / "sitecustomize.py", "1 / 0")
    shown, error = python(RUN, packages, tmp_path / "events")
    assert shown == "trained with 1\n"
    assert "ZeroDivisionError" in error  # Python's own message


@pytest.mark.parametrize(
    ("rename", "events", "told"),
    [
        ("trains_otherwise", "events", "AttributeError"),
        ("_training_function", "no/such/folder/events", "FileNotFoundError"),
    ],
)
def test_what_fails_in_it_costs_a_line_and_not_the_training(
    packages, tmp_path, rename, events, told
):
    write(
        packages / "llamafactory" / "train" / "tuner.py",
        TUNER.replace("_training_function", rename),
    )
    shown, error = python(RUN, packages, tmp_path / events)
    assert shown.startswith("trained with ")
    assert set(line.partition(":")[0] for line in error.splitlines()) == {
        str(INSIDE / "sitecustomize.py")
    }
    assert told in error


TRAINER = """
    from llamafactory.train.dpo import trainer

    def _training_function(config):
        print("trained by", trainer.CustomDPOTrainer)

    def run_exp():
        _training_function({"args": {}, "callbacks": []})
"""


@pytest.fixture
def project(packages, tmp_path):
    """A folder with a trainer to take the place of LLaMA-Factory's own."""
    write(packages / "llamafactory" / "train" / "tuner.py", TRAINER)
    write(packages / "llamafactory" / "train" / "dpo" / "__init__.py", "")
    write(packages / "llamafactory" / "train" / "dpo" / "trainer.py", "CustomDPOTrainer = 'stock'")
    folder = tmp_path / "project"
    write(folder / "stages" / "__init__.py", "")
    write(folder / "stages" / "tuning" / "__init__.py", "")
    write(folder / "stages" / "tuning" / "trainer.py", "SharedPrefixTrainer = 'ours'")
    return folder


def test_the_trainer_on_shared_prompts_takes_the_place_of_stock_if_it_is_wanted(
    packages, project, tmp_path
):
    assert python(RUN, packages, tmp_path / "events") == ("trained by stock\n", "")
    wanted = process.with_shared_prefix({}, None, False) | {sitecustomize.PROJECT: str(project)}
    assert python(RUN, packages, tmp_path / "events", **wanted) == ("trained by ours\n", "")


@pytest.mark.parametrize("lost", ["trainer", "_training_function"])
def test_a_wanted_trainer_that_can_not_be_had_ends_the_training(packages, project, tmp_path, lost):
    if lost == "trainer":
        (project / "stages" / "tuning" / "trainer.py").unlink()
    else:
        write(
            packages / "llamafactory" / "train" / "tuner.py",
            TRAINER.replace("_training_function", "trains_otherwise"),
        )
    wanted = process.with_shared_prefix({}, None, False) | {sitecustomize.PROJECT: str(project)}
    with pytest.raises(subprocess.CalledProcessError) as ended:
        python(RUN, packages, tmp_path / "events", **wanted)
    assert "trained by" not in ended.value.stdout


def test_starting_python_loads_next_to_nothing_more(tmp_path):
    code = "import sys; print(*sys.modules)"
    # The sitecustomize that it hides, such as Debian's, is loaded by importlib.util.
    theirs = "import importlib.util; " if find_spec("sitecustomize") else ""
    plain = subprocess.run(
        [sys.executable, "-c", theirs + code], env={}, capture_output=True, text=True, check=True
    )
    shown, _ = python(code, tmp_path, tmp_path / "events")
    more = set(shown.split()) - set(plain.stdout.split())
    assert more <= {
        *("sitecustomize", "__future__", "importlib", "importlib._bootstrap"),
        *("importlib._bootstrap_external", "importlib.machinery", "warnings"),
    }


def test_llamafactory_has_the_function_that_is_wrapped():
    """Read, not imported: that takes 20 s."""
    spec = find_spec("llamafactory")
    assert spec is not None
    assert spec.origin is not None
    tuner = sitecustomize.TUNER.split(".")[1:]
    source = Path(spec.origin).parent.joinpath(*tuner).with_suffix(".py").read_text()
    assert "def _training_function(config: dict[str, Any])" in source
    assert 'callbacks: list[Any] = config.get("callbacks")' in source
