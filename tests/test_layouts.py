"""The layouts that the tools and data sets of this field have, each as it is published."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.pairs import layouts
from stages.pairs.layouts import Fields, Odd, Unreadable

COLUMNS = {name: name for name in ("image", "question", "chosen", "rejected")} | {
    "origin": "origin_dataset",
    "kind": None,
}
HISTORY = (("What is it?", "A cat."),)
USER, ASSISTANT = {"role": "user"}, {"role": "assistant"}


def parts(*content):
    return [{"type": "text", "text": text} if text else {"type": "image"} for text in content]


def read(row, columns=COLUMNS):
    layout = layouts.choose(list(row), columns)
    assert layout, row.keys()
    return layouts.fields(row, layout)


PLAIN = Fields("Which colour?", "Red.", "Blue.", ("a.png",))
ANSWERS = {"chosen": "Red.", "rejected": "Blue."}
SHAREGPT = {
    "chosen": {"from": "gpt", "value": "Red."},
    "rejected": {"from": "gpt", "value": "Blue."},
    "images": ["a.png"],
}
MARKED = Fields("<image>Which colour?", "Red.", "Blue.", ("a.png",))


def rated(*ratings):
    return {
        "annotations": {
            aspect: {"Rating": str(rating), "Rationale": "…"}
            for aspect, rating in zip(("Helpfulness", "Visual Faithfulness"), ratings, strict=True)
        }
    }


COMPLETIONS = [
    {"model": "a", "response": "So so.", **rated(3, 3)},
    {"model": "b", "response": "Red.", **rated(5, 4)},
    {"model": "c", "response": "Blue.", **rated(1, 2)},
]
CASES = {
    "RLAIF-V": (
        {
            "ds_name": "RLAIF-V",
            "image": {"bytes": b"x", "path": "a.png"},
            "question": "Which colour?",
            **ANSWERS,
            "origin_dataset": "COCO",
            "origin_split": "{}",
            "idx": 3,
            "image_path": "a.png",
        },
        Fields(
            "Which colour?", "Red.", "Blue.", ({"bytes": b"x", "path": "a.png"},), origin="COCO"
        ),
    ),
    "RLHF-V": (
        {
            "image": "a.png",
            "text": json.dumps({"question": "Which colour?", **ANSWERS}),
            "origin_dataset": "VQAv2",
            "idx": 1,
        },
        Fields("Which colour?", "Red.", "Blue.", ("a.png",), origin="VQAv2"),
    ),
    "MM-RLHF": ({"image": "a.png", "prompt": "Which colour?", **ANSWERS, "rank": 1}, PLAIN),
    "VLFeedback, JSON": (
        {"id": 1, "prompt": "Which colour?", "img_path": "a.png", "completions": COMPLETIONS},
        PLAIN,
    ),
    "VLFeedback, Parquet": (
        {
            "prompt": "Which colour?",
            "image": "a.png",
            "completions": {
                key: [c[key] for c in COMPLETIONS] for key in ("annotations", "model", "response")
            },
        },
        PLAIN,
    ),
    "LLaMA-Factory, conversations": (
        {"conversations": [{"from": "human", "value": "<image>Which colour?"}], **SHAREGPT},
        MARKED,
    ),
    "LLaMA-Factory, messages and a system prompt": (
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {**USER, "content": "<image>What is it?"},
                {**ASSISTANT, "content": "A cat."},
                {**USER, "content": "Which colour?"},
            ],
            "chosen": {**ASSISTANT, "content": "Red."},
            "rejected": {**ASSISTANT, "content": "Blue."},
            "images": ["a.png", "b.png"],
        },
        Fields(
            "Which colour?",
            "Red.",
            "Blue.",
            ("a.png", "b.png"),
            system="Be short.",
            history=(("<image>What is it?", "A cat."),),
        ),
    ),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "Which", "input": "colour?", **ANSWERS, "system": "S", "images": []},
        Fields("Which\ncolour?", "Red.", "Blue.", (), system="S"),
    ),
    "ms-swift": (
        {
            "messages": [
                {**USER, "content": "<image>Which colour?"},
                {**ASSISTANT, "content": "Red."},
            ],
            "rejected_response": "Blue.",
            "images": ["a.png"],
        },
        MARKED,
    ),
    "ms-swift, query": (
        {
            "query": "Which colour?",
            "response": "Red.",
            "rejected_response": "Blue.",
            "history": [list(HISTORY[0])],
            "images": ["a.png"],
        },
        Fields("Which colour?", "Red.", "Blue.", ("a.png",), history=HISTORY),
    ),
    "TRL vision": (
        {
            "images": ["a.png"],
            "prompt": [{**USER, "content": parts("", "Which colour?")}],
            "chosen": [{**ASSISTANT, "content": parts("Red.")}],
            "rejected": [{**ASSISTANT, "content": parts("Blue.")}],
        },
        MARKED,
    ),
    "TRL, implicit prompt": (
        {
            "chosen": [{**USER, "content": "Which colour?"}, {**ASSISTANT, "content": "Red."}],
            "rejected": [{**USER, "content": "Which colour?"}, {**ASSISTANT, "content": "Blue."}],
            "image": "a.png",
        },
        PLAIN,
    ),
    "an image inside a content part": (
        {
            "prompt": [
                {
                    **USER,
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                        {"type": "text", "text": "Which colour?"},
                    ],
                }
            ],
            **ANSWERS,
        },
        MARKED,
    ),
    "messages as JSON text": (
        {
            "messages": json.dumps([{**USER, "content": "Which colour?"}]),
            **ANSWERS,
            "image": "a.png",
        },
        PLAIN,
    ),
    "a list of one image in data.columns": (
        {"image": ["a.png"], "question": "Which colour?", **ANSWERS, "origin_dataset": None},
        PLAIN,
    ),
    "several images": (
        {"images": ["a.png", "b.png"], "question": "Which colour?", **ANSWERS},
        Fields("Which colour?", "Red.", "Blue.", ("a.png", "b.png")),
    ),
    "no images": (
        {"prompt": "Which colour?", **ANSWERS},
        Fields("Which colour?", "Red.", "Blue.", ()),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_published_layout_is_read(name):
    row, expected = CASES[name]
    assert read(row) == expected


def test_a_row_without_an_image_is_text_only_in_lists_and_lacks_it_in_data_columns():
    plain = {"question": "q", **ANSWERS, "image": None, "origin_dataset": ""}
    assert read(plain).images is None
    assert read(plain | {"image": []}).images == ()
    assert read({"messages": [{**USER, "content": "q"}], **ANSWERS, "images": None}).images == ()
    assert (
        read({"question": "q", **ANSWERS}, COLUMNS | {"image": None, "origin": None}).images == ()
    )


MESSAGES = {"messages": [{**USER, "content": "q"}], **ANSWERS}
ODD = {
    "a tool's turn": MESSAGES | {"messages": [{"role": "tool", "content": "x"}]},
    "an answer at the end": MESSAGES
    | {"messages": [*MESSAGES["messages"], {**ASSISTANT, "content": "a"}]},
    "no text": MESSAGES | {"messages": [{**USER, "content": None}]},
    "a number of a message": MESSAGES | {"messages": [5]},
    "a sound": MESSAGES | {"messages": [{**USER, "content": [{"type": "audio"}]}]},
    "two answers": MESSAGES | {"chosen": [{**ASSISTANT, "content": "a"}] * 2},
    "a user's answer": MESSAGES | {"chosen": {**USER, "content": "a"}},
    "prompts that differ": {
        "chosen": [{**USER, "content": "q"}, {**ASSISTANT, "content": "a"}],
        "rejected": [{**USER, "content": "other"}, {**ASSISTANT, "content": "b"}],
    },
    "a video": {"video": "a.mp4", "prompt": "q", **ANSWERS},
    "text that is no JSON": {"text": "plain", "image": "a.png"},
    "one completion": {"prompt": "q", "completions": COMPLETIONS[:1]},
    "equal ratings": {"prompt": "q", "completions": [COMPLETIONS[0], COMPLETIONS[0]]},
    "no ratings": {"prompt": "q", "completions": [{"response": "a"}, {"response": "b"}]},
    "text too long": {"prompt": "q" * (layouts.MOST_CHARACTERS + 1), **ANSWERS},
    "not UTF-8": {"prompt": Unreadable("is not UTF-8 text"), **ANSWERS},
}


@pytest.mark.parametrize("name", ODD)
def test_a_row_that_is_odd_says_why_in_a_sentence(name):
    with pytest.raises(Odd) as error:
        read(ODD[name])
    assert 10 < len(str(error.value)) < 300


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


@given(st.sampled_from([row for row, _ in CASES.values()]), st.data())
def test_whatever_a_cell_holds_gives_fields_or_an_odd_row(row, draw):
    layout = layouts.choose(list(row), COLUMNS)
    assert layout
    column = draw.draw(st.sampled_from(sorted(layout.columns)))
    try:
        found = layouts.fields(row | {column: draw.draw(VALUES)}, layout)
    except Odd:
        return
    for text in (found.question, found.chosen, found.rejected):
        assert isinstance(text, str | None)
    assert isinstance(found.images, tuple | None)
