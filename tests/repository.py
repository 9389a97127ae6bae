"""Real Git and DVC repositories for tests: how commands run in them."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).parent.parent
PUT = """
import json, os, pathlib, sys, time
def put(path, text):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(text)
"""  # how the script begins that stands in for every stage
PARAMS = """
from ruamel.yaml import YAML
p = YAML(typ="safe", pure=True).load(pathlib.Path("params.yaml").read_text())
"""


def environment(**more: str) -> dict[str, str]:
    """That of the tests, less what a `dvc exp run` around them would have set."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "GIT_"))}
    return inherited | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        **{f"GIT_{who}_{what}": "test@example.org"
           for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        **more,
    }  # fmt: skip


def attempt(*words: str, folder: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    """What a command did, whether it worked or not."""
    return subprocess.run(
        words, cwd=folder, env=environment(**more), capture_output=True, text=True, check=False
    )


def call(*words: str, folder: Path, **more: str) -> str:
    """What a command prints that has to work."""
    done = attempt(*words, folder=folder, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def processes_with(variable: str, value: str) -> list[int]:
    """The processes of this machine that have it in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(variable) == value:
                found.append(process.pid)
    return found
