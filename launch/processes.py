"""Ranks of a run on this machine as forks of one server that has imported what they need: a start takes milliseconds.

Real processes: they are killed, stopped and waited for like those of torchrun, and read the same environment variables.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tritune.trainer.parallel.threads import wait_asleep

# Only where no GPU is used: a process that has asked for one must not fork.
PRELOAD = [
    "tritune.trainer.__main__",
    "tritune.trainer.build",
    "tritune.trainer.finish",
    "tritune.trainer.backends.zero",
    "torch._inductor.compile_fx",  # DeepSpeed imports it with its first engine, in two seconds
    "transformers.models.llama.modeling_llama",
    "tritune.launch.warm",
]
CONTEXT = multiprocessing.get_context("forkserver")
PORTS = range(10_000, 20_000)  # below those of connections and of Slurm jobs (`slurm.sh.j2`)


@dataclass
class Job:
    """The processes of one run; rank r writes to `logs[r]`."""

    processes: list[BaseProcess]
    logs: list[Path]

    def wait(self, timeout: float = 240.0) -> list[int]:
        """Return the exit status of every rank; a rank killed by signal n has status -n.

        Raises:
            TimeoutError: not all have ended after `timeout` seconds; they are killed.
        """
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        if self.alive():
            self.signal(signal.SIGKILL)
            raise TimeoutError(f"not done after {timeout} s:\n{self.output()}")
        return [p.exitcode for p in self.processes]  # type: ignore[misc]

    def alive(self) -> bool:
        return any(p.is_alive() for p in self.processes)

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)  # type: ignore[arg-type]

    def output(self) -> str:
        """What the ranks printed."""
        texts = [log.read_text() if log.is_file() else "" for log in self.logs]
        return "\n".join(f"[rank {r}]\n{text}" for r, text in enumerate(texts))


def preload(on_cpu: bool) -> None:
    """Let the server import the trainer before the first start; to be called before it, or not at all."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; ranks share the machine
    wait_asleep()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed chooses when it is imported
        CONTEXT.set_forkserver_preload(PRELOAD)


def start(cells: list[list[str]], logs: Path, processes: int, env: dict[str, str] | None = None) -> Job:
    """Start ranks that train each of `cells`, lists of overrides, one after the other; the first that fails ends them.

    Args:
        env: variables for the ranks, beside torchrun's.
    """
    logs.mkdir(parents=True, exist_ok=True)
    ports = [_free_port() for _ in cells]
    ranks: list[BaseProcess] = []
    paths = []
    for rank in range(processes):
        variables = dict(env or {})
        if processes > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            variables |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        paths.append(logs / f"{time.monotonic_ns()}-rank{rank}.txt")
        process = CONTEXT.Process(target=_rank, args=(cells, ports, variables, str(paths[-1])))
        process.start()
        ranks.append(process)
    return Job(ranks, paths)


def _free_port() -> int:
    """A port that nobody listens on.

    It is used some time later, so it lies below those that the system gives to connections: one of these, taken by another run's
    connection meanwhile, once ended a proof of thirteen runs.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port from {PORTS.start} to {PORTS.stop} is free")


def _rank(cells: list[list[str]], ports: list[int], variables: dict[str, str], log: str) -> None:
    os.environ.update(variables)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from tritune.trainer.__main__ import main

    code = 0
    for overrides, port in zip(cells, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        code = main(overrides)
        if code != 0:
            break
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
