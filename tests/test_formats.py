"""Every kind of file that holds rows, whole, packed, damaged and hostile."""

import contextlib
import csv
import gzip
import io
import json
import random
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
from stages.pairs import formats, tables
from stages.pairs.files import SUFFIXES
from stages.sources.local import PathData

ROOT = Path(__file__).parent.parent
PARTS = ("image", "question", "chosen", "rejected")
ASKED = PathData(kind="path", path=ROOT, licence=None)
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


def parquet(table, **options):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
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
        files[f"shard/{i:04}.json"] = json.dumps(row | {"image": None}).encode()
    return tar(files)


WRITE: dict[str, Any] = {
    ".parquet": lambda rows: parquet(pa.Table.from_pylist(rows)),
    ".tar": webdataset,
    ".jsonl": lines,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": lambda rows: cells(rows, ","),
    ".tsv": lambda rows: cells(rows, "\t"),
}
PACK: dict[str, Any] = {"": bytes, "gz": gzip.compress, "zst": zstd}


def written(suffix, rows):
    plain, _, packed = suffix.lstrip(".").partition(".")
    return PACK[packed](WRITE[f".{plain}"](rows))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "x.png").write_bytes(b"png")
    return tmp_path


def read(folder):
    return list(tables.records(folder, ASKED))


def mistake(folder):
    with pytest.raises(UserError) as error:
        read(folder)
    message = str(error.value)
    assert len(message) < 1000
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_kind_of_file_is_read(folder, suffix):
    (folder / f"Rows{suffix.upper()}").write_bytes(written(suffix, ROWS))
    found = read(folder)
    assert [record.question for record in found] == [row["question"] for row in ROWS]
    assert {(record.chosen, record.rejected) for record in found} == {("yes\nno", 'a "b"')}
    assert {record.images for record in found} == {(b"png",)}
    assert found[2].where == f"Rows{suffix.upper()} row 3"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_file_is_named_in_a_sentence(folder, suffix, damage):
    content = written(suffix, ROWS * 50)
    kinds = {"cut": content[: len(content) * 2 // 3 - 5], "empty": b"", "other": b"\x89\0\xff<htm"}
    (folder / f"rows{suffix}").write_bytes(kinds[damage])
    if damage == "empty" and suffix.split(".")[1] in ("jsonl", "json", "csv", "tsv"):
        assert read(folder) == []
    else:
        assert f"rows{suffix} can't be read" in mistake(folder)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_bytes_give_rows_or_one_sentence(folder, suffix):
    whole, draw = written(suffix, ROWS), random.Random(suffix)
    for _ in range(20):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (folder / f"rows{suffix}").write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert len(read(folder)) <= len(ROWS) + 1


@pytest.mark.parametrize(
    "text",
    [
        *("[{}", "[{}, {]", '[{"a": 1', "[[1]]", "[1]", '["a"]', "5", "[{}] {}", "[{}]]"),
        *("[" * 9999, '{"a":' * 9999, "{}\n{]\n", '{"a": "b\nc"}'),
    ],
)
def test_broken_json_is_named(folder, text):
    (folder / "a.json").write_text(text)
    assert "a.json" in mistake(folder)


def test_json_is_read_a_piece_at_a_time_whatever_its_form(folder, monkeypatch):
    monkeypatch.setattr(formats, "_PIECE", 7)
    for text in (json.dumps(ROWS), json.dumps(ROWS, indent=3), lines(ROWS).decode(), "\ufeff\n []"):
        (folder / "a.json").write_text(text, encoding="utf-8")
        assert len(read(folder)) == (0 if "[]" in text else 3)
    (folder / "a.json").write_text(lines(ROWS).decode() + "{]\n")
    assert "line 4" in mistake(folder)


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_line_ends_of_unicode_inside_json_are_data(folder, sign):
    row = ROWS[0] | {"chosen": f"one{sign}two"}
    text = json.dumps(row, ensure_ascii=ord(sign) < 32) + "\n"
    (folder / "a.jsonl").write_text(text, encoding="utf-8")
    assert read(folder)[0].chosen == f"one{sign}two"


def test_every_flipped_header_of_a_tar_stops_the_run(folder):
    """Found in 60 of 150 damaged archives: tarfile ends quietly, and rows were missing."""
    whole = webdataset(ROWS)
    for start in range(0, len(whole) - 2 * 512 - 8 * 512, 1024):
        damaged = bytearray(whole)
        damaged[start + 100] ^= 1
        (folder / "a.tar").write_bytes(damaged)
        assert "a.tar can't be read" in mistake(folder)


@pytest.mark.parametrize(
    "kind", [pa.dictionary(pa.int8(), pa.string()), pa.large_string()], ids=str
)
def test_text_of_each_arrow_type_is_read(folder, kind):
    table = pa.table({n: pa.array([row[n] for row in ROWS]).cast(kind) for n in PARTS})
    (folder / "a.parquet").write_bytes(parquet(table))
    found = read(folder)
    assert [record.question for record in found] == [row["question"] for row in ROWS]
    assert {record.images for record in found} == {(b"png",)}


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (STRUCT, {"bytes": b"png", "path": "other.png"}),
        (STRUCT, {"bytes": None, "path": "x.png"}),
        (pa.struct({"bytes": pa.binary()}), {"bytes": b"png"}),
        (pa.large_binary(), b"png"),
        (pa.binary(3), b"png"),
        (pa.string(), "x.png"),
        (pa.list_(pa.binary()), [b"png"]),
        (pa.large_list(STRUCT), [{"bytes": b"png"}]),
        (pa.list_(pa.string(), 1), ["x.png"]),
        (pa.binary_view(), b"png"),
    ],
    ids=str,
)
def test_images_of_each_arrow_type_are_read(folder, kind, value):
    columns = {n: [row[n] for row in ROWS] for n in PARTS}
    columns["image"] = pa.array([value] * 3, kind)
    (folder / "a.parquet").write_bytes(parquet(pa.table(columns), row_group_size=2))
    assert {record.images for record in read(folder)} == {(b"png",)}


