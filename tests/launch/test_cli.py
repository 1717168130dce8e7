"""The command line and torchrun, as a user starts them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import harness
import pytest
import today
from tritune.trainer.parallel import threads


def cli(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tritune.launch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_help_names_every_experiment_and_exit_status():
    out = cli("--help")
    assert out.returncode == 0
    for word in ("train", "config", "banking77", "shakespeare", "exit status", "75"):
        assert word in out.stdout


def test_unknown_verb():
    out = cli("trian")
    assert out.returncode == 2
    assert "Did you mean train?" in out.stderr
    assert "Traceback" not in out.stderr


def test_config_prints_what_is_set_and_what_is_wrong(tmp_path):
    out = cli("config", "model=tiny", f"data.train={tmp_path}/x.jsonl", "train.max_steps=3", "optim.lr=0.5")
    assert out.returncode == 0
    assert "lr: 0.5" in out.stdout
    out = cli("config", "model=tiny", "optim.lrr=0.5")
    assert out.returncode == 2
    assert "optim.lr" in out.stderr
    assert "data.train" in out.stderr


def test_faults_are_seen_before_torchrun_starts(tmp_path):
    began = time.monotonic()
    out = cli("train", "model=tiny", "data.train=/no/such.jsonl", "train.max_steps=3", "launch.num_procs=2", "seeds=3")
    assert out.returncode == 2
    assert out.stderr.count("tritune:") == 1
    assert "seed" in out.stderr
    assert "Traceback" not in out.stderr
    assert time.monotonic() - began < 20


def test_launches_two_processes_and_matches_plain_torchrun(tmp_path, tiny):
    """`tritune train launch.num_procs=2` and `torchrun -m tritune.trainer` train the same."""
    out = cli("train", *tiny, "launch.num_procs=2", f"run.dir={tmp_path / 'ours'}")
    assert out.returncode == 0, out.stderr
    environment = json.loads((tmp_path / "ours" / "environment.json").read_text())
    assert environment["world_size"] == 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "tritune.trainer", *tiny, f"run.dir={tmp_path / 'theirs'}"]  # fmt: skip
    out = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert out.returncode == 0, out.stderr
    ours, theirs = (harness.rows(tmp_path / name) for name in ("ours", "theirs"))
    assert [(r["loss"], r["grad_norm"]) for r in ours] == [(r["loss"], r["grad_norm"]) for r in theirs]


def test_wrong_rows_on_two_processes_give_one_message_and_their_threads_wait_asleep(tmp_path, tiny):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\nnot json\n')
    arguments = [*tiny, f"data.train={tmp_path}/rows.jsonl", "launch.num_procs=2", f"run.dir={tmp_path / 'run'}"]
    out = cli("train", *arguments, env={**os.environ, "OMP_DISPLAY_ENV": "verbose"})
    assert out.returncode == 2, out.stderr
    read = re.findall("GOMP_SPINCOUNT = '([0-9]+)'", out.stderr)  # by the library itself, in torchrun and in each rank
    assert len(read) >= 2
    assert set(read) == {threads.SPINS}
    assert out.stderr.count("rows.jsonl:2") == 1
    assert "Traceback" not in out.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", today.some([signal.SIGTERM, signal.SIGUSR1], 2, "launcher"))
def test_signal_to_the_launcher_stops_the_run(tmp_path, tiny, number):
    """The exit status is the run's (75), not torchrun's (1)."""
    arguments = [*tiny, "train.max_steps=100000", "launch.num_procs=2", f"run.dir={tmp_path / 'run'}"]
    process = subprocess.Popen([sys.executable, "-m", "tritune.launch.cli", "train", *arguments],
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while len(harness.rows(tmp_path / "run")) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=120) == 75, process.stderr.read()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "stopped"
    last = harness.rows(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()
