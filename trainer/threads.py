"""How threads of the CPU wait for their next piece of work."""

from __future__ import annotations

import os


def wait_asleep() -> None:
    """Let OpenMP's threads sleep between two pieces of work; to be called before torch is imported, which reads it then.

    They spin as GNU's library comes: beside other work, a run of a small model took 62 s of CPU and 71 to 106 s instead of 14 and
    16 to 24. What the user set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
