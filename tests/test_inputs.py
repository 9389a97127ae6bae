"""Inputs as people have them: each folder of tests/cases, read where it is and as fetch leaves it.

``expected.yaml`` says what comes out: how many rows are kept, and left out for which reason, what
some of them hold, or the error. The images are those of tests/cases/images.
"""

import base64
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stages import preprocess
from stages.core.errors import UserError
from stages.model import formatted
from stages.pairs import files, images, layouts, tables
from stages.pairs.formats import Unreadable
from stages.pairs.layouts import Odd
from stages.pairs.pairs import Record
from stages.sources import local
from tests.pictures import picture

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.parent.name for path in CASES.glob("*/expected.yaml"))
KEYS = {"about", "entry", "table", "images", "wanted", "kept", "left_out", "detail", "first"} | {
    *("third", "questions", "splits", "ended", "prompt", "fetched", "error")
}
ALL = {"text_only": True, "images": 3, "turns": 3, "system_prompt": True}


class Here:
    """A pool that works at once, in this process."""

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **_: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "pool", lambda workers: Here())


def laid_out(name: str, folder: Path, images: str) -> dict[str, Any]:
    """Copy a case into ``folder``; gives what is expected."""
    shutil.copytree(CASES / name, folder)
    if not (folder / "images").exists():
        shutil.copytree(CASES / "images", folder / images, dirs_exist_ok=True)
    (folder / "expected.yaml").unlink()
    expected: dict[str, Any] = YAML(typ="safe").load((CASES / name / "expected.yaml").read_text())
    return expected


def outcome(place: Path, asked: local.PathData, p: Any, out: Path) -> dict[str, Any]:
    """What preprocess makes of a source: its report, and the tables."""
    rows: list[Record] = []

    def noted(found: Iterator[Record]) -> Iterator[Record]:
        for row in found:
            rows.append(row)
            yield row

    out.mkdir()
    report = preprocess.fill(out, noted(tables.records(place, asked)), (), p)
    found = {
        name: pq.read_table(out / f"{name}.parquet").to_pylist() for name in ("pairs", "left_out")
    }
    return {"report": report, "rows": rows, **found}


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    left_out = {reason: n for reason, n in found["report"]["left_out"].items() if n}
    assert left_out == expected.get("left_out", {})
    assert len(found["pairs"]) == expected.get("kept", 0)
    if "detail" in expected:
        assert expected["detail"] in found["left_out"][0]["detail"]
    for place, name in enumerate(("first", "second", "third")):
        for field, value in expected.get(name, {}).items():
            pair = found["pairs"][place]
            told = found["rows"][place].split if field == "split" else pair.get(field)
            assert (len(pair["images"]) if field == "images" else told) == value, field
    if "questions" in expected:
        assert [pair["question"] for pair in found["pairs"]] == expected["questions"]
    if "splits" in expected:
        assert [row.split for row in found["rows"]] == expected["splits"]
    assert found["report"]["end_tokens_taken_off"] == expected.get("ended", 0)
    if "prompt" in expected:
        pair = found["pairs"][0]
        said = formatted.prompt(pair["question"], pair["images"])["messages"][-1]["content"]
        assert said == expected["prompt"]


def fetched(asked: local.PathData, raw: Path) -> Path:
    local.fetch_data(asked, raw)
    return raw


@pytest.mark.parametrize("name", NAMES)
def test_an_input_is_read_as_expected(name, tmp_path, params_with, monkeypatch):
    expected = YAML(typ="safe").load((CASES / name / "expected.yaml").read_text())
    assert set(expected) <= KEYS
    source, raw = tmp_path / "mine", tmp_path / "raw"
    laid_out(name, source, expected.get("images", "images"))
    place = source / expected.get("table", "")
    wanted = {"preprocess.wanted": expected.get("wanted", ALL)}
    p = params_with(**wanted).preprocess
    asked = local.PathData(kind="path", path=place, licence=None, **expected.get("entry", {}))
    if "error" not in expected:
        check(outcome(place, asked, p, tmp_path / "read"), expected)
        files = {file.path for file in local.fetch_data(asked, raw).files}
        check(outcome(raw, asked, p, tmp_path / "fetched"), expected)
        if "fetched" in expected:
            tops = {f if f in expected["fetched"] else f.split("/")[0] for f in files}
            assert sorted(tops) == expected["fetched"]
        return
    with pytest.raises(UserError) as here:
        outcome(place, asked, p, tmp_path / "read")
    told = str(here.value)
    with pytest.raises(UserError) as after_fetch:
        outcome(fetched(asked, raw), asked, p, tmp_path / "fetched")
    assert str(after_fetch.value).replace(str(raw), str(source)) == told
    assert "\n" not in told
    assert len(told) < 1500
    for part in [expected["error"]] if isinstance(expected["error"], str) else expected["error"]:
        assert part in told


# The layouts that the tools and data sets of this field have, each as it is published


COLUMNS = {name: name for name in ("image", "question", "chosen", "rejected")} | {
    "origin": "origin_dataset",
    "kind": None,
}
ROWS = YAML(typ="safe").load((CASES / "rows.yaml").read_text(encoding="utf-8"))


def read(row, columns=COLUMNS):
    layout = layouts.choose(list(row), columns)
    assert layout, row.keys()
    return layouts.record(row, layout, "row 1", "", lambda cell: repr(cell).encode())


@pytest.mark.parametrize("case", ROWS, ids=[case["about"] for case in ROWS])
def test_a_row_says_what_it_says_or_why_it_is_odd(case):
    if "odd" in case:
        with pytest.raises(Odd, match=r"^.{10,300}$") as error:
            read(case["row"])
        assert case["odd"] in str(error.value)
        return
    found, says = read(case["row"]), case["says"]
    for field in ("question", "chosen", "rejected", "origin", "kind", "system"):
        assert getattr(found, field) == says.get(field, ""), field
    assert found.images == tuple(repr(cell).encode() for cell in says["images"])
    assert found.history == tuple(map(tuple, says.get("history", ())))


