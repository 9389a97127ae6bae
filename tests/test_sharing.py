"""Sharing through a remote: pushed here, pulled in a fresh clone, nothing left to do there.

Remotes are a folder, and S3 by moto's server.
"""

import json
import shutil
import socket
import subprocess
import sys
import time

import pytest

from tests.contracts import ROOT
from tests.repository import attempt, call
from tests.test_way_back import clone, commit_and_push, hashes, make

STAGE = """
import json, pathlib, sys
from ruamel.yaml import YAML
p = YAML(typ="safe", pure=True).load(pathlib.Path("params.yaml").read_text())
def put(path, text):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(text)
if sys.argv[1] == "data":
    for i in range(20):
        put(f"data/pairs/{i}.txt", f"pair {i} of {p['preprocess']}")
if sys.argv[1] == "train":
    put("models/adapter/weights", json.dumps(p["train"]))
    put("reports/curves/train.csv", "step,loss")
if sys.argv[1] == "evaluate":
    put("reports/results/metrics.json", json.dumps({"win_rate": p["train"]["beta"]}))
"""
ADVICE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").partition("## Share")[2]
KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def s3():
    """The address of a real S3 server, with a bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        import botocore.session

        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id="x",
            aws_secret_access_key="y",
            region_name="us-east-1",
        )
        for _ in range(100):
            try:
                client.create_bucket(Bucket="shared")
                break
            except Exception:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module", params=["folder", "s3"])
def shared(request, tmp_path_factory):
    """A project that was run and pushed, with an experiment ``warm``, and what its remote needs."""
    folder = tmp_path_factory.mktemp("shared")
    project = make(folder, STAGE)
    environment = {}
    if request.param == "s3":
        address = request.getfixturevalue("s3")
        environment = KEYS
        settings = (("url", "s3://shared/store"), ("endpointurl", address))
        for name, value in settings:
            call("dvc", "remote", "modify", "-q", "storage", name, value, folder=project)
    with pytest.MonkeyPatch.context() as patch:
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


@pytest.mark.slow
def test_a_fresh_clone_pulls_and_has_nothing_left_to_do(shared, fresh):
    call("dvc", "pull", "--quiet", folder=fresh)
    assert len(list((fresh / "data/pairs").iterdir())) == 20
    assert "up to date" in call("dvc", "status", folder=fresh)
    assert "up to date" in call("dvc", "repro", folder=fresh)
    assert call("git", "status", "--porcelain", folder=fresh) == ""


@pytest.mark.slow
def test_one_folder_can_be_pulled_alone(shared, fresh):
    call("dvc", "pull", "--quiet", "models/adapter", folder=fresh)
    assert json.loads((fresh / "models/adapter/weights").read_text())["beta"] == 0.1
    assert not (fresh / "data/pairs").exists()


@pytest.mark.slow
def test_an_experiment_is_pulled_with_its_adapter_and_applied(shared, fresh):
    call("dvc", "pull", "--quiet", folder=fresh)
    call("dvc", "exp", "pull", "--quiet", "origin", "warm", folder=fresh)
    call("dvc", "exp", "apply", "--quiet", "warm", folder=fresh)
    assert json.loads((fresh / "models/adapter/weights").read_text())["beta"] == 0.4
    assert "up to date" in call("dvc", "status", folder=fresh)


@pytest.mark.slow
def test_another_repository_gets_an_output_at_a_revision(shared, tmp_path):
    origin = str(shared.parent / "origin.git")
    call("dvc", "get", "-q", origin, "models/adapter", "-o", "got", folder=tmp_path)
    assert json.loads((tmp_path / "got/weights").read_text())["beta"] == 0.1
    read = (
        "import dvc.api, sys; print(dvc.api.read('models/adapter/weights', repo=sys.argv[1], "
        "rev='main'))"
    )
    assert '"beta": 0.1' in call("python", "-c", read, origin, folder=tmp_path)


@pytest.mark.slow
def test_another_repository_imports_an_output_and_updates_it(local, tmp_path):
    origin = str(local.parent / "origin.git")
    there = tmp_path / "there"
    there.mkdir()
    call("git", "init", "--quiet", folder=there)
    call("dvc", "init", "--quiet", folder=there)
    call("dvc", "import", "-q", origin, "models/adapter", "-o", "adapter", folder=there)
    assert json.loads((there / "adapter/weights").read_text())["beta"] == 0.1
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_was_never_pushed_is_named_and_made_by_repro(shared, fresh, tmp_path):
    call(
        "dvc",
        "remote",
        "add",
        "-q",
        "--local",
        "-d",
        "empty",
        str(tmp_path / "empty"),
        folder=fresh,
    )
    done = attempt("dvc", "pull", folder=fresh)
    assert done.returncode
    assert "data/pairs" in done.stderr
    assert "Traceback" not in done.stderr
    call("dvc", "repro", "--quiet", folder=fresh)
    assert hashes(fresh) == hashes(shared)


# places and links


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    project = make(tmp_path_factory.mktemp("local"), STAGE)
    call("dvc", "repro", "--quiet", folder=project)
    commit_and_push(project)
    return project


@pytest.mark.slow
@pytest.mark.parametrize("link", ["hardlink,copy", "symlink"])
def test_a_linked_cache_stores_once_and_survives_another_experiment(local, tmp_path, link):
    here = clone(local, tmp_path / "clone")
    call("dvc", "config", "--local", "cache.type", link, folder=here)
    call("dvc", "pull", "--quiet", folder=here)
    file = here / "data/pairs/3.txt"
    assert file.is_symlink() or file.stat().st_nlink > 1
    before = hashes(here)
    call("dvc", "exp", "run", "-q", "-S", "train.beta=0.3", folder=here)
    call("git", "checkout", "--quiet", "--force", ".", folder=here)
    call("dvc", "checkout", "--quiet", "--force", folder=here)
    assert hashes(here) == before
    assert json.loads((here / "models/adapter/weights").read_text())["beta"] == 0.1
    assert "up to date" in call("dvc", "status", folder=here)


@pytest.mark.slow
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
