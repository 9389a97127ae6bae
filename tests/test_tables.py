"""Tabular sources: Parquet as topic-overwrite has it, JSON and its image files, mistakes."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.core.errors import UserError
from stages.pairs import formats, tables

COLUMNS = {
    "image": "image",
    "question": "question",
    "chosen": "chosen",
    "rejected": "rejected",
    "origin": "origin_dataset",
    "kind": None,
}
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def row(number=0, **changes):
    return {
        "image": b"image %d" % number,
        "question": f"question {number}",
        "chosen": "yes",
        "rejected": "no",
        "origin_dataset": "coco",
    } | changes


def parquet(path, rows, image=None, **options):
    names = list(rows[0])
    table = {name: pa.array([row[name] for row in rows]) for name in names}
    table["image"] = pa.array([row["image"] for row in rows], image or pa.binary())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path, **options)


def read(raw, **changes):
    return list(tables.records(raw, tables.Reading(COLUMNS | changes)))


def mistake(raw, **changes):
    with pytest.raises(UserError) as error:
        read(raw, **changes)
    return str(error.value)


def test_rows_come_file_by_file_in_the_order_of_their_names(tmp_path):
    parquet(tmp_path / "b.parquet", [row(2), row(3)])
    parquet(tmp_path / "a.parquet", [row(0), row(1)], row_group_size=1)
    found = read(tmp_path)
    assert [record.question for record in found] == [f"question {i}" for i in range(4)]
    assert found[3].where == "b.parquet row 2"
    assert found[3].images == (b"image 3",)
    assert (found[3].origin, found[3].kind) == ("coco", "")


def test_rows_of_folders_are_named_by_their_path(tmp_path):
    parquet(tmp_path / "data" / "a.parquet", [row()])
    assert read(tmp_path)[0].where == "data/a.parquet row 1"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (STRUCT, {"bytes": b"png", "path": "x.png"}),
        (STRUCT, {"bytes": b"png", "path": None}),
        (pa.struct({"bytes": pa.binary()}), {"bytes": b"png"}),
        (pa.binary(), b"png"),
        (pa.large_binary(), b"png"),
        (pa.binary(3), b"png"),
        (pa.string(), "pictures/x.png"),
        (STRUCT, {"bytes": None, "path": "pictures/x.png"}),
    ],
)
def test_an_image_may_be_bytes_or_a_struct_or_a_path(tmp_path, kind, value):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "x.png").write_bytes(b"png")
    parquet(tmp_path / "a.parquet", [row(image=value)], kind)
    assert read(tmp_path)[0].images == (b"png",)


@pytest.mark.parametrize(
    "value", [None, {"bytes": None, "path": None}, {"bytes": b"", "path": "x"}]
)
def test_an_absent_image_is_none(tmp_path, value):
    parquet(tmp_path / "a.parquet", [row(image=value)], STRUCT)
    assert read(tmp_path)[0].images is None


def test_a_null_text_is_none(tmp_path):
    parquet(tmp_path / "a.parquet", [row(chosen=None), row()])
    assert [record.chosen for record in read(tmp_path)] == [None, "yes"]


def test_text_may_be_stored_as_categories(tmp_path):
    table = pa.table({name: pa.array([value] * 3) for name, value in row().items()})
    at = table.schema.get_field_index("chosen")
    table = table.set_column(at, "chosen", table["chosen"].dictionary_encode())
    pq.write_table(table, tmp_path / "a.parquet")
    assert [record.chosen for record in read(tmp_path)] == ["yes"] * 3


def test_origin_and_kind_may_be_numbers(tmp_path):
    parquet(tmp_path / "a.parquet", [row(origin_dataset=7)])
    assert read(tmp_path, kind="question")[0].origin == "7"


def test_other_columns_are_not_read(tmp_path):
    parquet(tmp_path / "a.parquet", [row(secret="x" * 100)])
    table, layout = tables.opened(tmp_path / "a.parquet", COLUMNS)
    assert layout
    (only,) = table.rows(layout.columns)
    assert isinstance(only, dict)
    assert "secret" not in only


@pytest.mark.parametrize("field", ["image", "question", "chosen", "rejected", "origin", "kind"])
def test_a_missing_column_names_file_column_columns_and_parameter(tmp_path, field):
    parquet(tmp_path / "good.parquet", [row()])
    parquet(tmp_path / "later.parquet", [row(extra="x")])
    message = mistake(tmp_path, **{field: "pictrue"})
    assert str(tmp_path / "good.parquet") in message
    assert "'pictrue'" in message
    assert "image, question, chosen, rejected, origin_dataset" in message
    assert f"data.columns.{field}" in message
    assert ("null" in message) == (field in ("origin", "kind"))


def test_a_missing_column_in_a_later_file_is_found_before_the_first_row(tmp_path):
    parquet(tmp_path / "a.parquet", [row()])
    parquet(tmp_path / "b.parquet", [{k: v for k, v in row().items() if k != "rejected"}])
    with pytest.raises(UserError, match=r"b\.parquet has no column 'rejected'"):
        next(tables.records(tmp_path, tables.Reading(COLUMNS)))


def test_a_column_of_a_wrong_type_is_named(tmp_path):
    parquet(tmp_path / "a.parquet", [row(chosen=[{"role": "assistant"}])])
    message = mistake(tmp_path)
    assert "column 'chosen' holds list" in message
    assert "data.columns.chosen" in message
    assert "data.columns.image" in mistake(tmp_path, chosen="question", image="chosen")


@pytest.mark.parametrize("damage", ["cut", "empty", "html"])
def test_a_damaged_parquet_file_is_named_with_the_fix(tmp_path, damage):
    path = tmp_path / "a.parquet"
    parquet(path, [row(i) for i in range(10)])
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-10], "empty": b"", "html": b"<html>" * 50}[damage])
    message = mistake(tmp_path)
    assert f"{path} is truncated or not a Parquet file" in message
    assert "fetch it again" in message


def test_damage_inside_a_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    parquet(path, [row(i, image=os.urandom(1000)) for i in range(100)], compression="gzip")
    data = bytearray(path.read_bytes())
    data[1000:3000] = b"\xff" * 2000
    path.write_bytes(data)
    assert str(path) in mistake(tmp_path)


def test_a_folder_without_data_is_a_mistake(tmp_path):
    (tmp_path / "SOURCE.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    parquet(tmp_path / ".cache" / "a.parquet", [row()])
    assert "data.source" in mistake(tmp_path)


def json_row(number=0, **changes):
    return row(number, image="pictures/x.png") | changes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "x.png").write_bytes(b"png")
    (tmp_path / "SOURCE.json").write_text('{"kind": "path"}')
    return tmp_path


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", as_lines),
        ("a.json", as_lines),
        ("a.json", json.dumps),
        ("a.json", lambda rows: "\ufeff" + json.dumps(rows, indent=4) + "\n"),
        ("a.jsonl", lambda rows: as_lines(rows).replace("\n", "\n\n")),
    ],
)
def test_json_and_json_lines_take_images_from_files_next_to_them(folder, name, write):
    (folder / name).write_text(write([json_row(i) for i in range(3)]), encoding="utf-8")
    found = read(folder)
    assert [record.question for record in found] == ["question 0", "question 1", "question 2"]
    assert {record.images for record in found} == {(b"png",)}
    assert found[2].where == f"{name} row 3"


@pytest.mark.parametrize(
    "text",
    [
        "[{}",
        "[{} {}]",
        "[{},]",
        "[,]",
        "[",
        "[{}, {]",
        '[{"a": 1',
        "[[1]]",
        "[1]",
        '["a"]',
        "[" * 9999,
    ],
)
def test_a_broken_json_list_is_named(folder, text):
    (folder / "a.json").write_text(text)
    assert str(folder / "a.json") in mistake(folder)


def test_a_broken_line_is_named_by_its_number(folder):
    (folder / "a.jsonl").write_text(json.dumps(json_row()) + "\n{]\n")
    assert "a.jsonl line 2" in mistake(folder)


def test_json_that_is_no_data_is_named(folder):
    (folder / "config.json").write_text(json.dumps({"a": 1}, indent=2))
    assert "config.json is one JSON object with a, not rows" in mistake(folder)


def test_text_that_is_not_utf8_is_named(folder):
    (folder / "a.jsonl").write_bytes(b'{"question": "\xff"}\n')
    assert "not UTF-8" in mistake(folder)


def test_a_column_missing_from_json_names_the_parameter(folder):
    (folder / "a.jsonl").write_text(as_lines([json_row()]))
    message = mistake(folder, chosen="best")
    assert "has no column 'best'" in message
    assert "data.columns.chosen" in message


def test_a_key_missing_from_some_json_rows_is_none_there(folder):
    rows = [json_row(0), {k: v for k, v in json_row(1).items() if k not in ("chosen", "image")}]
    (folder / "a.jsonl").write_text(as_lines(reversed(rows)))
    first, second = read(folder)
    assert (first.chosen, first.images) == (None, None)
    assert (second.chosen, second.images) == ("yes", (b"png",))


@pytest.mark.parametrize("odd", [["yes"], 3, float("nan"), {"a": 1}, True], ids=str)
def test_an_odd_cell_costs_its_row(folder, odd):
    (folder / "a.jsonl").write_text(as_lines([json_row(), json_row(chosen=odd), json_row()]))
    first, second, third = read(folder)
    assert (first.chosen, third.chosen) == ("yes", "yes")
    assert (second.chosen, second.images) == (None, None)
    assert "chosen" in second.note


@pytest.mark.parametrize("field", ["question", "chosen", "image"])
def test_an_odd_column_stops_the_run_and_names_row_and_parameter(folder, field):
    rows = [json_row(**{field: 5 if i % 3 else "pictures/x.png"}) for i in range(1, 10)]
    (folder / "a.jsonl").write_text(as_lines(rows))
    message = mistake(folder)
    assert f"a.jsonl row 1: {'the ' * (field == 'image')}{field} holds int" in message
    assert "6 of its first 9 rows" in message
    assert "data.columns" in message


@pytest.mark.parametrize("path", ["../x.png", "pictures/../../x.png", "/etc/passwd", "..", "a\0b"])
def test_an_image_path_that_leaves_the_folder_is_not_read(folder, path):
    (folder.parent / "x.png").write_bytes(b"secret")
    (folder / "a.jsonl").write_text(as_lines([json_row(), json_row(image=path)]))
    _, second = read(folder)
    assert second.images is None
    assert "leaves the folder" in second.note


@pytest.mark.parametrize(
    "path", ["./pictures/x.png", "pictures/../pictures/x.png", "pictures//x.png"]
)
def test_a_roundabout_image_path_inside_the_folder_is_followed(folder, path):
    (folder / "a.jsonl").write_text(as_lines([json_row(image=path)]))
    assert read(folder)[0].images == (b"png",)


def test_files_that_are_links_into_a_cache_are_read(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    (cache / "1234").write_bytes(b"cached")
    (folder / "pictures" / "y.png").symlink_to(cache / "1234")
    (folder / "a.jsonl").write_text(as_lines([json_row(image="pictures/y.png")]))
    assert read(folder)[0].images == (b"cached",)


@pytest.mark.parametrize(
    "path", ["none.png", "pictures", "pictures/x.png/y", "\ud800", "x" * 999, "."]
)
def test_an_image_file_that_is_not_there_is_a_missing_field(folder, path):
    (folder / "a.jsonl").write_text(as_lines([json_row(image=path)]))
    (record,) = read(folder)
    assert record.images is None
    assert record.note


def test_an_image_is_relative_to_its_own_data_file(folder):
    (folder / "part").mkdir()
    (folder / "part" / "x.png").write_bytes(b"other")
    (folder / "part" / "a.jsonl").write_text(as_lines([json_row(image="x.png")]))
    assert read(folder)[0].images == (b"other",)


def test_rows_are_counted_without_reading_them_where_that_can_be(folder):
    parquet(folder / "a.parquet", [row(i) for i in range(3)])
    parquet(folder / "b.parquet", [row(i) for i in range(4)])
    assert tables.count(folder) == 7
    (folder / "a.jsonl").write_text(as_lines([json_row()]))
    assert tables.count(folder) is None


def test_a_file_is_read_in_pieces_of_a_bounded_size(tmp_path, monkeypatch):
    sizes = []
    real = pq.ParquetFile.iter_batches

    def watched(self, batch_size, **options):
        for batch in real(self, batch_size, **options):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    monkeypatch.setattr(formats, "_BATCH_BYTES", 100_000)
    rows = [row(i, image=os.urandom(10_000)) for i in range(200)]
    parquet(tmp_path / "a.parquet", rows)
    assert len(read(tmp_path)) == 200
    assert max(sizes) < 150_000


# What a message may print


def test_a_message_prints_at_most_100_characters_of_a_value(folder):
    """A base64 image in the image column once made a message of 209,844 characters."""
    for value in ("x/" * 100_000, "../" + "y" * 100_000, "https://a.example/" + "z" * 100_000):
        (folder / "a.jsonl").write_text(as_lines([json_row(image=value)] * 2))
        try:
            notes = [record.note for record in read(folder)]
        except UserError as error:
            notes = [str(error)]
        assert notes[0]
        assert max(map(len, notes)) < 600
    names = {"c" * 5000: 1} | {f"column {i}": 1 for i in range(5000)}
    (folder / "a.jsonl").write_text(as_lines([names]))
    message = mistake(folder)
    assert len(message) < 1000
    assert "and 4,981 more" in message


# Files that are data of another kind


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_in_a_data_key_are_read(folder, indent):
    text = json.dumps({"version": 1, "data": [json_row(), json_row(1)]}, indent=indent)
    (folder / "a.json").write_text(text)
    assert [record.question for record in read(folder)] == ["question 0", "question 1"]


@pytest.mark.parametrize("indent", [None, 1])
def test_annotations_are_called_what_they_are(folder, indent):
    coco = {"images": [{"file_name": "a.png"}], "annotations": [{"id": 1}], "categories": []}
    (folder / "coco.json").write_text(json.dumps(coco, indent=indent))
    message = mistake(folder)
    assert "coco.json is one JSON object with images, annotations, categories, not rows" in message
    assert "not valid JSON" not in message


def test_descriptions_next_to_the_data_are_not_data(folder):
    (folder / "a.jsonl").write_text(as_lines([json_row()]))
    for name in ("dataset_info.json", "state.json", "dataset_dict.json"):
        (folder / name).write_text(json.dumps({"a": {"file_name": "a.jsonl"}}, indent=1))
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._a.jsonl").write_bytes(b"\0\5\26\7")
    assert len(read(folder)) == 1


def test_a_file_that_is_one_row_is_read(folder):
    (folder / "a.json").write_text(json.dumps(json_row(), indent=1))
    assert [record.question for record in read(folder)] == ["question 0"]


# Published splits


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-0.jsonl", "validation-0.jsonl", "test.jsonl"], ["test", "train", "validation"]),
        (["train/a.jsonl", "dev/a.jsonl"], ["validation", "train"]),
        (["train.jsonl", "eval.jsonl"], ["test", "train"]),
        (["train-0.jsonl", "train-1.jsonl"], ["", ""]),
        (["train.jsonl", "test.jsonl", "more.jsonl"], ["", "", ""]),
        (["contest.jsonl", "trained.jsonl"], ["", ""]),
    ],
)
def test_files_named_for_splits_keep_them_if_all_are(tmp_path, names, splits):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(as_lines([row(image="x.png")]))
    assert [record.split for record in read(tmp_path)] == splits


# Columns with other names


def test_a_mapping_is_proposed_for_columns_with_other_names(folder):
    renamed = {"picture": "pictures/x.png", "query": "q", "preferred": "a", "dispreferred": "b"}
    (folder / "a.jsonl").write_text(as_lines([renamed]))
    message = mistake(folder, origin=None)
    for line in (
        "image: picture",
        "question: query",
        "chosen: preferred",
        "rejected: dispreferred",
    ):
        assert f"data.columns.{line}" in message
    proposed = {"image": "picture", "question": "query"}
    proposed |= {"chosen": "preferred", "rejected": "dispreferred"}
    assert read(folder, origin=None, **proposed)[0].images == (b"png",)


def test_a_column_that_was_renamed_and_is_not_there_is_a_mistake_and_no_layout(folder):
    turns = {"prompt": "q", "chosen": "a", "rejected": "b", "image": "pictures/x.png"}
    (folder / "a.jsonl").write_text(as_lines([turns]))
    assert read(folder)[0].question == "q"
    assert "'asked'" in mistake(folder, question="asked")
