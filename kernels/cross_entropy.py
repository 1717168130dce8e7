"""Cross entropy of rows of logits, and its gradient written over them.

For a row of logits l with target y, weight w, label smoothing e (Szegedy et al. 2015, arXiv 1512.00567), a z-loss c
(Chowdhery et al. 2022, arXiv 2204.02311), a scale s and a soft cap m (Gemma 2, arXiv 2408.00118):

    z = m tanh(s l / m), or s l            lse = log sum exp z
    loss = w (lse - (1 - e) z_y - e mean(z) + c lse^2)
    d loss / d z_j = w (softmax_j (1 + 2 c lse) - (1 - e) [j = y] - e / V)           d z / d l = s (1 - (z / m)^2)

The row is read twice, the second time from cache (a row of 128,256 in bfloat16 has 257 KB); all sums are float32, and the
target's gradient is rounded once, as a difference. Shape suffixes: M rows, V classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tritune.kernels.language import cdiv, jit, next_power_of_2, require_runs, rows_per_program, tl

BLOCK = 4096  # columns at a time, over 16 warps: few rows a multiprocessor, most of which stay in the L2 cache


@dataclass(frozen=True)
class LossOptions:
    """What is added to the plain loss.

    Attributes:
        label_smoothing: share of the target that is spread over all classes.
        z_loss: factor of lse^2.
        softcap: logits are bent to at most this; None: they are not.
        scale: logits are multiplied by this first.
        ignore_index: target of rows that count for nothing.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    scale: float = 1.0
    ignore_index: int = -100


PLAIN = LossOptions()


