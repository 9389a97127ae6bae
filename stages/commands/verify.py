"""Run the committed pipeline again in a clone, and say whether the results come out again.

    make verify                         # every stage; the demo takes four minutes
    make verify STAGES="format train"   # only these, from the inputs that dvc.lock names

In: the current commit, DVC's cache and, for what it lacks, the remote. Out: a table of every output
of the stages that were run again: same bits, same within rounding, or different. Another processor
or GPU adds in another order, so numbers move in their last digits; ``BOUNDS`` says what may move,
and by how much. Exit status 1 if any is different. Nothing here changes: what the stages write
stays in the clone, which is deleted, and MLflow gets a database in there.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file
from tabulate import tabulate

from stages.core import command
from stages.core.errors import UserError
from stages.tracking import tags
from stages.tracking.tags import git

SAME, ROUNDING, DIFFERENT = "same bits", "same within rounding", "different"

# Relative and absolute, of which the larger counts, by the end of a file's name. Log-probs and
# margins (Parquet, nats) to 0.5% or 0.02; rates, curves and counts (JSON, CSV) to 1% or 0.02, so
# that a few pairs near a tie may change sides.
BOUNDS: Mapping[str, tuple[float, float]] = {
    ".parquet": (0.005, 0.02),
    ".json": (0.01, 0.02),
    ".csv": (0.01, 0.02),
}
NOISE = 1e-6  # a mean margin below it is no margin
WEIGHTS = 0.05  # ‖a - b‖ / ‖a‖ of all tensors of a safetensors file
# What is written from numbers for people. It may differ where the numbers moved within rounding
# (another pair comes first in a gallery), and must not where none moved.
SHOWN = (".html", ".md", ".png", ".svg")


def main(stages: str = "") -> None:
    root = Path(git(Path(), "rev-parse", "--show-toplevel"))
    commit = git(root, "rev-parse", "HEAD")
    if not commit or not (root / ".dvc").is_dir():
        raise UserError("there is no Git repository with DVC here; run from the project's root")
    if changed := git(root, "status", "--porcelain", "--untracked-files=no"):
        uncommitted = ", ".join(line[3:] for line in changed.splitlines())
        print(f"not verified, because it is not committed: {uncommitted}")
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        clone, committed = cloned(root, commit, Path(folder, "clone")), Path(folder, "committed")
        locked = outputs_by_stage(clone)
        names = chosen(stages, list(locked))
        bring(clone, names)
        made = {path: md5 for name in names for path, md5 in locked[name].items()}
        for path in made:
            (committed / path).parent.mkdir(parents=True, exist_ok=True)
            if (clone / path).exists():
                shutil.move(clone / path, committed / path)
        sys.stdout.flush()
        run_again(clone, names)
        again = tags.outputs(clone)
        moved = [path for path, md5 in made.items() if again.get(path) != md5]
        found = dict.fromkeys(made, (SAME, "")) | compared(moved, committed, clone)
    rows = [[name, path, *found[path]] for name in names for path in locked[name]]
    print(f"\n{tabulate(rows, ['stage', 'output', 'verdict', 'first difference'])}\n")
    verdicts = [verdict for verdict, _ in found.values()]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in (SAME, ROUNDING, DIFFERENT)]
    print(f"commit {commit[:12]}, {len(found)} outputs: {', '.join(counts)}")
    if DIFFERENT in verdicts:
        raise UserError("some outputs are different; the table names the first difference")


def outputs_by_stage(root: Path) -> dict[str, dict[str, str]]:
    """Of the stages that dvc.lock holds, in dvc.yaml's order, each output's path and md5.

    Raises:
        UserError: none is locked.
    """
    locked = tags.locked(root)
    if not locked:
        raise UserError("dvc.lock is missing; `dvc repro` writes it")
    names = run(["dvc", "stage", "list", "--name-only"], root).split()
    return {
        name: {out["path"]: out["md5"] for out in locked[name].get("outs", [])}
        for name in names
        if name in locked
    }


def chosen(stages: str, known: Sequence[str]) -> list[str]:
    """Stages to run again, in the order in which they run; ``fetch`` means all of its items.

    Raises:
        UserError: no such stage.
    """
    wanted = stages.replace(",", " ").split() or known
    for name in wanted:
        if not any(name in (each, each.partition("@")[0]) for each in known):
            raise UserError(f"dvc.lock has no stage {name}; choose from {', '.join(known)}")
    return [name for name in known if {name, name.partition("@")[0]} & set(wanted)]


def cloned(root: Path, commit: str, clone: Path) -> Path:
    """The commit, with the cache of this project and its settings of remotes."""
    run(["git", "clone", "--quiet", "--no-checkout", str(root), str(clone)], root)
    run(["git", "checkout", "--quiet", commit], clone)
    local = root / ".dvc" / "config.local"
    if local.is_file():
        shutil.copy(local, clone / ".dvc" / "config.local")
    # A cache elsewhere is named in the configuration that is in Git, or in the local one.
    cache = run(["dvc", "cache", "dir"], root).strip()
    run(["dvc", "cache", "dir", "--local", str((root / cache).resolve())], clone)
    return clone


def bring(clone: Path, names: Sequence[str]) -> None:
    """Outputs of these stages and of all that they depend on, as far as the cache has them or else
    the remote.
    """
    try:
        run(["dvc", "checkout", "--quiet", "--with-deps", *names], clone)
    except UserError:
        with suppress(UserError):
            run(["dvc", "pull", "--quiet", "--allow-missing", "--with-deps", *names], clone)


def run_again(clone: Path, names: Sequence[str]) -> None:
    """Run the stages as ``dvc repro -f`` does, their output shown; nothing goes into the cache.

    Raises:
        UserError: one failed.
    """
    words = ["dvc", "repro", "--force", "--no-commit", "--single-item", *names]
    done = subprocess.run([sys.executable, "-m", *words], cwd=clone, env=environment(), check=False)
    if done.returncode:
        raise UserError("a stage failed in a clone of the commit, for the reason above")


def environment() -> dict[str, str]:
    """Without what DVC or Git tell a process of the project it was started from, and with a
    tracking server that nobody else sees."""
    others = ("DVC_", "GIT_", "MLFLOW_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    own = {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "DVC_NO_ANALYTICS": "1"}
    scripts = str(Path(sys.executable).parent)
    return kept | own | {"PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}


def run(words: Sequence[str], folder: Path) -> str:
    """What a command of git or dvc prints.

    Raises:
        UserError: it failed.
    """
    given = [sys.executable, "-m", *words] if words[0] == "dvc" else list(words)
    done = subprocess.run(
        given, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise UserError(f"`{' '.join(words[:2])}` failed: {said}")
    return done.stdout


# two outputs


def compared(paths: Iterable[str], before: Path, after: Path) -> dict[str, tuple[str, str]]:
    """Of each output below the two folders the verdict, and the first file that differs, and how.
    A path that does not exist has no content to compare: it is different.
    """
    found = {path: output(before / path, after / path) for path in paths}
    if any(verdict == ROUNDING for verdict, _ in found.values()):
        for path, (verdict, _) in found.items():
            if verdict == DIFFERENT and path.endswith(SHOWN):
                found[path] = (ROUNDING, "written from numbers that moved within rounding")
    return found


def output(before: Path, after: Path) -> tuple[str, str]:
    for content, what in ((before, "committed"), (after, "new")):
        if not content.exists():
            return DIFFERENT, f"another hash, and no {what} content to compare"
    old, new = _files(before), _files(after)
    if only := sorted(old.keys() ^ new.keys()):
        return DIFFERENT, f"{only[0]} is {'gone' if only[0] in old else 'new'}"
    rounded = ""
    for name in sorted(old):
        if old[name].read_bytes() != new[name].read_bytes():
            named = before.name if name == "." else name
            if why := _difference(old[name], new[name], Path(named).suffix):
                return DIFFERENT, f"{named}: {why}"
            rounded = rounded or named
    return (ROUNDING, rounded) if rounded else (SAME, "")


def _files(root: Path) -> dict[str, Path]:
    found = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path for path in found}


def _difference(before: Path, after: Path, suffix: str) -> str:
    """What is more than rounding between two files that are not the same; empty if nothing is."""
    try:
        if suffix == ".safetensors":
            return _apart(load_file(before), load_file(after))
        if suffix not in BOUNDS:
            return "other bytes"
        relative, absolute = BOUNDS[suffix]
        bounds: Any = {"rtol": relative, "atol": absolute, "check_dtype": False, "check_like": True}
        pd.testing.assert_frame_equal(_table(before, suffix), _table(after, suffix), **bounds)
    except AssertionError as error:
        first, *_, last = str(error).splitlines()
        return f"{first} ({last})"
    except (ValueError, OSError) as error:
        return f"can't be read ({type(error).__name__})"
    return ""


def _table(path: Path, suffix: str) -> pd.DataFrame:
    """The table that a file holds; of JSON one row, whose columns are its values, lists whole."""
    if suffix == ".json":
        return pd.json_normalize({"it": json.loads(path.read_text(encoding="utf-8"))})
    if suffix == ".parquet":
        return pd.read_parquet(path)
    table = pd.read_csv(path)
    if {"reward_accuracy", "reward_margin"} <= {*table.columns}:
        # Before the first update all margins are rounding, and so are their signs.
        table.loc[table["reward_margin"].abs() < NOISE, "reward_accuracy"] = np.nan
    return table


def _apart(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> str:
    if {k: x.shape for k, x in a.items()} != {k: x.shape for k, x in b.items()}:
        return "other tensors"
    apart = sum(float(np.square(a[key] - b[key]).sum()) for key in a) ** 0.5
    share = apart / (sum(float(np.square(x).sum()) for x in a.values()) ** 0.5 or 1.0)
    return "" if share <= WEIGHTS else f"the weights are {share:.1%} apart"


if __name__ == "__main__":
    command.run(main)
