"""Every kind of file that holds rows, whole, packed, damaged and hostile."""

import contextlib
import csv
import gzip
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.core.errors import UserError
from stages.pairs import formats, parquet_pages, tables
from stages.pairs.suffixes import SUFFIXES, ending
from tests.copies import copied_data

ROOT = Path(__file__).parent.parent
COLUMNS = {name: name for name in ("image", "question", "chosen", "rejected")} | {
    "origin": None,
    "kind": None,
}
ROWS = [
    {"image": "x.png", "question": f"question {i}, “é”", "chosen": "yes\nno", "rejected": 'a "b"'}
    for i in range(3)
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def cells(rows, delimiter):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8-sig")


def arrow(rows, new=pa.ipc.new_stream):
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def tar(files):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return sink.getvalue()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def webdataset(rows):
    files = {}
    for i, row in enumerate(rows):
        files[f"shard/{i:04}.png"] = b"png"
        texts = {name: text for name, text in row.items() if name != "image"}
        files[f"shard/{i:04}.json"] = json.dumps(texts).encode()
    return tar(files)


WRITE = {
    ".parquet": parquet,
    ".arrow": arrow,
    ".tar": webdataset,
    ".jsonl": lines,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": lambda rows: cells(rows, ","),
    ".tsv": lambda rows: cells(rows, "\t"),
}


PACK: dict[str, Any] = {"": bytes, "gz": gzip.compress, "zst": zstd}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "x.png").write_bytes(b"png")
    return tmp_path


def read(folder, columns=COLUMNS):
    return list(tables.records(folder, tables.Reading(columns)))


def mistake(folder, columns=COLUMNS):
    with pytest.raises(UserError) as error:
        read(folder, columns)
    message = str(error.value)
    assert len(message) < 1000
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_kind_of_file_is_read(folder, suffix):
    plain, _, packed = suffix.lstrip(".").partition(".")
    content = WRITE[f".{plain}"](ROWS)
    pack = PACK[packed]
    (folder / f"Rows{suffix.upper()}").write_bytes(pack(content))
    found = read(folder)
    assert [record.question for record in found] == [row["question"] for row in ROWS]
    assert {(record.chosen, record.rejected) for record in found} == {("yes\nno", 'a "b"')}
    assert {record.images for record in found} == {(b"png",)}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("whole_folder", [True, False])
def test_fetch_copies_each_kind_of_file_with_the_images_that_it_names(folder, suffix, whole_folder):
    (folder / "x.png").rename(folder / "x.ppm")
    plain, _, packed = suffix.lstrip(".").partition(".")
    pack = PACK[packed]
    (folder / f"rows{suffix}").write_bytes(
        pack(WRITE[f".{plain}"]([row | {"image": "x.ppm"} for row in ROWS]))
    )
    source = folder if whole_folder else folder / f"rows{suffix}"
    copied_data(source, folder.parent / f"{folder.name}-raw")
    assert {r.images for r in read(folder.parent / f"{folder.name}-raw")} == {(b"png",)}


