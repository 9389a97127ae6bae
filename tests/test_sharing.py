"""Sharing through a remote: pushed here, pulled in a fresh clone, nothing left to do there.

Remotes are a folder, and S3 by moto's server.
"""

import json
import shutil
import socket
import subprocess
import sys

import pytest

from tests.contracts import ROOT
from tests.repository import (
    STAGES,
    attempt,
    call,
    clone,
    commit_and_push,
    free_port,
    make,
    wait_for,
)
from tests.test_secrets import PLANTED, leaks

pytestmark = pytest.mark.slow

STAGE = f"TRACKED = False\n{STAGES}"
ADVICE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").partition("## Share")[2]
KEYS = {**PLANTED, "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def s3():
    """The address of a real S3 server, with a bucket."""
    import botocore.session

    port = free_port()
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
        keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
        address = f"http://127.0.0.1:{port}"
        client = botocore.session.get_session().create_client(
            "s3", region_name="us-east-1", endpoint_url=address, **keys
        )
        client.create_bucket(Bucket="shared")
        yield address
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module", params=["folder", "s3"])
def shared(request, tmp_path_factory):
    """A project that was run and pushed, with an experiment ``warm``, and what its remote needs."""
    folder = tmp_path_factory.mktemp("shared")
    project = make(folder, STAGE)
    environment: dict[str, str] = PLANTED
    settings: tuple[tuple[str, str], ...] = ()
    if request.param == "s3":
        address = request.getfixturevalue("s3")
        environment = KEYS
        settings = (("url", "s3://shared/store"), ("endpointurl", address))
    for name, value in settings:
        call("dvc", "remote", "modify", "-q", "storage", name, value, folder=project)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", str(folder / "site"))
        for name, value in environment.items():
            patch.setenv(name, value)
        call("dvc", "repro", "--quiet", folder=project)
        commit_and_push(project)
        run = ("dvc", "exp", "run", "--quiet", "-S", "train.beta=0.4", "-n", "warm")
        call(*run, folder=project)
        call("git", "checkout", "--quiet", "--force", "main", folder=project)
        call("dvc", "checkout", "--quiet", "--force", folder=project)
        call("dvc", "exp", "push", "--quiet", "origin", "warm", folder=project)
        yield project


@pytest.fixture
def fresh(shared, tmp_path):
    return clone(shared, tmp_path / "clone")


def test_a_fresh_clone_pulls_one_folder_or_all_or_an_experiment(shared, fresh):
    def beta():
        return json.loads((fresh / "models/adapter/weights").read_text())["beta"]

    call("dvc", "pull", "--quiet", "models/adapter", folder=fresh)
    assert beta() == 0.1
    assert not (fresh / "data/pairs").exists()
    call("dvc", "pull", "--quiet", folder=fresh)
    assert "up to date" in call("dvc", "repro", folder=fresh)
    assert call("git", "status", "--porcelain", folder=fresh) == ""
    call("dvc", "exp", "pull", "--quiet", "origin", "warm", folder=fresh)
    call("dvc", "exp", "apply", "--quiet", "warm", folder=fresh)
    assert beta() == 0.4
    assert "up to date" in call("dvc", "status", folder=fresh)


def test_no_password_or_token_is_in_what_dvc_leaves(shared, fresh, tmp_path):
    call("dvc", "pull", "--quiet", folder=fresh)
    said = attempt("dvc", "push", "--verbose", folder=fresh)
    run = attempt("dvc", "exp", "run", "-v", "-S", "train.beta=0.5", "--temp", folder=fresh)
    assert said.returncode == run.returncode == 0
    for folder in (shared.parent, fresh):  # remote, .dvc/tmp and DVC's cache of the machine too
        assert leaks(folder, said.stdout, said.stderr, run.stdout, run.stderr) == []
    assert list((fresh / ".dvc/tmp").rglob("*.run"))


def test_what_the_guide_says_of_gc_deletes_nothing_that_a_commit_or_an_experiment_needs(
    tmp_path,
):
    project = make(tmp_path, STAGE)
    call("dvc", "repro", "--quiet", folder=project)
    commit_and_push(project)
    names = {"0.2": "kept", "0.3": "branch", "0.4": "removed"}
    for beta, name in names.items():
        call("dvc", "exp", "run", "-q", "-S", f"train.beta={beta}", "-n", name, folder=project)
    call("git", "checkout", "--quiet", "--force", "main", folder=project)
    call("dvc", "exp", "branch", "-q", "branch", "of-its-own", folder=project)
    call("dvc", "exp", "remove", "-q", "branch", "removed", folder=project)
    call("dvc", "checkout", "--quiet", "--force", folder=project)

    (said,) = [line for line in ADVICE.splitlines() if line.startswith("dvc gc ")]
    call(*said.split("#")[0].split(), "--force", folder=project)

    shutil.move(tmp_path / "storage", tmp_path / "away")  # the cache alone has to be enough
    for revision, wanted in (("of-its-own", 0.3), ("main", 0.1)):
        call("git", "checkout", "--quiet", revision, folder=project)
        call("dvc", "checkout", "--quiet", folder=project)
        assert json.loads((project / "models/adapter/weights").read_text())["beta"] == wanted
    call("dvc", "exp", "apply", "-q", "kept", folder=project)
    assert json.loads((project / "models/adapter/weights").read_text())["beta"] == 0.2
    objects = [
        file.read_text()
        for file in (project / ".dvc/cache/files").rglob("*")
        if file.is_file() and file.suffix != ".dir"
    ]
    assert not any('"beta": 0.4' in content for content in objects)  # it does delete
