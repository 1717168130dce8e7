"""`tritune doctor [overrides]`: would a run work here? Each check passes, warns or fails, and says what to do.

    tritune doctor                                                    this machine
    tritune doctor launch.num_procs=4                                 four processes of it, and what is between them
    tritune doctor launch=slurm launch.nodes=2 launch.num_procs=8     through srun, on the machines a job would get
    torchrun ... -m tritune.launch.doctor                             under your own launcher

Exit status: 0 when nothing failed, 1 when something did, 2 for wrong input.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tritune.launch.doctor_checks import FAIL, PASS, WARN, Check, local_checks, run_folder
from tritune.launch.torchrun import gpus
from tritune.trainer.config import BackendConfig
from tritune.trainer.config.compose import compose_partly, split_argv
from tritune.trainer.config.launch import SlurmConfig
from tritune.trainer.errors import EXIT_DONE, EXIT_FAILED, EXIT_INPUT
from tritune.trainer.shown import shown

RENDEZVOUS_SECONDS = 60
STEP = "TRITUNE_DOCTOR_STEP"  # set where srun started this process, which must not start srun again
MARKS = {PASS: "pass", WARN: "WARN", FAIL: "FAIL"}


def doctor(argv: list[str]) -> int:
    """Check, print a table, and return the exit status."""
    config_dir, overrides = split_argv(argv)
    config, faults = compose_partly(overrides, config_dir)
    if config is None or faults:
        for fault in faults:
            print(f"tritune: {shown(fault)}", file=sys.stderr)
        return EXIT_INPUT
    if "RANK" in os.environ or STEP in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return examine(config.backend, config.run.dir)
    if isinstance(config.launch, SlurmConfig):
        command = srun_command(config.launch, config.backend.device.value, argv)
        return subprocess.run(command).returncode
    processes = config.launch.num_procs or gpus(config.backend.device.value) or 1
    if processes > 1:
        return _under_torchrun(argv, processes)
    return examine(config.backend, config.run.dir)


def srun_command(launch: SlurmConfig, device: str, argv: list[str]) -> list[str]:
    """One task a process, on machines such as a job of this configuration would get."""
    from tritune.launch.slurm import container, interpreter, resources

    processes = launch.num_procs or 1
    words = [
        w for w in resources(launch, device, processes) if not w.startswith(("--ntasks-per-node", "--cpus-per-task"))
    ]
    words += [f"--ntasks-per-node={processes}", *container(launch)]
    exports = ",".join(["ALL", f"{STEP}=1", *[f"{k}={shlex.quote(v)}" for k, v in launch.env.items()]])
    return ["srun", "--label", f"--export={exports}", *words, interpreter(launch), "-m", "tritune.launch.doctor", *argv]


def _under_torchrun(argv: list[str], processes: int) -> int:
    """Failures are told by rank 0, in a file: torchrun's own status is 1 whatever its ranks' were."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "exit"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                   "-m", "tritune.launch.doctor", *argv]  # fmt: skip
        threads = str(max((os.cpu_count() or 1) // processes, 1))
        environment = {"OMP_NUM_THREADS": threads, **os.environ, "TRITUNE_EXIT_FILE": str(note), "PYTHONSAFEPATH": "1"}
        done = subprocess.run(command, env=environment)
        return int(note.read_text()) if note.is_file() else done.returncode


def examine(backend: BackendConfig, run_dir: str | None) -> int:
    """One rank of a check, alone or among several; rank 0 prints what all found."""
    _take_slurm_s_ranks()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    host = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    device, folder = backend.device.value, run_folder(run_dir)
    first_here = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if size == 1:
        found = local_checks(device, folder, host)
    else:
        from tritune.launch.doctor_network import meet, mutual_checks

        world, trouble = meet(device, min(RENDEZVOUS_SECONDS, int(backend.timeout_seconds)))
        # After it: they take a minute where caches are cold.
        found = local_checks(device, folder, host) if first_here else []
        if world is None:
            print(_table([*found, trouble]), flush=True)
            return _leave(EXIT_FAILED, rank)
        found = mutual_checks(world, folder, host, found)
    code = EXIT_FAILED if any(c.state == FAIL for c in found) else EXIT_DONE
    if rank == 0:
        print(_table(found), flush=True)
        path = Path(run_dir) / "doctor.json" if run_dir else None
        if path is not None and path.parent.is_dir() and os.access(path.parent, os.W_OK):
            path.write_text(json.dumps([asdict(c) for c in found], indent=1) + "\n")
    return _leave(code, rank)


def _take_slurm_s_ranks() -> None:
    """srun starts a task for each process: its numbers become those that torch reads."""
    slurm = os.environ
    if "RANK" in slurm or int(slurm.get("SLURM_STEP_NUM_TASKS", "1")) <= 1:
        return
    slurm.setdefault("MASTER_ADDR", first_host(slurm["SLURM_STEP_NODELIST"]))
    slurm.setdefault("MASTER_PORT", str(20000 + int(slurm["SLURM_JOB_ID"]) % 10000))
    slurm |= {"RANK": slurm["SLURM_PROCID"], "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"]}
    slurm |= {"LOCAL_RANK": slurm["SLURM_LOCALID"], "LOCAL_WORLD_SIZE": str(
        int(slurm["SLURM_STEP_NUM_TASKS"]) // int(slurm["SLURM_STEP_NUM_NODES"]))}  # fmt: skip


def first_host(names: str) -> str:
    """The first of Slurm's list of names: `n[03-05,9],m1` -> `n03`. In a container there is no scontrol."""
    prefix, bracket, rest = names.partition("[")
    if not bracket or "," in prefix:
        return prefix.partition(",")[0]
    number = re.match(r"\d+", rest)
    return prefix + (number[0] if number else "")


def _leave(code: int, rank: int) -> int:
    note = os.environ.get("TRITUNE_EXIT_FILE")
    if note is not None and rank == 0:
        Path(note).write_text(str(code))
        return 0
    return code


def _table(found: list[Check]) -> str:
    width = max(len(c.name) for c in found)
    lines = [f"{MARKS[c.state]}  {c.name:<{width}}  {shown(c.text)}" for c in found]
    lines += [f"      {c.name:<{width}}  -> {c.remedy}" for c in found if c.state != PASS]
    counts = ", ".join(f"{sum(c.state == s for c in found)} {word}" for s, word in ((PASS, "passed"), (WARN, "warned"),
                                                                                   (FAIL, "failed")))  # fmt: skip
    return "\n".join([*lines, counts])


if __name__ == "__main__":
    code = doctor(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # gloo's threads may outlive the interpreter's teardown
