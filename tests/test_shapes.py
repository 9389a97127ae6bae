"""Pairs without an image, with several, with earlier turns and a system prompt: from the records of
a source to the log-probs of LLaMA-Factory's own trainer.
"""

import functools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stages import format as format_stage
from stages import preprocess
from stages.model import formatted, prefix, scoring, tokens
from stages.pairs import pairs
from stages.pairs.pairs import Record, joined, sides, split_of
from stages.params import params
from tests.pictures import picture
from tests.trainer import dpo_trainer, trainers_log_probs

ALL = {"text_only": True, "images": 3, "turns": 3, "system_prompt": True}


# the places of images in a prompt


def content(question, count=1, **more):
    row = formatted.prompt(question, [f"{i}.jpg" for i in range(count)], **more)
    return [message["content"] for message in row["messages"]]


HISTORY = [("What is it?", "A cat.")]


@pytest.mark.parametrize(
    ("question", "count", "history", "expected"),
    [
        ("What is it?", 1, [], ["<image>What is it?"]),
        ("<image>\nWhat is it?", 1, [], ["<image>What is it?"]),
        ("What is it?\n<image>", 1, [], ["What is it?\n<image>"]),
        ("<image>", 1, [], ["<image>"]),
        ("What does <image> show?", 1, [], ["What does <image> show?"]),
        ("<image> or <image>?", 1, [], ["<image>< image> or < image>?"]),
        ("Is <image> older than <image>?", 2, [], ["Is <image> older than <image>?"]),
        ("Which is older?", 2, [], ["<image><image>Which is older?"]),
        ("What is <image>?", 0, [], ["What is < image>?"]),
        ("Colour?", 1, HISTORY, ["<image>What is it?", "A cat.", "Colour?"]),
        ("<image>\nColour?", 1, HISTORY, ["What is it?", "A cat.", "<image>Colour?"]),
    ],
)
def test_as_many_markers_as_images_are_their_places_and_others_are_text(
    question, count, history, expected
):
    clean = functools.partial(formatted.neutralised, markers=("<image>",))
    assert content(question, count, history=history, clean=clean) == expected


markers = st.lists(st.sampled_from(["<image>", "<video>", "a", "\n", "<", "image>"]), max_size=8)


@given(st.lists(markers.map("".join), min_size=1, max_size=3), st.integers(0, 3))
def test_whatever_users_say_a_prompt_has_as_many_places_as_images(asked, count):
    clean = functools.partial(formatted.neutralised, markers=formatted.PLACEHOLDERS)
    *before, question = asked
    said = content(question, count, history=[(text, "yes") for text in before], clean=clean)
    assert "".join(said).count("<image>") == count
    assert "<video>" not in "".join(said)


# names, groups and splits


shown = st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3), max_size=12)


@given(shown)
def test_pairs_that_share_an_image_are_one_group(shown):
    group = joined(shown)
    assert all(len({group[name] for name in names}) == 1 for names in shown)
    # And no more are joined than that: within a group, every image can be reached from its name.
    reached = {name: {name} for names in shown for name in names}
    for _ in reached:
        for names in shown:
            together = set().union(*(reached[name] for name in names))
            for name in together:
                reached[name] |= together
    assert all(group[name] == min(reached[name]) for name in reached)


published = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from(["", *pairs.SPLITS])), max_size=20
)


@given(published)
def test_no_group_is_on_two_sides_and_what_was_published_stays_or_becomes_stricter(given_rows):
    groups, was = [group for group, _ in given_rows], [side for _, side in given_rows]
    drawn = functools.partial(split_of, key="k", validation=0.2, test=0.2)
    found = sides(groups, was, drawn)
    assert all(len({b for a, b in zip(groups, found, strict=True) if a == g}) == 1 for g in groups)
    for before, now in zip(was, found, strict=True):
        if before and before != now:
            assert pairs.SPLITS.index(now) > pairs.SPLITS.index(before)


def test_a_side_that_was_not_published_is_drawn_from_train():
    groups = [str(i) for i in range(1000)]
    drawn = functools.partial(split_of, key="k", validation=0.1, test=0.2)
    found = sides(groups, ["train"] * 900 + ["validation"] * 100, drawn)
    count = Counter(found[:900])
    assert set(count) == {"train", "test"}
    assert 100 < count["test"] < 260
    assert set(found[900:]) == {"validation"}


# through preprocess


