"""torchrun on one machine, with its failures in a file instead of in a traceback.

    python -m tritune.launch.agent [torchrun options] -m tritune.trainer [overrides]

It is `torch.distributed.run` itself, but for the ends: what failed goes to `agent.json` in `TRITUNE_NODE_DIR`, as
`[{"rank": 1, "pid": 123, "code": -9, "time": ...}]`, and torchrun's own log to `torchrun.log` beside it, so that the
terminal belongs to rank 0 and the failing rank's message stands last.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

from tritune.trainer.run.interrupted import to_the_end
from tritune.trainer.run.pulse import NODE_DIR, end_with_parent

CPP_LOG = "TORCH_CPP_LOG_LEVEL"


def main(argv: list[str]) -> int:
    """Run the ranks of this machine to their end; 0 when each ended with 0, else 1."""
    end_with_parent()
    for number in (
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):  # they are meant for the ranks, and end a process that has no handler
        signal.signal(number, lambda *_: None)
    kept = os.environ.get(CPP_LOG)
    os.environ[CPP_LOG] = "ERROR"  # read with the library: else a page of C++ frames when another machine ends first
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    del os.environ[CPP_LOG]  # the ranks inherit what the user set
    if kept is not None:
        os.environ[CPP_LOG] = kept
    folder = Path(os.environ[NODE_DIR])
    _log_to(folder / "torchrun.log")
    config, command, arguments = config_from_args(parse_args(argv))
    try:
        elastic_launch(config=config, entrypoint=command)(*arguments)
    except ChildFailedError as error:
        failures = [
            {"rank": rank, "pid": f.pid, "code": f.exitcode, "time": f.timestamp} for rank, f in error.failures.items()
        ]
        (folder / "agent.json").write_text(json.dumps(failures))
        return 1
    except SignalException as caught:
        logging.getLogger("torch.distributed.elastic").warning("ended by %s", caught.sigval)
        return 1
    return 0


def _log_to(path: Path) -> None:
    for name in ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher"):
        logger = logging.getLogger(name)
        logger.handlers = [logging.FileHandler(path)]
        logger.propagate = False


if __name__ == "__main__":
    sys.exit(to_the_end(lambda: main(sys.argv[1:])))
