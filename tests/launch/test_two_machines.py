"""Two torchruns without a scheduler, and two bare ranks, killed in every phase: all end, it is said, the next start goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import harness
import pytest
from tritune.trainer.parallel.peers import FOLLOW_SECONDS

STEPS = 60
MOST_SECONDS = 30.0  # from a kill to the end of the last process
NODES = (0, 1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("two-machines")
    harness.write_prompts(root / "rows.jsonl", 30, seed=4)
    harness.write_prompts(root / "many.jsonl", 20_000, seed=5)
    return ["model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48", "data.max_length=96",
            f"data.train={root / 'rows.jsonl'}", "train.batch_size=8", "backend.device=cpu", "checkpoint.every=5",
            "evaluation.base=false", "evaluation.samples=0", "export.enabled=false", "report.enabled=false",
            f"train.max_steps={STEPS}", "cache.num_procs=1"]  # fmt: skip


def curve(run: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r["batch"]) for r in harness.rows(run)]


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def children(pid: int) -> list[int]:
    try:
        return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


@dataclass
class Machines:
    """Two torchruns on the loopback. In the folder of each its rank leaves where it is, as under our own launcher."""

    torchruns: list[subprocess.Popen[bytes]]
    folders: list[Path]
    logs: list[Path]

    def phase(self, node: int) -> str:
        """Of the node's rank; empty before it has begun."""
        path = self.folders[node] / f"rank-{node}.pulse"
        try:
            return json.loads(path.read_text())["phase"]
        except (OSError, ValueError):
            return ""

    def rank(self, node: int) -> int:
        return (children(self.torchruns[node].pid) or [0])[0]

    def everyone(self) -> list[int]:
        """The torchruns and all that they started."""
        found = [t.pid for t in self.torchruns]
        for pid in found:
            found += children(pid)
        return found

    def output(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)


def start(arguments: list[str], place: Path) -> Machines:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    machines = Machines([], [], [])
    for node in NODES:
        folder = place / f"{time.monotonic_ns()}-{node}"
        folder.mkdir(parents=True)
        words = ["--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", "--master-addr=127.0.0.1",
                 f"--master-port={port}", "-m", "tritune.trainer", *arguments]  # fmt: skip
        log, command = folder / "log", [sys.executable, "-m", "torch.distributed.run", *words]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITUNE_NODE_DIR": str(folder)}
        with log.open("wb") as file:
            machines.torchruns.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
        machines.folders.append(folder)
        machines.logs.append(log)
    return machines


def wait_for(what: Callable[[], object], seconds: float, said: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, said()
        time.sleep(0.002)


def begun(machines: Machines) -> bool:
    """Both ranks exist, and import."""
    return all(machines.rank(node) for node in NODES)


def both(phase: str) -> Callable[[Machines], bool]:
    return lambda machines: all(machines.phase(node) == phase for node in NODES)


# Who is killed, on which machine, and when. One run, so that each start goes on from what the kill before it left.
KILLS = [
    ("rank", 0, "the interpreter starts", begun),
    ("torchrun", 0, "waiting for the group", both("process group")),
    ("rank", 1, "reading rows", both("data")),
    ("torchrun", 1, "reading rows", both("data")),
    ("rank", 1, "dry run", lambda machines: machines.phase(1) == "dry run"),
    ("torchrun", 0, "training", both("train")),
    ("rank", 0, "training", both("train")),
    ("rank", 1, "saving", lambda machines: machines.phase(1) == "save"),
]


def kill(machines: Machines, who: str, node: int, ready: Callable[[Machines], bool]) -> tuple[int, float]:
    """Kill a rank or a torchrun once the machines are `ready`; return the rank's process and the seconds until all are gone."""
    try:
        wait_for(lambda: ready(machines), 120, machines.output)
        everyone, rank = machines.everyone(), machines.rank(node)
        began = time.monotonic()
        os.kill(rank if who == "rank" else machines.torchruns[node].pid, signal.SIGKILL)
        for torchrun in machines.torchruns:
            torchrun.wait(2 * MOST_SECONDS)
        wait_for(lambda: not any(alive(pid) for pid in everyone), MOST_SECONDS, machines.output)
        return rank, time.monotonic() - began
    finally:
        for pid in machines.everyone():
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_two_machines_end_together_whoever_is_killed_and_go_on(settings, tmp_path):
    harness.run([*settings, f"run.dir={tmp_path / 'whole'}"], tmp_path / "logs", world_size=2)
    run, few = tmp_path / "run", next(s for s in settings if s.startswith("data.train="))
    for who, node, when, ready in KILLS:
        case, reading = (who, node, when), when == "reading rows"
        into = tmp_path / "cold-run" if reading else run
        cold = [few.replace("rows.jsonl", "many.jsonl"), f"cache.dir={tmp_path / 'cold'}"] if reading else []
        machines = start([*settings, *cold, f"run.dir={into}"], tmp_path / "nodes")
        rank, seconds = kill(machines, who, node, ready)
        assert seconds < MOST_SECONDS, case
        assert all(torchrun.returncode != 0 for torchrun in machines.torchruns), case
        named, said = f"rank {node} on {socket.gethostname()} (pid {rank}) died", machines.output()
        assert named in said or (when == "the interpreter starts" and f"rank {node} did not come" in said), (case, said)
        if when in ("training", "saving"):
            found = status(into)
            assert (found["state"], found["exit_code"], found["culprit"]) == ("failed", 1, named), case
        elif (into / "status.json").is_file():
            assert status(into)["state"] == "failed", case
    last = start([*settings, f"run.dir={run}"], tmp_path / "nodes")
    assert [torchrun.wait(240) for torchrun in last.torchruns] == [0, 0], last.output()
    assert (status(run)["state"], status(run)["step"]) == ("done", STEPS)
    assert curve(run) == curve(tmp_path / "whole")


@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("process group", marks=pytest.mark.slow),
        "data",
        pytest.param("dry run", marks=pytest.mark.slow),
        pytest.param("train", marks=pytest.mark.slow),
        pytest.param("save", marks=pytest.mark.slow),
    ],
)
def test_two_bare_ranks_end_together_whoever_is_killed_and_go_on(settings, tmp_path, dead, phase):
    run, folder = tmp_path / "run", tmp_path / "node"
    folder.mkdir()
    short = [*settings, "train.max_steps=12", f"run.dir={run}"]
    job = harness.start(short, tmp_path / "logs", world_size=2, env={"TRITUNE_NODE_DIR": str(folder)})

    def there() -> bool:
        try:
            return json.loads((folder / f"rank-{dead}.pulse").read_text())["phase"] == phase
        except (OSError, ValueError):
            return False

    wait_for(there, 60, job.output)
    began = time.monotonic()
    job.signal(signal.SIGKILL, [dead])
    if (dead, phase) == (1, "data"):  # as one torchrun does with all its ranks: that is no user's stop
        time.sleep(0.5)
        job.signal(signal.SIGTERM, [0])
    codes = job.wait(MOST_SECONDS)
    assert time.monotonic() - began < FOLLOW_SECONDS + 5
    assert codes[dead] == -signal.SIGKILL
    assert codes[1 - dead] == 1, job.output()
    if phase != "process group":
        said = status(run)
        named = f"rank {dead} on {socket.gethostname()} (pid {job.processes[dead].pid}) died"
        assert (said["state"], said["exit_code"], said["culprit"]) == ("failed", 1, named)
    harness.run(short, tmp_path / "logs", world_size=2)
    assert (status(run)["state"], status(run)["step"]) == ("done", 12)
