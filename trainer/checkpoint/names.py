"""What a run's checkpoints are called; light, since the launcher reads it too."""

from __future__ import annotations

import re
from pathlib import Path


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def saved_steps(root: Path) -> list[Path]:
    """Committed checkpoints, oldest first; not those moved aside or half written."""
    found = root.glob("step-*") if root.is_dir() else []
    return sorted(p for p in found if re.fullmatch(r"step-[0-9]{8}", p.name) and p.is_dir())


def newest_step(root: Path) -> int:
    """The step of the newest committed checkpoint; 0 without one."""
    return max((int(p.name.rpartition("-")[2]) for p in saved_steps(root)), default=0)
