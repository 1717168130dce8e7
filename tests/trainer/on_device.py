"""Runs of a test one after the other in this process, on a GPU where there is one: imports and kernels are paid for once.

`python on_device.py CELLS` with JSON, a list of [overrides, the step at which it is told to stop or null]; prints the exit
statuses as JSON. A process of its own, since that of the tests has told DeepSpeed that there are CPUs alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path


def run_on_device(cells: list[tuple[list[str], int | None]], log: Path, timeout: float = 170.0) -> list[int]:
    """The exit status of each cell; what they said is in `log`."""
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch reads it once, and not every run here asks for it
    command = [sys.executable, __file__, json.dumps(cells)]
    with log.open("w") as said:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, log.read_text()[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(cells: list[tuple[list[str], int | None]]) -> list[int]:
    from tritune.trainer.__main__ import main as train
    from tritune.trainer.run.state import TrainState

    advance, stop_at = TrainState.advance, None

    def advance_and_stop(self, steps_per_epoch):
        advance(self, steps_per_epoch)
        if self.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    TrainState.advance = advance_and_stop
    codes = []
    for overrides, stop_at in cells:  # noqa: B007  the closure reads it
        codes.append(train(overrides))
    return codes


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))))
