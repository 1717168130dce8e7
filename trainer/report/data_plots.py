"""An audit's pictures as SVG, for its folder and for the report of a run."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from tritune.trainer.report.plots import HELD_OUT, INK, STYLE, TRAIN
from tritune.trainer.shown import shown

LABELS = 40  # drawn with their names; of more only the curve


def draw(facts: dict[str, dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return file name -> (what it shows, SVG), of the `facts` of an audit (or of its `audit.json`)."""
    pictures = {}
    if any(f["histogram"] for f in facts.values()):
        pictures["lengths.svg"] = ("Tokens of a row, by split", _lengths(facts))
    if facts.get("train", {}).get("labels"):
        pictures["labels.svg"] = ("Rows of each label in train", _labels(facts["train"]["labels"]))
    return pictures


def pictures(facts: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Return (what it shows, `data:` address) of each picture, as `report.plots.curves` does."""
    return [(title, _address(svg)) for title, svg in draw(facts).values()]


def _lengths(facts: dict[str, dict[str, Any]]) -> str:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for name, f in facts.items():
            if not f["histogram"]:
                continue
            edges = [low for low, _, _ in f["histogram"]] + [f["histogram"][-1][1]]
            shares = [count / max(f["rows"], 1) for *_, count in f["histogram"]]
            color = {"train": TRAIN, "validation": HELD_OUT, "test": INK}.get(name, "#718096")
            axes.stairs(shares, edges, label=name, color=color, linewidth=1.6, fill=name == "train", alpha=0.7)
        axes.set_title("Length of a row before the cut")
        axes.set_xlabel("tokens")
        axes.set_ylabel("share of rows")
        axes.legend(loc="upper right")
        return _svg(figure)


def _labels(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(range(len(ordered)), [count for _, count in ordered], color=TRAIN)
        if len(ordered) <= LABELS:
            axes.set_xticks(range(len(ordered)), [shown(label)[:24] for label, _ in ordered], rotation=45, ha="right")
        else:
            axes.set_xlabel(f"{len(ordered):,} labels, the commonest first")
        axes.set_title("Rows of each label")
        return _svg(figure)


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return stream.getvalue()


def _address(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
