"""`tritune train` over two processes that are killed, stopped and interrupted: who is named, what is left, what goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import harness
import pytest
from tritune.launch import supervise, watchdog
from tritune.launch.restarts import Outcome, record
from tritune.launch.supervise import Attempt, Requests
from tritune.launch.watchdog import Culprit
from tritune.trainer.config.launch import LaunchConfig

STEPS = 400
SETTINGS = ["checkpoint.every=20", "evaluation.base=false", "evaluation.samples=0", "export.enabled=false",
            "report.enabled=false", f"train.max_steps={STEPS}", "launch.num_procs=2"]  # fmt: skip


def launch(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tritune.launch.cli", "train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **variables})  # fmt: skip


def wait_for(what, timeout: float = 120.0):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise TimeoutError


def at_step(run: Path, step: int):
    return lambda: [r for r in harness.rows(run) if r["step"] >= step]


def pid_of(run: Path, rank: int) -> int:
    """Of the newest attempt."""
    if rank == 0:
        return json.loads((run / "lock.json").read_text())["pid"]
    return int(re.findall(r"--- rank \d+ on .*, pid (\d+)", (run / "logs" / f"rank-{rank}.log").read_text())[-1])


def children(pid: int) -> list[int]:
    return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]


def gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(") ")[2].startswith("Z")


def attempts(run: Path) -> list[dict]:
    return harness.rows(run, "attempts.jsonl")


def curve(run: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r["batch"]) for r in harness.rows(run)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("supervised")
    harness.write_prompts(root / "rows.jsonl", 30, seed=4)
    return ["model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48", "data.max_length=96",
            f"data.train={root / 'rows.jsonl'}", "train.batch_size=8", "backend.device=cpu", *SETTINGS]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory) -> list[tuple]:
    root = tmp_path_factory.mktemp("unbroken")
    harness.run([*settings, f"run.dir={root / 'run'}"], root / "logs", world_size=2)
    return curve(root / "run")


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_run_goes_on_by_itself(settings, unbroken, tmp_path):
    run = tmp_path / "run"
    job = launch([*settings, f"run.dir={run}", "launch.max_restarts=1", "launch.backoff_seconds=0.5"])
    wait_for(at_step(run, 50))
    pid = pid_of(run, 1)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    wait_for(lambda: attempts(run), 30)
    assert time.monotonic() - killed < 30
    _, errors = job.communicate(timeout=240)
    assert job.returncode == 0, errors
    assert f"tritune: rank 1 on {os.uname().nodename} (pid {pid}) was killed by SIGKILL in phase train" in errors
    assert "again in 0.5 s" in errors
    assert [(a["code"], a["crashed"]) for a in attempts(run)] == [(1, True), (0, False)]
    assert curve(run) == unbroken


@pytest.mark.slow
def test_a_killed_torchrun_takes_its_ranks_along_and_is_named_last(settings, tmp_path):
    run = tmp_path / "run"
    job = launch([*settings, f"run.dir={run}"])
    wait_for(at_step(run, 30))
    pids = [pid_of(run, 0), pid_of(run, 1)]
    (agent,) = children(job.pid)
    os.kill(agent, signal.SIGKILL)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == 1
    wait_for(lambda: all(gone(pid) for pid in pids), 5)
    last = errors.strip().splitlines()[-2:]
    assert last[0] == f"tritune: torchrun on {os.uname().nodename} (pid {agent}) was killed by SIGKILL"
    assert last[1] == f"tritune: {run} failed; the same command goes on from its newest checkpoint"


@pytest.mark.slow
def test_a_killed_launcher_leaves_nothing_running(settings, tmp_path):
    run = tmp_path / "run"
    job = launch([*settings, f"run.dir={run}"])
    wait_for(at_step(run, 5))
    pids = [pid_of(run, 0), pid_of(run, 1), *children(job.pid)]
    job.kill()
    wait_for(lambda: all(gone(pid) for pid in pids), 10)
    job.communicate()


def test_a_stopped_rank_is_found_with_the_stacks_of_all(settings, tmp_path):
    run, rank = tmp_path / "run", 1
    job = launch([*settings, f"run.dir={run}", "launch.hang_seconds=4"])
    wait_for(at_step(run, 30))
    pid = pid_of(run, rank)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    _, errors = job.communicate(timeout=30)
    assert time.monotonic() - began < 15  # the limit, three seconds for the stacks, and the end
    assert job.returncode == 1
    assert f"tritune: rank {rank} on {os.uname().nodename} (pid {pid}) was stopped (SIGSTOP or a debugger)" in errors
    assert gone(pid)
    (folder,) = (run / "logs").glob("hang-*")
    for found in (0, 1):
        stacks = (folder / f"rank-{found}.stacks").read_text()
        assert "most recent call first" in stacks
        assert "in fit" in stacks


@pytest.mark.parametrize(("stacks", "frame"), [
    ('Thread 0x1 (most recent call first):\n  File "a.py", line 3 in wait\n\n'
     'Current thread 0x2 (most recent call first):\n  File "b c.py", line 7 in fit\n  File "d.py", line 1 in main\n',
     "b c.py:7 in fit"),
    ('Current thread 0x2 (most recent call first):\n  Fi\n\n'
     'Thread 0x1 (most recent call first):\n  File "a.py", line 3 in wait\n', "a.py:3 in wait"),
    ('Current thread 0x2 (most recent call first):  File "b.py", li', ""),
    ("", ""),
])  # fmt: skip
def test_the_innermost_frame_is_read_also_from_a_text_that_was_cut(stacks, frame):
    assert watchdog.innermost(stacks) == frame


@pytest.mark.slow
@pytest.mark.alone
def test_a_rank_stopped_in_a_save_is_found_within_thirty_seconds(settings, tmp_path):
    """At the shipped limits, and where a save may be silent for half an hour."""
    run = tmp_path / "run"
    job = launch([*settings, f"run.dir={run}", "checkpoint.every=1", "train.max_steps=100000"])
    wait_for(at_step(run, 10))
    os.kill(pid_of(run, 0), signal.SIGSTOP)
    began = time.monotonic()
    _, errors = job.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert "tritune: rank 0 on" in errors
    assert "was stopped (SIGSTOP or a debugger) in phase" in errors


def test_a_job_that_was_suspended_whole_is_no_hang(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    alive = watchdog.Rank(0, os.getpid(), watchdog.start_ticks(os.getpid()), "train", 7, 25.0, 1010.0)
    patience = watchdog.Patience(25.0)
    seen = {}
    for moment in [*range(1000, 1010), *range(9000, 9030)]:  # between them the launcher slept with its ranks
        clock[0] = float(moment)
        seen[moment] = bool(patience.overdue([alive]))
    assert not any(hangs for moment, hangs in seen.items() if moment < 9025), "awake again, a rank has its time anew"
    assert all(hangs for moment, hangs in seen.items() if moment > 9025)


@pytest.mark.slow
def test_a_rank_that_hangs_in_its_own_code_is_told_from_those_that_wait_for_it(settings, tmp_path):
    """Rank 1 sleeps in C with the interpreter's lock held; rank 0 waits for it in an all-reduce."""
    plant(tmp_path, '''
        from tritune.trainer import loop
        import ctypes
        log_step = loop.log_step
        def slow(run, *args):
            log_step(run, *args)
            if run.world.rank == 1 and run.state.step == 30:
                ctypes.PyDLL(None).sleep(600)
        loop.log_step = slow
    ''')  # fmt: skip
    run = tmp_path / "run"
    job = launch([*settings, f"run.dir={run}", "launch.hang_seconds=4"], PYTHONPATH=str(tmp_path))
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 1
    assert re.search(r"tritune: rank 1 on \S+ \(pid \d+\) hung at .*in slow", errors), errors


