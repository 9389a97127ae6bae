"""The stage: what is kept, what is counted, and what a failure leaves behind."""

import dataclasses
import gc
import hashlib
import io
import json
import multiprocessing.forkserver
import os
import random
import weakref
from concurrent.futures import Future
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stages import preprocess
from stages.core.errors import UserError
from stages.pairs import images, output, pairs, refusals
from stages.pairs.pairs import Question, Record, split_of
from stages.pairs.refusals import Refusal
from stages.sources.kinds import KINDS
from tests.pictures import picture

SOURCE: dict[str, Any] = dict.fromkeys(("repo", "revision", "commit", "licence")) | {"files": []}
SETTINGS = {
    "split_key": "k",
    "validation": 0.2,
    "test": 0.2,
    "max_pixels": 10_000,
    "max_input_pixels": 100_000,
    "jpeg_quality": 90,
    "max_dropped": 0.2,
}


def row(number, **changes):
    return {
        "image": picture(number, kind="JPEG" if number % 2 else "PNG"),
        "question": f"question {number}?",
        "chosen": "yes",
        "rejected": "no",
        "origin_dataset": "coco/v1.0",
        "kind": "presence",
    } | changes


def raw_folder(folder, rows, kind="path"):
    """A folder ``raw`` with one fetched source of these rows, ``mine``."""
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "SOURCE.json").write_text(json.dumps(SOURCE | {"kind": kind}))
    if rows:
        table = {name: [row[name] for row in rows] for name in rows[0]}
        pq.write_table(pa.table(table), folder / "mine" / "a.parquet", row_group_size=7)
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick_workers():
    """Each worker imports the main module again, which under test is pytest; here once for all."""
    multiprocessing.forkserver.set_forkserver_preload(["pytest", "stages.preprocess"])
    multiprocessing.forkserver.ensure_running()


@pytest.fixture
def run(tmp_path, monkeypatch, params_with):
    """Runs the stage in ``tmp_path``; gives the report."""

    def run(raw, kind="path", **changes):
        mine = {"kind": kind}
        if kind == "path":
            mine |= {"path": "mine", "licence": None}
            mine |= {"columns": {"origin": "origin_dataset", "kind": "kind"}}
        values = {f"preprocess.{name}": value for name, value in (SETTINGS | changes).items()}
        p = params_with(**{"data.sources": {"mine": mine}, **values})
        monkeypatch.setattr(preprocess.params, "load", lambda: p)
        preprocess.main(raw, tmp_path / "pairs", tmp_path / "reports" / "preprocess.json")
        return json.loads((tmp_path / "reports" / "preprocess.json").read_text())

    return run


