"""fetch from the Hub, against a real local server that speaks its API (tests/hub_server.py)."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages import fetch as stage
from stages.core.errors import UserError
from stages.params import params
from stages.sources import hub as kind
from stages.sources import source
from stages.sources.hub import HubModel
from tests.contracts import ROOT
from tests.copies import copied_model
from tests.hub_server import (
    DEMO,
    Repo,
    closed_port,
    preset_repos,
    serve,
    topic_overwrite_repo,
)

TOKEN = "hf_" + "s3cret" * 6
GONE = "0123456789abcdef0123456789abcdef01234567"


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def fetch(hub, monkeypatch, tmp_path):
    """``fetch(repo, out)``: a repository as it arrives below ``tmp_path`` from a server."""

    def fetched(
        repo: Repo,
        out: str = "raw",
        *,
        files: tuple[str, ...] = ("*",),
        revision: str = "main",
        url: str = "",
        offline: bool = False,
        **more: Any,
    ) -> source.Source:
        with serve([repo]) as served:
            hub(monkeypatch, tmp_path / "home", url or served, offline)
            monkeypatch.setenv("HF_TOKEN", more.pop("token", ""))
            given = {"repo": more.pop("name", repo.name), "revision": revision, "files": files}
            asked = HubModel.model_validate({"kind": "hub"} | given)
            return kind.fetch(asked, tmp_path / out, repo.type, **more)

    return fetched


@pytest.fixture
def refusal(fetch, tmp_path):
    """``refusal(repo, …)``: the one sentence that fetching ends in."""

    def refused(repo: Repo, *given: Any, **more: Any) -> str:
        with pytest.raises(UserError) as caught:
            fetch(repo, *given, **more)
        text = str(caught.value)
        assert "\n" not in text
        assert "s3cret" not in text
        assert caught.value.__cause__ is None
        assert not (tmp_path / "raw" / "SOURCE.json").exists()
        return text

    return refused


def table(**options: Any) -> Repo:
    return Repo("owner/table", {"rows.jsonl": b'{"question": "a"}\n'}, "dataset", **options)


def model(**changes: bytes | None) -> Repo:
    """The demo's model as a repository, with other files; None takes one out."""
    files = {path.name: path.read_bytes() for path in DEMO.iterdir()} | changes
    return Repo("owner/model", {name: data for name, data in files.items() if data is not None})


# What arrives


def test_a_data_set_arrives_byte_for_byte_and_is_described(fetch, tmp_path):
    repo = topic_overwrite_repo(rows=21, shards=3)
    assert isinstance(repo.files, dict)
    fetched = fetch(repo, files=("*.parquet",))
    arrived = content(tmp_path / "raw")
    written = json.loads(arrived.pop("SOURCE.json"))
    assert arrived == {n: data for n, data in repo.files.items() if n.endswith(".parquet")}
    assert written == {
        "kind": "hub",
        "repo": "helehan/topic-overwrite",
        "revision": "main",
        "commit": repo.snapshots()["main"][0],
        "licence": "cc-by-nc-4.0",
        "patterns": ["*.parquet"],
        "files": [
            {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in sorted(arrived.items())
        ],
    }
    assert source.read(tmp_path / "raw") == fetched


def test_a_branch_a_tag_and_a_commit_are_resolved_and_the_commit_recorded(fetch, tmp_path):
    repo = table(commit=GONE, tags={"v1": {"rows.jsonl": b'{"question": "old"}\n'}})
    assert (main := fetch(repo, "main")).commit == GONE
    tag = fetch(repo, "tag", revision="v1")
    assert (tag.revision, tag.commit) == ("v1", repo.snapshots()["v1"][0])
    assert b"old" in (tmp_path / "tag" / "rows.jsonl").read_bytes()
    assert fetch(repo, "pinned", revision=GONE).files == main.files


def test_right_files_are_kept_and_wrong_and_stale_ones_replaced(fetch, tmp_path):
    repo = topic_overwrite_repo(rows=6)
    first = fetch(repo)
    (tmp_path / "raw" / "left-over.parquet").write_bytes(b"of another revision")
    damaged = tmp_path / "raw" / "TPO-Dataset_001-3.parquet"
    linked = tmp_path / "in-the-cache-of-dvc"
    linked.hardlink_to(damaged)
    damaged.write_bytes(wrong := damaged.read_bytes()[:-1] + b"x")
    repo.requests.clear()
    assert fetch(repo) == first
    assert {asked.file for asked in repo.downloads()} == {damaged.name}
    assert set(content(tmp_path / "raw")) == {file.path for file in first.files} | {"SOURCE.json"}
    assert linked.read_bytes() == wrong  # replaced, not written into


def test_a_commit_that_is_all_here_asks_the_network_nothing(fetch, tmp_path):
    repo = topic_overwrite_repo(rows=6)
    commit = repo.snapshots()["main"][0]
    first = fetch(repo, files=("*.parquet",), revision=commit)
    repo.requests.clear()
    assert fetch(repo, files=("*.parquet",), revision=commit, offline=True) == first
    assert repo.requests == []
    # Other patterns are judged by what the commit holds, not by what was fetched.
    wider = fetch(repo, files=("*.parquet", "*.md"), revision=commit)
    assert len(wider.files) == len(first.files) + 1
    repo.requests.clear()
    fetch(repo, files=("*.parquet", "*.md"))
    assert repo.requests  # a branch can move, so it is looked up each time


def test_after_a_kill_what_was_complete_is_not_asked_for_again(fetch, tmp_path):
    files = {f"{i}.parquet": b"%d" % i * 3_000_000 for i in range(5)}
    repo = Repo("owner/data", files, "dataset", hang=["4.parquet"])
    code = (
        "from pathlib import Path; from stages.sources import hub;"
        "asked = hub.HubData(kind='hub', repo='owner/data', revision='main', files=['*']);"
        "hub.fetch(asked, Path('raw'), 'dataset')"
    )
    with serve([repo]) as url:
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "HF_ENDPOINT": url, "HF_HOME": "home", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "raw").glob("*.parquet"))) < 4:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
    repo.requests.clear()
    repo.hang = ()
    fetch(repo)
    assert {asked.file for asked in repo.downloads()} == {"4.parquet"}
    assert content(tmp_path / "raw").keys() == {*files, "SOURCE.json"}


