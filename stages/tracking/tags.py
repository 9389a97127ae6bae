"""What a result came from: commit, experiment, hashes and sources, in words fit to be shown."""

import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

from ruamel.yaml import YAML

from stages.core.project import project_root
from stages.params.params import PARAMS_FILE, SEED, differences, flattened


def experiment_name(root: Path = Path()) -> str:
    """The name of the run: DVC's experiment, or ``workspace-<short commit>`` outside of one."""
    name = os.environ.get("DVC_EXP_NAME", "").strip()
    return name or f"workspace-{git(root, 'rev-parse', '--short', 'HEAD') or 'uncommitted'}"


def provenance(root: Path = Path()) -> dict[str, str]:
    """Tags that say what a result came from; what is unknown is left out.

    ``git.commit``, ``git.branch``, ``git.state`` (clean, or which tracked files differ, outputs
    of the pipeline aside), ``dvc.experiment``, ``dvc.baseline``, ``dvc.md5.<path>`` of every
    output in ``dvc.lock`` below data/ and models/, ``data.*`` and ``model.*`` (kind, repo,
    commit, licence) from the SOURCE.json files; ``changed`` (parameters that differ from the
    commit's, with their values), ``sweep`` (commit and names of these) and ``setting`` (a hash of
    data and parameters, ``train.seed`` aside); and MLflow's own for source and commit.
    """
    hashes = outputs(root)
    commit, branch = git(root, "rev-parse", "HEAD"), git(root, "branch", "--show-current")
    edited = changed_files(root)
    state = "dirty: " + ", ".join(edited) if edited else "clean"
    baseline = os.environ.get("DVC_EXP_BASELINE_REV", "")
    remote = git(root, "remote", "get-url", "origin")
    found = {
        "git.commit": commit,
        "git.branch": branch,
        "git.state": state if commit else "",
        "dvc.experiment": os.environ.get("DVC_EXP_NAME", ""),
        "dvc.baseline": baseline,
        "mlflow.source.name": "dvc.yaml" if (root / "dvc.yaml").is_file() else "",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": branch,
        "mlflow.source.git.repoURL": remote if ":" in remote else "",
    }
    for path, digest in hashes.items():
        if path.startswith(("data/", "models/")):
            found[f"dvc.md5.{path}"] = digest
    places = {"data": [f"data/raw/{name}" for name in source_names(root)], "model": ["models/base"]}
    for what, folders in places.items():
        files = [root / folder / "SOURCE.json" for folder in folders]
        fetched = [json.loads(file.read_text("utf-8")) for file in files if file.is_file()]
        for key in ("kind", "repo", "commit", "licence"):
            found[f"{what}.{key}"] = ", ".join(str(each[key]) for each in fetched if each.get(key))
    return {k: redacted(v, root) for k, v in (found | _sweep(root, baseline)).items() if v}


def source_names(root: Path = Path()) -> list[str]:
    """The names in ``data.sources``."""
    if not (root / PARAMS_FILE).is_file():
        return []
    read = YAML(typ="safe", pure=True).load((root / PARAMS_FILE).read_text(encoding="utf-8"))
    return list(((read or {}).get("data") or {}).get("sources") or {})


def _sweep(root: Path, baseline: str) -> dict[str, str]:
    """How the parameters differ from those of the commit that an experiment starts from."""
    if not (root / PARAMS_FILE).is_file():
        return {}
    load = YAML(typ="safe", pure=True).load
    now = flattened(load((root / PARAMS_FILE).read_text(encoding="utf-8")) or {})
    before = git(root, "show", f"{baseline or 'HEAD'}:./{PARAMS_FILE}")
    apart = differences(flattened(load(before) or {}), now) if before else ()
    names = ", ".join(key for key, _, _ in apart)
    alike = {key: value for key, value in now.items() if key != SEED}
    content = json.dumps([alike, outputs(root).get("data/formatted")], sort_keys=True, default=str)
    return {
        "changed": ", ".join(f"{key}={new}" for key, _, new in apart),
        "sweep": f"{baseline[:7]} {names}" if baseline and names else "",
        "setting": hashlib.sha256(content.encode()).hexdigest()[:12],
    }


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


def outputs(root: Path) -> dict[str, str]:
    """Path to md5 of every output in ``dvc.lock``; none if there is no such file yet."""
    lock = root / "dvc.lock"
    document = YAML(typ="safe").load(lock.read_text(encoding="utf-8")) if lock.is_file() else {}
    outs = (out for stage in document.get("stages", {}).values() for out in stage.get("outs", []))
    return {out["path"]: str(out.get("md5", "")) for out in outs}


def changed_files(root: Path, *, made: bool = False) -> list[str]:
    """Tracked files that differ from the last commit, relative to ``root``; those that the pipeline
    makes, ``dvc.lock`` included, only if ``made``.

    Compared through an index made for this: in DVC's temporary copies the repository's own may hold
    the times and sizes of files as DVC changed them, and a changed params.yaml then looks clean.
    """
    with tempfile.TemporaryDirectory() as folder:
        index = str(Path(folder, "index"))
        git(root, "read-tree", "HEAD", index=index)
        names = git(root, "diff", "--name-only", "--relative", "-z", index=index)
    known = () if made else ("dvc.lock", *outputs(root))
    return sorted(
        name
        for name in names.split("\0")
        if name and not any(f"{name}/".startswith(f"{path}/") for path in known)
    )


def git(root: Path, *arguments: str, index: str | None = None) -> str:
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
    return done.stdout.rstrip() if done.returncode == 0 else ""
