"""Sharing through a remote: pushed here, pulled in a fresh clone, nothing left to do there.

Remotes are a folder, S3 by moto's server, and SSH by asyncssh's (with ``make extras``).
"""

import hashlib
import json
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.contracts import ROOT
from tests.repository import (
    PARAMS,
    PUT,
    attempt,
    call,
    clone,
    commit_and_push,
    free_port,
    hashes,
    make,
    wait_for,
)
from tests.test_secrets import PLANTED, leaks

pytestmark = pytest.mark.slow

STAGE = (
    PUT
    + PARAMS
    + """
if sys.argv[1] == "data":
    for i in range(20):
        put(f"data/pairs/{i}.txt", f"pair {i} of {p['preprocess']}")
if sys.argv[1] == "train":
    put("models/adapter/weights", json.dumps(p["train"]))
    put("reports/curves/train.csv", "step,loss")
if sys.argv[1] == "evaluate":
    put("reports/results/metrics.json", json.dumps({"win_rate": p["train"]["beta"]}))
"""
)
ADVICE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").partition("## Share")[2]
KEYS = {**PLANTED, "AWS_DEFAULT_REGION": "us-east-1"}
SSH_SERVER = """
import asyncio, sys
import asyncssh

async def main(port, folder):
    server = await asyncssh.listen(
        "127.0.0.1", int(port), server_host_keys=[f"{folder}/host"],
        authorized_client_keys=f"{folder}/id_ed25519.pub", sftp_factory=True)
    await server.wait_closed()

asyncio.run(main(*sys.argv[1:]))
"""


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


@contextmanager
def ssh_server(home, port):
    """An SSH server of this machine's files, for who has the key in ``home``."""
    words = [sys.executable, "-c", SSH_SERVER, str(port), str(home / ".ssh")]
    server = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
        yield
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def ssh(tmp_path_factory):
    """The home folder of one who has an SSH key, and the port of a real SSH server."""
    pytest.importorskip("dvc_ssh", reason="dvc-ssh is not installed: make extras")
    home, port = tmp_path_factory.mktemp("home"), free_port()
    (home / ".ssh").mkdir(mode=0o700)
    for name in ("host", "id_ed25519"):
        make_key(home / ".ssh" / name)
    with ssh_server(home, port):
        yield home, port


def make_key(file):
    import asyncssh

    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(file)
    key.write_public_key(f"{file}.pub")


@pytest.fixture(scope="module", params=["folder", "s3", "ssh"])
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
    if request.param == "ssh":
        home, port = request.getfixturevalue("ssh")
        environment = {**PLANTED, "HOME": str(home)}
        settings = (("url", f"ssh://127.0.0.1{folder}/storage"), ("port", str(port)))
    for name, value in settings:
        call("dvc", "remote", "modify", "-q", "storage", name, value, folder=project)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSH_AUTH_SOCK", raising=False)  # the agent of whoever runs the tests
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
    assert len(list((fresh / "data/pairs").iterdir())) == 20
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


def test_another_repository_gets_an_output_or_imports_it(local, tmp_path):
    origin = str(local.parent / "origin.git")
    call("dvc", "get", "-q", origin, "models/adapter", "-o", "got", folder=tmp_path)
    assert json.loads((tmp_path / "got/weights").read_text())["beta"] == 0.1
    read = "dvc.api.read('models/adapter/weights', repo=sys.argv[1], rev='main')"
    said = call("python", "-c", f"import dvc.api, sys; print({read})", origin, folder=tmp_path)
    assert '"beta": 0.1' in said
    there = tmp_path / "there"
    there.mkdir()
    call("git", "init", "--quiet", folder=there)
    call("dvc", "init", "--quiet", folder=there)
    call("dvc", "import", "-q", origin, "models/adapter", "-o", "adapter", folder=there)
    imported = (there / "adapter.dvc").read_text()
    commit = call("git", "rev-parse", "HEAD", folder=local).strip()
    assert f"rev_lock: {commit}" in imported
    shutil.rmtree(there / "adapter")
    call("dvc", "pull", "-q", folder=there)  # from the first one's remote
    assert json.loads((there / "adapter/weights").read_text())["beta"] == 0.1
    call("dvc", "update", "-q", "adapter.dvc", folder=there)
    assert (there / "adapter.dvc").read_text() == imported
    assert "weights" in call("dvc", "list", "--size", origin, "models/adapter", folder=there)
    assert "models/adapter" in call("dvc", "du", origin, "models", folder=there)


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


