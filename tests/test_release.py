"""A release in a real Git and DVC repository with a remote, and how colleagues get it."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.commands import bundle, release
from stages.core.errors import UserError
from stages.reporting import card
from stages.sources.source import Source
from stages.tracking import registered, runs
from tests.contracts import ROOT
from tests.test_revisions import PARAMETERS, STAGE, call

pytestmark = pytest.mark.slow

GUIDE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")

# After the results of STAGE: an adapter that follows from train.beta, and what goes with it.
MORE = """
import hashlib
share = won / n
Path("reports/results/metrics.json").write_text(json.dumps({
    "pairs": n, "images": n, "win_rate": share,
    "win_rate_low": share - 0.1, "win_rate_high": share + 0.1}))
weights = f"weights of beta {p['train']['beta']}".encode()
digest = hashlib.sha256(weights).hexdigest()
for folder in ("models/adapter", "models/base", "data/raw/topics"):
    Path(folder).mkdir(parents=True, exist_ok=True)
Path("models/adapter/adapter_model.safetensors").write_bytes(weights)
Path("models/adapter/llamafactory.yaml").write_text("stage: dpo\\n")
Path("models/adapter/adapter_config.json").write_text(
    json.dumps({"base_model_name_or_path": "models/base", "revision": None, "r": 8}))
Path("models/adapter/fingerprint.json").write_text(
    json.dumps({"fingerprint": digest[:16], "adapter_sha256": digest}))
source = {"kind": "hub", "revision": "main", "commit": "c" * 40, "files": []}
Path("models/base/SOURCE.json").write_text(
    json.dumps({**source, "repo": "owner/base", "licence": "apache-2.0"}))
Path("data/raw/topics/SOURCE.json").write_text(
    json.dumps({**source, "repo": "owner/data", "licence": "cc-by-nc-4.0"}))
Path("reports/report.html").write_text("<p>the page</p>")
Path("reports/model_card.md").write_text("---\\nlicense: cc-by-nc-4.0\\n---\\n# The adapter\\n")
"""
PIPELINE = """
artifacts: {adapter: {path: models/adapter, type: model}}
stages:
  evaluate:
    cmd: >-
      python stage.py --formatted-data data/formatted --results reports/results
      --details reports/details
    deps: [stage.py]
    params: [train.beta, evaluate]
    outs: [data/formatted, data/raw, models/base, models/adapter, reports/details,
           reports/report.html, {reports/results: {cache: false}},
           {reports/model_card.md: {cache: false}}]
  report:
    cmd: >-
      python -c '' --raw data/raw --formatted-data data/formatted --images data/pairs/images
      --model models/base --adapter models/adapter --results reports/results
      --details reports/details --page reports/report.html --card reports/model_card.md
    deps: [reports/details]
