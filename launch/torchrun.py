"""`tritune train`: one process trains here; for several, torchrun is started around `tritune.trainer`.

torchrun's own exit status is 1 whatever its workers' were, so rank 0 leaves the run's in a file.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

GRACE_SECONDS = 3600  # workers may save for this long after a signal; torchrun's own 30 s kill large saves


def train(argv: list[str]) -> int:
    """Train on this machine; return the run's exit status."""
    from tritune.trainer.__main__ import checked_config, main, run_path
    from tritune.trainer.compose import load_config, split_argv
    from tritune.trainer.errors import EXIT_INPUT, INPUT_ERRORS
    from tritune.trainer.redact import redact

    if "RANK" in os.environ:  # torchrun or Slurm started this process as a worker already
        return main(argv)
    config_dir, overrides = split_argv(argv)
    try:
        config = load_config(overrides, config_dir)
        processes = config.launch.num_procs or gpus(config.backend.device.value) or 1
        checked_config(overrides, config_dir, processes)
    except INPUT_ERRORS as error:
        print(f"tritune: {redact(str(error))}", file=sys.stderr)
        return EXIT_INPUT
    if processes == 1:
        return main(argv)
    # Every rank must name the same directory, also where its name is made from the time.
    return _start([*argv, f"run.dir={json.dumps(str(run_path(config, overrides)))}"], processes)


def command(argv: list[str], processes: int) -> list[str]:
    """The torchrun command for one node.

    No restarts inside torchrun: with --max-restarts it failed to re-join after a kill; the same command, given again,
    goes on from the last checkpoint.
    """
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "--max-restarts=0", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT", "-m", "tritune.trainer", *argv,
    ]  # fmt: skip


def _start(argv: list[str], processes: int) -> int:
    threads = max((os.cpu_count() or 1) // processes, 1)
    with tempfile.TemporaryDirectory(prefix="tritune-") as folder:
        note = Path(folder) / "exit"
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        environment |= {"PYTHONSAFEPATH": "1", "TRITUNE_EXIT_FILE": str(note)}
        environment |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_SECONDS)}
        child = subprocess.Popen(command(argv, processes), env=environment)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda caught, _: child.send_signal(caught))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to torchrun as well, which passes it on
        code = child.wait()
        return int(note.read_text()) if note.is_file() else code or 1


def gpus(device: str) -> int:
    """How many GPUs of this machine a run with `backend.device=device` has."""
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()
