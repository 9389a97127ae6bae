"""The command that shows what preprocess would make of a source."""

import json
import os

import pytest

from stages.commands import check
from stages.core.errors import UserError
from tests.pictures import picture


@pytest.fixture
def source(tmp_path, monkeypatch, write_params):
    """Writes rows into a folder of a project; gives a function that checks it."""

    def source(rows, **values):
        (tmp_path / "mine").mkdir()
        for i in range(20):
            (tmp_path / "mine" / f"{i}.png").write_bytes(picture(i))
        (tmp_path / "mine" / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        path = {"kind": "path", "path": "mine", "licence": None}
        values = {"data.sources": {"mine": path}} | values
        write_params(tmp_path / "params.yaml", **values)

    monkeypatch.chdir(tmp_path)
    return source


def row(i, **changes):
    return {"image": f"{i}.png", "question": f"q{i}", "chosen": "yes", "rejected": "no"} | changes


def test_columns_rows_and_reasons_are_shown(source, capsys, tmp_path):
    source([*(row(i) for i in range(20)), row(20), row(1, chosen=3)])
    (tmp_path / "mine" / "load.py").write_text("print(1)")
    check.main()
    said = capsys.readouterr().out
    assert "tables: 1, " in said
    assert "left out: load.py (it can run code)" in said
    assert "a.jsonl, read as the columns of its entry" in said
    assert "question: str  <-" in said
    assert "a.jsonl row 3: images: " in said
    assert "22 rows read, 20 kept" in said
    assert "2 missing_field" in said
    assert "the first, a.jsonl row 21: image ('20.png': no such file" in said
    assert "distinct images: 20" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "params.yaml"]


def test_it_reads_no_more_rows_than_it_is_told(source, capsys):
    source([row(i % 20, question=f"q{i}") for i in range(200)])
    check.main(rows=50)
    assert "50 rows read" in capsys.readouterr().out


def test_a_layout_is_named_and_a_history_is_shown(source, capsys):
    turns = [
        {"from": "human", "value": "<image>first"},
        {"from": "gpt", "value": "said"},
        {"from": "human", "value": "second"},
    ]
    answers = {name: {"from": "gpt", "value": name} for name in ("chosen", "rejected")}
    rows = [{"conversations": turns, **answers, "images": [f"{i}.png"]} for i in range(20)]
    source(rows, **{"preprocess.wanted.turns": 2})
    check.main()
    said = capsys.readouterr().out
    assert "read as LLaMA-Factory ranking" in said
    assert "turn 1: <image>first / said" in said


def test_a_single_file_is_read_alone(source, tmp_path, capsys):
    path = {"kind": "path", "path": "mine/a.jsonl", "licence": None}
    source([row(i) for i in range(20)], **{"data.sources": {"mine": path}})
    (tmp_path / "mine" / "b.jsonl").write_text("{]")
    check.main()
    assert "other files: 20" in capsys.readouterr().out


HUB = {"kind": "hub", "repo": "a/b", "revision": "c" * 40, "files": ["*"]}
NOWHERE = {"kind": "path", "path": "nowhere", "licence": None}


@pytest.mark.parametrize(
    ("rows", "sources", "message"),
    [
        (
            [row(i % 2, question=f"q{i}") for i in range(9)],
            {},
            "there are only 2 images; add images",
        ),
        ([{"picture": "1.png", "query": "q"}], {}, r"data\.sources\.mine: .* has no column image"),
        ([], {"b": HUB}, r"data\.sources\.b: .* run `dvc repro fetch@b`"),
        ([], {"mine": NOWHERE}, "nowhere does not exist"),
    ],
)
def test_what_would_stop_the_run_ends_it_with_what_helps(source, rows, sources, message):
    source(rows, **({"data.sources": sources} if sources else {}))
    with pytest.raises(UserError, match=message):
        check.main()


def test_names_and_texts_that_cannot_be_printed_are_shown_escaped(source, tmp_path, capsysbinary):
    source([row(0, question="half \ud800"), *(row(i) for i in range(1, 20))])
    (tmp_path / "mine" / "a.jsonl").rename(tmp_path / "mine" / os.fsdecode(b"r\xffws.jsonl"))
    check.main()
    said = capsysbinary.readouterr().out.decode()
    assert "r\\udcffws.jsonl" in said
    assert "half \\ud800" in said