def records():
    """Pairs of every shape: twelve turns of text, one image, two, history, system prompt."""
    for i in range(60):
        count = (1, 0, 2, 1, 3)[i % 5]
        yield Record(
            f"row {i}",
            tuple(picture(100 * i + k, (64 + 8 * k, 48)) for k in range(count)),
            "Is <image> like <image>?" if count == 2 else f"What is it, number {i}?",
            "The shape is red." if i % 3 else "Yes.",
            "The shape is blue, I think.",
            system="Answer briefly." if i % 4 == 1 else "",
            history=(("What color is the shape?", "The shape is red."),) * (i % 3),
        )


# What decides what the model is shown: the keys that hold in training and everywhere else.
SHOWN: list[dict] = [
    {},
    {"model.template": "qwen3_vl"},  # whose answers begin with a thought
    {"format.image_max_pixels": 65536, "format.image_min_pixels": 4096},
]


@pytest.fixture(scope="module", params=SHOWN, ids=str)
def p(params_with, request):
    preprocess = {"validation": 0.2, "test": 0.4, "split_key": "k", "workers": 1, "wanted": ALL}
    values: dict = {"train.beta": 0.3, "train.per_device_eval_batch_size": 4}
    values["format.cutoff_len"] = 256
    values |= {f"preprocess.{name}": value for name, value in preprocess.items()}
    return params_with(**values | request.param)


@pytest.fixture(scope="module")
def pairs_of_all_shapes(p, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    assert preprocess.fill(folder, records(), (), p.preprocess)["rows_kept"] == 60
    return folder


# through LLaMA-Factory

IDS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


@pytest.fixture(scope="module")
def data(llamafactory, p, pairs_of_all_shapes, model_dir, tmp_path_factory):
    """``data/formatted`` of pairs of every shape."""
    folder = tmp_path_factory.mktemp("formatted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(params, "load", lambda: p)
        out, report = folder / "formatted", folder / "report.json"
        format_stage.main(pairs_of_all_shapes, model_dir, out, report)
    return folder / "formatted"


@pytest.fixture(scope="module")
def untuned(llamafactory, p, model_dir):
    return scoring.load(model_dir, p)


@pytest.mark.slow
def test_lengths_are_counted_as_llamafactory_encodes_them(
    data, p, model_dir, untuned, pairs_of_all_shapes
):
    rows = formatted.read(data, "test")
    sizes = [
        [Image.open(pairs_of_all_shapes / "images" / name).size for name in row["images"]]
        for row in rows
    ]
    counted = tokens.count(tokens.load(model_dir, p), rows, sizes)
    encoded = scoring.encode(untuned, rows, pairs_of_all_shapes / "images")
    for lengths, feature in zip(counted, encoded, strict=True):
        assert lengths.prompt + lengths.chosen == len(feature["chosen_input_ids"])
        assert lengths.prompt + lengths.rejected == len(feature["rejected_input_ids"])
        assert lengths.image == feature["chosen_input_ids"].count(untuned.image_token_id)


@pytest.mark.slow
def test_tokens_and_log_probs_of_every_shape_are_the_trainers(
    data, p, untuned, model_dir, adapter_dir, pairs_of_all_shapes, tmp_path
):
    shown = pairs_of_all_shapes / "images"
    rows = formatted.read(data, "test")
    assert {len(row["images"]) for row in rows} == {0, 1, 2, 3}
    assert {formatted.system(row) for row in rows} == {"", "Answer briefly."}
    theirs = dpo_trainer(p, model_dir, data, shown, adapter_dir, tmp_path)
    encoded = scoring.encode(untuned, rows, shown)
    for row, feature, trained in zip(rows, encoded, theirs.eval_dataset, strict=True):
        assert {name: list(feature[name]) for name in IDS} == {name: trained[name] for name in IDS}
        asked = scoring.prompt_tokens(untuned, row, shown)  # of generation and of serving
        assert asked == list(feature["chosen_input_ids"][: len(asked)])
        assert list(feature["chosen_labels"]).count(prefix.IGNORE) == len(asked)
    tuned = scoring.load(model_dir, p, adapter_dir)
    for policy, found in zip((tuned, untuned), trainers_log_probs(theirs), strict=True):
        ours = scoring.log_probs(policy, rows, shown, batch_tokens=512, label="test")
        assert np.abs(ours[scoring.LOGPS].to_numpy().T - found).max() < 1e-3


@pytest.mark.slow
def test_answers_take_every_shape_and_do_not_depend_on_the_batch(
    data, untuned, pairs_of_all_shapes
):
    rows = formatted.read(data, "test")[:10]

    def answers(batch_tokens):
        return scoring.answer(
            untuned,
            rows,
            pairs_of_all_shapes / "images",
            max_new_tokens=6,
            batch_tokens=batch_tokens,
            label="test",
        )

    assert answers(1) == answers(2000)
