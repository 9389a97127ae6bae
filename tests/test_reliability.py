"""docs/reliability.md: each promise names tests that exist, and limits are as the code has them."""

import re

import pytest

from stages.pairs import formats, images, layouts
from tests.contracts import ROOT

TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
PROMISES = (
    "No row is wrong in silence",
    "Nothing that was fetched runs",
    "Nothing outside the project's folders is written or read",
    "No secret is kept or sent elsewhere",
    "Memory is bounded by stated limits",
    "A kill loses minutes",
    "The same inputs give the same bits",
)


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_names_tests_that_exist(promise):
    (section,) = re.findall(rf"(?ms)^## {promise}\n(.+?)(?=^## |\Z)", TEXT)
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", section)
    assert named
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8") or not test, test


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("JSON value above 67 MB", formats.MOST_LINE / 1e6),
        ("more than 10,000 columns", formats.MOST_COLUMNS),
        ("image file above 134 MB", formats.MOST_BYTES / 1e6),
        ("text above 1,048,576 characters", layouts.MOST_CHARACTERS),
        ("more than 100 scans", images.MOST_SCANS),
    ],
)
def test_limits_are_as_the_code_has_them(text, number):
    assert text in " ".join(TEXT.split())
    (said,) = re.findall(r"[\d,.]*\d", text)
    assert float(said.replace(",", "")) == pytest.approx(number, rel=0.03)
