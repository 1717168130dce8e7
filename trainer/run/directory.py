"""The run directory: who owns it, what it says of the run.

config.yaml  environment.json  content.json  data.json  status.json  metrics.jsonl  evaluations.jsonl  base.json
samples.json  summary.json  report.html  checkpoints/  export/  train.log
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml
from tritune.trainer import __version__
from tritune.trainer.errors import InputError
from tritune.trainer.redact import redact, redact_tree
from tritune.trainer.run.files import read_json, read_lines, require_files, row_of

LOCK = "lock.json"
STATUS_SECONDS = 2.0
STOP_FILE = "STOP"  # `touch RUN/STOP` asks a run to stop, also where no signal arrives
INHERIT_SECONDS = 120.0
OF_A_START = ("status.json", "train.log", "startup.json", STOP_FILE)  # written before anything is read
PACKAGES = ("torch", "transformers", "deepspeed", "triton", "safetensors", "tokenizers", "hydra-core", "numpy")


class RunDir:
    """Rank 0's view of the run directory; other ranks write nothing here but their shards."""

    def __init__(self, path: Path, overrides: list[str] | None = None) -> None:
        self.path, self.overrides = path, overrides or []
        self._lock: IO[str] | None = None
        self._logs: dict[str, IO[str]] = {}
        self._touched = 0.0
        self._made = False  # by this start
        self.save_seconds: float | None = (
            None  # what the last checkpoint took; kept in the status from one start to the next
        )

    def acquire(self) -> None:
        """Take the directory for this process; the operating system lets go of it when the process dies, however.

        Raises:
            InputError: a live run has it, or something in it that is no file has the name of one.
        """
        try:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            require_files(self.path)
            lock = (self.path / LOCK).open("a+")
        except OSError as error:
            rule = f"the directory cannot be written ({error.strerror})"
            raise InputError(f"run.dir={self.path}", rule, "Give another run.dir") from None
        job = os.environ.get("SLURM_JOB_ID")
        owner = self._take(lock)
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        said = row_of(f"{owner}\n") or {}  # one that says nothing is another's
        if owner is not None and job is not None and said.get("job") == job and said.get("restart", 0) < restart:
            owner = self._inherit(lock)
        if owner is not None:
            rule = f"a live run has this directory: {owner or 'unknown'}"
            raise InputError(f"run.dir={self.path}", rule, "Wait for it, stop it, or give another run.dir")
        lock.truncate(0)
        owned = {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "restart": restart, "since": now()}
        lock.write(json.dumps(owned))
        lock.flush()
        self._lock = lock
        seconds = self._status().get("save_seconds")
        self.save_seconds = seconds if isinstance(seconds, float | int) and not isinstance(seconds, bool) else None

    def _status(self) -> dict[str, Any]:
        """What the last start wrote down; nothing where that is spoilt, for this start writes it anew."""
        try:
            return read_json(self.path / "status.json", dict, "") or {}
        except InputError:
            return {}

    def _take(self, lock: IO[str]) -> str | None:
        """None once the lock is ours, or what its owner wrote."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            lock.seek(0)
            return lock.read().strip()
        except OSError as error:
            rule = f"its file system has no locks ({error.strerror}), so that two runs could write there at once"
            remedy = "Mount it with them (Lustre: -o flock), or give a run.dir on another"
            raise InputError(f"run.dir={self.path}", rule, remedy) from None

    def _inherit(self, lock: IO[str]) -> str | None:
        """Take over from this very job's last attempt, which lives on where Slurm gave its machine up for lost."""
        stop = self.path / STOP_FILE
        stop.touch()
        deadline = time.monotonic() + INHERIT_SECONDS
        while (owner := self._take(lock)) is not None and time.monotonic() < deadline:
            time.sleep(0.5)
        stop.unlink(missing_ok=True)
        return owner

    def write_config(self, tree: dict[str, Any]) -> None:
        """Write the configuration, given as plain values without secrets."""
        replace_file(self.path / "config.yaml", yaml.safe_dump(tree, sort_keys=False))

    def write_environment(self, device: str, world_size: int) -> None:
        environment = {
            "command": sys.argv,
            "overrides": self.overrides,
            "tritune": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "host": socket.gethostname(),
            "device": device,
            "world_size": world_size,
            "cpus": os.cpu_count(),
            "packages": {name: _version(name) for name in PACKAGES},
        }
        self.write_json("environment.json", environment)

    def write_status(self, state: str, step: int, exit_code: int | None = None, culprit: str | None = None) -> None:
        """`state`: training, done, stopped or failed."""
        self._write_status(
            {
                "state": state,
                "step": step,
                "exit_code": exit_code,
                "culprit": culprit,
                "time": now(),
                "pid": os.getpid(),
                "save_seconds": self.save_seconds,
            },
        )

    def write_refusal(self, culprit: str, exit_code: int) -> None:
        """Note a start that was refused, beside what the status says of the run that is here, if there is one."""
        status = self._status()
        if not status:
            self.write_status("failed", 0, exit_code, culprit)
        else:
            refusal = {"exit_code": exit_code, "culprit": culprit, "time": now()}
            self._write_status({**status, "refused": refusal})

    def _write_status(self, content: dict[str, Any]) -> None:
        _replace_or_overwrite(self.path / "status.json", _whole_json(content))

    def touch_status(self, step: int) -> None:
        """Say that training goes on, every few seconds: an fsync at each step would cost more than a small step."""
        if time.monotonic() - self._touched >= STATUS_SECONDS:
            self._touched = time.monotonic()
            self.write_status("training", step)

    def write_json(self, name: str, content: Any) -> None:
        write_whole_json(self.path / name, content)

    def write_rejects(self, rows: Iterable[dict[str, str]]) -> None:
        """`rejects.jsonl`, where rows of the data were left out."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        if lines:
            replace_file(self.path / "rejects.jsonl", redact("".join(lines)))

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a row to a JSONL log; it is with the operating system when this returns."""
        if name not in self._logs:
            self._logs[name] = (self.path / name).open("a")
        self._logs[name].write(json.dumps({k: _finite(v) for k, v in row.items()}) + "\n")
        self._logs[name].flush()

    def sync_logs(self) -> None:
        """Rows up to a checkpoint must be on the disk before it is."""
        for log in self._logs.values():
            os.fsync(log.fileno())

    def cut_logs(self, step: int, evaluated: int, log_every: int) -> list[str]:
        """Keep rows up to `step`, evaluations up to `evaluated`: what a killed run logged after its checkpoint comes again.

        Returns what is to be said: of lines that are no rows, which go too, and of rows that should be there.
        """
        said = []
        for name, last in (("metrics.jsonl", step), ("evaluations.jsonl", evaluated)):
            lines = read_lines(self.path / name)
            kept = [line for line in lines if _step_of(line) <= last]
            if lines:
                replace_file(self.path / name, "".join(kept))
            due = last // log_every if name == "metrics.jsonl" else 0
            if len(kept) < due:
                said.append(f"resume    {self.path / name} has {len(kept):,} rows up to step {last:,}, where "
                            f"train.log_every={log_every} makes {due:,}")  # fmt: skip
            spoilt = sum(line.endswith("\n") and _step_of(line) == float("inf") for line in lines)
            if spoilt:
                said.append(
                    f"resume    {self.path / name} is spoilt: {spoilt:,} of its lines are no rows, and are left out"
                )
        return said

    def discard(self) -> None:
        """Remove the directory of a start that was refused, if this start made it: there is nothing in it but the refusal."""
        if self._made:
            for name in (LOCK, *OF_A_START):
                (self.path / name).unlink(missing_ok=True)
            with suppress(OSError):  # somebody put something there meanwhile
                self.path.rmdir()

    def close(self) -> None:
        for log in self._logs.values():
            log.close()
        if self._lock is not None:
            self._lock.close()


