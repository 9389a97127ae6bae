"""Verify: do the committed results come out again? In a clone of the commit, from its inputs.

    make verify                         # every stage; the demo takes four minutes
    make verify STAGES="format train"   # only these, from the inputs that dvc.lock names

In: the current commit, DVC's cache and, for what it lacks, the remote. Out: a table of every output
of the stages that were run again: same bits, same within rounding (``stages.commands.same_results``
states the bounds), or different. Exit status 1 if any is different. Nothing here changes: what the
stages write stays in the clone, which is deleted, and MLflow gets a database in there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tabulate import tabulate

from stages.commands import lockfile, same_results
from stages.commands.same_results import DIFFERENT, ROUNDING, SAME
from stages.core import command
from stages.core.errors import UserError, did_you_mean
from stages.tracking.tags import git


def main(stages: str = "") -> None:
    root = Path(git(Path(), "rev-parse", "--show-toplevel"))
    commit = git(root, "rev-parse", "HEAD")
    if not commit or not (root / ".dvc").is_dir():
        raise UserError("there is no Git repository with DVC here; run from the project's root")
    if changed := git(root, "status", "--porcelain", "--untracked-files=no"):
        uncommitted = ", ".join(line[3:] for line in changed.splitlines())
        print(f"not verified, since not committed: {uncommitted}")
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        clone, committed = cloned(root, commit, Path(folder, "clone")), Path(folder, "committed")
        locked = lockfile.read(clone / lockfile.LOCK)
        names = chosen(stages, list(locked))
        bring(clone, names)
        made = lockfile.outputs({name: locked[name] for name in names})
        for path in made:
            (committed / path).parent.mkdir(parents=True, exist_ok=True)
            if (clone / path).exists():
                shutil.move(clone / path, committed / path)
        sys.stdout.flush()
        run_again(clone, names)
        again = lockfile.outputs(lockfile.read(clone / lockfile.LOCK))
        moved = [path for path, md5 in made.items() if again.get(path) != md5]
        found = dict.fromkeys(made, (SAME, "")) | same_results.outputs(
            {path: committed / path for path in moved}, {path: clone / path for path in moved}
        )
    rows = [[name, path, *found[path]] for name in names for path in locked[name].outs]
    print(f"\n{tabulate(rows, ['stage', 'output', 'verdict', 'first difference'])}\n")
    verdicts = [verdict for verdict, _ in found.values()]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in (SAME, ROUNDING, DIFFERENT)]
    print(f"commit {commit[:12]}, {len(found)} outputs: {', '.join(counts)}")
    if DIFFERENT in verdicts:
        raise UserError("some outputs are different; the table names the first difference")


def chosen(stages: str, known: Sequence[str]) -> list[str]:
    """Stages to run again, in the order in which they run; ``fetch`` means all of its items.

    Raises:
        UserError: no such stage.
    """
    wanted = stages.replace(",", " ").split() or known
    for name in wanted:
        if not any(name in (each, each.partition("@")[0]) for each in known):
            raise UserError(
                f"STAGES: dvc.lock has no stage {name}; choose from {', '.join(known)}"
                + did_you_mean(name, known)
            )
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
    words = [
        "dvc",
        "repro",
        "--force",
        "--no-commit",
        *(["--single-item", *names] if names else []),
    ]
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


if __name__ == "__main__":
    command.run(main)
