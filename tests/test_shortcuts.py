"""The audit of pairs finds what was put there."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stages.evaluation import shortcuts
from stages.reporting.page import render
from tests.experiment import inputs_with


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        ("A red cube.", "a RED cube", 1.0),
        ("a red cube", "a blue cube", 2 / 3),
        ("a red cube", "red cube", 2 / 3),
        ("a b c d", "b c d a", 0.5),  # one taken out, one put in
        ("yes", "no", 0.0),
        ("?", "!", 1.0),  # no words at all
        ("it is", "there it is now", 0.5),
    ],
)
def test_what_answers_have_in_common_is_counted_in_edits_of_words(chosen, rejected, shared):
    pair = {"chosen": {"content": chosen}, "rejected": {"content": rejected}}
    assert shortcuts.in_common(pair) == pytest.approx(shared)


def pair(name, chosen, rejected, question="What is it?", image=None):
    return {
        "id": name,
        "messages": [{"role": "user", "content": f"<image>{question}"}],
        "chosen": {"role": "assistant", "content": chosen},
        "rejected": {"role": "assistant", "content": rejected},
        "images": [image or f"{name}.jpg"],
    }


COLOURS = ("red", "green", "blue", "gold", "teal", "gray", "pink", "black")


def many(count, chosen, rejected):
    """Pairs whose answers are made from two different colours."""
    generator = np.random.default_rng(0)
    drawn = [generator.choice(COLOURS, 2, replace=False) for _ in range(count)]
    return [
        pair(f"p{i}", chosen.format(one), rejected.format(other))
        for i, (one, other) in enumerate(drawn)
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "first_words", "bag_of_words"),
    [
        ("Indeed it is {}.", "Perhaps it is {}.", 1.0, 1.0),
        ("it looks much like {} today", "it looks much like {} maybe", 0.5, 1.0),  # the last word
        ("The shape is {}.", "The shape is {}.", 0.5, 0.5),  # they differ by chance
        ("!", "?", 0.5, 0.5),  # without a word
    ],
)
def test_judges_find_what_gives_chosen_away(chosen, rejected, first_words, bag_of_words):
    pairs = many(1300, chosen, rejected)
    found = shortcuts.judges(pairs[:300], pairs[300:])
    assert found["first_words"].mean() == first_words
    assert found["bag_of_words"].mean() == pytest.approx(bag_of_words, abs=0.06)


def test_swapped_answers_contradict_each_other_and_nothing_else_does():
    one = pair("one", "A cat.", "A dog.", image="x.jpg")
    swapped = pair("two", "a  DOG.", "A cat.", image="x.jpg")
    assert shortcuts.contradictions([one, swapped]) == [("one", "two")]
    assert shortcuts.contradictions([one, pair("three", "A cat.", "A dog.", image="x.jpg")]) == []
    assert shortcuts.contradictions([one, swapped | {"images": ["y.jpg"]}]) == []
    other = pair("four", "A dog.", "A cat.", question="Which?", image="x.jpg")
    assert shortcuts.contradictions([one, other]) == []


def scene(seed, side=192):
    """Something like a photograph: soft blobs of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def test_a_copy_is_found_where_it_is_in_another_split_and_other_images_are_not(tmp_path):
    for i in range(12):
        scene(i).save(tmp_path / f"scene{i}.jpg", quality=95)
    scene(3).save(tmp_path / "again.jpg", quality=30)
    scene(4).resize((96, 96)).save(tmp_path / "smaller.png")
    scene(5).save(tmp_path / "same-split.jpg", quality=60)
    recoloured = np.asarray(scene(6))[..., ::-1]
    Image.fromarray(recoloured).save(tmp_path / "recoloured.jpg")
    split = {f"scene{i}.jpg": "train" for i in range(12)} | {
        "again.jpg": "test",
        "smaller.png": "validation",
        "same-split.jpg": "train",
        "recoloured.jpg": "test",
    }
    found = shortcuts.near_duplicates(split, tmp_path)
    assert found == [("again.jpg", "scene3.jpg"), ("scene4.jpg", "smaller.png")]


def test_findings_are_listed_and_counted(tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("c", 1)):
        scene(seed).save(tmp_path / f"{name}.jpg")
    by_split = {
        "train": [pair("a", "A cat.", "A dog."), pair("b", "Red.", "Blue.")],
        "test": [pair("c", "One.", "Two."), pair("d", "Two.", "One.", image="c.jpg")],
    }
    table, counts = shortcuts.listed(by_split, tmp_path)
    assert table.to_dict("split")["data"] == [
        ["contradictory pairs", "test", "c", "test", "d"],
        ["near-duplicate images", "train", "b.jpg", "test", "c.jpg"],
    ]
    assert counts == {
        "audited_pairs": 4,
        "contradictory_pairs": 2,
        "audited_images": 1,
        "near_duplicate_images": 1,
    }
    page = render(inputs_with(audit=table))
    assert "contradictory pairs" in page
    assert "<code>b.jpg</code>" in page
    empty = pd.DataFrame(columns=list(shortcuts.LISTED))
    assert "No pair contradicts another" in render(inputs_with(audit=empty))