"""


def committed(folder: Path, beta: float, *, pushed: bool = True) -> None:
    """Run the pipeline with this beta and commit what comes out."""
    params = {**PARAMETERS, "train": {"beta": beta, "lora_rank": 8}}
    params["data"] = {"sources": {"topics": {}}}
    (folder / "params.yaml").write_text(json.dumps(params), encoding="utf-8")
    call("dvc", "repro", "--quiet", folder=folder)
    call("git", "add", ".", folder=folder)
    call("git", "commit", "--quiet", "-m", f"beta {beta}", folder=folder)
    if pushed:
        call("dvc", "push", "--quiet", folder=folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``project``, run with beta 0.3 (30 of 40 pairs won) and pushed to ``storage``
    next to it."""
    place: Path = tmp_path_factory.mktemp("made")
    folder = place / "project"
    folder.mkdir()
    (folder / "stage.py").write_text(STAGE + MORE, encoding="utf-8")
    (folder / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
    (folder / "requirements.txt").write_text("dvc==3.67.1\n", encoding="utf-8")
    (folder / ".gitignore").write_text("/releases/\n", encoding="utf-8")
    call("git", "init", "--quiet", "--initial-branch", "main", folder=folder)
    call("dvc", "init", "--quiet", folder=folder)
    (place / "storage").mkdir()
    call("dvc", "remote", "add", "-d", "storage", "../storage", "--quiet", folder=folder)
    committed(folder, 0.3)
    return place


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``made``, as the working folder; no MLflow server answers."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return entered(tmp_path / "project", monkeypatch)


def entered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for name in ("NAME", "EMAIL"):
        monkeypatch.setenv(f"GIT_COMMITTER_{name}", "test@example.org")
    return folder


def refusal(version: str) -> str:
    with pytest.raises(UserError) as refused:
        release.main(version)
    return str(refused.value)


# refusals


def test_a_version_must_be_one_and_above_the_others(project, capsys):
    for name in ("", "1.0", "v1", "latest"):
        assert "write it as VERSION=v1.0.0" in refusal(name)
    call("git", "tag", "-a", "adapter@v2.0.0", "-m", "by hand", folder=project)
    assert "not above v2.0.0" in refusal("v1.9.0")
    committed(project, 0.4)
    assert "choose a higher version" in refusal("v2.0.0")


def test_what_is_not_committed_run_or_pushed_is_named(project):
    committed(project, 0.4, pushed=False)
    (project / "stage.py").write_text(STAGE + MORE + "# more\n", encoding="utf-8")
    said = refusal("v1.0.0")
    assert "changes are not committed: stage.py" in said
    assert "dvc.lock is not current: evaluate would run again" in said
    assert "the DVC remote lacks" in said
    assert "models/adapter" in said
    shutil.rmtree(project / ".dvc" / "cache")  # of what is nowhere else, DVC's status says nothing
    assert "models/adapter" in refusal("v1.0.0")
    assert not call("git", "tag", folder=project)
    assert not (project / "releases").exists()


def test_a_remote_that_others_do_not_have_is_refused(project):
    add = ("dvc", "remote", "add", "--quiet", "-d")
    call(*add, "--local", "mine", "../storage", folder=project)  # all is there, but storage counts
    shutil.move(project.parent / "storage", project.parent / "elsewhere")
    assert "the DVC remote lacks" in refusal("v1.0.0")
    shutil.move(project.parent / "elsewhere", project.parent / "storage")
    call("dvc", "remote", "remove", "storage", folder=project)
    call("git", "commit", "-qam", "No remote", folder=project)
    said = refusal("v1.0.0")
    assert "the committed .dvc/config names no remote" in said
    assert "without --local, commit it, `dvc push`" in said
    call(*add, "--local", "--force", "storage", "../storage", folder=project)
    assert "the committed .dvc/config names no remote" in refusal("v1.0.0")
    call("dvc", "remote", "remove", "--local", "storage", folder=project)
    call("dvc", "remote", "remove", "--local", "mine", folder=project)
    assert "the committed .dvc/config names no remote" in refusal("v1.0.0")
    assert not call("git", "tag", folder=project)


def test_a_first_release_must_win_clearly_unless_forced_which_the_tag_says(project, capsys):
    committed(project, 0.2)
    assert "not clearly more or less than half" in refusal("v1.0.0")
    release.main("v1.0.0", force="1")
    message = call("git", "for-each-ref", "--format=%(contents)", "refs/tags", folder=project)
    assert "Released by force, although:" in message
    assert "not clearly more or less than half" in message
    facts = json.loads((project / "releases" / "v1.0.0" / "release.json").read_text())
    assert len(facts["forced_although"]) == 1
    assert "MLflow: not registered" in capsys.readouterr().err


def test_the_next_release_must_beat_the_champion_on_the_same_pairs(project):
    release.main("v1.0.0")
    (project / "note.txt").write_text("the same adapter", encoding="utf-8")
    call("git", "add", ".", folder=project)
    call("git", "commit", "--quiet", "-m", "A note", folder=project)
    assert "its win rate is not clearly above that of v1.0.0" in refusal("v1.1.0")
    committed(project, 0.2)
    assert "Against v1.0.0, t got worse" in refusal("v1.1.0")
    committed(project, 0.4)
    release.main("v1.1.0")
    tags = call("git", "for-each-ref", "--format=%(refname:short) %(objecttype)", folder=project)
    assert "adapter@v1.1.0 tag" in tags
    assert "force" not in call("git", "tag", "-n99", folder=project)


def test_an_adapter_that_its_training_did_not_leave_is_not_released(project):
    weights = project / "models" / "adapter" / "adapter_model.safetensors"
    weights.unlink()
    weights.write_bytes(b"others")
    with pytest.raises(UserError, match="is not the file that its training left"):
        release.main("v1.0.0", force="1")
    assert not (project / "releases" / "v1.0.0").exists()


# what a release is


@pytest.fixture(scope="module")
def released(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``made`` with v1.0.0, registered in MLflow's database in the project."""
    place: Path = tmp_path_factory.mktemp("released")
    shutil.copytree(made, place, dirs_exist_ok=True)
    folder = place / "project"
    ignored = ("/releases/", "/mlflow.db*", "/mlartifacts/", "/reports/mlflow_pending/")
    (folder / ".gitignore").write_text("\n".join(ignored), encoding="utf-8")
    call("git", "commit", "-qam", "Ignore MLflow", folder=folder)
    with pytest.MonkeyPatch.context() as patch:
        entered(folder, patch)
        patch.delenv("MLFLOW_TRACKING_URI")
        curves = folder.parent / "curves"
        curves.mkdir()
        made_by = json.loads(Path("models/adapter/fingerprint.json").read_text())["fingerprint"]
        runs.complete_run(
            made_by,
            parameters={"train": {"beta": 0.3}},
            metrics={"win_rate": 0.75},
            curves=curves,
            artifacts=[],
            datasets=[],
        )
        release.main("v1.0.0")
        release.main("v1.0.0")  # again: completed, not refused
    return folder


@pytest.fixture
def digest(released: Path) -> str:
    facts = json.loads((released / "releases" / "v1.0.0" / "release.json").read_text())
    return str(facts["adapter_sha256"])


def sha256(adapter: Path) -> str:
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_the_folder_is_what_the_hub_takes_and_names_no_path_of_this_machine(released, digest):
    from huggingface_hub import ModelCard

    folder = released / "releases" / "v1.0.0"
    assert sha256(folder) == digest
    assert {"README.md", "LICENCES.md", "report.html", "metrics.json", "dvc.lock"} <= {
        file.name for file in folder.iterdir()
    }
    assert ModelCard.load(folder / "README.md").data.license == "cc-by-nc-4.0"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["revision"] == "c" * 40
    facts = json.loads((folder / "release.json").read_text())
    assert facts["git.commit"] == call("git", "rev-parse", "HEAD", folder=released).strip()
    assert facts["dvc.md5.models/adapter"].endswith(".dir")
    assert facts["licence"] == "cc-by-nc-4.0"
    for file in folder.iterdir():
        text = file.read_bytes()
        assert str(released.parent).encode() not in text, file.name
        assert str(Path.home()).encode() not in text, file.name


def test_the_tag_is_the_one_that_gto_shows(released):
    from gto import api

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(released)
        (shown,) = api.show(".", "adapter")
    assert shown["version"] == "v1.0.0"
    assert shown["commit_hexsha"] == call("git", "rev-parse", "HEAD", folder=released).strip()


def test_the_strictest_licence_and_its_use_are_in_the_notes():
    def source(repo: str, licence: str | None) -> Source:
        return Source("hub", repo, "main", "c", licence, ())

    def notes(data: str | None) -> str:
        parts = ([source("a/b", data)], source("c/d", "apache-2.0"))
        return bundle.licences(*parts, card.licence_of(data, "apache-2.0"))

    assert "**The adapter: cc-by-nc-4.0**" in notes("cc-by-nc-4.0")
    assert "**Not for commercial use**, because of the training data." in notes("cc-by-nc-4.0")
    assert "commercial" not in notes("mit")
    assert "A licence is unknown" in notes(None)


# a colleague's side: the commands of docs/serving.md, with another address


def told(released: Path, pattern: str) -> list[str]:
    """A command of the guide, with this project's address in the place of the one there."""
    (line,) = re.findall(rf"(?m)^({pattern}.*?)(?: +#.*)?$", GUIDE)
    return [str(released) if word == "$URL" else word.strip('"') for word in line.split()]


@pytest.mark.parametrize("command", ["dvc artifacts get", "dvc get"])
def test_a_colleague_gets_the_released_adapter_without_a_clone(released, digest, tmp_path, command):
    call(*told(released, command), folder=tmp_path)
    assert sha256(tmp_path / "adapter") == digest


def test_a_colleague_imports_the_released_adapter_into_another_project(released, digest, tmp_path):
    call("git", "init", "--quiet", folder=tmp_path)
    call("dvc", "init", "--quiet", folder=tmp_path)
    call(*told(released, "dvc import"), folder=tmp_path)
    assert sha256(tmp_path / "adapter") == digest
    assert "adapter@v1.0.0" in (tmp_path / "adapter.dvc").read_text()


def test_a_fresh_clone_pulls_the_released_adapter(released, digest, tmp_path):
    call("git", "clone", "-q", "-b", "adapter@v1.0.0", str(released), "clone", folder=tmp_path)
    clone = tmp_path / "clone"
    call("dvc", "remote", "modify", "--local", "storage", "url",
         str(released.parent / "storage"), folder=clone)  # fmt: skip
    call("dvc", "pull", "--quiet", "models/adapter", folder=clone)
    assert sha256(clone / "models" / "adapter") == digest


@pytest.fixture
def snippet(released: Path) -> Callable[[str], dict[str, Any]]:
    """Runs the Python block of the guide that holds a text, in the current folder."""

    def run(text: str) -> dict[str, Any]:
        (block,) = (b for b in re.findall(r"(?s)```python\n(.*?)```", GUIDE) if text in b)
        found: dict[str, Any] = {}
        exec(block.replace('"$URL"', repr(str(released))), found)
        return found

    return run


def test_a_colleague_reads_the_released_weights_without_files(digest, snippet):
    found = snippet("dvc.api.open")
    assert hashlib.sha256(found["weights"]).hexdigest() == digest


def test_a_colleague_loads_the_champion_of_mlflows_registry(
    released, digest, snippet, tmp_path, monkeypatch
):
    import mlflow

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{released / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    found = snippet("get_model_version_by_alias")
    assert sha256(tmp_path / "champion") == digest == found["version"].tags["adapter_sha256"]
    assert found["version"].tags["licence"] == "cc-by-nc-4.0"
    assert found["version"].tags["version"] == "v1.0.0"
    described = Path(
        mlflow.artifacts.download_artifacts("models:/preference-tuning@champion", dst_path="page")
    )
    assert {file.name for file in described.iterdir()} == set(bundle.DESCRIBING)
    assert registered.CHAMPION == "champion"
