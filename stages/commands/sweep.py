"""Sweep: experiments over every combination of values, one on each GPU at a time.

    make sweep SET='train.beta=0.05,0.1,0.2' GPUS=0,1,2
    make sweep SET='train.beta=0.1,0.2 train.seed=1,2,3' NAME=warm    # one after the other
    make seeds N=3                                  # train.seed=1,2,3

In: the last commit, and ``params.yaml`` there. Out: an experiment for each combination, as ``dvc
exp run`` leaves it (``make exps`` lists them), its MLflow run, and its log in
``reports/diary/sweep/<experiment>.log``.

Why not ``dvc queue start -j 3``: its workers race for one repository (dvc#10673) and all see all
GPUs. Here each GPU has a clone below ``.dvc/tmp/exps/``, with DVC's locks of its own and the
project's cache, MLflow store and kept pieces; finished experiments are fetched by one process, one
after the other. What does not depend on the changed parameters comes from the cache and does not
run again.
"""

import itertools
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ruamel.yaml import YAML

from stages.commands.verify import cloned
from stages.core import command
from stages.core.errors import UserError, did_you_mean
from stages.core.project import project_root
from stages.params import params
from stages.tracking.tags import changed_files, git
from stages.tuning.process import last_lines

CLONES, LOGS = Path(".dvc/tmp/exps/sweep"), Path("reports/diary/sweep")


@dataclass
class Sweep:
    """What the workers share: experiments that wait, processes that run, what came of them."""

    waiting: "queue.SimpleQueue[tuple[str, tuple[str, ...]]]"
    running: set["subprocess.Popen[bytes]"] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: bool = False


