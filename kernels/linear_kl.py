"""Kullback-Leibler divergence of a student's next-token distribution from a teacher's, neither's logits stored whole.

    KL_i = sum_j p_ij (log p_ij - log q_ij)        q = softmax(x W^T / T), p = softmax(u U^T / T)
    d KL / d student's logits = (q - p) / T

(Hinton et al. 2015, arXiv 1503.02531; the factor T^2 is the caller's.) Two slabs of a chunk of tokens by cuBLAS, one kernel
that reads both twice and writes the gradient over the student's. Each term of the sum is small where the two are close (the
sums of its halves are not, and would cancel), and q - p is taken in float32, because in bfloat16 it loses what a student
close to its teacher still has to learn. Gradients as in `linear_cross_entropy`.

Shape suffixes: M tokens, H and G the hidden sizes of student and teacher, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from tritune.kernels.cross_entropy import fold
from tritune.kernels.language import cdiv, jit, next_power_of_2, require_runs, rows_per_program, tl
from tritune.kernels.linear_cross_entropy import CHUNKS, chunk_of
from tritune.kernels.products import accumulate, scaled

BLOCK = 2048


def linear_kl_reference(
    hidden_MH: Tensor, weight_VH: Tensor, teacher_MG: Tensor, teacher_weight_VG: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return KL(teacher || student) of each token, [M], in float32 or wider, with the logits whole."""
    wide = torch.promote_types(hidden_MH.dtype, torch.float32)
    student = torch.log_softmax((hidden_MH @ weight_VH.t()).to(wide) / temperature, dim=-1)
    teacher = torch.log_softmax((teacher_MG @ teacher_weight_VG.t()).to(wide) / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def linear_kl(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    teacher_MG: Tensor,
    teacher_weight_VG: Tensor,
    *,
    temperature: float = 1.0,
    reduction: Literal["none", "sum"] = "none",
    weights_M: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return KL(teacher || student), [M] or [] summed with `weights_M`, in float32. The teacher gets no gradient.

    Raises:
        ValueError: no kernel can take these, or per-token losses are asked for a student's head that trains: what is
            done with them must be known in forward.
    """
    require_runs(hidden_MH)
    wants = tuple(torch.is_grad_enabled() and t.requires_grad for t in (hidden_MH, weight_VH))
    if reduction == "none" and wants[1]:
        raise ValueError("reduction='none' with a head that trains: give weights_M and reduction='sum'")
    chunk = min(chunk_tokens or CHUNKS[0], chunk_of(2 * weight_VH.shape[0], hidden_MH.dtype))
    weights_M = None if weights_M is None else weights_M.detach().float().contiguous()
    kl = _LinearKL.apply(  # type: ignore[misc]
        hidden_MH, weight_VH, teacher_MG.detach(), teacher_weight_VG.detach(), weights_M, temperature, chunk, wants
    )
    return kl.sum() if reduction == "sum" else kl


@jit
def _kl(
    student_ptr, teacher_ptr, weights_ptr, kl_ptr, student_stride, teacher_stride, num_rows, classes, inverse,
    WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    inverse = tl.cast(inverse, tl.float32)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    weight = inside.to(tl.float32)
    if WEIGHTED:
        weight = tl.load(weights_ptr + rows, mask=inside, other=0.0)
    student_row = student_ptr + rows[:, None] * student_stride
    teacher_row = teacher_ptr + rows[:, None] * teacher_stride
    most_s = tl.full((ROWS,), -float("inf"), tl.float32)
    most_t = tl.full((ROWS,), -float("inf"), tl.float32)
    total_s = tl.zeros((ROWS,), tl.float32)
    total_t = tl.zeros((ROWS,), tl.float32)
    for start in range(0, classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (cols < classes)[None, :]
        real = (cols < classes)[None, :]
        s = tl.load(student_row + cols[None, :], mask=mask, other=0.0).to(tl.float32) * inverse
        t = tl.load(teacher_row + cols[None, :], mask=mask, other=0.0).to(tl.float32) * inverse
        s, t = tl.where(real, s, -float("inf")), tl.where(real, t, -float("inf"))
        most_s, total_s = fold(most_s, total_s, s)
        most_t, total_t = fold(most_t, total_t, t)
    log_s = tl.log(total_s)
    log_t = tl.log(total_t)
    kl = tl.zeros((ROWS,), tl.float32)
    blocks = tl.cdiv(classes, BLOCK)
    for back in range(0, blocks):  # from the end, which the cache still has
        cols = (blocks - 1 - back) * BLOCK + tl.arange(0, BLOCK)
        mask = inside[:, None] & (cols < classes)[None, :]
        s = tl.load(student_row + cols[None, :], mask=mask, other=0.0).to(tl.float32) * inverse
        t = tl.load(teacher_row + cols[None, :], mask=mask, other=0.0).to(tl.float32) * inverse
        s = s - most_s[:, None]
        t = t - most_t[:, None]
        p = tl.exp(t) / total_t[:, None]
        # In this order: most + log would be rounded at the size of the logits.
        kl += tl.sum(tl.where(mask & (p > 0.0), p * ((t - log_t[:, None]) - (s - log_s[:, None])), 0.0), axis=1)
        if GRADIENT:
            gradient = (tl.exp(s) / total_s[:, None] - p) * (weight * inverse)[:, None]
            tl.store(student_row + cols[None, :], gradient.to(student_ptr.dtype.element_ty), mask=mask)
    tl.store(kl_ptr + rows, weight * kl, mask=inside)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher, teacher_weight, weights, temperature, chunk, wants):
        (num_tokens, width), vocabulary = hidden.shape, weight.shape[0]
        kl = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
        dx = torch.empty(num_tokens, width, dtype=hidden.dtype, device=hidden.device) if wants[0] else None
        new = torch.empty if num_tokens else torch.zeros
        dw = new(vocabulary, width, dtype=torch.float32, device=hidden.device) if wants[1] else None
        shape = (2, min(chunk, num_tokens), cdiv(vocabulary, 64) * 64)
        slabs = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)[..., :vocabulary]
        block = min(next_power_of_2(vocabulary), BLOCK)
        rows = rows_per_program(block, BLOCK, min(chunk, num_tokens))
        for start in range(0, num_tokens, chunk):
            stop = min(start + chunk, num_tokens)
            part, (logits, target) = hidden[start:stop], slabs[:, : stop - start]
            torch.mm(part, weight.t(), out=logits)
            torch.mm(teacher[start:stop], teacher_weight.t(), out=target)
            _kl[(cdiv(stop - start, rows),)](
                logits, target, None if weights is None else weights[start:stop], kl[start:stop], logits.stride(0),
                target.stride(0), stop - start, vocabulary, 1.0 / temperature, WEIGHTED=weights is not None,
                GRADIENT=any(wants), ROWS=rows, BLOCK=block, num_warps=8,
            )  # fmt: skip
            if dx is not None:
                torch.mm(logits, weight, out=dx[start:stop])
            if dw is not None:
                accumulate(dw, logits.t(), part, first=start == 0)
        ctx.save_for_backward(dx, dw)
        ctx.dtype = weight.dtype
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        dx, dw = ctx.saved_tensors
        # A head that trains is only let in summed: upstream is one number, M times.
        once = upstream[:1] if len(upstream) else upstream.new_zeros(1)
        return scaled(dx, upstream[:, None], ctx.dtype), scaled(dw, once, ctx.dtype), None, None, None, None, None, None
