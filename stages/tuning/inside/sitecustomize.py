"""How our code gets into ``llamafactory-cli``: a callback that writes each logged step to a file,
the trainer on shared prompts, and what LLaMA-Factory asks of Ray.

Python imports a module of this name whenever it starts. The train stage puts this folder on the
path of the training process (``process.inside``), the way tracers and coverage tools do; the
workers of torchrun and Ray inherit it. There it waits for ``llamafactory.train.tuner`` and wraps
that module's ``_training_function``, which runs in every process that trains, to add the callback.
Without the variable ``EVENTS`` it does nothing. A step that can't be written costs one line.
Anything else that goes wrong ends the training: it might be another one than was asked for.

Its code is part of a training's fingerprint. It imports nothing of this project unless the trainer
is wanted, and nothing heavy (not even typing) before the training does: every start of Python pays
for it, about 1 ms.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Environment variables
EVENTS = "TRAINING_EVENTS"  # the file to write to
PROJECT = "TRAINING_PROJECT"  # where ``stages`` is, if its trainer is wanted
REFERENCE = "TRAINING_REFERENCE"  # the folder of the reference's log-probs, if they are to be used
VIEW = "TRAINING_VIEW"  # what the loss shows in place of the image, if it does
UNDER_VIEW = "TRAINING_UNDER_VIEW"  # the file that keeps the reference's log-probs there
FOLDER = "TRAINING_FOLDER"  # where to train, if Ray starts the processes: they begin where it began

TUNER = "llamafactory.train.tuner"
STEPS = "max_steps"  # what each step that is written says of how many there will be
FIRST_BATCH = "first_batch.json"  # how shared prompts and stock differ on the first pairs


class Hook:
    """A finder that changes one module, right after Python has run it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != TUNER:
            return None
        from importlib.machinery import PathFinder

        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: Any) -> None:
            execute(module)
            wrap_training(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def wrap_training(tuner: Any) -> None:
    """Let every training of this process write its steps, with our trainer if it is wanted. Ray
    pickles its worker by name, so that each of its processes imports ``tuner``, and comes here, by
    itself."""
    train = tuner._training_function

    def train_and_write(config: dict[str, Any]) -> Any:
        if folder := os.environ.get(FOLDER):
            os.chdir(folder)
        config["callbacks"].append(writer(os.environ[EVENTS]))
        if project := os.environ.get(PROJECT):
            use_trainer(project)
        return train(config)

    tuner._training_function = train_and_write
    if os.environ.get(FOLDER):
        fit_ray(tuner)


def fit_ray(tuner: Any) -> None:
    """Reserve a device and one CPU for each worker. LLaMA-Factory 0.9.5 reserves ten CPUs for each
    device of the cluster, and waits for ever if they are missing. It also asks Ray's dashboard,
    which may not run, for the address that all workers need."""
    start, place = tuner._ray_training_function, tuner.get_ray_remote_config_for_worker

    def start_workers(ray_args: Any, config: dict[str, Any]) -> None:
        import ray

        def reserve(_: int) -> tuple[Any, dict[str, int]]:
            bundle = {"CPU": 1, tuner.get_device_name().upper(): 1}
            group = ray.util.placement_group([bundle] * ray_args.ray_num_workers, strategy="PACK")
            if not group.wait(600):  # seconds, as torchrun waits for its nodes
                raise RuntimeError(f"Ray had no {ray_args.ray_num_workers} x {bundle} to give")
            return group, bundle

        tuner.get_placement_group = reserve
        tuner.get_ray_head_node_ip = ray.util.get_node_ip_address
        start(ray_args, config)

    tuner._ray_training_function = start_workers
    tuner.get_ray_remote_config_for_worker = lambda **given: place(**given) | {"num_cpus": 1}


def use_trainer(project: str) -> None:
    """Put the trainer on shared prompts where ``run_dpo`` looks for LLaMA-Factory's own."""
    sys.path.append(project)  # last, so that it hides no package
    from importlib import import_module

    import llamafactory.train.dpo.trainer as stock

    stock.CustomDPOTrainer = import_module("stages.tuning.trainer").SharedPrefixTrainer


def writer(file: str) -> Any:
    """The callback: what the trainer logs, as one line of JSON, by the first process of all."""
    import json

    from transformers import TrainerCallback

    class Writer(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not state.is_world_process_zero:
                return
            entry = state.log_history[-1] | {STEPS: state.max_steps}
            try:
                with open(file, "a", encoding="utf-8") as lines:
                    lines.write(json.dumps(entry, default=float) + "\n")
            except OSError as error:
                print(f"{__file__}: {error}", file=sys.stderr, flush=True)

    return Writer()


def chain() -> None:
    """Run the ``sitecustomize`` that this one hides, such as Debian's or a tracer's."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    ours = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        sys.modules["sitecustomize"] = ours
        if error.name != "sitecustomize":
            raise


if __name__ == "sitecustomize":  # not where the stage or a test imports it
    if os.environ.get(EVENTS):
        sys.meta_path.insert(0, Hook())
    chain()
