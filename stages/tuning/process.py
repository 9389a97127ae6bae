"""The process that trains: where it resumes, how it is run and watched, what it leaves."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.core import console
from stages.core.errors import UserError
from stages.core.processes import ended_with_the_stage
from stages.tuning.config import INSIDE, sha256
from stages.tuning.history import STATE
from stages.tuning.inside.sitecustomize import EVENTS, PROJECT, REFERENCE, STEPS, UNDER_VIEW, VIEW

KILLED = "Signal 9 (SIGKILL)"  # as torchrun tells of a process, which most often lacked memory
FIXES = YAML(typ="safe", pure=True).load(Path(__file__).with_suffix(".yaml"))
WEIGHTS = "adapter_model.safetensors"
FINISHED = "fingerprint.json"  # where it is, the training ended well and the adapter is complete
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
    """Run ``llamafactory-cli`` with ``arguments``; what it prints goes to ``folder / "train.log"``.

    ``watch`` is called with each step that the training logs, within half a second; an exception
    that it raises ends the training.

    Raises:
        UserError: the training failed; the message has its last meaningful lines and the likely
            fix.
    """
    executable = Path(sys.executable).with_name("llamafactory-cli")
    log, events = folder / "train.log", folder / EVENTS_FILE
    events.unlink(missing_ok=True)
    steps, bar, seen = new_lines(events), None, 0
    earlier = log.stat().st_size if log.exists() else 0
    with (
        log.open("ab") as file,
        subprocess.Popen(
            [str(executable), *arguments],
            env={**environment, **inside(events, environment)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,  # torchrun and its workers can then be ended with it
        ) as process,
        ended_with_the_stage(process),
        ExitStack() as shown,
    ):
        runs = True
        while runs:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
                runs = False
            for step in next(steps):
                bar = bar or shown.enter_context(console.bar(step[STEPS], "training", "steps"))
                bar.update(step["step"] - seen)
                seen = step["step"]
                watch(step)
    if process.returncode:
        said = log.read_bytes()[earlier:]  # what an earlier attempt died of is not told again
        output = said.decode("utf-8", errors="replace")
        if shutil.disk_usage(folder).free < 2**20:  # the log lies there too, and may end before
            output += "\nNo space left on device\n"
        raise UserError(explain(process.returncode, output, log))


def inside(events: Path, base: Mapping[str, str]) -> dict[str, str]:
    """What the environment ``base`` needs for the training to write its steps to ``events``."""
    path = [str(INSIDE), *filter(None, [base.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), EVENTS: str(events.absolute())}


def shared_prefix(
    cached: Path | None, view: str | None = None, under_view: Path | None = None
) -> dict[str, str]:
    """What the environment needs for the training to use the trainer on shared prompts, with the
    reference's log-probs where they are ``cached``, and with a loss on a ``view``, where the
    reference's are kept in the file ``under_view``.
    """
    given = {PROJECT: str(Path(__file__).parents[2])}
    if cached:
        given[REFERENCE] = str(cached.absolute())
    if view:
        given[VIEW] = view
    if under_view:
        given[UNDER_VIEW] = str(under_view)
    return given


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
    told = f"{output}\n{KILLED if returncode in (-9, 137) else ''}"
    fix = next((each["likely"] for each in FIXES if re.search(each["prints"], told)), None)
    lines = "\n".join(f"    {line}" for line in console.last_lines(output, 6))
    likely = f"\nlikely fix: {fix}" if fix else ""
    return (
        f"llamafactory-cli failed ({ended}); its last lines:\n{lines}{likely}\n"
        f"the log is {log}; checkpoints are kept, the same command resumes"
    )


def finish(folder: Path) -> None:
    """Mark a training's folder as finished, and remove what only an interrupted one needs.

    The adapter, the log and the trainer's state stay, for an experiment that comes back to this
    fingerprint. DVC's own cache of runs can't serve it, since the stage's outputs persist.
    """
    made = {"fingerprint": folder.name, "adapter_sha256": sha256(folder / WEIGHTS)}
    (folder / FINISHED).write_text(json.dumps(made) + "\n", encoding="utf-8")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def holds(folder: Path, fingerprint: str) -> bool:
    """Whether a folder has the finished adapter of this training, byte for byte."""
    try:
        made = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        found = {"fingerprint": fingerprint, "adapter_sha256": sha256(folder / WEIGHTS)}
    except (OSError, ValueError):
        return False
    return bool(made == found)


def publish(folder: Path, out: Path) -> None:
    """Copy a finished adapter, and nothing that holds a time or a path, to the stage's output.

    Until now ``out`` held what it had. PEFT writes the adapted modules in the order of a set;
    sorted, equal adapters are equal files.
    """
    out.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():  # never written into: with DVC's link types it is the cache's own
        path.unlink()
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for name in ("target_modules", "modules_to_save"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "adapter_config.json").write_text(text, encoding="utf-8")
    for name in ("llamafactory.yaml", WEIGHTS, FINISHED):  # the mark last
        shutil.copyfile(folder / name, out / name)
