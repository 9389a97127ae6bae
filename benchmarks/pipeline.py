"""Runs the whole pipeline in a fresh clone and prints what it took, stage by stage.

    python -m benchmarks.pipeline
    python -m benchmarks.pipeline train.gpus=1 train.bf16=true scoring.device=cuda \\
        scoring.dtype=bfloat16

Arguments are parameters, as after ``dvc exp run -S``. The clone has no cache of DVC's, so every
stage runs; it uses this environment and is removed afterwards. Committed work only.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

PACKAGES = ("torch", "transformers", "llamafactory", "peft", "trl")


def main() -> None:
    overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        run("git", "clone", "-q", str(Path.cwd()), str(clone))
        given = (override.partition("=")[::2] for override in overrides)
        values = {key: YAML(typ="safe").load(value) for key, value in given}
        set_parameters(clone / "params.yaml", values)
        listed = run("dvc", "stage", "list", "--name-only", cwd=clone, stdout=subprocess.PIPE)
        seconds = {stage: timed(clone, stage) for stage in listed.split()}
        metrics = json.loads((clone / "reports" / "results" / "metrics.json").read_text())
    print(f"\ncommand: python -m benchmarks.pipeline {' '.join(overrides)}".rstrip())
    print(f"{stack()}\n")
    print("| stage | seconds |\n|---|---|")
    for stage, taken in seconds.items():
        print(f"| {stage} | {taken:.0f} |")
    print(f"| all | {sum(seconds.values()):.0f} |\n")
    shown = ("win_rate", "base_accuracy", "tuned_accuracy", "base_correct", "tuned_correct")
    print(", ".join(f"{name} {metrics[name]:.3f}" for name in shown if name in metrics))


def set_parameters(path: Path, values: Mapping[str, Any]) -> None:
    """Set dotted parameters of a parameters file, which keeps its comments."""
    yaml = YAML()
    document = yaml.load(path)
    for key, value in values.items():
        *sections, name = key.split(".")
        place = document
        for section in sections:
            place = place[section]
        place[name] = value
    with path.open("w") as file:
        yaml.dump(document, file)


def timed(clone: Path, stage: str) -> float:
    start = time.perf_counter()
    run("dvc", "repro", "--force", "--single-item", stage, cwd=clone)
    return time.perf_counter() - start


def run(*command: str, cwd: Path | None = None, stdout: int | None = None) -> str:
    # The tools of this environment, whatever PATH says.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path}
    done = subprocess.run(command, cwd=cwd, check=True, env=env, stdout=stdout, text=True)
    return done.stdout or ""


def stack() -> str:
    """The device and the versions that a measurement was made with."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"device: {device()}; {versions}"


def device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