def test_a_tar_beside_a_table_is_of_images_and_not_data(folder):
    (folder / "a.jsonl").write_bytes(lines(ROWS))
    (folder / "images.tar").write_bytes(tar({"a.png": b"png"}))
    assert len(read(folder)) == 3


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_file_is_named_in_a_sentence(folder, suffix, damage):
    plain, _, packed = suffix.lstrip(".").partition(".")
    pack = PACK[packed]
    content = pack(WRITE[f".{plain}"](ROWS * 50))
    kinds = {
        "cut": content[: len(content) * 2 // 3 - 5],
        "empty": b"",
        "other": b"\x89\0\xff<html>",
    }
    (folder / f"rows{suffix}").write_bytes(kinds[damage])
    if damage == "empty" and plain in ("jsonl", "json", "csv", "tsv"):
        assert read(folder) == []
    elif damage == "cut" and not packed and plain in ("csv", "tsv"):
        assert len(read(folder)) < 150  # CSV can't tell
    else:
        assert f"rows{suffix}" in mistake(folder)


def test_a_csv_file_with_semicolons_is_read(folder):
    (folder / "a.csv").write_bytes(cells(ROWS, ";"))
    assert [record.chosen for record in read(folder)] == ["yes\nno"] * 3


def test_an_arrow_file_of_either_form_is_read(folder):
    (folder / "a.arrow").write_bytes(arrow(ROWS, pa.ipc.new_file))
    assert len(read(folder)) == 3


def test_a_folder_that_datasets_saved_is_read(folder):
    """As ``datasets.save_to_disk`` leaves it: images as structs, descriptions beside the data."""
    rows = [row | {"image": {"bytes": b"png", "path": None}} for row in ROWS]
    (folder / "train").mkdir()
    (folder / "train" / "data-00000-of-00001.arrow").write_bytes(arrow(rows))
    (folder / "train" / "cache-1f.arrow").write_bytes(arrow([{"indices": 1}]))
    (folder / "train" / "dataset_info.json").write_text('{\n "features": {}\n}')
    (folder / "train" / "state.json").write_text('{\n "_data_files": []\n}')
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert {record.images for record in read(folder)} == {(b"png",)}


def test_a_webdataset_takes_several_images_and_text_members(folder):
    files = {
        "a.0.jpg": b"one",
        "a.1.jpg": b"two",
        "a.question.txt": b"What?",
        "a.chosen.txt": b"yes",
        "a.rejected.txt": b"no",
        ".hidden": b"x",
        "__MACOSX/._a.0.jpg": b"x",
    }
    (folder / "a.tar").write_bytes(tar(files))
    (record,) = read(folder)
    assert (record.images, record.question) == ((b"one", b"two"), "What?")


def test_a_webdataset_that_was_packed_from_inside_its_folder_has_rows(folder):
    rows = {"a.jpg": b"one", "a.json": json.dumps(ROWS[0]).encode()}
    (folder / "a.tar").write_bytes(tar({f"./{name}": data for name, data in rows.items()}))
    assert [record.images for record in read(folder)] == [(b"one",)]


def test_links_and_devices_in_a_tar_are_not_followed(folder):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo("0.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        content = json.dumps({"question": "q", "chosen": "a", "rejected": "b", "image": "x.png"})
        member = tarfile.TarInfo("0.json")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content.encode()))
    (folder / "a.tar").write_bytes(sink.getvalue())
    assert read(folder)[0].images == (b"png",)


# Types of columns


KINDS = {
    "dictionary": pa.dictionary(pa.int8(), pa.string()),
    "large": pa.large_string(),
    "view": pa.string_view(),
}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("name", KINDS)
def test_text_of_each_arrow_type_is_read(folder, suffix, name):
    kind = KINDS[name]
    columns = {n: pa.array([row[n] for row in ROWS]).cast(kind) for n in ROWS[0]}
    sink = pa.BufferOutputStream()
    table = pa.table(columns)
    if suffix == ".parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (folder / f"a{suffix}").write_bytes(sink.getvalue().to_pybytes())
    found = read(folder)
    assert [record.question for record in found] == [row["question"] for row in ROWS]
    assert {record.images for record in found} == {(b"png",)}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.list_(pa.binary()), [b"png"]),
        (
            pa.large_list(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            [{"bytes": b"png"}],
        ),
        (pa.list_(pa.string(), 1), ["x.png"]),
        (pa.binary_view(), b"png"),
        (pa.dictionary(pa.int8(), pa.binary()), b"png"),
        (pa.list_(pa.list_(pa.binary())), [[b"png"]]),
    ],
    ids=str,
)
def test_images_of_each_arrow_type_are_read(folder, kind, value):
    columns = {n: [row[n] for row in ROWS] for n in ROWS[0]}
    if pa.types.is_dictionary(kind):
        columns["image"] = pa.array([value] * 3).dictionary_encode()
    else:
        columns["image"] = pa.array([value] * 3, kind)
    pq.write_table(pa.table(columns), folder / "a.parquet")
    assert {record.images for record in read(folder)} == {(b"png",)}


