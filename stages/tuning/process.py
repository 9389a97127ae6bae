"""The process that trains: where it resumes, how it is run and watched, what it leaves."""

import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.core.processes import ended_with_the_stage
from stages.tuning.config import INSIDE, sha256
from stages.tuning.history import STATE
from stages.tuning.inside.sitecustomize import EVENTS, PROJECT, REFERENCE, TRAINER, VISION

# What a failed training prints, and what most likely helps; the first match is told.
FIXES = (
    (
        r"out of memory|OutOfMemoryError",
        "the GPU ran out of memory: lower train.per_device_train_batch_size (and raise "
        "train.gradient_accumulation_steps), lower format.image_max_pixels, set "
        "model.quantization_bit: 4, or use the preset for a smaller card "
        "(make use PRESET=qwen3-vl-4b-24gb)",
    ),
    (
        r"[Ii]mage features and image tokens do not match|tokens: \d+, features",
        "image tokens were cut or miscounted: run `dvc repro -f format`, and raise "
        "format.cutoff_len or lower format.image_max_pixels",
    ),
    (
        r"doesn't support bf16|bf16.{0,40}not supported|Bfloat16 is only supported",
        "this device has no bfloat16: set train.bf16: false (and train.fp16: true on an older GPU)",
    ),
    (
        # torch.save names no reason.
        r"No space left on device|Disk quota exceeded|inline_container\S+ \. unexpected pos",
        "the disk is full: free some space, then run the same command again; training resumes "
        "from its last checkpoint",
    ),
    (
        r"No CUDA GPUs are available|CUDA-capable device|Found no NVIDIA driver",
        "no GPU could be used: set train.gpus: 0, or run where there is one",
    ),
    (
        r"Signal 9 \(SIGKILL\)|DefaultCPUAllocator: .*memory|Cannot allocate memory",
        "the machine ran out of memory: lower train.per_device_train_batch_size or "
        "train.preprocessing_num_workers",
    ),
    (
        r"devices in the Ray cluster|Ray had no \d+ x",
        "Ray has fewer free devices than train.gpus: start it on all machines and end what else "
        "uses it (docs/scaling.md)",
    ),
    (
        # Not the bare name: every distributed run mentions NCCL.
        r"nccl[A-Z]\w*Error|NCCL error|collective operation timeout|Signal \d+ \(SIG\w+\)",
        "a process of the distributed run died or could not reach the others: see each rank's "
        "lines in the log; train.gpus: 1 tells whether distribution is the cause",
    ),
    (
        # Not the bare name: every quantised run says "with bitsandbytes".
        r"bitsandbytes.{0,80}(requires?\b|not (found|available|supported|compiled)|[Nn]o module)"
        r"|([Nn]o module named|supported by).{0,20}bitsandbytes",
        "quantisation failed: bitsandbytes needs an NVIDIA GPU; set model.quantization_bit: null",
    ),
)


WEIGHTS = "adapter_model.safetensors"
FINISHED = "finished.txt"
EVENTS_FILE = "events.jsonl"  # the steps, as they are logged


def prepare(folder: Path) -> str | None:
    """Make a run's folder ready; the checkpoint it will resume from, or None for a clean start.

    LLaMA-Factory resumes from the newest checkpoint in its output folder. A checkpoint that was
    being written when the machine died is removed, so that the one before it is used. Without any,
    the folder is emptied: LLaMA-Factory refuses one that holds results but no checkpoint.
    """
    checkpoints = {}
    for checkpoint in folder.glob("checkpoint-*"):
        step = checkpoint.name.removeprefix("checkpoint-")
        if step.isdecimal() and _is_complete(checkpoint):
            checkpoints[int(step)] = checkpoint.name
        else:
            shutil.rmtree(checkpoint)
    if checkpoints:
        return checkpoints[max(checkpoints)]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return None


