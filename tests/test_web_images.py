"""Images that a table names by an address: fetch downloads them, preprocess reads what is there."""

import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages.core.errors import UserError
from stages.pairs import formats, refusals, tables, web_index
from stages.sources import addresses, hub, local, manifest, several, web_images
from stages.sources.kinds import KINDS
from tests.hub_server import Repo, answering, closed_port, serve

COLUMNS = several.COLUMNS
PRIVATE = [
    f"https://{host}/1.png"
    for host in ("10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:10.0.0.1]")
]


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), (7 * number % 256, 50, 100)).save(stream, "PNG")
    return stream.getvalue()


@dataclass
class Site:
    """Answers ``/N.png`` with an image, ``/led/N`` by leading to it, and others as they are named.

    ``refused`` paths answer with that status until they are taken out.
    """

    url: str = ""
    refused: dict[str, int] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    headers: list[Any] = field(default_factory=list)

    def answer(self, request: Any) -> tuple[int, dict[str, str], bytes]:
        path = request.path.split("?")[0]
        self.asked[path] += 1
        self.headers.append(request.headers)
        if path in self.refused:
            return self.refused[path], {"Content-Length": "0"}, b""
        name = path.rpartition("/")[2]
        if path.startswith("/led/"):
            return 302, {"Location": f"{self.url}/{name}", "Content-Length": "0"}, b""
        if path == "/away":
            return 302, {"Location": PRIVATE[0], "Content-Length": "0"}, b""
        if path == "/round":
            return 302, {"Location": f"{self.url}/round", "Content-Length": "0"}, b""
        body = {
            "text.png": b"no image at all",
            "large.png": picture(0) + b"\0" * 5000,
            "page.png": b"<html>",
        }.get(name) or picture(int(name.removesuffix(".png")))
        kind = "text/html" if name == "page.png" else "image/png"
        headers = {"Content-Type": kind}
        if name != "large.png":  # which does not say how large it is
            headers["Content-Length"] = str(len(body))
        return 200, headers, body


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in [*os.environ]:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    found = Site()
    with answering(found.answer) as url:
        found.url = url
        yield found


def rows(cells: list[Any]) -> dict[str, list[Any]]:
    many = len(cells)
    questions = [f"Question {i}?" for i in range(many)]
    return {
        "image": cells,
        "question": questions,
        "chosen": ["Yes."] * many,
        "rejected": ["No."] * many,
    }


def table(path: Path, cells: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table(rows(cells)), path)
    else:
        columns = rows(cells)
        lines = (
            json.dumps(dict(zip(columns, row, strict=True)))
            for row in zip(*columns.values(), strict=True)
        )
        path.write_text("\n".join(lines))
    return path


def source(path: Path, column: str | None = "image") -> local.LocalData:
    values = {"kind": "path", "path": path, "licence": None, "image_urls": column}
    return local.LocalData.model_validate(values)


def fetched(path: Path, out: Path, column: str | None = "image") -> manifest.Source:
    return local.fetch_data(source(path, column), out)


def read(out: Path) -> list[bytes | str]:
    """The image of each row, or why it has none."""
    return [
        row.images[0] if row.images else row.note
        for row in tables.records(out, tables.Reading(COLUMNS))
    ]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_each_address_is_downloaded_once_and_read_without_a_network(tmp_path, site, ending):
    cells = [f"{site.url}/{i % 3}.png" for i in range(9)]
    found = fetched(table(tmp_path / "in" / f"t.{ending}", cells), tmp_path / "raw")
    assert site.asked == {f"/{i}.png": 1 for i in range(3)}
    listed = manifest.read(tmp_path / "raw")
    assert {*listed.files} == {*found.files}
    assert len(found.files) == 1 + 3 + 1  # the table, images and index
    site.asked.clear()
    assert read(tmp_path / "raw") == [picture(i % 3) for i in range(9)]
    fetched(tmp_path / "in" / f"t.{ending}", tmp_path / "raw")
    assert manifest.read(tmp_path / "raw") == listed
    assert site.asked == {}


