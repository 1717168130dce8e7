"""Triton where there is one. Importing this touches no device and works on platforms that have none.

`TRITON_INTERPRET=1`, set before the first import, runs every kernel on CPU in NumPy: slow, and silently wrong in bfloat16
(Triton issues 11584 and 11585), so it takes float32 and float16 only. No kernel here is autotuned: tiles follow from shapes,
because another tile is another order of sums, and a restart must repeat the last one's bits.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheels for this platform: the references compute
    triton = tl = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)

# A program has up to so many times its rows. One costs the interpreter milliseconds, whatever its size; tests of the kernels
# themselves set it to 1, and so run the tiles that a GPU runs.
span = 32 if INTERPRETED else 1


# Arguments that count rows. Specialised on (by 1, by multiples of 16), they would have a rank compile in the middle of a
# run, when its rows first number so, while the others wait for it.
COUNTS = ("num_rows", "num_tokens", "tiles", "split_tokens", "length")


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function as it is where there is no Triton (nothing calls it then)."""
    if triton is None:
        return function
    counts = [name for name in inspect.signature(function).parameters if name in COUNTS]
    return triton.jit(function, do_not_specialize=counts)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why no Triton kernel can run on `dtype` tensors of `device`; None where they can."""
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda" and not INTERPRETED:
        return f"Triton does not run on {device.type}"
    if dtype not in DTYPES:
        where = "Triton's interpreter" if INTERPRETED else "kernels"
        return f"{where} would be wrong in {str(dtype).removeprefix('torch.')}"
    return None


def require_runs(x: Tensor) -> None:
    """Raise unless the kernels can take `x`.

    Raises:
        ValueError: no Triton, no such device, not the current one, or a dtype that they do not compute in.
    """
    reason = why_not(x.device, x.dtype)
    if reason is None and x.is_cuda and x.device.index != torch.cuda.current_device():
        reason = f"Triton launches on the current device, cuda:{torch.cuda.current_device()}"
    if reason is not None:
        raise ValueError(f"a tensor of {x.dtype} on {x.device}: {reason}. Use the kernel's `*_reference`")


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def spanned(rows: int, num_rows: int) -> int:
    """`rows` of a program, or, interpreted, up to `span` times as many where there are so many."""
    most = rows * span
    while rows < min(num_rows, most):
        rows *= 2
    return rows


def rows_per_program(block: int, elements: int, num_rows: int) -> int:
    """Rows of a tile of `block` columns and about so many elements: one long row, or several short ones."""
    return spanned(max(1, min(32, elements // block)), num_rows)


def row_tile(width: int, num_rows: int) -> tuple[int, int, int]:
    """Return (rows, block, warps) for a tile of whole rows of `width` elements."""
    block = next_power_of_2(width)
    rows = rows_per_program(block, 4096, num_rows)
    return rows, block, max(4, min(32, rows * block // 512))


def rows_of(x: Tensor) -> Tensor:
    """`x` [..., D] as [M, D] with elements of a row side by side; a copy only where no view is."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()
