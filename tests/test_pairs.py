"""The split and the checks of a row's fields."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.pairs import pairs, refusals
from stages.pairs.pairs import Record, split_of

FRACTIONS = st.tuples(st.floats(0, 0.5), st.floats(0, 0.49))
TEXT = st.text(st.characters(codec="utf-8"))
KEYS = st.text(st.characters(codec="ascii"), min_size=1, max_size=64)


def record(**changes):
    fields = {"images": (b"i",), "question": "q?", "chosen": "yes", "rejected": "no"} | changes
    return Record("file row 1", **fields)


@given(st.sets(TEXT), st.sets(TEXT), KEYS, FRACTIONS)
def test_adding_data_moves_no_group_to_another_split(groups, more, key, fractions):
    def sides(names):
        validation, test = fractions
        return {name: split_of(name, key=key, validation=validation, test=test) for name in names}

    before, after = sides(groups), sides(groups | more)
    assert before == {name: after[name] for name in before}


@given(TEXT, KEYS, FRACTIONS, st.floats(0, 0.3))
def test_raising_a_fraction_never_takes_a_group_out_of_the_test_split(group, key, fractions, more):
    validation, test = fractions
    if split_of(group, key=key, validation=validation, test=test) == "test":
        assert split_of(group, key=key, validation=validation, test=test + more) == "test"


def test_splits_have_the_sizes_asked_for():
    names = [f"image {i}" for i in range(20_000)]
    sides = [split_of(name, key="k", validation=0.1, test=0.2) for name in names]
    # Four standard deviations of a binomial count: 0.011 at most.
    assert abs(sides.count("test") / len(names) - 0.2) < 0.0115
    assert abs(sides.count("validation") / len(names) - 0.1) < 0.0086
    assert set(sides) == set(pairs.SPLITS)


def test_the_split_of_a_known_image_is_pinned():
    # A change here would move every user's test images into training.
    sides = [split_of(str(i), key="k", validation=0.3, test=0.3) for i in range(8)]
    assert "".join(side[:2] for side in sides) == "trtrtetrvatrtrva"


@given(st.lists(TEXT), st.lists(TEXT))
def test_rows_have_the_same_id_only_if_all_fields_are_equal(a, b):
    assert (pairs.row_id(*a) == pairs.row_id(*b)) == (a == b)


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({}, None, ""),
        (
            {"images": None, "rejected": None, "note": "why"},
            "missing_field",
            "image, rejected (why)",
        ),
        ({"question": " \n"}, "missing_field", "question is blank"),
        ({"chosen": ""}, "empty_answer", "chosen"),
        ({"rejected": "\t "}, "empty_answer", "rejected"),
        ({"chosen": "no \n", "rejected": " no"}, "identical_answers", "no"),
        ({"chosen": "caf\u00e9", "rejected": "cafe\u0301"}, "identical_answers", "caf\u00e9"),
        ({"chosen": "no", "rejected": "No"}, None, ""),
        ({"chosen": "\ud800 yes"}, "missing_field", "chosen is not valid Unicode text"),
        ({"origin": "\udfff"}, "missing_field", "origin is not valid Unicode text"),
        ({"question": "q\0"}, "missing_field", "question is not valid Unicode text"),
        (
            dict.fromkeys(("images", "question", "chosen", "rejected"))
            | {"note": "it holds a video", "reason": "not_read"},
            *("not_read", "it holds a video"),
        ),
    ],
)
def test_a_row_is_refused_for_what_is_wrong_with_its_fields(changes, reason, detail):
    found = refusals.text_refusal(record(**changes))
    assert (found and found.reason) == reason
    assert not found or found.detail == detail
