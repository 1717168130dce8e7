"""The three products of LoRA in which dropout stands between a matrix and its factor; masks are drawn again, never stored.

    S = drop(X) A^T            dA = dS^T drop(X)            dX += drop'(dS A)            drop' masks and scales by 1 / (1 - p)

for P projections that share X, each with a mask of its own (`dropout.keep_tile`). Ranks are padded to one power of two R of
at least 16, so S and dS are [M, P R] and A is [P R, K]; the padding is zero. Programs of one tile of X for different
projections run side by side and find it in the L2 cache. Sums are float32; dA is summed over splits of M in a fixed order.

Shape suffixes: M tokens, K input features, P projections, R padded rank, C = P R.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tritune.kernels.dropout import dropout_reference, keep_tile, mask_numbers
from tritune.kernels.language import cdiv, jit, next_power_of_2, require_runs, spanned, tl

SPLIT_TOKENS = 1024  # of dA: so many tokens a program
SPLIT_FEATURES = 1024  # of S, where there are too few tokens to fill a chip: at least so many features a program
PROGRAMS = 512  # that fill one, of four warps each


def padded_rank(ranks: list[int]) -> int:
    """R: what `tl.dot` takes."""
    return max(16, next_power_of_2(max(ranks)))


def dropped_down_reference(x_MK: Tensor, a_CK: Tensor, keys_M: Tensor, layer_ids: list[int], p: float) -> Tensor:
    """Return S [M, C]. The other two products are its gradients."""
    parts = zip(layer_ids, a_CK.chunk(len(layer_ids)), strict=True)
    return torch.cat([dropout_reference(x_MK, keys_M, layer_id, p) @ a_RK.t() for layer_id, a_RK in parts], dim=1)


def _tile(dtype: torch.dtype, num_tokens: int) -> dict[str, int]:
    """Tokens and features of a program: what wgmma takes at 16 bits; at 32 there is only FMA, and registers are short."""
    side = 32 if dtype is torch.float32 else 64
    return {"BM": spanned(side, num_tokens), "BK": side, "num_warps": 4}


@jit
def _kept(x, keys_ptr, numbers_ptr, projection, rows, inside, cols):
    """`x` where this projection keeps it, 0 elsewhere."""
    threshold = tl.load(numbers_ptr).to(tl.uint32, bitcast=True)
    layer_id = tl.load(numbers_ptr + 1 + projection).to(tl.uint32, bitcast=True)
    keys = tl.load(keys_ptr + rows, mask=inside, other=0).to(tl.uint32, bitcast=True)
    return tl.where(keep_tile(keys, layer_id, cols, threshold), x, 0.0)


@jit
def _down(
    x_ptr, a_ptr, keys_ptr, numbers_ptr, s_ptr, x_stride, num_tokens, width, scale, split_features,
    P: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    projection, split = tl.program_id(0), tl.program_id(2)
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    inside = rows < num_tokens
    r = projection * R + tl.arange(0, R)
    total = tl.zeros((BM, R), tl.float32)
    for start in range(0, split_features, BK):
        cols = split * split_features + start + tl.arange(0, BK)
        real = cols < width
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=inside[:, None] & real[None, :], other=0.0)
        x = _kept(x, keys_ptr, numbers_ptr, projection, rows, inside, cols).to(x_ptr.dtype.element_ty)
        a = tl.load(a_ptr + r[None, :] * width + cols[:, None], mask=real[:, None], other=0.0)
        total = tl.dot(x, a, total, input_precision="ieee")
    s = (total * tl.cast(scale, tl.float32)).to(s_ptr.dtype.element_ty)
    place = s_ptr + (split * num_tokens + rows[:, None]) * (P * R) + r[None, :]
    tl.store(place, s, mask=inside[:, None])


@jit
def _a_gradient(
    x_ptr, ds_ptr, keys_ptr, numbers_ptr, da_ptr, x_stride, num_tokens, width, scale, split_tokens,
    P: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    projection, split = tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    real = cols < width
    r = projection * R + tl.arange(0, R)
    total = tl.zeros((BK, R), tl.float32)
    for start in range(0, split_tokens, BM):
        own = start + tl.arange(0, BM)
        rows = split * split_tokens + own
        inside = (rows < num_tokens) & (own < split_tokens)
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=inside[:, None] & real[None, :], other=0.0)
        x = _kept(x, keys_ptr, numbers_ptr, projection, rows, inside, cols).to(x_ptr.dtype.element_ty)
        ds = tl.load(ds_ptr + rows[:, None] * (P * R) + r[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(tl.trans(x), ds, total, input_precision="ieee")
    place = da_ptr + (split * P * R + r[None, :]) * width + cols[:, None]
    tl.store(place, total * tl.cast(scale, tl.float32), mask=real[:, None])


@jit
def _x_gradient(
    dx_ptr, ds_ptr, a_ptr, keys_ptr, numbers_ptr, num_tokens, width, scale,
    P: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside = rows < num_tokens
    cols = tl.program_id(1) * BK + tl.arange(0, BK)
    real = cols < width
    total = tl.zeros((BM, BK), tl.float32)
    for projection in tl.static_range(P):
        r = projection * R + tl.arange(0, R)
        ds = tl.load(ds_ptr + rows[:, None] * (P * R) + r[None, :], mask=inside[:, None], other=0.0)
        a = tl.load(a_ptr + r[:, None] * width + cols[None, :], mask=real[None, :], other=0.0)
        part = tl.dot(ds, a, input_precision="ieee")
        total += _kept(part, keys_ptr, numbers_ptr, projection, rows, inside, cols)
    mask = inside[:, None] & real[None, :]
    place = dx_ptr + rows[:, None] * width + cols[None, :]
    dx = tl.load(place, mask=mask, other=0.0).to(tl.float32) + total * tl.cast(scale, tl.float32)
    tl.store(place, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _numbers(layer_ids: list[int], p: float, device: torch.device) -> tuple[Tensor, float]:
    return mask_numbers(tuple(layer_ids), p, device), 1.0 / (1.0 - p)


def dropped_down(x_MK: Tensor, a_CK: Tensor, keys_M: Tensor, layer_ids: list[int], p: float) -> Tensor:
    """Return S [M, C]. `x_MK` with contiguous rows, `a_CK` of its dtype, `keys_M` int32 of `token_keys`."""
    require_runs(x_MK)
    (num_tokens, width), rank = x_MK.shape, a_CK.shape[0] // len(layer_ids)
    tile, (numbers, scale) = _tile(x_MK.dtype, num_tokens), _numbers(layer_ids, p, x_MK.device)
    tokens = cdiv(num_tokens, tile["BM"])
    wanted = max(1, min(PROGRAMS // max(1, len(layer_ids) * tokens), cdiv(width, SPLIT_FEATURES)))
    features = cdiv(cdiv(width, wanted), tile["BK"]) * tile["BK"]
    splits = cdiv(width, features)
    dtype = x_MK.dtype if splits == 1 else torch.float32
    s = torch.empty(splits, num_tokens, a_CK.shape[0], dtype=dtype, device=x_MK.device)
    if num_tokens:
        _down[(len(layer_ids), tokens, splits)](
            x_MK, a_CK, keys_M, numbers, s, x_MK.stride(0), num_tokens, width, scale, features, P=len(layer_ids), R=rank,
            num_stages=3, **tile,
        )  # fmt: skip
    return s[0] if splits == 1 else s.sum(dim=0).to(x_MK.dtype)


def dropped_a_gradient(x_MK: Tensor, ds_MC: Tensor, keys_M: Tensor, layer_ids: list[int], p: float) -> Tensor:
    """Return dA [C, K] in float32."""
    (num_tokens, width), rank = x_MK.shape, ds_MC.shape[1] // len(layer_ids)
    splits = max(1, cdiv(num_tokens, SPLIT_TOKENS))
    parts = torch.empty(splits, ds_MC.shape[1], width, dtype=torch.float32, device=x_MK.device)
    numbers, scale = _numbers(layer_ids, p, x_MK.device)
    tile = _tile(x_MK.dtype, num_tokens)
    _a_gradient[(cdiv(width, tile["BK"]), len(layer_ids), splits)](
        x_MK, ds_MC, keys_M, numbers, parts, x_MK.stride(0), num_tokens, width, scale, min(SPLIT_TOKENS, max(num_tokens, 1)),
        P=len(layer_ids), R=rank, num_stages=3, **tile,
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(dim=0)


def add_dropped_x_gradient(
    dx_MK: Tensor, ds_MC: Tensor, a_CK: Tensor, keys_M: Tensor, layer_ids: list[int], p: float
) -> None:
    """dX += what reaches it through the masks, in one pass. `dx_MK` contiguous and the caller's own."""
    (num_tokens, width), rank = dx_MK.shape, ds_MC.shape[1] // len(layer_ids)
    numbers, scale = _numbers(layer_ids, p, dx_MK.device)
    if num_tokens:
        tile = _tile(dx_MK.dtype, num_tokens)
        _x_gradient[(cdiv(num_tokens, tile["BM"]), cdiv(width, tile["BK"]))](
            dx_MK,
            ds_MC,
            a_CK,
            keys_M,
            numbers,
            num_tokens,
            width,
            scale,
            P=len(layer_ids),
            R=rank,
            num_stages=2,
            **tile,
        )
