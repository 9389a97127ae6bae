"""Answers are graded strictly, whichever of the usual ways a model chooses to put them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.answers.grading import is_correct, letter, mentioned, repetition, said
from stages.sources.topics import COLOURS, MISTAKEN, SHAPES, Scene, sentence

WHICH_COLOUR = "what color is the shape?"
WHICH_SHAPE = "what shape does the image contain?"
RED = "is there a red shape?"
NO_RED = "is there not a red shape?"
CIRCLE = "does the image contain a circle?"


@pytest.mark.parametrize(
    ("question", "truth", "answer", "right"),
    [
        (WHICH_COLOUR, "red", "The color of the shape is red.", True),
        (WHICH_COLOUR, "red", "Red", True),
        (WHICH_COLOUR, "red", "**red**", True),
        (WHICH_COLOUR, "red", "The red shape is red.", True),
        (WHICH_COLOUR, "red", "It is red, or brown.", False),
        (WHICH_COLOUR, "red", "The shape is a circle.", False),
        (WHICH_COLOUR, "red", "A reddish tone.", False),
        (WHICH_COLOUR, "red", "", False),
        (WHICH_SHAPE, "circle", "It's a red circle.", True),
        (WHICH_SHAPE, "circle", "Circle", True),
        (WHICH_SHAPE, "circle", "The shape is a triangle.", False),
    ],
)
def test_a_colour_or_shape_must_be_named_and_no_other(question, truth, answer, right):
    assert is_correct(question, truth, answer) is right


@pytest.mark.parametrize(
    ("question", "truth", "answer", "right"),
    [
        (RED, "yes", "The shape is red.", True),
        (RED, "no", "The shape is red.", False),
        (RED, "no", "The shape is teal.", True),
        (RED, "yes", "The shape is teal.", False),
        (NO_RED, "no", "The shape is red.", True),
        ("is no red shape present?", "yes", "The shape is blue.", True),
        ("is no red shape present?", "yes", "The shape is red.", False),
        (CIRCLE, "no", "The shape is a triangle.", True),
        (CIRCLE, "no", "The shape is red.", False),
        (CIRCLE, "no", "A circle, or a triangle.", False),
        (CIRCLE, "no", "", False),
        (RED, "no", "There is no red shape.", True),
        (RED, "no", "The shape isn\u2019t red.", True),
        (RED, "yes", "The shape is not red.", False),
        (RED, "no", "No red shape is present.", True),
        (NO_RED, "yes", "No red shape is present.", True),
    ],
)
def test_a_statement_about_presence_is_read_as_what_it_implies(question, truth, answer, right):
    assert is_correct(question, truth, answer) is right


@pytest.mark.parametrize(
    ("question", "truth", "answer", "right"),
    [
        (RED, "yes", "Yes", True),
        (RED, "yes", "yes.", True),
        (RED, "yes", " **Yes**, there is.", True),
        (RED, "no", "No.", True),
        (RED, "no", "yes", False),
        (RED, "yes", "no", False),
        (RED, "no", "No, it is teal.", True),
        (RED, "no", "No it is teal.", True),
        (RED, "no", "No, there is no red shape.", True),
        (RED, "no", "No, it is not red but teal.", True),
        (RED, "yes", "Yes, the shape is red.", True),
        (RED, "yes", "Yes, it is red, not brown.", True),
        (CIRCLE, "no", "No, there isn't a circle.", True),
        (CIRCLE, "yes", "Yes, a circle of a teal colour.", True),
        # The question is negated, so that yes means absent.
        (NO_RED, "yes", "Yes.", True),
        (NO_RED, "yes", "Yes, it is teal.", True),
        (NO_RED, "yes", "Yes, there is no red shape.", True),
        (NO_RED, "no", "No, there is a red shape.", True),
        (NO_RED, "yes", "No.", False),
        # What follows contradicts the word: wrong whatever is true.
        (RED, "yes", "Yes, it is teal.", False),
        (RED, "no", "Yes, it is teal.", False),
        (RED, "no", "No, it is red.", False),
        (RED, "yes", "No, it is red.", False),
        (NO_RED, "no", "No, it is teal.", False),
        # Words that only begin alike are no yes or no.
        (RED, "yes", "Yesterday", False),
        (RED, "no", "Nothing", False),
    ],
)
def test_an_explicit_yes_or_no_decides_unless_it_is_contradicted(question, truth, answer, right):
    assert is_correct(question, truth, answer) is right


COLOUR_OR_SHAPE = st.one_of(st.sampled_from(COLOURS), st.sampled_from(SHAPES))
SCENES = st.builds(Scene, st.sampled_from(COLOURS), st.sampled_from(SHAPES))


@given(COLOUR_OR_SHAPE, SCENES, st.booleans(), st.sampled_from(["", "{}", "{}.", "{}, "]))
def test_a_true_sentence_is_right_with_and_without_the_true_word(topic, scene, negated, word):
    question = f"is there {'not ' if negated else ''}a {topic} shape?"
    there = topic in (scene.colour, scene.shape)
    truth, lie = ("yes", "no") if there != negated else ("no", "yes")
    statement = sentence(question, scene)
    alone = word in ("{}", "{}.")
    assert is_correct(question, truth, word.format(truth) + ("" if alone else statement))
    assert not is_correct(question, lie, word.format(truth) + ("" if alone else statement))
    if word == "{}, ":
        assert not is_correct(question, truth, word.format(lie) + statement)
        assert not is_correct(question, lie, word.format(lie) + statement)


@given(SCENES)
def test_a_sentence_about_another_scene_is_wrong(scene):
    other = Scene(MISTAKEN[str(scene.colour)], scene.shape)
    assert is_correct(WHICH_COLOUR, str(scene.colour), sentence(WHICH_COLOUR, scene))
    assert not is_correct(WHICH_COLOUR, str(scene.colour), sentence(WHICH_COLOUR, other))


# repetition


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("", 4, 0.0),
        ("one two three", 4, 0.0),  # no 4-gram at all
        ("one two three four", 4, 0.0),
        ("a b c d a b c d", 4, 1 / 5),  # abcd bcda cdab dabc abcd: one of five came before
        ("no no no no no no", 4, 2 / 3),  # three times the same
        ("a b a b a", 2, 1 / 2),  # ab ba ab ba: two of four came before
        ("a\nb   a b", 1, 1 / 2),
    ],
)
def test_repetition_is_the_share_of_n_grams_that_came_before(text, n, share):
    assert repetition(text, n) == pytest.approx(share)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 5))
def test_repetition_counts_what_a_loop_over_the_n_grams_finds(words, n):
    seen, repeated = [], 0
    for i in range(len(words) - n + 1):
        gram = words[i : i + n]
        repeated += gram in seen
        seen.append(gram)
    expected = repeated / len(seen) if seen else 0
    assert repetition(" ".join(words), n) == pytest.approx(expected)


def test_repetition_of_no_words_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        repetition("a b", 0)


# published benchmarks


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("yes", "yes"),
        ("Yes.", "yes"),
        ("**No**, there is a dog.", "no"),
        ("Yes, there is no doubt.", "yes"),
        ("There is no dog in the image.", "no"),
        ("There isn\u2019t a dog. Yes?", "no"),
        ("I would say yes", "yes"),
        ("A dog.", None),
        ("It is a dog. Yes.", None),
        ("", None),
        ("Notable", None),
    ],
)
def test_an_answer_is_yes_no_or_unclear(answer, word):
    assert said(answer) == word


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("B", "B"),
        (" B.", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B: A dog", "B"),
        ("B. A dog", "B"),
        ("B\nIt has a tail.", "B"),
        ("The correct answer is B.", "B"),
        ("Answer: (C)", "C"),
        ("The answer is B because it barks.", "B"),
        ("Option A.", "A"),
        ("Option A is wrong, so the answer is B", "B"),
        ("Option A: no. Option B: yes.", None),
        ("A dog", None),
        ("The answer is A dog", None),
        ("A, B", None),
        ("Bears", None),
        ("E", None),
        ("", None),
    ],
)
def test_an_answer_chooses_one_option_or_none(answer, option):
    assert letter(answer) == option


def test_words_of_a_list_are_found_once_a_mention_and_the_longer_name_wins():
    names = {"dog", "hot dog", "glass", "wine glass", "leaf", "knife", "box", "bus", "man", "child"}
    names |= {"potato", "berry", "bench", "ebook"}
    text = "Men and children eat hot dogs; two wine glasses, knives, leaves. A dog, the dogs"
    found = ["man", "child", "hot dog", "wine glass", "knife", "leaf", "dog", "dog"]
    assert mentioned(text, names) == found
    assert mentioned("Boxes, buses, benches, potatoes, berries and an e-book.", names) == [
        *("box", "bus", "bench", "potato", "berry", "ebook")
    ]
    assert mentioned("A hot day. Doggy, dog-like, manly", names) == []