def everything(folder):
    """Digests of all files below, by path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def awkward_rows():
    """Forty good rows, and one for each of several reasons to leave a row out."""
    good = [row(number) for number in range(40)]
    good[21] = row(20, question="another question about image 20")
    bad = {
        "missing_field": row(50, chosen=None),
        "empty_answer": row(51, rejected=" "),
        "identical_answers": row(52, chosen="no"),
        "undecodable_image": row(53, image=picture(53, kind="JPEG")[:-300]),
        "image_too_large": row(54, image=picture(54, size=(400, 300))),
        "image_too_small": row(55, image=picture(55, size=(400, 20))),
        "exact_duplicate": row(7, origin_dataset="elsewhere"),
    }
    return good, bad


def test_each_row_is_kept_or_counted_under_its_reason(run, tmp_path):
    good, bad = awkward_rows()
    report = run(raw_folder(tmp_path / "raw", good[:20] + list(bad.values()) + good[20:]))
    assert report["rows_in"] == len(good) + len(bad)
    assert report["rows_kept"] == len(good)
    assert report["rows_left_out"] == len(bad)
    assert report["unique_images"] == len(good) - 1
    assert list(report["left_out"]) == list(refusals.REASONS)
    assert report["left_out"] == {reason: int(reason in bad) for reason in refusals.REASONS}
    assert sum(report["pairs_by_split"].values()) == len(good)
    assert sum(report["images_by_split"].values()) == len(good) - 1
    assert report["pairs_by_origin"] == {"coco_v1_0": len(good)}
    assert report["pairs_by_kind"] == {"presence": len(good)}

    left_out = pq.read_table(tmp_path / "pairs" / "left_out.parquet")
    assert left_out.schema.equals(output.LEFT_OUT)
    assert left_out["reason"].to_pylist() == list(bad)
    assert left_out["where"].to_pylist() == [f"a.parquet row {21 + i}" for i in range(len(bad))]
    assert all(left_out["detail"].to_pylist())


def test_a_row_with_an_answer_that_matches_is_counted_by_the_patterns_name(run, tmp_path):
    leaks = {5: {"chosen": "(Corrected text) yes"}, 6: {"rejected": "no (Original text)"}}
    rows = [row(i, **leaks.get(i, {})) for i in range(40)]
    patterns = {"corrected": r"\(Corrected text\)", "original": r"\(Original text\)$", "other": "z"}
    report = run(raw_folder(tmp_path / "raw", rows), refuse=patterns)
    assert list(report["left_out"]) == [*refusals.REASONS, *patterns]
    named = {name: number for name, number in report["left_out"].items() if number}
    assert named == {"corrected": 1, "original": 1}
    left_out = pq.read_table(tmp_path / "pairs" / "left_out.parquet").to_pylist()
    assert [each["detail"] for each in left_out] == [
        "chosen: (Corrected text)",
        "rejected: (Original text)",
    ]
    with pytest.raises(UserError, match=r"40 all.*: an answer matches preprocess\.refuse\.all"):
        run(tmp_path / "raw", refuse={"all": "."})


def test_the_table_of_pairs_holds_what_later_stages_read(run, tmp_path):
    good, bad = awkward_rows()
    run(raw_folder(tmp_path / "raw", good + list(bad.values())))
    table = pq.read_table(tmp_path / "pairs" / "pairs.parquet")
    assert table.schema.equals(output.PAIRS)
    found = table.to_pylist()
    assert [pair["question"] for pair in found] == [row["question"] for row in good]
    folder = tmp_path / "pairs" / "images"
    assert {pair["images"][0] for pair in found} == {path.name for path in folder.iterdir()}
    for pair in found:
        (image,) = pair["images"]
        data = (folder / image).read_bytes()
        assert image == hashlib.sha256(data).hexdigest()[:32] + ".jpg"
        assert pair["group"] + ".jpg" == image
        assert Image.open(io.BytesIO(data)).size == (*pair["widths"], *pair["heights"])
        assert (pair["system"], pair["history"]) == ("", [])
        assert pair["split"] == split_of(pair["group"], key="k", validation=0.2, test=0.2)
        texts = [pair[name] for name in ("question", "chosen", "rejected")]
        assert pair["id"] == pairs.row_id(image, *texts)
    assert len({pair["id"] for pair in found}) == len(found)
    assert found[20]["images"] == found[21]["images"]
    (jpeg,) = found[1]["images"]
    assert (folder / jpeg).read_bytes() == good[1]["image"]  # it stays as it is
    assert pq.read_table(tmp_path / "pairs" / "questions.parquet").schema.equals(output.QUESTIONS)


def test_outputs_are_the_same_bytes_whatever_the_number_of_workers(run, tmp_path):
    good, bad = awkward_rows()
    rows = good + list(bad.values())
    random.Random(0).shuffle(rows)
    raw = raw_folder(tmp_path / "raw", rows)
    found = []
    for workers in (1, 3):
        run(raw, workers=workers)
        found.append(everything(tmp_path / "pairs") | everything(tmp_path / "reports"))
    assert found[0] == found[1]
    assert len(found[0]) == 39 + 4


def test_an_image_of_the_held_out_questions_is_in_no_pair(run, tmp_path, monkeypatch):
    rows = [Record(f"train {i}", (picture(i),), f"q{i}", "yes", "no", "easy") for i in range(40)]
    questions = [
        Question("test 1", (picture(5),), "colour?", "red", "colour"),
        Question("test 2", (picture(5),), "shape?", "circle", "shape"),
        Question("test 3", (picture(5),), "shape?", "circle", "shape"),
        Question("test 4", (b"broken",), "shape?", "circle", "shape"),
        Question("test 5", (picture(100),), "shape?", "", "shape"),
    ]
    kind = dataclasses.replace(KINDS["easy-vqa"], read=lambda raw: (iter(rows), iter(questions)))
    monkeypatch.setitem(KINDS, "easy-vqa", kind)
    raw = raw_folder(tmp_path / "raw", (), "easy-vqa")
    rows[0] = dataclasses.replace(rows[0], chosen="")
    with pytest.raises(UserError, match="the first, train 0: chosen"):  # no question is named
        run(raw, "easy-vqa", max_dropped=0)
    rows[0] = dataclasses.replace(rows[0], chosen="yes")
    report = run(raw, "easy-vqa")
    assert report["rows_kept"] == 39
    assert report["left_out"]["image_in_held_out_questions"] == 1
    assert (report["questions_in"], report["questions_kept"]) == (5, 2)
    lost = ("exact_duplicate", "undecodable_image", "empty_answer")
    assert report["questions_left_out"] == dict.fromkeys(lost, 1)
    assert report["question_images"] == 1
    found = pq.read_table(tmp_path / "pairs" / "questions.parquet").to_pylist()
    told = [(question["answer"], question["kind"]) for question in found]
    assert told == [("red", "colour"), ("circle", "shape")]
    used = pq.read_table(tmp_path / "pairs" / "pairs.parquet")["images"].to_pylist()
    assert [found[0]["image"]] not in used
    assert len(list((tmp_path / "pairs" / "images").iterdir())) == 40
    left_out = pq.read_table(tmp_path / "pairs" / "left_out.parquet").to_pylist()
    assert [(row["where"], row["reason"]) for row in left_out] == [
        ("test 3", "exact_duplicate"),
        ("test 4", "undecodable_image"),
        ("test 5", "empty_answer"),
        ("train 5", "image_in_held_out_questions"),
    ]


# Mistakes


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([row(i, image=b"x") for i in range(5)], {}, "5 of the 5 rows can't be used (5 undec"),
        (
            [*(row(i, rejected=None if i % 4 == 3 else "no") for i in range(40)), row(0)],
            {},
            "11 of the 41 rows can't be used (10 missing_field, 1 exact_duplicate), more than "
            "preprocess.max_dropped (0.2) allows; the first, a.parquet row 4: rejected; missing_",
        ),
        (
            [row(i % 2, question=f"q{i}") for i in range(5)],
            {},
            "there are only 2 images; add images, change",
        ),
        ([row(i) for i in range(4)], {"validation": 0.499, "test": 0.5}, "into the train split"),
        ([row(i, rejected="no") for i in range(0)], {}, "the source is empty"),
    ],
    ids=["nothing kept", "too much lost", "few images", "no train split", "no rows"],
)
def test_what_stops_the_run_is_said_with_what_helps(run, tmp_path, rows, settings, message):
    raw = raw_folder(tmp_path / "raw", rows)
    if not rows:
        (raw / "mine" / "a.jsonl").write_text("")
    with pytest.raises(UserError) as error:
        run(raw, **settings)
    assert message in str(error.value)
    assert not (tmp_path / "pairs").exists()


def test_a_folder_that_was_not_fetched_says_to_fetch(run, tmp_path):
    with pytest.raises(UserError, match="dvc repro -f fetch"):
        run(tmp_path)


def test_a_split_that_was_not_asked_for_may_be_empty(run, tmp_path):
    raw = raw_folder(tmp_path / "raw", [row(number) for number in range(40)])
    assert run(raw, validation=0)["pairs_by_split"]["validation"] == 0


# What a failure leaves behind


@pytest.mark.parametrize("failure", [KeyboardInterrupt, UserError("x"), RuntimeError])
def test_a_failure_leaves_the_old_output_and_nothing_half_made(run, tmp_path, monkeypatch, failure):
    raw = raw_folder(tmp_path / "raw", [row(number) for number in range(40)])
    run(raw)
    before = everything(tmp_path)

    def interrupted(*_):
        yield Record("row 1", (picture(1),), "q", "yes", "no")
        raise failure

    monkeypatch.setattr("stages.pairs.tables.records", interrupted)
    with pytest.raises(type(failure) if isinstance(failure, Exception) else failure):
        run(raw)
    assert everything(tmp_path) == before


# Workers


def fragile(data):
    """Stands in for ``images.store``: the image says what happens."""
    if data == b"die":
        os._exit(9)
    if data == b"memory":
        raise MemoryError
    if data == b"broken":
        return Refusal("undecodable_image", "broken")
    return images.Stored(f"{data.decode()}.jpg", 1, 1)


def records(*contents):
    return [
        Record(f"row {i}", None if data is None else (data,), "q", "yes", "no")
        for i, data in enumerate(contents, start=1)
    ]


class Deadly:
    """Ends the worker that it is sent to."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.parametrize(
    ("contents", "work"),
    [
        ([*[b"%d" % i for i in range(4)], b"die", *[b"9%d" % i for i in range(99)]], fragile),
        ([b"a", b"b", b"memory", b"c"], fragile),
        ([b"a"], Deadly()),
    ],
    ids=["crash", "memory", "before any image"],
)
def test_a_worker_that_dies_is_one_sentence(contents, work):
    rows = images.decode(records(*contents), refusals.text_refusal, work=work, workers=2)
    with pytest.raises(UserError, match=r"died or ran out of memory; lower preprocess\.workers"):
        list(rows)


