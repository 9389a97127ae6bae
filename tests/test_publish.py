"""Publishing a release, by the real client to a local server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.commands import publish
from stages.core.errors import UserError
from tests.contracts import ROOT
from tests.hub_server import Repo, serve

TOKEN = "hf_of_a_writer"
FILES = {
    "README.md": b"---\nlicense: cc-by-nc-4.0\nlibrary_name: peft\n---\n# The adapter\n",
    "adapter_model.safetensors": b"weights",
    "adapter_config.json": b"{}",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the releases v1.0.0 and v1.10.0."""
    for version in ("v1.0.0", "v1.10.0"):
        folder = tmp_path / "releases" / version
        folder.mkdir(parents=True)
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
        facts = {"version": version, "adapter_sha256": "ab" * 32}
        (folder / "release.json").write_text(json.dumps(facts), encoding="utf-8")
    return tmp_path


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[tuple[str, str], Repo]]]:
    made: dict[tuple[str, str], Repo] = {}
    public = Repo("owner/public", {}, token=TOKEN)
    with serve([public], writer=TOKEN, made=made) as url:
        yield url, made


def run(project: Path, url: str, *arguments: str, token: str = TOKEN) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "stages.commands.publish", *arguments],
        cwd=project,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": url,
            "HF_TOKEN": token,
            "HF_HOME": str(project / "home"),
            "HF_HUB_DISABLE_XET": "1",  # the server knows the older way
            "NO_PROXY": "127.0.0.1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_highest_release_becomes_a_private_repository_with_its_version_as_tag(project, hub):
    url, made = hub
    status, said = run(project, url, "--repo", "owner/name")
    assert status == 0, said
    assert f"{url}/owner/name: v1.10.0, private" in said
    repo = made["model", "owner/name"]
    assert repo.private
    assert {name: repo.files[name] for name in FILES} == FILES
    assert set(repo.tags) == {"v1.10.0"}
    assert run(project, url, "--repo", "owner/name")[0] == 0  # again


def test_a_public_repository_is_asked_for_by_name(project, hub):
    url, made = hub
    status, said = run(project, url, "--repo", "owner/public", "--version", "v1.0.0")
    assert status == 1
    assert "exists and is public; PUBLIC=1 says that this release may be" in said
    assert not made["model", "owner/public"].files
    status, said = run(
        project, url, "--repo", "owner/public", "--version", "v1.0.0", "--public", "1"
    )
    assert status == 0, said
    assert "v1.0.0, public" in said
    assert made["model", "owner/public"].files


def test_a_token_that_may_not_write_is_one_sentence(project, hub):
    status, said = run(project, hub[0], "--repo", "owner/name", token="hf_of_a_reader")
    assert status == 1
    assert said.startswith("error: not published: ")
    assert "HF_TOKEN" in said
    assert "hf_of_a_reader" not in said
    assert "Traceback" not in said


def test_what_is_missing_is_named(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="write REPO=owner/name"):
        publish.main("")
    with pytest.raises(UserError, match=r"`make release VERSION=v2.0.0` makes it"):
        publish.main("owner/name", "v2.0.0")
    with pytest.raises(UserError, match="HF_TOKEN is not set"):
        publish.main("owner/name")
    with pytest.raises(UserError, match="holds no release"):
        publish.main("owner/name", releases=project / "none")