def test_a_run_length_encoded_column_is_read(folder):
    columns = {n: pa.array([row[n] for row in ROWS]) for n in ROWS[0]}
    columns["chosen"] = pa.RunEndEncodedArray.from_arrays([3], ["yes"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.table(columns).schema) as writer:
        writer.write_table(pa.table(columns))
    (folder / "a.arrow").write_bytes(sink.getvalue().to_pybytes())
    assert [record.chosen for record in read(folder)] == ["yes"] * 3


# Hostile tables


def broken_text():
    """A column of text whose second value is no UTF-8."""
    offsets = pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 1, 2, 3)))
    return pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffc")])


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_text_that_is_not_utf8_costs_its_row(folder, suffix):
    columns = {n: pa.array([row[n] for row in ROWS]) for n in ROWS[0]} | {"chosen": broken_text()}
    table = pa.table(columns)
    if suffix == ".parquet":
        pq.write_table(table, folder / "a.parquet")
    else:
        with (
            pa.OSFile(str(folder / "a.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    found = read(folder)
    assert [record.chosen for record in found] == ["a", None, "c"]
    assert found[1].note == "chosen is not UTF-8 text"


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".csv"])
def test_duplicate_column_names_are_named(folder, suffix):
    names = ["image", "question", "chosen", "rejected", "question"]
    table = pa.Table.from_arrays([pa.array(["x"])] * 5, names=names)
    if suffix == ".parquet":
        pq.write_table(table, folder / "a.parquet")
    elif suffix == ".arrow":
        with (
            pa.OSFile(str(folder / "a.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    else:
        (folder / "a.csv").write_text(",".join(names) + "\n1,2,3,4,5\n")
    assert "more than one column 'question'" in mistake(folder)


def test_a_number_of_5000_digits_costs_its_row_where_text_should_be(folder):
    plain = json.dumps(ROWS[0])
    long = plain.replace('"yes\\nno"', "1" * 5000)
    aside = plain.replace("{", '{"id": %s, ' % ("2" * 5000), 1)
    (folder / "a.jsonl").write_text("\n".join([plain, long, aside]))
    found = read(folder)
    assert [record.chosen for record in found] == ["yes\nno", None, "yes\nno"]
    assert "5,000 digits" in found[1].note


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("start", ["[", '{"a":', '[{"a":['])
def test_json_100_000_deep_is_refused(folder, suffix, start):
    (folder / f"a{suffix}").write_text(start * 100_000)
    assert "not valid JSON" in mistake(folder)


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_line_ends_of_unicode_inside_a_line_of_json_are_data(folder, sign):
    row = ROWS[0] | {"chosen": f"one{sign}two"}
    (folder / "a.jsonl").write_text(
        json.dumps(row, ensure_ascii=ord(sign) < 32) + "\n", encoding="utf-8"
    )
    assert read(folder)[0].chosen == f"one{sign}two"


@pytest.mark.parametrize(
    "image", ["\ud800.png", "a\udcff.png", "x" * 5000, "loop/x.png", "loop", "x.png/y", "\0"]
)
def test_a_name_that_no_file_can_have_costs_its_row(folder, image):
    os.symlink(folder / "loop", folder / "loop")
    (folder / "a.jsonl").write_bytes(lines([ROWS[0], ROWS[0] | {"image": image}]))
    _, second = read(folder)
    assert second.images is None
    assert 0 < len(second.note) < 400


def test_a_data_file_whose_name_is_not_utf8_is_read(folder):
    name = os.fsdecode(b"r\xffws.jsonl")
    (folder / name).write_bytes(lines(ROWS))
    assert len(read(folder)) == 3


@pytest.mark.parametrize("name", ["loop.jsonl", "gone.jsonl", "folder.jsonl", "pipe.jsonl"])
def test_what_is_no_file_is_not_data(folder, name):
    (folder / "a.jsonl").write_bytes(lines(ROWS))
    if name.startswith("folder"):
        (folder / name).mkdir()
    elif name.startswith("pipe"):
        os.mkfifo(folder / name)  # to open one is to wait for ever
    else:
        os.symlink(folder / name if name.startswith("loop") else folder / "nowhere", folder / name)
    assert len(read(folder)) == 3


def test_a_row_of_csv_with_more_or_fewer_cells_is_left_out(folder):
    text = "image,question,chosen,rejected\nx.png,q,a,b\nx.png,q,a\nx.png,q,a,b,c\n\nx.png,q,a,b\n"
    (folder / "a.csv").write_text(text)
    assert [record.question for record in read(folder)] == ["q", None, None, "q"]
    assert "3 cells, and the header 4" in read(folder)[1].note


# Memory


READ_ALL = """
import sys
from pathlib import Path
from stages.pairs import formats, parquet_pages, tables
formats._DECODED_BYTES = 2**24
from stages.sources import mentions
columns = dict(image="image", question="question", chosen="chosen", rejected="rejected")
folder = Path(sys.argv[1])
assert sum(1 for _ in tables.records(folder, tables.Reading(columns))) == 1024
assert mentions.files_named_in(next(folder.iterdir()), folder) == set()
# Not getrusage, in which a child begins with what its parent had.
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def peak_of(script, *arguments):
    """Peak memory in bytes of a fresh process that may map 3 GB at most."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["parquet", "dictionary", "run-length", "view"])
def test_one_large_value_repeated_over_many_rows_stays_one(tmp_path, kind):
    """1,024 rows of the same 1 MB, which a file holds once: 1 GB if all are decoded at once."""
    count, text = 1024, "x" * 1_000_000
    table = {name: pa.array(["x.png"] * count) for name in ("image", "question", "rejected")}
    table["chosen"] = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), [text])
    if kind == "run-length":
        table["chosen"] = pa.RunEndEncodedArray.from_arrays([count], [text])
    if kind == "view":
        view = len(text).to_bytes(4, "little") + text[:4].encode() + bytes(8)
        buffers = [None, pa.py_buffer(view * count), pa.py_buffer(text.encode())]
        table["chosen"] = pa.Array.from_buffers(pa.string_view(), count, buffers)
    if kind == "parquet":
        options = {"compression": "zstd", "store_schema": False}  # so that it reads as plain text
        pq.write_table(pa.table(table), tmp_path / "a.parquet", **options)
        assert (tmp_path / "a.parquet").stat().st_size < 10_000
        assert pq.read_schema(tmp_path / "a.parquet").field("chosen").type == pa.string()
    else:
        whole = pa.table(table)
        with (
            pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, whole.schema) as writer,
        ):
            writer.write_table(whole)
    assert peak_of(READ_ALL, tmp_path) < 350 * 2**20


def test_a_page_that_is_too_large_to_be_read_at_once_is_refused(tmp_path, monkeypatch):
    table = {name: ["x" * 100] * 100 for name in ("image", "question", "rejected")}
    table["chosen"] = [os.urandom(500).hex() for _ in range(100)]
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    monkeypatch.setattr(formats, "_PAGE_BYTES", 50_000)
    message = mistake(tmp_path)
    assert "column 'chosen' keeps 10" in message
    assert "row_group_size=100" in message
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=10)
    assert len(read(tmp_path)) == 100


