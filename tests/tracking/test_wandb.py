"""W&B through real offline runs of its client, in processes of their own: what they wrote is read back from the files.

A proxy on this machine stands where the network would be. The client's Go process honours HTTPS_PROXY, and for Python
itself `sitecustomize` refuses and notes every connection that is not to this machine, so that both would be seen.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SECRET = "correct-horse-battery-9staple"
REMOTE = "git@example.invalid:somebody/private-repository.git"
HOST = "wandb.example.invalid"

GUARD = """
import os, socket
def note(address):
    with open(os.environ["CONNECTIONS"], "a") as file:
        file.write(f"{address}\\n")
def guard(name):
    inner = getattr(socket.socket, name)
    def connect(self, address):
        away = self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(("127.", "::1"))
        if away:
            note(address)
            raise OSError("no network in this test")
        return inner(self, address)
    setattr(socket.socket, name, connect)
guard("connect"), guard("connect_ex")
resolve = socket.getaddrinfo
def getaddrinfo(host, *args, **kwargs):
    if host not in ("127.0.0.1", "localhost", "::1", None):
        note(host)
        raise OSError("no network in this test")
    return resolve(host, *args, **kwargs)
socket.getaddrinfo = getaddrinfo
"""

DRIVER = """
'a docstring: private-docstring'
import json, os, signal, sys, time
from pathlib import Path
from tritune.trainer.config import TrackingConfig
from tritune.trainer.tracking import open_sinks, wandb as ours
what, directory, state_step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
directory.mkdir(parents=True, exist_ok=True)
ours.INIT_SECONDS = 2.0
config = TrackingConfig(wandb=what != "off", project="proj", group="grp", tags=["tag-a"])
resolved = {"optim": {"lr": 0.125}, "seed": 7, "note": "banana-run"}
said = []
sinks = open_sinks(config, directory, resolved, state_step, said.append)
for step in range(state_step + 1, state_step + 6 if what == "crash" else state_step + 4):
    for sink in sinks:
        sink.log(step, {"train/loss": float(step) + state_step / 10})
        if what == "kill" and step == state_step + 2:
            import subprocess
            children = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True)
            (pid,) = children.stdout.split()
            os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.5)
print(json.dumps({"said": said, "sinks": len(sinks), "modules": sorted(sys.modules)}), flush=True)
if what == "crash":
    time.sleep(2 * ours.FLUSH_SECONDS)
    os._exit(9)
for sink in sinks:
    sink.summary({"test/tuned/accuracy": 0.75, "test/base/loss": float("nan")})
    sink.close(0)
