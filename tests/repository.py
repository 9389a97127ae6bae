"""Real Git and DVC repositories for tests: how commands run in them, and a small pipeline."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from ruamel.yaml import YAML

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
    """That of the tests, with this environment's tools and an author of commits."""
    return os.environ | {
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


# a small pipeline and what people do with it

# Stands for the stages: data that follow from a parameter, an adapter that follows from another,
# results, and a page, which completes the MLflow run where TRACKED is true.
STAGES = (
    PUT
    + PARAMS
    + """
from pathlib import Path
rate = round(p["train"]["beta"] + p["train"]["seed"] / 100, 2)
if sys.argv[1] == "data":
    put("data/pairs/pairs.txt", str(p["preprocess"]))
if sys.argv[1] == "train":
    put("models/adapter/weights", json.dumps(p["train"]))
    made = {"fingerprint": json.dumps(p["train"]).replace('"', ""), "adapter_sha256": "0" * 64}
    put("models/adapter/fingerprint.json", json.dumps(made))
    put("reports/curves/train.csv", f"step,loss\\n1,{p['train']['beta']}\\n")
    if p["train"]["beta"] == 9:
        from stages.tracking import runs
        with runs.Live("9"):
            raise ValueError("the GPU ran out of memory\\nlower the batch size")
if sys.argv[1] == "evaluate":
    put("reports/results/metrics.json", json.dumps({"win_rate": rate}))
if sys.argv[1] == "report":
    put("reports/report.html", f"<p>{rate}</p>")
    put("reports/model_card.md", f"# {rate}")
    if TRACKED:
        from stages.tracking import runs
        files = (Path("reports/report.html"), Path("reports/model_card.md"))
        folders = (Path("reports/results"), Path("reports/curves"), Path("models/adapter"))
        runs.complete_run(*folders, files)
"""
)
PIPELINE = """
stages:
  preprocess:
    cmd: python stage.py data
    deps: [stage.py]
    params: [preprocess]
    outs: [data/pairs]
  train:
    cmd: python stage.py train
    deps: [stage.py, data/pairs]
    params: [train]
    outs: [{models/adapter: {persist: true}}, {reports/curves: {cache: false, persist: true}}]
  evaluate:
    cmd: python stage.py evaluate
    deps: [stage.py, models/adapter]
    params: [train]
    outs: [{reports/results: {cache: false}}]
"""
REPORTED = (
    PIPELINE
    + """
  report:
    cmd: >-
      python stage.py report --raw x --formatted-data x --images x --model x --details x
      --adapter models/adapter --curves reports/curves --results reports/results
      --page reports/report.html --card reports/model_card.md
    deps: [stage.py, reports/results]
    params: [train]
    outs: [reports/report.html, {reports/model_card.md: {cache: false}}]
"""
)


def with_dvc(folder: Path) -> None:
    """What ``dvc init`` makes, without starting DVC again."""
    from dvc.repo import Repo

    Repo.init(str(folder)).close()


def begun(folder: Path, files: Mapping[str, str]) -> Path:
    """A repository with these files, whose pipeline was run and committed on ``main``."""
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    call("git", "init", "-q", "-b", "main", folder=folder)
    with_dvc(folder)
    call("dvc", "repro", "-q", folder=folder)
    for key in ("user.name", "user.email"):
        call("git", "config", key, "test@example.org", folder=folder)
    call("git", "add", "-A", folder=folder)
    call("git", "commit", "-qm", "begun", folder=folder)
    return folder


def make(folder: Path, stage: str, pipeline: str = PIPELINE) -> Path:
    """``folder/project``, a project that was not run yet, with ``origin.git`` and ``storage``."""
    origin, project = folder / "origin.git", folder / "project"
    call("git", "init", "--quiet", "--bare", "--initial-branch", "main", str(origin), folder=folder)
    call("git", "clone", "--quiet", str(origin), str(project), folder=folder)
    call("git", "checkout", "--quiet", "-B", "main", folder=project)
    (project / "stage.py").write_text(stage, encoding="utf-8")
    (project / "dvc.yaml").write_text(pipeline, encoding="utf-8")
    (project / "params.yaml").write_text(
        "data: {sources: {}}\npreprocess: 1\ntrain: {beta: 0.1, seed: 42}\n"
    )
    (project / ".gitignore").write_text("mlflow.db*\n/mlartifacts/\n__pycache__/\n")
    with_dvc(project)
    remote = f"[core]\n    remote = storage\n['remote \"storage\"']\n    url = {folder}/storage\n"
    (project / ".dvc" / "config").write_text(remote, encoding="utf-8")
    return project


def commit_and_push(project: Path, **more: str) -> None:
    call("git", "add", ".", folder=project)
    call("git", "commit", "--quiet", "-m", "Run", folder=project)
    call("git", "push", "--quiet", "origin", "main", folder=project)
    call("dvc", "push", "--quiet", folder=project, **more)


def clone(project: Path, target: Path) -> Path:
    origin = str(project.parent / "origin.git")
    call("git", "clone", "--quiet", origin, str(target), folder=target.parent)
    return target


def hashes(project: Path) -> dict[str, str]:
    """The md5 of every output in dvc.lock."""
    lock = YAML(typ="safe").load((project / "dvc.lock").read_text())
    return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)
