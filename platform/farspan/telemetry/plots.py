"""Small plots as inline SVG, drawn with the colours and the font of the page they stand in.

matplotlib gets placeholder colours; in the SVG they become CSS variables, so that one drawing is right in light and
dark. Text stays text. No pyplot: every figure is an object of its own.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Placeholders no theme uses; each becomes the CSS variable of its name.
_COLOURS = {"ink": "#010203", "faint": "#020304", "line": "#030405", "warn": "#040506"}
_WIDTH_PT, _HEIGHT_PT = 340.0, 204.0


@dataclass(frozen=True, slots=True)
class Plot:
    """One series against one axis. `kind` is "line" for a course over steps, "bars" for one value per request."""

    id: str
    title: str
    description: str
    x_label: str
    x: Sequence[float]
    y: Sequence[float]
    num_x: int
    """Places on a bar axis, also those without a bar."""
    kind: str = "line"
    from_zero: bool = False


def draw(plot: Plot) -> str:
    """An `<svg>` element with accessible title and description. Values that are not finite are marked, not dropped."""
    # Text as text and repeatable ids; nothing else of matplotlib's settings is touched, and they are put back.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.id, "font.family": "sans-serif"}):
        figure = Figure(figsize=(_WIDTH_PT / 72, _HEIGHT_PT / 72), layout="constrained")
        axes = figure.add_subplot()
        _series(axes, plot)
        _mark_not_finite(axes, plot)
        _dress(axes, plot)
        target = io.StringIO()
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None, "Creator": None})
    return _inline(target.getvalue(), plot)


def _series(axes: Any, plot: Plot) -> None:
    finite = [(x, y) for x, y in zip(plot.x, plot.y, strict=True) if math.isfinite(y)]
    if plot.kind == "bars":
        axes.bar([x for x, _ in finite], [y for _, y in finite], width=0.55, color=_COLOURS["line"])
        axes.set_xlim(0.2, max(plot.num_x, 4) + 0.8)
        return
    gaps = [y if math.isfinite(y) else math.nan for y in plot.y]
    # A short course shows its points: a single step, or one between two gaps, would draw no line at all.
    marker = "o" if len(finite) <= 30 else ""
    axes.plot(plot.x, gaps, color=_COLOURS["line"], linewidth=2, marker=marker, markersize=3.2)


def _mark_not_finite(axes: Any, plot: Plot) -> None:
    for x, y in zip(plot.x, plot.y, strict=True):
        if not math.isfinite(y):
            axes.axvline(x, color=_COLOURS["warn"], linewidth=1.2, linestyle=(0, (3, 2)))
            name = "NaN" if math.isnan(y) else ("+inf" if y > 0 else "-inf")
            axes.annotate(
                name, (x, 0.98), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points",
                va="top", fontsize=11, color=_COLOURS["warn"],
            )  # fmt: skip


def _dress(axes: Any, plot: Plot) -> None:
    axes.set_xlabel(plot.x_label, fontsize=11, color=_COLOURS["ink"])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    finite = [y for y in plot.y if math.isfinite(y)]
    if plot.from_zero:
        axes.set_ylim(0, max(finite, default=1.0) * 1.12 or 1.0)
    axes.tick_params(colors=_COLOURS["ink"], labelsize=11, length=0, pad=5)
    axes.grid(axis="y", color=_COLOURS["faint"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_COLOURS["faint"])


def _inline(document: str, plot: Plot) -> str:
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    for name, colour in _COLOURS.items():
        body = body.replace(colour, f"var(--plot-{name})")
    body = re.sub(r"font(?:-family)?: ([\d.]+px) [^;\"]+", r"font-size: \1", body)
    # Many plots stand in one page: ids, and what points at them, carry the plot's name.
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{plot.id}-", body)
    opening = (
        f'<svg class="plot" role="img" aria-labelledby="{plot.id}-title {plot.id}-desc" '
        f'viewBox="0 0 {_WIDTH_PT:g} {_HEIGHT_PT:g}">'
        f'<title id="{plot.id}-title">{escape(plot.title)}</title>'
        f'<desc id="{plot.id}-desc">{escape(plot.description)}</desc>'
    )
    return opening + body[body.index(">") + 1 :]
