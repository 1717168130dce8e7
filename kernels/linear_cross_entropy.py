"""Cross entropy of tokens from hidden states and an output head, logits never stored whole.

    loss_i = CE(x_i W^T + b, y_i)          dX = G W, dW = G^T X, db = sum of G's rows          G = d loss / d logits

Tokens are taken in chunks: logits of a chunk by cuBLAS into one slab, `cross_entropy_` writes G over it, cuBLAS again. The
gradient is made in forward (Liger Kernel, arXiv 2410.10989), so that logits are never made twice:

- A frozen head: the rows of dX are independent, so dX is stored for an upstream gradient of one and each row scaled in
  backward. Per-token losses, whatever is done with them, cost two products.
- A head that trains, losses summed here (`reduction="sum"`, with the tokens' weights): dW is summed in float32 in forward
  and scaled in backward by the one upstream number. Three products.
- A head that trains and losses per token: what will be done with them is not known in forward, so logits are made again in
  backward. Four products.

`token_nll_reference` takes the head as a callable, so that a head with an adapter, or of a kind unknown here, is computed as
it is; `torch.utils.checkpoint` recomputes its chunks. Shape suffixes: M predicted tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from tritune.kernels.cross_entropy import PLAIN, LossOptions, cross_entropy_, cross_entropy_reference
from tritune.kernels.language import cdiv, require_runs
from tritune.kernels.products import accumulate, scaled

CHUNKS = (4096, 2048, 1024, 512, 256, 128)  # fewer and larger chunks keep the products near their peak
SLAB_BYTES = 2**29  # at a vocabulary of 128,256 in bfloat16: 2,048 tokens, whose product is still bound by arithmetic


def linear_cross_entropy(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    targets_M: Tensor,
    bias_V: Tensor | None = None,
    *,
    reduction: Literal["none", "sum"] = "none",
    weights_M: Tensor | None = None,
    options: LossOptions = PLAIN,
    num_kept: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (loss [M], or [] summed; logsumexp [M], without gradient), in float32 whatever the input is.

    Args:
        hidden_MH, weight_VH, bias_V: float32, float16 or bfloat16, one dtype.
        targets_M: int64; `options.ignore_index` marks rows that count for nothing.
        weights_M: factors of the tokens' losses, no gradient.
        num_kept: how many rows are not ignored, exactly, where the caller knows: only these are computed. No device is
            asked, so another number would drop rows or count the last one again.
        chunk_tokens: the most tokens whose logits are in memory at a time, up to 4,096 and a slab of 512 MiB.

    Raises:
        ValueError: no kernel can take these, or their dtypes differ.
    """
    require_runs(hidden_MH)
    if weight_VH.dtype != hidden_MH.dtype:
        raise ValueError(f"a head of {weight_VH.dtype} for hidden states of {hidden_MH.dtype}: cast one of them")
    rows = None
    if num_kept is not None and num_kept < targets_M.shape[0]:
        rows = torch.nonzero_static(targets_M != options.ignore_index, size=num_kept)[:, 0]
        hidden_MH, given = hidden_MH[rows], targets_M
        targets_M = targets_M[rows]
        weights_M = None if weights_M is None else weights_M[rows]
    chunk = min(chunk_tokens or CHUNKS[0], chunk_of(weight_VH.shape[0], hidden_MH.dtype))
    wants = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden_MH, weight_VH, bias_V))
    weights_M = None if weights_M is None else weights_M.detach().float()
    args = (hidden_MH, weight_VH, bias_V, targets_M, weights_M, options, chunk, wants)
    if reduction == "sum":
        loss, lse = _Summed.apply(*args)  # type: ignore[misc]
    elif wants[1] or wants[2]:
        loss, lse = _TokensTrainableHead.apply(*args)  # type: ignore[misc]
    else:
        loss, lse = _TokensFrozenHead.apply(*args)  # type: ignore[misc]
    if rows is None:
        return loss, lse
    lse = lse.new_zeros(given.shape[0]).index_copy(0, rows, lse)
    return (loss if reduction == "sum" else loss.new_zeros(given.shape[0]).index_copy(0, rows, loss)), lse


