"""What pairs are held against: answers of both models, other images, the base's own answers."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageChops

from stages.answers import controls, off_policy, prompts
from stages.core.errors import UserError
from stages.model.scoring import LENGTHS, LOGPS
from tests.test_evaluate import PAIRS, QUESTIONS

ASKED = [row | {"of": "pair"} for row in PAIRS[:2]] + [
    row | {"of": "question"} for row in QUESTIONS
]


def given(*answers):
    of = ["pair", "pair", "question", "question"]
    said = pd.DataFrame({"id": ["a", "b", "q", "a"], "of": of, "answer": answers}, dtype="str")
    return said.assign(tokens=[len(answer) for answer in answers], finished=True)


BASE = given("yes", "no", "The shape is green.", "The shape is blue.")
TUNED = given("yes", "yes", "The shape is red.", "The shape is blue.")


def test_answers_stand_beside_each_other_and_are_graded_where_the_truth_is_known():
    table = prompts.beside_each_other(ASKED, BASE.iloc[::-1], TUNED)
    assert list(table["id"]) == ["a", "b", "q", "a"]
    assert list(table["of"]) == ["pair", "pair", "question", "question"]
    assert list(table["question"])[1:3] == ["What is b?", "what color is the shape?"]
    assert list(table["image"]) == ["a.jpg", "b.jpg", "q.jpg", "a.jpg"]
    assert list(table["base_answer"]) == list(BASE["answer"])
    assert list(table["tuned_answer"]) == list(TUNED["answer"])
    assert list(table["base_tokens"]) == list(BASE["tokens"])
    assert table["tuned_finished"].all()
    assert list(table["base_correct"]) == [None, None, False, True]
    assert list(table["tuned_correct"]) == [None, None, True, True]
    nothing = prompts.beside_each_other([], BASE.iloc[:0], BASE.iloc[:0])
    assert nothing.empty
    assert {"base_answer", "tuned_correct"} <= set(nothing.columns)


@pytest.mark.parametrize(
    "other",
    [
        BASE.iloc[1:-1],
        BASE.assign(id=["a", "b", "x", "a"]),
        BASE.iloc[:3],  # pair and question "a" share a name; the question's own answer is missing
    ],
)
def test_answers_to_other_prompts_are_refused(other):
    with pytest.raises(UserError, match="the base model answered other prompts"):
        prompts.beside_each_other(ASKED, other, TUNED)


# Controls show another image in the same place, and change nothing else


def pair(name, image):
    return {"id": name, "images": [image], "messages": [f"what is {name}?"], "chosen": "yes"}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size, colour in (
        ("a.jpg", (40, 30), "red"),
        ("b.jpg", (40, 30), "blue"),
        ("c.png", (64, 48), "green"),
    ):
        Image.new("RGB", size, colour).save(folder / name)
    return folder


SHOWN = [pair("1", "a.jpg"), pair("2", "a.jpg"), pair("3", "b.jpg"), pair("4", "c.png")]


def seen(row):
    with Image.open(row["images"][0]) as image:
        return image.convert("RGB")


def test_only_the_image_is_exchanged_and_its_size_stays(images, tmp_path):
    found = controls.shown(SHOWN, images, tmp_path)
    assert list(found) == ["blank", "shuffled"]
    for rows in found.values():
        for before, after in zip(SHOWN, rows, strict=True):
            assert after | {"images": before["images"]} == before
            with Image.open(images / before["images"][0]) as own:
                assert seen(after).size == own.size
                assert ImageChops.difference(seen(after), own.convert("RGB")).getbbox()


def test_every_image_is_shown_for_another_one(images, tmp_path):
    rows = controls.shown(SHOWN, images, tmp_path)["shuffled"]
    # By size, then name: a is followed by b, b by c (made as small as b), c by a.
    assert rows[0]["images"] == rows[1]["images"]
    assert seen(rows[0]).tobytes() == Image.open(images / "b.jpg").tobytes()
    assert seen(rows[2]).getpixel((20, 15)) == (0, 128, 0)
    red, green, blue = seen(rows[3]).getpixel((20, 15))
    assert red > 200
    assert max(green, blue) < 60


def test_one_image_alone_cannot_be_exchanged_and_no_sample_loads_no_model(
    images, tmp_path, checkpoint_of, params_with
):
    assert list(controls.shown(SHOWN[:2], images, tmp_path)) == ["blank"]
    checkpoint = checkpoint_of(None, params_with(**{"evaluate.controls": 0}))
    table = controls.log_probs(checkpoint, SHOWN, images, label="test")
    assert table.empty
    assert list(table.columns) == ["id", "shown"]


# The off-policy meter: which answers are measured, and what its three numbers say


def test_pairs_are_measured_whose_question_the_base_answered_to_an_end(tmp_path):
    """The fake base gives every letter -1 nat, and an answer of n letters n tokens."""
    calls = []

    def log_probs(pairs, images, *, label):
        calls.append([(pair["chosen"]["content"], pair["rejected"]["content"]) for pair in pairs])
        said = np.array([[len(text) for text in texts] for texts in calls[-1]], dtype=float)
        table = pd.DataFrame({"id": [pair["id"] for pair in pairs]})
        return table.assign(**dict(zip(LOGPS, -(said**2).T, strict=True))).assign(
            **dict(zip(LENGTHS, said.T, strict=True))
        )

    asked = [
        {"id": name, "of": of, "chosen": {"content": "abc"}, "rejected": {"content": "ab"}}
        for name, of in (
            ("a", "pair"),
            ("b", "pair"),
            ("c", "pair"),
            ("d", "pair"),
            ("a", "question"),
        )
    ]
    answered = pd.DataFrame(
        {
            "id": [*"abcda"],
            "of": [row["of"] for row in asked],
            "answer": ["x", "cut", "", "an <image> of it", "of a question"],
            "finished": [True, False, True, True, True],
        }
    )
    base: Any = SimpleNamespace(log_probs=log_probs)
    found = off_policy.per_token(base, asked, answered, tmp_path)
    assert found.to_dict("records") == [{"id": "a", "chosen": -3, "rejected": -2, "own": -1}]
    assert calls == [[("abc", "ab")], [("x", "x")]]
    nothing = off_policy.per_token(base, asked, answered[1:], tmp_path)
    assert off_policy.figures(nothing) == {}
    assert list(nothing) == ["id", *off_policy.ANSWERS]


def test_the_three_numbers_by_hand():
    own = -np.arange(1, 101) / 100  # 1% quantile: -0.9901
    table = pd.DataFrame({"chosen": own - 0.5, "rejected": np.repeat([-0.1, -9.0], 50), "own": own})
    assert off_policy.figures(table) == {
        "own_answers": 100,
        "off_policy_distance": pytest.approx(0.5),
        "off_policy_chosen": 0.51,
        "off_policy_rejected": 0.5,
    }
