"""What a result came from: commit, experiment, hashes and changes, without anything secret."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.core.command import project_root
from stages.params.params import PARAMS_FILE, differences, flattened


def experiment_name(root: Path = Path()) -> str:
    """The name of the run: DVC's experiment, or ``workspace-<short commit>`` outside of one."""
    name = os.environ.get("DVC_EXP_NAME", "").strip()
    return name or f"workspace-{git(root, 'rev-parse', '--short', 'HEAD') or 'uncommitted'}"


def provenance(root: Path = Path()) -> dict[str, str]:
    """Tags that say what a result came from; what is unknown is left out.

    ``git.commit``, ``git.state`` (clean, or which tracked files differ, outputs of the pipeline
    aside), ``dvc.experiment``, ``dvc.md5.<path>`` of every output in ``dvc.lock`` below data/ and
    models/, ``changed`` (parameters that differ from the commit's, with their values); and MLflow's
    own for source and commit. Repositories and revisions are among the run's parameters.
    """
    commit, remote = git(root, "rev-parse", "HEAD"), git(root, "remote", "get-url", "origin")
    changed = _changed(root)
    # In DVC's temporary copies, Git takes a params.yaml that DVC changed for unchanged.
    edited = {*changed_files(root), *([str(PARAMS_FILE)] if changed else [])}
    state = f"dirty: {', '.join(sorted(edited))}" if edited else "clean"
    found = {
        "git.commit": commit,
        "git.state": state if commit else "",
        "dvc.experiment": os.environ.get("DVC_EXP_NAME", ""),
        "changed": changed,
        "mlflow.source.name": "dvc.yaml" if (root / "dvc.yaml").is_file() else "",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": git(root, "branch", "--show-current"),
        "mlflow.source.git.repoURL": remote if ":" in remote else "",
    }
    for path, digest in outputs(root).items():
        if path.startswith(("data/", "models/")):
            found[f"dvc.md5.{path}"] = digest
    return {key: redacted(value, root) for key, value in found.items() if value}


def _changed(root: Path) -> str:
    """The parameters that differ from those of the commit that an experiment starts from."""
    baseline = os.environ.get("DVC_EXP_BASELINE_REV") or "HEAD"
    text = git(root, "show", f"{baseline}:./{PARAMS_FILE}")
    before = flattened(YAML(typ="safe", pure=True).load(text)) if text else {}
    apart = differences(before, parameters(root)) if before else ()
    return ", ".join(f"{key}={value}" for key, _, value in apart)


def parameters(root: Path) -> dict[str, Any]:
    """What params.yaml holds, by dotted key; nothing if there is no such file."""
    file = root / PARAMS_FILE
    return flattened(YAML(typ="safe", pure=True).load(file)) if file.is_file() else {}


def redacted(text: str, root: Path = Path()) -> str:
    """``text`` without what must not be shown: credentials in URLs, tokens that stand in
    environment variables, the path of the project (``.``) and of the home folder (``~``).
    """
    text = re.sub(r"(\b[\w+.-]+://)[^/\s@]+@", r"\1", text)
    secret = re.compile("(?i)TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|API_?KEY|ACCESS_KEY")
    for name, value in os.environ.items():
        if len(value) >= 6 and secret.search(name) and not Path(value).exists():
            text = text.replace(value, "***")
    for path, shown in ((root.resolve(), "."), (project_root(root), "."), (Path.home(), "~")):
        if len(path.parts) > 1:
            text = re.sub(re.escape(str(path)) + r"(?![\w.-])", shown, text)
    return text


def locked(root: Path, rev: str = "") -> dict[str, Any]:
    """The stages of ``dvc.lock`` by name, here or as a commit has it; none if there is no lock."""
    lock = root / "dvc.lock"
    text = lock.read_text(encoding="utf-8") if lock.is_file() and not rev else ""
    text = git(root, "show", f"{rev}:./dvc.lock") if rev else text
    return dict(YAML(typ="safe").load(text or "stages: {}")["stages"])


def outputs(root: Path, rev: str = "") -> dict[str, str]:
    """Path to md5 of every output in ``dvc.lock``, here or as a commit has it."""
    outs = (out for stage in locked(root, rev).values() for out in stage.get("outs", []))
    return {out["path"]: str(out.get("md5", "")) for out in outs}


def changed_files(root: Path) -> list[str]:
    """Tracked files that differ from the last commit, relative to ``root``, aside from dvc.lock and
    the outputs that it names.
    """
    names = git(root, "diff", "--name-only", "--relative", "-z", "HEAD").split("\0")
    known = ("dvc.lock", *outputs(root))
    return sorted(
        name
        for name in names
        if name and not any(f"{name}/".startswith(f"{path}/") for path in known)
    )


def git(root: Path, *arguments: str) -> str:
    """What git prints, or nothing where there is no git or no repository."""
    try:
        words = ["git", "-C", str(root), *arguments]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.rstrip() if done.returncode == 0 else ""
