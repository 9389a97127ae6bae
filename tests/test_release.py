"""A release in a real Git and DVC repository with a remote, how others get it, and its way to the
Hub, by the real client to a local server.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.commands import release
from stages.core.errors import UserError
from tests.contracts import ROOT
from tests.hub_server import Repo, serve
from tests.repository import REPORTED, STAGES, attempt, call, commit_and_push, make

pytestmark = [pytest.mark.slow, pytest.mark.rehearsal]

GUIDE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
WEIGHTS = "adapter_model.safetensors"
TOKEN = "hf_of_a_writer"
STAGE = (
    "TRACKED = False\n"
    + STAGES
    + """
import hashlib
if sys.argv[1] == "train":
    weights = f"weights of beta {p['train']['beta']}"
    digest = hashlib.sha256(weights.encode()).hexdigest()
    put("models/adapter/adapter_model.safetensors", weights)
    put("models/adapter/adapter_config.json", '{"base_model_name_or_path": "models/base"}')
    made = {"fingerprint": digest[:16], "adapter_sha256": digest}
    put("models/adapter/fingerprint.json", json.dumps(made))
if sys.argv[1] == "evaluate":
    measured = {"pairs": 40, "images": 40, "win_rate": 0.75, "win_rate_low": 0.7,
                "win_rate_high": 0.8}
    put("reports/results/metrics.json", json.dumps(measured))
if sys.argv[1] == "report":
    put("reports/model_card.md", "---\\nlicense: cc-by-nc-4.0\\n---\\n# The adapter\\n")
"""
)
BASE = {"kind": "hub", "repo": "owner/base", "revision": "main", "commit": "c" * 40}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``project``, run and pushed to ``storage`` next to it."""
    place: Path = tmp_path_factory.mktemp("made")
    artifacts = "artifacts: {adapter: {path: models/adapter, type: model}}"
    folder = make(place, STAGE, artifacts + REPORTED.replace("--model x", "--model models/base"))
    (folder / "models" / "base").mkdir(parents=True)
    described = json.dumps({**BASE, "licence": "apache-2.0", "files": []})
    (folder / "models" / "base" / "SOURCE.json").write_text(described, encoding="utf-8")
    (folder / "requirements.txt").write_text("dvc==3.67.1\n", encoding="utf-8")
    call("dvc", "repro", "--quiet", folder=folder)
    commit_and_push(folder)
    return place


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``made``, as the working folder, with a storage of its own."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "project"
    monkeypatch.chdir(folder)
    for name in ("NAME", "EMAIL"):
        monkeypatch.setenv(f"GIT_COMMITTER_{name}", "test@example.org")
    storage = str(tmp_path / "storage")
    call("dvc", "remote", "modify", "--quiet", "storage", "url", storage, folder=folder)
    call("git", "commit", "-qam", "Another storage", folder=folder)
    return folder


def refusal(version: str) -> str:
    with pytest.raises(UserError) as refused:
        release.main(version)
    return str(refused.value)


# refusals


def test_what_is_no_version_and_what_others_could_not_get_is_refused(project):
    for name in ("", "1.0", "v1", "latest"):
        assert "write it as VERSION=v1.0.0" in refusal(name)
    text = (project / "params.yaml").read_text(encoding="utf-8")
    (project / "params.yaml").write_text(text.replace("0.1", "0.2"), encoding="utf-8")
    call("dvc", "repro", "--quiet", folder=project)
    call("git", "commit", "-qam", "Beta 0.2", folder=project)
    with (project / "stage.py").open("a") as file:
        file.write("# more\n")
    said = refusal("v1.0.0")
    assert "changes are not committed: stage.py" in said
    assert "dvc.lock is not current: evaluate, preprocess, report" in said
    assert re.search(r"the DVC remote lacks .*models/adapter", said)
    shutil.rmtree(project / ".dvc" / "cache")  # of what is nowhere else, DVC's status says nothing
    assert re.search(r"the DVC remote lacks .*models/adapter", refusal("v1.0.0"))
    assert not call("git", "tag", folder=project)


def test_a_remote_that_others_do_not_have_is_refused(project):
    add = ("dvc", "remote", "add", "--quiet", "-d", "--force")
    call(*add, "--local", "mine", "../storage", folder=project)  # all is there, but storage counts
    shutil.move(project.parent / "storage", project.parent / "elsewhere")
    assert "the DVC remote lacks" in refusal("v1.0.0")
    shutil.move(project.parent / "elsewhere", project.parent / "storage")
    call(*add, "storage", "../storage", folder=project)
    call("git", "commit", "-qam", "A relative path", folder=project)
    said = refusal("v1.0.0")
    assert "storage is a path relative to this clone, which others do not have" in said
    assert f"dvc remote modify storage url {project.parent / 'storage'}" in said
    call("dvc", "remote", "remove", "storage", folder=project)
    call("git", "commit", "-qam", "No remote", folder=project)
    assert "the committed .dvc/config names no remote" in refusal("v1.0.0")
    assert not call("git", "tag", folder=project)


# the tag


def test_the_tag_is_signed_where_git_signs_tags_and_never_moved(project, tmp_path):
    key = tmp_path / "key"
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key), folder=tmp_path)
    signers = f"me {key.with_suffix('.pub').read_text(encoding='utf-8')}"
    (tmp_path / "signers").write_text(signers, encoding="utf-8")
    for name, value in (
        ("gpg.format", "ssh"),
        ("user.signingkey", str(key)),
        ("tag.gpgSign", "true"),
        ("gpg.ssh.allowedSignersFile", str(tmp_path / "signers")),
    ):
        call("git", "config", name, value, folder=project)
    release.main("v1.0.0")
    call("git", "verify-tag", "adapter@v1.0.0", folder=project)
    call("git", "config", "user.signingkey", "", folder=project)
    for version in ("v1.0.0", "v1.0.1"):
        assert f"Git did not make the tag adapter@{version}" in refusal(version)


