"""``make exps``: experiments in a terminal of 120 columns, without a cell cut or wrapped."""

import json
import re
import shutil
from pathlib import Path

import pytest

from stages.evaluation.catalogue import HEADLINE
from tests.contracts import ROOT
from tests.repository import PARAMS, PUT, begun, call

STAGE = (
    PUT
    + PARAMS
    + f"keys = {list(HEADLINE)}\n"
    + """
values = dict(zip(keys, [0.9837, 0.9737, 0.9925, 0.7247, 0.9837, 0.929, -7.9104, 0.8368]))
put("reports/headline.json", json.dumps(values))
"""
)
PIPELINE = """
stages:
  evaluate:
    cmd: python evaluate.py
    deps: [evaluate.py]
    params: [train.beta]
    metrics: [{reports/headline.json: {cache: false}}]
"""
SHOWN = [key for key in HEADLINE if key != "base_acc"]  # the base stays the same


@pytest.mark.slow
def test_the_headline_is_there_after_the_first_run_and_where_experiments_tie(tmp_path: Path):
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    parameters = json.dumps({"train": {"beta": 0.1}})

    def exps(*settings: str) -> tuple[list[str], list[str]]:
        """The table's columns, and the first words of its rows."""
        recipe = call(
            "make", "--no-print-directory", "--dry-run", "exps", *settings, folder=tmp_path
        )
        line = recipe[recipe.index("[ -t 1 ]") :].replace(".venv/bin", "none")
        table = call("sh", "-c", line, folder=tmp_path, COLUMNS="120")
        assert "…" not in table
        assert max(map(len, table.splitlines())) <= 120
        _, head, _, *rows, _ = table.strip("\n").splitlines()
        return head.split(), [re.sub(r"^\W+", "", row).split("  ")[0] for row in rows]

    begun(tmp_path, {"evaluate.py": STAGE, "dvc.yaml": PIPELINE, "params.yaml": parameters})
    first = call("git", "rev-parse", "--short=7", "HEAD", folder=tmp_path).strip()
    assert exps() == (["Experiment", *SHOWN], ["workspace", "main"])
    call("dvc", "exp", "run", "-q", "-n", "tied", "-S", "train.beta=0.2", folder=tmp_path)
    columns, rows = exps()
    assert columns == ["Experiment", *SHOWN, "train.beta"]
    assert rows[:2] == ["workspace", "main"]
    assert rows[2].endswith("[tied]")
    for message in ("second", "third"):
        call("git", "commit", "-q", "--allow-empty", "-m", message, folder=tmp_path)
    assert exps()[1] == ["workspace", "main"]
    _, rows = exps("ARGS=-A")
    assert rows[:3] == ["workspace", "main", first]  # not the second commit
    assert rows[3].endswith("[tied]")
    call("dvc", "exp", "run", "-q", "-n", "here", "-S", "train.beta=0.3", folder=tmp_path)
    _, rows = exps("ARGS=-A --hide-workspace")
    assert [row.split()[-1] for row in rows] == ["main", "[here]", first, "[tied]"]