def cross_entropy_reference(
    logits_MV: Tensor, targets_M: Tensor, options: LossOptions = PLAIN, weights_M: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (loss, lse), both [M], in float32 or wider, the formula written out; zero for ignored rows."""
    z = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32)) * options.scale
    if options.softcap is not None:
        z = torch.tanh(z / options.softcap) * options.softcap
    kept = targets_M != options.ignore_index
    lse = torch.logsumexp(z, dim=-1)
    target = z.gather(1, targets_M.clamp(min=0)[:, None])[:, 0]
    e = options.label_smoothing
    loss = lse - (1.0 - e) * target + options.z_loss * lse.square()
    loss = loss - e * z.mean(dim=-1) if e else loss  # the mean may be -inf
    loss = loss if weights_M is None else loss * weights_M
    return torch.where(kept, loss, 0.0), torch.where(kept, lse, 0.0)


def cross_entropy_(
    logits_MV: Tensor, targets_M: Tensor, options: LossOptions, weights_M: Tensor | None, loss_M: Tensor, lse_M: Tensor,
    gradient: bool,
) -> None:  # fmt: skip
    """Write the loss and lse of each row, and with `gradient` d loss / d logits over the logits.

    Args:
        logits_MV: float32, float16 or bfloat16, rows contiguous.
        targets_M: int64.
        weights_M: float32 factors of the rows; they are in the gradient and in the loss.
        loss_M, lse_M: float32, written.

    Raises:
        ValueError: no kernel can take the logits.
    """
    require_runs(logits_MV)
    num_rows, classes = logits_MV.shape
    if not num_rows:
        return
    block = min(next_power_of_2(classes), BLOCK)
    rows = rows_per_program(block, BLOCK // 2, num_rows)
    # The gradient of a sum comes in as one number with a stride of 0.
    weights_M = None if weights_M is None else weights_M.contiguous()
    cap, smoothing = options.softcap or 1.0, options.label_smoothing
    _cross_entropy[(cdiv(num_rows, rows),)](
        logits_MV, targets_M.contiguous(), weights_M, loss_M, lse_M, logits_MV.stride(0), num_rows, classes, smoothing,
        options.z_loss, smoothing / classes, cap, 1.0 / cap, options.scale, options.ignore_index,
        CAPPED=options.softcap is not None, SMOOTH=smoothing != 0.0, WEIGHTED=weights_M is not None, GRADIENT=gradient,
        ROWS=rows, BLOCK=block, num_warps=16 if block == BLOCK else 4,
    )  # fmt: skip


@jit
def tanh(x):
    """No libdevice in the interpreter; the quotient of exponentials cancels near 0, where a series takes over."""
    t = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    square = x * x
    near = 1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0)))
    return tl.where(tl.abs(x) < 0.25, x * near, tl.where(x < 0.0, -far, far))


@jit
def fold(most, total, z):
    """Take columns `z` into the running largest value and sum of exponentials of each row (Milakov and Gimelshein 2018,
    arXiv 1805.02867); columns of -inf count for nothing, also where there were no others yet."""
    larger = tl.maximum(most, tl.max(z, axis=1))
    shift = tl.where(larger == -float("inf"), 0.0, larger)
    return larger, total * tl.exp(most - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)


@jit
def bend(logits, scale, cap, inverse_cap, CAPPED: tl.constexpr):
    """Logits as the loss sees them: z, and dz / d logits."""
    z = logits * scale
    slope = scale
    if CAPPED:
        bent = tanh(z * inverse_cap)
        z = bent * cap
        slope = scale * (1.0 - bent * bent)
    return z, slope


@jit
def _cross_entropy(
    logits_ptr, targets_ptr, weights_ptr, loss_ptr, lse_ptr, stride, num_rows, classes, smoothing, z_loss, share, cap,
    inverse_cap, scale, ignored,
    CAPPED: tl.constexpr, SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    smoothing, z_loss = tl.cast(smoothing, tl.float32), tl.cast(z_loss, tl.float32)
    cap, inverse_cap = tl.cast(cap, tl.float32), tl.cast(inverse_cap, tl.float32)
    scale, share = tl.cast(scale, tl.float32), tl.cast(share, tl.float32)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    target = tl.load(targets_ptr + rows, mask=inside, other=0)
    kept = inside & (target != ignored)
    weight = kept.to(tl.float32)
    if WEIGHTED:
        weight = tl.where(kept, tl.load(weights_ptr + rows, mask=inside, other=0.0), 0.0)
    base = logits_ptr + rows[:, None] * stride
    real = kept & (target >= 0) & (target < classes)
    at_target = tl.load(logits_ptr + rows * stride + target, mask=real, other=0.0).to(tl.float32)
    at_target, _slope = bend(at_target, scale, cap, inverse_cap, CAPPED)
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sum_z = tl.zeros((ROWS,), tl.float32)
    for start in range(0, classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = kept[:, None] & (cols < classes)[None, :]
        z, _ = bend(tl.load(base + cols[None, :], mask=mask, other=0.0).to(tl.float32), scale, cap, inverse_cap, CAPPED)
        if SMOOTH:
            sum_z += tl.sum(tl.where(mask, z, 0.0), axis=1)
        z = tl.where((cols < classes)[None, :], z, -float("inf"))
        most, total = fold(most, total, z)
    log_total = tl.log(total)
    lse = most + log_total
    # From differences of logits: lse is rounded at their own size, the loss is often far smaller.
    loss = log_total + (1.0 - smoothing) * (most - at_target) + z_loss * lse * lse
    if SMOOTH:
        loss += smoothing * most - share * sum_z
    loss = tl.where(real, loss, float("nan"))  # a target that is no class: the step is refused, not trained on
    tl.store(loss_ptr + rows, tl.where(kept, loss * weight, 0.0), mask=inside)
    tl.store(lse_ptr + rows, tl.where(kept, lse, 0.0), mask=inside)
    if GRADIENT:
        # Divided by the sum: in exp(z - lse) the rounding of lse is an error of every class alike.
        spread = weight * (1.0 + 2.0 * z_loss * lse) / total
        blocks = tl.cdiv(classes, BLOCK)
        for back in range(0, blocks):  # from the end, which the cache still has
            cols = (blocks - 1 - back) * BLOCK + tl.arange(0, BLOCK)
            mask = inside[:, None] & (cols < classes)[None, :]
            z, slope = bend(
                tl.load(base + cols[None, :], mask=mask, other=0.0).to(tl.float32), scale, cap, inverse_cap, CAPPED
            )
            gradient = tl.exp(z - most[:, None]) * spread[:, None]
            if SMOOTH:
                gradient -= (weight * share)[:, None]
            gradient -= tl.where(cols[None, :] == target[:, None], (weight * (1.0 - smoothing))[:, None], 0.0)
            gradient = tl.where(kept[:, None], gradient * slope, 0.0)  # an ignored row's logits may be anything
            tl.store(base + cols[None, :], gradient.to(logits_ptr.dtype.element_ty), mask=mask)
