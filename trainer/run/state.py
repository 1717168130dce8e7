"""Where a run stands, and what is due at this step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tritune.trainer.errors import CheckpointError


@dataclass
class TrainState:
    """Everything a run needs besides tensors to go on exactly where it was.

    There is no generator state: every random number is a function of (seed, step, sample or micro-batch).

    Attributes:
        step: optimizer steps done.
        epoch, window: the cursor: which window of which epoch comes next.
        sources, used, left_out: of a stream: (passes, rows) read of each source before `window`, sequences that were taken from
            that window, and rows of all windows that could not be trained on.
        tokens, label_tokens: seen since the start, padding not counted.
        nonfinite: steps in a row whose update was refused.
        skipped: steps refused in all.
        evaluated: the step of the last validation.
        best, best_step: the best validation figure so far and where; None before the first evaluation.
        stale: evaluations since then.
        train_seconds: wall time of training, saving included, evaluation not.
    """

    step: int = 0
    epoch: int = 0
    window: int = 0
    sources: list[list[int]] = field(default_factory=list)
    used: int = 0
    left_out: int = 0
    tokens: int = 0
    label_tokens: int = 0
    nonfinite: int = 0
    skipped: int = 0
    evaluated: int = 0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    train_seconds: float = 0.0

    def advance(self, steps_per_epoch: int) -> None:
        """One optimizer step is done."""
        self.step += 1
        self.window += 1
        if self.window == steps_per_epoch:
            self.epoch, self.window = self.epoch + 1, 0

    def observe(self, value: float, higher_is_better: bool) -> bool:
        """Take in an evaluation; return whether it is the best so far. NaN never is."""
        better = self.best is None or (value > self.best if higher_is_better else value < self.best)
        if value == value and better:
            self.best, self.best_step, self.stale = value, self.step, 0
            return True
        self.stale += 1
        return False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def load_json(self, values: Any) -> None:
        """Take over what `to_json` gave.

        Raises:
            CheckpointError: other fields, values of other types, or such as no run has: another version wrote it, or nobody did.
        """
        kinds: dict[str, Any] = {
            "sources": list, "best": (float, int, type(None)), "best_step": (int, type(None)), "train_seconds": (float, int),
        }  # fmt: skip
        known = [f.name for f in fields(self)]
        if not isinstance(values, dict) or sorted(values) != sorted(known):
            raise CheckpointError(f"the saved state has other fields than {', '.join(known)}")
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, kinds.get(name, int)):
                raise CheckpointError(f"the saved state has {name}={value!r}")
        for name, value in values.items():
            if value is not None and not _possible(name, value, values):
                raise CheckpointError(f"the saved state has {name}={value!r}")
        for name, value in values.items():
            setattr(self, name, value)


MOST = 1 << 62  # nothing that is counted comes near it
PER_STEP = ("nonfinite", "skipped", "evaluated", "best_step", "stale")  # at most one comes with a step


def _possible(name: str, value: Any, values: dict[str, Any]) -> bool:
    """Whether a run can come to have a value, of the right type, beside the others."""
    if name == "sources":
        return all(
            isinstance(at, list) and len(at) == 2 and all(type(n) is int and 0 <= n < MOST for n in at) for at in value
        )
    if name == "best":
        return -math.inf < value < math.inf
    if name in PER_STEP or (name in ("epoch", "window") and not values["sources"]):  # a stream's windows are no steps
        return 0 <= value <= values["step"]
    return 0 <= value < MOST


@dataclass(frozen=True)
class Due:
    """When logging, evaluation and saving happen, in steps."""

    log_every: int
    eval_every: int
    save_every: int
    total_steps: int

    def log(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.total_steps

    def evaluate(self, step: int) -> bool:
        return step % self.eval_every == 0 or step == self.total_steps

    def save(self, step: int) -> bool:
        return step % self.save_every == 0 or step == self.total_steps
