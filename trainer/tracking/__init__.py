"""Trackers: W&B and TensorBoard behind one small Protocol. Both are off by default and then not even imported.

A tracker never stops the training: what it fails in is said once, and then it is quiet. `metrics.jsonl` has the figures
all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tritune.trainer.config import TrackingConfig
from tritune.trainer.errors import InputError, reason
from tritune.trainer.redact import redact

Say = Callable[[str], None]


class Sink(Protocol):
    """Where figures go, by names such as `train/loss` or `test/tuned/accuracy`."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a step. A step may come several times, and again after a crash."""

    def summary(self, figures: dict[str, float]) -> None:
        """Figures of the whole run."""

    def close(self, exit_code: int) -> None:
        """Write what is left; `exit_code` is the run's."""


def require_trackers(config: TrackingConfig) -> None:
    """Refuse a tracker whose package is absent, without importing any.

    Raises:
        InputError: the package is not installed.
    """
    for on, key, package in (
        (config.wandb, "tracking.wandb", "wandb"),
        (config.tensorboard, "tracking.tensorboard", "tensorboard"),
    ):
        if on and find_spec(package) is None:
            raise InputError(f"{key}=true", f"the package {package} is not installed", f"Run: pip install {package}")


def open_sinks(config: TrackingConfig, directory: Path, resolved: dict, state_step: int, say: Say) -> list[Sink]:
    """Open the trackers that the config turns on. To be called on rank 0 only, when the run directory is ready.

    Args:
        directory: the run directory; files go to `wandb/` and `tensorboard/` in it.
        resolved: the whole config as plain dicts, redacted.
        state_step: the step from which training goes on; 0 at the start.
        say: gets the lines for the user.

    Raises:
        InputError: a tracker's package is not installed.
    """
    require_trackers(config)
    sinks: list[Sink] = []
    if config.wandb:
        from tritune.trainer.tracking.wandb import open_wandb

        sinks += _opened("W&B", lambda: open_wandb(config, directory, resolved, say), say)
    if config.tensorboard:
        from tritune.trainer.tracking.tensorboard import TensorBoardSink

        sinks += _opened("TensorBoard", lambda: TensorBoardSink(directory, resolved, state_step), say)
    return sinks


def under(prefix: str, figures: Mapping[str, Any]) -> dict[str, float]:
    """`{"loss": 1.0}` -> `{"train/loss": 1.0}`; what is no number, and the step itself, is left out.

    Nested figures are named by their path: `{"test": {"base": {"accuracy": 0.5}}}` -> `test/base/accuracy`.
    """
    flat: dict[str, float] = {}
    for key, value in figures.items():
        name = f"{prefix}/{key}" if prefix else key
        if isinstance(value, Mapping):
            flat |= under(name, value)
        elif isinstance(value, int | float) and key != "step":
            flat[name] = value
    return flat


def _opened(name: str, make: Callable[[], Sink | None], say: Say) -> list[Sink]:
    try:
        sink = make()
    except Exception as error:  # noqa: BLE001  whatever a tracker does, training goes on, and the user is told
        _give_up(name, error, say)
        return []
    return [] if sink is None else [Guarded(name, sink, say)]


def _give_up(name: str, error: Exception, say: Say) -> None:
    say(
        redact(f"tracking  {name} failed ({reason(error)}); training goes on without it, metrics.jsonl has all figures")
    )


class Guarded:
    """A sink that says its first error and is quiet from then on."""

    def __init__(self, name: str, sink: Sink, say: Say) -> None:
        self.name, self.sink, self.say = name, sink, say
        self.failure: Exception | None = None
        self.closed = False

    def log(self, step: int, figures: dict[str, float]) -> None:
        if self.failure is None:
            self._try(lambda: self.sink.log(step, figures))

    def summary(self, figures: dict[str, float]) -> None:
        if self.failure is None:
            self._try(lambda: self.sink.summary(figures))

    def close(self, exit_code: int) -> None:
        """Also after a failure: what the sink still holds, a process or a thread, must not trouble the run's end."""
        if not self.closed:
            self.closed = True
            self._try(lambda: self.sink.close(exit_code))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  see _opened
            if self.failure is None:
                _give_up(self.name, error, self.say)
            elif reason(error) != reason(self.failure):
                self.say(redact(f"tracking  {self.name} could not be closed either ({reason(error)})"))
            self.failure = error
