"""One attempt at a run on this machine: torchrun around the ranks, watched from outside.

    tritune train / tritune.launch.node  ->  torchrun (agent.py)  ->  ranks

This process imports no torch. It passes requests to stop straight to the ranks (torchrun would kill them half a minute after
SIGTERM, and dies of SIGUSR1), sees a rank die or hang, ends the others, and says who was first. On several machines the
launchers tell one another through the run directory, which all of them share anyway; the first one decides.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tritune.launch import watchdog
from tritune.launch.restarts import Outcome
from tritune.launch.watchdog import Culprit, Rank
from tritune.trainer.config.launch import LaunchConfig
from tritune.trainer.errors import EXIT_DONE, EXIT_FAILED
from tritune.trainer.run.directory import write_whole_json
from tritune.trainer.run.pulse import LAUNCHED, NODE_DIR, process_birth

POLL_SECONDS = 0.2
SHARED_SECONDS = 2.0  # between two looks at a file system that all machines use
KILL_SECONDS = 60.0
END_SECONDS = 15.0  # after one rank died the others have so long to say what they met
PEER_SECONDS = 10.0  # a launcher waits so long for the others' first word, which came at about the same time
VERDICT_SECONDS = 40.0
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
EXIT_FILE = "exit"  # in the node's folder: rank 0's exit status


class Requests:
    """Signals that this launcher got, and what of them each rank has been sent."""

    def __init__(self) -> None:
        self.caught: list[int] = []
        self._sent: dict[int, int] = {}

    def install(self) -> Requests:
        for number in REQUESTS:
            signal.signal(number, lambda caught, _: self.caught.append(caught))
        return self

    def deliver(self, ranks: list[Rank]) -> None:
        """Pass on what came; a rank that has only just begun gets what came before it."""
        for rank in ranks:
            for number in self.caught[self._sent.get(rank.pid, 0) :]:
                rank.signal(signal.SIGTERM if number == signal.SIGHUP else number)
            self._sent[rank.pid] = len(self.caught)

    def sleep(self, seconds: float) -> None:
        """Wait, but not past a request."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.caught:
            time.sleep(min(POLL_SECONDS, seconds))

    @property
    def name(self) -> str | None:
        return signal.Signals(self.caught[0]).name if self.caught else None


@dataclass(frozen=True)
class Attempt:
    """What is started here.

    Attributes:
        name: of the attempt, the same on all machines.
        overrides: of the run, as the user gave them, with `run.dir`.
        rendezvous: host:port of the first machine; None with one machine.
    """

    name: str
    overrides: list[str]
    run: Path
    limits: LaunchConfig
    processes: int
    nodes: int = 1
    node: int = 0
    rendezvous: str | None = None
    host: str = field(default_factory=socket.gethostname)

    @property
    def shared(self) -> Path:
        """Where the launchers of several machines leave word for one another."""
        return self.run / "launch" / self.name

    @property
    def logs(self) -> Path:
        return self.run / "logs"


def supervise(attempt: Attempt, requests: Requests) -> Outcome:
    """Start the ranks of this machine and return how the attempt ended, the same on all machines; nothing is left running."""
    with tempfile.TemporaryDirectory(prefix="tritune-") as name:
        folder = Path(name)
        agent = subprocess.Popen(command(attempt), env=_environment(attempt, folder), start_new_session=True)
        try:
            culprits = _watch(agent, attempt, folder, requests)
        finally:
            _end(agent, folder)
        note = folder / EXIT_FILE
        code = int(note.read_text()) if note.is_file() else None
        return _agree(attempt, code, agent.returncode, culprits, requests)


def command(attempt: Attempt) -> list[str]:
    """torchrun for this machine. It restarts nothing itself: after a kill -9 its ranks failed to meet again, 7 times of 7."""
    where = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # any free port
    if attempt.nodes > 1:  # static: rank 0 is on the first machine, and every restart puts each rank where it was
        where = [f"--nnodes={attempt.nodes}", f"--node-rank={attempt.node}", "--rdzv-backend=static",
                 f"--rdzv-endpoint={attempt.rendezvous}"]  # fmt: skip
    return [
        sys.executable, "-m", "tritune.launch.agent", *where, f"--rdzv-id={attempt.name}",
        f"--nproc-per-node={attempt.processes}", "--max-restarts=0",
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT", "-m", "tritune.trainer", *attempt.overrides,
    ]  # fmt: skip


