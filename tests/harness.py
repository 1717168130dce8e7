"""Start runs as real processes, cheaply: a fork server imports torch and transformers once, each run is a fork of it.

A run can be killed, stopped and waited for like one that torchrun started; rank and world size come by the same
environment variables.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOAD = [
    "tritune.trainer.__main__",
    "tritune.trainer.build",
    "tritune.trainer.finish",
    "transformers.models.llama.modeling_llama",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)


@dataclass
class Job:
    """The processes of one run; rank r writes to `logs[r]`."""

    processes: list[BaseProcess]
    logs: list[Path]

    def wait(self, timeout: float = 240.0) -> list[int]:
        """Return the exit status of every rank; a rank killed by signal n has status -n."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        if any(p.is_alive() for p in self.processes):
            self.signal(signal.SIGKILL)
            raise TimeoutError(f"not done after {timeout} s:\n{self.output()}")
        return [p.exitcode for p in self.processes]  # type: ignore[misc]

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)  # type: ignore[arg-type]

    def output(self) -> str:
        return "\n".join(f"[rank {r}]\n{log.read_text()}" for r, log in enumerate(self.logs))


def start(overrides: list[str], logs: Path, world_size: int = 1, env: dict[str, str] | None = None) -> Job:
    """Start `python -m tritune.trainer OVERRIDES` on `world_size` processes; their output goes to files in `logs`."""
    return start_many([overrides], logs, world_size, env)


def start_many(cells: list[list[str]], logs: Path, world_size: int = 1, env: dict[str, str] | None = None) -> Job:
    """Start processes once and train each of `cells` in them, one after the other; the first that fails ends them."""
    logs.mkdir(parents=True, exist_ok=True)
    ports = [_free_port() for _ in cells]
    processes, paths = [], []
    for rank in range(world_size):
        variables = dict(env or {})
        if world_size > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            variables |= {"MASTER_ADDR": "127.0.0.1"}
        paths.append(logs / f"{time.monotonic_ns()}-rank{rank}.txt")
        process = CONTEXT.Process(target=_rank, args=(cells, ports, variables, str(paths[-1])))
        process.start()
        processes.append(process)
    return Job(processes, paths)


def run(overrides: list[str], logs: Path, world_size: int = 1, timeout: float = 240.0) -> Job:
    """Start a run, wait for it, and require that every rank ended with 0."""
    return run_many([overrides], logs, world_size, timeout)


def run_many(cells: list[list[str]], logs: Path, world_size: int = 1, timeout: float = 240.0) -> Job:
    """`run` for several, in the same processes."""
    job = start_many(cells, logs, world_size)
    codes = job.wait(timeout)
    assert codes == [0] * world_size, f"exit {codes}\n{job.output()}"
    return job


def rows(directory: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The rows of a log; a line still being written is left out."""
    path = directory / name
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def write_prompts(path: Path, count: int, seed: int) -> None:
    """Prompts and responses of very different lengths: masks are ragged."""
    rng = random.Random(seed)
    words = "the cat sat on a red mat while two dogs ran far away over green hills".split()  # noqa: SIM905
    with path.open("w") as file:
        for i in range(count):
            prompt = f"{i}: " + " ".join(rng.choices(words, k=rng.randint(1, 9)))
            response = " ".join(rng.choices(words, k=rng.randint(1, 12)))
            file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")


def save_small_llama(where: Path, positions: int) -> Path:
    """A tied two-layer Llama with random weights, far from zero, saved with the byte tokenizer; returns `where`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from tritune.trainer.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    settings = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": positions,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1,
                "tie_word_embeddings": True}  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


def wait_for_step(job: Job, directory: Path, step: int, timeout: float = 120.0) -> None:
    """Return as soon as the run has logged `step`, or has ended."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        logged = rows(directory)
        if (logged and logged[-1]["step"] >= step) or not any(p.is_alive() for p in job.processes):
            return
        time.sleep(0.002)
    raise TimeoutError(f"step {step} was not reached in {timeout} s:\n{job.output()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(cells: list[list[str]], ports: list[int], variables: dict[str, str], log: str) -> None:
    os.environ.update(variables)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    import torch

    torch.set_num_threads(1)  # small models: more threads only wait for each other
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