def test_what_was_never_pushed_is_named_and_made_by_repro(local, tmp_path):
    here, empty = clone(local, tmp_path / "clone"), str(tmp_path / "empty")
    call("dvc", "remote", "add", "-q", "--local", "-d", "empty", empty, folder=here)
    done = attempt("dvc", "pull", folder=here)
    assert done.returncode
    assert "data/pairs" in done.stderr
    assert "Traceback" not in done.stderr
    call("dvc", "repro", "--quiet", folder=here)
    assert hashes(here) == hashes(local)


# SSH


@pytest.fixture
def by_ssh(ssh, local, tmp_path, monkeypatch):
    """A clone whose remote is an SSH server, where everything was pushed, and who may get in."""
    home, port = ssh
    here = clone(local, tmp_path / "clone")
    store = tmp_path / "storage"
    shutil.copytree(local.parent / "storage", store)
    settings = (("url", f"ssh://127.0.0.1{store}"), ("port", str(port)))
    for name, value in settings:
        call("dvc", "remote", "modify", "--local", "storage", name, value, folder=here)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setenv("HOME", str(home))
    return here


@pytest.mark.parametrize(
    ("setting", "told"),
    [("keyfile", "Permission denied for user"), ("port", "Connect call failed")],
)
def test_an_ssh_server_that_is_gone_or_does_not_know_the_key_is_one_message(
    by_ssh, tmp_path, setting, told
):
    make_key(tmp_path / "another")
    value = {"keyfile": str(tmp_path / "another"), "port": str(free_port())}[setting]
    call("dvc", "remote", "modify", "--local", "storage", setting, value, folder=by_ssh)
    done = attempt("dvc", "pull", folder=by_ssh)
    assert done.returncode
    assert "Traceback" not in done.stderr
    assert "failed to connect to ssh" in done.stderr
    assert told in done.stderr
    assert not (by_ssh / "data/pairs").exists()


def test_dvc_takes_any_host_for_the_right_one_and_verify_shows_what_was_changed(
    by_ssh, ssh, tmp_path
):
    """As the guide says. If the first part fails, DVC checks keys of hosts now: mend the guide."""
    assert "does not check the host's key" in ADVICE
    home, _ = ssh
    another, port = tmp_path / "home", free_port()
    shutil.copytree(home, another)
    make_key(another / ".ssh" / "host")
    known = (home / ".ssh" / "host.pub").read_text()
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {known}")
    modify = ("dvc", "remote", "modify", "--local", "storage")
    call(*modify, "port", str(port), folder=by_ssh)
    for file in (tmp_path / "storage").rglob("*"):
        if file.is_file() and file.read_text() == "pair 3 of 1":
            file.chmod(0o644)
            file.write_text("something else")
    with ssh_server(another, port):
        call(*modify, "verify", "true", folder=by_ssh)
        done = attempt("dvc", "pull", "data/pairs", folder=by_ssh)
        assert done.returncode
        assert "Traceback" not in done.stderr
        call(*modify, "verify", "false", folder=by_ssh)
        call("dvc", "pull", "-q", "data/pairs", folder=by_ssh)
    assert (by_ssh / "data/pairs/3.txt").read_text() == "something else"


# places and links


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    project = make(tmp_path_factory.mktemp("local"), STAGE)
    call("dvc", "repro", "--quiet", folder=project)
    commit_and_push(project)
    return project


