"""The way back from an MLflow run to what made it: parameters, ``dvc.lock`` and the commit.

An experiment's own commit does not exist yet while its stages run: HEAD is the baseline's, whose
parameters are others. So a run keeps what the commit lacks, as artifacts in ``way_back/``:
``params.yaml``, ``dvc.lock``, the outputs that Git keeps and DVC's cache does not, and
``changes.patch`` where code was not committed. ``restore`` puts all of it back.
"""

import io
import json
import os
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.core.errors import UserError
from stages.params.params import PARAMS_FILE
from stages.tracking.tags import changed_files, git, outputs, redacted

FOLDER, NOTE, PATCH = "way_back", "way_back.json", "changes.patch"
PIPELINE, LOCK = Path("dvc.yaml"), Path("dvc.lock")


def write(folder: Path, root: Path = Path()) -> None:
    """Keep in ``folder`` what leads back to the files in ``root`` as they are, in a stage that runs
    without what ``dvc.lock`` says of it and of those that follow.

    Parameters, dvc.lock, which repeats them, and patch are redacted like all that MLflow is given;
    ``way_back.json`` says which of them that changed, with the commit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        path.as_posix(): (root / path).read_text(encoding="utf-8")
        for path in (PARAMS_FILE, LOCK)
        if (root / path).is_file()
    }
    if running := os.environ.get("DVC_STAGE", "").rpartition(":")[2]:
        texts |= {name: without(texts[name], running) for name in {LOCK.as_posix()} & set(texts)}
    code = [path for path in changed_files(root) if path != PARAMS_FILE.as_posix()]
    if code:
        # Not through ``git``, which strips: a patch ends with a newline.
        diff = ["git", "-C", str(root), "diff", "--binary", "--relative", "HEAD", "--", *code]
        texts[PATCH] = subprocess.run(diff, capture_output=True, text=True, check=False).stdout
    for name, text in texts.items():
        (folder / name).write_text(redacted(text, root), encoding="utf-8")
    for path in small_outputs(root):
        if (root / path).is_dir():
            shutil.copytree(root / path, folder / path, dirs_exist_ok=True)
        elif (root / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, folder / path)
    note = {
        "commit": git(root, "rev-parse", "HEAD"),
        "changed": code,
        "redacted": [name for name, text in texts.items() if redacted(text, root) != text],
    }
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def without(lock: str, running: str) -> str:
    """``dvc.lock`` without the stage that runs and those that follow from it: what it says of them
    is an earlier result's.
    """
    yaml = YAML()
    yaml.width = 10**6
    document = yaml.load(lock)
    stages, gone = document.get("stages", {}), {running}
    while more := {
        name
        for name, stage in stages.items()
        for other in gone & set(stages)
        for out in stages[other].get("outs", [])
        for dep in stage.get("deps", [])
        if name not in gone and f"{dep['path']}/".startswith(f"{out['path']}/")
    }:
        gone |= more
    for name in gone & set(stages):
        del stages[name]
    written = io.StringIO()
    yaml.dump(document, written)
    return written.getvalue()


def small_outputs(root: Path) -> Iterator[Path]:
    """Outputs that are not in DVC's cache, since Git keeps them: ``cache: false`` in dvc.yaml."""
    pipeline = root / PIPELINE
    if not pipeline.is_file():
        return
    stages = YAML(typ="safe").load(pipeline.read_text(encoding="utf-8")).get("stages", {})
    for stage in stages.values():
        for out in (*stage.get("outs", []), *stage.get("metrics", [])):
            for path, options in out.items() if isinstance(out, dict) else ():
                if options.get("cache") is False:
                    yield Path(path)


