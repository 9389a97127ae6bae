"""What docs/guide.md and docs/reliability.md say of limits and tests is so."""

import re

import pytest

from stages.pairs import formats, images, layouts
from tests.contracts import ROOT

GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("at most 67 MB unpacked", formats.MOST_LINE / 1e6),
        ("a header 10,000 columns", formats.MOST_COLUMNS),
        ("134 MB", formats.MOST_BYTES / 1e6),
        ("a text 1,048,576 characters", layouts.MOST_CHARACTERS),
        ("more than 100 scans", images.MOST_SCANS),
    ],
)
def test_limits_are_as_the_code_has_them(text, number):
    assert text in " ".join(f"{GUIDE} {TEXT}".split())
    (said,) = re.findall(r"[\d,.]*\d", text)
    assert float(said.replace(",", "")) == pytest.approx(number, rel=0.03)


def test_every_command_names_tests_that_exist():
    for path in re.findall(r"python -m pytest (\S+?)[ `)]", TEXT):
        assert (ROOT / path).is_file(), path
