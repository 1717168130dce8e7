"""Thresholds and curves of a classifier that may abstain, against the definition written out with loops."""

from __future__ import annotations

import numpy as np
import pytest
from tritune.trainer.metrics.risk_coverage import answered_figures, curve, least_threshold


def by_hand(confidence, right, threshold) -> tuple[int, float | None]:
    """How many rows are answered at a threshold, and how often they are right."""
    answered = [ok for c, ok in zip(confidence, right, strict=True) if c >= threshold]
    return len(answered), sum(answered) / len(answered) if answered else None


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities with many ties, few, or none; right more often where they are larger, or whenever."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    confidence = rng.random(n)
    if seed % 3:
        confidence = np.round(confidence, seed % 3)
    return confidence, rng.random(n) < (confidence if seed % 2 else rng.random())


@pytest.mark.parametrize("seed", range(60))
def test_the_least_threshold_that_reaches_the_target(seed):
    confidence, right = draw(seed)
    for target in (0.05, 0.5, 0.75, 0.9, 0.99):
        found = least_threshold(confidence, right, target)
        reach = [t for t in confidence if by_hand(confidence, right, t)[1] >= target]
        if not reach:
            assert found is None
            continue
        count, accuracy = by_hand(confidence, right, found)
        assert count == by_hand(confidence, right, min(reach))[0]
        assert accuracy >= target
        figures = answered_figures(confidence, right, found)
        assert figures == {"coverage": count / len(confidence), "answered_accuracy": pytest.approx(accuracy)}
        refused = confidence[confidence < found]
        kept = confidence[confidence >= found]
        if not len(refused):
            assert found == 0.0
        else:  # as far from the rows that are answered as from the next one that is not
            assert kept.min() - found == pytest.approx(found - refused.max())


def test_edges():
    one = np.array([0.6])
    assert least_threshold(one, np.array([True]), 0.99) == 0.0
    assert least_threshold(one, np.array([False]), 0.01) is None
    many = np.array([0.9, 0.5, 0.5, 0.4])
    assert least_threshold(many, np.ones(4, bool), 0.999) == 0.0
    assert least_threshold(many, np.zeros(4, bool), 0.001) is None
    assert least_threshold(many, np.array([True, False, True, False]), 0.6) == pytest.approx(0.45), "ties stay together"
    assert least_threshold(many, np.array([False, True, True, False]), 0.6) == pytest.approx(0.45), (
        "the surest may be wrong"
    )
    assert answered_figures(many, np.ones(4, bool), 0.95) == {"coverage": 0.0, "answered_accuracy": None}
    quarter = np.linspace(0.9, 0.5, 25)
    assert least_threshold(quarter, np.arange(25) < 7, 0.28) == 0.0, "7 of 25 are 0.28, though 0.28 x 25 is above 7"
    above = np.nextafter(0.5, 1)  # between these two there is no number
    assert least_threshold(np.array([0.5, above]), np.array([False, True]), 0.9) == above


@pytest.mark.parametrize("seed", [*range(20), 2000])
def test_the_curve_has_every_hundredth(seed):
    confidence, right = draw(seed)
    if seed == 2000:
        confidence = np.random.default_rng(1).random(2000)
        right = np.random.default_rng(2).random(2000) < confidence
    points = curve(confidence, right)
    assert len(points) <= 100
    assert points[-1][:2] == (1.0, pytest.approx(right.mean()))
    assert [p[0] for p in points] == sorted({p[0] for p in points})
    for coverage, accuracy, threshold in points:
        count, expected = by_hand(confidence, right, threshold)
        assert (coverage, accuracy) == (count / len(confidence), pytest.approx(expected))
    counts = sorted({by_hand(confidence, right, t)[0] for t in confidence})
    for hundredth in range(1, 101):
        least = next(c for c in counts if 100 * c >= hundredth * len(confidence))
        assert least / len(confidence) in [p[0] for p in points]
