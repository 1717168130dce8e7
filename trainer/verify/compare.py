"""Differences between runs, step by step, and the bounds they must keep."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tritune.trainer.checkpoint.manifest import is_flat, verify
from tritune.trainer.checkpoint.names import step_name
from tritune.trainer.checkpoint.tensors import load_tensors
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.shard import shard_of

LOSS, GRAD_NORM, PARAMETERS = 1e-5, 1e-4, 1e-5  # float32: relative, relative, absolute
GRAD_NORM_BF16 = 2.0**-8  # one rounding of a bf16 number, relative
GROUP = 50_000_000  # elements that are read at a time


@dataclass(frozen=True)
class StepDifference:
    """One step of a run beside the reference's. Parameters: the largest difference of an element; None where not saved."""

    step: int
    loss: float
    loss_difference: float
    grad_norm: float
    grad_norm_difference: float
    parameters: float | None
    same_batch: bool
    holds: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def compare_float32(run: Path, reference: Path) -> list[StepDifference]:
    """Hold every step to the float32 bounds, and the last one's parameters."""
    ours, theirs = read_rows(run), read_rows(reference)
    steps = []
    for a, b in zip(ours, theirs, strict=True):
        parameters = parameter_difference(run, reference, a["step"])
        last = a["step"] == theirs[-1]["step"]
        close = _relative(a["loss"], b["loss"]) <= LOSS and _relative(a["grad_norm"], b["grad_norm"]) <= GRAD_NORM
        kept = not last or (parameters is not None and parameters <= PARAMETERS)
        steps.append(_step(a, b, parameters, close and kept and a["batch"] == b["batch"]))
    return steps


def compare_bfloat16(run: Path, others: list[Path], bounds: list[tuple[float, float]]) -> list[StepDifference]:
    """Hold every step, beside each of the other runs, to the reference's own spread; the worst other is reported.

    Args:
        others: the reference first.
        bounds: of the loss and of the gradient norm, a step.
    """
    rows = [read_rows(other) for other in others]
    steps = []
    for i, a in enumerate(read_rows(run)):
        worst = max((r[i] for r in rows), key=lambda b: abs(a["loss"] - b["loss"]))
        worst_norm = max((r[i] for r in rows), key=lambda b: abs(a["grad_norm"] - b["grad_norm"]))
        loss, norm = bounds[i]
        close = abs(a["loss"] - worst["loss"]) <= loss and abs(a["grad_norm"] - worst_norm["grad_norm"]) <= norm
        beside = {**worst, "grad_norm": worst_norm["grad_norm"]}
        same = a["batch"] == rows[0][i]["batch"]
        steps.append(_step(a, beside, parameter_difference(run, others[0], a["step"]), close and same))
    return steps


def spread(reference: Path, orders: list[Path]) -> list[tuple[float, float]]:
    """Bounds of each step for bf16: twice the 95th percentile of how far random orders of the same micro-batches move the
    reference, plus 2^-8 of the value for the gradient norm.

    An order is also one of the terms of the gradient norm: a few bf16 gradients add up exactly in float32, in any order,
    and what then differs between backends is how the norm was rounded by which they clip.
    """
    base, others = read_rows(reference), [read_rows(order) for order in orders]
    bounds = []
    for i, row in enumerate(base):
        moved = {k: [abs(o[i][k] - row[k]) for o in others] for k in ("loss", "grad_norm")}
        bounds.append(
            (2 * _percentile(moved["loss"]), 2 * _percentile(moved["grad_norm"]) + GRAD_NORM_BF16 * row["grad_norm"])
        )
    return bounds


def parameter_difference(run: Path, reference: Path, step: int, prefix: str = "model.") -> float | None:
    """The largest absolute difference of an element of the tensors saved at `step`; None where one has no checkpoint."""
    places = [d / "checkpoints" / step_name(step) for d in (run, reference)]
    if not all(p.is_dir() for p in places):
        return None
    largest = 0.0
    for ours, theirs in zip(saved_tensors(places[0], prefix), saved_tensors(places[1], prefix), strict=True):
        for name in ours:
            difference = float((ours[name].double() - theirs[name].double()).abs().max()) if ours[name].numel() else 0.0
            largest = max(largest, difference if math.isfinite(difference) else math.inf)
    return largest


def bit_equal(run: Path, reference: Path, step: int) -> bool:
    """Whether all tensors saved at `step`, moments among them, are the same bits."""
    places = [d / "checkpoints" / step_name(step) for d in (run, reference)]
    pairs = zip(saved_tensors(places[0], ""), saved_tensors(places[1], ""), strict=True)
    return all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for a, b in pairs for n in a)


def saved_tensors(checkpoint: Path, prefix: str) -> Iterator[dict[str, Tensor]]:
    """Groups of a checkpoint's tensors, flat, by name."""
    manifest, alone = verify(checkpoint), World(0, 1, torch.device("cpu"))
    tensors, group, size = manifest["tensors"], {}, 0
    names = sorted(n for n in tensors if n.startswith(prefix))
    for i, name in enumerate(names):
        dtype = getattr(torch, tensors[name]["dtype"].removeprefix("torch."))
        group[name] = torch.empty(tensors[name]["shape"], dtype=dtype)
        size += group[name].numel()
        if size >= GROUP or i == len(names) - 1:
            shards, expected = {n: shard_of(t) for n, t in group.items()}, {n: tensors[n] for n in group}
            load_tensors(checkpoint, shards, expected, alone, is_flat(manifest))
            yield {n: tensor.view(-1) for n, tensor in group.items()}
            group, size = {}, 0


def _step(a: dict[str, Any], b: dict[str, Any], parameters: float | None, holds: bool) -> StepDifference:
    return StepDifference(
        a["step"], a["loss"], abs(a["loss"] - b["loss"]), a["grad_norm"], abs(a["grad_norm"] - b["grad_norm"]),
        parameters, a["batch"] == b["batch"], holds,
    )  # fmt: skip


def _relative(a: float, b: float) -> float:
    """NaN where either is not finite, which holds to no bound."""
    return abs(a - b) / max(abs(b), 1e-12)


def _percentile(values: list[float]) -> float:
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), 0.95))