def restore(run: str, artifacts: Path) -> Iterator[str]:
    """Bring the working tree back to what made the MLflow run of that name, whose artifacts are in
    the folder ``artifacts``; yields what was done, a line each.

    Raises:
        UserError: the run has no way back, files here have edits, or the commit is not here; in all
            of these nothing is changed. Also if outputs are neither in the cache nor in the remote;
            the same call then goes on where it stopped.
    """
    note = read_note(run, artifacts)
    commit = note["commit"]
    moves = bool(commit) and git(Path(), "rev-parse", "HEAD") != commit
    patch = str((artifacts / PATCH).absolute())
    patched = (
        not moves
        and PATCH not in note["redacted"]
        and not _run("git", "apply", "--reverse", "--check", patch).returncode
    )
    require_clean(artifacts, note["changed"] if patched else ())
    if moves:
        if not git(Path(), "cat-file", "-t", commit):
            raise UserError(
                f"the commit {commit} that made {run} is not in this clone; `git "
                "fetch --all` gets what was pushed (in a shallow clone, git fetch --unshallow)"
            )
        checked = _run("git", "checkout", "--quiet", "--detach", commit)
        if checked.returncode:
            raise UserError(f"git can't check {commit} out: {_last(checked)}")
        yield f"code: {commit[:7]}, without a branch"
    if note["changed"]:
        if PATCH not in note["redacted"] and not patched:
            applied = _run("git", "apply", patch)
            if applied.returncode:
                raise UserError(f"{PATCH} of the run does not apply: {_last(applied)}")
        yield f"code that was not committed: {', '.join(note['changed'])}" + (
            f"; it held a password or a home folder, so {artifacts / PATCH} is for you to apply"
            if PATCH in note["redacted"]
            else ""
        )
    for path in sorted(artifacts.rglob("*")):
        name = path.relative_to(artifacts)
        if path.is_file() and name.as_posix() not in (NOTE, PATCH):
            name.parent.mkdir(parents=True, exist_ok=True)
            name.unlink(missing_ok=True)  # with DVC's link types it may be the cache's own
            shutil.copyfile(path, name)
    yield f"{PARAMS_FILE}, {LOCK} and the results that Git keeps"
    if PARAMS_FILE.as_posix() in note["redacted"]:
        yield f"{PARAMS_FILE} held a password or a home folder, which MLflow was not given: edit it"
    yield f"to go back: `git restore .`, {'`git switch -`, ' if moves else ''}`dvc checkout`"
    kept = {path.as_posix() for path in small_outputs(Path())}
    yield from fetch({path: md5 for path, md5 in outputs(Path()).items() if path not in kept})


def read_note(run: str, artifacts: Path) -> dict[str, Any]:
    try:
        note: dict[str, Any] = json.loads((artifacts / NOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"the run {run} has no {FOLDER}/ among its artifacts: an older version of "
            "this pipeline made it, or it was never completed; its tags git.commit and "
            "dvc.experiment say where to look (`dvc exp apply NAME`)"
        ) from None
    return note


def require_clean(artifacts: Path, patched: Collection[str] = ()) -> None:
    """Raise ``UserError`` if a tracked file has edits, which restoring would overwrite: what it
    put there before, a file of ``artifacts`` or one that is ``patched``, is not one of them.
    """
    edited = [
        name
        for name in changed_files(Path(), made=True)
        if name not in patched and not _same(Path(name), artifacts / name)
    ]
    if edited:
        raise UserError(
            f"{', '.join(edited)} would be overwritten: commit or `git stash` them first, or run "
            "this in another clone or worktree (git worktree add ../restored)"
        )


def fetch(wanted: Mapping[str, str]) -> Iterator[str]:
    """The outputs of ``dvc.lock``, from the cache or else the remote.

    Raises:
        UserError: some are in neither, named.
    """
    done = _run("dvc", "checkout", "--quiet", "--force", *wanted)
    if done.returncode:
        done = _run("dvc", "pull", "--quiet", "--force", *wanted)
    missing = [path for path in wanted if not Path(path).exists()]
    if done.returncode:
        what = ", ".join(missing or wanted)
        raise UserError(
            f"parameters and dvc.lock are back, but not all outputs ({what}): they are not in the "
            f"cache, and the remote did not give them ({_last(done)}); whoever ran it can `dvc exp "
            "push` or `dvc push`; if the commit's .dvc/config names no remote, `dvc remote add "
            "--local -d storage URL` does; then run this again. Or `dvc repro` makes them here"
        )
    for path, md5 in wanted.items():
        yield f"{path}  {md5}"


def _same(here: Path, kept: Path) -> bool:
    return here.is_file() and kept.is_file() and here.read_bytes() == kept.read_bytes()


def _run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, capture_output=True, text=True, check=False)


def _last(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return redacted(lines[-1]).removeprefix("ERROR: ") if lines else f"status {done.returncode}"
