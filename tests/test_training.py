"""A training: what identifies it, how it resumes, how its process is run, what its log becomes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from stages.core.errors import UserError
from stages.tuning import training

ROOT = Path(__file__).parent.parent


# configuration and fingerprint


@pytest.fixture
def inputs(tmp_path):
    """A formatted data set and a base model, as far as a fingerprint looks at them."""
    (tmp_path / "formatted").mkdir()
    for name in ("train", "validation", "dataset_info"):
        (tmp_path / "formatted" / f"{name}.json").write_text(f'["{name}"]')
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "SOURCE.json").write_text('{"commit": "1"}')
    return tmp_path / "formatted", tmp_path / "base"


def config(p, output="models/training", validated=True):
    paths = {"model": Path("base"), "formatted": Path("formatted"), "images": Path("images")}
    return training.dpo_config(p, **paths, output=Path(output), validated=validated)


def test_the_configuration_holds_our_names_and_llamafactorys(params_with):
    made = config(params_with(**{"train.beta": 0.3, "train.lora_rank": 5, "train.loss": "ipo"}))
    assert (made["stage"], made["pref_beta"], made["pref_loss"]) == ("dpo", 0.3, "ipo")
    assert made["lora_rank"] == 5
    assert made["eval_dataset"] == "validation"
    assert not {"beta", "loss", "gpus"} & set(made)


def test_without_validation_pairs_nothing_is_evaluated_in_training(params_with):
    made = config(params_with(), validated=False)
    assert made["eval_strategy"] == "no"
    assert not {"eval_dataset", "eval_steps"} & set(made)


def test_a_training_that_would_leave_no_adapter_is_refused(params_with):
    with pytest.raises(UserError, match=r"finetuning_type is full.*lora"):
        config(params_with(**{"train.finetuning_type": "full"}))


def mark(p, inputs, gpus=0, **changes):
    formatted, model = inputs
    return training.fingerprint(config(p) | changes, formatted, model, gpus)


def test_the_fingerprint_does_not_depend_on_where_results_go(params_with, inputs):
    p = params_with()
    one = mark(p, inputs)
    other = mark(p, inputs, output_dir="elsewhere", report_to="mlflow")
    assert one == other
    assert len(one) == 16
    assert int(one, 16) >= 0


@pytest.mark.parametrize("file", ["train.json", "validation.json", "dataset_info.json"])
def test_the_fingerprint_changes_with_the_data(params_with, inputs, file):
    before = mark(params_with(), inputs)
    (inputs[0] / file).write_text("[]")
    assert mark(params_with(), inputs) != before


def test_the_fingerprint_changes_with_the_model_and_the_packages(params_with, inputs, monkeypatch):
    seen = {mark(params_with(), inputs)}
    (inputs[1] / "SOURCE.json").write_text('{"commit": "2"}')
    seen.add(mark(params_with(), inputs))
    monkeypatch.setattr(training, "version", lambda package: f"{package} of another day")
    seen.add(mark(params_with(), inputs))
    assert len(seen) == 3


@pytest.mark.parametrize(
    "change",
    [{"train.beta": 0.11}, {"train.seed": 7}, {"train.lora_rank": 4}, {"format.cutoff_len": 99}],
)
def test_the_fingerprint_changes_with_what_decides_the_result(params_with, inputs, change):
    before = mark(params_with(), inputs)
    assert mark(params_with(**change), inputs) != before


def test_the_fingerprint_changes_with_the_processes_that_share_a_batch(params_with, inputs):
    one, eight = (mark(params_with(), inputs, gpus=n) for n in (1, 8))
    assert one != eight


# resuming


def checkpoint(folder, step, state='{"global_step": 1}'):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_newest_checkpoint_is_resumed_by_number_not_by_name(tmp_path):
    for step in (900, 1000, 99):
        checkpoint(tmp_path / "run", step)
    assert training.prepare(tmp_path / "run") == "checkpoint-1000"


@pytest.mark.parametrize("state", [None, "", '{"global_step": 10, "log_hist'])
def test_a_half_written_checkpoint_is_dropped_for_the_one_before(tmp_path, state):
    whole = checkpoint(tmp_path / "run", 10)
    half = checkpoint(tmp_path / "run", 20, state)
    assert training.prepare(tmp_path / "run") == "checkpoint-10"
    assert whole.exists()
    assert not half.exists()


def test_a_folder_that_is_no_numbered_checkpoint_does_not_get_in_the_way(tmp_path):
    checkpoint(tmp_path / "run", 10)
    checkpoint(tmp_path / "run", "10.tmp")
    assert training.prepare(tmp_path / "run") == "checkpoint-10"


def test_without_a_checkpoint_the_folder_is_emptied(tmp_path):
    checkpoint(tmp_path / "run", 20, None)
    (tmp_path / "run" / "adapter_model.safetensors").write_bytes(b"of an earlier run")
    assert training.prepare(tmp_path / "run") is None
    assert list((tmp_path / "run").iterdir()) == []


def test_a_new_folder_is_made(tmp_path):
    assert training.prepare(tmp_path / "a" / "b") is None
    assert (tmp_path / "a" / "b").is_dir()


def test_discarding_checkpoints_leaves_log_and_state(tmp_path):
    checkpoint(tmp_path, 10)
    (tmp_path / "train.log").write_text("log")
    training.discard_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train.log"]


# devices


@pytest.mark.parametrize(
    ("gpus", "given", "visible"),
    [
        (0, None, ""),
        (0, "3,5", ""),
        (1, None, "0"),
        (1, "3,5", "3"),
        (8, None, "0,1,2,3,4,5,6,7"),
        (8, "8,7,6,5,4,3,2,1,0", "8,7,6,5,4,3,2,1"),
    ],
)
def test_exactly_the_wanted_gpus_are_visible(gpus, given, visible):
    base = {"KEPT": "yes"} | ({} if given is None else {"CUDA_VISIBLE_DEVICES": given})
    made = training.environment(gpus, base)
    assert made["CUDA_VISIBLE_DEVICES"] == visible
    assert made["KEPT"] == "yes"


def test_only_more_than_one_gpu_takes_torchrun():
    assert "FORCE_TORCHRUN" not in training.environment(0, {}) | training.environment(1, {})
    eight = training.environment(8, {})
    assert (eight["FORCE_TORCHRUN"], eight["NPROC_PER_NODE"]) == ("1", "8")


def test_the_tools_beside_the_interpreter_are_on_the_path():
    path = training.environment(8, {"PATH": "/usr/bin"})["PATH"]
    assert path.split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]


@pytest.mark.slow
def test_gpus_that_are_not_there_are_missed_before_anything_is_loaded(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"train.gpus is 1, but torch finds no GPU here"):
        training.require_gpus(1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match=r"train.gpus is 8, but torch finds 4 GPUs here"):
        training.require_gpus(8)
    training.require_gpus(4)


def test_a_training_on_the_cpu_does_not_even_import_torch():
    code = (
        "import sys; from stages import training; training.require_gpus(0); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


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


def launch(log, *arguments):
    training.launch(arguments or ("train",), log, {"PATH": os.environ["PATH"]})


def test_what_the_training_prints_is_shown_and_kept(fake_cli, tmp_path, capfdbinary):
    fake_cli("""
        print(sys.argv[1:], os.environ["PATH"] != "", flush=True)
        print("on standard error \\u2713", file=sys.stderr)
    """)
    launch(tmp_path / "train.log", "train", "a b.yaml", "x=1")
    expected = "['train', 'a b.yaml', 'x=1'] True\non standard error ✓\n".encode()
    assert (tmp_path / "train.log").read_bytes() == expected
    assert capfdbinary.readouterr().out == expected


def test_output_is_shown_while_the_training_runs(fake_cli, tmp_path):
    fake_cli("""
        sys.stdout.write("half a line"); sys.stdout.flush()
        while not os.path.exists(sys.argv[1]): time.sleep(0.01)
    """)
    code = (
        "import sys; from pathlib import Path; from stages import training;"
        f"sys.executable = {sys.executable!r};"
        f"training.launch([{str(tmp_path / 'go')!r}], Path({str(tmp_path / 'log')!r}), {{}})"
    )
    with subprocess.Popen([real_python(), "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(11) == b"half a line"  # the program waits for us still
        (tmp_path / "go").touch()
    assert process.returncode == 0


def real_python():
    """The interpreter, whatever ``sys.executable`` was patched to."""
    return str(Path(sys.prefix) / "bin" / "python")


FAILURES = {
    "GPU ran out of memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
    "image tokens were cut": "ValueError: Image features and image tokens do not match, tokens: 9",
    "no bfloat16": "ValueError: Your setup doesn't support bf16/gpu.",
    "the disk is full": "OSError: [Errno 28] No space left on device: 'checkpoint-10'",
    "no GPU could be used": "RuntimeError: No CUDA GPUs are available",
    "quantisation failed": "ImportError: `bitsandbytes` 4-bit quantization requires a newer one",
    "a process of the distributed run": "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp",
    "the machine ran out of memory": "  traceback : Signal 9 (SIGKILL) received by PID 4242",
}


def test_every_fix_has_its_failure():
    assert {fix_of(told) for told in FAILURES} == {fix for _, fix in training.FIXES}


def fix_of(told):
    return next(fix for _, fix in training.FIXES if told in fix)


@pytest.mark.parametrize("told", FAILURES)
def test_a_failure_is_told_with_its_last_lines_and_the_likely_fix(fake_cli, tmp_path, told):
    fake_cli(f"""
        print("Loading the model")
        print("Traceback (most recent call last):", file=sys.stderr)
        print('  File "/x/y.py", line 3, in main', file=sys.stderr)
        sys.exit({FAILURES[told]!r})
    """)
    with pytest.raises(UserError) as error:
        launch(tmp_path / "train.log")
    message = str(error.value)
    assert f"likely fix: {fix_of(told)}" in message
    assert FAILURES[told].strip() in message
    assert "exit status 1" in message
    assert str(tmp_path / "train.log") in message
    assert "Traceback" not in message
    assert "y.py" not in message


def test_an_unknown_failure_gets_no_made_up_fix(fake_cli, tmp_path):
    fake_cli("""
        print("[rank0]: ProcessGroupNCCL.cpp: using GPU 0 to perform barrier")
        print("Quantizing model to 4 bit with bitsandbytes.")
        sys.exit("ZeroDivisionError: division by zero")
    """)
    with pytest.raises(UserError, match="ZeroDivisionError") as error:
        launch(tmp_path / "train.log")
    assert "likely fix" not in str(error.value)


def test_what_an_earlier_attempt_died_of_is_not_told_again(fake_cli, tmp_path):
    log = tmp_path / "train.log"
    log.write_text("OSError: [Errno 28] No space left on device\n")
    fake_cli("sys.exit('ZeroDivisionError: division by zero')")
    with pytest.raises(UserError) as error:
        launch(log)
    assert "disk" not in str(error.value)
    assert "No space left" in log.read_text()


def test_a_training_killed_outright_is_told_to_lack_memory(fake_cli, tmp_path):
    fake_cli("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(UserError, match="killed by signal 9") as error:
        launch(tmp_path / "train.log")
    assert "machine ran out of memory" in str(error.value)


def test_a_missing_llamafactory_is_told(fake_cli, tmp_path):
    with pytest.raises(UserError, match="llamafactory-cli is missing; `make repro` installs"):
        launch(tmp_path / "train.log")


def test_terminating_the_stage_ends_the_training_and_its_workers(fake_cli, tmp_path):
    fake_cli("""
        worker = subprocess.Popen(["sleep", "600"])
        with open(sys.argv[1] + ".part", "w") as file: file.write(f"{os.getpid()} {worker.pid}")
        os.rename(sys.argv[1] + ".part", sys.argv[1])
        time.sleep(600)
    """)
    code = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        from stages import command, training
        sys.executable = {sys.executable!r}
        def main() -> None:
            log = Path({str(tmp_path / "log")!r})
            training.launch([{str(tmp_path / "pids")!r}], log, dict(os.environ))
        command.run(main)
    """)
    stage = subprocess.Popen(
        [real_python(), "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    wait_for((tmp_path / "pids").exists)
    stage.send_signal(signal.SIGTERM)
    _, error = stage.communicate(timeout=20)
    assert stage.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        wait_for(lambda pid=pid: not running(pid))


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def test_last_lines_leave_out_bars_frames_and_blanks():
    output = (
        "first\n\n"
        " 10%|█         | 1/10 [00:00<00:01]\r 20%|██        | 2/10 [00:00<00:01]\r\n"
        "Traceback (most recent call last):\n"
        '  File "/x/y.py", line 3, in main\n'
        "    run()\n"
        "    ^^^^^\n"
        "ValueError: told\n"
        "\r 30%|███       | 3/10 [00:00<00:01]"
    )
    assert training.last_lines(output) == ["first", "ValueError: told"]
    assert training.last_lines("\n".join(map(str, range(20))), count=3) == ["17", "18", "19"]


# history and curves

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


def state(folder, *entries):
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    return folder


def test_the_history_is_the_trainers(tmp_path):
    assert training.history(state(tmp_path, STEP_1, VALIDATION)) == [STEP_1, VALIDATION]


@pytest.mark.parametrize(
    "entry",
    [
        STEP_1 | {"loss": float("nan")},
        STEP_1 | {"loss": float("inf")},
        STEP_1 | {"logps/chosen": float("nan")},  # what a NaN loss leaves: the trainer hides it
        VALIDATION | {"eval_loss": float("nan")},
    ],
)
def test_a_training_that_diverged_is_refused(tmp_path, entry):
    with pytest.raises(UserError, match=f"diverged: .* at step {entry['step']}.*learning_rate"):
        training.history(state(tmp_path, STEP_1, entry))


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_a_training_without_a_history_is_told(tmp_path, content):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(UserError, match=r"trainer_state.json"):
        training.history(tmp_path)


def test_a_policy_that_starts_at_the_reference_passes():
    assert training.check_first_step([STEP_1, VALIDATION], 0.1) == 0.0


@pytest.mark.parametrize("margin", [0.2, -0.2])
def test_a_policy_that_starts_elsewhere_is_refused(margin):
    with pytest.raises(UserError, match=r"margin at step 1 is -?0\.2, not about 0"):
        training.check_first_step([STEP_1 | {"rewards/margins": margin}], 0.1)


@pytest.mark.parametrize("entries", [[], [VALIDATION], [STEP_1 | {"step": 5}]])
def test_a_history_without_step_1_proves_nothing(entries):
    with pytest.raises(UserError, match="no reward margin for step 1"):
        training.check_first_step(entries, 0.1)


def test_curves_are_split_by_what_was_measured_and_the_summary_is_none():
    tables = training.curves([STEP_1, VALIDATION, SUMMARY])
    assert list(tables) == ["train", "validation"]
    train, validation = tables.values()
    assert train.to_dict("records") == [
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
    ]
    assert validation.to_dict("records") == [
        {"step": 2, "epoch": 0.1, "loss": 0.6, "reward_margin": 0.1}
    ]


def test_a_training_without_validation_still_names_the_columns_of_its_plots():
    validation = training.curves([STEP_1])["validation"]
    assert validation.empty
    assert {"step", "loss", "reward_margin", "reward_accuracy"} <= set(validation.columns)


# publishing


def test_equal_adapters_are_equal_files(tmp_path):
    published = []
    for name, modules in (("one", ["v", "k", "q"]), ("other", ["q", "v", "k"])):
        folder, out = tmp_path / name / "training", tmp_path / name / "adapter"
        folder.mkdir(parents=True)
        out.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(np.arange(3).tobytes())
        keys = {"target_modules": modules, "modules_to_save": None, "r": 8}
        ordered = keys if name == "one" else dict(reversed(keys.items()))
        (folder / "adapter_config.json").write_text(json.dumps(ordered))
        (folder / "training_args.bin").write_bytes(b"paths and times")
        training.publish(folder, out)
        published.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert published[0] == published[1]
    assert set(published[0]) == {"adapter_model.safetensors", "adapter_config.json"}
    assert json.loads(published[0]["adapter_config.json"])["target_modules"] == ["k", "q", "v"]
