"""Products whose result has another dtype than a factor, without a copy in between."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a @ b, or total += a @ b where this is not the `first`; `total` float32 (or the factors' own dtype).

    Rounding the running sum to bfloat16 after every chunk loses gradients (Liger issue 512, OLMo-core issue 370).
    """
    beta = 0.0 if first else 1.0
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda and torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:  # CPU and ROCm have no product that widens
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def scaled(x: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return x * factor in `dtype`, a new tensor: the product is made in the wider dtype and rounded once.

    A factor without dimensions would not widen the product: on a GPU it would itself be rounded to x's dtype, which puts
    a whole gradient off by up to 0.2 % in bfloat16.
    """
    if x is None:
        return None
    factor = factor.reshape(1) if factor.ndim == 0 else factor
    return torch.mul(x, factor, out=torch.empty(x.shape, dtype=dtype, device=x.device))