def note_death(run: Path, saved: int, exit_code: int, culprit: str | None) -> None:
    """Say in the status that the run failed, where the one who writes it was killed: its last word is that it trains."""
    path = run / "status.json"
    status: dict[str, Any] = {"step": saved}
    with suppress(InputError):
        status |= read_json(path, dict, "") or {}
    if status.get("state") in (None, "training"):
        end = {"state": "failed", "exit_code": exit_code, "culprit": culprit, "time": now()}
        _replace_or_overwrite(path, _whole_json({**status, **end}))


def is_owned(run: Path) -> bool:
    """Whether a live process has the directory, or it cannot be known."""
    try:
        with (run / LOCK).open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def write_whole_json(path: Path, content: Any) -> None:
    """Write JSON without secrets and without NaN (null instead), whole or not at all."""
    replace_file(path, _whole_json(content))


def _whole_json(content: Any) -> str:
    return json.dumps(_finite(redact_tree(content)), indent=1, allow_nan=False) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a crash, sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            _write_down(file, text)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk names no file by itself


def _write_down(file: IO[str], text: str) -> None:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _replace_or_overwrite(path: Path, text: str) -> None:
    """Replace a file, or write over it where the disk has no room for a second one."""
    try:
        replace_file(path, text)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.is_file():
            raise
        with path.open("r+", encoding="utf-8") as file:
            _write_down(file, text)
            file.truncate()


def run_path(run_dir: str | None, overrides: list[str]) -> Path:
    """`run.dir` where it is given, or a new directory named after the experiment and the time."""
    experiment = next((o.partition("=")[2] for o in overrides if o.startswith("experiment=")), "run")
    started = time.strftime("%Y%m%d-%H%M%S")
    return Path(run_dir or f"runs/{experiment}-{started}")


def export_path(export_dir: str | None, run: Path) -> Path:
    """Where the result goes: `export.dir`, or `export/` in the run directory."""
    return Path(export_dir) if export_dir else run / "export"


def _step_of(line: str) -> float:
    """The row's step; a line that is none, as one that a kill cut short, is beyond every step."""
    step = (row_of(line) or {}).get("step")
    return step if type(step) is int else float("inf")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value - value != 0.0 else value


def now() -> str:
    """The time of this machine with its offset from UTC, as it is written everywhere: 2026-01-31T12:00:00+0000."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
