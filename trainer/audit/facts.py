"""Figures of each split: rows, tokens, lengths, what is trained, labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from tritune.trainer.data.examples import Examples, as_numpy

QUANTILES = {"shortest": 0.0, "median": 0.5, "p95": 0.95, "longest": 1.0}


def facts_of(examples: Examples, labels: list[str], top: int) -> dict[str, Any]:
    """Figures of a split, for JSON.

    `lengths` is of rows before the cut, in tokens. `histogram` has [from, to, rows] for lengths from <= n < to, in eight
    equal steps up to `top`, the same for all splits, and what is over it.
    """
    report = examples.report
    full = as_numpy(examples.table["full_length"])
    facts: dict[str, Any] = {
        "rows": len(examples), "tokens": report.tokens, "supervised_tokens": report.supervised_tokens,
        "stop_rows": report.stop_rows, "truncated_rows": report.truncated_rows,
        "truncated_tokens": report.truncated_tokens, "unsupervised_rows": report.dropped, "bad_rows": report.bad,
        "lengths": {}, "histogram": [],
    }  # fmt: skip
    if len(full):
        values = np.quantile(full, list(QUANTILES.values()), method="inverted_cdf")
        facts["lengths"] = {name: int(value) for name, value in zip(QUANTILES, values, strict=True)}
        facts["lengths"]["mean"] = float(full.mean())
        facts["histogram"] = _histogram(full, top)
    if labels:
        counts = np.bincount(examples.labels[examples.labels >= 0], minlength=len(labels))
        facts["labels"] = {label: int(count) for label, count in zip(labels, counts, strict=True)}
    return facts


def _histogram(full: np.ndarray, top: int) -> list[list[int]]:
    step = max(-(-top // 8), 1)
    edges = np.minimum(np.arange(9) * step + 1, top + 1)
    edges = np.unique(edges)
    counts = np.histogram(full[full <= top], bins=edges - 0.5)[0]
    rows = [[int(a), int(b), int(n)] for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
    over = full[full > top]
    return [*rows, [top + 1, int(over.max()) + 1, len(over)]] if len(over) else rows