def test_addresses_in_structs_lists_and_redirects_are_followed(tmp_path, site):
    led, plain, url = (f"{site.url}/{name}.png" for name in ("led/1", "2", "3"))
    cells = [{"path": led}, [f" {plain} "], {"url": url}]
    fetched(table(tmp_path / "in" / "t.jsonl", cells), tmp_path / "raw")
    assert read(tmp_path / "raw") == [picture(1), picture(2), picture(3)]


GONE = {
    "/404.png": "HTTP 404",
    "/403.png": "HTTP 403",
    "/text.png": "not an image",
    "/page.png": "a web page",
    "/large.png": "larger than 3.0 kB",
    "/round": "redirects without end",
    "/away": "of a private network",
}
NEVER_ASKED = {
    **dict.fromkeys(PRIVATE, "of a private network"),
    "http://images.example/1.png": "not encrypted",
    "https://me:s3cret@images.example/1.png": "it holds a user or password",
    "s3://bucket/1.png": "not an https address",
    "https://[1/x.png": "no valid address",
}


def test_what_is_gone_costs_its_row_and_is_counted_by_reason(tmp_path, site, monkeypatch, capsys):
    monkeypatch.setattr(formats, "MOST_BYTES", 3000)
    site.refused = {"/404.png": 404, "/403.png": 403}
    gone = {f"{site.url}{path}": why for path, why in GONE.items()} | NEVER_ASKED
    cells = [*gone, f"{site.url}/1.png"]
    fetched(table(tmp_path / "in" / "t.jsonl", cells), tmp_path / "raw")
    *notes, image = read(tmp_path / "raw")
    assert image == picture(1)
    for note, (address, why) in zip(notes, gone.items(), strict=True):
        assert isinstance(note, str)
        assert note.endswith(f": {why}"), address
        assert "s3cret" not in note
    said = capsys.readouterr().out
    assert f"of {len(cells)} addresses in column 'image': 1; not to be had: " in said
    assert "5 of a private network, " in said
    assert "1 HTTP 404" in said


def test_a_note_shows_at_most_100_characters_of_an_address_and_no_query(tmp_path, site):
    long = f"{site.url}/{'x' * 300}/404.png?token=s3cret"
    site.refused = {long.removeprefix(site.url).split("?")[0]: 404}
    cells = [long, f"{site.url}/1.png"]
    fetched(table(tmp_path / "in" / "t.jsonl", cells), tmp_path / "raw")
    first = next(tables.records(tmp_path / "raw", tables.Reading(COLUMNS)))
    assert refusals.text_refusal(first) == refusals.Refusal(
        "missing_field", f"image ({long[:99]}…: HTTP 404)"
    )


def test_a_run_that_broke_off_goes_on_and_asks_again_for_what_was_missing(tmp_path, site):
    path = table(tmp_path / "in" / "t.jsonl", [f"{site.url}/{i}.png" for i in range(4)])
    site.refused = {f"/{i}.png": 503 for i in range(3)}
    with pytest.raises(UserError, match=r"3 can't be reached now \(3 HTTP 503.* is kept"):
        fetched(path, tmp_path / "raw")
    assert not (tmp_path / "raw" / manifest.MANIFEST).exists()
    site.refused = {"/0.png": 503}
    fetched(path, tmp_path / "raw")
    assert site.asked == {"/0.png": 2, "/1.png": 2, "/2.png": 2, "/3.png": 1}
    assert str(read(tmp_path / "raw")[0]).endswith("HTTP 503")
    site.refused = {}
    fetched(path, tmp_path / "raw")
    assert read(tmp_path / "raw") == [picture(i) for i in range(4)]


