"""Answers of both models stand beside each other, each with its own prompt."""

import pandas as pd
import pytest

from stages.answers import prompts
from stages.answers.prompts import Prompts
from stages.core.errors import UserError
from stages.model import formatted


def row(name, kind="", **more):
    content = f"<image>What is {name}?"
    return {
        "id": name,
        "kind": kind,
        "messages": [{"role": "user", "content": content}],
        "images": [f"{name}.jpg"],
        **more,
    }


PAIRS = [row(name) for name in "abcd"]
COLOUR = [{"role": "user", "content": "<image>what color is the shape?"}]
QUESTIONS = [
    row("q", "colour", answer="red", messages=COLOUR),
    row("a", "colour", answer="blue", messages=COLOUR),
]
ASKED = Prompts(PAIRS[:2], QUESTIONS)


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


def test_answers_to_other_prompts_are_refused():
    for other in (BASE.iloc[1:-1], BASE.assign(id=["a", "b", "x", "a"])):
        with pytest.raises(UserError, match="the base model answered other prompts"):
            prompts.beside_each_other(ASKED, other, TUNED)


def test_a_prompt_answered_as_a_pair_is_no_answer_to_the_question_of_its_name():
    # Pair and question "a" share a name; the question's own answer is missing here.
    with pytest.raises(UserError, match="the base model answered other prompts"):
        prompts.beside_each_other(ASKED, BASE.iloc[:3], TUNED)


def test_nothing_asked_is_an_empty_table():
    nothing = BASE.iloc[:0]
    table = prompts.beside_each_other(Prompts([], []), nothing, nothing)
    assert table.empty
    assert {"base_answer", "tuned_correct"} <= set(table.columns)


def test_the_placeholder_is_no_part_of_a_question():
    assert formatted.IMAGE_PLACEHOLDER not in "".join(
        prompts.beside_each_other(ASKED, BASE, TUNED)["question"]
    )
