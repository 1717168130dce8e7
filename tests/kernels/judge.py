"""The rule for kernels: an error of at most twice that of the plain formula in the same dtype, both against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter is wrong in bfloat16 (Triton issues 11584 and 11585): it is tested on GPUs alone.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, grad: bool = True, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype).requires_grad_(grad)


def evaluate(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs of `function`, then gradients of the inputs that want one, for fixed upstream gradients."""
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    upstream = [draw(*y.shape, seed=99 + i, grad=False).to(y.dtype) for i, y in enumerate(outputs)]
    wanted = [x for x in inputs if x.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, wanted, upstream)]


def widened(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad)


def require_twice(
    ours: Callable[..., Any], formula: Callable[..., Any], inputs: list[Tensor], units: float = 1.0
) -> list[Tensor]:
    """Hold `ours` to the rule, every output and every gradient; returns what it gave.

    The error is the root mean square over a tensor: the largest of a hundred errors is luck (over 300 draws of one LoRA
    group, the largest error in dX was 1.35 times the formula's in the mean and more than twice in 6 % of them), so it is
    only held to four times. Where the formula is exact or nearly so, as on one element, `units` in the last place of the
    largest value are the error that any rounding may make.
    """
    exact = evaluate(formula, [widened(x) for x in inputs])
    plain, kernel = evaluate(formula, inputs), evaluate(ours, inputs)
    for i, (truth, reference, result) in enumerate(zip(exact, plain, kernel, strict=True)):
        assert result.shape == truth.shape, i
        if not truth.numel():
            continue
        narrowest = result.dtype if result.dtype in (torch.float16, torch.bfloat16) else inputs[0].dtype
        unit = torch.finfo(narrowest).eps * truth.abs().max() * units
        theirs, error = (reference.double() - truth).abs(), (result.double() - truth).abs()
        for name, measure, factor in (("rms", _rms, 2.0), ("largest", torch.max, 4.0)):
            allowed = factor * torch.maximum(measure(theirs), unit)
            assert measure(error) <= allowed, f"result {i}: {name} error {measure(error):.2e}, allowed {allowed:.2e}"
    return kernel


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
