"""Which implementation computes each kernel: Triton's on a GPU, PyTorch's elsewhere; chosen once, with a reason for the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tritune.kernels.language import why_not

KERNELS = ("linear_cross_entropy", "lora", "rms_norm", "rope", "glu")


@dataclass(frozen=True)
class Choice:
    """`triton` or `reference`, and why."""

    implementation: str
    reason: str


def choose(
    name: str, overrides: Mapping[str, str], device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> dict[str, Choice]:
    """Return the implementation of each of `KERNELS`.

    Args:
        name: for all: `auto`, `triton` or `reference`.
        overrides: for some, by name; `auto` follows `name`.
        device, dtype: what the model computes on and in.
        compiled: whether torch.compile writes the layers' kernels itself.

    Raises:
        ValueError: `triton` where it cannot run.
    """
    reason = why_not(device, dtype)
    if reason is None and compiled:
        reason = "torch.compile would stop at each of them"
    chosen = {}
    for kernel in KERNELS:
        wanted = overrides.get(kernel, "auto")
        key = "kernels" if wanted == "auto" else f"kernels.{kernel}"
        wanted = name if wanted == "auto" else wanted
        if wanted == "triton" and reason is not None:
            raise ValueError(f"{key}=triton: {reason}. Use auto, which takes the reference here")
        if wanted == "triton" or (wanted == "auto" and reason is None and device.type == "cuda"):
            chosen[kernel] = Choice("triton", "asked for" if wanted == "triton" else f"on {device.type}")
        else:
            chosen[kernel] = Choice(
                "reference", "asked for" if wanted == "reference" else reason or f"on {device.type}"
            )
    return chosen


def announce(choices: Mapping[str, Choice]) -> list[str]:
    """Lines for the log: each implementation with its reason and the kernels it has."""
    groups: dict[Choice, list[str]] = {}
    for kernel, choice in choices.items():
        groups.setdefault(choice, []).append(kernel)
    return [f"{c.implementation} ({c.reason}): {', '.join(kernels)}" for c, kernels in groups.items()]