# Hostile tables


def test_text_that_is_not_utf8_costs_its_row(folder):
    offsets = pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 1, 2, 3)))
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffc")])
    columns = {n: pa.array([row[n] for row in ROWS]) for n in PARTS} | {"chosen": broken}
    (folder / "a.parquet").write_bytes(parquet(pa.table(columns)))
    found = read(folder)
    assert [record.chosen for record in found] == ["a", None, "c"]
    assert found[1].note == "chosen is not UTF-8 text"


# Limits


LIMITS = {
    "a line of CSV": (".csv.gz", b"a,b\n" + b"," * 2000, "a line or a run of blank ones"),
    "blank lines": (".csv.gz", b"a,b\n" + b"\n" * 2000, "a line or a run of blank ones"),
    "a JSON value": (".json.gz", b'[{"a": "' + b"x" * 2000, "a value above 1.0 kB"),
    "nested lists": (".json.zst", b'{"a": [' + b"[]," * 900, "a value above 1.0 kB"),
    "a header": (".csv", b",".join(b"a%d" % i for i in range(120)), "120 columns"),
    "keys": (".jsonl", json.dumps({f"a{i}": 1 for i in range(120)}).encode(), "120 columns"),
    "a row of a tar": (
        ".tar",
        tar({"a.jpg": bytes(900), "a.png": bytes(900)}),
        "larger than 1.0 kB",
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_held_at_once_is_bounded(folder, monkeypatch, name):
    suffix, content, message = LIMITS[name]
    for limit in ("MOST_LINE", "MOST_BYTES"):
        monkeypatch.setattr(formats, limit, 1000)
    monkeypatch.setattr(formats, "MOST_COLUMNS", 100)
    monkeypatch.setattr(formats, "_PIECE", 100)
    packed = PACK[suffix.split(".")[2] if suffix.count(".") > 1 else ""](content)
    (folder / f"a{suffix}").write_bytes(packed)
    assert message in mistake(folder)


READ_ALL = """
import sys
from pathlib import Path
from stages.pairs import tables
from stages.sources.local import PathData
asked = PathData(kind="path", path=Path(), licence=None)
print(sum(1 for _ in tables.records(Path(sys.argv[1]), asked)))
# Not getrusage, in which a child begins with what its parent had.
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["dictionary", "json"])
def test_memory_is_bounded_whatever_the_file_unpacks_to(folder, kind):
    """1,024 rows of the same 1 MB, which a Parquet file holds once, and 200 MB of JSON in 0.2."""
    row = dict.fromkeys(PARTS, "x.png")
    if kind == "json":
        row["more"] = "x" * 10**5
        content = gzip.compress(b"[" + b",".join([json.dumps(row).encode()] * 2000) + b"]", 1)
        (folder / "a.json.gz").write_bytes(content)
    else:
        columns = {name: pa.array([row[name]] * 1024) for name in PARTS}
        indices = pa.array([0] * 1024, pa.int32())
        columns["chosen"] = pa.DictionaryArray.from_arrays(indices, ["x" * 10**6])
        content = parquet(pa.table(columns), compression="zstd", store_schema=False)
        (folder / "a.parquet").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count, peak = map(int, done.stdout.split()[-2:])
    assert count in (1024, 2000)
    assert peak < 350 * 2**10
