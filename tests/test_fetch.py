"""fetch, against a real local server that speaks the Hub's API (tests/hub_server.py)."""

import functools
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import huggingface_hub
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from stages import fetch
from stages.core.errors import UserError
from stages.params import params
from stages.sources import download, easyvqa, hub, local, manifest
from tests.copies import copied_data, copied_model
from tests.hub_server import (
    COLUMNS,
    PAGE_SIZE,
    Answer,
    Repo,
    answering,
    closed_port,
    model_files,
    safetensors_bytes,
    serve,
    topic_overwrite_repo,
)

PROJECT = Path(__file__).resolve().parent.parent
TOKEN = "hf_" + "s3cret" * 6
GONE = "0123456789abcdef0123456789abcdef01234567"
PATTERNS = ["*.parquet"]

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def _no_proxy():
    """The server is on this machine, whatever proxy leads out. Read when the client starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        yield
    huggingface_hub.close_session()


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token or cache of the machine takes part."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)


def on_hub(name: str, files: Iterable[str] = ("*",), revision: str = "main") -> hub.HubData:
    return hub.HubData(kind="hub", repo=name, revision=revision, files=list(files))


def fetch_data(repo: Repo, out: Path, revision: str = "main", **options) -> manifest.Source:
    with serve([repo]) as url:
        source = on_hub(repo.name, options.pop("files", PATTERNS), revision)
        return hub.fetch(source, out, repo_type="dataset", endpoint=url, **options)


def fetch_model(repo: Repo, out: Path, **options) -> manifest.Source:
    with serve([repo]) as url:
        source = on_hub(repo.name, options.pop("files", local.MODEL_FILES))
        return hub.fetch(source, out, repo_type="model", endpoint=url, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tiny_table(text: str = "a") -> Repo:
    return Repo("owner/table", {"rows.jsonl": f'{{"question": "{text}"}}\n'.encode()}, "dataset")


# ---- data sets on the Hub ------------------------------------------------------------------------


@pytest.mark.parametrize("image_as", ["struct", "bytes"])
def test_a_data_set_laid_out_as_topic_overwrite_arrives_byte_for_byte(tmp_path, image_as):
    repo = topic_overwrite_repo(rows=21, shards=3, image_as=image_as)
    source = fetch_data(repo, tmp_path / "raw")
    (_, files) = repo.snapshots()["main"]
    published = {name: bytes(files[name]) for name in files if name.endswith(".parquet")}
    arrived = content(tmp_path / "raw")
    written = json.loads(arrived.pop("SOURCE.json"))
    assert arrived == published
    assert sorted(arrived) == [f"TPO-Dataset_{i:03d}-7.parquet" for i in range(3)]
    assert list(written) == ["kind", "repo", "revision", "commit", "licence", "files"]
    assert written["kind"] == "hub"
    assert written["repo"] == "helehan/topic-overwrite"
    assert written["licence"] == "cc-by-nc-4.0"
    assert written["files"] == [
        {"path": name, "size": len(data), "sha256": sha256(data)}
        for name, data in sorted(published.items())
    ]
    assert manifest.read(tmp_path / "raw") == source
    table = pq.read_table(io.BytesIO(arrived["TPO-Dataset_000-7.parquet"]))
    assert table.column_names == list(COLUMNS)
    image = table["image"][0].as_py()
    assert (image["bytes"] if image_as == "struct" else image).startswith(b"\xff\xd8")


def test_a_branch_a_tag_and_a_commit_are_resolved_and_the_commit_recorded(tmp_path):
    repo = tiny_table("new")
    repo.tags = {"v1": {"rows.jsonl": b'{"question": "old"}\n'}}
    repo.commit = "818d38f423af7791b07a6f1dbd7e67cc507bdcb8"
    main = fetch_data(repo, tmp_path / "main", "main", files=["*.jsonl"])
    tag = fetch_data(repo, tmp_path / "tag", "v1", files=["*.jsonl"])
    pinned = fetch_data(repo, tmp_path / "pinned", repo.commit, files=["*.jsonl"])
    assert (main.revision, main.commit) == ("main", repo.commit)
    assert tag.revision == "v1"
    assert tag.commit not in ("v1", repo.commit)
    assert b"old" in (tmp_path / "tag" / "rows.jsonl").read_bytes()
    assert pinned.files == main.files


def test_two_fetches_write_the_same_bytes_and_no_host_or_place(tmp_path):
    repo = topic_overwrite_repo(rows=4, shards=1)
    for name in ("one", "two"):
        fetch_data(repo, tmp_path / name)  # each time from another port
    assert content(tmp_path / "one") == content(tmp_path / "two")
    text = (tmp_path / "one" / "SOURCE.json").read_text()
    assert "127.0.0.1" not in text
    assert str(tmp_path) not in text


def test_right_files_are_kept_and_stale_ones_cleared(tmp_path):
    repo = topic_overwrite_repo(rows=6, shards=2)
    first = fetch_data(repo, tmp_path / "raw")
    (tmp_path / "raw" / "left-over.parquet").write_bytes(b"of another revision")
    damaged = tmp_path / "raw" / "TPO-Dataset_001-3.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    before = len(repo.downloads())
    assert fetch_data(repo, tmp_path / "raw") == first
    assert [request.file for request in repo.downloads()[before:]] == [damaged.name]
    assert set(content(tmp_path / "raw")) == {file.path for file in first.files} | {"SOURCE.json"}


def test_a_file_in_the_hugging_face_cache_is_not_downloaded_again(tmp_path, monkeypatch):
    repo = topic_overwrite_repo(rows=4, shards=2)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with serve([repo]) as url:
        huggingface_hub.snapshot_download(
            repo.name, repo_type="dataset", endpoint=url, cache_dir=constants.HF_HUB_CACHE
        )
    before = len(repo.downloads())
    assert before >= 2
    fetch_data(repo, tmp_path / "raw")
    assert len(repo.downloads()) == before
    assert len(list((tmp_path / "raw").glob("*.parquet"))) == 2


def test_a_commit_that_was_fetched_and_is_all_here_asks_the_network_nothing(tmp_path, monkeypatch):
    repo = topic_overwrite_repo(rows=6, shards=2)
    commit = repo.snapshots()["main"][0]
    first = fetch_data(repo, tmp_path / "raw", commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo.requests.clear()
    assert fetch_data(repo, tmp_path / "raw", commit) == first
    assert repo.requests == []
    # Other patterns are judged by what the commit holds, not by what was fetched.
    with pytest.raises(UserError, match=r"README\.md is not here yet and HF_HUB_OFFLINE is set"):
        fetch_data(repo, tmp_path / "raw", commit, files=["*.parquet", "*.md"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert fetch_data(repo, tmp_path / "raw", "main").files == first.files
    assert repo.requests  # a branch can move, so it is looked up each time


def test_files_arrive_side_by_side(tmp_path):
    names = [f"{i}.parquet" for i in range(hub.CONNECTIONS)]
    repo = Repo("owner/data", {name: name.encode() for name in names}, "dataset", stall=0.3)
    start = time.monotonic()
    fetch_data(repo, tmp_path / "raw")
    assert time.monotonic() - start < 0.3 * len(names)  # one after the other: twice that, or more
    assert content(tmp_path / "raw").keys() == {*names, "SOURCE.json"}


def test_two_files_of_the_same_content_arrive_both(tmp_path):
    repo = Repo("owner/data", {f"{i}.parquet": b"same" for i in range(8)}, "dataset")
    fetch_data(repo, tmp_path / "raw")
    assert len(list((tmp_path / "raw").glob("*.parquet"))) == 8


def test_the_server_satisfies_the_clients_own_snapshot_download(tmp_path):
    names = [f"folder/{i:04d}.txt" for i in range(3)]
    repo = Repo("owner/plain", {name: name.encode() for name in names}, "model")
    with serve([repo]) as url:
        path = huggingface_hub.snapshot_download(repo.name, endpoint=url, cache_dir=tmp_path)
        many = Repo("owner/many", {f"{i:04d}.txt": b"" for i in range(PAGE_SIZE + 5)})
        with serve([many]) as url_of_many:
            tree = huggingface_hub.HfApi(endpoint=url_of_many).list_repo_tree("owner/many")
            assert len(list(tree)) == PAGE_SIZE + 5
    assert content(Path(path)) == repo.files


# ---- interrupted and altered downloads -----------------------------------------------------------


def test_a_connection_cut_half_way_is_resumed_from_the_byte_where_it_broke(tmp_path):
    files = model_files(weights=12_000_000)
    repo = Repo("owner/model", files, cut={"model.safetensors": 11_000_000})
    fetch_model(repo, tmp_path / "base")
    first, second = repo.downloads("model.safetensors")
    assert "range" not in first.headers
    # The client writes in steps of 10 MiB; what it had not written yet is asked for again.
    assert second.headers["range"] == f"bytes={10 * 2**20}-"
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_reset_connection_is_resumed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    files = model_files(weights=12_000_000)
    repo = Repo("owner/model", files, cut={"model.safetensors": 11_000_000}, reset=True)
    fetch_model(repo, tmp_path / "base")
    _, second = repo.downloads("model.safetensors")
    assert int(second.headers["range"].removeprefix("bytes=").removesuffix("-")) > 0
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_killed_download_goes_on_in_the_next_process(tmp_path):
    data = safetensors_bytes("rows", 12_000_000)
    repo = Repo("owner/big", {"rows.parquet": data}, "dataset", hang={"rows.parquet": 11_000_000})
    announced = download.Announced("rows.parquet", len(data), sha256(data), lfs=True)
    begun = tmp_path / "raw" / ".partial" / announced.partial_name
    code = (
        "from pathlib import Path; from stages.sources import hub;"
        "source = hub.HubData(kind='hub', repo='owner/big', revision='main', files=['*']);"
        f"hub.fetch(source, Path({str(tmp_path / 'raw')!r}), repo_type='dataset')"
    )
    with serve([repo]) as url:
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=PROJECT,
            env={**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")},
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 30
            while not (begun.exists() and begun.stat().st_size):
                assert child.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
    assert not (tmp_path / "raw" / "SOURCE.json").exists()
    arrived = begun.stat().st_size
    fetch_data(repo, tmp_path / "raw")
    assert repo.downloads("rows.parquet")[-1].headers["range"] == f"bytes={arrived}-"
    assert content(tmp_path / "raw").keys() == {"rows.parquet", "SOURCE.json"}
    assert (tmp_path / "raw" / "rows.parquet").read_bytes() == data


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_a_file_with_other_bytes_than_announced_is_refused_by_name(tmp_path, name):
    repo = Repo("owner/data", {name: b"0123456789"}, "dataset", wrong=[name])
    with pytest.raises(UserError, match=rf"owner/data: {name} does not have the content"):
        fetch_data(repo, tmp_path / "raw", files=["*"])
    assert content(tmp_path / "raw") == {}  # nothing of it is left to be resumed
    repo.wrong = []
    fetch_data(repo, tmp_path / "raw", files=["*"])
    assert (tmp_path / "raw" / name).read_bytes() == b"0123456789"


def test_a_partial_file_of_other_content_is_refused_and_then_fetched_again(tmp_path):
    data = safetensors_bytes("rows", 1000)
    repo = Repo("owner/data", {"rows.parquet": data}, "dataset")
    announced = download.Announced("rows.parquet", len(data), sha256(data), lfs=True)
    partial = tmp_path / "raw" / ".partial" / announced.partial_name
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * 500)
    with pytest.raises(UserError, match=r"rows\.parquet does not have the content"):
        fetch_data(repo, tmp_path / "raw")
    fetch_data(repo, tmp_path / "raw")
    assert (tmp_path / "raw" / "rows.parquet").read_bytes() == data


def test_too_little_room_is_said_before_anything_is_downloaded(tmp_path, monkeypatch):
    repo = topic_overwrite_repo(rows=4, shards=1)
    usage = type("Usage", (), {"free": 5})()
    monkeypatch.setattr(manifest.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs [\d.]+ kB on the disk .* but 5 bytes are free"):
        fetch_data(repo, tmp_path / "raw")
    assert repo.downloads() == []


# ---- access --------------------------------------------------------------------------------------


def test_the_token_reaches_the_hub_but_not_the_storage_it_leads_to(tmp_path, monkeypatch):
    repo = topic_overwrite_repo(rows=2, shards=1, gated=True, token=TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch_data(repo, tmp_path / "raw")
    asked = [request.headers.get("authorization") for request in repo.requests]
    stored = [r.headers.get("authorization") for r in repo.requests if r.redirected]
    assert asked[0] == f"Bearer {TOKEN}"
    assert stored == [None]


def test_each_refusal_is_one_sentence_with_the_fix_and_without_the_token(tmp_path, monkeypatch):
    def message(repo: Repo, *, name: str | None = None, revision="main", token=None, **options):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        else:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        files = options.get("files", PATTERNS)
        source = on_hub(name or repo.name, files, revision)
        with serve([repo]) as url, pytest.raises(UserError) as caught:
            hub.fetch(source, tmp_path / "raw", repo_type="dataset", endpoint=url)
        text = str(caught.value)
        assert TOKEN not in text
        assert "secret" not in text  # the signature in the storage's address
        assert "\n" not in text
        assert caught.value.__cause__ is None
        return text

    def shards(**options) -> Repo:
        return topic_overwrite_repo(rows=2, shards=1, **options)

    text = message(shards(gated=True, token=TOKEN))
    assert "gated" in text
    assert "HF_TOKEN" in text
    assert "/datasets/helehan/topic-overwrite" in text
    assert "was not found" in message(shards(private=True, token=TOKEN))
    assert "was not found" in message(shards(), name="helehan/topic-overwrit")
    assert "was not found" in message(shards(token=TOKEN), name="no/such", token=TOKEN)
    assert "refuses the token" in message(shards(gated=True, token="another"), token=TOKEN)
    assert f"no revision {GONE}" in message(shards(), revision=GONE)
    assert "no revision mian" in message(shards(), revision="mian")
    text = message(shards(), files=["*.csv", "train/*"])
    assert "no file matches *.csv, train/*" in text
    assert "TPO-Dataset_000-2.parquet" in text
    assert "is a parquet, JSON or JSONL table" in message(shards(), files=["*.md"])
    gone = shards(gone=["TPO-Dataset_000-2.parquet"])
    assert "lists a file that can't be downloaded" in message(gone)
    assert "answers HTTP 500" in message(shards(status=500))
    assert "(HTTP 403)" in message(shards(status=403))


def test_no_network_no_answer_and_no_hub_are_told_apart(tmp_path, monkeypatch):
    def message(url: str) -> str:
        with pytest.raises(UserError) as caught:
            hub.fetch(on_hub("a/b"), tmp_path, repo_type="model", endpoint=url)
        return str(caught.value)

    text = message(closed_port().replace("http://", "http://user:secret@"))
    assert "can't be reached" in text
    assert "HF_ENDPOINT" in text
    assert "secret" not in text
    assert "can't be reached" in message("http://no-such-host.invalid")
    assert "is not an address" in message("localhost/hub")
    slow = Repo("a/b", model_files(), stall=1.0)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    with serve([slow]) as url:
        assert "did not answer in time" in message(url)
    monkeypatch.setattr(download.HfApi, "model_info", lambda *_, **__: json.loads("<html>"))
    assert "does not answer as a Hugging Face Hub does" in message("http://127.0.0.1")


def test_offline_mode_asks_nothing_and_says_how_to_go_on(tmp_path, monkeypatch):
    repo = topic_overwrite_repo(rows=2, shards=1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*kind: path"):
        fetch_data(repo, tmp_path / "raw")
    assert repo.requests == []


# ---- servers that are slow, busy, wrong or not what they seem ------------------------------------


def fails(repo: Repo, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        fetch_data(repo, out)
    assert "\n" not in str(caught.value)
    assert not (out / "SOURCE.json").exists()
    return str(caught.value)


def test_a_server_that_asks_to_be_waited_for_is_and_not_for_long(tmp_path):
    repo = topic_overwrite_repo(rows=2, shards=1, busy=1, retry_after=7)
    assert "(HTTP 429); wait 7 seconds and run" in fails(repo, tmp_path / "raw")
    with serve([repo]) as url:
        commit = repo.snapshots()["main"][0]
        source = on_hub(repo.name, PATTERNS, commit)
        ask = functools.partial(hub.fetch, source, tmp_path / "raw", repo_type="dataset")
        download.look_up(repo.name, commit, "dataset", url)  # kept: what follows is a download
        repo.busy, repo.retry_after = 1, 86_400
        with pytest.raises(UserError, match=r"\(HTTP 429\); wait 86400 seconds"):
            ask(endpoint=url)
        repo.busy, repo.retry_after = 1, 0
        assert ask(endpoint=url).commit == commit


def test_a_download_that_falls_silent_is_resumed_and_in_the_end_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    data = {"rows.parquet": b"x" * 100_000}
    repo = Repo("owner/data", data, "dataset", hang={"rows.parquet": 50_000})
    fetch_data(repo, tmp_path / "once")
    assert (tmp_path / "once" / "rows.parquet").read_bytes() == data["rows.parquet"]

    class Always(dict[str, int]):
        def pop(self, name: str, *_: object) -> int:
            return self[name]

    repo.hang = Always({"rows.parquet": 0})
    text = fails(repo, tmp_path / "raw")
    assert "did not answer in time" in text
    assert "run the same command again to go on" in text


def test_a_body_that_is_shorter_than_announced_is_not_taken_for_the_file(tmp_path):
    repo = Repo("owner/data", {"rows.parquet": b"0123456789"}, "dataset", short=["rows.parquet"])
    assert "rows.parquet arrived incomplete" in fails(repo, tmp_path / "raw")
    repo.short = ()
    fetch_data(repo, tmp_path / "raw")
    assert (tmp_path / "raw" / "rows.parquet").read_bytes() == b"0123456789"


def test_a_hub_that_leads_elsewhere_does_not_take_the_token_along(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    seen: list[str | None] = []

    def elsewhere(request: BaseHTTPRequestHandler) -> Answer:
        seen.append(request.headers.get("Authorization"))
        return 200, {"Content-Type": "application/json"}, b"{}"

    def here(request: BaseHTTPRequestHandler) -> Answer:
        seen.append(request.headers.get("Authorization"))
        return 302, {"Location": f"{other}{request.path}"}, b""

    with (
        answering(elsewhere) as other,
        answering(here) as url,
        pytest.raises(UserError, match="does not answer as a Hugging Face Hub does"),
    ):
        hub.fetch(on_hub("a/b"), tmp_path, repo_type="model", endpoint=url)
    assert seen == [f"Bearer {TOKEN}", None]


def test_names_that_differ_in_case_alone_are_refused_if_both_are_wanted(tmp_path):
    files = {"Rows.parquet": b"1", "rows.parquet": b"2"}
    repo = Repo("owner/data", files, "dataset")
    text = fails(repo, tmp_path / "raw")
    assert "'Rows.parquet' and 'rows.parquet' differ in case alone" in text
    assert fetch_data(repo, tmp_path / "raw", files=["r*"]).files[0].path == "rows.parquet"


def test_a_repository_of_200_000_files_is_searched_in_a_moment(capsys):
    names = [f"folder/{number:06d}.{('png', 'py')[number % 2]}" for number in range(200_000)]
    files = tuple(download.Announced(name, 1, "0" * 40, lfs=False) for name in names)
    many = download.Repository("owner/many", "dataset", "main", GONE, None, files, None)
    start = time.monotonic()
    found = hub._select(many, ["*"], allow_pickle=False, allow_code=False)
    with pytest.raises(UserError) as caught:
        hub._select(many, ["*.csv"], allow_pickle=False, allow_code=False)
    assert time.monotonic() - start < 10  # 0.6 s on a quiet machine
    assert len(found) == 100_000
    assert "and 199995 more" in str(caught.value)
    said = capsys.readouterr().out
    assert "and 99,980 more" in said
    assert len(said) < 1000


# ---- what may be fetched -------------------------------------------------------------------------


def test_pickles_and_code_stay_where_they_are_unless_allowed(tmp_path, capsys):
    extra = {"pytorch_model.bin": b"pickle", "modeling.py": b"import os", "x.ckpt": b"pickle"}
    repo = Repo("owner/model", {**model_files(), **extra})
    fetch_model(repo, tmp_path / "base", files=["*"])
    assert not set(extra) & set(content(tmp_path / "base"))
    assert "modeling.py, pytorch_model.bin, x.ckpt" in capsys.readouterr().out
    assert not [request for request in repo.downloads() if request.file in extra]
    fetch_model(repo, tmp_path / "all", files=["*"], allow_pickle=True, allow_code=True)
    assert set(extra) <= set(content(tmp_path / "all"))


def test_a_model_that_has_only_pickles_is_refused_before_any_download(tmp_path):
    files = {**model_files(), "pytorch_model.bin": b"pickle"}
    del files["model.safetensors"]
    repo = Repo("owner/old", files)
    refused = r"only as pytorch_model\.bin, a pickle.*model\.trust\.pickle"
    with pytest.raises(UserError, match=refused):
        fetch_model(repo, tmp_path / "base")
    assert repo.downloads() == []
    fetch_model(repo, tmp_path / "base", files=["*"], allow_pickle=True)
    assert (tmp_path / "base" / "pytorch_model.bin").exists()


def test_a_model_of_another_kind_is_refused_before_its_weights(tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    repo = Repo("owner/llama", {**model_files(), "config.json": json.dumps(config).encode()})
    with pytest.raises(UserError, match=r"LlamaForCausalLM \(model_type llama\).*Qwen3-VL"):
        fetch_model(repo, tmp_path / "base")
    assert repo.downloads("model.safetensors") == []


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (["config.json"], "no config.json"),
        (["tokenizer.json", "vocab.json"], "tokenizer is missing"),
        (["tokenizer_config.json"], "tokenizer is missing"),
        (["preprocessor_config.json"], "image processor is missing"),
        (["model-00002-of-00002.safetensors"], "names model-00002-of-00002.safetensors"),
    ],
)
def test_an_incomplete_model_is_refused_naming_what_is_missing(tmp_path, absent, message):
    files = model_files(shards=2)
    for name in absent:
        del files[name]
    for name, data in files.items():
        (tmp_path / "local").mkdir(exist_ok=True)
        (tmp_path / "local" / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        fetch_model(Repo("owner/model", files), tmp_path / "base")
    with pytest.raises(UserError, match=message):
        copied_model(tmp_path / "local", tmp_path / "copied")
    assert not (tmp_path / "copied").exists()


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path):
    for name in (
        "../../evil.json",
        "/etc/evil.json",
        "a//evil.json",
        "a\\evil.json",
        "C:evil.json",
    ):
        repo = Repo("owner/evil", {"rows.json": b"[]", name: b"[]"}, "dataset")
        with pytest.raises(UserError, match="leads out of its folder"):
            fetch_data(repo, tmp_path / "deep" / "raw", files=["*.json"])
    assert not (tmp_path / "deep").exists()
    assert not list(tmp_path.rglob("*evil.json"))


def test_a_folder_that_fetch_did_not_make_is_never_cleared(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files that fetch did not put there"):
        fetch_data(tiny_table(), tmp_path / "mine", files=["*"])
    assert content(tmp_path / "mine") == {"thesis.txt": b"years of work"}


# ---- local sources -------------------------------------------------------------------------------


def test_a_local_json_file_brings_the_images_it_names_and_no_other(tmp_path):
    here = tmp_path / "here"
    (here / "images").mkdir(parents=True)
    for name in ("images/a.jpg", "images/b.png", "images/unused.jpg"):
        (here / name).write_bytes(name.encode())
    (tmp_path / "outside.jpg").write_bytes(b"private")
    rows = [
        {"image": "images/a.jpg"},
        {"images": ["./images/b.png"]},
        {"image": "../outside.jpg"},
        {"image": str(tmp_path / "outside.jpg")},
        {"image": "images/absent.jpg"},
    ]
    (here / "pairs.json").write_text(json.dumps(rows))
    source = copied_data(here / "pairs.json", tmp_path / "raw")
    assert [file.path for file in source.files] == ["images/a.jpg", "images/b.png", "pairs.json"]
    assert (source.kind, source.repo, source.commit, source.licence) == ("path", None, None, None)
    assert str(tmp_path) not in (tmp_path / "raw" / "SOURCE.json").read_text()


def test_the_licence_of_a_local_source_is_the_one_that_params_name(tmp_path):
    (tmp_path / "pairs.json").write_text("[]")
    data = {"kind": "path", "path": tmp_path / "pairs.json", "licence": "CC0-1.0"}
    local.fetch_data(local.LocalData.model_validate(data), tmp_path / "raw")
    assert json.loads((tmp_path / "raw" / "SOURCE.json").read_text())["licence"] == "CC0-1.0"
    model = params.load(ROOT / "params" / "demo.yaml").model
    assert isinstance(model.source, local.LocalSource)
    here = model.source.model_copy(update={"path": ROOT / model.source.path})
    assert fetch.fetch_model(here, model.trust, tmp_path / "base").licence == "Apache-2.0"


def test_a_local_folder_brings_its_tables_and_images_and_follows_no_link_out(tmp_path):
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    (here / ".git").mkdir()
    for name in ("sub/rows.jsonl", "sub/a.png", "notes.docx", "run.py", ".git/x.json"):
        (here / name).write_bytes(b"{}")
    source = copied_data(here, tmp_path / "raw")
    assert [file.path for file in source.files] == ["sub/a.png", "sub/rows.jsonl"]
    assert copied_data(here, tmp_path / "raw") == source
    (tmp_path / "secret.json").write_bytes(b"{}")
    (here / "link.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UserError, match=r"link\.json is a link that leads out"):
        copied_data(here, tmp_path / "raw")


def test_local_sources_that_cannot_be_used_are_named(tmp_path):
    def message(path: Path, out: Path = tmp_path / "raw") -> str:
        with pytest.raises(UserError) as caught:
            copied_data(path, out)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "absent")
    (tmp_path / "pairs.zip").write_bytes(b"PK")
    assert "unpack the archive first" in message(tmp_path / "pairs.zip")
    (tmp_path / "bad.jsonl").write_text("{]")
    assert "not valid JSON" in message(tmp_path / "bad.jsonl")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    (tmp_path / "rows.parquet").write_bytes(pointer)
    assert "git lfs pull" in message(tmp_path / "rows.parquet")
    assert "name a folder next to it" in message(tmp_path, tmp_path / "sub" / "raw")


def test_a_model_in_the_hugging_face_cache_can_be_named_by_its_snapshot_folder(tmp_path):
    repo = Repo("owner/model", model_files())
    with serve([repo]) as url:
        path = huggingface_hub.snapshot_download(repo.name, endpoint=url, cache_dir=tmp_path / "c")
    source = copied_model(Path(path), tmp_path / "base")
    assert "model.safetensors" in {file.path for file in source.files}
    assert not any(path.is_symlink() for path in (tmp_path / "base").iterdir())


@pytest.mark.parametrize(
    "damage", ["cut", "cut header", "too long", "page", "empty", "huge header"]
)
def test_a_damaged_safetensors_file_is_named(tmp_path, damage):
    folder = tmp_path / "local"
    folder.mkdir()
    for name, data in model_files(weights=1000).items():
        (folder / name).write_bytes(data)
    complete = (folder / "model.safetensors").read_bytes()
    broken = {
        "cut": complete[:-1],
        "cut header": complete[:20],
        "too long": complete + b"x",
        "page": b"<html>",
        "empty": b"",
        "huge header": b"\xff" * 7 + b"\0" + complete,
    }
    (folder / "model.safetensors").write_bytes(broken[damage])
    with pytest.raises(
        UserError, match=r"model\.safetensors is truncated or not a safetensors file"
    ):
        copied_model(folder, tmp_path / "base")


def test_easy_vqa_is_copied_from_its_package_as_published(tmp_path):
    source = easyvqa.fetch_data(easyvqa.EasyVqaSource(kind="easy-vqa"), tmp_path / "raw")
    names = [file.path for file in source.files]
    assert sum(name.startswith("train/images/") for name in names) == 4000
    assert sum(name.startswith("test/images/") for name in names) == 1000
    assert {"train/questions.json", "test/questions.json", "answers.txt"} <= set(names)
    assert len(names) == 5003
    assert (source.kind, source.commit, source.licence) == ("easy-vqa", "1.0", "MIT")
    questions = json.loads((tmp_path / "raw/test/questions.json").read_text())
    assert len(questions) == 9673


# ---- the stage -----------------------------------------------------------------------------------


def test_the_stage_fetches_what_a_preset_names_from_hf_endpoint(tmp_path):
    (tmp_path / "params.yaml").write_text((PROJECT / "params/qwen3-vl-4b.yaml").read_text())
    chosen = params.load(tmp_path / "params.yaml")
    data, model = chosen.data.source, chosen.model.source
    assert isinstance(data, hub.HubSource)
    assert isinstance(model, hub.HubSource)
    repos = [
        topic_overwrite_repo(rows=4, shards=2, name=data.repo, commit=data.revision),
        Repo(model.repo, model_files(shards=2), commit=model.revision),
    ]
    with serve(repos) as url:
        children = []
        for item, offline in (("data", "0"), ("model", "0"), ("data", "1")):
            out = tmp_path / (item + offline)
            command = [sys.executable, "-m", "stages.fetch", "--item", item, "--out", str(out)]
            home = str(tmp_path / f"home-{item}{offline}")
            environment = {"HF_ENDPOINT": url, "HF_HOME": home, "HF_HUB_OFFLINE": offline}
            children.append(
                subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    env={**os.environ, "PYTHONPATH": str(PROJECT), **environment},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        answers = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0, 1], answers
    assert data.revision in answers[0][0]
    assert manifest.read(tmp_path / "data0").commit == data.revision
    assert manifest.read(tmp_path / "model0").commit == model.revision
    assert answers[2][1].startswith("error: helehan/topic-overwrite is not here yet")
    assert "Traceback" not in answers[2][1]


def test_data_are_fetched_without_pickles_whatever_the_model_may(tmp_path):
    files = {"rows.jsonl": b"{}\n", "rows.pkl": b"pickle", "load.py": b"import os"}
    repo = Repo("owner/data", files, "dataset")
    source = hub.HubData(kind="hub", repo=repo.name, revision="main", files=["*"])
    with serve([repo]) as url, pytest.MonkeyPatch.context() as patch:
        # Read from HF_ENDPOINT when huggingface_hub is imported, which here has happened.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "ENDPOINT", url)
        fetched = hub.fetch_data(source, tmp_path / "raw")
    assert [file.path for file in fetched.files] == ["rows.jsonl"]
