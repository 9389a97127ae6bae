"""Answers are graded strictly, whichever of the usual ways a model chooses to put them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.answers.grading import is_correct, repetition
from stages.sources.topics import COLOURS, MISTAKEN, SHAPES, Scene, sentence
from tasks.published.grades import letter, mentioned, said

WHICH_COLOUR = "what color is the shape?"
WHICH_SHAPE = "what shape does the image contain?"
RED = "is there a red shape?"
NO_RED = "is there not a red shape?"
CIRCLE = "does the image contain a circle?"


GRADED: dict[tuple[str, str], dict[bool, tuple[str, ...]]] = {
    # A colour or shape must be named, and no other.
    (WHICH_COLOUR, "red"): {
        True: ("The color of the shape is red.", "Red", "**red**", "The red shape is red."),
        False: ("It is red, or brown.", "The shape is a circle.", "A reddish tone.", ""),
    },
    (WHICH_SHAPE, "circle"): {
        True: ("It's a red circle.", "Circle"),
        False: ("The shape is a triangle.",),
    },
    # A statement about presence is read as what it implies. An explicit yes or no decides, unless
    # what follows contradicts it: wrong whatever is true.
    (RED, "yes"): {
        True: (
            *("The shape is red.", "Yes", "yes.", " **Yes**, there is."),
            *("Yes, the shape is red.", "Yes, it is red, not brown."),
        ),
        False: (
            *("The shape is teal.", "The shape is not red.", "no", "Yes, it is teal."),
            *("No, it is red.", "Yesterday"),  # words that only begin alike are no yes or no
        ),
    },
    (RED, "no"): {
        True: (
            *("The shape is teal.", "There is no red shape.", "The shape isn\u2019t red."),
            *("No red shape is present.", "No.", "No, it is teal.", "No it is teal."),
            *("No, there is no red shape.", "No, it is not red but teal."),
        ),
        False: (
            *("The shape is red.", "yes", "Yes, it is teal.", "No, it is red.", "Nothing"),
            *("I'm not sure that it is red.", "I can\u2019t tell whether it is red."),
        ),
    },
    # The question is negated, so that yes means absent.
    (NO_RED, "no"): {
        True: ("The shape is red.", "No, there is a red shape."),
        False: ("No, it is teal.",),
    },
    (NO_RED, "yes"): {
        True: (
            *("No red shape is present.", "Yes.", "Yes, it is teal."),
            *("Yes, there is no red shape.",),
        ),
        False: ("No.",),
    },
    ("is no red shape present?", "yes"): {
        True: ("The shape is blue.",),
        False: ("The shape is red.",),
    },
    (CIRCLE, "no"): {
        True: ("The shape is a triangle.", "No, there isn't a circle."),
        False: ("The shape is red.", "A circle, or a triangle.", ""),
    },
    (CIRCLE, "yes"): {True: ("Yes, a circle of a teal colour.",)},
}


@pytest.mark.parametrize(
    ("question", "truth", "answer", "right"),
    [
        (*asked, answer, right)
        for asked, graded in GRADED.items()
        for right, answers in graded.items()
        for answer in answers
    ],
)
def test_an_answer_is_right_where_it_says_the_truth_and_does_not_contradict_itself(
    question, truth, answer, right
):
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


# published benchmarks


SAID = {
    "yes": ("yes", "Yes.", "Yes, there is no doubt.", "I would say yes"),
    "no": (
        *("**No**, there is a dog.", "There is no dog in the image."),
        *("I can't see a dog.", "No, I'm not sure", "There is no doubt that it is not a dog"),
        *("There isn\u2019t a dog. Yes?",),
    ),
    None: (
        *("A dog.", "It is a dog. Yes.", "", "Notable"),
        *("I'm not sure.", "I can\u2019t tell from the image", "It cannot be determined."),
        *("It is not possible to determine if there is a dog.", "It's hard to say. No."),
        *("There is not only a dog but also a cat.", "There is no doubt a dog in it", "Unclear"),
        *("I don't know", "There is not enough light to say"),
    ),
}
CHOSEN = {
    "A": ("Option A.",),
    "B": (
        *("B", " B.", "(B)", "**B**", "B: A dog", "B. A dog", "B\nIt has a tail."),
        *("The correct answer is B.", "The answer is B because it barks."),
        *("Option A is wrong, so the answer is B", "b", "(b)", "b.", r"It barks: \boxed{B}."),
        *("It is B.", "It's (B)", r"\boxed{\text{b}}", "the answer is b"),
    ),
    "C": ("Answer: (C)",),
    None: (
        *("Option A: no. Option B: yes.", "A dog", "The answer is A dog", "A, B", "Bears", "E"),
        *("", "a dog", "It is a dog", "It is a. It is b.", "It is D-shaped", "a, b", r"\boxed{E}"),
    ),
}


@pytest.mark.parametrize(
    ("grade", "answer", "expected"),
    [
        (grade, answer, expected)
        for grade, table in ((said, SAID), (letter, CHOSEN))
        for expected, answers in table.items()
        for answer in answers
    ],
)
def test_an_answer_is_yes_no_or_unclear_and_chooses_one_option_or_none(grade, answer, expected):
    assert grade(answer) == expected


def test_words_of_a_list_are_found_once_a_mention_and_the_longer_name_wins():
    names = {"dog", "hot dog", "glass", "wine glass", "leaf", "knife", "box", "bus", "man", "child"}
    names |= {"potato", "berry", "bench", "ebook"}
    text = "Men and children eat hot dogs; two wine glasses, knives, leaves. A dog, the dogs"
    found = ["man", "child", "hot dog", "wine glass", "knife", "leaf", "dog", "dog"]
    assert mentioned(text, names) == found
    assert mentioned("Boxes, buses, benches, potatoes, berries and an e-book.", names) == [
        *("box", "bus", "bench", "potato", "berry", "ebook")
    ]
    assert mentioned("leaves, knives", {"leave", "knive"}) == []
    assert mentioned("a pick-up truck", {"pick", "up", "pickup", "truck"}) == ["pickup", "truck"]
    assert mentioned("A hot day. Doggy, dog-like, manly", names) == []