def test_a_row_without_an_image_is_text_only_in_lists_and_lacks_it_in_its_own_column():
    plain = {"question": "q", "chosen": "a", "rejected": "b", "image": None, "origin_dataset": ""}
    assert read(plain).images is None
    assert read(plain | {"image": []}).images == ()
    turns = {"messages": [{"role": "user", "content": "q"}], "images": None}
    assert read(turns | {"chosen": "a", "rejected": "b"}).images == ()
    no_images = COLUMNS | {"image": None, "origin": None}
    assert read({"question": "q", "chosen": "a", "rejected": "b"}, no_images).images == ()


def test_a_column_that_was_renamed_and_is_not_there_is_a_mistake_and_no_layout():
    names = ["prompt", "chosen", "rejected", "image"]
    assert layouts.choose(names, COLUMNS)
    renamed = COLUMNS | {"question": "asked"}
    assert layouts.choose(names, renamed) is None
    assert "has no column asked" in str(layouts.missing(names, renamed, []))


@pytest.mark.parametrize(
    "cell",
    [Unreadable("is not UTF-8 text"), "q" * (layouts.MOST_CHARACTERS + 1), 5, ["q"]],
    ids=type,
)
def test_a_cell_that_is_no_text_is_odd(cell):
    with pytest.raises(Odd, match=r"^prompt "):
        read({"prompt": cell, "chosen": "a", "rejected": "b"})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "from", "content", "value", "type", "text", "image", "url"])
            | st.text(max_size=3),
            inner | st.sampled_from(["user", "assistant", "gpt", "image", "text", "system"]),
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(st.sampled_from([case["row"] for case in ROWS]), st.data())
def test_whatever_a_cell_holds_gives_a_record_or_an_odd_row(row, draw):
    layout = layouts.choose(list(row), COLUMNS)
    assert layout
    column = draw.draw(st.sampled_from(sorted(layout.columns & row.keys())))
    try:
        found = read(row | {column: draw.draw(VALUES)})
    except Odd:
        return
    for text in (found.question, found.chosen, found.rejected):
        assert isinstance(text, str | None)
    assert isinstance(found.images, tuple | None)


# Which file a row means, and which image a cell: fetch copies it, and preprocess reads it


FOUND = YAML(typ="safe").load((CASES / "names.yaml").read_text(encoding="utf-8"))


def made(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


@pytest.mark.parametrize("case", FOUND, ids=[case["about"] for case in FOUND])
def test_a_name_means_the_file_that_it_should(case, tmp_path):
    made(tmp_path, case["files"])
    folder = files.Folder(tmp_path, case.get("remap", ()))
    for name, expected in case["names"].items():
        found = folder.find(name, case.get("beside", ""))
        if expected in case["files"]:
            assert found == tmp_path / expected, name
        else:
            assert isinstance(found, str), name
            assert expected in found
            assert len(found) < 250
            found.encode()


def test_no_link_may_lead_out_but_where_fetch_put_it(tmp_path):
    made(tmp_path, ["secret.png", "mine/a.png"])
    (tmp_path / "mine" / "b.png").symlink_to("a.png")
    assert files.walk(tmp_path / "mine") == ["a.png", "b.png"]
    (tmp_path / "mine" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match=r"link\.png links to a folder or out of"):
        files.walk(tmp_path / "mine")
    assert "no such file" in str(files.Folder(tmp_path / "mine").find("link.png"))
    (tmp_path / "mine" / "SOURCE.json").write_text("{}")
    assert "link.png" in files.walk(tmp_path / "mine")
    (tmp_path / "mine" / "more").symlink_to(tmp_path)
    with pytest.raises(UserError, match="more links to a folder"):
        files.walk(tmp_path / "mine")


# Cells


def cell_of(cell, path="no such file"):
    return tables.image_of(cell, lambda name: path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_base64_of_an_image_is_the_image(kind):
    data = picture(0, kind=kind)
    plain = base64.b64encode(data).decode()
    lines = "\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    for text in (plain, lines, plain.rstrip("="), base64.urlsafe_b64encode(data).decode()):
        assert cell_of(text) == data
        assert cell_of(f"data:image/{kind.lower()};base64,{text}") == data


def test_a_name_that_could_be_base64_is_a_name(tmp_path):
    (tmp_path / "x").write_bytes(b"named by a hash")
    assert cell_of("0123456789abcdef" * 4, tmp_path / "x") == b"named by a hash"
    assert cell_of({"path": "9j/a", "bytes": None}, tmp_path / "x") == b"named by a hash"
    assert cell_of({"path": "9j/a", "bytes": b"own"}, tmp_path / "x") == b"own"


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        *((cell, "no image") for cell in (None, {"bytes": None, "path": None}, {}, "")),
        (b"", "no bytes"),
        ("data:image/png;base64,!!!", "is not valid base64"),
        ("data:image/svg+xml,%3Csvg/%3E", "a data URL without base64"),
        ("x./" * 100_000, "is not a file name"),
    ],
)
def test_a_cell_without_an_image_says_why(cell, why):
    found = cell_of(cell)
    assert why in found
    assert len(found) < 300


@pytest.mark.parametrize(
    "cell",
    [
        *(5, 0.5, True, {"bytes": 5}, {"path": 5}, Unreadable("is broken")),
        *("https://a.example/b.png", "s3://a/b.png"),
    ],
)
def test_a_cell_that_can_be_no_image_is_odd(cell):
    with pytest.raises(Odd, match=r"^the image "):
        cell_of(cell)
