"""The part of a large matrix that is tested today: all of it in turn, a part each day, the same on every machine.

A matrix is shuffled and dealt into parts; the day chooses the part, so that in as many days as there are parts each cell is
tested once. `TRITUNE_TEST_SEED=739582 make test-slow` repeats a day, `TRITUNE_TEST_SEED=all` tests everything.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TypeVar

VARIABLE = "TRITUNE_TEST_SEED"
T = TypeVar("T")


def seed() -> str:
    """The number of the day, or what the environment says instead; kept there, so that midnight divides no run."""
    return os.environ.setdefault(VARIABLE, str(datetime.now(UTC).toordinal()))


def some(cells: Sequence[T], parts: int, salt: str = "") -> list[T]:
    """Today's cells of a matrix, in their order: at least one, and about one in `parts`.

    Args:
        salt: matrices of one length and another salt are not dealt alike.
    """
    if seed() == "all":
        return list(cells)
    parts = min(parts, len(cells))
    turn, part = divmod(int(seed()), parts)
    order = list(range(len(cells)))
    random.Random(f"{turn} {salt}").shuffle(order)
    return [cells[i] for i in sorted(order[part::parts])]
