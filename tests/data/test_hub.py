"""Rows of the hub, from a hub of this machine: the real clients against a small server, and what happens when it goes away."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import harness
import pytest
from huggingface_hub.errors import HfHubHTTPError
from tritune.trainer.data import records
from tritune.trainer.data.splits import Watch, fingerprint
from tritune.trainer.errors import InputError, LostConnectionError, UnreachableError

pytestmark = pytest.mark.slow
SETTINGS = [
    "model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48", "data.max_length=96",
    "train.batch_size=8", "train.max_steps=6", "backend.device=cpu", "export.enabled=false", "report.enabled=false",
    "evaluation.base=false", "evaluation.samples=0", "checkpoint.every=3",
]  # fmt: skip


class Hub(ThreadingHTTPServer):
    """One dataset, `me/rows`, of one file; `sha` names its version, `asked` has every request."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.sha, self.asked = content, "a" * 40, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def downloads(self) -> int:
        return sum(line.startswith("GET") and "/resolve/" in line for line in self.asked)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        file, size = "rows.jsonl", len(hub.content)
        if path.startswith("/api/datasets/me/rows/tree/"):
            body = [{"type": "file", "path": file, "size": size, "oid": hub.sha}] if path.endswith(hub.sha) else []
            return self._send(200, json.dumps(body).encode())
        if path.startswith("/api/datasets/me/rows"):
            facts = {"_id": "1", "id": "me/rows", "sha": hub.sha, "private": False, "gated": False, "disabled": False,
                     "downloads": 0, "likes": 0, "tags": [], "siblings": [{"rfilename": file}]}  # fmt: skip
            return self._send(200, json.dumps(facts).encode())
        if re.fullmatch(rf"/datasets/me/rows/resolve/\w+/{file}", path):
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            body = hub.content[int(first) : int(last or size) + 1]
            span = {"Content-Range": f"bytes {first}-{int(first) + len(body) - 1}/{size}", "Accept-Ranges": "bytes"}
            return self._send(206, body, {**span, "ETag": f'"{hub.sha}"', "X-Repo-Commit": hub.sha})
        return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound" if "/me/rows" in path else "RepoNotFound"})

    do_HEAD = do_GET

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(sft_file) -> Iterator[Hub]:
    server = Hub(sft_file.read_bytes())
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def train(hub, tmp_path):
    """`train(*overrides)`: in a process of its own, since the clients read the hub's address when they are imported."""
    root = f"http://127.0.0.1:{hub.server_address[1]}"
    env = {**os.environ, "HF_ENDPOINT": root, "HF_HOME": str(tmp_path / "home"), "TRITUNE_CACHE": str(tmp_path / "cache"),
           "NO_PROXY": "*"}  # fmt: skip

    def call(*overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tritune.trainer", *SETTINGS, "data.train=hf://me/rows:train", *overrides]
        return subprocess.run(command, env=env | variables, capture_output=True, text=True, timeout=200)

    return call


def losses(run) -> list[float]:
    return [row["loss"] for row in harness.rows(run)]


def test_rows_of_the_hub_are_those_of_the_file(hub, train, sft_file, tmp_path):
    """And with its tokens in the cache a run needs the hub no more."""
    there = train(f"run.dir={tmp_path / 'there'}")
    assert there.returncode == 0, there.stderr
    harness.run([*SETTINGS, f"run.dir={tmp_path / 'here'}", f"data.train={sft_file}"], tmp_path / "logs")
    assert losses(tmp_path / "there") == losses(tmp_path / "here")
    fetched = hub.downloads
    alone = train(f"run.dir={tmp_path / 'alone'}", HF_HUB_OFFLINE="1")
    assert alone.returncode == 0, alone.stderr
    assert f"taking its version {hub.sha[:12]}, the last that was seen here" in alone.stderr
    assert losses(tmp_path / "alone") == losses(tmp_path / "there")
    assert hub.downloads == fetched, "the tokens came from the cache"
    hub.sha = "b" * 40
    hub.content = b"\n".join(reversed(hub.content.splitlines())) + b"\n"
    other = train(f"run.dir={tmp_path / 'other'}")
    assert other.returncode == 0, other.stderr
    assert losses(tmp_path / "other") != losses(tmp_path / "there"), "another version is read anew"


def test_a_stream_of_the_hub_goes_on_where_it_was(hub, train, sft_file, tmp_path):
    options = ["data.streaming=true", "data.pack_window=16"]
    harness.run([*SETTINGS, f"run.dir={tmp_path / 'whole'}", f"data.train={sft_file}", *options], tmp_path / "logs")
    run = tmp_path / "run"
    first = train(f"run.dir={run}", "train.max_steps=6", *options)
    assert first.returncode == 0, first.stderr
    assert losses(run) == losses(tmp_path / "whole")
    for name in ("step-00000006", "best"):
        path = run / "checkpoints" / name
        if path.is_dir():
            path.rename(tmp_path / name)
    (run / "summary.json").unlink()
    second = train(f"run.dir={run}", *options)
    assert second.returncode == 0, second.stderr
    assert "step 3 of 6" in second.stderr
    assert losses(run) == losses(tmp_path / "whole")
    hub.sha = "b" * 40
    (run / "checkpoints" / "step-00000006").rename(tmp_path / "gone")
    third = train(f"run.dir={run}", *options)
    assert third.returncode == 2, third.stderr
    assert "was trained on other tokens" in third.stderr


def test_what_is_not_there(train, tmp_path):
    nothing = train(f"run.dir={tmp_path / 'a'}", "data.train=hf://me/nothing:train")
    assert nothing.returncode == 2
    assert "hf://me/nothing:train: the dataset did not load" in nothing.stderr
    split = train(f"run.dir={tmp_path / 'b'}", "data.train=hf://me/rows:dev")
    assert split.returncode == 2
    assert "dev" in split.stderr
    offline = train(f"run.dir={tmp_path / 'c'}", HF_HUB_OFFLINE="1")
    assert offline.returncode == 2, "nothing was ever seen of it"
    assert "OfflineModeIsEnabled" in offline.stderr


def test_a_connection_that_is_lost_is_not_the_users_fault():
    """Else a job would end for good with 2, and not be tried again."""

    def read(error, begun):
        with records._hub_errors("hf://me/rows:train", begun=begun):
            raise error

    busy = HfHubHTTPError("busy", response=SimpleNamespace(status_code=503, headers={}, request=None))
    denied = HfHubHTTPError("no", response=SimpleNamespace(status_code=403, headers={}, request=None))
    for error in (ConnectionError("Server Disconnected"), TimeoutError("slow"), busy):
        with pytest.raises(UnreachableError, match="did not load"):
            read(error, begun=False)
        with pytest.raises(LostConnectionError):
            read(error, begun=True)
    for error in (ValueError("a bad row"), denied):
        for begun in (False, True):
            with pytest.raises(InputError, match="did not load") as raised:
                read(error, begun)
            assert type(raised.value) is InputError


def test_a_folder_that_is_gone_is_no_hub_that_is_down(tmp_path, monkeypatch, sft_file):
    """`hf://./rows` is another folder in another working directory: its version is never taken from memory."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "rows").mkdir()
    (tmp_path / "a" / "rows" / "train.jsonl").write_bytes(sft_file.read_bytes())
    monkeypatch.chdir(tmp_path / "a")
    assert fingerprint("hf://./rows:train", "data.train", tmp_path / "cache", Watch())
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(InputError, match="did not load"):
        fingerprint("hf://./rows:train", "data.train", tmp_path / "cache", Watch())
