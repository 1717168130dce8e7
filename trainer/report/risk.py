"""Accuracy over coverage, for the report of a classifier: what would be right if it answered only where it is sure."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from tritune.trainer.report.plots import HELD_OUT, INK, STYLE, TRAIN, address

COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)  # columns of the table
COLORS = {"validation": HELD_OUT, "test": INK, "train": TRAIN}


def coverage_table(abstain: dict[str, Any] | None) -> dict[str, Any] | None:
    """Head, rows of cells, and a note; None where the run trained no classifier, or scored no split."""
    curves = (abstain or {}).get("curves")
    if abstain is None or not curves:
        return None
    rows = [[name, *(_accuracy_at(curve, share) for share in COVERAGES)] for name, curve in curves.items()]
    return {"head": [f"{share:.0%}" for share in COVERAGES], "rows": rows, "note": _note(abstain)}


def risk_pictures(abstain: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return (what it shows, `data:` address of an SVG), as `report.plots.curves` does."""
    curves = (abstain or {}).get("curves")
    if abstain is None or not curves:
        return []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for name, curve in curves.items():
            color = COLORS.get(name, TRAIN)
            shares, accuracies = [100 * p[0] for p in curve], [100 * p[1] for p in curve]
            axes.plot(shares, accuracies, color=color, linewidth=1.6, marker="o" if len(curve) < 3 else "", label=name)
            chosen = abstain["splits"].get(name, {})
            if chosen.get("answered_accuracy") is not None:
                axes.plot(
                    100 * chosen["coverage"], 100 * chosen["answered_accuracy"], color=color, marker="D", markersize=6
                )
        if abstain["target"] is not None:
            axes.axhline(100 * abstain["target"], color=INK, linewidth=0.8, linestyle=":", label="asked for")
        axes.set_title("Accuracy where answered, %")
        axes.set_xlabel("rows answered, the surest first, %")
        axes.set_xlim(0, 102)
        axes.legend(loc="best")
        return [("Accuracy over coverage", address(figure))]


def _accuracy_at(curve: list[list[float]], share: float) -> str:
    """Of the smallest set of surest rows that is at least so large a share."""
    return f"{next(accuracy for coverage, accuracy, _ in curve if coverage >= share - 1e-9):.1%}"


def _note(abstain: dict[str, Any]) -> str:
    target, below = abstain["target"], abstain["below"]
    if target is None:
        return "The model answers every row: evaluation.abstain=<accuracy> would choose a threshold on validation."
    if below is None:
        return f"No threshold makes {target:.1%} of the answers on validation right: the model answers every row."
    rule = f"{target:.1%} of its answers on validation are right"
    if not below:
        return f"It never abstains: {rule} as it is."
    return (
        f"It abstains below a probability of {below:.4g}, the least threshold at which {rule}. "
        "On validation that holds by its choice; on test it is a measurement."
    )
