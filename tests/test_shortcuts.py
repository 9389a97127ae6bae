"""The audit of pairs finds what was put there, and says so above 60%."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stages.evaluation import metrics, shortcuts
from stages.reporting import verdicts
from stages.reporting.page import render
from tests.experiment import metrics_of, uncharted
from tests.test_metrics import SETTINGS


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


def rates(pairs):
    found = shortcuts.judges(pairs[:300], pairs[300:])
    return {name: float(outcome.mean()) for name, outcome in found.items()}


def test_a_first_word_that_gives_chosen_away_is_found():
    found = rates(many(400, "Indeed it is {}.", "Perhaps it is {}."))
    assert found == {"first_words": 1.0, "bag_of_words": 1.0}


def test_a_word_at_the_end_is_found_by_the_bag_alone():
    found = rates(many(400, "it looks much like {} today", "it looks much like {} maybe"))
    assert found["first_words"] == 0.5
    assert found["bag_of_words"] == 1.0


def test_answers_that_differ_by_chance_are_told_apart_by_chance():
    found = rates(many(1300, "The shape is {}.", "The shape is {}."))
    assert found["first_words"] == 0.5
    assert found["bag_of_words"] == pytest.approx(0.5, abs=0.06)


def test_answers_without_a_word_are_ties():
    assert rates([pair(f"{i}", "!", "?") for i in range(310)]) == {
        "first_words": 0.5,
        "bag_of_words": 0.5,
    }


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
    page = render(uncharted(audit=table, metrics=metrics_of(**counts)))
    assert "contradictory pairs" in page
    assert "<code>b.jpg</code>" in page
    empty = pd.DataFrame(columns=list(shortcuts.LISTED))
    assert "No pair contradicts another" in render(uncharted(audit=empty))


def test_metrics_of_shortcuts_by_hand():
    judged = {"bag_of_words": np.array([1.0, 1.0, 0.5, 0.0])}
    found = metrics.of_shortcuts(judged, {"audited_pairs": 9}, ["a", "b", "c", "d"], SETTINGS)
    assert found["bag_of_words_wins"] == 0.625
    assert found["audited_pairs"] == 9


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("longer_wins", "always preferring the longer answer"),
        ("first_words_wins", "first three words"),
        ("bag_of_words_wins", "which words the answers have"),
        ("base_accuracy_blank", "the base with a blank image"),
    ],
)
def test_a_shortcut_gets_a_sentence_above_60_percent(key, words):
    def notes(value):
        return [c.text for c in verdicts.concerns(metrics_of(**{key: value})) if words in c.text]

    assert notes(0.6) == []
    (note,) = notes(0.61)
    assert "61.0%" in note


def test_contradictions_and_copies_get_a_sentence():
    notes = [
        c.text
        for c in verdicts.concerns(metrics_of(contradictory_pairs=2, near_duplicate_images=3))
    ]
    assert any("contradicts itself: 2 pairs" in note for note in notes)
    assert any("look the same as one of another split: 3." in note for note in notes)
