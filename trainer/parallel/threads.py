"""How threads of the CPU wait for their next piece of work."""

from __future__ import annotations

import os

SPINS = "1000"  # a few microseconds


def wait_asleep() -> None:
    """Let OpenMP's threads sleep soon between two pieces of work; to be called before torch is imported, which reads it then.

    They spin for milliseconds as GNU's library comes, which costs a busy machine most of its time (benchmarks/LOG.md).
    Sleeping at once costs an idle one a quarter of a small model's pace; so few spins cost it nothing. What the user set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = SPINS