def test_a_download_by_xet_moves_the_one_bar(fetch, monkeypatch, capsys):
    """Its storage is not served here: the library's own reporter is used as the library does."""
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    def download(_: str, path: str, *, local_dir: Path, tqdm_class: Any, **more: Any) -> None:
        (local_dir / path).write_bytes(table().files[path])  # type: ignore[index]
        told = {"total_bytes": 18, "total_bytes_completed": 18, "total_bytes_completion_rate": 1.0}
        told |= {"total_transfer_bytes_completed": 9, "total_transfer_bytes_completion_rate": 1.0}
        bars = XetDownloadProgressReporter(
            reconstruction_desc=path, total=18, log_level=20, tqdm_class=tqdm_class
        )
        with bars as progress:
            progress.update_progress(SimpleNamespace(**told))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("stages.core.console.PAUSE", 0)
    fetch(table())
    assert "owner/table: 18 of 18 B" in capsys.readouterr().err


def test_the_token_reaches_the_hub_but_not_the_storage_it_leads_to(fetch):
    repo = topic_overwrite_repo(rows=2, shards=1, gated=True, token=TOKEN)
    fetch(repo, files=("*.parquet",), token=TOKEN)
    sent = {(asked.at_storage, asked.headers.get("authorization")) for asked in repo.requests}
    assert sent == {(False, f"Bearer {TOKEN}"), (True, None)}


# What may arrive


def test_pickles_code_and_hidden_files_stay_where_they_are_unless_allowed(fetch, tmp_path, capsys):
    extra = {"pytorch_model.bin": b"pickle", "modeling.py": b"import os", "x.ckpt": b"pickle"}
    repo = model(**extra, **{".hidden/x.json": b"{}"})
    fetch(repo)
    assert set(content(tmp_path / "raw")) == {*(p.name for p in DEMO.iterdir()), "SOURCE.json"}
    assert "modeling.py, pytorch_model.bin, x.ckpt" in capsys.readouterr().out
    assert not {asked.file for asked in repo.downloads()} & set(extra)
    fetch(repo, allow_pickle=True, allow_code=True)
    assert set(extra) <= set(content(tmp_path / "raw"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model.safetensors": None}, "taken; it holds no weights"),
        ({"model.safetensors": None, "model.bin": b"x"}, "it holds model.bin.*a pickle can run"),
        ({"config.json": b'{"model_type": "llama"}'}, "model_type llama, but this pipeline tunes"),
        ({"config.json": None}, "no config.json"),
    ],
)
def test_a_model_that_can_not_be_used_is_refused_before_its_weights(
    refusal, tmp_path, changes, told
):
    repo = model(**changes)
    assert re.search(told, refusal(repo))
    assert not any(kind.base_model.is_weights(str(asked.file)) for asked in repo.downloads())
    assert isinstance(repo.files, dict)
    for name, data in repo.files.items():
        (tmp_path / "local").mkdir(exist_ok=True)
        (tmp_path / "local" / name).write_bytes(data)
    with pytest.raises(UserError, match=told):
        copied_model(tmp_path / "local", tmp_path / "copied")
    assert not (tmp_path / "copied").exists()


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a//x", "a\\x", "C:x"])
def test_names_that_no_folder_may_hold_are_refused(refusal, tmp_path, name):
    repo = Repo("owner/data", {"rows.json": b"[]", name: b"[]"}, "dataset")
    assert "leads out of its folder" in refusal(repo, "deep/raw")
    assert not (tmp_path / "deep").exists()


