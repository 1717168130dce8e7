"""What a step measured, summed over its micro-batches and ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tritune.trainer.batch import Batch
from tritune.trainer.objectives.loss import Loss, Objective, mean_loss
from tritune.trainer.parallel.mesh import DATA, Mesh


@dataclass(frozen=True)
class Measured:
    """An update as the host knows it: its loss, its tokens and label tokens over all ranks, the gradient's norm.

    Attributes:
        norm: None where only the backend's step computes it.
    """

    loss: float
    tokens: int
    label_tokens: int
    norm: float | None


class Meter:
    """Collects one optimizer step at a time; `step()` turns it into the figures of a row.

    Attributes:
        batch: checksum of the last step's rows over all ranks, in hexadecimal.
        by_source: float64 [2, sources], the last step's loss sums and counts over all ranks; None where there is one source.
        figures: the objective's own metrics of the last step, and the mean of each term where it has several.

    Where an objective makes several updates of a step's window, all of these are of the last update.

    The loss of a row is that of its step, not a mean since the last row: a run resumed between two rows logs the same.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._since, self._tokens = time.perf_counter(), 0
        self._sums: dict[str, Tensor] = {}
        self._num_tokens, self._num_labels, self._digest = 0, 0, 0
        self._by_source: Tensor | float = 0.0
        self._metrics: dict[str, Tensor] = {}
        self.by_source: Tensor | None = None
        self.figures: dict[str, float] = {}

    def start(self) -> None:
        """Training begins now: what went before does not count in the first rate."""
        self._since, self._tokens = time.perf_counter(), 0

    def add(self, loss: Loss, batch: Batch) -> None:
        _add(self._sums, {name: term.detach().double() for name, term in loss.terms.items()})
        _add(self._metrics, {name: torch.stack([x.detach().double() for x in p]) for name, p in loss.metrics.items()})
        if loss.by_source is not None:
            self._by_source = loss.by_source + self._by_source
        self._num_tokens += batch.num_tokens
        self._num_labels += batch.predict.numel() or int((batch.labels >= 0).sum())
        self._digest += batch.digest

    def step(self, objective: Objective, weights: Tensor, norm: Tensor | None) -> Measured:
        """What the update measured, over all ranks. Everything comes to the host in one copy: the device is waited for once.

        Args:
            weights: float64 [terms], over all ranks.
            norm: [], of the gradient.
        """
        counts = on_device([self._num_tokens, self._num_labels, self._digest], weights.device)
        apart = self._by_source.reshape(-1) if isinstance(self._by_source, Tensor) else counts[:0]
        terms = torch.stack([self._sums[name] for name in objective.coefficients])
        parts = [counts, terms, apart, *self._metrics.values()]
        known = [weights] if norm is None else [weights, norm.double().reshape(1)]
        total = read_on_host(torch.cat([self.mesh.sum(torch.cat(parts), over=DATA), *known]))
        _, sums, by_source, *others = total.split([len(part) for part in [*parts, *known]])
        metrics, weights = others[: len(self._metrics)], others[len(self._metrics)]
        loss = float(mean_loss(objective, sums, weights))
        self.by_source = by_source.reshape(2, -1) if len(apart) else None
        self.figures = figures_of(objective, sums, weights, dict(zip(self._metrics, metrics, strict=True)))
        tokens, labels, digest = (int(x) for x in total[:3])
        self.batch = f"{digest & 0xFFFFFFFF:08x}"  # checksums of 32 bits add up exactly in float64
        self._tokens += tokens
        self._sums, self._metrics, self._by_source = {}, {}, 0.0
        self._num_tokens, self._num_labels, self._digest = 0, 0, 0
        return Measured(loss, tokens, labels, None if norm is None else float(total[-1]))

    def rate(self) -> dict[str, Any]:
        """Tokens per second since the last call, over all ranks, and the device's peak memory."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        figures = {"tokens_per_second": round(self._tokens / seconds, 1), "memory_gib": round(peak_memory() / 2**30, 3)}
        self._since, self._tokens = now, 0
        return figures

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training."""
        self._since += seconds


def read_on_host(values: Tensor) -> Tensor:
    """The same on the CPU. This is where a step waits for the device, and the only place."""
    return values.cpu()


def on_device(values: list[int] | list[float], device: torch.device) -> Tensor:
    """Numbers as float64 on a device, which is not waited for: from pageable memory the copy would wait."""
    there = torch.tensor(values, dtype=torch.float64)
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there.to(device)


def _add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = value + sums[name] if name in sums else value


def figures_of(
    objective: Objective, sums: Tensor, weights: Tensor, metrics: dict[str, Tensor]
) -> dict[str, float]:  # fmt: skip
    """What is logged beside the loss: `loss_<term>` of several terms, and metrics by name; nothing of what has no weight."""
    found: dict[str, float] = {}
    if len(objective.coefficients) > 1:
        each = zip(objective.coefficients, sums.tolist(), weights.tolist(), strict=True)
        found |= {f"loss_{term}": total / weight for term, total, weight in each if weight}
    pairs = {name: pair.tolist() for name, pair in metrics.items()}
    return found | {name: total / count for name, (total, count) in pairs.items() if count}


def peak_memory() -> int:
    """Bytes: the most that was allocated on the GPU, or the process's largest resident size without one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
