"""Charts: what they draw, that they bear what data can lack, and how they stand in a page."""

import re
from xml.etree import ElementTree

import matplotlib as mpl
import pandas as pd
import pytest

from stages.reporting import figures
from stages.tuning import history
from tests.experiment import curve_tables

NAN = float("nan")
HISTOGRAM = pd.DataFrame({"margin": [-0.3, -0.1, 0.1, 0.3], "pairs": [1, 2, 5, 9]})


def axes_of(figure):
    assert figure is not None
    (axes,) = figure.axes
    return axes


def drawn(figure, name="chart", label="Chart"):
    return ElementTree.fromstring(figures.inline_svg(figure, name, label))


def test_curves_have_a_panel_for_each_measure_with_training_and_validation():
    found = figures.curves(*curve_tables())
    assert list(found) == list(figures.PANELS)
    lines = {
        name: [line.get_label() for line in axes_of(each).lines] for name, each in found.items()
    }
    assert lines["loss"] == ["training", "validation"]
    sides = ("chosen", "rejected")
    assert lines["logps"] == [f"{a}, {b}" for a in sides for b in ("training", "validation")]
    columns = {column for _, columns in figures.PANELS.values() for column in columns}
    assert columns <= set(history.CURVES.values())  # which training writes


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.curves(None, None),
        lambda: figures.curves(pd.DataFrame({"step": [5]}), pd.DataFrame()),
        lambda: figures.curves(pd.DataFrame({"step": [5, 9], "loss": NAN}), None),
        lambda: figures.curves(pd.DataFrame({"loss": [1.0]}), None),  # no steps
        lambda: figures.margins(None),
        lambda: figures.margins(pd.DataFrame({"margin": [], "pairs": []})),
    ],
)
def test_nothing_to_draw_makes_no_figure(draw):
    assert not draw()


def test_margins_below_and_above_zero_have_different_colours_and_zero_is_in_sight():
    axes = axes_of(figures.margins(HISTOGRAM))
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert list(axes.lines[0].get_xdata()) == [0, 0]
    for middles in ([0.5], [-0.5], [0.1, 0.2]):
        table = pd.DataFrame({"margin": middles, "pairs": 3})
        low, high = axes_of(figures.margins(table)).get_xlim()
        assert low < 0 < high


# output


def test_an_inline_svg_has_the_page_s_colours_and_no_size_and_says_what_it_is():
    root = drawn(figures.margins(HISTOGRAM), label='a "b" <c')
    svg = ElementTree.tostring(root, encoding="unicode")
    assert "width" not in root.attrib
    assert not re.search(r"#[0-9a-f]{6}|://|<style", svg)
    assert {"--tuned", "--base"} <= set(re.findall(r"var\(([a-z-]+)\)", svg))
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == root.findtext("title") == 'a "b" <c'


def test_charts_are_the_same_whatever_the_user_s_settings_are(tmp_path):
    settings = {"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}
    made = []
    for name, own in (("one", {}), ("other", settings)):
        with mpl.rc_context(own):
            figure = figures.margins(HISTOGRAM)
            figures.save(figure, tmp_path / name / "chart.png")
            content = (tmp_path / name / "chart.png").read_bytes()
            made.append((figures.inline_svg(figure, "m", "M"), content))
            assert mpl.rcParams["font.size"] == own.get("font.size", 10)
    assert made[0] == made[1]
    assert b"Software" not in made[0][1]
