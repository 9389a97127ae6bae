"""Files from https, S3 and Google Drive, each against a server or a module made by hand."""

import gzip
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import ValidationError

from stages.core.errors import UserError
from stages.sources import addresses, sharegpt
from tests.hub_server import Answer, Repo, answering, closed_port, serve

DATA = os.urandom(3_000_000)
SECRET = "s3cret-w0rd"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy, no ~/.netrc and no account of the machine takes part."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [*os.environ]:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "partial").mkdir()
    return tmp_path / "partial"


def repo(**options) -> Repo:
    """``x.json`` is answered at its address, ``x.parquet`` by a redirect to another one."""
    return Repo("owner/data", {"x.json": DATA, "x.parquet": DATA}, "dataset", **options)


def address(url: str, name: str = "x.json") -> str:
    return f"{url}/datasets/owner/data/resolve/main/{name}"


def refusal(place: str, folder: Path, sha256: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        addresses.bring(place, folder, sha256)
    text = str(caught.value)
    assert "\n" not in text
    assert SECRET not in text
    assert caught.value.__cause__ is None
    return text


# ---- https ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.json", "x.parquet"])
def test_a_file_arrives_is_checked_and_not_asked_for_twice(folder, name):
    with serve([one := repo()]) as url:
        digest = hashlib.sha256(DATA).hexdigest()
        path = addresses.bring(address(url, name), folder, digest)
        assert path.read_bytes() == DATA
        asked = len(one.requests)
        assert addresses.bring(address(url, name), folder, digest) == path
        assert len(one.requests) == asked
    assert [each.name for each in folder.iterdir()] == [path.name]


@pytest.mark.parametrize("reset", [False, True])
def test_a_broken_connection_goes_on_from_where_it_broke(folder, reset):
    with serve([one := repo(cut={"x.json": 2_500_000}, reset=reset)]) as url:
        assert addresses.bring(address(url), folder).read_bytes() == DATA
    first, second = one.downloads("x.json")
    assert "range" not in first.headers
    if not reset:  # which may lose what is under way
        start = int(second.headers["range"].removeprefix("bytes=").removesuffix("-"))
        assert start > 1_000_000


def test_what_arrived_before_a_kill_is_kept_unless_the_file_has_changed(folder, monkeypatch):
    monkeypatch.setattr(addresses, "_TRIES", 0)  # as if killed there
    with serve([one := repo(cut={"x.json": 2_500_000})]) as url:
        text = refusal(address(url), folder)
        assert "run the same command again to go on" in text
        assert addresses.bring(address(url), folder).read_bytes() == DATA
        assert "range" in one.downloads("x.json")[-1].headers
        for path in folder.iterdir():
            path.unlink()
        one.cut = {"x.json": 2_500_000}
        refusal(address(url), folder)
        one.files = {"x.json": DATA[::-1]}
        assert addresses.bring(address(url), folder).read_bytes() == DATA[::-1]


def test_a_server_that_falls_silent_is_not_waited_for_for_ever(folder, monkeypatch):
    monkeypatch.setattr(addresses, "_TIMEOUT", 0.1)
    monkeypatch.setattr(addresses, "_TRIES", 1)
    with serve([repo(stall=3.0)]) as url:
        start = time.monotonic()
        assert "did not arrive in time" in refusal(address(url), folder)
        assert time.monotonic() - start < 2
    with serve([repo(hang={"x.json": 2_500_000})]) as url:
        assert addresses.bring(address(url), folder).read_bytes() == DATA


def test_other_content_than_its_hash_says_is_deleted(folder):
    with serve([repo()]) as url:
        text = refusal(address(url), folder, "0" * 64)
        assert f"has the sha256 {hashlib.sha256(DATA).hexdigest()[:12]}…" in text
        assert list(folder.iterdir()) == []


REFUSED = {
    401: "refuses access (HTTP 401)",
    403: "refuses access (HTTP 403)",
    404: "has no such file (HTTP 404)",
    410: "has no such file (HTTP 410)",
    418: "answers HTTP 418",
    500: "answers HTTP 500",
}


@pytest.mark.parametrize("status", REFUSED)
def test_each_refusal_is_one_sentence_with_the_fix(folder, status):
    with serve([repo(status=status)]) as url:
        assert REFUSED[status] in refusal(f"{address(url)}?signature={SECRET}", folder)


def test_a_server_that_asks_to_be_waited_for_is_and_not_for_long(folder):
    with serve([one := repo(busy=2)]) as url:
        assert addresses.bring(address(url), folder).read_bytes() == DATA
        assert len(one.requests) == 3
    with serve([repo(busy=9)]) as url:
        assert "(HTTP 429); try again in 0 seconds" in refusal(address(url), folder)
    with serve([one := repo(busy=9, retry_after=3600)]) as url:
        assert "try again in 3600 seconds" in refusal(address(url), folder)
        assert len(one.requests) == 1


def test_a_password_of_netrc_reaches_its_host_and_not_the_one_it_leads_to(folder, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    (home / ".netrc").chmod(0o600)
    seen: list[str | None] = []

    def other(request: BaseHTTPRequestHandler) -> Answer:
        seen.append(request.headers.get("Authorization"))
        return 200, {}, b"[]"

    def here(request: BaseHTTPRequestHandler) -> Answer:
        seen.append(request.headers.get("Authorization"))
        return 302, {"Location": place.replace("127.0.0.1", "localhost") + "/x.json"}, b""

    with answering(other) as place, answering(here) as url:
        assert addresses.bring(f"{url}/x.json", folder).read_bytes() == b"[]"
    assert [bool(each) for each in seen] == [True, False]


def test_no_token_of_the_hub_is_sent(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with serve([one := repo()]) as url:
        addresses.bring(address(url, "x.parquet"), folder)
    assert not any(SECRET in value for r in one.requests for value in r.headers.values())


def test_what_is_no_file_is_told_apart(folder):
    def page(_: BaseHTTPRequestHandler) -> Answer:
        return 200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>Sign in</html>"

    def circle(request: BaseHTTPRequestHandler) -> Answer:
        return 302, {"Location": request.path}, b""

    with answering(page) as url:
        assert "answers with a web page" in refusal(f"{url}/x.json", folder)
    with answering(circle) as url:
        assert "leads to no file" in refusal(f"{url}/x.json", folder)
    assert "can't be reached" in refusal(f"{closed_port()}/x.json", folder)
    assert "can't be reached" in refusal("https://no-such-host.invalid/x.json", folder)


def test_a_body_without_a_length_is_taken_as_it_is(folder):
    with answering(lambda _: (200, {}, b"[1]")) as url:
        assert addresses.bring(f"{url}/x.json", folder).read_bytes() == b"[1]"


def test_a_body_that_is_packed_although_nobody_asked_is_unpacked(folder):
    body = gzip.compress(DATA)
    headers = {"Content-Encoding": "gzip", "Content-Length": str(len(body)), "ETag": '"x"'}
    with answering(lambda _: (200, headers, body)) as url:
        assert addresses.bring(f"{url}/x.json", folder).read_bytes() == DATA


def test_two_addresses_that_differ_in_their_query_are_two_files(tmp_path):
    def answer(request: BaseHTTPRequestHandler) -> Answer:
        number = request.path.rpartition("=")[2]
        text = (
            '[{"messages": [{"role": "user", "content": "Q%s"}], "chosen": "A", "rejected": "B"}]'
        )
        return 200, {}, (text % number).encode()

    with answering(answer) as url:
        values = source(f"{url}/get?id=1").model_dump()
        values["files"] += [{"at": f"{url}/get?id=2"}]
        given = sharegpt.ShareGptSource.model_validate(values)
        for _ in range(2):
            sharegpt.fetch_data(given, tmp_path / "raw")
            found = [record.question for record in sharegpt.records(tmp_path / "raw")]
            assert found == ["Q1", "Q2"]


def test_too_little_room_is_said_before_the_body(folder, monkeypatch):
    usage = type("Usage", (), {"free": 5})()
    monkeypatch.setattr("stages.sources.manifest.shutil.disk_usage", lambda _: usage)
    with serve([repo()]) as url:
        assert "needs 3.0 MB on the disk" in refusal(address(url), folder)


# ---- S3 ------------------------------------------------------------------------------------------


@contextmanager
def bucket(files: dict[str, bytes], cut: list[int] | None = None) -> Iterator[list[str]]:
    """An S3 server with one bucket, ``bucket``; yields what was asked. ``cut`` breaks off, once."""
    asked: list[str] = []

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        asked.append(f"{request.command} {request.path} {request.headers.get('Range') or ''}")
        name = request.path.split("?")[0].removeprefix("/bucket/")
        if name not in files:
            body = b"<Error><Code>NoSuchKey</Code></Error>"
            if "list-type" in request.path:
                body = b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
            return 200 if b"List" in body else 404, {"Content-Length": str(len(body))}, body
        data, status = files[name], 200
        if found := re.match(r"bytes=(\d+)-(\d+)", request.headers.get("Range") or ""):
            data, status = data[int(found[1]) : int(found[2]) + 1], 206
        etag = f'"{hashlib.md5(files[name]).hexdigest()}"'
        headers = {"Content-Length": str(len(data)), "ETag": etag}
        if cut and status == 206:
            data = data[: cut.pop()]
        return status, headers, data

    with answering(answer) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs  # type: ignore[import-untyped]

        s3fs.S3FileSystem.clear_instance_cache()
        yield asked
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_file_of_a_bucket_arrives_and_is_checked(folder):
    digest = hashlib.sha256(DATA).hexdigest()
    with bucket({"data/x.zip": DATA}):
        path = addresses.bring("s3://bucket/data/x.zip", folder, digest)
    assert path.read_bytes() == DATA
    assert [each.name for each in folder.iterdir()] == [path.name]


def test_what_arrived_of_a_bucket_is_kept_unless_the_file_has_changed(folder):
    place = "s3://bucket/x.zip"
    partial = folder / f"{hashlib.sha256(f'{place} None'.encode()).hexdigest()[:32]}.part"
    for mark, expected in ((hashlib.md5(DATA).hexdigest(), "bytes=1000-"), ("other", "bytes=0-")):
        partial.write_bytes(DATA[:1000])
        partial.with_suffix(".mark").write_text(f'"{mark}"')
        with bucket({"x.zip": DATA}) as asked:
            path = addresses.bring(place, folder)
        assert path.read_bytes() == DATA
        assert any(expected in each for each in asked)
        path.unlink()


def test_what_a_bucket_does_not_have_and_a_missing_package_are_said(folder, monkeypatch):
    with bucket({}):
        assert "does not exist" in refusal("s3://bucket/none.zip", folder)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert "run `make extras`" in refusal("s3://bucket/x.zip", folder)


# ---- Google Drive --------------------------------------------------------------------------------


def drive(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    """A ``gdown`` made by hand, with the arguments of version 5 that are used."""

    class FileURLRetrievalError(Exception):
        pass

    def download(*, id: str, output: str, quiet: bool, resume: bool) -> str:  # noqa: A002
        if id not in files:
            raise FileURLRetrievalError(f"Cannot retrieve the public link\n{SECRET}")
        assert quiet
        assert resume
        Path(output).write_bytes(files[id])
        return output

    module = ModuleType("gdown")
    module.download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gdown", module)


ID = "1AbC-dEf_GhIjKlMnOpQrStUvWxYz"


@pytest.mark.parametrize(
    "place",
    [
        f"gdrive:{ID}",
        f"gdrive://{ID}",
        f"https://drive.google.com/file/d/{ID}/view?usp=sharing",
        f"https://drive.google.com/open?id={ID}",
        f"https://drive.google.com/uc?export=download&id={ID}",
    ],
)
def test_a_file_of_google_drive_is_named_by_its_id_or_its_link(folder, monkeypatch, place):
    drive(monkeypatch, {ID: DATA})
    assert addresses.bring(place, folder).read_bytes() == DATA
    assert ID in addresses.shown(place)
    assert addresses.name_of(place) == ID


def test_what_google_drive_does_not_give_is_said(folder, monkeypatch):
    drive(monkeypatch, {ID: b"<!DOCTYPE html><html>Sign in"})
    assert "share the file with anyone" in refusal(f"gdrive:{ID}", folder)
    assert "check the id" in refusal("gdrive:another", folder)
    monkeypatch.setitem(sys.modules, "gdown", None)
    assert "run `make extras`, or download the file" in refusal(f"gdrive:{ID}", folder)


def source(place: str) -> sharegpt.ShareGptSource:
    values = {"files": [place], "remap": [], "datasets": None, "licence": None}
    return sharegpt.ShareGptSource.model_validate({"kind": "sharegpt", **values})


# ---- what is written of an address ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        (f"https://me:{SECRET}@host/x.json", "~/.netrc"),
        (f"https://{SECRET}@host/x.json", "~/.netrc"),
        (f"s3://key:{SECRET}@bucket/x.json", "~/.netrc"),
        (f"https://host/x.json?X-Amz-Signature={SECRET}&x=1", "is signed or holds a token"),
        (f"https://host/x.json?a=1&access_token={SECRET}", "is signed or holds a token"),
        (f"ftp://me:{SECRET}@host/x.json", "~/.netrc"),
        ("ftp://host/x.json", "is none of https://, s3://, gdrive: and a path"),
        ("http://host/x.json", "is not encrypted"),
        ("s3://bucket", "names no file"),
        ("https://host/x.json", None),
        ("http://127.0.0.1:80/x.json", None),
    ],
)
def test_an_address_with_a_password_or_without_encryption_is_refused(place, problem):
    found = addresses.problem_with(place)
    assert (problem in found if problem else found is None) if found else problem is None
    assert SECRET not in str(found)
    if problem:
        with pytest.raises(ValidationError, match=re.escape(problem)) as caught:
            source(place)
        assert SECRET not in caught.value.errors()[0]["msg"]


def test_no_query_of_an_address_is_kept(tmp_path):
    row = b'[{"messages": [{"role": "user", "content": "Q"}], "chosen": "A", "rejected": "B"}]'
    files = {"my rows.json": row}
    with serve([Repo("owner/data", files, "dataset")]) as url:
        place = f"{url}/datasets/owner/data/resolve/main/my%20rows.json"
        given = source(f"{place}?x={SECRET}#x")
        found = sharegpt.fetch_data(given, tmp_path / "raw")
        assert found.repo == place
        assert {file.path for file in found.files} == {"index.json", "my_rows.json"}
    written = b"".join(path.read_bytes() for path in (tmp_path / "raw").iterdir())
    assert SECRET.encode() not in written
    # Here by its address and hash already: nothing is asked, the server has gone.
    assert sharegpt.fetch_data(given, tmp_path / "raw") == found
    (record,) = sharegpt.records(tmp_path / "raw")
    assert (record.images, record.question) == ((), "Q")