@pytest.mark.slow
def test_a_save_longer_than_torchrun_s_grace_ends_whole(settings, unbroken, tmp_path):
    """34 s in the save that the signal asked for; torchrun would have killed the ranks after 30."""
    plant(tmp_path, '''
        import time
        from tritune.trainer.checkpoint import store
        save = store.save_tensors
        def slow(folder, tensors, world):
            if __import__("os").path.exists(SLOW):
                time.sleep(34)
            return save(folder, tensors, world)
        store.save_tensors = slow
    '''.replace("SLOW", repr(str(tmp_path / "slow"))))  # fmt: skip
    run = tmp_path / "run"
    arguments = [*settings, f"run.dir={run}", "launch.grace_seconds=20"]
    job = launch(arguments, PYTHONPATH=str(tmp_path))
    wait_for(at_step(run, 30))
    (tmp_path / "slow").touch()
    (agent,) = children(job.pid)
    os.kill(agent, signal.SIGTERM)  # what a tracker that signals every process of a job does
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 75, errors
    assert re.search(r"a save took 3\d\.\d s, and a stop leaves 20 s before the kill", errors), errors
    (tmp_path / "slow").unlink()
    job = launch(arguments, PYTHONPATH=str(tmp_path))
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert "a save took 3" in errors.partition("ETA")[0], "said at the start"
    assert curve(run) == unbroken


