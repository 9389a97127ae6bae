"""The off-policy meter: which answers are measured, and what its three numbers say."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stages.answers import off_policy
from stages.model.scoring import LENGTHS, LOGPS


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
