"""`tritune evaluate | generate launch.num_procs=N`: the ranks of a verb that reads a model, on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tritune.trainer.config.overrides import value_of
from tritune.trainer.errors import EXIT_DONE, EXIT_FAILED, EXIT_INPUT
from tritune.trainer.run.pulse import NODE_DIR
from tritune.trainer.shown import shown

KEY = "launch.num_procs"
SHARED = ("evaluate", "generate")  # verbs whose work ranks can share
LINES = 20  # of a failed rank's output that are shown


def processes_of(words: list[str]) -> int:
    """How many processes the command line asks for; one where this is a rank already."""
    given = [value_of(word) for word in words if word.startswith(f"{KEY}=")]
    count = given[-1] if given and "RANK" not in os.environ else None
    return int(count) if count and count.isdigit() else 1


def read_together(verb: str, words: list[str], processes: int) -> int:
    """Run the verb on several ranks and return its exit status; rank 0 speaks.

    Where another rank alone failed, the end of what it said is shown.
    """
    if verb not in SHARED:
        print(f"tritune: {KEY}={processes}: {verb} runs in one process. Leave it out", file=sys.stderr)
        return EXIT_INPUT
    with tempfile.TemporaryDirectory(prefix="tritune-") as name:
        folder = Path(name)
        others = ",".join(f"{rank}:3" for rank in range(1, processes))
        command = [
            sys.executable, "-m", "tritune.launch.agent", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
            f"--nproc-per-node={processes}", "--max-restarts=0", f"--log-dir={folder}", f"--redirects={others}",
            "-m", "tritune.launch.cli", verb, *words,
        ]  # fmt: skip
        threads = max((os.cpu_count() or 1) // processes, 1)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, NODE_DIR: name, "PYTHONSAFEPATH": "1"}
        code = subprocess.run(command, env=environment).returncode
        if code == 0:
            return EXIT_DONE
        report = folder / "agent.json"
        failures = {f["rank"]: f["code"] for f in json.loads(report.read_text())} if report.is_file() else {}
        own = {
            rank: code for rank, code in failures.items() if code != -signal.SIGTERM
        }  # torchrun ends the others by that
        if own and 0 not in own:
            _show(folder, *min(own.items()))
        return EXIT_INPUT if EXIT_INPUT in own.values() else EXIT_FAILED


def _show(folder: Path, rank: int, code: int) -> None:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    said = next(iter(sorted(folder.rglob(f"{rank}/stderr.log"))), None)
    tail = said.read_text(errors="replace").splitlines()[-LINES:] if said is not None else []
    print(shown("\n".join([*tail, f"tritune: rank {rank} {how}"])), file=sys.stderr)
