"""``make exps``: experiments in a terminal of 120 columns, without a cell cut or wrapped."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stages.evaluation.catalogue import HEADLINE
from tests.contracts import ROOT

STAGE = """
import json, pathlib, yaml
beta = yaml.safe_load(pathlib.Path("params.yaml").read_text())["train"]["beta"]
values = dict(zip(%r, [0.9837, 0.9737, 0.9925, 0.7247, 0.9837, 0.929, -7.9104, 0.8368]))
values = {key: round(value + beta * (key != "base_acc"), 4) for key, value in values.items()}
pathlib.Path("reports").mkdir(exist_ok=True)
pathlib.Path("reports/headline.json").write_text(json.dumps(values))
"""
PIPELINE = """
stages:
  evaluate:
    cmd: python evaluate.py
    deps: [evaluate.py]
    params: [train.beta]
    metrics: [{reports/headline.json: {cache: false}}]
"""


@pytest.mark.slow
def test_every_headline_figure_and_the_changed_parameter_fit_a_terminal(tmp_path: Path):
    (tmp_path / "evaluate.py").write_text(STAGE % list(HEADLINE))
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "params.yaml").write_text(json.dumps({"train": {"beta": 0.1}}))

    def run(*command: str) -> str:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        who = {
            f"GIT_{role}_{what}": "x"
            for role in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        }
        settings = {"PATH": path, "COLUMNS": "120", "DVC_NO_ANALYTICS": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | settings | who, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("git", "init", "-q")
    run("dvc", "init", "-q")
    run("dvc", "repro", "-q")
    run("git", "add", "-A")
    run("git", "commit", "-q", "-m", "main")
    run("dvc", "exp", "run", "-q", "-n", "beta02", "-S", "train.beta=0.2")
    (line,) = re.findall(r"dvc exp show.*", (ROOT / "Makefile").read_text())
    shown = run("sh", "-c", line.replace("$(ARGS)", ""))
    header = next(row for row in shown.splitlines() if "Experiment" in row)
    differing = [key for key in HEADLINE if key != "base_acc"]  # the base is the same
    assert header.split() == ["Experiment", *differing, "train.beta"]
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 120
    assert "beta02" in shown
