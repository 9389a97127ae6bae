"""What a row calls its image: fetch copies that file, and preprocess reads it."""

import json
import os
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.core.errors import UserError
from stages.pairs import named, tables
from stages.sources import mentions
from tests.copies import copied_data

COLUMNS = {"image": "image", "question": "question", "chosen": "chosen", "rejected": "rejected"}


def rows(*names: object) -> list[dict[str, object]]:
    texts = {"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    return [{"image": name, **texts} for name in names]


def write(table: Path, *names: object) -> Path:
    table.parent.mkdir(parents=True, exist_ok=True)
    if table.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows(*names)), table)
    elif table.suffix == ".jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows(*names)))
    else:
        table.write_text(json.dumps(rows(*names)))
    return table


def image(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(f"bytes of {name}".encode())


def copied(source: Path, out: Path) -> list[str]:
    return [file.path for file in copied_data(source, out).files]


def images_read(raw: Path) -> list[tuple[bytes, ...] | None]:
    """The images of each row of what fetch left, as preprocess gets them."""
    return [found.images for found in tables.records(raw, tables.Reading(COLUMNS))]


SPELLINGS = {
    "avif": ("images/a.avif", "images/a.avif"),
    "ppm": ("images/b.ppm", "images/b.ppm"),
    "jfif": ("images/c.jfif", "images/c.jfif"),
    "no suffix": ("images/d", "images/d"),
    "roundabout": ("images/e.png", "./images/../images/e.png"),
    "backslashes": ("images/f.png", r"images\f.png"),
    "other case": ("images/g.png", "Images/G.PNG"),
    "NFD on disk": (unicodedata.normalize("NFD", "images/é.png"), "images/é.png"),
    "NFC on disk": ("images/é.png", unicodedata.normalize("NFD", "images/é.png")),
    "blanks": ("images/my cat.png", "images/my cat.png"),
}


@pytest.mark.parametrize("table", ["pairs.jsonl", "pairs.json", "pairs.parquet"])
@pytest.mark.parametrize("whole_folder", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_file_that_a_row_names_is_copied_and_read_whatever_it_is_called(
    tmp_path, table, whole_folder, spelling
):
    on_disk, in_row = SPELLINGS[spelling]
    here = tmp_path / "here"
    image(here, on_disk)
    write(here / table, in_row)
    assert on_disk in copied(here if whole_folder else here / table, tmp_path / "raw")
    assert images_read(tmp_path / "raw") == [(f"bytes of {on_disk}".encode(),)]


@pytest.mark.parametrize("value", [{"path": "a.ppm", "bytes": None}, ["a.ppm"]], ids=str)
def test_a_parquet_brings_the_images_that_its_structs_and_lists_name(tmp_path, value):
    image(tmp_path / "here", "a.ppm")
    write(tmp_path / "here" / "x.parquet", value)
    assert copied(tmp_path / "here" / "x.parquet", tmp_path / "raw") == ["a.ppm", "x.parquet"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_csv_brings_the_images_that_its_cells_name(tmp_path, suffix):
    image(tmp_path / "here", "pictures/a, b.png")
    sign = "," if suffix == ".csv" else "\t"
    lines = [f"image{sign}question", f'"pictures/a, b.png"{sign}What?']
    (tmp_path / "here" / f"rows{suffix}").write_text("\n".join(lines))
    found = copied(tmp_path / "here" / f"rows{suffix}", tmp_path / "raw")
    assert found == ["pictures/a, b.png", f"rows{suffix}"]


def test_a_name_that_may_be_two_files_is_none_and_the_row_says_so(tmp_path):
    image(tmp_path / "here", "Cat.png")
    image(tmp_path / "here", "cat.png")
    table = write(tmp_path / "here" / "pairs.jsonl", "CAT.png", "cat.png", "kat.png")
    assert copied(table, tmp_path / "raw") == ["cat.png", "pairs.jsonl"]
    assert named.find(tmp_path / "here", "CAT.png") == (
        "'CAT.png' may be any of 'Cat.png', 'cat.png'; write it as the file is written"
    )
    assert named.find(tmp_path / "here", "kat.png") == "'kat.png': no such file"


@pytest.mark.parametrize(
    "name",
    ["x" * 300, "a/" * 400 + "b", "loop/a.png", "\ud800.png", "here.png/a.png", "."],
    ids=["long", "deep", "loop", "half a surrogate", "below a file", "folder"],
)
def test_what_names_no_file_is_said_in_a_few_words(tmp_path, name):
    image(tmp_path, "here.png")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    found = named.find(tmp_path, name)
    assert isinstance(found, str)
    assert len(found) < 250
    found.encode()


@pytest.mark.parametrize("name", ["../x.png", "/etc/passwd", r"..\x.png", r"C:\x.png", "C:/x.png"])
def test_no_file_outside_the_folder_is_copied(tmp_path, name):
    image(tmp_path, "x.png")
    table = write(tmp_path / "here" / "pairs.jsonl", name)
    assert named.leads_out(name)
    assert copied(table, tmp_path / "raw") == ["pairs.jsonl"]


def test_a_link_that_leads_out_is_not_copied_with_a_table(tmp_path):
    image(tmp_path, "secret.png")
    table = write(tmp_path / "here" / "pairs.jsonl", "link.png")
    (tmp_path / "here" / "link.png").symlink_to(tmp_path / "secret.png")
    assert copied(table, tmp_path / "raw") == ["pairs.jsonl"]


def test_annotations_and_what_a_system_keeps_for_itself_stay_behind(tmp_path, capsys):
    here = tmp_path / "here"
    for name in ("images/a.png", "__MACOSX/images/._a.png", ".cache/b.png", "images/.DS_Store"):
        image(here, name)
    write(here / "pairs.jsonl", "images/a.png", "__MACOSX/images/._a.png", ".cache/b.png")
    (here / "__MACOSX" / "._pairs.jsonl").write_bytes(b"\0\5\26\7")
    coco = {"images": [{"file_name": "a.png"}], "annotations": [{"id": 1}], "categories": []}
    (here / "instances.json").write_text(json.dumps(coco))
    (here / "dataset_info.json").write_text(json.dumps({"pairs": {}}, indent=1))
    (here / "data.json").write_text(json.dumps({"data": rows("images/a.png")}))
    found = copied(here, tmp_path / "raw")
    assert found == ["data.json", "images/a.png", "pairs.jsonl"]
    said = capsys.readouterr().out
    assert "one JSON object and not rows: dataset_info.json, instances.json" in said


def test_a_single_json_object_is_not_left_out_where_it_is_all_there_is(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "only.json").write_text(json.dumps(rows("a.png")[0]))
    assert copied(tmp_path / "here", tmp_path / "raw") == ["only.json"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', True),
        ('{\n "a": 1\n}', True),
        ('{"a": 1}\n{"a": 2}\n', False),
        ('[{"a": 1}]', False),
        ('{"data": [{"a": 1}]}', False),
        ('{\n  "data": [\n {"a": 1}]}', False),
        ('{"a": [' + '{"b": 1}, ' * 20_000 + "0]}", True),
        ('{"a": "' + "x" * 70_000 + '"}\n{"a": 2}\n', False),
    ],
)
def test_one_json_object_is_told_from_json_lines(tmp_path, text, expected):
    (tmp_path / "x.json").write_text(text)
    assert mentions.holds_no_rows(tmp_path / "x.json") is expected
    (tmp_path / "x.jsonl").write_text(text)
    assert not mentions.holds_no_rows(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{]", "line 1 is not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_searched_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"bad\.jsonl.*{message}"):
        copied_data(tmp_path / "bad.jsonl", tmp_path / "raw")


def test_a_number_of_5000_digits_and_odd_line_ends_do_not_stop_the_search(tmp_path):
    image(tmp_path, "a.ppm")
    line = '{"id": %s, "text": "one\u2028two\u0085three", "image": "a.ppm"}\n' % ("1" * 5000)
    (tmp_path / "x.jsonl").write_text(line, encoding="utf-8")
    assert copied(tmp_path / "x.jsonl", tmp_path / "raw") == ["a.ppm", "x.jsonl"]
