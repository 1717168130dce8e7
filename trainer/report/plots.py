"""The curves of a run as SVG pictures. Drawn through Matplotlib's objects: no global state, no display."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

MAX_POINTS = 1500  # of a curve; longer ones are thinned evenly, which keeps a report of a million steps small
MAX_SOURCES = 10  # lines of one picture
INK, GRID, TRAIN, HELD_OUT = "#33373d", "#e4e6ea", "#2b6cb0", "#c05621"
STYLE: Any = {
    "svg.fonttype": "path", "svg.hashsalt": "tritune", "font.size": 10, "axes.edgecolor": GRID, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 11,
    "axes.titlelocation": "left", "axes.titlecolor": INK,
}  # fmt: skip


def curves(steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return (what it shows, `data:` address of an SVG) for each figure that the logs hold."""
    pictures = []
    if any(s.get("loss") is not None for s in steps):
        pictures.append(("Loss by step, training and held out", _loss(steps, evaluations)))
    by_source = _by_source(steps)
    if len(by_source) > 1:
        pictures.append(("Training loss by step, of each source", _sources(by_source)))
    for figure, title in (("accuracy", "Validation accuracy"), ("bits_per_byte", "Validation bits per byte")):
        points = [(e["step"], e[figure]) for e in evaluations if e.get(figure) is not None]
        if len(points) > 1:
            pictures.append((f"{title} by step", _simple(points, title, HELD_OUT, marker="o")))
    for figure, title in (
        ("lr", "Learning rate"),
        ("grad_norm", "Gradient norm before clipping"),
        ("tokens_per_second", "Tokens per second"),
        ("memory_gib", "Peak memory, GiB"),
    ):
        points = [(s["step"], s[figure]) for s in steps if s.get(figure) is not None]
        if len(points) > 1:
            pictures.append((f"{title} by step", _simple(points, title, TRAIN, floor=figure != "grad_norm")))
    return pictures


def _loss(steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> str:
    with mpl.rc_context(STYLE):
        figure, axes = _axes("Loss", wide=True)
        points = [(s["step"], s["loss"]) for s in steps if s.get("loss") is not None]
        if len(points) > 50:
            axes.plot(*_columns(points), color=TRAIN, alpha=0.25, linewidth=0.8)
            axes.plot(*_columns(_smooth(points)), color=TRAIN, linewidth=1.6, label="training (moving mean)")
        else:
            axes.plot(*_columns(points), color=TRAIN, linewidth=1.6, label="training")
        held_out = [(e["step"], e["loss"]) for e in evaluations if e.get("loss") is not None]
        if held_out:
            axes.plot(*_columns(held_out), color=HELD_OUT, linewidth=1.6, marker="o", markersize=4, label="validation")
        shown = [y for _, y in (*points, *held_out)]
        if min(shown) > 0 and max(shown) > 20 * min(shown):  # or all but the start would lie on the axis
            axes.set_yscale("log")
            axes.set_title("Loss (logarithmic)")
        axes.legend(loc="upper right")
        return address(figure)


def _by_source(steps: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The points of each source, those that occur most often first."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in steps:
        for key, value in row.items():
            if key.startswith("loss/") and value is not None:
                found.setdefault(key.removeprefix("loss/"), []).append((row["step"], value))
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def _sources(points: dict[str, list[tuple[int, float]]]) -> str:
    with mpl.rc_context(STYLE):
        shown = list(points.items())[:MAX_SOURCES]
        of = f", {len(shown)} of {len(points)} sources" if len(points) > len(shown) else ""
        figure, axes = _axes(f"Training loss of each source (moving mean{of})", wide=True)
        for name, values in shown:
            label = " " + name.replace("$", r"\$")  # one that begins with _ would be hidden
            axes.plot(*_columns(_smooth(values)), linewidth=1.4, label=label)
        axes.legend(loc="upper right", ncols=2)
        return address(figure)


def _simple(points: list[tuple[int, float]], title: str, color: str, marker: str = "", floor: bool = True) -> str:
    with mpl.rc_context(STYLE):
        figure, axes = _axes(title, wide=False)
        axes.plot(*_columns(points), color=color, linewidth=1.4, marker=marker, markersize=4)
        if floor:
            axes.set_ylim(0, 1.08 * max(y for _, y in points) or 1)
        return address(figure)


def _axes(title: str, wide: bool) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8.0, 3.2) if wide else (4.6, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.locator_params(nbins=6)
    return figure, axes


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    stride = max(-(-len(points) // MAX_POINTS), 1)
    kept = [*points[::stride], *([points[-1]] if (len(points) - 1) % stride else [])]
    return [x for x, _ in kept], [y for _, y in kept]


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """An exponential moving mean over about a fortieth of the run, corrected for its start (as Adam's moments are)."""
    beta = 1 - min(40 / len(points), 0.5)
    mean, weight, smooth = 0.0, 0.0, []
    for x, y in points:
        mean, weight = beta * mean + (1 - beta) * y, beta * weight + (1 - beta)
        smooth.append((x, mean / weight))
    return smooth


def address(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
