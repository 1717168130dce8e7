"""The run directory: who owns it, what it says of the run.

config.yaml  environment.json  data.json  status.json  metrics.jsonl  evaluations.jsonl  base.json  samples.json
summary.json  report.html  checkpoints/  export/  train.log
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml
from tritune.trainer import __version__
from tritune.trainer.compose import to_dict
from tritune.trainer.config import IDENTITY, Config
from tritune.trainer.errors import InputError
from tritune.trainer.redact import redact, redact_tree

LOCK = "lock.json"
STATUS_SECONDS = 2.0
STOP_FILE = "STOP"  # `touch RUN/STOP` asks a run to stop, also where no signal arrives
INHERIT_SECONDS = 120.0
PACKAGES = ("torch", "transformers", "deepspeed", "triton", "safetensors", "tokenizers", "hydra-core", "numpy")


class RunDir:
    """Rank 0's view of the run directory; other ranks write nothing here but their shards."""

    def __init__(self, path: Path, overrides: list[str] | None = None) -> None:
        self.path, self.overrides = path, overrides or []
        self._lock: IO[str] | None = None
        self._logs: dict[str, IO[str]] = {}
        self._touched = 0.0
        self.save_seconds: float | None = (
            None  # what the last checkpoint took; kept in the status from one start to the next
        )

    def acquire(self) -> None:
        """Take the directory for this process; the operating system lets go of it when the process dies, however.

        Raises:
            InputError: a live run has it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("a+")
        except OSError as error:
            rule = f"the directory cannot be written ({error.strerror})"
            raise InputError(f"run.dir={self.path}", rule, "Give another run.dir") from None
        job = os.environ.get("SLURM_JOB_ID")
        owner = self._take(lock)
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        said = json.loads(owner or "{}")
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
        self.save_seconds = (self.read_json("status.json") or {}).get("save_seconds")

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

    def identity_changes(self, config: Config) -> list[str]:
        """Which keys that define the run differ from those it was started with, as `key: old -> new`."""
        path = self.path / "config.yaml"
        if not path.is_file():
            return []
        old, new = yaml.safe_load(path.read_text()), redact_tree(to_dict(config))  # as it was written
        changes = []
        for key in IDENTITY:
            for name, before, after in _differences(_select(old, key), _select(new, key), key):
                changes.append(f"{name}: {before} -> {after}")
        return changes

    def write_config(self, config: Config) -> None:
        replace_file(self.path / "config.yaml", yaml.safe_dump(redact_tree(to_dict(config)), sort_keys=False))

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
        self.write_json(
            "status.json",
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
        status = self.read_json("status.json")
        if status is None:
            self.write_status("failed", 0, exit_code, culprit)
        else:
            refusal = {"exit_code": exit_code, "culprit": culprit, "time": now()}
            self.write_json("status.json", {**status, "refused": refusal})

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

    def read_json(self, name: str) -> Any | None:
        path = self.path / name
        return json.loads(path.read_text()) if path.is_file() else None

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

    def cut_logs(self, step: int, evaluated: int) -> None:
        """Keep rows up to `step`, evaluations up to `evaluated`: what a killed run logged after its checkpoint comes again."""
        for name, last in (("metrics.jsonl", step), ("evaluations.jsonl", evaluated)):
            path = self.path / name
            if path.is_file():
                lines = path.read_text().splitlines(True)
                replace_file(path, "".join(line for line in lines if _step_of(line) <= last))

    def close(self) -> None:
        for log in self._logs.values():
            log.close()
        if self._lock is not None:
            self._lock.close()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def write_whole_json(path: Path, content: Any) -> None:
    """Write JSON without secrets and without NaN (null instead), whole or not at all."""
    replace_file(path, json.dumps(_finite(redact_tree(content)), indent=1, allow_nan=False) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a crash, sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def run_path(config: Config, overrides: list[str]) -> Path:
    """`run.dir`, or a new directory named after the experiment and the time."""
    experiment = next((o.partition("=")[2] for o in overrides if o.startswith("experiment=")), "run")
    started = time.strftime("%Y%m%d-%H%M%S")
    return Path(config.run.dir or f"runs/{experiment}-{started}")


def export_path(config: Config, run: Path) -> Path:
    """Where the result goes: `export.dir`, or `export/` in the run directory."""
    return Path(config.export.dir) if config.export.dir else run / "export"


def _step_of(line: str) -> float:
    """The row's step; a line that a kill cut short is beyond every step."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except (ValueError, LookupError, TypeError):
        return float("inf")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value - value != 0.0 else value


def _select(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _differences(old: Any, new: Any, name: str) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for k in sorted({*old, *new}) for d in _differences(old.get(k), new.get(k), f"{name}.{k}")]
    return [] if old == new else [(name, old, new)]


def now() -> str:
    """The time of this machine with its offset from UTC, as it is written everywhere: 2026-01-31T12:00:00+0000."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
