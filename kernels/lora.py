"""The LoRA update (Hu et al. 2021, arXiv 2106.09685) of linear layers that share their input, as one node of the graph.

    Y_i = X W_i^T + b_i + s_i S_i B_i^T                  S_i = drop_i(X) A_i^T
    dS_i = s_i dY_i B_i       dB_i = s_i dY_i^T S_i       dA_i = dS_i^T drop_i(X)       dX = sum_i dY_i W_i + drop_i'(dS_i A_i)

The large products are cuBLAS's. Grouping saves what autograd would add up per layer: X is read once for all A_i, dX is
accumulated by the products themselves. Without dropout the A_i are one matrix and all is cuBLAS; with it, three kernels draw
the masks again (`lora_dropout`). X, S and parameters are kept, no dropped X, no mask, no output. dY is taken in slices that
stay in the L2 cache between its two skinny products.

W_i is frozen; it may be NF4, and is then made dense for one product at a time. Shape suffixes: M tokens, K input and N output
features, R rank, C the ranks of a group beside one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from tritune.kernels.language import cdiv, require_runs, rows_of
from tritune.kernels.lora_dropout import add_dropped_x_gradient, dropped_a_gradient, dropped_down, padded_rank
from tritune.kernels.nf4 import Nf4Weight
from tritune.kernels.nf4_bytes import from_bytes
from tritune.kernels.products import accumulate
from tritune.kernels.swiglu import glu_backward, glu_forward

SLICE_BYTES = 24 * 2**20  # of dY: half of an H100's L2 cache
SLICE_TOKENS = 2048  # at least: below, launches cost more than the second read


def lora_update_reference(y: Tensor, x: Tensor, a_RK: Tensor, b_NR: Tensor, scaling: float) -> Tensor:
    """Return y + scaling * (x A^T) B^T.

    Args:
        y: [..., N], the frozen layer's output for the undropped input.
        x: [..., K], the input after dropout.
        a_RK, b_NR: the two factors.
    """
    return y + linear(linear(x, a_RK), b_NR * scaling)


class Projection(NamedTuple):
    """A frozen linear layer, with an update or without.

    Attributes:
        weight: [N, K], dense or NF4; or the bytes of the latter (`nf4_bytes`) with `shape`.
        bias: [N] or None; it may train.
        a, b: [R, K] and [N, R], or None.
        scaling: factor of the update.
        layer_id: the layer's number for dropout.
        shape: of a weight that is given as bytes: [N, K].
    """

    weight: Tensor | Nf4Weight
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    layer_id: int = 0
    shape: torch.Size | None = None


def lora_linear(
    x: Tensor, projections: Sequence[Projection], keys: Tensor | None = None, p: float = 0.0
) -> tuple[Tensor, ...]:
    """Return Y_i [..., N_i] of each projection of `x` [..., K].

    Args:
        keys: int32 [...], one per token, from `token_keys`; needed where p > 0.
        p: rate of dropping, in [0, 1), before each A_i.

    Raises:
        ValueError: no kernel can take `x`, a weight trains, or p > 0 without keys.
    """
    tensors, statics = _flatten(x, projections, keys, p)
    return _LoraLinear.apply(x, None if p == 0.0 else keys, p, statics, *tensors)  # type: ignore[misc,return-value]


def lora_mlp(
    x: Tensor,
    gate_up: Sequence[Projection],
    down: Projection,
    activation: str,
    keys: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """Return down(act(gate(x)) * up(x)), [..., N]; backward makes the hidden activation again instead of keeping it.

    Args:
        gate_up: two projections, or one whose outputs are both, gate first.
        activation: of `swiglu.ACTIVATIONS`. Others as of `lora_linear`.
    """
    tensors, statics = _flatten(x, [*gate_up, down], keys, p)
    return _LoraMlp.apply(x, None if p == 0.0 else keys, p, activation, statics, *tensors)  # type: ignore[misc,return-value]


def _flatten(x: Tensor, projections: Sequence[Projection], keys: Tensor | None, p: float):
    require_runs(x)
    if p and (keys is None or keys.numel() * x.shape[-1] != x.numel()):
        seen = None if keys is None else tuple(keys.shape)
        raise ValueError(f"dropout of {p} on an input {tuple(x.shape)} with keys {seen}: one key a token is needed")
    tensors: list[Tensor | None] = []
    statics = []
    for projection in projections:
        nf4 = projection.weight if isinstance(projection.weight, Nf4Weight) else projection.shape
        dense = projection.weight if isinstance(projection.weight, Tensor) else None
        if dense is not None and dense.requires_grad:
            raise ValueError(
                "a projection's weight requires a gradient: LoRA's base is frozen. Use the layers themselves"
            )
        tensors += [dense, projection.bias, projection.a, projection.b]
        statics.append((nf4, projection.scaling, projection.layer_id))
    return tensors, tuple(statics)


def _weight(nf4: Nf4Weight | torch.Size | None, tensor: Tensor | None) -> Any:
    """What a group multiplies by. Bytes are looked into anew in backward: an engine may have gathered them again."""
    if isinstance(nf4, torch.Size) and tensor is not None:
        return from_bytes(tensor, nf4)
    return tensor if nf4 is None else nf4


class _Group:
    """The arithmetic of projections that share an input, outside of autograd."""

    def __init__(
        self, statics: Sequence[Any], tensors: Sequence[Tensor | None], keys: Tensor | None, p: float, dtype
    ) -> None:
        self.weights = [_weight(s[0], tensors[4 * i]) for i, s in enumerate(statics)]
        self.biases = [tensors[4 * i + 1] for i in range(len(statics))]
        self.dtype, self.p, self.keys = dtype, p, None if keys is None else keys.reshape(-1)
        factors = [(tensors[4 * i + 2], tensors[4 * i + 3]) for i in range(len(statics))]
        self.updated = [i for i, (a, _) in enumerate(factors) if a is not None]
        self.b = {i: factors[i][1].to(dtype) for i in self.updated}  # type: ignore[union-attr]
        self.scaling = {i: statics[i][1] for i in self.updated}
        self.layer_ids = [statics[i][2] for i in self.updated]
        ranks = {i: self.b[i].shape[1] for i in self.updated}
        padded = padded_rank(list(ranks.values())) if p and ranks else 0
        places = {i: padded or cdiv(rank, 8) * 8 for i, rank in ranks.items()}  # 16 bytes at 16 bits: what cuBLAS likes
        self.columns: dict[int, slice] = {}  # of S that hold a projection's update
        stop = 0
        for i in self.updated:
            self.columns[i] = slice(stop, stop + ranks[i])
            stop += places[i]
        self.a: Tensor | None = None
        if len(ranks) == 1 and places == ranks:
            self.a = factors[self.updated[0]][0].to(dtype).contiguous()  # type: ignore[union-attr]
        elif ranks:
            width = factors[self.updated[0]][0].shape[1]  # type: ignore[union-attr]
            new = torch.empty if places == ranks else torch.zeros
            self.a = new(stop, width, dtype=dtype, device=self.b[self.updated[0]].device)
            for i in self.updated:
                self.a[self.columns[i]] = factors[i][0]  # type: ignore[assignment]

    def weight(self, i: int) -> Tensor:
        weight = self.weights[i]
        return weight.dequantize(self.dtype) if isinstance(weight, Nf4Weight) else weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Return the outputs and S."""
        outputs = []
        for i, bias in enumerate(self.biases):
            weight = self.weight(i).t()
            # With `out=`: selective checkpointing keeps what plain products return, and the update is added in place.
            y = torch.empty(x.shape[0], weight.shape[1], dtype=self.dtype, device=x.device)
            outputs.append(
                torch.mm(x, weight, out=y) if bias is None else torch.addmm(bias.to(self.dtype), x, weight, out=y)
            )
        if self.a is None:
            return outputs, None
        s = dropped_down(x, self.a, self.keys, self.layer_ids, self.p) if self.p else x @ self.a.t()  # type: ignore[arg-type]
        for i in self.updated:
            outputs[i].addmm_(s[:, self.columns[i]], self.b[i].t(), alpha=self.scaling[i])
        return outputs, s

    def factor_gradients(self, dys: list[Tensor], s: Tensor | None) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Return dS [M, C] and dB_i in float32."""
        if s is None:
            return None, {}
        ds = torch.zeros_like(s)  # its padding is read too
        gradients = {}
        for i in self.updated:
            dy, columns = dys[i], self.columns[i]
            num_tokens, width = dy.shape
            new = torch.empty if num_tokens else torch.zeros
            db = new(width, self.b[i].shape[1], dtype=torch.float32, device=dy.device)
            step = max(SLICE_TOKENS, SLICE_BYTES // (width * dy.element_size()) // 128 * 128)
            for start in range(0, num_tokens, step):
                part, out = dy[start : start + step], ds[start : start + step, columns]
                torch.addmm(out, part, self.b[i], beta=0.0, alpha=self.scaling[i], out=out)
                accumulate(db, part.t(), s[start : start + step, columns], first=start == 0)
            gradients[i] = db.mul_(self.scaling[i])
        return ds, gradients

    def input_gradient(self, dys: list[Tensor], ds: Tensor | None) -> Tensor:
        dx = dys[0] @ self.weight(0)
        for i in range(1, len(dys)):
            dx.addmm_(dys[i], self.weight(i))
        if ds is not None and self.p:
            add_dropped_x_gradient(dx, ds, self.a, self.keys, self.layer_ids, self.p)  # type: ignore[arg-type]
        elif ds is not None:
            dx.addmm_(ds, self.a)  # type: ignore[arg-type]
        return dx

    def a_gradients(self, ds: Tensor | None, x: Tensor | None) -> dict[int, Tensor]:
        if ds is None or x is None:
            return {}
        if self.p:
            da = dropped_a_gradient(x, ds, self.keys, self.layer_ids, self.p)  # type: ignore[arg-type]
        else:
            da = torch.empty(ds.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
            accumulate(da, ds.t(), x, first=True)
        return {i: da[self.columns[i]] for i in self.updated}

    def gradients(self, das: dict[int, Tensor], dbs: dict[int, Tensor], dys: list[Tensor], wants: Sequence[bool],
                  dtypes: Sequence[Any]) -> list[Tensor | None]:  # fmt: skip
        """In the order of the tensors: weight, bias, A, B of each projection."""
        result: list[Tensor | None] = []
        for i, dy in enumerate(dys):
            bias = dy.sum(dim=0, dtype=torch.float32) if wants[4 * i + 1] else None
            for j, gradient in enumerate((None, bias, das.get(i), dbs.get(i))):
                result.append(None if gradient is None else gradient.to(dtypes[4 * i + j]))
        return result


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keys, p, statics, *tensors):
        flat = rows_of(x)
        outputs, s = _Group(statics, tensors, keys, p, x.dtype).forward(flat)
        ctx.save_for_backward(flat, s, keys, *tensors)
        ctx.p, ctx.statics, ctx.shape = p, statics, x.shape
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, s, keys, *tensors = ctx.saved_tensors
        group = _Group(ctx.statics, tensors, keys, ctx.p, x.dtype)
        flat = [rows_of(dy) for dy in dys]
        ds, dbs = group.factor_gradients(flat, s)
        dx = group.input_gradient(flat, ds).view(ctx.shape) if ctx.needs_input_grad[0] else None
        dtypes = [None if t is None else t.dtype for t in tensors]
        wants = ctx.needs_input_grad[4:]
        return dx, None, None, None, *group.gradients(group.a_gradients(ds, x), dbs, flat, wants, dtypes)


class _LoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keys, p, activation, statics, *tensors):
        flat = rows_of(x)
        first, last = _mlp_groups(statics, tensors, keys, p, x.dtype)
        outputs, s = first.forward(flat)
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        (y,), s_down = last.forward(glu_forward(gate, up, activation))
        ctx.save_for_backward(flat, s, s_down, gate, up, keys, *tensors)
        ctx.p, ctx.activation, ctx.statics, ctx.shape = p, activation, statics, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, s, s_down, gate, up, keys, *tensors = ctx.saved_tensors
        first, last = _mlp_groups(ctx.statics, tensors, keys, ctx.p, x.dtype)
        dtypes, wants = [None if t is None else t.dtype for t in tensors], ctx.needs_input_grad[5:]
        dy = [rows_of(dy)]
        ds_down, db_down = last.factor_gradients(dy, s_down)
        dh = last.input_gradient(dy, ds_down)
        dgate_dup, h = glu_backward(dh, gate, up, ctx.activation, emit=ds_down is not None)
        down = last.gradients(last.a_gradients(ds_down, h), db_down, dy, wants[-4:], dtypes[-4:])
        dys = list(dgate_dup.chunk(2, dim=-1)) if len(ctx.statics) == 3 else [dgate_dup]
        ds, dbs = first.factor_gradients(dys, s)
        dx = first.input_gradient(dys, ds).view(ctx.shape) if ctx.needs_input_grad[0] else None
        rest = first.gradients(first.a_gradients(ds, x), dbs, dys, wants[:-4], dtypes[:-4])
        return dx, None, None, None, None, *rest, *down


def _mlp_groups(statics, tensors, keys, p, dtype) -> tuple[_Group, _Group]:
    return _Group(statics[:-1], tensors[:-4], keys, p, dtype), _Group(statics[-1:], tensors[-4:], keys, p, dtype)
