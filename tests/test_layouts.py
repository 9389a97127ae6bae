"""The layouts that the tools and data sets of this field have, each as it is published."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stages.pairs import layouts
from stages.pairs.formats import Unreadable
from stages.pairs.layouts import Odd
from tests.test_inputs import CASES

COLUMNS = {name: name for name in ("image", "question", "chosen", "rejected")} | {
    "origin": "origin_dataset",
    "kind": None,
}
ROWS = YAML(typ="safe").load((CASES / "rows.yaml").read_text(encoding="utf-8"))


def read(row, columns=COLUMNS):
    layout = layouts.choose(list(row), columns)
    assert layout, row.keys()
    return layouts.record(row, layout, "row 1", "", lambda cell: repr(cell).encode())


@pytest.mark.parametrize("case", ROWS, ids=[case["about"] for case in ROWS])
def test_a_row_says_what_it_says_or_why_it_is_odd(case):
    if "odd" in case:
        with pytest.raises(Odd, match=r"^.{10,300}$") as error:
            read(case["row"])
        assert case["odd"] in str(error.value)
        return
    found, says = read(case["row"]), case["says"]
    for field in ("question", "chosen", "rejected", "origin", "kind", "system"):
        assert getattr(found, field) == says.get(field, ""), field
    assert found.images == tuple(repr(cell).encode() for cell in says["images"])
    assert found.history == tuple(map(tuple, says.get("history", ())))


def test_a_row_without_an_image_is_text_only_in_lists_and_lacks_it_in_its_own_column():
    plain = {"question": "q", "chosen": "a", "rejected": "b", "image": None, "origin_dataset": ""}
    assert read(plain).images is None
    assert read(plain | {"image": []}).images == ()
    turns = {"messages": [{"role": "user", "content": "q"}], "images": None}
    assert read(turns | {"chosen": "a", "rejected": "b"}).images == ()
    no_images = COLUMNS | {"image": None, "origin": None}
    assert read({"question": "q", "chosen": "a", "rejected": "b"}, no_images).images == ()


def test_a_column_that_was_renamed_and_is_not_there_is_a_mistake_and_no_layout():
    names = ["prompt", "chosen", "rejected", "image"]
    assert layouts.choose(names, COLUMNS)
    renamed = COLUMNS | {"question": "asked"}
    assert layouts.choose(names, renamed) is None
    assert "has no column asked" in str(layouts.missing(names, renamed, []))


@pytest.mark.parametrize(
    "cell",
    [Unreadable("is not UTF-8 text"), "q" * (layouts.MOST_CHARACTERS + 1), 5, ["q"]],
    ids=type,
)
def test_a_cell_that_is_no_text_is_odd(cell):
    with pytest.raises(Odd, match=r"^prompt "):
        read({"prompt": cell, "chosen": "a", "rejected": "b"})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "from", "content", "value", "type", "text", "image", "url"])
            | st.text(max_size=3),
            inner | st.sampled_from(["user", "assistant", "gpt", "image", "text", "system"]),
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(st.sampled_from([case["row"] for case in ROWS]), st.data())
def test_whatever_a_cell_holds_gives_a_record_or_an_odd_row(row, draw):
    layout = layouts.choose(list(row), COLUMNS)
    assert layout
    column = draw.draw(st.sampled_from(sorted(layout.columns & row.keys())))
    try:
        found = read(row | {column: draw.draw(VALUES)})
    except Odd:
        return
    for text in (found.question, found.chosen, found.rejected):
        assert isinstance(text, str | None)
    assert isinstance(found.images, tuple | None)