@pytest.mark.slow
def test_the_file_stop_ends_a_run_once(settings, tmp_path):
    run = tmp_path / "run"
    job = launch([*settings, f"run.dir={run}"])
    wait_for(at_step(run, 10))
    (run / "STOP").touch()
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 75, errors
    assert "stopped   by the file STOP" in errors
    assert not (run / "STOP").exists()
    assert json.loads((run / "status.json").read_text())["culprit"] == "the file STOP"


def test_restarts_are_counted_while_no_checkpoint_comes(tmp_path):
    limits = LaunchConfig(max_restarts=2, backoff_seconds=3.0)
    crash = Outcome(1, "rank 1 was killed")
    assert [record(tmp_path, str(i), crash, limits) for i in range(4)] == [3.0, 6.0, None, None]
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert record(tmp_path, "4", crash, limits) == 3.0, "a checkpoint came: the count begins anew"
    assert record(tmp_path, "5", Outcome(1, "torchrun was killed", asked="SIGTERM"), limits) == 0.0
    assert record(tmp_path, "6", crash, limits) == 3.0, "what the scheduler ended says nothing against the run"
    assert record(tmp_path, "7", Outcome(75), limits) is None
    assert record(tmp_path, "8", Outcome(2), limits) is None
    assert [a["again_after"] for a in attempts(tmp_path)] == [3.0, 6.0, None, None, 3.0, 0.0, 3.0, None, None]


@pytest.mark.parametrize("status", ['{"state": "training", "step": 7, "save_seconds": 2.5}', "{broken", None])
def test_the_status_of_a_run_whose_rank_died_says_so(tmp_path, status):
    if status is not None:
        (tmp_path / "status.json").write_text(status)
    record(tmp_path, "1", Outcome(1, "rank 1 was killed"), LaunchConfig())
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["state"], found["exit_code"], found["culprit"]) == ("failed", 1, "rank 1 was killed")
    assert (found["step"], found.get("save_seconds")) == ((7, 2.5) if status and "step" in status else (0, None))


def test_the_status_that_a_rank_left_itself_stays(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "failed", "culprit": "NonFiniteError"}')
    record(tmp_path, "1", Outcome(1, "rank 0 ended with 1"), LaunchConfig())
    assert json.loads((tmp_path / "status.json").read_text())["culprit"] == "NonFiniteError"


def plant(folder: Path, source: str, module: str = "tritune.trainer") -> None:
    """A `sitecustomize` that changes the trainer once it is imported: a fault in a real process."""
    lines = "\n".join("    " + line[8:] for line in source.strip("\n").splitlines())
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "def change():\n" + lines + "\n"
        f"if any({module!r} in a for a in sys.orig_argv) and 'tritune.launch.agent' not in sys.orig_argv:\n"
        "    change()\n"
    )


@pytest.mark.parametrize("second", ["says more", "stays at its first word", "says nothing"])
def test_the_first_machine_waits_for_the_last_word_of_the_others(second, tmp_path, monkeypatch):
    """A launcher tells at once that a rank died, and by which signal only when its torchrun has ended."""
    monkeypatch.setattr(supervise, "PEER_SECONDS", 0.5)
    monkeypatch.setattr(supervise, "END_SECONDS", 2.0)
    first, other = (Attempt("one", [], tmp_path, LaunchConfig(), 1, nodes=2, node=n, host=f"n{n + 1}") for n in (0, 1))
    first.shared.mkdir(parents=True)
    if second != "says nothing":
        supervise._tell(other, [Culprit(1, 1.0, 1, "rank 1 died without a word")])
    last = Culprit(1, 1.0, 1, "rank 1 was killed by SIGKILL")
    late = threading.Timer(1.0, supervise._tell, (other, [last], True))
    if second == "says more":
        late.start()
    outcome = supervise._agree(first, None, 1, [Culprit(3, 2.0, 0, "rank 0: connection reset")], Requests())
    late.cancel()
    wanted = {"says more": "rank 1 was killed by SIGKILL", "stays at its first word": "rank 1 died without a word"}
    assert outcome.culprit == wanted.get(second, "machine 2 of 2 left no word: it, or its launcher, may be lost")