def test_a_broken_image_among_several_leaves_the_row_out():
    rows = [Record("row", (b"a", b"broken"), "q", "yes", "no")]
    rows += [Record("row", (b"a", b"b", b"a"), "q", "yes", "no")]
    found = list(images.decode(rows, refusals.text_refusal, work=fragile, workers=1))
    assert found[0][1] == Refusal("undecodable_image", "broken")
    assert found[1][1] == tuple(images.Stored(f"{name}.jpg", 1, 1) for name in "aba")


class Later:
    """A pool whose work ends only when asked for, last in first out."""

    def __init__(self):
        self.submitted = 0

    def submit(self, function, work, contents):
        self.submitted += len(contents)
        future: Future[list[images.Stored | Refusal]] = Future()
        result = future.result

        def when_asked(timeout=None):
            if not future.done():
                future.set_result(function(work, contents))
            return result(timeout)

        future.result = when_asked  # type: ignore[method-assign]
        return future

    def shutdown(self, **_):
        pass


@settings(deadline=None)  # other processes may hold the processor
@given(
    st.lists(st.sampled_from([None, b"a", b"b", b"c", b"d", b"broken"]), max_size=40),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_rows_come_back_in_order_and_each_image_is_decoded_once(contents, window, size):
    pool, rows = Later(), records(*contents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_ROWS", size)
        patch.setattr(images, "_BATCHES", window)
        patch.setattr(images, "pool", lambda _: pool)
        found = list(images.decode(rows, refusals.text_refusal, work=fragile, workers=1))
    assert [row for row, _ in found] == rows
    for row, outcome in found:
        if row.images is None:
            assert outcome == Refusal("missing_field", "image")
        else:
            expected = fragile(*row.images)
            assert outcome == (expected if isinstance(expected, Refusal) else (expected,))
    assert pool.submitted == len(set(contents) - {None})


@pytest.mark.parametrize("repeat", [False, True])
def test_the_rows_held_at_once_are_bounded_whatever_their_number(monkeypatch, repeat):
    window, batch, alive, peak = 3, 4, [0], [0]

    def source():
        for number in range(2000):
            data = b"%d" % (number % 3 if repeat else number)
            row = Record(f"row {number}", (data,), f"q{number}", "yes", "no")
            alive[0] += 1
            peak[0] = max(peak[0], alive[0])
            weakref.finalize(row, lambda: alive.__setitem__(0, alive[0] - 1))
            yield row
            del row

    monkeypatch.setattr(images, "_ROWS", batch)
    monkeypatch.setattr(images, "_BATCHES", window)
    monkeypatch.setattr(images, "pool", lambda _: Later())
    gc.disable()  # nothing may depend on the collector of cycles
    try:
        found = images.decode(source(), refusals.text_refusal, work=fragile, workers=1)
        assert sum(1 for _ in found) == 2000
    finally:
        gc.enable()
    assert peak[0] <= (window + 1) * batch + 1  # a batch and a row are being read


# The report


def test_label_counts_sum_up_rare_ones():
    assert output.by_label({"a.b": 2, "a/b": 3, "": 1}) == {"a_b": 5, "none": 1}
    many = output.by_label({f"origin{i:02}": i + 1 for i in range(60)})
    assert len(many) == 51
    assert many["other"] == sum(range(1, 11))