@pytest.mark.parametrize("link", ["hardlink,copy", "symlink"])
def test_a_linked_cache_stores_once_and_survives_another_experiment(local, tmp_path, link):
    here = clone(local, tmp_path / "clone")
    call("dvc", "config", "--local", "cache.type", link, folder=here)
    call("dvc", "pull", "--quiet", folder=here)
    file = here / "data/pairs/3.txt"
    digest = hashlib.md5(file.read_bytes()).hexdigest()
    kept = here / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    assert file.samefile(kept)  # one inode
    assert file.is_symlink() == (link == "symlink")
    before = hashes(here)
    call("dvc", "exp", "run", "-q", "-S", "train.beta=0.3", folder=here)
    call("git", "checkout", "--quiet", "--force", ".", folder=here)
    call("dvc", "checkout", "--quiet", "--force", folder=here)
    assert hashes(here) == before
    assert json.loads((here / "models/adapter/weights").read_text())["beta"] == 0.1
    assert "up to date" in call("dvc", "status", folder=here)


def test_two_people_with_different_parameters_share_one_remote(local, tmp_path):
    people = {"ann": "0.6", "bob": "0.7"}
    for name, beta in people.items():
        here = clone(local, tmp_path / name)
        text = (here / "params.yaml").read_text()
        (here / "params.yaml").write_text(text.replace("beta: 0.1", f"beta: {beta}"))
        call("dvc", "repro", "-q", "--pull", folder=here)
        call("git", "checkout", "-q", "-b", name, folder=here)
        call("git", "commit", "-qam", f"As {name} wants it", folder=here)
        call("dvc", "push", "-q", folder=here)
        call("git", "push", "-q", "origin", name, folder=here)
    for name, other in (("ann", "bob"), ("bob", "ann")):
        here = tmp_path / name
        assert "up to date" in call("dvc", "status", folder=here)
        call("git", "fetch", "-q", folder=here)
        call("git", "checkout", "-q", other, folder=here)
        call("dvc", "pull", "-q", folder=here)
        weights = json.loads((here / "models/adapter/weights").read_text())
        assert weights["beta"] == float(people[other])
        assert "up to date" in call("dvc", "repro", folder=here)


@pytest.mark.parametrize("kind", ["moved", "worktree", "shallow", "detached", "shared cache"])
def test_a_project_works_wherever_it_is(local, tmp_path, kind):
    here = tmp_path / "here"
    if kind == "moved":
        clone(local, tmp_path / "before")
        call("dvc", "pull", "--quiet", folder=tmp_path / "before")
        (tmp_path / "before").rename(here)
    elif kind == "worktree":
        clone(local, tmp_path / "before")
        call("git", "worktree", "add", "--quiet", str(here), folder=tmp_path / "before")
    elif kind == "shallow":
        origin = f"file://{local.parent / 'origin.git'}"
        call("git", "clone", "--quiet", "--depth", "1", origin, str(here), folder=tmp_path)
    else:
        clone(local, here)
        if kind == "detached":
            call("git", "checkout", "--quiet", "--detach", folder=here)
        if kind == "shared cache":
            cache = str(tmp_path / "cache")
            other = clone(local, tmp_path / "other")
            for one in (here, other):
                call("dvc", "cache", "dir", "--local", cache, folder=one)
            call("dvc", "pull", "--quiet", folder=other)
            shutil.move(local.parent / "storage", tmp_path / "away")  # the cache is enough
            try:
                call("dvc", "checkout", "--quiet", folder=here)
            finally:
                shutil.move(tmp_path / "away", local.parent / "storage")
    if kind != "shared cache":
        call("dvc", "pull", "--quiet", folder=here)
    assert "up to date" in call("dvc", "status", folder=here)
    call("dvc", "exp", "run", "-q", "-S", "train.beta=0.2", "-n", "here", folder=here)
    assert "here" in call("dvc", "exp", "list", "--name-only", folder=here)
    assert (here / "models/adapter/weights").exists()