print(json.dumps({"said": said}))
"""


@dataclass
class Ended:
    code: int
    said: list[str]
    first: dict
    err: str
    seconds: float
    away: list[str]  # connections to other machines


class Network:
    """A proxy that refuses everything and keeps what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()
        (folder / "guard").mkdir()
        (folder / "guard" / "sitecustomize.py").write_text(GUARD)
        self._log = folder / "connections"

    def _serve(self) -> None:
        while True:
            client, _ = self._server.accept()
            with client:
                self.asked.append(client.recv(1000).split(b"\r\n")[0].decode())
                client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")

    def environment(self, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("WANDB", "HTTP", "NO_PROXY", "NETRC"))}
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), self.url)
        return kept | proxies | {
            "HOME": str(self.folder), "XDG_CONFIG_HOME": str(self.folder / "config"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(self.folder / "guard"), "CONNECTIONS": str(self._log), "SERVICE_TOKEN": SECRET,
            "WANDB_BASE_URL": f"https://{HOST}",
        } | more  # fmt: skip

    def drive(self, what: str, directory: Path, state_step: int = 0, **more: str) -> Ended:
        self.asked.clear()
        self._log.write_text("")
        began = time.monotonic()
        command = [sys.executable, "-c", DRIVER, what, str(directory), str(state_step), f"--password={SECRET}"]
        out = subprocess.run(
            command, env=self.environment(**more), cwd=self.folder, capture_output=True, text=True, timeout=120
        )
        assert out.stdout, out.stderr
        lines = [json.loads(line) for line in out.stdout.splitlines()]
        away = self._log.read_text().splitlines() + list(self.asked)
        seconds = time.monotonic() - began
        return Ended(out.returncode, lines[-1]["said"], lines[0], out.stderr, seconds, away)


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Network:
    folder = tmp_path_factory.mktemp("network")
    for command in (["git", "init", "-q"], ["git", "remote", "add", "origin", REMOTE]):
        subprocess.run(command, cwd=folder, check=True)
    return Network(folder)


def records(path: Path) -> list:
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, found, part, at = path.read_bytes(), [], b"", 7
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


@dataclass
class Written:
    run: object
    config: dict
    history: list[dict]
    summary: dict
    metrics: list
    exit_code: int | None


def read(path: Path) -> Written:
    rows = records(path)
    (run,) = [r.run for r in rows if r.HasField("run")]
    history = [
        {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in r.history.item}
        for r in rows
        if r.HasField("history")
    ]
    summary: dict = {}
    for row in rows:
        for item in row.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    exits = [r.exit.exit_code for r in rows if r.HasField("exit")]
    config = {i.key: json.loads(i.value_json) for i in run.config.update}
    return Written(
        run, config, history, summary, [r.metric for r in rows if r.HasField("metric")], *exits[-1:] or [None]
    )


@pytest.fixture(scope="module")
def crashed_and_resumed(network, tmp_path_factory) -> tuple[Path, Ended, Ended, list[Written]]:
    """A run that died after step 5 and went on from its checkpoint of step 3."""
    directory = tmp_path_factory.mktemp("runs") / "first"
    crashed = network.drive("crash", directory)
    resumed = network.drive("resume", directory, 3)
    paths = sorted(directory.glob("wandb/offline-run-*/*.wandb"))
    return directory, crashed, resumed, [read(p) for p in paths]


def test_an_offline_run_holds_config_history_and_summary(crashed_and_resumed):
    directory, crashed, resumed, (_, run) = crashed_and_resumed
    assert (crashed.code, resumed.code) == (9, 0), resumed.err
    assert run.config["optim"] == {"lr": 0.125}
    assert run.config["seed"] == 7
    assert [(r["step"], r["train/loss"]) for r in run.history] == [(4, 4.3), (5, 5.3), (6, 6.3)]
    assert run.summary["test/tuned/accuracy"] == 0.75
    assert run.summary["test/base/loss"] is None  # NaN
    assert run.exit_code == 0
    assert (run.run.project, run.run.display_name, run.run.run_group, list(run.run.tags)) == (
        "proj",
        "first",
        "grp",
        ["tag-a"],
    )
    assert any(m.glob_name == "*" and m.step_metric == "step" for m in run.metrics)
    (line,) = resumed.said
    assert "offline (no key is found" in line
    assert f"wandb sync {directory}/wandb" in line
    assert "wandb:" not in resumed.err


def test_a_resumed_run_goes_on_under_the_same_id(crashed_and_resumed):
    directory, _, _, written = crashed_and_resumed
    stored = json.loads((directory / "tracking.json").read_text())["wandb_id"]
    assert [w.run.run_id for w in written] == [stored, stored]
    # The rows that the crash made repeat are in both; none was dropped.
    assert [[r["step"] for r in w.history] for w in written] == [[1, 2, 3, 4, 5], [4, 5, 6]]


def test_only_what_was_asked_for_is_recorded(crashed_and_resumed):
    directory, _, _, written = crashed_and_resumed
    blobs = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    assert any(b"banana-run" in b for b in blobs.values())  # nothing is compressed: a search finds what is there
    host = socket.gethostname()
    unwanted = [SECRET, REMOTE, "private-repository", "private-docstring", *([host] if len(host) > 5 else [])]
    for path, blob in blobs.items():
        for word in unwanted:
            assert word.encode() not in blob, f"{word} is in {path}"
    for run in written:
        assert run.run.host == ""
        assert not run.run.HasField("git")
    for path in directory.glob("wandb/offline-run-*/*.wandb"):
        kinds = {r.WhichOneof("record_type") for r in records(path)}
        assert not kinds & {"files", "artifact", "output", "output_raw", "stats", "environment"}, kinds
    names = {p.name for p in blobs}
    assert not names & {"requirements.txt", "wandb-metadata.json", "diff.patch", "output.log"}


def test_offline_and_off_connect_to_nothing(crashed_and_resumed, network, tmp_path):
    _, crashed, resumed, _ = crashed_and_resumed
    assert crashed.away == resumed.away == []
    off = network.drive("off", tmp_path / "off")
    assert (off.code, off.away, off.said, off.first["sinks"]) == (0, [], [], 0)
    assert not {"wandb", "tensorboard"} & set(off.first["modules"])
    assert list((tmp_path / "off").iterdir()) == []


def test_the_guard_sees_connections_of_python(network):
    code = "import socket\ntry: socket.create_connection(('192.0.2.1', 80), 1)\nexcept OSError as e: print(e)"
    environment = network.environment() | {"CONNECTIONS": str(network.folder / "control")}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "no network in this test" in out.stdout
    assert "192.0.2.1" in (network.folder / "control").read_text()


def test_a_server_out_of_reach_is_announced_and_the_run_kept_offline(network, tmp_path):
    """The key comes from ~/.netrc. It also proves that the proxy would see a connection of the client's."""
    netrc = network.folder / "keys"
    netrc.write_text(f"machine {HOST} login user password {'0123456789abcdef' * 3}\n")
    netrc.chmod(0o600)
    run = network.drive("online", tmp_path / "run", NETRC=str(netrc))
    assert run.code == 0, run.err
    assert any(f"CONNECT {HOST}:443" in line for line in run.away), run.away
    assert run.seconds < 60
    (line,) = run.said
    assert "W&B offline (" in line
    assert "Bad Gateway" in line
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert [r["step"] for r in read(path).history] == [1, 2, 3]
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"0123456789abcdef0123456789abcdef" not in path.read_bytes(), path


def test_a_client_that_dies_stops_nothing(network, tmp_path):
    run = network.drive("kill", tmp_path / "run", WANDB_MODE="offline")
    assert run.code == 0
    assert "offline (WANDB_MODE=offline)" in run.said[0]
    assert "W&B failed (" in run.said[1]
    assert len(run.said) == 2
    assert "Traceback" not in run.err


def test_disabled_by_the_environment(network, tmp_path):
    run = network.drive("disabled", tmp_path / "run", WANDB_MODE="disabled")
    assert (run.code, run.first["sinks"], run.away) == (0, 0, [])
    assert run.said == ["tracking  W&B is turned off by WANDB_MODE=disabled"]


def test_a_service_that_ends_badly_does_not_end_our_process(monkeypatch):
    """The client calls sys.exit with its service's status."""
    import wandb
    from tritune.trainer.tracking.wandb import WandbSink

    class Run:
        def finish(self, exit_code):
            pass

    monkeypatch.setattr(wandb, "teardown", lambda: sys.exit(3))
    with pytest.raises(RuntimeError, match="status 3"):
        WandbSink(Run()).close(0)
