"""`tritune train` on this machine: one process trains here; for several, or to be restarted, torchrun is started and watched."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tritune.launch.restarts import record, say_end
from tritune.launch.supervise import Attempt, Requests, supervise
from tritune.trainer.config.launch import LaunchConfig
from tritune.trainer.config.overrides import override
from tritune.trainer.errors import EXIT_INPUT, INPUT_ERRORS, InputError
from tritune.trainer.run.directory import run_path
from tritune.trainer.shown import shown


def train(argv: list[str]) -> int:
    """Train on this machine; return the run's exit status."""
    from tritune.trainer.__main__ import checked_config, main
    from tritune.trainer.config.compose import load_config, split_argv

    if "RANK" in os.environ:  # torchrun or Slurm started this process as a worker already
        return main(argv)
    config_dir, overrides = split_argv(argv)
    try:
        config = load_config(overrides, config_dir)
        if config.launch.nodes > 1:
            rule = "this command starts the processes of one machine"
            remedy = "Use `tritune submit launch=slurm`, or torchrun on each"
            raise InputError(f"launch.nodes={config.launch.nodes}", rule, remedy)
        processes = config.launch.num_procs or gpus(config.backend.device.value) or 1
        checked_config(overrides, config_dir, processes)
    except INPUT_ERRORS as error:
        print(f"tritune: {shown(str(error))}", file=sys.stderr)
        return EXIT_INPUT
    run = run_path(config.run.dir, overrides)
    if processes == 1 and config.launch.max_restarts == 0:
        return main(argv)
    # Every rank must name the same directory, also where its name is made from the time.
    return _watched([*argv, override("run.dir", str(run))], run, config.launch, processes)


def _watched(argv: list[str], run: Path, launch: LaunchConfig, processes: int) -> int:
    requests = Requests().install()
    while True:
        name = time.strftime("%Y%m%d-%H%M%S")
        outcome = supervise(Attempt(name, argv, run, launch, processes), requests)
        wait = record(run, name, outcome, launch)
        if requests.caught:  # nobody but a scheduler starts again what was asked to stop
            wait = None
        say_end(outcome, wait, run)
        if wait is None:
            return outcome.code
        requests.sleep(wait)
        if requests.caught:
            return outcome.code


def gpus(device: str) -> int:
    """How many GPUs of this machine a run with `backend.device=device` has."""
    if device == "cpu" or not any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0
    import torch  # seconds, which a machine without a GPU need not spend

    return torch.cuda.device_count()