def _environment(attempt: Attempt, folder: Path) -> dict[str, str]:
    attempt.logs.mkdir(parents=True, exist_ok=True)
    threads = max((len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) // attempt.processes, 1)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONSAFEPATH": "1"}
    environment |= {NODE_DIR: str(folder), "TRITUNE_EXIT_FILE": str(folder / EXIT_FILE)}
    environment |= {LAUNCHED: str(process_birth())} if Path("/proc/uptime").is_file() else {}
    environment |= {"TRITUNE_LOG_DIR": str(attempt.logs.resolve())}
    # A save takes as long as it takes; what is killed when is decided here.
    environment |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "86400"}
    return environment


def _watch(agent: subprocess.Popen[bytes], attempt: Attempt, folder: Path, requests: Requests) -> list[Culprit]:
    """Until torchrun has ended, or the attempt has failed for long enough; return who failed on this machine."""
    failed_at: float | None = None
    told = elsewhere = False
    look_again, began = 0.0, time.monotonic()
    patience = watchdog.Patience(attempt.limits.hang_seconds)
    while True:
        ended = agent.poll() is not None
        seen = watchdog.ranks(folder)
        requests.deliver(seen)
        culprits = watchdog.died(folder, seen, attempt.host)
        if len(seen) < attempt.processes and time.monotonic() - began > attempt.limits.quiet_seconds:
            text = f"{attempt.processes - len(seen)} rank(s) on {attempt.host} did not begin; see {attempt.logs}"
            return [Culprit(2, time.time(), None, text)]
        if attempt.limits.watchdog and failed_at is None and not ended and patience.overdue(seen):
            return _hang(attempt, folder, seen)
        if failed_at is None and attempt.nodes > 1 and time.monotonic() > look_again:
            elsewhere = any(r["culprits"] for r in _reports(attempt))
            look_again = time.monotonic() + SHARED_SECONDS
        if (culprits or elsewhere) and failed_at is None:
            failed_at = time.monotonic()
        if ended or requests.caught.count(signal.SIGINT) > 2:
            return _explained(folder, attempt, culprits, agent)
        if culprits and not told and attempt.nodes > 1 and failed_at is not None and time.monotonic() - failed_at > 1.0:
            _tell(attempt, culprits)  # the others may wait in a collective that never ends
            told = True
        if failed_at is not None and time.monotonic() - failed_at > END_SECONDS:
            return _explained(folder, attempt, culprits, agent)
        time.sleep(POLL_SECONDS)


def _hang(attempt: Attempt, folder: Path, seen: list[Rank]) -> list[Culprit]:
    """Let all ranks write their stacks, and find the one that holds the others up."""
    stacks = attempt.logs / time.strftime("hang-%Y%m%d-%H%M%S")
    stopped = {r.rank for r in seen if r.stopped()}
    watchdog.dump_stacks(folder, seen, stacks)
    return watchdog.blame_for_hang(seen, stopped, stacks, attempt.host)


def _explained(
    folder: Path, attempt: Attempt, culprits: list[Culprit], agent: subprocess.Popen[bytes]
) -> list[Culprit]:
    """Add what torchrun knows: by which signal a rank was killed, and ranks that ended before their first sign."""
    by_pid = {r.pid: r for r in watchdog.ranks(folder)}
    report = folder / "agent.json"
    explained = {c.rank: c for c in culprits}
    for failure in json.loads(report.read_text()) if report.is_file() else []:
        rank, code = failure["rank"], failure["code"]
        known = explained.get(rank)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        where = f"rank {rank} on {attempt.host} (pid {failure['pid']})"
        if known is None:
            explained[rank] = Culprit(
                2, failure["time"], rank, f"{where} {how}; see above, or {attempt.logs}/rank-{rank}.log"
            )
        elif known.weight == 1 and failure["pid"] in by_pid:
            last = by_pid[failure["pid"]]
            text = f"{where} {how} in phase {last.phase} after step {last.step}"
            explained[rank] = Culprit(1, failure["time"], rank, text)
    if agent.returncode is not None and agent.returncode < 0:
        text = f"torchrun on {attempt.host} (pid {agent.pid}) was killed by {signal.Signals(-agent.returncode).name}"
        explained[None] = Culprit(0, time.time(), None, text)
    return list(explained.values())


