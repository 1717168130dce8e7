"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of queries and keys, in the half-split layout of GPT-NeoX.

    [y1, y2] = [x1 cos1 - x2 sin1, x2 cos2 + x1 sin2]        dx1 = dy1 cos1 + dy2 sin2, dx2 = dy2 cos2 - dy1 sin1

where x1, x2 are the halves of the first R of D features; the rest passes through (Phi-3's partial rotation). Angles come in
as cos and sin per token, so packed rows, scaled frequencies and several tables per model need nothing here.

Queries and keys are one launch, and cos and sin of a token are read once for all its heads. Shape suffixes: B rows, H heads
(queries), G heads (keys), T positions, D features of a head, R of them rotated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from tritune.kernels.language import cdiv, jit, next_power_of_2, require_runs, rows_per_program, tl

TILE = 4096  # elements of queries in a program


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `rope`; float32 or wider between one rounding on load and one on store."""
    rotated = cos.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)

    def rotate(x: Tensor) -> Tensor:
        z = x[..., :rotated].to(wide)
        turned = torch.cat((-z[..., rotated // 2 :], z[..., : rotated // 2]), dim=-1)
        return torch.cat(((z * cos + turned * sin).to(x.dtype), x[..., rotated:]), dim=-1)

    return rotate(q), rotate(k)


def rope(q_BHTD: Tensor, k_BGTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return both rotated, of the same shapes; in memory [B, T, heads, D], as attention kernels like them.

    Args:
        q_BHTD, k_BGTD: float32, float16 or bfloat16, any strides.
        cos, sin: [B or 1, T, R], R even and at most D; no gradient goes into them.

    Raises:
        ValueError: no kernel can take these, or R is odd or above D.
    """
    rotated = cos.shape[-1]
    if rotated % 2 or rotated > q_BHTD.shape[-1]:
        raise ValueError(
            f"cos of {rotated} features for heads of {q_BHTD.shape[-1]}: it must be even and no wider than a head"
        )
    return _Rope.apply(q_BHTD, k_BGTD, cos, sin)  # type: ignore[misc,return-value]


@jit
def _rotate(
    x_ptr, y_ptr, cos1, cos2, sin1, sin2, batch, tokens, valid, row, head, col, heads, positions, width, half,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """All heads of some tokens: x by its strides (row, position `tokens`, head, col), y contiguous [B, T, heads, D]."""
    h = tl.arange(0, HEADS).to(tl.int64)  # a head may lie T D elements from the next
    d = tl.arange(0, HALF)
    source = batch[:, None] * row + tokens[:, None] * positions + h[None, :] * head
    target = valid[:, None] * (heads * width) + h[None, :] * width
    token_inside = valid >= 0
    mask = token_inside[:, None, None] & (h < heads)[None, :, None] & (d < half)[None, None, :]
    first = source[:, :, None] + d[None, None, :] * col
    x1 = tl.load(x_ptr + first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + first + half * col, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    else:
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    place = y_ptr + target[:, :, None] + d[None, None, :]
    tl.store(place, y1.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(place + half, y2.to(y_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        r = tl.arange(0, REST)
        mask = token_inside[:, None, None] & (h < heads)[None, :, None] & (r < width - 2 * half)[None, None, :]
        rest = tl.load(x_ptr + source[:, :, None] + (r[None, None, :] + 2 * half) * col, mask=mask, other=0.0)
        tl.store(y_ptr + target[:, :, None] + 2 * half + r[None, None, :], rest, mask=mask)


@jit
def _rope(
    q_ptr, k_ptr, cos_ptr, sin_ptr, yq_ptr, yk_ptr, q_row, q_head, q_position, q_col, k_row, k_head, k_position, k_col,
    cos_row, num_tokens, length, q_heads, k_heads, width, half,
    TOKENS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = index < num_tokens
    batch, tokens = index // length, index % length
    d = tl.arange(0, HALF)
    angles = (batch * cos_row + tokens * (2 * half))[:, None] + d[None, :]
    mask = inside[:, None] & (d < half)[None, :]
    cos1 = tl.load(cos_ptr + angles, mask=mask, other=0.0).to(tl.float32)[:, None, :]
    cos2 = tl.load(cos_ptr + angles + half, mask=mask, other=0.0).to(tl.float32)[:, None, :]
    sin1 = tl.load(sin_ptr + angles, mask=mask, other=0.0).to(tl.float32)[:, None, :]
    sin2 = tl.load(sin_ptr + angles + half, mask=mask, other=0.0).to(tl.float32)[:, None, :]
    valid = tl.where(inside, index, -1)
    _rotate(q_ptr, yq_ptr, cos1, cos2, sin1, sin2, batch, tokens, valid, q_row, q_head, q_col, q_heads, q_position, width,
            half, Q_HEADS, HALF, REST, BACKWARD)  # fmt: skip
    _rotate(k_ptr, yk_ptr, cos1, cos2, sin1, sin2, batch, tokens, valid, k_row, k_head, k_col, k_heads, k_position, width,
            half, K_HEADS, HALF, REST, BACKWARD)  # fmt: skip


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    require_runs(q)
    (rows, q_heads, length, width), k_heads, rotated = q.shape, k.shape[1], cos.shape[-1]
    cos, sin = cos.contiguous(), sin.contiguous()
    yq = torch.empty(rows, length, q_heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    yk = torch.empty(rows, length, k_heads, width, dtype=k.dtype, device=k.device).transpose(1, 2)
    heads, half = next_power_of_2(q_heads), next_power_of_2(rotated // 2)
    tokens = rows_per_program(2 * heads * half, TILE, rows * length)
    if rows * length:
        _rope[(cdiv(rows * length, tokens),)](
            q, k, cos, sin, yq, yk, *q.stride(), *k.stride(), 0 if cos.shape[0] == 1 else length * rotated, rows * length,
            length, q_heads, k_heads, width, rotated // 2,
            TOKENS=tokens, Q_HEADS=heads, K_HEADS=next_power_of_2(k_heads), HALF=half,
            REST=next_power_of_2(width - rotated) if width > rotated else 0, BACKWARD=backward,
            num_warps=max(4, min(16, tokens * heads * half // 512)),
        )  # fmt: skip
    return yq, yk


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _launch(q, k, cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return *_launch(dq, dk, cos, sin, backward=True), None, None
