"""Kind several: more than one source in a run, each row with where it is from."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages import preprocess
from stages.core.errors import UserError
from stages.params import params
from stages.sources import manifest, several
from stages.sources.kinds import KINDS
from stages.sources.licences import strictest
from stages.sources.several import SeveralSource


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 40), (3 * number % 256, number % 7 * 30, 100)).save(stream, "PNG")
    return stream.getvalue()


def table(path: Path, numbers: range, **names: str) -> Path:
    """A parquet of pairs, one for each number, with columns of other names."""
    values = {
        "image": [picture(number) for number in numbers],
        "question": [f"Question {number}?" for number in numbers],
        "chosen": ["Yes."] * len(numbers),
        "rejected": ["No."] * len(numbers),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({names.get(key, key): column for key, column in values.items()}), path)
    return path


def prepared(folder: Path, numbers: range) -> Path:
    rows = [
        {
            "messages": [{"role": "user", "content": f"Question {number}?"}],
            "chosen": "Yes.",
            "rejected": "No.",
            "images": [f"/content/{number}.png"],
        }
        for number in numbers
    ]
    folder.mkdir(parents=True)
    (folder / "pairs.json").write_text(json.dumps(rows))
    for number in numbers:
        (folder / f"{number}.png").write_bytes(picture(number))
    return folder


def local(path: Path, licence: str | None = "MIT", **more: Any) -> dict[str, Any]:
    return {"kind": "path", "path": str(path), "licence": licence, **more}


def sharegpt(path: Path, licence: str | None = "CC BY-NC 4.0") -> dict[str, Any]:
    given = {"files": [str(path)], "remap": [], "datasets": None}
    return {"kind": "sharegpt", "licence": licence, **given}


def source(**sources: Any) -> SeveralSource:
    return SeveralSource.model_validate({"kind": "several", "sources": sources})


@pytest.fixture
def both(tmp_path: Path) -> dict[str, Any]:
    """Two sources that share 10 of their 30 pairs."""
    names = {"image": "picture", "question": "asked", "chosen": "good"}
    one = table(tmp_path / "one.parquet", range(30), **names)
    columns = names
    return {
        "rlaif": local(one, columns=columns),
        "mine": sharegpt(prepared(tmp_path / "two", range(20, 50))),
    }


def test_each_source_is_fetched_into_its_folder_and_read_in_turn(tmp_path, both):
    fetched = several.fetch_data(source(**both), tmp_path / "raw")
    written = manifest.read(tmp_path / "raw")
    assert (written.parts, set(written.files)) == (fetched.parts, set(fetched.files))
    assert manifest.read(tmp_path / "raw" / "rlaif").kind == "path"
    assert manifest.read(tmp_path / "raw" / "mine").kind == "sharegpt"
    assert {"rlaif/SOURCE.json", "rlaif/one.parquet", "mine/index.json"} <= {
        file.path for file in fetched.files
    }
    records, questions = several.read(tmp_path / "raw")
    found = list(records)
    assert list(questions) == []
    assert [row.where for row in found[::30]] == [
        "rlaif: one.parquet row 1",
        "mine: two/pairs.json row 1",
    ]
    assert [row.origin for row in found] == ["rlaif"] * 30 + ["mine"] * 30


def test_a_pair_that_two_sources_hold_is_counted_once(tmp_path, both, write_params, monkeypatch):
    chosen = {"kind": "several", "sources": both}
    write_params(tmp_path / "params.yaml", **{"data.source": chosen})
    monkeypatch.chdir(tmp_path)
    loaded = params.load().data.source
    assert isinstance(loaded, SeveralSource)
    several.fetch_data(loaded, Path("raw"))
    preprocess.main(Path("raw"), Path("pairs"), Path("report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["left_out"]["exact_duplicate"] == 10
    assert report["pairs_by_origin"] == {"mine": 20, "rlaif": 30}


def test_the_same_sources_give_the_same_folder_and_are_not_fetched_twice(tmp_path, both):
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        several.fetch_data(source(**both), out)
    written = (first / "SOURCE.json").read_bytes()
    assert written == (second / "SOURCE.json").read_bytes()
    assert str(tmp_path).encode() not in written
    before = (first / "rlaif" / "one.parquet").stat().st_ino
    several.fetch_data(source(**both), first)
    assert (first / "rlaif" / "one.parquet").stat().st_ino == before


def test_a_source_that_is_taken_out_leaves_nothing(tmp_path, both):
    several.fetch_data(source(**both), tmp_path / "raw")
    del both["rlaif"]
    several.fetch_data(source(**both), tmp_path / "raw")
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["SOURCE.json", "mine"]


def test_the_source_is_named_where_one_can_not_be_had_or_read(tmp_path, both):
    both["gone"] = local(tmp_path / "gone.parquet")
    with pytest.raises(UserError, match=r"^data\.source\.sources\.gone: path: .* does not exist"):
        several.fetch_data(source(**both), tmp_path / "raw")
    assert not (tmp_path / "raw" / "SOURCE.json").exists()
    del both["gone"], both["rlaif"]["columns"]
    several.fetch_data(source(**both), tmp_path / "raw")
    records, _ = several.read(tmp_path / "raw")
    message = r"^data\.source\.sources\.rlaif: .* set data\.source\.sources\.rlaif\.columns\."
    with pytest.raises(UserError, match=message):
        list(records)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"a": {"kind": "pth"}}, "sources.a: kind 'pth' must be one of hub, path"),
    "no kind": ({"a": {}}, "sources.a: kind 'None' must be one of"),
    "itself": ({"a": {"kind": "several", "sources": {}}}, "kind 'several' must be one of"),
    "unknown key": (
        {"a": {"kind": "path", "path": "x", "licens": None}},
        "; unknown key 'licens'; did you mean 'licence'?",
    ),
    "missing key": ({"a": {"kind": "path", "path": "x"}}, "sources.a: key 'licence' is missing"),
    "type": ({"a": {"kind": "path", "path": 5, "licence": None}}, "sources.a: 'path': "),
    "columns": (
        {"a": {"kind": "path", "path": "x", "licence": None, "columns": {"imag": "x"}}},
        "sources.a: unknown key 'columns.imag'; did you mean 'image'?",
    ),
    "null column": (
        {"a": {"kind": "path", "path": "x", "licence": None, "columns": {"image": None}}},
        "sources.a: columns maps",
    ),
    "columns of no table": (
        {"a": {"kind": "easy-vqa", "columns": {"image": "x"}}},
        "sources.a: columns are of tables, and kind easy-vqa has none",
    ),
    "name": ({"../a": {"kind": "easy-vqa"}}, "'data.source.sources.../a"),
    "case": ({"a": {"kind": "easy-vqa"}, "A": {"kind": "easy-vqa"}}, "differ in case alone"),
    "none": ({}, "'data.source.sources'"),
    "password": (
        {
            "a": {
                "kind": "sharegpt",
                "files": ["https://me:s3cret@host/x.json"],
                "remap": [],
                "datasets": None,
                "licence": None,
            }
        },
        "holds a user or password",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_one_source_names_it_and_the_key(tmp_path, write_params, name):
    sources, message = MISTAKES[name]
    path = tmp_path / "params.yaml"
    write_params(path, **{"data.source": {"kind": "several", "sources": sources}})
    with pytest.raises(UserError) as caught:
        params.load(path)
    assert message in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_page_and_card_describe_every_source(tmp_path, both):
    chosen = source(**both)
    fetched = several.fetch_data(chosen, tmp_path / "raw")
    assert fetched.licence == "CC BY-NC 4.0"
    assert fetched.repo == "rlaif, mine"
    words = KINDS["several"].words(fetched)
    assert "`rlaif`, local files (2, " in words
    assert "`mine`, preference files prepared for LLaMA-Factory (33, " in words
    assert "(MIT)" in words
    assert str(tmp_path) not in words
    about = KINDS["several"].about
    assert about(fetched) is None
    part = manifest.Part("tpo", "hub", "helehan/topic-overwrite", "main", None, None, None)
    known = about(manifest.Source("several", "x", None, None, None, (), (*fetched.parts, part)))
    assert known
    assert known.citations == ("tpo",)


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["MIT", "Apache-2.0"], "Apache-2.0"),
        (["cc-by-nc-4.0", "CC BY 4.0"], "cc-by-nc-4.0"),
        (["MIT", "mit"], "mit"),
        (["MIT", None], None),
        (["MIT", "openrail"], "MIT and openrail"),
        (["openrail"], "openrail"),
    ],
)
def test_the_strictest_licence_holds_for_all(licences, expected):
    assert strictest(licences) == expected
