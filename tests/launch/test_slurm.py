"""Jobs on a virtual Slurm cluster: what they compute, and what signals, time limits and dead machines do to them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cluster
import harness
import pytest
import today
from cluster import Cluster
from test_supervise import at_step, attempts, curve, gone, pid_of, plant, wait_for

pytestmark = pytest.mark.slow

STEPS, FEW = 300, 40


@contextmanager
def running(tracking: str = "linuxproc") -> Iterator[Cluster]:
    """A cluster; where cgroups cannot be had, one whose processes are tracked by their group, as far from the workers."""
    if tracking == "cgroup" and (not cluster.cgroups() or cluster.trouble(tracking)):
        tracking = "pgid"
    why = cluster.trouble(tracking)
    if why:
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # pytest's own paths are too long for a socket
    try:
        with Cluster(folder, 2, tracking) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Cluster]:
    """For the tests that leave its nodes as they were."""
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("jobs")
    harness.write_prompts(root / "rows.jsonl", 30, seed=4)
    return ["model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48", "data.max_length=96",
            f"data.train={root / 'rows.jsonl'}", "train.batch_size=8", "backend.device=cpu", "checkpoint.every=20",
            "evaluation.base=false", "evaluation.samples=0", "export.enabled=false", "report.enabled=false",
            f"train.max_steps={STEPS}"]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory) -> list[tuple]:
    """Two processes."""
    root = tmp_path_factory.mktemp("unbroken")
    harness.run([*settings, f"run.dir={root / 'run'}"], root / "logs", world_size=2)
    return curve(root / "run")


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory) -> list[tuple]:
    """One process, for `FEW` steps."""
    root = tmp_path_factory.mktemp("alone")
    harness.run([*settings, f"train.max_steps={FEW}", f"run.dir={root / 'run'}"], root / "logs")
    return curve(root / "run")


@pytest.fixture
def paced(tmp_path) -> dict[str, str]:
    """A step of the first attempts takes longer, so that a run can be met in its middle."""
    plant(tmp_path, '''
        import os, time
        from tritune.trainer.run.stop import Stop
        pause = float(os.environ["PACE"]) if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < int(os.environ["PACED"]) else 0.0
        agreed = Stop.agreed
        Stop.agreed = lambda self, *rest: (time.sleep(pause), agreed(self, *rest))[1]
    ''')  # fmt: skip
    return {"PYTHONPATH": str(tmp_path), "PACE": "0.1", "PACED": "3"}


def submit(found: Cluster, arguments: list[str], **variables: str) -> str:
    command = [sys.executable, "-m", "tritune.launch.cli", "submit", *arguments, "launch=slurm", "launch.nodes=2"]
    done = subprocess.run(command, env={**found.env, **variables}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return re.search(r"submitted job (\d+)", done.stdout)[1]


def said(run: Path) -> str:
    return "".join(path.read_text() for path in run.glob("slurm-*.out"))


def attempt(found: Cluster, job: str, number: int, run: Path, beyond: int = 3):
    """Whether restart `number` of the job has made `beyond` steps of its own."""

    def look() -> bool:
        if found.job(job).get("Restarts") != str(number):
            return False
        logged, log = harness.rows(run), said(run)
        if log.count("backend   ") <= number:
            return False
        resumed = re.findall(r"resume    from step-\d+, step (\d+)", log)
        if len(resumed) < number:
            return False
        begun = int(resumed[number - 1]) if number else 0
        return bool(logged) and logged[-1]["step"] >= begun + beyond

    return look


@pytest.mark.parametrize("backend", today.some(["ddp", "fsdp", "zero2"], 3, "slurm"))
def test_four_processes_on_two_nodes_train_what_one_does(settings, alone, shared_cluster, tmp_path, backend):
    """That the backends agree is proved in tests/verify; here, that each of them meets across nodes."""
    run, found = tmp_path / "run", shared_cluster
    few = [f"train.max_steps={FEW}", f"backend={backend}", "launch.num_procs=2", f"run.dir={run}"]
    ended = found.wait_for_end(submit(found, [*settings, *few]))
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), said(run)
    assert json.loads((run / "environment.json").read_text())["world_size"] == 4
    ours, theirs = curve(run), alone
    assert len(ours) == len(theirs) == FEW
    for (step, loss, norm, batch), (_, loss_1, norm_1, batch_1) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(loss_1, rel=1e-5), step
        assert norm == pytest.approx(norm_1, rel=1e-4), step
        assert batch == batch_1, "the same rows"


@pytest.mark.parametrize("tracking", today.some(["linuxproc", "cgroup"], 2, "tracking"))
def test_a_job_that_is_interrupted_in_every_way_trains_as_if_it_never_was(
    settings, unbroken, tmp_path, paced, tracking
):
    """A signal, a preemption, a requeue by hand, and the time limit, one after the other on one job."""
    run = tmp_path / "run"
    with running(tracking) as found:
        limits = ["launch.num_procs=1", "launch.time=60", "launch.grace_seconds=20", f"run.dir={run}"]
        job = submit(found, [*settings, "checkpoint.every=1000", *limits], **paced | {"PACE": "0.4", "PACED": "4"})
        wait_for(attempt(found, job, 0, run))
        found.call("scancel", "--signal=USR1", job)
        wait_for(attempt(found, job, 1, run))
        found.call(
            "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"
        )
        wait_for(attempt(found, job, 2, run))
        found.call("scontrol", "requeue", job)
        wait_for(attempt(found, job, 3, run))
        found.call("scontrol", "update", f"JobId={job}", "TimeLimit=1")  # a minute, the least that Slurm knows
        wait_for(lambda: found.job(job)["Restarts"] == "4", 90)
        found.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
        ended = found.wait_for_end(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), said(run)
    assert int(ended["Restarts"]) >= 4
    states = [(a["code"], a["crashed"]) for a in attempts(run)]
    assert states == [(75, False)] * int(ended["Restarts"]) + [(0, False)], states
    assert len(harness.rows(run)) == STEPS
    assert curve(run) == unbroken, "no step lost, none repeated"
    first = re.findall(r"resume    from step-\d+, step (\d+)", said(run))
    stopped = re.findall(r"after step (\d+), saved", said(run))
    assert first == stopped, "each attempt went on where the one before it stopped"


def test_a_dead_rank_a_dead_torchrun_and_a_dead_machine(settings, unbroken, tmp_path, paced):
    run = tmp_path / "run"
    with running() as found:
        job = submit(found, [*settings, "launch.num_procs=1", "launch.backoff_seconds=1", f"run.dir={run}"], **paced)

        wait_for(attempt(found, job, 0, run, 21))
        victim, other = pid_of(run, 1), pid_of(run, 0)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        wait_for(lambda: gone(other), 30)
        wait_for(lambda: found.job(job)["Restarts"] == "1", 40)
        assert time.monotonic() - killed < 40
        assert f"tritune: rank 1 on n2 (pid {victim}) was killed by SIGKILL" in said(run)

        wait_for(attempt(found, job, 1, run, 21))
        agent = int(re.search(r"PPid:\s*(\d+)", Path(f"/proc/{pid_of(run, 1)}/status").read_text())[1])
        os.kill(agent, signal.SIGKILL)
        wait_for(lambda: found.job(job)["Restarts"] == "2", 40)
        assert f"tritune: torchrun on n2 (pid {agent}) was killed by SIGKILL" in said(run)

        wait_for(attempt(found, job, 2, run, 21))
        other = pid_of(run, 0)
        found.kill_node("n2")
        wait_for(lambda: gone(other), 30 + cluster.SLURMD_TIMEOUT)
        wait_for(lambda: found.job(job)["JobState"] == "PENDING" or found.job(job)["Restarts"] == "3", 40)
        found.start_node("n2")
        ended = found.wait_for_end(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), said(run)
    assert "machine 2 of 2 left no word: it, or its launcher, may be lost" in said(run)
    assert curve(run) == unbroken


def test_a_second_job_on_the_same_directory_is_refused_and_a_cancelled_one_stays_so(
    settings, shared_cluster, tmp_path, paced
):
    run, found = tmp_path / "run", shared_cluster
    arguments = [*settings, "launch.num_procs=1", f"run.dir={run}"]
    job = submit(found, arguments, **paced | {"PACE": "0.5"})
    wait_for(at_step(run, 3))
    command = [sys.executable, "-m", "tritune.launch.cli", "submit", *arguments, "launch=slurm", "launch.nodes=2"]
    again = subprocess.run(command, env=found.env, capture_output=True, text=True)
    assert again.returncode == 2
    assert f"job {job} has this directory, and is running" in again.stderr
    text = (run / "submit.sh").read_text()
    done = subprocess.run(["sbatch", "--parsable", "--wait", str(run / "submit.sh")], env=found.env,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 2, said(run)
    assert f'a live run has this directory: {{"host": "n1", "pid": {pid_of(run, 0)}, "job": "{job}"' in said(run)
    assert "#SBATCH --requeue" in text
    pid = pid_of(run, 0)
    found.call("scancel", job)
    ended = found.wait_for_end(job)
    assert ended["JobState"] == "CANCELLED"
    wait_for(lambda: gone(pid), 15)
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"


def test_wrong_input_on_the_cluster_ends_the_job_with_2(settings, shared_cluster, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\nnot json\n')
    run, found = tmp_path / "run", shared_cluster
    ended = found.wait_for_end(submit(found, [*settings, f"data.train={rows}", "launch.num_procs=1", f"run.dir={run}"]))
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0"), said(run)
    assert said(run).count("rows.jsonl:2") == 1


def test_what_slurm_would_refuse_is_refused_before_it_is_queued(settings, shared_cluster, tmp_path):
    found, known = shared_cluster, ("squeue", "-h", "--states=all", "--format=%i")
    before = found.call(*known)
    for wrong, word in (("launch.partition=nowhere", "partition"), ("launch.nodes=9", "ode"),
                        ("launch.num_procs=7", "configuration")):  # fmt: skip
        device = [] if "num_procs" in wrong else ["backend.device=cpu"]
        command = [sys.executable, "-m", "tritune.launch.cli", "submit", *settings, "launch=slurm", *device,
                   "launch.num_procs=1", wrong, f"run.dir={tmp_path / 'run'}"]  # fmt: skip
        if not device:
            command.remove("backend.device=cpu")
        done = subprocess.run(command, env=found.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, (wrong, done.stdout, done.stderr)
        assert word in done.stderr, done.stderr
    assert found.call(*known) == before, "no job was made"


def test_an_array_trains_a_run_for_each_seed(settings, shared_cluster, tmp_path):
    run, found = tmp_path / "sweep", shared_cluster
    arguments = [*settings, "train.max_steps=5", "launch.num_procs=1", "launch.seeds=[3,7]", f"run.dir={run}"]
    job = submit(found, [*arguments, "launch.wait=true"])
    assert found.call("squeue", "-h", f"--job={job}", check=False) == ""
    curves = [curve(run / f"seed-{seed}") for seed in (3, 7)]
    assert [len(c) for c in curves] == [5, 5]
    assert curves[0] != curves[1]
