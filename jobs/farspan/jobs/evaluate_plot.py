"""An evaluation as one picture: loss by position for each context length, and recall by depth and length."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from farspan.jobs.evaluate import Evaluation

_PANEL_WIDTH, _PANEL_HEIGHT, _DPI = 4.6, 3.8, 130


def draw_evaluation(evaluation: Evaluation) -> bytes:
    """The picture as PNG."""
    tasks = list(dict.fromkeys(row.task for row in evaluation.recall))
    panels = bool(evaluation.loss) + len(tasks)
    figure = Figure(figsize=(_PANEL_WIDTH * panels, _PANEL_HEIGHT), dpi=_DPI, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if evaluation.loss:
        _draw_loss(axes.pop(0), evaluation)
    image = None
    for axis, task in zip(axes, tasks, strict=True):
        image = _draw_recall(axis, evaluation, task)
    if image is not None:
        figure.colorbar(image, ax=axes, label="answered right", shrink=0.9)
    target = io.BytesIO()
    FigureCanvasAgg(figure).print_png(target)
    return target.getvalue()


def _draw_loss(axis: Any, evaluation: Evaluation) -> None:
    for entry in evaluation.loss:
        middles = [(low + 1 + high + 1) / 2 for low, high, _, _ in entry.by_position]
        losses = [loss for _, _, loss, _ in entry.by_position]
        axis.plot(middles, losses, marker="o", markersize=3, label=f"{entry.length:,} tokens: {entry.loss:.3f}")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda position, _: f"{position:,.0f}"))
    axis.set(xlabel="position in the document", ylabel="loss, nats per token", title="Loss by position and context")
    axis.grid(alpha=0.3)
    axis.legend(title="context: mean loss", fontsize=8)


def _draw_recall(axis: Any, evaluation: Evaluation, task: str) -> Any:
    rows = [row for row in evaluation.recall if row.task == task]
    lengths = sorted({row.length for row in rows})
    depths = sorted({row.depth for row in rows})
    share = {(row.depth, row.length): row.correct / row.samples for row in rows}
    image = axis.imshow(
        [[share[depth, length] for length in lengths] for depth in depths], vmin=0, vmax=1, cmap="Blues", aspect="auto"
    )
    for y, depth in enumerate(depths):
        for x, length in enumerate(lengths):
            right = share[depth, length]
            # Dark cells need light letters.
            colour = "white" if right > 0.6 else "black"
            axis.text(x, y, f"{right:.0%}", ha="center", va="center", fontsize=9, color=colour)
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set(xlabel="tokens of context", ylabel="depth of the fact", title=task.capitalize())
    return image
