"""The report's charts, as matplotlib figures; as SVG inside a page, or as files.

Each chart is drawn at the size it has on a phone, so that its text can be read there. It is of a
table as a stage wrote it: a column that is absent or holds no number is left out, and without
anything to draw there is no figure. No chart depends on the machine or matplotlib's settings.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By role. In a page each becomes the CSS variable of its name, which has a second value for dark
# mode. Blue and orange stay apart for every kind of colour vision (Okabe & Ito 2008).
COLOURS = {
    "ink": "#1b2026",
    "muted": "#59636e",
    "rule": "#d3d8de",
    "tuned": "#0a5fa8",
    "base": "#b4540a",
    "faint": "#8fb3d3",
    "pale": "#e3b58f",
}
WIDTH = 360  # of every chart, in CSS pixels
PANELS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "loss": ("Loss", ("loss",)),
    "reward_margin": ("Reward margin", ("reward_margin",)),
    "reward_accuracy": ("Reward accuracy", ("reward_accuracy",)),
    "logps": ("Summed log-prob (nats)", ("chosen_logps", "rejected_logps")),
}
_PIXEL = 1 / 72  # inches; matplotlib's SVG has 72 units to the inch

_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "stages.reporting.figures",  # else the ids are random
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so the layout is everywhere alike
    "font.size": 11,
    "text.parse_math": False,  # a dollar sign in the data is a dollar sign
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["rule"],
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["rule"],
    "ytick.color": COLOURS["rule"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


# charts


def curves(train: pd.DataFrame | None, validation: pd.DataFrame | None) -> "dict[str, Figure]":
    """One figure for each of ``PANELS`` that has a number, training and validation in one.

    The tables have a column ``step`` and any of the columns that ``PANELS`` names.
    """
    return {
        name: figure
        for name, (title, columns) in PANELS.items()
        if (figure := _panel(title, columns, {"training": train, "validation": validation}))
    }


def margins(table: pd.DataFrame | None) -> "Figure | None":
    """Histogram of reward margins: ``margin`` (the middle of a bin) and ``pairs``; 0 is marked."""
    data = _numbers(table, "margin", "pairs")
    if data.empty:
        return None
    middles, counts = data["margin"].to_numpy(), data["pairs"].to_numpy()
    width = float(np.diff(np.sort(middles)).min()) if len(data) > 1 else 0.1
    with _style():
        figure, axes = _axes(height=220)
        colours = [COLOURS["tuned" if middle > 0 else "base"] for middle in middles]
        axes.bar(middles, counts, width=0.92 * width, color=colours, linewidth=0)
        axes.axvline(0, color=COLOURS["ink"], linewidth=1)
        low, high = min(0.0, middles.min()) - width, max(0.0, middles.max()) + width
        axes.set_xlim(low, high)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("reward margin")
        axes.set_ylabel("pairs")
        axes.yaxis.get_major_locator().set_params(integer=True)
        top = axes.get_xaxis_transform()
        for said, place, gap, colour in (
            ("← lost", "right", -5, "base"),
            ("won →", "left", 5, "tuned"),
        ):
            axes.annotate(
                said,
                xy=(0, 1.02),
                xycoords=top,
                xytext=(gap, 0),
                textcoords="offset points",
                ha=place,
                color=COLOURS[colour],
                annotation_clip=False,
            )
    return figure


# output


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, on white, the same bytes each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _style():
        figure.savefig(path, dpi=200, metadata={"Software": None}, facecolor="white")


def inline_svg(figure: "Figure", name: str, label: str) -> str:
    """A figure as an ``<svg>`` for a page, without a fixed size.

    Colours become the variables of ``COLOURS`` (``var(--tuned)``). Every id begins with ``name``,
    so that several fit in one page, and ``label`` is what a screen reader says. The page sets the
    font, the colour of texts without one, and ``stroke-linejoin``: matplotlib's own rule would
    apply to the entire page.
    """
    import io

    from markupsafe import escape

    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _style():
        figure.savefig(stream, format="svg", metadata=nothing)
    _, _, drawing = stream.getvalue().partition("<svg")
    head, _, body = drawing.partition(">")
    box = head.partition('viewBox="')[2].partition('"')[0]
    body = re.sub(r"(?s)<style\b.*?</style>\s*|<!--.*?-->\s*", "", body)
    body = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", body).replace("xlink:", "")
    for role, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{role})")
    label = str(escape(label))
    return (
        f'<svg class="chart" viewBox="{box}" role="img" aria-label="{label}">'
        f"<title>{label}</title>{body}"
    )


# pieces


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's defaults and ours, whatever the user's own settings are."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page's font has it
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _axes(height: int) -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * _PIXEL, height * _PIXEL), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=4 * _PIXEL, h_pad=4 * _PIXEL)
    return figure, figure.add_subplot()


def _panel(
    title: str, columns: Sequence[str], tables: Mapping[str, pd.DataFrame | None]
) -> "Figure | None":
    """Training is a thin line, validation a strong one with its points marked."""
    with _style():
        figure, axes = _axes(height=200)
        for column, strong, weak in zip(
            columns, ("tuned", "base"), ("faint", "pale"), strict=False
        ):
            side = f"{column.removesuffix('_logps')}, " if len(columns) > 1 else ""
            for split, table in tables.items():
                data = _numbers(table, "step", column)
                if data.empty:
                    continue
                marked = split == "validation" or len(data) == 1
                axes.plot(
                    data["step"],
                    data[column],
                    color=COLOURS[weak if split == "training" else strong],
                    linewidth=1.4 if split == "training" else 1.8,
                    marker="o" if marked else None,
                    markersize=4.5,
                    label=f"{side}{split}",
                )
        if not axes.lines:
            return None
        axes.set_xlabel("step")
        rows = math.ceil(len(axes.lines) / 2)  # of the legend
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=8 + 15 * rows)
        _legend(axes)
    return figure


def _legend(axes: "Axes") -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=2 if len(axes.lines) != 3 else 3,
        borderaxespad=0.1,
        borderpad=0.1,
        handlelength=1.5,
        columnspacing=1.2,
        labelspacing=0.25,
    )


def _numbers(table: pd.DataFrame | None, *columns: str) -> pd.DataFrame:
    """The rows with finite numbers in all of these columns."""
    if table is None or not set(columns) <= set(table.columns):
        return pd.DataFrame(columns=list(columns))
    finite = np.isfinite(table[list(columns)].apply(pd.to_numeric, errors="coerce")).all(axis=1)
    return table[finite]
