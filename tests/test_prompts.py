"""Answers of both models stand beside each other, each with its own prompt."""

import pandas as pd
import pytest

from stages.answers import prompts
from stages.core.errors import UserError
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
