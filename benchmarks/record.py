"""What the benchmarks of ranks share: processes that hand back a figure each, the peak of their memory, the record."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tritune.launch.processes import CONTEXT, Job

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


class Peak:
    """The most of this process's memory, in bytes over where it stood at `start`, sampled by a thread.

    `anon` is RssAnon of /proc/self/status, what the process has written and must keep; `file` is RssFile, pages of
    mapped files (libraries, safetensors), which the kernel may drop and read again. `cuda` is PyTorch's own count.
    """

    def __init__(self, milliseconds: float) -> None:
        self._wait = milliseconds / 1000
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._base = self._most = (0, 0)
        self._cuda: int | None = None
        self._trim: Any = None

    def start(self) -> None:
        self._base = self._most = resident()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._sample, name="peak", daemon=True)
        self._thread.start()

    def trim(self) -> None:
        """Forget the peak so far, and let every sample from now on first give back what is free.

        glibc keeps freed memory: of an FSDP rank on CPU up to three times its state. Steps are slower then.
        """
        self._trim = ctypes.CDLL(None).malloc_trim
        self._trim(0)
        self._most = resident()

    def now(self) -> dict[str, int]:
        """The rise at this moment, not the peak."""
        if self._trim is not None:
            self._trim(0)
        return self._figures(resident())

    def stop(self) -> dict[str, int]:
        """End sampling, at the first call; return the peak."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
            self._see()
            self._cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        figures = self._figures(self._most)
        return figures if self._cuda is None else figures | {"cuda": self._cuda}

    def _figures(self, at: tuple[int, int]) -> dict[str, int]:
        return {"anon": at[0] - self._base[0], "file": at[1] - self._base[1]}

    def _sample(self) -> None:
        while not self._ended.wait(self._wait):
            self._see()

    def _see(self) -> None:
        if self._trim is not None:
            self._trim(0)
        anon, file = resident()
        self._most = max(self._most[0], anon), max(self._most[1], file)


def resident() -> tuple[int, int]:
    """RssAnon and RssFile of this process, in bytes."""
    with open("/proc/self/status") as file:
        found = dict(line.split(":", 1) for line in file if line.startswith(("RssAnon", "RssFile")))
    return int(found["RssAnon"].split()[0]) * 1024, int(found["RssFile"].split()[0]) * 1024


def run_ranks(
    function: Callable[..., dict[str, Any]], arguments: tuple, ranks: int, folder: Path, timeout: float = 300.0
) -> list[dict[str, Any]]:
    """Call `function(*arguments)` in `ranks` fresh processes of one group; return what each gave, in their order.

    Raises:
        RuntimeError: one failed; it holds what they printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    logs = [folder / f"rank{r}.txt" for r in range(ranks)]
    job = Job([], logs)
    for rank, log in enumerate(logs):
        variables = {}
        if ranks > 1:
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            variables |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        job.processes.append(CONTEXT.Process(target=_rank, args=(function, arguments, variables, log)))
        job.processes[-1].start()
    codes = job.wait(timeout)
    if any(codes):
        raise RuntimeError(f"{function.__name__}{arguments}: exit {codes}\n{job.output()}")
    return [json.loads(log.with_suffix(".json").read_text()) for log in logs]


def _rank(function: Callable[..., dict[str, Any]], arguments: tuple, variables: dict[str, str], log: Path) -> None:
    os.environ.update(variables)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # a fork does not read it again
    log.with_suffix(".json").write_text(json.dumps(function(*arguments)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may wait for the interpreter's lock while it ends


def write_record(name: str, fields: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `NAME.json` into `folder`: where, when and with what it was measured, then `fields`."""
    record = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {p: _version(p) for p in ("torch", "deepspeed", "transformers")},
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record | fields, indent=1) + "\n")
    return path


def _version(package: str) -> str:
    """GPU images often lack DeepSpeed, which half of the benchmarks do without."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, Any]:
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]  # noqa: SIM115
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "memory_gib": round(memory, 1),
            "threads_per_rank": int(os.environ["OMP_NUM_THREADS"]), "gpus": gpus}  # fmt: skip


def commit() -> str:
    """The commit, with `+` where files of the packages differ from it."""
    root = RESULTS.parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None:
        return "unknown: no git here"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "trainer", "kernels", "launch", "conf")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
