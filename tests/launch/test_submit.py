"""Rendered sbatch scripts: three cluster shapes as golden files, shellcheck, and everything that cannot stand in one."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tritune.launch import slurm
from tritune.trainer.config.compose import load_config

GOLDEN = Path(__file__).with_name("golden")
BASE = ["model=tiny", "data.train=/data/rows.jsonl", "train.max_steps=9"]
SHAPES = {
    "pyxis": ["launch=slurm_h100_pyxis", "launch.nodes=4", "launch.container=registry/tritune:1",
              "launch.mounts=['/scratch:/scratch']", "launch.partition=h100"],
    "modules": ["launch=slurm_a100_modules", "launch.nodes=2", "launch.account=p123", "launch.venv=/home/u/my venv",
                "report.question='Is it \"better\"; or $HOME?'"],
    "array": ["launch=slurm_preemptible", "launch.seeds=[1,2,5]", "launch.qos=low", "launch.directives=[\"--mail-type=FAIL\"]",
              "launch.env={A: 'x y$z', B: \"it's\"}"],
}  # fmt: skip


def script(overrides: list[str], monkeypatch, run="/runs/mine") -> str:
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.setattr(Path, "cwd", classmethod(lambda cls: cls("/home/u/work")))
    argv = [*BASE, *overrides]
    config = load_config(argv)
    return slurm.render(config.launch, config.backend.device.value, Path(run), argv, config.launch.num_procs or 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_three_shapes(shape, monkeypatch):
    """After a change that is meant: python tests/launch/test_submit.py writes them anew."""
    assert script(SHAPES[shape], monkeypatch) == (GOLDEN / f"{shape}.sh").read_text()


@pytest.mark.parametrize("shape", SHAPES)
def test_no_variable_in_a_directive_and_every_directive_before_the_first_command(shape):
    lines = (GOLDEN / f"{shape}.sh").read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert len(directives) > 6
    assert not [line for line in directives if re.search(r"[$`\"'\\]", line)]
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]


@pytest.mark.parametrize("shape", SHAPES)
def test_shellcheck(shape):
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck (apt-get install shellcheck)")
    done = subprocess.run(["shellcheck", str(GOLDEN / f"{shape}.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_words_reach_the_run_as_they_were_given(monkeypatch, tmp_path):
    """The script is run, with stand-ins for Slurm's commands; srun writes down what it was given."""
    for name, body in {
        "scontrol": "echo n1",
        "srun": f'for a in "$@"; do printf "%s\\0" "$a"; done > {tmp_path}/given',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    hard = [
        "report.question='a \"b\" $HOME `x` \\\\ {1,2}'",
        "tracking.tags=[a b,c]",
        "launch=slurm",
        "launch.num_procs=2",
    ]
    text = script(hard, monkeypatch, run=str(tmp_path / "run"))
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    given = (tmp_path / "given").read_text().split("\0")[:-1]
    assert given[given.index("--rendezvous") + 1] == "n1:20077"
    assert given[given.index("--rendezvous") + 2 :] == [*BASE, *hard, f'run.dir="{tmp_path}/run"']
    assert (
        load_config(given[given.index("--rendezvous") + 2 :]).report.question
        == load_config([*BASE, *hard]).report.question
    )


@pytest.mark.parametrize(("state", "code", "again"), [("RUNNING", 77, True), ("COMPLETING", 77, False), ("RUNNING", 75, False),
                                                      ("RUNNING", 2, False), ("RUNNING", 137, True),
                                                      ("SIGNALING", 77, True)])  # fmt: skip
def test_what_is_requeued(monkeypatch, tmp_path, state, code, again):
    """COMPLETING, with no word before: Slurm ended the job itself, by `scancel` say."""
    done = play(monkeypatch, tmp_path, srun=f"exit {code}", state=state)
    done.communicate(timeout=20)
    assert ("requeue 77" in (tmp_path / "asked").read_text()) is again
    assert done.returncode == (75 if code == 77 else code)


def test_waiting_for_a_job_ends_with_its_end_alone(monkeypatch, tmp_path):
    """Slurm shows SIGNALING and its like in the place of RUNNING for a moment: a CI run took that for the end."""
    shown = ["PENDING", "RUNNING", "SIGNALING", "RUNNING", "STAGE_OUT", "COMPLETING", "REQUEUED", "COMPLETED"]
    states = tmp_path / "states"
    states.write_text("".join(f"JobId=7 JobState={state} ExitCode=0:0\n" for state in shown))
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\nhead -n 1 {states}\nsed -i 1d {states}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.0)
    assert slurm._status_of("7") == 0
    assert states.read_text() == "", "looked until the last"


def test_a_stop_that_takes_too_long_is_requeued_before_it_is_killed(monkeypatch, tmp_path):
    """The run is asked by file and signal; ten seconds before the grace is over the job is requeued, saved or not."""
    started = f"touch {tmp_path}/started; trap 'touch {tmp_path}/signalled' USR1; sleep 2 & wait; sleep 9; exit 77"
    done = play(monkeypatch, tmp_path, srun=started, state="COMPLETING")
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    done.send_signal(signal.SIGUSR1)
    time.sleep(6.5)
    assert done.poll() is None, "it still saves"
    assert (tmp_path / "run" / "STOP").exists()
    assert (tmp_path / "signalled").exists()
    assert (tmp_path / "asked").read_text().count("requeue 77") == 1
    done.communicate(timeout=20)


