"""Sweeps: combinations, names, and experiments that run side by side, one on each GPU."""

import signal
import subprocess
import sys
import time

import psutil  # type: ignore[import-untyped]
import pytest

from stages.commands import sweep
from stages.core.errors import UserError
from tests.repository import ROOT, attempt, begun, call, environment, wait_for

STAGE = """
import json, os, pathlib, sys, time
from ruamel.yaml import YAML
train = YAML(typ="safe", pure=True).load(pathlib.Path("params.yaml").read_text())["train"]
start = time.time()
if train["beta"] == 9:
    sys.exit("RuntimeError: CUDA out of memory")
time.sleep(train["seconds"])
span = [os.environ.get("CUDA_VISIBLE_DEVICES"), start, time.time()]
pathlib.Path(sys.argv[1], f"train-{train['beta']}").write_text(json.dumps(span))
pathlib.Path("result.json").write_text(json.dumps({"beta": train["beta"]}))
"""
PIPELINE = """
stages:
  data:
    cmd: date +%N > {log}/data-$$ && touch data.txt
    outs: [data.txt]
  train:
    cmd: python stage.py {log}
    deps: [stage.py, data.txt]
    params: [train]
    metrics: [{{result.json: {{cache: false}}}}]
"""


def test_values_are_combined_and_an_experiment_is_named_after_its_own():
    assert sweep.combinations("a=1,2 b=x") == [("a=1", "b=x"), ("a=2", "b=x")]
    assert sweep.combinations("a.b=[q,v],[q]") == [("a.b=[q,v]",), ("a.b=[q]",)]
    assert sweep.combinations("+train.neftune=5") == [("+train.neftune=5",)]
    assert sweep.named(("train.beta=0.05", "train.seed=1")) == "beta-0.05-seed-1"
    assert sweep.named(("+train.lora_target=[q,v]",), "wide") == "wide-lora_target-_q_v"


@pytest.mark.parametrize("sets", ["", "train.beta", "a=[q,v", "a=q]", "a=1,,2"])
def test_what_dvc_would_not_read_is_refused_in_one_sentence(sets):
    with pytest.raises(UserError, match=r"SET='.*' can't be read \(.+\); write SET=") as refused:
        sweep.main(sets, gpus="0")
    assert "\n" not in str(refused.value)


def measured(win_rate, accuracy, test):
    values = {"val_win_rate": win_rate, "val_tuned_accuracy": accuracy, "win_rate": test}
    return values | {"win_rate_low": test - 0.02, "win_rate_high": test + 0.01}


def test_the_choice_is_made_by_validation_and_its_test_figure_allows_for_what_was_tried():
    found = {"a": measured(0.9, 0.8, 0.97), "b": measured(0.95, 0.8, 0.9), "c": {}}
    text = sweep.ranked(found | {"d": measured(0.95, 0.9, 0.95)})
    rows = [line.split()[0] for line in text.splitlines()[2:5]]
    assert rows == ["d", "b", "a"]
    assert next(line for line in text.splitlines() if "the choice" in line).startswith("d ")
    # 1 - 0.05 / 3: z is 2.39 in place of 1.96
    assert "the win rate of d is 95.0% [92.4, 96.3]" in text
    assert "3 settings tried" in text
    assert "no experiment has figures" in sweep.ranked({"c": {}})


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    here, log = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("log")
    files = {"stage.py": STAGE, "dvc.yaml": PIPELINE.format(log=log), ".gitignore": "/reports/\n"}
    begun(here, files | {"params.yaml": "train: {beta: 0.1, seconds: 0.0}\n"})
    (here / "params.yaml").write_text("train: {beta: 0.1, seconds: 10.0}\n")
    call("git", "commit", "-qam", "Slower", folder=here)
    return here, log


def words(sets, gpus="0+1"):
    return ("python", "-m", "stages.commands.sweep", "--sets", sets, "--gpus", gpus)


@pytest.mark.rehearsal
@pytest.mark.slow
def test_experiments_run_side_by_side_each_on_its_gpu_and_only_what_is_missing(project):
    here, log = project
    done = attempt(*words("train.beta=0.2,0.3,9", "0,1"), folder=here, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert "failed: beta-9; run the same command again to repeat them" in done.stderr
    assert "CUDA out of memory" in done.stdout
    spans = [eval((log / f"train-{beta}").read_text()) for beta in (0.2, 0.3)]
    assert {gpu for gpu, _, _ in spans} == {"0", "1"}
    assert max(start for _, start, _ in spans) < min(end for *_, end in spans)
    assert len(list(log.glob("data-*"))) == 1  # the first `dvc repro`
    listed = call("dvc", "exp", "list", "--name-only", folder=here).split()
    assert sorted(listed) == ["beta-0.2", "beta-0.3"]
    assert "0.3" in call("dvc", "metrics", "diff", "HEAD", "beta-0.3", folder=here)
    assert call("git", "status", "--porcelain", folder=here) == ""
    (log / "train-0.2").unlink()
    done = attempt(*words("train.beta=0.2,0.4"), folder=here, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "already done: beta-0.2" in done.stdout
    assert not (log / "train-0.2").exists()
    assert eval((log / "train-0.4").read_text())[0] == "0,1"


@pytest.mark.rehearsal
@pytest.mark.slow
def test_uncommitted_edits_are_refused_and_an_interruption_leaves_no_process(project):
    here, log = project
    (here / "params.yaml").write_text("train: {beta: 0.1, seconds: 300}\n")
    done = attempt(*words("train.beta=0.7"), folder=here, PYTHONPATH=str(ROOT))
    assert "commit params.yaml first" in done.stderr
    call("git", "commit", "--quiet", "-a", "-m", "Slow", folder=here)
    process = subprocess.Popen(
        [sys.executable, *words("train.beta=0.7")[1:]],
        cwd=here,
        env=environment(PYTHONPATH=str(ROOT)),
        stderr=subprocess.DEVNULL,
    )

    def training():
        found = psutil.process_iter(["cmdline"])
        return [each for each in found if str(log) in (each.info["cmdline"] or ())]

    wait_for(training)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    time.sleep(1)
    assert not training()
