"""Go back to the last commit, parameters and results included.

    make back
    python -m stages back --look 1    # only what differs by rounding, as at the end of make repro

In: Git's last commit, and DVC's cache. Edits that are not committed are lost, as ``git restore``
does it. Refused where the cache lacks an output of the commit: on a machine that rounds otherwise,
nobody could bring back what lies here.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stages.commands.verify import DIFFERENT, ROUNDING, compared
from stages.core import command
from stages.core.errors import UserError, listed
from stages.tracking import tags

KEEP = "git commit -am 'Results of this machine'"


def main(look: str = "") -> None:
    if look:
        print(of_this_machine(), end="")
        return
    if missing := lacking():
        raise UserError(
            f"the cache lacks {listed(missing, 5, longest=200)} of the last commit, so going back "
            f"would only delete what is here; `{KEEP}` keeps it, and `dvc fetch --all-branches` "
            "gets the commit's outputs if they were pushed"
        )
    for words in (["git", "restore", "."], [sys.executable, "-m", "dvc", "checkout"]):
        if subprocess.run(words, check=False).returncode:
            raise UserError(f"`{' '.join(words[-2:])}` failed for the reason above")


def lacking() -> list[str]:
    """The outputs of the last commit that the cache does not hold whole."""
    from dvc.repo import Repo

    with Repo() as repo, repo.switch("HEAD"):
        outs = [out for out in repo.index.outs if out.use_cache and out.hash_info]
        return sorted(str(out) for out in outs if out.changed_cache())


def of_this_machine() -> str:
    """What is to be said of outputs here that have other bits than the last commit's; nothing where
    other code or parameters explain it."""
    committed, made = tags.outputs(Path(), "HEAD"), tags.outputs(Path())
    moved = [path for path in made if path in committed and made[path] != committed[path]]
    if not moved or inputs(tags.locked(Path(), "HEAD")) != inputs(tags.locked(Path())):
        return ""
    with tempfile.TemporaryDirectory() as folder:
        found = compared(moved, fetched("HEAD", moved, Path(folder)), Path())
    lines = [
        f"These are this machine's results: {len(moved)} of {len(made)} outputs have other bits "
        f"than those of the last commit, {[v for v, _ in found.values()].count(ROUNDING)} agree "
        "with them within rounding.",
        *(f"  {path}: {why}" for path, (verdict, why) in found.items() if verdict == DIFFERENT),
        f"`{KEEP}` keeps them; compare, make exps and make back start from there.",
    ]
    return "\n".join(lines) + "\n"


def inputs(locked: Mapping[str, Any]) -> dict[str, Any]:
    """By stage, what it was given aside from outputs of others: parameters and files in Git."""
    outs = [Path(out["path"]) for stage in locked.values() for out in stage.get("outs", [])]

    def among(path: str) -> bool:
        return any(out.is_relative_to(path) or Path(path).is_relative_to(out) for out in outs)

    return {
        name: (
            stage.get("params"),
            [dep for dep in stage.get("deps", []) if not among(dep["path"])],
        )
        for name, stage in locked.items()
    }


def fetched(rev: str, paths: Iterable[str], folder: Path) -> Path:
    """The folder, with what the cache or a remote has of these outputs of a commit."""
    from dvc.api import DVCFileSystem

    files = DVCFileSystem(rev=rev)
    for path in paths:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if files.isdir(path):
                files.get(path, str(target), recursive=True)
            else:
                files.get_file(path, str(target))
        except Exception:  # DVC's and the remote's have no class in common
            shutil.rmtree(target, ignore_errors=True)
            target.unlink(missing_ok=True)
    return folder


if __name__ == "__main__":
    command.run(main)
