"""How often a classifier is right among the rows that it is surest of: accuracy over coverage, and where to stop answering.

A row is answered where its largest probability, its confidence, is at least a threshold, and abstained on otherwise
(El-Yaniv and Wiener 2010, JMLR 11, "On the Foundations of Noise-free Selective Classification").
"""

from __future__ import annotations

import numpy as np

POINTS = 100  # of a curve: one at each hundredth of coverage


def least_threshold(confidence: np.ndarray, right: np.ndarray, target: float) -> float | None:
    """The smallest threshold at which the rows answered are right at least as often as `target`; None where there is none.

    Of all thresholds that answer the same rows the one halfway to the next row below: another order of the same additions
    changes a probability in its last digits and must not change who is answered. 0 where all rows may be answered.

    Args:
        confidence: float64 [N], largest probabilities. right: bool [N].
    """
    edges, answered, hits = _cumulated(confidence, right)
    good = np.flatnonzero(hits / answered >= target)
    if not len(good):
        return None
    last = int(good[-1])
    if last + 1 == len(edges):
        return 0.0
    middle = float(edges[last] + edges[last + 1]) / 2
    return middle if middle > edges[last + 1] else float(edges[last])


def answered_figures(confidence: np.ndarray, right: np.ndarray, threshold: float) -> dict[str, float | None]:
    """`coverage`, the share of rows that are answered, and `answered_accuracy` among them; None where none is."""
    answered = confidence >= threshold
    accuracy = float(right[answered].mean()) if answered.any() else None
    return {"coverage": float(answered.mean()), "answered_accuracy": accuracy}


def curve(confidence: np.ndarray, right: np.ndarray) -> list[tuple[float, float, float]]:
    """Return (coverage, accuracy, confidence of the last row answered), coverage rising, its last point at 1.

    At each hundredth of coverage the point that answers the fewest rows of those that answer so many; rows of equal
    confidence are answered together.
    """
    edges, answered, hits = _cumulated(confidence, right)
    wanted = np.ceil(np.arange(1, POINTS + 1) * len(confidence) / POINTS - 1e-9)
    chosen = np.unique(np.searchsorted(answered, wanted))
    return [(float(answered[i] / len(confidence)), float(hits[i] / answered[i]), float(edges[i])) for i in chosen]


def _cumulated(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct confidences, falling, and how many rows have at least each of them, and how many of these are right."""
    values = np.unique(-confidence)
    order = np.argsort(-confidence, kind="stable")
    answered = np.searchsorted(-confidence[order], values, side="right")
    hits = np.cumsum(right[order].astype(np.int64))[answered - 1]
    return -values, answered, hits
