"""No rank outlives what started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = (
    "from tritune.trainer.run.pulse import end_with_parent; import time; end_with_parent(); print(1, flush=True); "
    "time.sleep(60)"
)
PARENT = (
    "import subprocess, sys, time; rank = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE); "
    "rank.stdout.readline(); print(rank.pid, flush=True); time.sleep(60)"
)


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "TRITUNE_NODE_DIR"])
def test_a_rank_ends_with_a_launcher_that_is_killed(launcher, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("TORCHELASTIC_RUN_ID", "TRITUNE_NODE_DIR")}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, RANK], env={**env, launcher: str(tmp_path)}, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    rank = int(parent.stdout.readline())
    assert alive(rank)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(rank) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(rank)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