def _is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the trainer's state is its last file."""
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def launch(
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    watch: Callable[[dict[str, Any]], None],
) -> None:
    """Run ``llamafactory-cli`` with ``arguments``, show what it prints, and keep that in
    ``folder / "train.log"``.

    ``watch`` is called with each step that the training logs, within half a second; an exception
    that it raises ends the training.

    Raises:
        UserError: the training failed; the message has its last meaningful lines and the likely
            fix.
    """
    executable = Path(sys.executable).with_name("llamafactory-cli")
    if not executable.exists():
        raise UserError(f"{executable} is missing; `make repro` installs the locked requirements")
    log, events = folder / "train.log", folder / EVENTS_FILE
    events.unlink(missing_ok=True)
    steps, seen = new_lines(events), 0
    sys.stdout.flush()  # what the stage said comes before what the training says
    earlier = log.stat().st_size if log.exists() else 0
    with (
        log.open("ab") as file,
        subprocess.Popen(
            [str(executable), *arguments],
            env={**environment, **inside(events, environment)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # torchrun and its workers can then be ended with it
        ) as process,
        ended_with_the_stage(process),
    ):
        assert process.stdout is not None
        chunk = None
        while chunk != b"":
            chunk = None
            if select.select([process.stdout], [], [], 0.5)[0]:
                chunk = os.read(process.stdout.fileno(), 65536)
                file.write(chunk)
                file.flush()
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            elif process.poll() is not None:
                break  # something that it left behind keeps the pipe open
            for step in next(steps):
                seen += 1
                watch(step)
    if process.returncode:
        with log.open("rb") as file:
            file.seek(earlier)  # what an earlier attempt died of is not what this one did
            output = file.read().decode("utf-8", errors="replace")
        raise UserError(explain(process.returncode, output, log))
    if not seen:
        print(
            f"the training wrote nothing to {events}, so it had no live curves and no early checks;"
            f" {log} may say why, in a line with sitecustomize.py",
            file=sys.stderr,
        )


def inside(events: Path, base: Mapping[str, str]) -> dict[str, str]:
    """What the environment ``base`` needs for the training to write its steps to ``events``."""
    path = [str(INSIDE), *filter(None, [base.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), EVENTS: str(events.absolute())}


def with_shared_prefix(
    base: Mapping[str, str], cached: Path | None, keep_vision_features: bool
) -> dict[str, str]:
    """What the environment ``base`` needs for the training to use the trainer on shared prompts,
    with the reference's log-probs where they are ``cached``.
    """
    project = str(Path(__file__).parents[2])
    found = {**base, PROJECT: project, TRAINER: "stages.tuning.trainer:SharedPrefixTrainer"}
    found |= {VISION: "1"} if keep_vision_features else {}
    return found | ({REFERENCE: str(cached.absolute())} if cached else {})


def new_lines(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Each ``next`` gives the lines of JSON that were finished since the one before it."""
    position = 0
    while True:
        found = []
        with suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                with suppress(ValueError):  # torn, as on a full disk
                    found.append(json.loads(line))
        yield found


def explain(returncode: int, output: str, log: Path) -> str:
    """A failed training in one message: how it ended, its last lines, the likely fix."""
    ended = f"exit status {returncode}" if returncode > 0 else f"killed by signal {-returncode}"
    fix = next((fix for pattern, fix in FIXES if re.search(pattern, output)), None)
    if fix is None and returncode in (-9, 137):
        fix = (
            "most likely the machine ran out of memory: lower train.per_device_train_batch_size or "
            "train.preprocessing_num_workers"
        )
    lines = "\n".join(f"    {line}" for line in last_lines(output))
    likely = f"\nlikely fix: {fix}" if fix else ""
    return (
        f"llamafactory-cli failed ({ended}); its last lines:\n{lines}{likely}\n"
        f"the log is {log}; checkpoints are kept, the same command resumes"
    )


def last_lines(output: str, count: int = 6) -> list[str]:
    """The last lines that say something: no progress bars, no stack frames, no blank lines."""
    lines = [line.rpartition("\r")[2].rstrip() for line in output.splitlines()]
    frame = re.compile(r'^\s+(File ".*", line \d+|\^+|~+)|^Traceback|^\s{4}|\d+%\|')
    return [line for line in lines if line.strip() and not frame.search(line)][-count:]


def is_trained(fingerprint: str, out: Path) -> bool:
    """Whether ``out`` holds the finished adapter of this training, byte for byte."""
    try:
        made = json.loads((out / "fingerprint.json").read_text(encoding="utf-8"))
        return (
            made["fingerprint"] == fingerprint
            and made["adapter_sha256"] == sha256(out / WEIGHTS)
            and (out / "adapter_config.json").is_file()
            and (out / "llamafactory.yaml").is_file()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def publish(folder: Path, out: Path, fingerprint: str) -> None:
    """Copy the trained adapter, and nothing that holds a time or a path, to the stage's output.

    Until now ``out`` held what it had. The fingerprint goes first and comes back last: where
    it is, the adapter is complete.
    PEFT writes the adapted modules in the order of a set; sorted, equal adapters are equal files.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "fingerprint.json").unlink(missing_ok=True)
    for path in out.iterdir():  # never written into: with DVC's link types it is the cache's own
        path.unlink()
    for name in (WEIGHTS, "llamafactory.yaml"):
        shutil.copyfile(folder / name, out / name)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for name in ("target_modules", "modules_to_save"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    (out / "adapter_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    made = {
        "fingerprint": fingerprint,
        "adapter_sha256": sha256(out / WEIGHTS),
    }
    (out / "fingerprint.json").write_text(json.dumps(made) + "\n", encoding="utf-8")


def finish(folder: Path) -> None:
    """Mark a training's folder as finished, and remove what only an interrupted one needs.

    The adapter, the log and the trainer's state stay: an experiment that comes back to this
    fingerprint takes them up. DVC's own cache of runs can't, since the stage's outputs persist.
    """
    (folder / FINISHED).write_text(f"{sha256(folder / WEIGHTS)}\n", encoding="utf-8")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def is_finished(folder: Path) -> bool:
    """Whether a training ended well in ``folder`` and its adapter is the one that it made."""
    try:
        told = (folder / FINISHED).read_text(encoding="utf-8").strip()
        return told == sha256(folder / WEIGHTS) and (folder / STATE).is_file()
    except OSError:
        return False
