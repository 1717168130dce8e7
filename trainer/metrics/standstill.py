"""Whether the loss moves at all: a rate that is far too low is seen in the first steps, not after the last."""

from __future__ import annotations

import math
import statistics

SHARE, LEAST = 0.05, 20  # of all steps, and not fewer than that, are looked at
MOVED, ERRORS = 0.01, 2.0  # a share of the loss; standard errors of the difference


class Standstill:
    """Looks at a run's first steps, once.

    Args:
        first: the step at which it starts; one that goes on is not looked at again.
        total: its steps. A run of less than twice `LEAST` is too short to tell.
        warm_up: steps until the rate is at its peak.
    """

    def __init__(self, first: int, total: int, warm_up: int) -> None:
        length = max(math.ceil(SHARE * total), LEAST)
        self._until = min(warm_up, total // 4) + length
        self._losses: list[float] | None = [] if first == 0 and total >= 2 * LEAST else None

    def add(self, loss: float) -> tuple[float, float] | None:
        """The mean losses of the first and the last third of the steps that were looked at, if they hardly differ."""
        if self._losses is None:
            return None
        self._losses.append(loss)
        if len(self._losses) < self._until:
            return None
        losses, self._losses = self._losses, None
        third = len(losses) // 3
        first, last = losses[:third], losses[-third:]
        before, after = statistics.fmean(first), statistics.fmean(last)
        error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
        return (before, after) if abs(before - after) < min(MOVED * abs(before), ERRORS * error) else None
