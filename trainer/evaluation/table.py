"""Base against tuned, as a table for the terminal."""

from __future__ import annotations

import io
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from tritune.trainer.shown import escaped


def base_against_tuned(results: dict[str, dict[str, dict[str, float] | None]], num_rows: dict[str, int]) -> str:
    """Render split -> {base, tuned} -> figure -> value."""
    table = Table(box=box.SIMPLE_HEAD, title="base against tuned", title_justify="left", pad_edge=False)
    for name, justify in (
        ("split", "left"),
        ("figure", "left"),
        ("base", "right"),
        ("tuned", "right"),
        ("change", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for split, pair in results.items():
        base, tuned = pair.get("base") or {}, pair.get("tuned") or {}
        for index, figure in enumerate(tuned):
            before, after = base.get(figure), tuned[figure]
            change = "" if before is None else f"{after - before:+.4f}"
            label = f"{split} ({num_rows[split]:,} rows)" if index == 0 else ""
            table.add_row(label, figure, _number(before), _number(after), change)
    return _rendered(table)


def figures_table(results: dict[str, dict[str, float]], num_rows: dict[str, int]) -> str:
    """Render split -> figure -> value."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("split", "figure", "value"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for split, figures in results.items():
        for index, (figure, value) in enumerate(figures.items()):
            table.add_row(f"{split} ({num_rows[split]:,} rows)" if index == 0 else "", figure, _number(value))
    return _rendered(table)


def _rendered(table: Table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100, force_terminal=False).print(table)
    return escaped(stream.getvalue().rstrip())


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:,.4f}" if abs(value) < 1e5 else f"{value:.3e}"
