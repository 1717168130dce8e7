"""What surrounds a run: signals before and after it, disks without room, a hub that cannot be reached."""

from __future__ import annotations

import errno
import json
import signal
import socket
import subprocess
import sys
import time

import huggingface_hub.constants
import pytest
from tritune.trainer import redact, verbs
from tritune.trainer.errors import CheckpointError, InputError, of_surroundings
from tritune.trainer.model import hub
from tritune.trainer.model.files import find_file
from tritune.trainer.run import directory
from tritune.trainer.run.directory import RunDir
from tritune.trainer.run.stop import Stop

# A shell starts what runs behind it with SIGINT ignored, and so may whoever runs the tests.
SELF = """import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from tritune.trainer.run.interrupted import to_the_end"""


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", f"{SELF}\n{code}"], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("number", ["SIGUSR1", "SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_after_the_end_changes_no_status(number):
    code = f"import atexit; atexit.register(os.kill, os.getpid(), signal.{number}); sys.exit(to_the_end(lambda: 3))"
    assert python(code).returncode == 3


def test_an_interruption_before_a_run_is_one_line():
    done = python("sys.exit(to_the_end(lambda: os.kill(os.getpid(), signal.SIGINT) or __import__('time').sleep(9)))")
    assert (done.returncode, done.stderr.count("\n")) == (75, 1), done.stderr
    assert "interrupted" in done.stderr


def test_an_interrupted_command_shows_no_traceback(tmp_path):
    for seconds in (0.6, 2.0):
        argv = ["tritune", "train", f"run.dir={tmp_path}/run"]
        code = f"{SELF}\nfrom tritune.launch.cli import main\nsys.argv = {argv!r}\nsys.exit(main())"
        job = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        job.send_signal(signal.SIGINT)
        said = job.communicate(timeout=60)[1]
        assert "Traceback" not in said, said


def full(*_: object, **__: object):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(directory.os, "fsync", full)
    code = verbs.exit_status(lambda: directory.replace_file(tmp_path / "report.html", "x"))
    said = capsys.readouterr().err
    assert code == 1
    assert said.splitlines() == [
        f"tritune: {tmp_path}/report.html: it could not be written or read (No space left on device). Make room there"
    ]
    assert list(tmp_path.iterdir()) == [], "nothing half written is left to fill the disk"


def test_only_what_a_file_system_says_is_of_the_surroundings():
    assert of_surroundings(FileNotFoundError(errno.ENOENT, "x", "f")) is None
    assert of_surroundings(CheckpointError("x")) is None
    assert "Mount" in (of_surroundings(OSError(errno.EROFS, "Read-only file system", "f")) or "")


def test_the_status_is_true_on_a_full_disk(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    run.write_status("training", 7)
    monkeypatch.setattr(directory, "replace_file", full)
    run.write_status("failed", 7, 1, "it is full")
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_a_folder_named_stop_is_refused(tmp_path):
    (tmp_path / "STOP").mkdir()
    with pytest.raises(InputError, match=r"STOP: it is no file.*Remove it"):
        Stop().watch(tmp_path, time.time())
    (tmp_path / "STOP").rmdir()
    Stop().watch(tmp_path, time.time())


@pytest.fixture
def no_hub(monkeypatch):
    hub._reachable.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield
    hub._reachable.cache_clear()


def test_a_hub_that_cannot_be_reached_is_not_waited_for(no_hub, tmp_path, monkeypatch):
    began = time.monotonic()
    assert find_file("tools/export", "config.json") is None
    assert time.monotonic() - began < 5
    assert huggingface_hub.constants.HF_HUB_OFFLINE, "what follows finds its files in the cache alone"


def test_a_hub_that_takes_connections_is_asked(no_hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hub.ask_hub_or_cache("org/name")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_behind_a_proxy_nothing_is_decided(no_hub, monkeypatch, variable):
    monkeypatch.setenv(variable, "http://proxy.invalid:3128")
    monkeypatch.setenv("no_proxy", "")
    hub.ask_hub_or_cache("org/name")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_the_environment_is_read_once_for_a_whole_tree(monkeypatch):
    looks = []
    real = redact._secrets
    monkeypatch.setattr(redact, "_secrets", lambda: looks.append(1) or real())
    rows = [{"place": f"f:{i}", "why": ["a", ("b", "hf_abcdefghij0123456789")]} for i in range(50)]
    assert redact.redact_tree(rows)[49]["why"][1][1] == "***"
    assert len(looks) == 1
