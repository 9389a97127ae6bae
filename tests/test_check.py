"""The command that shows what preprocess would make of a source."""

import io
import json
import os

import pytest
from PIL import Image

from stages.commands import check
from stages.core.errors import UserError


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (40 + number, 32), (number, 99, 99)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def source(tmp_path, monkeypatch, write_params):
    """Writes rows into a folder of a project; gives a function that checks it."""

    def source(rows, **values):
        (tmp_path / "mine").mkdir()
        for i in range(20):
            (tmp_path / "mine" / f"{i}.png").write_bytes(png(i))
        (tmp_path / "mine" / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        path = {"kind": "path", "path": "mine", "licence": None}
        values = {"data.source": path, "data.columns.origin": None} | values
        write_params(tmp_path / "params.yaml", **values)

    monkeypatch.chdir(tmp_path)
    return source


def row(i, **changes):
    return {"image": f"{i}.png", "question": f"q{i}", "chosen": "yes", "rejected": "no"} | changes


def test_columns_rows_sizes_and_reasons_are_shown(source, capsys, tmp_path):
    source([*(row(i) for i in range(20)), row(20), row(1, chosen=3)])
    check.main()
    said = capsys.readouterr().out
    assert "data files: 1, " in said
    assert "a.jsonl, read as data.columns" in said
    assert "question: str  <-" in said
    assert "a.jsonl row 3: images: " in said
    assert "22 rows read, 20 kept" in said
    assert "2 missing_field" in said
    assert "the first, a.jsonl row 21: image ('20.png': no such file" in said
    assert "20 distinct images, 40x32 to 59x32 pixels" in said
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
    assert "earlier: <image>first / said" in said


def test_what_would_stop_the_run_ends_it_with_the_change_that_helps(source, capsys):
    source([row(i % 2, question=f"q{i}") for i in range(9)])
    with pytest.raises(UserError, match="3 are the fewest that make 3 splits"):
        check.main()
    assert "9 kept" in capsys.readouterr().out


def test_other_columns_are_met_with_a_proposal(source):
    source([{"picture": "1.png", "query": "q", "preferred": "a", "dispreferred": "b"}])
    with pytest.raises(UserError, match=r"data\.columns\.chosen: preferred"):
        check.main()


def test_a_single_file_is_read_alone(source, tmp_path, capsys):
    path = {"kind": "path", "path": "mine/a.jsonl", "licence": None}
    source([row(i) for i in range(20)], **{"data.source": path})
    (tmp_path / "mine" / "b.jsonl").write_text("{]")
    check.main()
    assert "20 kept" in capsys.readouterr().out


def test_a_repository_that_was_not_fetched_says_how(source):
    hub = {"kind": "hub", "repo": "a/b", "revision": "c" * 40, "files": ["*"]}
    source([], **{"data.source": hub})
    with pytest.raises(UserError, match="dvc repro fetch@data"):
        check.main()


def test_a_path_that_does_not_exist_is_named(source):
    source([], **{"data.source": {"kind": "path", "path": "nowhere", "licence": None}})
    with pytest.raises(UserError, match="nowhere does not exist"):
        check.main()


def test_names_and_texts_that_cannot_be_printed_are_shown_escaped(source, tmp_path, capsysbinary):
    source([row(0, question="half \ud800"), *(row(i) for i in range(1, 20))])
    (tmp_path / "mine" / "a.jsonl").rename(tmp_path / "mine" / os.fsdecode(b"r\xffws.jsonl"))
    check.main()
    said = capsysbinary.readouterr().out.decode()
    assert "r\\udcffws.jsonl" in said
    assert "half \\ud800" in said
