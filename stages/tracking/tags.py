"""What a result came from: commit, experiment, hashes and sources, in words fit to be shown."""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

from ruamel.yaml import YAML

from stages.core.project import project_root


def experiment_name(root: Path = Path()) -> str:
    """The name of the run: DVC's experiment, or ``workspace-<short commit>`` outside of one."""
    name = os.environ.get("DVC_EXP_NAME", "").strip()
    return name or f"workspace-{_git(root, 'rev-parse', '--short', 'HEAD') or 'uncommitted'}"


def provenance(root: Path = Path()) -> dict[str, str]:
    """Tags that say what a result came from; what is unknown is left out.

    ``git.commit``, ``git.branch``, ``git.state`` (clean, or which tracked files differ, outputs
    of the pipeline aside), ``dvc.experiment``, ``dvc.baseline``, ``dvc.md5.<path>`` of every
    output in ``dvc.lock`` below data/ and models/, and ``data.*`` and ``model.*`` (kind, repo,
    commit, licence) from the SOURCE.json files.
    """
    outputs = _outputs(root)
    changed = [
        path
        for path in _changed(root)
        if path != "dvc.lock" and not any(f"{path}/".startswith(f"{out}/") for out in outputs)
    ]
    state = "dirty: " + ", ".join(changed) if changed else "clean"
    commit = _git(root, "rev-parse", "HEAD")
    found = {
        "git.commit": commit,
        "git.branch": _git(root, "branch", "--show-current"),
        "git.state": state if commit else "",
        "dvc.experiment": os.environ.get("DVC_EXP_NAME", ""),
        "dvc.baseline": os.environ.get("DVC_EXP_BASELINE_REV", ""),
    }
    for path, digest in outputs.items():
        if path.startswith(("data/", "models/")):
            found[f"dvc.md5.{path}"] = digest
    for name, folder in (("data", "data/raw"), ("model", "models/base")):
        source = root / folder / "SOURCE.json"
        if source.is_file():
            described = json.loads(source.read_text(encoding="utf-8"))
            for key in ("kind", "repo", "commit", "licence"):
                found[f"{name}.{key}"] = str(described.get(key) or "")
    return {key: redacted(value, root) for key, value in found.items() if value}


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


def _outputs(root: Path) -> dict[str, str]:
    """Path to md5 of every output in ``dvc.lock``; none if there is no such file yet."""
    lock = root / "dvc.lock"
    document = YAML(typ="safe").load(lock.read_text(encoding="utf-8")) if lock.is_file() else {}
    outs = (out for stage in document.get("stages", {}).values() for out in stage.get("outs", []))
    return {out["path"]: str(out.get("md5", "")) for out in outs}


def _changed(root: Path) -> list[str]:
    """Tracked files that differ from the last commit, relative to ``root``.

    Compared through an index made for this: in DVC's temporary copies the repository's own may hold
    the times and sizes of files as DVC changed them, and a changed params.yaml then looks clean.
    """
    with tempfile.TemporaryDirectory() as folder:
        index = str(Path(folder, "index"))
        _git(root, "read-tree", "HEAD", index=index)
        names = _git(root, "diff", "--name-only", "--relative", "-z", index=index)
    return sorted(name for name in names.split("\0") if name)


def _git(root: Path, *arguments: str, index: str | None = None) -> str:
    """What git prints, or nothing where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            env={**os.environ, **({"GIT_INDEX_FILE": index} if index else {})},
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