def main(sets: str, gpus: str = "", name: str = "") -> None:
    if edited := changed_files(Path()):
        raise UserError(
            f"{', '.join(edited)} differ from the last commit, from which a sweep starts: commit "
            "them first"
        )
    settings = combinations(sets)
    check_keys(settings[0], known_keys(params.PARAMS_FILE))
    names = {experiment(one, name): one for one in settings}
    commit = git(Path(), "rev-parse", "HEAD")
    known = {n for n in names if git(Path(), "rev-parse", "--verify", "--quiet", ref(commit, n))}
    for one in sorted(known):
        print(f"{one}: is there already (`dvc exp remove {one}`, and it runs again)")
    sweep = Sweep(queue.SimpleQueue())
    for one, values in names.items():
        if one not in known:
            sweep.waiting.put((one, values))
    devices: list[str | None] = [gpu.strip() for gpu in gpus.split(",") if gpu.strip()] or [None]
    threads = [
        threading.Thread(target=work, args=(sweep, place, gpu, commit), daemon=True)
        for place, gpu in enumerate(devices)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # so that an interruption is noticed
    finally:
        sweep.stopped = True
        for process in list(sweep.running):
            os.killpg(process.pid, signal.SIGTERM)
        for thread in threads:
            thread.join(60)
    if sweep.failed:
        raise UserError(
            f"{len(sweep.failed)} of {len(names)} experiments failed: {', '.join(sweep.failed)}; "
            f"their logs are in {LOGS}, and the same command runs those again"
        )
    print(f"experiments: {len(names)}; `make exps` and `make ui` compare them")


def combinations(sets: str) -> list[tuple[str, ...]]:
    """``a=1,2 b=3`` to ``(a=1, b=3)`` and ``(a=2, b=3)``; commas inside brackets separate nothing.

    Raises:
        UserError: a word is not of the form ``key=value``.
    """
    axes = []
    for word in sets.split():
        key, equals, values = word.partition("=")
        if not (key and equals and values):
            raise UserError(
                f"'{word}' is not of the form key=value,value: SET='train.beta=0.1,0.2'"
            )
        each = re.findall(r"(?:[^,\[{]|\[[^]]*\]|\{[^}]*\})+", values)
        axes.append([f"{key}={value}" for value in each])
    if not axes:
        raise UserError("what is to be swept? SET='train.beta=0.05,0.1,0.2'")
    return list(itertools.product(*axes))


def known_keys(file: Path) -> set[str]:
    """``train.beta`` and all others of the file, with the sections that hold them."""
    parts = [key.split(".") for key in params.flattened(YAML(typ="safe").load(file))]
    return {".".join(each[:n]) for each in parts for n in range(1, len(each) + 1)}


def check_keys(values: Sequence[str], known: set[str]) -> None:
    """Refuse a key that an experiment could not change; ``+key`` adds one, as DVC has it."""
    for value in values:
        key = value.partition("=")[0]
        elsewhere = ":" in key  # DVC's way to name another file
        if not (elsewhere or key.startswith("+") or key.lstrip("~") in known):
            raise UserError(
                f"params.yaml has no '{key}'{did_you_mean(key, known)}; +{key} would add it"
            )


def experiment(values: Sequence[str], name: str = "") -> str:
    """The name of an experiment: ``beta-0.05`` or, of a sweep with a name, ``name-beta-0.05``."""
    words = []
    for value in values:
        key, _, chosen = value.lstrip("+~").partition("=")
        words.append(f"{key.rpartition('.')[2]}-{chosen}")
    text = "-".join([*filter(None, [name]), *words])
    return re.sub(r"[^\w.-]+", "_", text).strip("._-")


def ref(commit: str, name: str) -> str:
    """Where DVC keeps an experiment."""
    return f"refs/exps/{commit[:2]}/{commit[2:]}/{name}"


def work(sweep: Sweep, place: int, gpu: str | None, commit: str) -> None:
    """Run what waits, one experiment after the other, on one GPU."""
    folder: Path | None = None
    while not sweep.stopped:
        try:
            name, values = sweep.waiting.get_nowait()
        except queue.Empty:
            return
        where = f" on GPU {gpu}" if gpu else ""
        log = project_root() / LOGS / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{name}: runs{where}, log in {LOGS / log.name}", flush=True)
        try:
            with sweep.lock:  # one process at a time reads and writes the project's repository
                folder = folder or clone(place, commit)
            reset(folder, commit)
            with log.open("wb") as file:
                done = run(sweep, folder, gpu, name, values, file.fileno())
            if not done:
                with sweep.lock:
                    path = ref(commit, name)
                    done = _git("fetch", "--quiet", str(folder), f"{path}:{path}")
        except (OSError, UserError) as error:
            done = 1
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        if done and not sweep.stopped:
            sweep.failed.append(name)
            print(f"{name}: failed:\n{ending(log)}", file=sys.stderr, flush=True)
        elif not done:
            print(f"{name}: done", flush=True)


def run(
    sweep: Sweep, folder: Path, gpu: str | None, name: str, values: Sequence[str], log: int
) -> int:
    """``dvc exp run`` in a clone; its exit status."""
    # Without --force, which would also tell every stage to compute again (``is_forced``).
    words = ["dvc", "exp", "run", "--name", name]
    for value in values:
        words += ["--set-param", value]
    process = subprocess.Popen(
        words,
        cwd=folder,
        env=environment(gpu),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        process_group=0,  # its training ends with it
    )
    sweep.running.add(process)
    try:
        return process.wait()
    finally:
        sweep.running.discard(process)


def environment(gpu: str | None) -> Mapping[str, str]:
    """That of the user, with one GPU in sight (``0+1``: two); of DVC nothing that an outer run has
    set."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_EXP", "DVC_STAGE"))}
    return inherited | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu.replace("+", ",")})


def clone(place: int, commit: str) -> Path:
    """A clone for one worker, with the project's cache and local configuration.

    Raises:
        UserError: git or DVC can't make it.
    """
    root = project_root()
    folder = root / CLONES / str(place)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return cloned(root, commit, folder)


def reset(folder: Path, commit: str) -> None:
    """A clone as the commit has it; outputs that the cache lacks are made by the experiment."""
    _git("-C", str(folder), "checkout", "--quiet", "--force", commit)
    words = ["dvc", "checkout", "--quiet", "--force"]
    subprocess.run(words, cwd=folder, capture_output=True, check=False)


def ending(log: Path) -> str:
    """The last lines of a log that say something."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return "\n".join(f"    {line}" for line in last_lines(text))


def _git(*words: str) -> int:
    return subprocess.run(["git", *words], capture_output=True, check=False).returncode


if __name__ == "__main__":
    command.run(main)
