"""The whole pipeline, as a user runs it: in a fresh clone, through DVC, without its cache."""

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from platform import machine
from typing import Any

import pytest
from ruamel.yaml import YAML

from benchmarks.pipeline import set_parameters
from stages.pairs.pairs import SPLITS
from tests.contracts import COSTS
from tests.rounding import cpu
from tests.run_stages import fresh_clone

ROOT = Path(__file__).parent.parent
# Stages whose results are the same bits wherever they run: no floating point in what they write.
BIT_FOR_BIT = ("fetch@easy-vqa", "fetch-model", "preprocess", "format")

pytestmark = pytest.mark.slow


def dvc(clone: Path, *arguments: str, **environment: str) -> str:
    """Run dvc with this environment's tools; its output, which the test shows if it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": path, "DVC_NO_ANALYTICS": "1", "MLFLOW_TRACKING_URI": ""}
    result = subprocess.run(
        ["dvc", *arguments],
        cwd=clone,
        env=os.environ | settings | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


def outputs(lock: Path, stage: str) -> dict[str, str]:
    """Paths and hashes of what a stage wrote, by ``dvc.lock``."""
    document: dict[str, Any] = YAML(typ="safe").load(lock)
    return {out["path"]: out["md5"] for out in document["stages"][stage]["outs"]}


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clone = fresh_clone(tmp_path_factory.mktemp("demo"))
    dvc(clone, "repro")
    return clone


def test_a_fresh_clone_reproduces_the_data_bit_for_bit(reproduced: Path):
    for stage in BIT_FOR_BIT:
        assert outputs(reproduced / "dvc.lock", stage) == outputs(ROOT / "dvc.lock", stage), stage


def test_a_fresh_clone_reproduces_the_committed_metrics(reproduced: Path):
    # Another processor rounds differently, and training amplifies that: equal within noise.
    committed = json.loads((ROOT / "reports" / "results" / "metrics.json").read_text())
    found = json.loads((reproduced / "reports" / "results" / "metrics.json").read_text())
    assert list(found) == list(committed)
    assert found["pairs"] == committed["pairs"]
    assert found["base_accuracy"] == pytest.approx(committed["base_accuracy"], abs=0.005)
    assert found["base_correct"] == pytest.approx(committed["base_correct"], abs=0.005)
    for name in ("win_rate", "tuned_accuracy", "tuned_correct"):
        assert found[name] == pytest.approx(committed[name], abs=0.05), name


def test_the_demo_shows_what_it_promises(reproduced: Path):
    found = json.loads((reproduced / "reports" / "results" / "metrics.json").read_text())
    assert 0.50 <= found["base_accuracy"] <= 0.75
    assert found["win_rate_low"] > 0.90
    assert found["correct_change_low"] > 0.10
    # The image decides: without it, and with another, the win rate is a coin's.
    for way in ("blank", "shuffled"):
        assert found[f"win_rate_over_{way}_low"] > 0.3
        assert abs(found[f"win_rate_{way}"] - 0.5) < 0.1
    # lm-eval finds the same by a way of its own.
    assert found["lm_eval/easy_vqa/accuracy/change_low"] > 0.10


def test_a_second_run_has_nothing_to_do(reproduced: Path):
    assert "Running stage" not in dvc(reproduced, "repro")


def test_a_fresh_clone_ends_clean(reproduced: Path):
    """On every x86-64 CPU; another rounds otherwise, and training amplifies that."""
    status = subprocess.run(
        ["git", "diff", "--name-only", "HEAD"], cwd=reproduced, capture_output=True, text=True
    )
    committed = subprocess.run(
        ["git", "diff", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    changed = set(status.stdout.split()) - set(committed.stdout.split())
    if machine() == "x86_64":
        assert not changed, f"{cpu()} rounds otherwise: {sorted(changed)}"
    rounded = {"dvc.lock", "reports/headline.json", "reports/model_card.md"}
    for name in changed:
        assert name in rounded or name.startswith(("reports/curves/", "reports/results/")), name


def test_the_page_is_the_same_on_every_run(reproduced: Path):
    page = reproduced / "reports" / "report.html"
    before = page.read_bytes()
    dvc(reproduced, "repro", "--force", "--single-item", "report")
    assert page.read_bytes() == before


def test_an_adapter_that_is_there_is_not_trained_again(reproduced: Path):
    code = reproduced / "stages" / "model" / "prefix.py"
    before = code.read_text()
    code.write_text(before + "\n# another comment\n")
    told = dvc(reproduced, "repro", "--single-item", "train")
    assert "nothing to train" in told
    told = dvc(reproduced, "repro", "--single-item", "reference")
    assert told.count("kept from an earlier run") == len(SPLITS)
    code.write_text(before)
    dvc(reproduced, "commit", "--force", "train", "reference")


FREE = [cost for cost in COSTS if cost[2] == "nothing"]


@pytest.mark.parametrize(
    "rows",
    [FREE, *([cost] for cost in COSTS if cost not in FREE)],
    ids=lambda rows: "; ".join(cost[0] for cost in rows),
)
def test_dvc_reruns_what_contributing_says(reproduced: Path, rows: list[tuple[str, ...]]):
    """All that costs nothing at once, since DVC takes seconds to look."""
    contents = {}
    for _, files, _ in rows:
        place = reproduced / re.findall(r"`([^`]+)`", files)[0]  # test_pipeline looks at all
        path = place if place.is_file() else min(place.glob("[a-z]*.*"))
        contents[path] = path.read_bytes()
        path.write_bytes(contents[path] + b"\n# one more comment\n")
    planned = would_run(reproduced)
    for path, before in contents.items():
        path.write_bytes(before)
    assert planned <= {name for _, _, reruns in rows for name in re.findall(r"`([\w-]+)`", reruns)}


def test_a_new_beta_reruns_train_evaluate_and_their_report_alone(reproduced: Path):
    assert would_run(reproduced, **{"train.beta": 0.2}) == {"train", "evaluate", "report"}


def test_other_controls_rerun_the_baseline_and_never_the_reference(reproduced: Path):
    changed = would_run(reproduced, **{"evaluate.controls": 200})
    assert changed == {"baseline", "evaluate", "report"}


def would_run(clone: Path, **parameters: Any) -> set[str]:
    """Stages that DVC would run, with other values of parameters."""
    from dvc.repo import Repo

    path = clone / "params.yaml"
    before = path.read_text()
    if parameters:
        set_parameters(path, parameters)
    with contextlib.chdir(clone), Repo() as repo:
        planned = repo.reproduce(dry=True)
    path.write_text(before)
    return {stage.name.partition("@")[0] for stage in planned}


def test_mlflow_holds_one_finished_run_with_the_same_win_rate(reproduced: Path):
    metrics = json.loads((reproduced / "reports" / "results" / "metrics.json").read_text())
    with sqlite3.connect(reproduced / "mlflow.db") as database:
        runs = database.execute("select run_uuid, status from runs").fetchall()
        assert [status for _, status in runs] == ["FINISHED"]
        logged = dict(database.execute("select key, value from latest_metrics").fetchall())
        tags = dict(database.execute("select key, value from tags").fetchall())
    assert logged["win_rate"] == round(metrics["win_rate"], 4)
    assert logged["evaluation/win_rate"] == pytest.approx(metrics["win_rate"])
    assert "train/reward_margin" in logged
    assert len(tags["git.commit"]) == 40


def test_no_result_names_this_machine(reproduced: Path):
    home = str(reproduced.parent)
    reports = [path for path in (reproduced / "reports").rglob("*") if path.is_file()]
    for path in [reproduced / "dvc.lock", *reports]:
        assert home.encode() not in path.read_bytes(), path
    for path in sorted((reproduced / "models" / "adapter").iterdir()):
        assert home.encode() not in path.read_bytes(), path
