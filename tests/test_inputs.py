"""Inputs as people have them: each folder of tests/cases, read where it is and as fetch leaves it.

``expected.yaml`` says what comes out: how many rows are kept, and left out for which reason, what
some of them hold, or the error. The images are those of tests/cases/images.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from stages import preprocess
from stages.core.errors import UserError
from stages.model import formatted
from stages.pairs import images, tables
from stages.pairs.pairs import Record
from stages.sources import local

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
