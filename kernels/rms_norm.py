"""Root mean square normalization (Zhang and Sennrich 2019, arXiv 1910.07467), with the residual's addition where wanted.

    r = 1 / sqrt(mean(x^2) + eps)        y = x r (w + offset)        offset: 0, or 1 for Gemma

With g = dy (w + offset): dx = r (g - x r^2 mean(g x)), dw = sum over rows of dy x r. Everything is float32 between one
rounding on load and one on store; transformers' Llama rounds x r as well, before it multiplies.

A row is read once in forward and once in backward. The weight's gradient, where it trains, is summed per program in float32
and then over programs: no atomics, so the bits do not depend on timing. Shape suffixes: M rows, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from tritune.kernels.language import cdiv, jit, require_runs, row_tile, rows_of, tl

MAX_BYTES = 32768  # of a row, which is one tile: wider, it no longer fits the registers; half where the weight trains
PROGRAMS = 512  # of backward where the weight trains: enough for every chip, and the same on every chip


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Return the norm of `x` [..., D] in its own dtype, computed in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide)
    z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)
    return (z * (weight_D.to(wide) + offset)).to(x.dtype)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Return the norm of `x` [..., D], any leading shape and strides, in its own dtype.

    Args:
        x: float32, float16 or bfloat16.
        weight_D: any of these; its gradient, where it trains, is summed in float32.
        offset: added to the weight.

    Raises:
        ValueError: no kernel can take `x`, or a row has more than `MAX_BYTES`, or than half of it where the weight trains.
    """
    y, _ = _RmsNorm.apply(x, None, weight_D, eps, offset)  # type: ignore[misc]
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return (norm of x + residual, x + residual), both [..., D]; the sum is rounded to its dtype before it is normed."""
    y, total = _RmsNorm.apply(x, residual, weight_D, eps, offset)  # type: ignore[misc]
    return y, total


@jit
def _forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, scale_ptr, x_stride, residual_stride, num_rows, width, eps, offset,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (cols < width)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    flat = rows[:, None] * width + cols[None, :]
    if RESIDUAL:
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + cols[None, :], mask=inside, other=0.0)
        total = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + flat, total, mask=inside)
        x = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + tl.cast(eps, tl.float32))
    tl.store(scale_ptr + rows, scale, mask=rows < num_rows)
    weight = tl.load(weight_ptr + cols, mask=cols < width, other=0.0).to(tl.float32) + tl.cast(offset, tl.float32)
    y = x * scale[:, None] * weight[None, :]
    tl.store(y_ptr + flat, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _backward(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, scale_ptr, dx_ptr, dweight_ptr, dy_stride, dtotal_stride, x_stride, num_rows,
    width, offset, tiles,
    RESIDUAL: tl.constexpr, TRAINS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for tile in range(0, tiles):
        rows = (tl.program_id(0).to(tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & (cols < width)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        z = x * scale
        if TRAINS:
            dweight += tl.sum(dy * z, axis=0)
        # Read again for each tile, from cache: kept over the loop it would not fit the registers beside its gradient.
        weight = tl.load(weight_ptr + cols, mask=cols < width, other=0.0).to(tl.float32) + tl.cast(offset, tl.float32)
        g = dy * weight[None, :]
        dx = scale * (g - z * (tl.sum(g * z, axis=1) / width)[:, None])
        if RESIDUAL:
            dtotal = tl.load(dtotal_ptr + rows[:, None] * dtotal_stride + cols[None, :], mask=inside, other=0.0)
            dx += dtotal.to(tl.float32)
        tl.store(dx_ptr + rows[:, None] * width + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if TRAINS:
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * width + cols, dweight, mask=cols < width)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset):
        require_runs(x)
        width = x.shape[-1]
        most = MAX_BYTES // 2 if weight.requires_grad else MAX_BYTES
        if width * x.element_size() > most:
            raise ValueError(f"rows of {width} {x.dtype}: the kernel takes {most} bytes. Use rms_norm_reference")
        flat, other = rows_of(x), None if residual is None else rows_of(residual)
        num_rows = flat.shape[0]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        total = None if other is None else torch.empty_like(y)
        scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        rows, block, warps = row_tile(width, num_rows)
        if num_rows:
            _forward[(cdiv(num_rows, rows),)](
                flat, other, weight, y, total, scale, flat.stride(0), 0 if other is None else other.stride(0), num_rows,
                width, eps, offset, RESIDUAL=other is not None, ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        # An output is saved as itself: a view of it would hold the node that holds the view, and nothing would free them.
        ctx.save_for_backward(flat if total is None else total, weight, scale)
        ctx.offset, ctx.shape = offset, x.shape
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtotal):
        x, weight, scale = ctx.saved_tensors
        x = x.view(-1, x.shape[-1])
        (num_rows, width), trains = x.shape, ctx.needs_input_grad[2]
        dy = rows_of(dy)
        dtotal = None if dtotal is None else rows_of(dtotal)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows, block, warps = row_tile(width, num_rows)
        count = cdiv(num_rows, rows)
        tiles = max(1, cdiv(count, PROGRAMS)) if trains else 1
        programs = cdiv(count, tiles)
        dweight = torch.empty(programs, width, dtype=torch.float32, device=x.device) if trains else None
        if num_rows:
            _backward[(programs,)](
                dy, dtotal, x, weight, scale, dx, dweight, dy.stride(0), 0 if dtotal is None else dtotal.stride(0),
                x.stride(0), num_rows, width, ctx.offset, tiles,
                RESIDUAL=dtotal is not None, TRAINS=trains, ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        dx = dx.view(ctx.shape)
        residual = dx if ctx.needs_input_grad[1] else None  # a sum's gradient is that of both its terms
        return dx, residual, None if dweight is None else dweight.sum(0).to(weight.dtype), None, None
