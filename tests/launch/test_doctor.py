"""`tritune doctor` finds what is wrong: each fault is made for real, on one machine or between two played by processes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_slurm import running
from test_supervise import plant
from tritune.launch.doctor import srun_command
from tritune.trainer.config.compose import load_config

BASE = ["backend.device=cpu", "backend.timeout_seconds=20"]


def doctor(*overrides: str, wrap: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    command = [*wrap, sys.executable, "-m", "tritune.launch.doctor", *BASE, *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def machines(*overrides: str, wraps=((), ()), extra=({}, {})) -> tuple[int, str]:
    """Two machines of one process each; rank 0's status and table."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    ranks = [doctor(*overrides, wrap=wraps[r], RANK=str(r), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=port, SLURMD_NODENAME=f"n{r + 1}", **extra[r])
             for r in range(2)]  # fmt: skip
    out, errors = ranks[0].communicate(timeout=120)
    ranks[1].communicate(timeout=30)
    assert "Traceback" not in errors, errors
    return ranks[0].returncode, out


def line(table: str, name: str) -> str:
    return next(text for text in table.splitlines() if re.search(rf"(pass|WARN|FAIL)  (\S+ )?{name}\b", text))


@pytest.mark.slow
def test_two_machines_in_order(tmp_path):
    code, table = machines(f"run.dir={tmp_path}")
    assert code == 0, table
    for name in ("software", "GPUs", "kernels", "network", "space", "run directory", "rendezvous", "same software", "clocks",
                 "shared files", "all-reduce"):  # fmt: skip
        assert line(table, name)[:4] in ("pass", "WARN"), table
    assert "2 ranks on 2 machine(s)" in table


@pytest.mark.parametrize(
    ("address", "said"),
    [("no-such-host.invalid", "does not resolve"), pytest.param("127.0.0.1", "no answer", marks=pytest.mark.slow)],
)
def test_a_wrong_rendezvous(tmp_path, address, said):
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": "9", "LOCAL_RANK": "0"}
    began = time.monotonic()
    job = doctor("backend.timeout_seconds=3", f"run.dir={tmp_path}", **variables)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert line(out, "rendezvous").startswith("FAIL")
    assert f"met nobody at {address}:9" in out
    assert said in out
    assert "the port must be free there and open" in out
    assert time.monotonic() - began < 50


def on_tmpfs(tmp_path: Path, options: str) -> tuple[str, ...]:
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a file system of its own needs root")
    script = f'mount -t tmpfs -o {options} none {tmp_path} && exec "$@"'
    return ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "_")


def test_a_nearly_full_disk(tmp_path):
    job = doctor(f"run.dir={tmp_path / 'run'}", wrap=on_tmpfs(tmp_path, "size=20m"))
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert line(out, "space").startswith("FAIL")
    assert "12 bytes for each that trains" in out


@pytest.mark.slow
def test_a_run_directory_that_cannot_be_written(tmp_path):
    job = doctor(f"run.dir={tmp_path / 'run'}", wrap=on_tmpfs(tmp_path, "ro"))
    out, errors = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "Read-only file system" in line(out, "run directory"), errors


@pytest.mark.slow
def test_other_versions_on_another_machine(tmp_path):
    fake = tmp_path / "site" / "safetensors-0.5.1.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 0.5.1\n")
    code, table = machines(f"run.dir={tmp_path}", extra=({}, {"PYTHONPATH": str(tmp_path / "site")}))
    assert code == 1
    assert line(table, "same software").startswith("FAIL"), table
    assert "0.5.1 on n2" in line(table, "same software")
    assert "n2 software" in line(table, "software") or "safetensors 0.5.1, needs" in table


@pytest.mark.slow
@pytest.mark.alone
def test_a_slow_machine(tmp_path):
    """n2's one core is shared with four busy processes."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    burners = [subprocess.Popen(["taskset", "-c", "1", sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        wraps = (("taskset", "-c", "0"), ("taskset", "-c", "1"))
        code, table = machines("backend.timeout_seconds=60", f"run.dir={tmp_path}", wraps=wraps)
    finally:
        for burner in burners:
            burner.kill()
    assert code == 0, "a warning"
    if "pass  pace" in table and os.getloadavg()[0] > 7:
        pytest.skip("the other core is as busy with something else")
    assert re.search(r"WARN  pace +n2 takes [2-9]\.\d times as long as the fastest", table), table


@pytest.mark.slow
def test_a_clock_that_is_off(tmp_path):
    plant(tmp_path, """
        import time
        now = time.time
        time.time = lambda: now() + 100
    """, "tritune.launch.doctor")  # fmt: skip
    code, table = machines(f"run.dir={tmp_path}", extra=({}, {"PYTHONPATH": str(tmp_path)}))
    assert code == 1
    assert re.search(r"FAIL  clocks +n2 is \+(99|100)\.\d\d s from n1", table), table


@pytest.mark.slow
def test_folders_that_are_not_shared(tmp_path):
    code, table = machines(f"run.dir={tmp_path}", wraps=((), on_tmpfs(tmp_path, "size=40g")))
    assert code == 1
    assert "n2 does not see what n1 writes" in line(table, "shared files"), table


@pytest.mark.slow
def test_an_interface_that_is_not_there(tmp_path):
    job = doctor(f"run.dir={tmp_path}", GLOO_SOCKET_IFNAME="ib7")
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "GLOO_SOCKET_IFNAME=ib7: there is no interface ib7" in line(out, "network")


@pytest.mark.slow
def test_on_the_machines_of_a_job(tmp_path):
    command = [sys.executable, "-m", "tritune.launch.cli", "doctor", "launch=slurm", "launch.nodes=2", "launch.num_procs=2",
               "backend.device=cpu", f"run.dir={tmp_path}"]  # fmt: skip
    with running() as found:
        done = subprocess.run(command, env=found.env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 ranks on 2 machine(s) met at n1:" in done.stdout
    assert {c["state"] for c in json.loads((tmp_path / "doctor.json").read_text())} <= {"pass", "warn"}


def test_one_process_that_srun_started_does_not_start_srun_again(tmp_path):
    """Its step has one task, like a process outside of Slurm; and a container is given what the job's is."""
    config = load_config(["model=tiny", "data.train=x", "train.max_steps=1", "launch=slurm", "launch.container=image",
                          "launch.mounts=['/a:/b']"])  # fmt: skip
    words = srun_command(config.launch, config.backend.device.value, [])
    assert {"--container-image=image", "--container-mounts=/a:/b"} < set(words)
    (exported,) = [w for w in words if w.startswith("--export=")]
    name, _, value = exported.split(",")[1].partition("=")
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "srun").chmod(0o755)
    job = doctor("launch=slurm", f"run.dir={tmp_path}", **{name: value, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    out, errors = job.communicate(timeout=60)
    assert job.returncode == 0, errors
    assert "0 failed" in out


def test_wrong_input(tmp_path):
    job = doctor("launch.num_prcs=2")
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 2
    assert "launch.num_procs" in errors