def play(monkeypatch, tmp_path, srun: str, state: str) -> subprocess.Popen[str]:
    """Run a batch script with stand-ins for Slurm's commands; `asked` has what scontrol was asked for."""
    text = script(
        ["launch=slurm", "launch.num_procs=2", "launch.grace_seconds=15"], monkeypatch, run=str(tmp_path / "run")
    )
    scontrol = f'echo "$@" >> {tmp_path}/asked; case $1 in show) echo "n1 JobState={state}";; requeue) exit 1;; esac'
    for name, body in (("scontrol", scontrol), ("srun", srun)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]"}
    return subprocess.Popen(["bash", "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


@pytest.mark.parametrize("name", ["a b", "a\n#SBATCH --uid=0"])
def test_a_working_directory_that_cannot_stand_in_a_directive_is_refused(tmp_path, monkeypatch, capsys, sft_file, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    argv = ["launch=slurm", "launch.num_procs=1", "model=tiny", f"data.train={sft_file}", "train.max_steps=9"]
    assert slurm.submit([*argv, f"run.dir={tmp_path / 'run'}", "launch.dry_run=true"]) == 2
    said = capsys.readouterr().err
    assert "the working directory='" in said
    assert "\n#" not in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.job_name=a b"], "launch.job_name=a b"),
        (["launch.partition=$HOME"], "launch.partition"),
        (["launch.time=tomorrow"], "launch.time=tomorrow: no time limit"),
        (["launch.directives=['-p x']"], "launch.directives"),
        (["launch.directives=['--comment=$USER']"], "launch.directives"),
        (["launch.env={1A: x}"], "launch.env"),
        (["launch.env={WANDB_API_KEY: 0123456789abcdef0123456789abcdef01234567}"], "launch.env: it holds a secret"),
        (["launch.container=x", "launch.venv=/y"], "launch.venv"),
        (["launch.mounts=['/a:/b']"], "launch.mounts"),
        (["launch.seeds=[1,1]"], "launch.seeds"),
        (["run.dir='/tmp/a b'"], "run.dir='/tmp/a b'"),
        (["launch.grace_seconds=inf"], "launch.grace_seconds=inf: it must be at least 1 second"),
        (["launch.partitoin=x"], "launch.partition"),
        (["launch=local"], "launch=local: there is no scheduler"),
        (["backend=single"], "2 processes were started"),
        (["data.train=/no/such.jsonl"], "/no/such.jsonl"),
        (["model.tokenizer=/no/such"], "model.tokenizer=/no/such: there is no such folder"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_queued(tmp_path, sft_file, capsys, overrides, message):
    argv = ["model=tiny", f"data.train={sft_file}", "train.max_steps=9", "launch=slurm", "launch.num_procs=2",
            f"run.dir={tmp_path}", *overrides]  # fmt: skip
    assert slurm.submit(argv) == 2
    assert message in capsys.readouterr().err


SECRETS = {"HF_TOKEN": "hf_" + "QwErTy123" * 4, "MY_PASSWORD": "pa\"ss'wo\\rd-é-1x9", "APP_TOKEN": "Zq%9+/=Zq%9+/=Zq",
           "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "DB_SECRET": "tab\there-and line7"}  # fmt: skip


@pytest.mark.parametrize("key", ["report.question", "tracking.name", "launch.account"])
@pytest.mark.parametrize("name", [*SECRETS, "url", "beside a key"])
def test_no_secret_is_written_into_the_script(tmp_path, sft_file, capsys, monkeypatch, key, name):
    """Whatever the key, and however the value has to be quoted: 6 of 9 stood in the script."""
    for variable, value in SECRETS.items():
        monkeypatch.setenv(variable, value)
    secret = SECRETS.get(name, "https://bob:S3cr3t@example.com/x" if name == "url" else "password=hunter2hunter2")
    quoted = secret.replace("\\", "\\\\").replace("'", "\\'")
    argv = ["model=tiny", f"data.train={sft_file}", "train.max_steps=9", "launch=slurm", "launch.num_procs=2",
            f"run.dir={tmp_path / 'run'}", "launch.dry_run=true", f"{key}='{quoted}'"]  # fmt: skip
    assert slurm.submit(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert secret not in said.err
    if key != "launch.account":  # Slurm's own rule for such a name may speak first
        assert f"{key}: it holds a secret" in said.err
        assert "Export it in your shell" in said.err
    assert not (tmp_path / "run").exists()


def test_without_slurm_it_says_so_and_a_dry_run_works(tmp_path, sft_file, capsys, monkeypatch):
    argv = ["model=tiny", f"data.train={sft_file}", "train.max_steps=9", "launch=slurm", "launch.num_procs=2"]
    assert slurm.submit([*argv, f"run.dir={tmp_path / 'a'}", "launch.dry_run=true"]) == 0
    assert capsys.readouterr().out.startswith("#!/usr/bin/env bash\n")
    assert not (tmp_path / "a").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.submit([*argv, f"run.dir={tmp_path / 'b'}"]) == 2
    assert "sbatch is not found" in capsys.readouterr().err


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for shape, overrides in SHAPES.items():
        with pytest.MonkeyPatch.context() as patch:
            text = script(overrides, patch)
        (GOLDEN / f"{shape}.sh").write_text(text)
