"""The format stage: what is kept, what is left out and counted, and what the report says."""

import json
import shutil

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import format as format_stage
from stages.core.errors import UserError
from stages.model import formatted
from stages.model.tokens import Lengths

MARKERS = ("<image>", "<|im_end|>")
PAIR = {
    "id": "1",
    "images": ["a.jpg"],
    "widths": [64],
    "heights": [64],
    "system": "",
    "history": [],
    "question": "What is it?",
    "chosen": "A cat.",
    "rejected": "A dog.",
    "origin": "o",
    "kind": "k",
    "group": "g",
    "split": "train",
}


def test_a_pair_becomes_a_row_that_names_its_image_relatively():
    (row,), changed = format_stage.to_rows(pd.DataFrame([PAIR]), MARKERS)
    assert changed == []
    assert row == {
        "id": "1",
        "group": "g",
        "origin": "o",
        "kind": "k",
        "messages": [{"role": "user", "content": "<image>What is it?"}],
        "images": ["a.jpg"],
        "chosen": {"role": "assistant", "content": "A cat."},
        "rejected": {"role": "assistant", "content": "A dog."},
    }


@pytest.mark.parametrize("field", ["question", "chosen", "rejected"])
def test_a_marker_in_any_field_is_broken_and_counted_once_a_pair(field):
    text = "two <image> <image> and <|im_end|>"
    table = pd.DataFrame([PAIR | {field: text}, PAIR | {"id": "2"}])
    rows, altered = format_stage.to_rows(table, MARKERS)
    assert altered == ["1"]
    assert json.dumps(rows[0]).count("<image>") == 1  # ours
    assert "<|im_end|>" not in json.dumps(rows[0])


def test_questions_keep_their_true_answers():
    table = pd.DataFrame(
        [{"id": "q", "kind": "color", "question": "<image>?", "image": "a.jpg", "answer": "red"}]
    )
    (row,) = format_stage.to_questions(table, MARKERS)
    assert row["answer"] == "red"
    assert row["messages"][0]["content"] == "<image>< image>?"


def test_the_summary_counts_what_went_in_and_why_it_did_not_stay(monkeypatch):
    """Ten pairs of 26 to 35 tokens, half of them for training."""
    monkeypatch.setattr(
        format_stage.tokens, "fits", lambda length, most: length.prompt + length.rejected <= most
    )
    ten = pd.DataFrame({"id": range(10), "split": ["train"] * 5 + ["test"] * 5})
    lengths = [Lengths(16, 20 + i, 5, 6) for i in range(10)]
    found = format_stage.summary(format_stage.measured(ten, lengths, 33), 3, None)
    assert (found["pairs_in"], found["pairs_kept"]) == (10, 8)
    assert found["left_out"] == {"longer_than_cutoff_len": 2}
    assert found["kept_by_split"] == {"train": 5, "validation": 0, "test": 3}
    assert found["special_tokens_neutralised"] == 3
    assert "altered" not in found
    assert found["tokens"]["longest"] == {"median": 31, "p90": 35, "p99": 35, "max": 35}
    assert found["tokens"]["image"]["max"] == 16


# the stage itself


@pytest.fixture
def run(pairs_dir, model_dir, write_params, tmp_path, monkeypatch):
    """``run(**params)`` runs the stage on the shared pairs."""

    def stage(pairs=pairs_dir, **values):
        write_params(tmp_path / "params.yaml", **values)
        monkeypatch.chdir(tmp_path)
        format_stage.main(pairs, model_dir, tmp_path / "out", tmp_path / "r.json")
        return tmp_path

    return stage


@pytest.mark.slow
def test_every_pair_is_in_its_split_in_the_order_of_the_table(formatted_dir, pairs_dir):
    table = pd.read_parquet(pairs_dir / "pairs.parquet")
    for split, group in table.groupby("split"):
        rows = formatted.read(formatted_dir, str(split))
        assert [row["id"] for row in rows] == list(group["id"])
    assert len(formatted.read(formatted_dir, "questions")) == 4
    report = json.loads((formatted_dir.parent / "format.json").read_text())
    assert report["pairs_kept"] == report["pairs_in"] == len(table)