def test_values_are_bounded(folder, monkeypatch):
    monkeypatch.setattr("stages.pairs.pictures.MOST_BYTES", 10)
    (folder / "y.png").write_bytes(b"y" * 11)
    (folder / "a.jsonl").write_bytes(
        lines([*ROWS, ROWS[0] | {"chosen": "a" * 2**20 + "b"}, ROWS[0] | {"image": "y.png"}])
    )
    found = read(folder)
    assert found[2].note == ""
    assert "1,048,577 characters" in found[3].note
    assert "11 bytes" in found[4].note


def test_a_line_that_never_ends_is_refused(folder, monkeypatch):
    monkeypatch.setattr(formats, "_LINE_BYTES", 1000)
    (folder / "a.jsonl").write_bytes(lines([*ROWS, ROWS[0] | {"chosen": "a" * 2000}]))
    assert "a.jsonl line 4 is longer than 1.0 kB" in mistake(folder)
    (folder / "a.jsonl").unlink()
    monkeypatch.setattr(formats, "_LIST_BYTES", 100)
    (folder / "a.json").write_text(json.dumps(ROWS))
    assert "JSON list of more than 100 bytes" in mistake(folder)


@pytest.mark.parametrize("name", ["a.JSONL.GZ", "x/b.tar", "c.json", "d.tsv.zst"])
def test_an_ending_is_told_whatever_its_case(name):
    assert ending(name) in SUFFIXES


@pytest.mark.parametrize("name", ["jsonl", "a.txt", "a.tar.gz", "a.gz", "a.parquet.gz"])
def test_other_endings_are_none(name):
    assert ending(name) == ""


def test_a_parquet_file_whose_columns_are_not_named_in_utf8_is_refused(folder):
    (folder / "a.parquet").write_bytes(parquet(ROWS).replace(b"question", b"qu\xffstion"))
    assert "a.parquet" in mistake(folder)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_pages_are_as_large_as_their_headers_say(tmp_path, version, compression):
    values = {"a": ["x" * 1000] * 100, "b": [os.urandom(50).hex() for _ in range(100)]}
    table = pa.table(values | {"s": pa.array([{"bytes": b"x", "path": "y"}] * 100)})
    options = {"data_page_version": version, "compression": compression, "row_group_size": 40}
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=["a"], **options)
    found = parquet_pages.sizes(tmp_path / "a.parquet", {"a"})
    assert found
    assert (found.column, found.dictionary, found.page) == ("a", 1004, 1004)
    found = parquet_pages.sizes(tmp_path / "a.parquet", {"b", "s"})
    assert found
    assert (found.column, found.dictionary) == ("b", 0)
    assert 40 * 104 <= found.page < 40 * 104 + 20
    metadata = pq.ParquetFile(tmp_path / "a.parquet").metadata
    columns = [(g, c) for g in range(3) for c in range(1, 4)]
    chunks = [metadata.row_group(g).column(c).total_uncompressed_size for g, c in columns]
    assert found.total == sum(chunks)


def test_a_damaged_byte_anywhere_in_a_footer_ends_no_process(tmp_path):
    """Found by fuzzing: pyarrow aborts when it is asked for the metadata of a damaged column."""
    pq.write_table(pa.table({name: ["x"] for name in COLUMNS}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    end = content.rindex(b"ARROW:schema")
    for place in range(end - 400, end, 2):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        (tmp_path / "a.parquet").write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert len(read(tmp_path)) < 3