def test_a_folder_that_fetch_did_not_make_is_never_cleared(refusal, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "thesis.txt").write_text("years of work")
    assert "holds files that fetch did not put there" in refusal(table())
    assert content(tmp_path / "raw") == {"thesis.txt": b"years of work"}


# What goes wrong: one sentence with the fix


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "gated": ({"gated": True, "token": TOKEN}, {}, r"is gated.*datasets/owner/table.*HF_TOKEN"),
    "private": ({"private": True, "token": TOKEN}, {}, "was not found, or needs another token"),
    "misspelt": ({}, {"name": "owner/tabel"}, "was not found, or needs another token"),
    "not found": ({"token": TOKEN}, {"name": "no/such", "token": TOKEN}, "was not found"),
    "another token": (
        {"gated": True, "token": "other"},
        {"token": TOKEN},
        "was not found, or needs another",
    ),
    "no such commit": ({}, {"revision": GONE}, f"no revision {GONE}"),
    "no such branch": ({}, {"revision": "mian"}, "no revision mian"),
    "no such file": ({}, {"files": ("*.csv",)}, r"no file matches \*.csv; .* holds rows\.jsonl"),
    "broken": ({"status": 500}, {}, "answers HTTP 500"),
    "forbidden": ({"status": 403}, {}, "needs another token"),
    "too often": ({"status": 429}, {}, "HTTP 429.*; wait a few minutes"),
    "altered": ({"wrong": ["rows.jsonl"]}, {}, "rows.jsonl does not have the content"),
    "cut": ({"short": ["rows.jsonl"]}, {}, "rows.jsonl does not have|arrived incomplete"),
    "offline": ({}, {"offline": True}, "HF_HUB_OFFLINE is set"),
    "no network": ({}, {"url": "http://no-such-host.invalid"}, "can't be reached"),
    "no answer": ({}, {"url": closed_port().replace("//", "//user:s3cret@")}, "can't be reached"),
    "no address": ({}, {"url": "localhost/hub"}, "check the network, the proxy and HF_ENDPOINT"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_each_failure_of_the_hub_is_one_sentence_with_the_fix(refusal, what, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    options, given, told = REFUSALS[what]
    text = refusal(table(**options), **given)
    assert re.search(told, text), text


def test_what_does_not_answer_as_a_hub_is_told(refusal, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: json.loads("<html>"))
    assert "does not answer as a Hugging Face Hub does" in refusal(table())


def test_too_little_room_is_said_before_anything_is_downloaded(refusal, monkeypatch):
    repo = table()
    usage = type("Usage", (), {"free": 5})()
    monkeypatch.setattr(source.shutil, "disk_usage", lambda _: usage)
    assert "needs 18 bytes on the disk" in refusal(repo)
    assert repo.downloads() == []


# The stage


def test_the_stage_fetches_what_a_preset_names(hub, tmp_path, monkeypatch):
    shutil.copy(ROOT / "params" / "qwen3-vl-4b.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    p = params.load()
    items = [*(f"data.sources.{name}" for name in p.data.sources), "model.source"]
    with serve(preset_repos(p, DEMO, rows=6)) as url:
        hub(monkeypatch, tmp_path / "home", url)
        for item in items:
            stage.main(item, Path(item))
    for item, asked in zip(items, [*p.data.sources.values(), p.model.source], strict=True):
        assert isinstance(asked, HubModel)
        assert source.read(Path(item)).commit == asked.revision
    with pytest.raises(UserError, match=r"no data\.sources\.topic-overwrit.*topic-overwrite'\?"):
        stage.main("data.sources.topic-overwrit", Path("x"))