def _end(agent: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill whatever is left. Ranks die with torchrun, and those in a start of their own are known by their signs."""
    if agent.poll() is None:
        agent.kill()
    agent.wait()
    left = watchdog.ranks(folder)
    for rank in left:
        rank.signal(signal.SIGKILL)
    deadline = (
        time.monotonic() + KILL_SECONDS
    )  # one that frees pinned memory, or waits for a file server, takes its time
    while any(rank.alive() for rank in left) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _agree(attempt: Attempt, code: int | None, agent_code: int, culprits: list[Culprit], requests: Requests) -> Outcome:
    """Join what the machines know: the first of them decides, the others take its word."""
    asked = requests.name
    if attempt.nodes == 1:
        return _judge(attempt, code, agent_code, culprits, asked)
    _tell(attempt, culprits, final=True)
    verdict = attempt.shared / "verdict.json"
    if attempt.node == 0:
        reports = _all_reports(attempt) if code is None or culprits else _reports(attempt)
        every = [Culprit(**c) for report in reports for c in report["culprits"]]
        said = {report["node"] for report in reports}
        for node in sorted(set(range(attempt.nodes)) - said) if code is None or culprits else []:
            text = f"machine {node + 1} of {attempt.nodes} left no word: it, or its launcher, may be lost"
            every.append(Culprit(2, time.time(), None, text))
        outcome = _judge(attempt, code, agent_code, every, asked)
        write_whole_json(verdict, {"code": outcome.code, "culprit": outcome.culprit})
        return outcome
    deadline = time.monotonic() + VERDICT_SECONDS
    while not verdict.is_file() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if verdict.is_file():
        said = json.loads(verdict.read_text())
        return Outcome(said["code"], said["culprit"], asked)
    return Outcome(EXIT_FAILED, f"the launcher of the first machine said nothing in {VERDICT_SECONDS:g} s", asked)


def _judge(attempt: Attempt, code: int | None, agent_code: int, culprits: list[Culprit], asked: str | None) -> Outcome:
    if code is not None and code != EXIT_FAILED and not (code == EXIT_DONE and culprits):
        return Outcome(code, None, asked)
    if culprits:
        return Outcome(EXIT_FAILED, min(culprits, key=lambda c: (c.weight, c.time)).text, asked)
    if code is None and agent_code == 0:
        return Outcome(EXIT_FAILED, "rank 0 left no exit status", asked)
    return Outcome(EXIT_FAILED, f"torchrun on {attempt.host} ended with {agent_code}; see {attempt.logs}", asked)


def _tell(attempt: Attempt, culprits: list[Culprit], final: bool = False) -> None:
    """Leave word for the launchers of the other machines; the final one adds what torchrun knew, such as the signal."""
    report: dict[str, Any] = {"node": attempt.node, "host": attempt.host, "final": final}
    report["culprits"] = [asdict(c) for c in culprits]
    write_whole_json(attempt.shared / f"node-{attempt.node}.json", report)


def _all_reports(attempt: Attempt) -> list[dict[str, Any]]:
    """The final word of every launcher; of one that began to speak it comes within `END_SECONDS`, and a lost one says nothing."""
    began = time.monotonic()
    while True:
        reports, waited = _reports(attempt), time.monotonic() - began
        pending = any(not report["final"] for report in reports)
        if waited > (END_SECONDS if pending else PEER_SECONDS):
            return reports
        if len(reports) == attempt.nodes and not pending:
            return reports
        time.sleep(POLL_SECONDS)


def _reports(attempt: Attempt) -> list[dict[str, Any]]:
    """What all machines' launchers have said."""
    found = []
    for path in sorted(attempt.shared.glob("node-*.json")):
        with suppress(FileNotFoundError):
            found.append(json.loads(path.read_text()))
    return found
