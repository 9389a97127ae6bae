"""Verify: do the committed results come out again? In a clone of the commit, from its inputs.

    make verify                         # every stage; the demo takes four minutes
    make verify STAGES="format train"   # only these, from the inputs that dvc.lock names

In: the current commit, DVC's cache and, for what it lacks, the remote. Out: a table of every output
of the stages that were run again: same bits, same within rounding (``stages.commands.same_results``
states the bounds), or different. Exit status 1 if any is different. Where all stages were run and
none is, the certificate is written (``stages.commands.certificate``), signed with ``--key`` if
given. Nothing else here changes: what the stages write stays in the clone, which is deleted, and
MLflow gets a database in there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tabulate import tabulate

from stages.commands import lockfile, same_results, statement
from stages.commands.certificate import issue
from stages.commands.lockfile import Ran
from stages.commands.same_results import DIFFERENT, Compared
from stages.core import command
from stages.core.errors import UserError, did_you_mean
from stages.tracking.tags import git


def main(stages: str = "", certificate: Path = statement.CERTIFICATE, key: str = "") -> None:
    root = Path(git(Path(), "rev-parse", "--show-toplevel"))
    commit = git(root, "rev-parse", "HEAD")
    if not commit or not (root / ".dvc").is_dir():
        raise UserError("there is no Git repository with DVC here; run from the project's root")
    if changed := git(root, "status", "--porcelain", "--untracked-files=no"):
        uncommitted = ", ".join(line[3:] for line in changed.splitlines())
        print(f"not verified, since not committed: {uncommitted}")
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        clone = cloned(root, commit, Path(folder, "clone"))
        locked = lockfile.read(clone / lockfile.LOCK)
        names = chosen(stages, locked)
        bring_inputs(clone, names, locked)
        committed = originals(clone, names, locked, Path(folder, "committed"))
        sys.stdout.flush()
        run_again(clone, names)
        again = lockfile.read(clone / lockfile.LOCK)
        found = compared(clone, names, locked, again, committed)
    print(f"\n{table(names, locked, found)}\n\n{summary(commit, found)}")
    if any(each.verdict == DIFFERENT for each in found):
        raise UserError(
            "some outputs are different; the table says which, and the first difference"
        )
    if set(names) == set(locked):
        try:
            issue(certificate, key)
        except UserError as error:  # the results came out again all the same
            print(f"verified, and no certificate is written: {error}")


def chosen(stages: str, locked: Mapping[str, Ran]) -> list[str]:
    """Stages to run again, in the pipeline's order; ``fetch`` means both of its items.

    Raises:
        UserError: no such stage.
    """
    wanted = stages.replace(",", " ").split()
    for name in wanted:
        if not any(name in (known, known.partition("@")[0]) for known in locked):
            raise UserError(
                f"STAGES: dvc.lock has no stage {name}; choose from {', '.join(locked)}"
                + did_you_mean(name, locked)
            )
    if not wanted:
        return list(locked)
    return [name for name in locked if {name, name.partition("@")[0]} & set(wanted)]


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


def bring_inputs(clone: Path, names: Sequence[str], locked: Mapping[str, Ran]) -> None:
    """Outputs of the other stages that these read, from the cache, else from the remote.

    Raises:
        UserError: neither has them.
    """
    made = {out for name in names for out in locked[name].outs}
    # A command names what it reads too: images, which are no dependency, since a list stands for
    # them.
    words = {word for name in names for word in locked[name].cmd.split() if "/" in word}
    needed = words.union(*(locked[name].deps for name in names))
    paths = sorted(
        out
        for out in lockfile.outputs(locked)
        if out not in made and not (clone / out).exists()
        if any(Path(path).is_relative_to(out) or Path(out).is_relative_to(path) for path in needed)
    )
    brought(clone, paths)
    if lacking := [path for path in paths if not (clone / path).exists()]:
        raise UserError(
            f"{lacking[0]} is neither in DVC's cache nor in a remote; `dvc pull` or `dvc repro` "
            "brings it, or verify the stage that makes it as well"
        )


def brought(clone: Path, paths: Sequence[str]) -> None:
    """Check outputs out, from the cache if it has them all, else from the remote too."""
    if not paths:
        return
    try:
        run(["dvc", "checkout", "--quiet", *paths], clone)
    except UserError:
        with suppress(UserError):
            run(["dvc", "pull", "--quiet", "--allow-missing", *paths], clone)


def originals(
    clone: Path, names: Sequence[str], locked: Mapping[str, Ran], folder: Path
) -> dict[str, Path]:
    """Where the committed content of each output of the stages is, as far as it can be had."""
    paths = [out for name in names for out in locked[name].outs]
    brought(clone, [path for path in paths if not (clone / path).exists()])  # else it is in Git
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if (clone / path).exists():
            shutil.move(clone / path, folder / path)
    return {path: folder / path for path in paths}


def run_again(clone: Path, names: Sequence[str]) -> None:
    """Run the stages as ``dvc repro -f`` does, their output shown; nothing goes into the cache.

    Raises:
        UserError: one failed.
    """
    words = ["dvc", "repro", "--force", "--single-item", "--no-commit", *names]
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


def compared(
    clone: Path,
    names: Sequence[str],
    locked: Mapping[str, Ran],
    again: Mapping[str, Ran],
    committed: Mapping[str, Path],
) -> list[Compared]:
    """Outputs whose hash is the locked one have the same bits; the others are looked into."""
    same, moved = [], {}
    for path in (out for name in names for out in locked[name].outs):
        before, after = lockfile.outputs(locked)[path], lockfile.outputs(again).get(path)
        if after is not None and before.md5 == after.md5:
            same.append(Compared(path, same_results.SAME))
        else:
            moved[path] = committed[path]
    return same + same_results.outputs(moved, {path: clone / path for path in moved})


def table(names: Sequence[str], locked: Mapping[str, Ran], found: Sequence[Compared]) -> str:
    by_path = {each.path: each for each in found}
    rows = [
        [name, path, by_path[path].verdict, by_path[path].why]
        for name in names
        for path in locked[name].outs
    ]
    return tabulate(rows, ["stage", "output", "verdict", "first difference"])


def summary(commit: str, found: Sequence[Compared]) -> str:
    counts = [
        f"{sum(each.verdict == verdict for each in found)} {verdict}"
        for verdict in (same_results.SAME, same_results.ROUNDING, same_results.DIFFERENT)
    ]
    return f"commit {commit[:12]}, {len(found)} outputs: {', '.join(counts)}"


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
