"""Matrix products whose sums outlive one call: the result stays in float32 however narrow the factors are."""

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
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:  # CPU has no product that widens
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)