@pytest.mark.slow
@pytest.mark.usefixtures("llamafactory")
def test_a_pair_that_is_too_long_is_left_out_counted_and_listed(formatted_dir, run):
    whole = json.loads((formatted_dir.parent / "format.json").read_text())
    limit = whole["tokens"]["longest"]["max"] - 1
    folder = run(**{"format.cutoff_len": limit})
    report = json.loads((folder / "r.json").read_text())
    left_out = pd.read_csv(folder / "out" / "left_out.csv", dtype={"id": str})
    assert report["left_out"]["longer_than_cutoff_len"] == len(left_out) > 0
    assert (left_out["tokens"] > limit).all()
    assert (left_out["cutoff_len"] == limit).all()
    kept = {row["id"] for s in formatted.SPLITS for row in formatted.read(folder / "out", s)}
    assert kept.isdisjoint(left_out["id"])
    assert len(kept) + len(left_out) == report["pairs_in"]


@pytest.mark.slow
@pytest.mark.usefixtures("llamafactory")
def test_the_stage_writes_the_same_bytes_again_and_says_when_nothing_fits(formatted_dir, run):
    folder = run()
    for path in formatted_dir.iterdir():
        assert (folder / "out" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match=r"no test pair fits format\.cutoff_len = 20 tokens"):
        run(**{"format.cutoff_len": 20})


# A base model that does not work, found by one prompt and one image


def edited(name, **changes):
    def edit(folder):
        document = json.loads((folder / name).read_text())
        for key, value in changes.items():
            *sections, last = key.split("__")
            place = document
            for section in sections:
                place = place[section]
            place[last] = value
        (folder / name).write_text(json.dumps(document))

    return edit


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BROKEN = {
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ""),
    "cut tokenizer": (text("tokenizer.json", "{"), ""),
    "another model's tokenizer": (edited("config.json", image_token_id=7), "another ID"),
    "more tokens": (edited("config.json", text_config__vocab_size=300), "more tokens than"),
    "template that loops": (text("chat_template.jinja", LOOP), "takes more than 1 s"),
    "template that does not parse": (text("chat_template.jinja", "{% if %}"), "Template"),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), ""),
    "images divided by nothing": (
        edited("processor_config.json", image_processor__rescale_factor=0),
        "ZeroDivisionError",
    ),
    "not a number": (
        edited("processor_config.json", image_processor__image_std=[0, 0, 0]),
        "returns no usable pixels",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_a_model_that_does_not_work_is_found_here_in_one_sentence(
    what, model_dir, llamafactory, params_with, tmp_path, monkeypatch
):
    monkeypatch.setattr(format_stage, "SECONDS", 1)
    damage, told = BROKEN[what]
    folder = shutil.copytree(model_dir, tmp_path / "base")
    damage(folder)
    with pytest.raises(UserError, match=r"get all files of one revision") as caught:
        format_stage.tried(folder, params_with())
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert format_stage.tried(model_dir, params_with()).tokenizer


# Reading back; nothing in the data can break a prompt


ALL_MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<image>", "<video>")
pieces = st.sampled_from(
    [*ALL_MARKERS, "<", ">", "|", "<|", "|>", "im_end", "image", " ", "<ima", "ge>"]
)
texts = st.lists(pieces | st.text(max_size=4), max_size=12).map("".join)


@given(texts)
def test_only_spaces_are_added_where_there_are_markers(text):
    once = formatted.neutralised(text, ALL_MARKERS)
    assert not any(marker in once for marker in ALL_MARKERS)
    assert once.replace(" ", "") == text.replace(" ", "")
    assert formatted.neutralised(once, ALL_MARKERS) == once
    if not any(marker in text for marker in ALL_MARKERS):
        assert once == text


def test_a_marker_that_can_not_be_broken_is_no_endless_loop():
    """Breaking " x" by a space after its first character gives " x" again."""
    assert formatted.neutralised("a<image>b", ("a", "", "<image>")) == "a< image>b"
    markers = (" ", "  ", "\n\n", " x>", "<y ", "a b", "  z")
    text = formatted.neutralised("  <y  x> a b <y x>  z  \n\n", markers)
    assert not any(marker in text for marker in ("<y ", "x>", "a b"))


ids = st.lists(st.text(max_size=8), unique=True, max_size=30)


@given(ids, st.randoms(), st.integers(0, 30), st.integers(0, 30))
def test_a_sample_is_free_of_order_and_a_larger_one_holds_every_smaller(names, random, one, other):
    rows = [{"id": name} for name in names]
    shuffled = random.sample(rows, len(rows))
    small, large = sorted((one, other))
    assert formatted.sample(rows, small) == formatted.sample(shuffled, small)
    assert formatted.sample(rows, large)[:small] == formatted.sample(rows, small)
    assert len(formatted.sample(rows, small)) == min(small, len(rows))
