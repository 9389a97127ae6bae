"""Run experiments over every combination of values, one on each GPU at a time.

    make sweep SET='train.beta=0.05,0.1,0.2 train.seed=1,2' GPUS=0,1,2 NAME=warm

In: the last commit, and ``params.yaml`` there. Out: an experiment for each combination, as ``dvc
exp run`` leaves it (``make exps`` lists them), its MLflow run, and its log in
``reports/diary/sweep/<experiment>.log``. At the end a table by the validation pairs, which settings
are chosen by, marks the choice.

On one device DVC does this: ``dvc exp run --queue -S train.beta=0.05,0.1`` and ``dvc queue start``.
Several of its workers would race for one repository (dvc#10673), and all see all GPUs. Here each
GPU has a clone below ``.dvc/tmp/exps/``, with the project's cache, MLflow store and kept pieces.
"""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.commands.verify import cloned
from stages.core import command, console
from stages.core.command import project_root
from stages.core.errors import UserError
from stages.evaluation.catalogue import SHARE, with_interval
from stages.evaluation.statistics import LEVEL, widened
from stages.tracking.tags import changed_files, git

METRICS = "reports/results/metrics.json"
CLONES, LOGS = Path(".dvc/tmp/exps/sweep"), Path("reports/diary/sweep")
PAUSE = 0.5  # seconds between two looks at what runs


def main(sets: str, gpus: str = "", name: str = "") -> None:
    experiments = {named(values, name): values for values in combinations(sets)}
    devices = [gpu.strip() for gpu in gpus.split(",") if gpu.strip()]
    if not devices:
        words = " ".join(f"-S '{word}'" for word in sets.split())
        raise UserError(
            "name the GPUs with GPUS=0,1; on a single device, DVC runs a sweep: dvc exp run "
            f"--queue {words} && dvc queue start"
        )
    if edited := changed_files(Path()):
        raise UserError(f"a sweep starts from the last commit; commit {', '.join(edited)} first")
    commit = git(Path(), "rev-parse", "HEAD")
    known = [n for n in experiments if git(Path(), "rev-parse", "-q", "--verify", ref(commit, n))]
    if known:
        print(f"already done: {', '.join(known)} (after `dvc exp remove`, one runs again)")
    waiting = [one for one in experiments if one not in known]
    running: dict[str, tuple[str, subprocess.Popen[bytes]]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            for gpu in devices:
                if gpu not in running and waiting:
                    one = waiting.pop(0)
                    running[gpu] = one, started(one, experiments[one], gpu, commit)
            time.sleep(PAUSE)
            for gpu, (one, process) in list(running.items()):
                if process.poll() is not None:
                    del running[gpu]
                    if not finished(one, process.returncode, clone(gpu, commit), commit):
                        failed.append(one)
    finally:
        for _, process in running.values():
            os.killpg(process.pid, signal.SIGTERM)
        for _, process in running.values():
            process.wait(60)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; run the same command again to repeat them")
    print(ranked({one: metrics_of(ref(commit, one)) for one in experiments}))
    print("`make exps` and `make ui` compare the experiments")


def metrics_of(rev: str) -> dict[str, float]:
    """What an experiment measured; nothing where it has no results."""
    text = git(Path(), "show", f"{rev}:{METRICS}")
    return json.loads(text) if text else {}


def ranked(measured: Mapping[str, Mapping[str, float]]) -> str:
    """The experiments by their validation pairs, the best one marked, and its test figure with an
    interval that is widened for the number of settings tried."""
    from tabulate import tabulate

    keys = ("val_win_rate", "val_tuned_accuracy")
    known = {one: m for one, m in measured.items() if all(key in m for key in keys)}
    if not known:
        return "no experiment has figures of validation pairs to choose by"
    order = sorted(known, key=lambda one: [-known[one][key] for key in keys])
    best, tried = known[order[0]], len(known)
    rows = [
        (one, *(with_interval(known[one], key) for key in keys), "" if place else "the choice")
        for place, one in enumerate(order)
    ]
    table = tabulate(rows, ("experiment", *keys, ""), disable_numparse=True)
    ends = [best.get(f"win_rate_{end}", best["win_rate"]) for end in ("low", "high")]
    low, high = widened(ends[0], best["win_rate"], ends[1], LEVEL, tried)
    figure = SHARE.with_interval(best["win_rate"], max(0.0, low), min(1.0, high))
    return (
        f"{table}\nThe test pairs had no part in the choice. On them the win rate of {order[0]} is "
        f"{figure}, in an interval that allows for {tried} settings tried."
    )


def combinations(sets: str) -> list[tuple[str, ...]]:
    """``a=1,2 b=3`` to ``(a=1, b=3)`` and ``(a=2, b=3)``, by the grammar of DVC's ``--set-param``.

    Raises:
        UserError: that grammar does not read it.
    """
    from dvc.utils.hydra import get_hydra_sweeps
    from hydra.errors import HydraException

    try:
        found = [tuple(each["file"]) for each in get_hydra_sweeps({"file": sets.split()})]
        if found == [()]:
            raise HydraException("it is empty")
    except HydraException as error:
        why = " ".join(str(error).partition("\nSee")[0].split())
        raise UserError(
            f"SET='{sets}' can't be read ({why}); write SET='train.beta=0.1,0.2 train.seed=1,2', "
            "and close every bracket"
        ) from None
    return found


def named(values: Sequence[str], name: str = "") -> str:
    """The name of an experiment: ``beta-0.05`` or, of a sweep with a name, ``name-beta-0.05``."""
    settings = [value.lstrip("+~").partition("=") for value in values]
    words = [f"{key.rpartition('.')[2]}-{chosen}" for key, _, chosen in settings]
    return re.sub(r"[^\w.-]+", "_", "-".join([name, *words])).strip("._-")


def ref(commit: str, name: str) -> str:
    """Where DVC keeps an experiment."""
    return f"refs/exps/{commit[:2]}/{commit[2:]}/{name}"


@functools.cache
def clone(gpu: str, commit: str) -> Path:
    """A new clone for a GPU, with the project's cache and local configuration."""
    folder = project_root() / CLONES / gpu
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return cloned(project_root(), commit, folder)


def started(name: str, values: Sequence[str], gpu: str, commit: str) -> "subprocess.Popen[bytes]":
    """``dvc exp run`` in the clone of a GPU (``0+1``: of two), which is as the commit has it."""
    folder = clone(gpu, commit)
    # Outputs that the cache lacks are made by the experiment.
    for words in (["git", "checkout", "-qf", commit], ["dvc", "checkout", "-qf"]):
        subprocess.run(words, cwd=folder, capture_output=True, check=False)
    # Without --force, which would also tell every stage to compute again (``is_forced``).
    words = ["dvc", "exp", "run", "--name", name]
    words += [word for value in values for word in ("--set-param", value)]
    log = project_root() / LOGS / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu.replace("+", ",")},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,  # its training ends with it
        )
    print(f"{name}: runs on GPU {gpu}, log in {LOGS / log.name}", flush=True)
    return process


def finished(name: str, status: int, folder: Path, commit: str) -> bool:
    """Fetch the experiment that a clone made, and say whether there is one."""
    path = ref(commit, name)
    words = ["git", "fetch", "--quiet", str(folder), f"{path}:{path}"]
    done = status == 0 and subprocess.run(words, check=False).returncode == 0
    log = (LOGS / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    lines = [f"{name}: done"] if done else [f"{name}: failed", *console.last_lines(log, 6)]
    print("\n    ".join(lines), flush=True)
    return done


if __name__ == "__main__":
    command.run(main)
