"""Runs every stage of dvc.yaml in the current folder, one after the other in one process.

    python -m tests.run_stages

LLaMA-Factory is imported once and not by each stage, which takes most of the time of a small run.
"""

import importlib
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from ruamel.yaml import YAML

from stages.core import command

ROOT = Path(__file__).parent.parent


# Parameters of a run of a few seconds on some sixty pairs.
SMALL = {
    "preprocess.validation": 0.2,
    "preprocess.test": 0.3,
    "train.max_steps": 3,
    "train.logging_steps": 1,
    "train.eval_steps": 2,
    "evaluate.resamples": 200,
    "evaluate.controls": 8,
    "evaluate.generation": {
        "prompts": 6,
        "questions": 0,
        "max_new_tokens": 8,
        "engine": "transformers",
    },
    "evaluate.lm_eval": {},
}


def fresh_clone(folder: Path) -> Path:
    """A clone of this project with the working tree's tracked files, edits included."""
    clone = folder / "a clone"  # with a space, as paths have them
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, clone / name)
    return clone


def stage_commands(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Name of each stage and the words of its command, with the parameters of ``folder``."""
    yaml = YAML(typ="safe")
    p = yaml.load(folder / "params.yaml")
    for name, stage in yaml.load(ROOT / "dvc.yaml")["stages"].items():
        for key in p["data"]["sources"] if "foreach" in stage else [""]:
            line = stage.get("do", stage)["cmd"].replace("${key}", key)
            yield (
                name,
                shlex.split(line.replace("${evaluate.task_files}", p["evaluate"]["task_files"])),
            )


def main() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    for _, words in stage_commands(Path()):
        with mock.patch.object(sys, "argv", words[2:]):
            command.run(importlib.import_module(words[2]).main)
    signal.signal(signal.SIGTERM, handler)


if __name__ == "__main__":
    main()