@pytest.fixture(scope="module")
def released(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``made`` with v1.0.0."""
    place: Path = tmp_path_factory.mktemp("released")
    shutil.copytree(made, place, dirs_exist_ok=True)
    words = ("python", "-m", "stages", "release", "--version", "v1.0.0")
    call(*words, folder=place / "project", PYTHONPATH=str(ROOT))
    return place / "project"


@pytest.fixture
def digest(released: Path) -> str:
    """The hash of the weights that the tag names, which is the one that GTO shows."""
    from gto import api

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(released)
        (shown,) = api.show(".", "adapter")
    assert shown["version"] == "v1.0.0"
    assert shown["commit_hexsha"] == call("git", "rev-parse", "HEAD", folder=released).strip()
    message = call("git", "tag", "-n99", "--list", "adapter@v1.0.0", folder=released)
    assert "win rate 75.0%" in message
    (found,) = re.findall(r"SHA-256 of the weights: (\w+)", message)
    return str(found)


def sha256(adapter: Path) -> str:
    return hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()


# a colleague's side: the commands of docs/serving.md, with another address


@pytest.mark.parametrize("command", ["dvc artifacts get", "dvc get", "dvc import"])
def test_a_colleague_gets_the_released_adapter_without_a_clone(released, digest, tmp_path, command):
    if command == "dvc import":
        call("git", "init", "--quiet", folder=tmp_path)
        call("dvc", "init", "--quiet", folder=tmp_path)
    (line,) = re.findall(rf"(?m)^({command} .*?)(?: +#.*)?$", GUIDE)
    words = [str(released) if word == "$URL" else word for word in line.split()]
    call(*words, folder=tmp_path)
    assert sha256(tmp_path / "adapter") == digest


def test_the_python_of_the_guide_reads_the_weights(released, digest):
    (block,) = re.findall(r"(?s)```python\n([^`]*?dvc\.api.*?)```", GUIDE)
    found: dict[str, Any] = {}
    exec(block.replace('"$URL"', repr(str(released))), found)
    assert hashlib.sha256(found["weights"]).hexdigest() == digest


# the Hub


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[tuple[str, str], Repo]]]:
    repos: dict[tuple[str, str], Repo] = {}
    with serve([Repo("owner/public", {}, token=TOKEN)], writer=TOKEN, made=repos) as url:
        yield url, repos


def published(released: Path, home: Path, url: str, *more: str, token: str = TOKEN) -> str:
    """What ``make publish`` says."""
    settings = {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HOME": str(home)}
    settings |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    settings["HF_HUB_DISABLE_XET"] = "1"  # the server does not know it
    words = ("python", "-m", "stages", "release", "--version", "v1.0.0", *more)
    done = attempt(*words, folder=released, **settings)
    said = done.stdout + done.stderr
    assert (done.returncode == 1) == ("error: " in said), said
    assert "Traceback" not in said
    assert token not in said
    return said


def test_a_version_becomes_a_private_repository_with_the_base_by_name(
    released, digest, hub, tmp_path
):
    url, repos = hub
    for _ in range(2):
        said = published(released, tmp_path, url, "--repo", "owner/name")
        assert f"{url}/owner/name: v1.0.0, private" in said
    repo = repos["model", "owner/name"]
    assert repo.private
    assert set(repo.tags) == {"v1.0.0"}
    assert hashlib.sha256(repo.files[WEIGHTS]).hexdigest() == digest
    assert b"license: cc-by-nc-4.0" in repo.files["README.md"]
    assert {"report.html", "metrics.json", "dvc.lock", "params.yaml"} < set(repo.files)
    config = json.loads(repo.files["adapter_config.json"])
    assert config == {"base_model_name_or_path": "owner/base", "revision": "c" * 40}
    for name, content in repo.files.items():
        assert str(Path.home()).encode() not in content, name


def test_a_public_repository_is_asked_for_by_name(released, hub, tmp_path):
    url, repos = hub
    public = ("--repo", "owner/public")
    said = published(released, tmp_path, url, *public)
    assert "exists and is public; set PUBLIC=1 if this version may be" in said
    assert not repos["model", "owner/public"].files
    assert "v1.0.0, public" in published(released, tmp_path, url, *public, "--public", "1")
    assert repos["model", "owner/public"].files


def test_an_adapter_that_a_term_of_its_data_rules_out_is_refused_until_it_is_accepted(tmp_path):
    release.refuse_forbidden(ROOT / "params" / "demo.yaml")
    with pytest.raises(UserError, match=r"Llama 3 Community License, 1\.b\.v.*I_ACCEPT=1") as told:
        release.refuse_forbidden(ROOT / "params" / "qwen3-vl-4b.yaml")
    assert "helehan/topic-overwrite" in str(told.value)
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert '$${I_ACCEPT:+--accept "$$I_ACCEPT"}' in make


def test_what_is_missing_to_publish_is_named(released, hub, tmp_path, monkeypatch):
    said = published(released, tmp_path, hub[0], "--repo", "owner/name", token="hf_of_a_reader")
    assert "error: not published: " in said
    assert "HF_TOKEN" in said
    monkeypatch.chdir(released)
    for words, told in (
        (("v1.0.0", "owner"), "write REPO=owner/name"),
        (("v2.0.0", "owner/name"), "`make release VERSION=v2.0.0` makes it"),
    ):
        with pytest.raises(UserError, match=told):
            release.main(*words)