def test_a_host_that_does_not_answer_is_not_asked_for_ever(tmp_path, site, monkeypatch):
    asked = []
    plain = addresses.download

    def download(client: Any, place: str, *args: Any, **options: Any) -> None:
        asked.append(place)
        plain(client, place, *args, **options)

    monkeypatch.setattr(web_images, "CONNECTIONS", 1)
    monkeypatch.setattr(addresses, "download", download)
    closed = closed_port()
    dead = [f"{closed}/{i}.png" for i in range(20)]
    alive = [f"{site.url}/{i}.png" for i in range(20)]
    fetched(table(tmp_path / "in" / "t.jsonl", dead + alive), tmp_path / "raw")
    assert len(asked) == web_images._SILENT + 20
    assert read(tmp_path / "raw")[20:] == [picture(i) for i in range(20)]
    with pytest.raises(UserError, match=r"20 can't be reached now \(20 no answer"):
        fetched(table(tmp_path / "dead" / "t.jsonl", dead), tmp_path / "other")


def test_a_server_that_sends_too_slowly_is_given_up(tmp_path, site, monkeypatch):
    monkeypatch.setattr(web_images, "_SECONDS", -1.0)
    path = table(tmp_path / "in" / "t.jsonl", [f"{site.url}/1.png"])
    with pytest.raises(UserError, match=r"none leads to an image.*too slow"):
        fetched(path, tmp_path / "raw")


def test_no_password_goes_along(tmp_path, site, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text("default login me password s3cret\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    fetched(table(tmp_path / "in" / "t.jsonl", [f"{site.url}/led/1.png"]), tmp_path / "raw")
    assert len(site.headers) == 2
    assert not any("s3cret" in str(headers) or headers["Authorization"] for headers in site.headers)


def test_a_column_without_addresses_is_refused(tmp_path, site):
    path = table(tmp_path / "in" / "t.jsonl", [f"{site.url}/1.png"])
    for column in ("question", "picture"):
        with pytest.raises(UserError, match=f"no column '{column}' holds an address in t.jsonl"):
            fetched(path, tmp_path / "raw", column)


def test_without_the_key_nothing_is_asked_and_the_refusal_names_it(tmp_path, site):
    fetched(table(tmp_path / "in" / "t.jsonl", [f"{site.url}/1.png"]), tmp_path / "raw", None)
    with pytest.raises(UserError, match=r"set data\.source\.image_urls to its column"):
        read(tmp_path / "raw")
    assert site.asked == {}


def test_an_address_outside_the_column_is_counted(tmp_path, site):
    cells = [f"{site.url}/1.png", f"{site.url}/1.png with a space"]
    fetched(table(tmp_path / "in" / "t.jsonl", cells), tmp_path / "raw")
    assert "not in the column that data.source.image_urls names" in str(read(tmp_path / "raw")[1])


def test_a_repository_on_the_hub_brings_its_images_too(tmp_path, site, monkeypatch):
    content = table(tmp_path / "t.parquet", [f"{site.url}/1.png"]).read_bytes()
    given = {"kind": "hub", "repo": "me/pairs", "revision": "main", "files": ["*"]}
    with serve([Repo("me/pairs", {"t.parquet": content}, "dataset")]) as url:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "fetch", partial(hub.fetch, endpoint=url))
        one = hub.HubData.model_validate({**given, "image_urls": "image"})
        found = hub.fetch_data(one, tmp_path / "raw")
    assert read(tmp_path / "raw") == [picture(1)]
    assert web_index.INDEX in {file.path for file in found.files}


def test_one_of_several_sources_has_the_key_and_messages_name_it_there(tmp_path, site):
    path = table(tmp_path / "in" / "t.jsonl", [f"{site.url}/1.png"])
    parts = {
        name: {"kind": "path", "path": str(path), "licence": None, **more}
        for name, more in {"web": {"image_urls": "image"}, "plain": {}}.items()
    }
    given = several.SeveralSource.model_validate({"kind": "several", "sources": parts})
    several.fetch_data(given, tmp_path / "raw")
    found, _ = several.read(tmp_path / "raw")
    assert next(found).images == (picture(1),)
    with pytest.raises(UserError, match=r"set data\.source\.sources\.plain\.image_urls to"):
        list(found)


def test_only_data_has_the_key():
    for kind in ("hub", "path"):
        section = KINDS[kind].model_section
        assert section is not None
        assert "image_urls" in KINDS[kind].section.model_fields
        assert "image_urls" not in section.model_fields
