"""Gated linear units (Shazeer 2020, arXiv 2002.05202): h = act(gate) * up, with SiLU (SwiGLU) or GELU by tanh (GeGLU).

    SiLU(g) = g s(g)                    SiLU'(g) = s + g s (1 - s)                          s = sigmoid
    GELU(g) = g s(2u)                   GELU'(g) = s + g s (1 - s) 2 u'                     u = sqrt(2 / pi) (g + 0.044715 g^3)

(0.5 (1 + tanh u) = s(2u); Hendrycks and Gimpel 2016, arXiv 1606.08415.) Float32 between one rounding on load and one on store.
Backward can write h again, for whoever needs it there and did not keep it. Shape suffixes: M rows, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, silu
from tritune.kernels.language import cdiv, jit, next_power_of_2, require_runs, rows_of, rows_per_program, tl

ACTIVATIONS = ("silu", "gelu_tanh")
BLOCK = 1024
TILE = 4096


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `glu`; float32 or wider between one rounding on load and one on store."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    gate_wide = gate.to(wide)
    act = silu(gate_wide) if activation == "silu" else gelu(gate_wide, approximate="tanh")
    return (act * up.to(wide)).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up; see `glu`."""
    return glu(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """GELU(gate) * up, GELU in its tanh form; see `glu`."""
    return glu(gate, up, "gelu_tanh")


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up, [..., F], in their dtype.

    Args:
        gate, up: float32, float16 or bfloat16, of one shape; rows may lie apart (two halves of one projection).
        activation: one of `ACTIVATIONS`.

    Raises:
        ValueError: no kernel can take these, or the activation is another.
    """
    return _Glu.apply(gate, up, activation)  # type: ignore[misc,return-value]


@jit
def _activate(gate, GELU: tl.constexpr):
    """Return act(gate) and act'(gate)."""
    if GELU:
        square = gate * gate
        slope = 2.0 * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * square)
        v = 2.0 * 0.7978845608028654 * gate * (1.0 + 0.044715 * square)
    else:
        slope = 1.0
        v = gate
    t = tl.exp(-tl.abs(v))  # at most 1; and s and 1 - s without a difference, which would cancel
    near, far = 1.0 / (1.0 + t), t / (1.0 + t)
    sigmoid = tl.where(v > 0.0, near, far)
    act = gate * sigmoid
    return act, sigmoid + act * tl.where(v > 0.0, far, near) * slope


@jit
def _forward(
    gate_ptr, up_ptr, h_ptr, gate_stride, up_stride, num_rows, width,
    GELU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < num_rows)[:, None] & (cols < width)[None, :]
    gate = tl.load(gate_ptr + rows[:, None] * gate_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows[:, None] * up_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    act, _ = _activate(gate, GELU)
    tl.store(h_ptr + rows[:, None] * width + cols[None, :], (act * up).to(h_ptr.dtype.element_ty), mask=inside)


@jit
def _backward(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, dh_stride, gate_stride, up_stride, out_stride, num_rows, width,
    EMIT: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < num_rows)[:, None] & (cols < width)[None, :]
    dh = tl.load(dh_ptr + rows[:, None] * dh_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows[:, None] * gate_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows[:, None] * up_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    act, slope = _activate(gate, GELU)
    out = rows[:, None] * out_stride + cols[None, :]
    tl.store(dgate_ptr + out, (dh * up * slope).to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + out, (dh * act).to(dup_ptr.dtype.element_ty), mask=inside)
    if EMIT:
        tl.store(h_ptr + rows[:, None] * width + cols[None, :], (act * up).to(h_ptr.dtype.element_ty), mask=inside)


def _grid(num_rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    cols = min(next_power_of_2(width), BLOCK)
    rows = rows_per_program(cols, TILE, num_rows)
    return (cdiv(num_rows, rows), cdiv(width, cols)), {"ROWS": rows, "COLS": cols, "num_warps": 8}


def glu_forward(gate_MF: Tensor, up_MF: Tensor, activation: str) -> Tensor:
    """`glu` of two matrices without a graph, for nodes that have their own."""
    require_runs(gate_MF)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation {activation!r}: the kernel has {' and '.join(ACTIVATIONS)}. Use the model's own code"
        )
    num_rows, width = gate_MF.shape
    h = torch.empty(num_rows, width, dtype=gate_MF.dtype, device=gate_MF.device)
    if h.numel():
        grid, tile = _grid(num_rows, width)
        _forward[grid](
            gate_MF, up_MF, h, gate_MF.stride(0), up_MF.stride(0), num_rows, width, GELU=activation != "silu", **tile
        )
    return h


def glu_backward(
    dh_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, activation: str, emit: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return d gate beside d up, [M, 2F], and, with `emit`, h again."""
    num_rows, width = gate_MF.shape
    both = torch.empty(num_rows, 2 * width, dtype=gate_MF.dtype, device=gate_MF.device)
    dgate, dup = both[:, :width], both[:, width:]
    h = torch.empty(num_rows, width, dtype=gate_MF.dtype, device=gate_MF.device) if emit else None
    if both.numel():
        grid, tile = _grid(num_rows, width)
        _backward[grid](
            dh_MF, gate_MF, up_MF, dgate, dup, h, dh_MF.stride(0), gate_MF.stride(0), up_MF.stride(0), 2 * width, num_rows,
            width, EMIT=emit, GELU=activation != "silu", **tile,
        )  # fmt: skip
    return both, h


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        flat_gate, flat_up = rows_of(gate), rows_of(up)
        ctx.save_for_backward(flat_gate, flat_up)
        ctx.activation, ctx.shape = activation, gate.shape
        return glu_forward(flat_gate, flat_up, activation).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        both, _ = glu_backward(rows_of(dh), gate, up, ctx.activation)
        dgate, dup = both.chunk(2, dim=-1)
        return dgate.reshape(ctx.shape), dup.reshape(ctx.shape), None
