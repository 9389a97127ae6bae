"""Charts: what they draw, that they bear what data can lack, and how they stand in a page."""

import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from stages.reporting import figures

NAN = float("nan")


def curve(**columns):
    return pd.DataFrame({"step": [5, 10, 15], **columns})


def slices_of(*names, by="kind", rate=0.9):
    return pd.DataFrame(
        [
            {
                "by": by,
                "slice": name,
                "win_rate": rate,
                "win_rate_low": rate - 0.05,
                "win_rate_high": rate + 0.05,
            }
            for name in names
        ]
    )


def histogram():
    return pd.DataFrame({"margin": [-0.3, -0.1, 0.1, 0.3], "pairs": [1, 2, 5, 9]})


def tokens():
    return pd.DataFrame({"percentile": [0, 50, 100], "prompt": [9, 9, 12], "chosen": [3, 4, 5]})


def texts_in(svg):
    return [text.text for text in ElementTree.fromstring(svg).iter("text")]


def only_axes(figure):
    assert figure is not None
    (axes,) = figure.axes
    return axes


def labels_of(axes):
    return [line.get_label() for line in axes.lines]


# curves


def test_training_and_validation_are_in_one_panel():
    found = figures.curves(curve(loss=[3.0, 2.0, 1.0]), curve(loss=[3.5, 2.5, 1.5]))
    (axes,) = found["loss"].axes
    assert list(found) == ["loss"]
    assert labels_of(axes) == ["training", "validation"]
    assert list(axes.lines[1].get_ydata()) == [3.5, 2.5, 1.5]


def test_chosen_and_rejected_log_probs_share_a_panel():
    both = curve(chosen_logps=[-1, -1, -1], rejected_logps=[-2, -3, -4])
    (axes,) = figures.curves(both, None)["logps"].axes
    assert labels_of(axes) == ["chosen, training", "rejected, training"]


def test_every_panel_is_drawn_from_columns_that_training_writes():
    from stages.tuning import history

    columns = {column for _, columns in figures.PANELS.values() for column in columns}
    assert columns <= set(history.CURVES.values())


def test_a_gap_is_left_out_a_single_point_is_marked_and_nothing_draws_nothing():
    found = figures.curves(curve(loss=[1.0, NAN, float("inf")]), None)
    assert list(found["loss"].axes[0].lines[0].get_xdata()) == [5]
    assert found["loss"].axes[0].lines[0].get_marker() == "o"
    assert figures.curves(None, None) == {}
    assert figures.curves(curve(), pd.DataFrame()) == {}
    assert figures.curves(curve(loss=[NAN, NAN, NAN]), None) == {}
    assert figures.curves(pd.DataFrame({"loss": [1.0]}), None) == {}  # no steps


# margins


def test_margins_below_and_above_zero_have_different_colours_and_zero_a_line():
    figure = figures.margins(histogram())
    axes = only_axes(figure)
    assert len({bar.get_facecolor() for bar in axes.patches[:2]}) == 1
    assert axes.patches[1].get_facecolor() != axes.patches[2].get_facecolor()
    assert list(axes.lines[0].get_xdata()) == [0, 0]


@pytest.mark.parametrize("middles", [[0.5], [-0.5], [0.1, 0.2]])
def test_zero_is_always_in_sight(middles):
    figure = figures.margins(pd.DataFrame({"margin": middles, "pairs": 3}))
    low, high = only_axes(figure).get_xlim()
    assert low < 0 < high
    assert figures.margins(None) is None
    assert figures.margins(pd.DataFrame({"margin": [], "pairs": []})) is None


# slices


def test_a_slice_is_a_dot_with_its_interval_under_what_it_is_by():
    table = pd.concat([slices_of("a", by="origin"), slices_of("b", "c", by="question type")])
    table.iloc[1, 2:] = NAN  # b has no figures
    axes = only_axes(figures.slices(table, overall=0.9))
    whiskers = [line for line in axes.lines if len(set(line.get_xdata())) == 2]
    assert [tuple(np.round(w.get_xdata(), 3)) for w in whiskers] == [(0.85, 0.95)] * 2
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "c"]
    assert [text.get_text() for text in axes.texts] == ["origin", "question type"]
    assert only_axes(figures.slices(slices_of("a", rate=0.2))).get_xlim()[0] < 0.15
    assert figures.slices(table.iloc[1:2]) is None
    assert figures.slices(None) is None


def test_a_long_name_is_cut_and_a_strange_one_is_shown_as_it_is():
    figure = figures.slices(slices_of("x" * 80, "$x^2$ <script> & \"'", "日本語 🦊"))
    texts = texts_in(figures.inline_svg(figure, "s", "Slices"))
    assert "x" * 25 + "…" in texts
    assert "$x^2$ <script> & \"'" in texts
    assert "日本語 🦊" in texts


# lengths


def test_lengths_are_drawn_for_the_columns_that_are_there():
    axes = only_axes(figures.lengths(tokens()))
    assert labels_of(axes) == ["prompt", "chosen"]
    assert figures.lengths(pd.DataFrame({"percentile": [0, 1]})) is None
    assert figures.lengths(None) is None


# output


def test_an_inline_svg_has_the_page_s_colours_and_no_size_and_says_what_it_is():
    svg = figures.inline_svg(figures.margins(histogram()), "margins", 'a "b" <c')
    root = ElementTree.fromstring(svg)
    assert "width" not in root.attrib
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert "var(--tuned)" in svg
    assert "var(--base)" in svg
    assert "://" not in svg
    assert not list(root.iter("style"))
    assert "reward margin" in texts_in(svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == root.findtext("title") == 'a "b" <c'


def test_ids_of_two_charts_do_not_clash_and_every_reference_is_kept():
    figure = figures.margins(histogram())
    one, other = (figures.inline_svg(figure, name, "M") for name in ("one", "other"))
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, known in zip((one, other), ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg)) <= {
            pair for name in known for pair in ((name, ""), ("", name))
        }


def test_charts_are_the_same_whatever_the_user_s_settings_are():
    import matplotlib

    def drawn():
        return figures.inline_svg(figures.lengths(tokens()), "l", "L")

    first = drawn()
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}):
        assert drawn() == first
        assert matplotlib.rcParams["font.size"] == 30


def test_a_saved_figure_is_the_same_each_time_and_holds_no_program(tmp_path):
    paths = [tmp_path / "new" / f"{i}.png" for i in range(2)]
    for path in paths:
        figures.save(figures.margins(histogram()), path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert b"Software" not in first
