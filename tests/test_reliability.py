"""docs/reliability.md counts what the tests try."""

import re

import pytest

from stages.pairs import formats, images, layouts
from stages.pairs.suffixes import SUFFIXES
from tests import test_images, test_layouts
from tests.contracts import ROOT, table_under

TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
TRIED = {
    "row layouts": len(test_layouts.CASES),
    "rows that no layout": len(test_layouts.ODD),
    "kinds of table file": len(SUFFIXES),
    "those files cut": 3 * len(SUFFIXES),
    "images by format": len(test_images.MADE),
    "files that are no image": len(test_images.NAMED),
}


def test_every_input_that_was_tried_is_counted():
    rows = table_under(TEXT, "## Tried")
    assert len(rows) == len(TRIED)
    for (name, number), (what, tried, read, refused, _) in zip(TRIED.items(), rows, strict=True):
        assert what.startswith(name)
        assert int(tried) == number == int(read) + int(refused), what


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Parquet page above 1.1 GB", formats._PAGE_BYTES / 1e9),
        ("line of JSON above 268 MB", formats._LINE_BYTES / 1e6),
        ("JSON list above 1.1 GB", formats._LIST_BYTES / 1e9),
        ("image file above 134 MB", formats.MOST_BYTES / 1e6),
        ("text above 1,048,576 characters", layouts.MOST_CHARACTERS),
        ("more than 100 scans", images.MOST_SCANS),
    ],
)
def test_limits_are_as_the_code_has_them(text, number):
    assert text in TEXT
    (said,) = re.findall(r"[\d,.]*\d", text)
    assert float(said.replace(",", "")) == pytest.approx(number, rel=0.03)


def test_every_command_names_tests_that_exist():
    for path in re.findall(r"python -m pytest (\S+?)[ `]", TEXT):
        assert (ROOT / path).is_file(), path
