"""The process that trains: where it resumes, how it is run and watched, what it leaves."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from stages.core.errors import UserError
from stages.tuning import history
from stages.tuning import process as training
from tests.repository import wait_for

ROOT = Path(__file__).parent.parent


# resuming

WHOLE, TORN = '{"global_step": 1}', '{"global_step": 10, "log_hist'


@pytest.mark.parametrize(
    ("there", "resumed", "left"),
    [
        ({"900": WHOLE, "1000": WHOLE, "99": WHOLE}, "1000", {"900", "1000", "99"}),
        ({"10": WHOLE, "20": None}, "10", {"10"}),  # half written
        ({"10": WHOLE, "20": ""}, "10", {"10"}),
        ({"10": WHOLE, "20": TORN}, "10", {"10"}),
        ({"10": WHOLE, "10.tmp": WHOLE}, "10", {"10"}),
        ({"20": None}, None, set()),
        ({}, None, set()),
    ],
)
def test_the_newest_whole_checkpoint_is_resumed_else_the_folder_is_emptied(
    tmp_path, there, resumed, left
):
    folder = tmp_path / "run"
    for step, state in there.items():
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"of an earlier run")
        if state is not None:
            (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert training.prepare(folder) == (resumed and f"checkpoint-{resumed}")
    assert {path.name for path in folder.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in left}
    assert resumed or not list(folder.iterdir())


# the process


@pytest.fixture
def fake_cli(tmp_path, monkeypatch):
    """``fake_cli(code)`` puts a Python program in the place of ``llamafactory-cli``."""

    def write(code):
        script = tmp_path / "bin" / "llamafactory-cli"
        script.parent.mkdir(exist_ok=True)
        header = "import os, signal, subprocess, sys, time\n"
        script.write_text(f"#!{interpreter}\n" + header + textwrap.dedent(code))
        script.chmod(0o755)

    interpreter = sys.executable
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    return write


def launch(folder, *arguments, watch=lambda step: None):
    training.launch(arguments or ("train",), folder, {"PATH": os.environ["PATH"]}, watch)


STEPS = """
    def write(line):
        with open(os.environ["TRAINING_EVENTS"], "a") as file: file.write(line)

    def wait_for(name):
        while not os.path.exists(name): time.sleep(0.01)
