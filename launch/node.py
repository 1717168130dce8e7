"""What a Slurm job starts once on each of its machines.

    srun ... python -m tritune.launch.node --rendezvous HOST:PORT [overrides]

Exit status, of the first machine alone (the others end with 0): the run's own, or 77 where the batch script is to requeue the
job: after a stop that a signal asked for, or a crash that may be tried again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress

from tritune.launch.restarts import record, say_end
from tritune.launch.supervise import Attempt, Requests, supervise
from tritune.trainer.config.compose import load_config, split_argv
from tritune.trainer.errors import EXIT_DONE, EXIT_INPUT, EXIT_STOPPED, INPUT_ERRORS
from tritune.trainer.run.directory import run_path
from tritune.trainer.shown import shown

EXIT_AGAIN = 77
BACKOFF = "again-after"  # in the run directory, for the batch script: seconds


def main(argv: list[str], job: Mapping[str, str] = os.environ) -> int:
    """Watch this machine's ranks to their end.

    Args:
        job: Slurm's variables.
    """
    requests = Requests().install()
    if argv[:1] != ["--rendezvous"] or len(argv) < 2:
        print("tritune: --rendezvous=HOST:PORT: it comes first; `tritune submit` writes this command", file=sys.stderr)
        return EXIT_INPUT
    rendezvous, argv = argv[1], argv[2:]
    node, nodes = int(job.get("SLURM_NODEID", "0")), int(job.get("SLURM_NNODES", "1"))
    config_dir, overrides = split_argv(argv)
    try:
        config = load_config(overrides, config_dir)
    except INPUT_ERRORS as error:
        if node == 0:
            print(f"tritune: {shown(str(error))}", file=sys.stderr)
        return EXIT_INPUT if node == 0 else EXIT_DONE
    run = run_path(config.run.dir, overrides)
    # The step is part of it: what an earlier one in the same allocation left is not this one's.
    name = ".".join(job.get(f"SLURM_{key}", "0") for key in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    outcome = supervise(
        Attempt(name, argv, run, config.launch, config.launch.num_procs or 1, nodes, node, rendezvous), requests
    )
    if node != 0:
        return EXIT_DONE  # srun ends with the highest status of all: it is to be the first machine's
    wait = record(run, name, outcome, config.launch)
    say_end(outcome, wait, run)
    if outcome.code == EXIT_STOPPED and outcome.asked:
        return EXIT_AGAIN
    if wait is None:
        return outcome.code
    with suppress(OSError):  # said by `record` already; the job is then requeued at once
        (run / BACKOFF).write_text(f"{wait:g}\n")
    return EXIT_AGAIN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