def chunk_of(vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens per chunk: the most of `CHUNKS` whose logits fit `SLAB_BYTES`."""
    return next((c for c in CHUNKS if c * vocabulary * dtype.itemsize <= SLAB_BYTES), CHUNKS[-1])


def _loop(hidden, weight, bias, targets, weights, options, chunk, wants):
    """Return loss [M], lse [M], and dX, dW, db (float32) as wanted, each for an upstream gradient of one."""
    (num_tokens, width), vocabulary = hidden.shape, weight.shape[0]
    loss = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
    lse = torch.empty_like(loss)
    want_x, want_w, want_b = wants
    dx = torch.empty(num_tokens, width, dtype=hidden.dtype, device=hidden.device) if want_x else None
    new = torch.empty if num_tokens else torch.zeros
    dw = new(vocabulary, width, dtype=torch.float32, device=hidden.device) if want_w else None
    db = torch.zeros(vocabulary, dtype=torch.float32, device=hidden.device) if want_b else None
    # Rows begin at multiples of 128 bytes, whatever the vocabulary: both the products and the kernel read them so.
    rounded = cdiv(vocabulary, 64) * 64
    slab = torch.empty(min(chunk, num_tokens), rounded, dtype=hidden.dtype, device=hidden.device)[:, :vocabulary]
    for start in range(0, num_tokens, chunk):
        stop = min(start + chunk, num_tokens)
        part, logits = hidden[start:stop], slab[: stop - start]
        if bias is None:
            torch.mm(part, weight.t(), out=logits)
        else:
            torch.addmm(bias, part, weight.t(), out=logits)
        row_weights = None if weights is None else weights[start:stop]
        cross_entropy_(logits, targets[start:stop], options, row_weights, loss[start:stop], lse[start:stop], any(wants))
        if dx is not None:
            torch.mm(logits, weight, out=dx[start:stop])
        if dw is not None:
            accumulate(dw, logits.t(), part, first=start == 0)
        if db is not None:
            db += logits.sum(dim=0, dtype=torch.float32)
    return loss, lse, dx, dw, db


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, options, chunk, wants):
        loss, lse, *gradients = _loop(hidden, weight, bias, targets, weights, options, chunk, wants)
        ctx.save_for_backward(*gradients)  # freed with the graph, which attributes of ctx would outlive
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(lse)
        return loss.sum(), lse

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        dx, dw, db = (scaled(g, upstream, ctx.dtype) for g in ctx.saved_tensors)
        return dx, dw, db, None, None, None, None, None


class _TokensFrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, options, chunk, wants):
        loss, lse, dx, _, _ = _loop(hidden, weight, bias, targets, weights, options, chunk, wants)
        ctx.save_for_backward(dx)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        return scaled(ctx.saved_tensors[0], upstream[:, None], ctx.dtype), None, None, None, None, None, None, None


class _TokensTrainableHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, options, chunk, wants):
        loss, lse, *_ = _loop(hidden, weight, bias, targets, weights, options, chunk, (False, False, False))
        ctx.save_for_backward(hidden, weight, bias, targets, weights)
        ctx.settings = options, chunk, wants
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        hidden, weight, bias, targets, weights = ctx.saved_tensors
        rows = upstream.float() if weights is None else upstream.float() * weights
        _, _, dx, dw, db = _loop(hidden, weight, bias, targets, rows, *ctx.settings)
        dw, db = (None if g is None else g.to(weight.dtype) for g in (dw, db))
        return dx, dw, db, None, None, None, None, None


def linear_cross_entropy_reference(
    hidden_MH: Tensor, weight_VH: Tensor, targets_M: Tensor, bias_V: Tensor | None = None, options: LossOptions = PLAIN,
    weights_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`linear_cross_entropy` with the logits whole: (loss, lse), both [M], in float32 or wider."""
    logits = torch.nn.functional.linear(hidden_MH, weight_VH, bias_V)
    return cross_entropy_reference(logits, targets_M, options, weights_M)


def token_nll_reference(
    hidden_MH: Tensor, head: Callable[[Tensor, int, int], Tensor], targets_M: Tensor, chunk_tokens: int
) -> Tensor:
    """Return -log p(target) for each token, [M], in float32 or wider.

    Args:
        hidden_MH: final hidden states of the tokens that predict.
        head: called as head(hidden[i:j], i, j), returns logits [j - i, V].
        targets_M: int64.
        chunk_tokens: logits are made for this many tokens at a time.
    """

    def chunk_nll(hidden: Tensor, start: int, stop: int) -> Tensor:
        logits = head(hidden, start, stop)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return cross_entropy(logits.to(wide), targets_M[start:stop], reduction="none")

    num_tokens = hidden_MH.shape[0]
    if num_tokens <= chunk_tokens:
        return chunk_nll(hidden_MH, 0, num_tokens)
    parts = []
    for start in range(0, num_tokens, chunk_tokens):
        stop = min(start + chunk_tokens, num_tokens)
        parts.append(checkpoint(chunk_nll, hidden_MH[start:stop], start, stop, use_reentrant=False))
    return torch.cat(parts)