"""


def test_steps_arrive_while_the_training_runs(fake_cli, tmp_path):
    (tmp_path / "events.jsonl").write_text('{"step": 99}\n')  # of an attempt that was killed
    fake_cli(
        STEPS
        + f"""
    sys.stdout.write("half a line"); sys.stdout.flush()
    write('{{"step": 1, "max_steps": 3}}\\n{{"st'); wait_for("{tmp_path}/1")
    write('ep": 2, "loss": NaN}}\\n{{torn\\n'); wait_for("{tmp_path}/2")
    write('{{"step": 3}}\\n')
    """
    )
    seen = []

    def watch(entry):
        assert (tmp_path / "train.log").read_text() == "half a line"
        seen.append(entry["step"])
        (tmp_path / str(entry["step"])).touch()  # the training waits for this

    launch(tmp_path, watch=watch)
    assert seen == [1, 2, 3]


def test_a_step_that_can_not_be_right_ends_the_training_there(fake_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_cli(
        STEPS
        + """
    worker = subprocess.Popen(["sleep", "600"])
    open("pids", "w").write(f"{os.getpid()} {worker.pid}")
    write('{"step": 1, "max_steps": 2}\\n')
    time.sleep(600)
    """
    )
    (tmp_path / "checkpoint-1").mkdir()

    def watch(entry):
        raise UserError("the training diverged")

    start = time.monotonic()
    with pytest.raises(UserError, match="diverged"):
        launch(tmp_path, watch=watch)
    assert time.monotonic() - start < 10
    pids = (tmp_path / "pids").read_text().split()
    wait_for(lambda: not any(running(int(pid)) for pid in pids))
    assert (tmp_path / "checkpoint-1").is_dir()


FAILURES = {
    "GPU ran out of memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
    "the disk is full": "OSError: [Errno 28] No space left on device: 'checkpoint-10'",
    "a process of the distributed run": "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp",
    "Ray needs as many free": "RuntimeError: Ray had no 2 x {'CPU': 1, 'GPU': 1} to give",
    "the machine ran out of memory": "  traceback : Signal 9 (SIGKILL) received by PID 4242",
}


def fix_of(told):
    return next(each["likely"] for each in training.FIXES if told in each["likely"])


@pytest.mark.parametrize("told", FAILURES)
def test_a_failure_is_told_with_its_last_lines_and_the_likely_fix(told):
    output = (
        "Loading the model\n\n"
        " 10%|█         | 1/10 [00:00<00:01]\r 20%|██        | 2/10 [00:00<00:01]\r\n"
        f'Traceback (most recent call last):\n  File "/x/y.py", line 3, in main\n    run()\n'
        f"    ^^^^^\n{FAILURES[told]}\n\r 30%|███       | 3/10 [00:00<00:01]"
    )
    message = training.explain(1, output, Path("run/train.log"))
    assert f"likely fix: {fix_of(told)}" in message
    lines = [line.strip() for line in message.splitlines()]
    assert lines[1:3] == ["Loading the model", FAILURES[told].strip()]
    assert lines[0] == "llamafactory-cli failed (exit status 1); its last lines:"
    assert "run/train.log" in lines[-1]
    assert {fix_of(each) for each in FAILURES} == {each["likely"] for each in training.FIXES}


def test_a_full_disk_and_a_kill_are_known_for_what_they_are():
    torch_save = "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
    assert "disk is full" in training.explain(1, torch_save, Path("train.log"))
    for status in (-9, 137):
        assert "the machine ran out of memory" in training.explain(status, "", Path("train.log"))


def test_an_unknown_failure_gets_no_made_up_fix_nor_that_of_an_earlier_attempt(fake_cli, tmp_path):
    log = tmp_path / "train.log"
    log.write_text("OSError: [Errno 28] No space left on device\n")
    fake_cli("""
        print("[rank0]: ProcessGroupNCCL.cpp: using GPU 0 to perform barrier")
        print("Quantizing model to 4 bit with bitsandbytes.")
        sys.exit("ZeroDivisionError: division by zero")
    """)
    with pytest.raises(UserError, match="ZeroDivisionError") as error:
        launch(tmp_path)
    assert "likely fix" not in str(error.value)
    assert "No space left" in log.read_text()


@pytest.fixture
def stage(fake_cli, tmp_path):
    """A stage in a process of its own that trains, and the ids of its training and of a worker."""
    fake_cli("""
        worker = subprocess.Popen(["sleep", "600"])
        with open(sys.argv[1] + ".part", "w") as file: file.write(f"{os.getpid()} {worker.pid}")
        os.rename(sys.argv[1] + ".part", sys.argv[1])
        time.sleep(600)
    """)
    code = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        from stages.core import command
        from stages.tuning import process
        sys.executable = {sys.executable!r}
        def main() -> None:
            folder = Path({str(tmp_path)!r})
            process.launch([{str(tmp_path / "pids")!r}], folder, dict(os.environ), print)
        command.run(main)
    """)
    stage = subprocess.Popen(
        [str(Path(sys.prefix) / "bin" / "python"), "-c", code],  # sys.executable is patched
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for((tmp_path / "pids").exists)
    watch = Path(f"/proc/{stage.pid}/task/{stage.pid}/children")
    wait_for(lambda: len(watch.read_text().split()) == 2)
    return stage, {*map(int, f"{(tmp_path / 'pids').read_text()} {watch.read_text()}".split())}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_ending_the_stage_ends_the_training_and_its_workers(stage, how):
    process, started = stage
    process.send_signal(how)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    wait_for(lambda: not any(map(running, started)))


def test_a_training_does_not_outlive_its_stage_however_that_dies(stage):
    process, started = stage
    process.kill()  # the stage alone, which can't end anything any more
    process.communicate()
    assert len(started) == 3  # the training, its worker, and what waits for the stage's end
    wait_for(lambda: not any(map(running, started)))


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# publishing


def trained(folder, modules=("q", "v")):
    """A folder as a training leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    keys = {"target_modules": modules, "modules_to_save": None, "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(keys))
    (folder / "llamafactory.yaml").write_text("stage: dpo\n")
    (folder / "training_args.bin").write_bytes(b"paths and times")
    return folder


def test_equal_adapters_are_equal_files(tmp_path):
    published = []
    for name, modules in (("one", ["v", "k", "q"]), ("other", ["q", "v", "k"])):
        out = tmp_path / name / "adapter"
        out.mkdir(parents=True)
        (out / "README.md").write_text("of an adapter before")
        folder = trained(tmp_path / name / "f", modules)
        training.finish(folder)
        training.publish(folder, out)
        published.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert published[0] == published[1]
    assert set(published[0]) == {
        *("adapter_model.safetensors", "adapter_config.json"),
        *("llamafactory.yaml", "fingerprint.json"),
    }
    assert json.loads(published[0]["adapter_config.json"])["target_modules"] == ["k", "q", "v"]


# What a training logs: its curves, and the signs that it can't be right


NAN = float("nan")
STEP_1 = {
    "step": 1,
    "epoch": 0.051234567,
    "loss": 0.6931,
    "rewards/margins": 0.0,
    "rewards/accuracies": 0.0,
    "logps/chosen": -60.0,
    "logps/rejected": -50.0,
    "learning_rate": 0.0,
}
VALIDATION = {"step": 2, "epoch": 0.1, "eval_loss": 0.6, "eval_rewards/margins": 0.1}
SUMMARY = {"step": 2, "epoch": 0.1, "train_loss": 0.6, "train_runtime": 9.5}


@pytest.mark.parametrize(
    ("entry", "beta", "told"),
    [
        (STEP_1, 0.1, None),
        (STEP_1 | {"rewards/margins": 0.02}, 0.1, None),  # what bfloat16 rounds of 60 nats
        (STEP_1 | {"rewards/margins": 0.2, "step": 5}, 0.1, None),
        (STEP_1 | {"rewards/margins": 0.2}, None, None),  # a loss without a reference
        (VALIDATION, 0.1, None),
        (SUMMARY, 0.1, None),
        (STEP_1 | {"rewards/margins": 0.2}, 0.1, r"margin at step 1 is 0\.2, not about 0"),
        (STEP_1 | {"rewards/margins": -0.2}, 0.1, r"margin at step 1 is -0\.2, not about 0"),
        (STEP_1 | {"loss": NAN}, 0.1, "at step 1: the training diverged.*learning_rate"),
        (STEP_1 | {"loss": float("inf")}, None, "diverged"),
        (STEP_1 | {"logps/chosen": NAN}, 0.1, "diverged"),  # the trainer hides a NaN loss
        (VALIDATION | {"eval_loss": NAN}, None, "eval_loss is nan at step 2: .*diverged"),
        (STEP_1 | {"rewards/rejected": NAN}, 0.1, "reference's .*dvc repro -f reference"),
        (VALIDATION | {"eval_rewards/chosen": NAN}, 0.1, "reference's log-probs are not numbers"),
    ],
)
def test_a_step_that_can_not_be_right_ends_the_training(entry, beta, told):
    if told is None:
        history.check(entry, beta)
        return
    with pytest.raises(UserError, match=told):
        history.check(entry, beta)


def test_curves_are_split_by_what_was_measured_and_the_summary_is_none(tmp_path):
    entries = [STEP_1, VALIDATION, SUMMARY]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    assert history.point(VALIDATION) == ("validation", {"loss": 0.6, "reward_margin": 0.1})
    tables = history.curves(history.read(tmp_path))
    assert {split: table.to_dict("records") for split, table in tables.items()} == {
        "train": [
            {
                "step": 1,
                "epoch": 0.0512,
                "loss": 0.6931,
                "reward_margin": 0.0,
                "reward_accuracy": 0.0,
                "chosen_logps": -60.0,
                "rejected_logps": -50.0,
                "learning_rate": 0.0,
            }
        ],
        "validation": [{"step": 2, "epoch": 0.1, "loss": 0.6, "reward_margin": 0.1}],
    }
