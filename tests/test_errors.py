"""Texts that others wrote stay inside their line, cell or block."""

import ast
import re

import pytest

from stages.core.errors import listed, readable, shown
from stages.reporting import markup


@pytest.mark.parametrize("given", ["a`b", "``", "`", "a|b", "", "a\nb", "``` x"])
def test_inline_code_is_one_span_of_one_line(given):
    shown = markup.code(given)
    assert "\n" not in shown
    found = re.fullmatch(r"(`+)(?!`)(.*?)(?<!`)\1", shown)
    assert found, shown
    assert found[1] not in re.findall("`+", found[2])


def test_one_line_has_nothing_that_ends_it_and_is_cut():
    assert markup.one_line("a\n\n# b\x1b[31m") == "a # b [31m"
    assert markup.one_line("abcdef", 4) == "abc…"
    assert markup.cell("a|b") == "a\\|b"


@pytest.mark.parametrize("given", ["a", "it's", 'say "x"', "both ' and \"", "\\", "é\n"])
def test_a_literal_is_that_string_in_double_quotes(given):
    shown = markup.literal(given)
    assert ast.literal_eval(shown) == given
    assert shown[0] == shown[-1] == '"'
    assert shown.isascii()


def test_a_size_is_readable():
    sizes = (17, 120_100, 2_906_512, 8_876_543_210)
    assert [readable(size) for size in sizes] == ["17 bytes", "120.1 kB", "2.9 MB", "8.9 GB"]


@pytest.mark.parametrize("value", ["x" * 300_000, b"x" * 300_000, [1] * 300_000, "a\n\tb", 10**200])
def test_a_value_is_shown_on_one_line_of_100_characters(value):
    assert 0 < len(shown(value)) <= 100
    assert "\n" not in shown(value)


def test_what_a_terminal_would_obey_or_cannot_be_sent_is_shown_escaped():
    assert shown("\x1b[31m \udcff \u202e é") == r"\x1b[31m \udcff \u202e é"
    assert shown("  ") == "'  '"


def test_a_list_of_names_says_how_many_more_there_are():
    assert listed(["a", "b"]) == "a, b"
    assert listed(map(str, range(25)), 3) == "0, 1, 2 and 22 more"
