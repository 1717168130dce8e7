"""Counter-based dropout: the mask is a function of (seed, step, sample, position, layer, feature), of nothing else.

So it is the same whatever the micro-batch split, the packing, the ranks or the kernel that draws it. All arithmetic is on
32-bit words with wrap-around, so that Triton computes the same bits from `uint32`; PyTorch has no unsigned multiply, so
the reference uses int32, whose products wrap to the same bits, and masks the sign away after each right shift.

    mix(x)            MurmurHash3's 32-bit finalizer (public domain, A. Appleby): every input bit reaches every output bit
    key(token)        mix over seed, step, sample, position, one after the other
    word(token, f)    mix(key ^ mix(layer_id + f * golden))
    keep              word (as unsigned) >= p * 2^32

Shape suffixes: B rows, T positions, D features.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from tritune.kernels.language import jit, tl

GOLDEN = 0x9E3779B9


def _int32(x: int) -> int:
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >= 1 << 31 else x


def mix(x: Tensor) -> Tensor:
    """Finalize 32-bit words. `x`: int32 of any shape; returns the same shape and dtype."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _int32(0x85EBCA6B)
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * _int32(0xC2B2AE35)
    return x ^ ((x >> 16) & 0xFFFF)


def _mix_int(x: int) -> int:
    """`mix` of one number, as unsigned."""
    x &= 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def token_keys(seed: int, step: int, sample_ids_B: Tensor, num_positions: int) -> Tensor:
    """Return int32 keys [B, T] of rows that are one sample each, from its first token on.

    Args:
        seed, step: of the run; only the low 32 bits count.
        sample_ids_B: int64 [B], the samples' numbers in the data set.
        num_positions: T.
    """
    positions_T = torch.arange(num_positions, device=sample_ids_B.device)
    return token_keys_at(seed, step, sample_ids_B[:, None], positions_T[None, :])


def token_keys_at(seed: int, step: int, sample_ids: Tensor, positions: Tensor) -> Tensor:
    """Return int32 keys [B, T] of tokens anywhere in their samples.

    Args:
        seed, step: of the run; only the low 32 bits count.
        sample_ids: int64, of a shape that broadcasts to [B, T]: the samples' numbers in the data set.
        positions: int64, likewise: of the tokens in their samples.
    """
    key = _mix_int(_mix_int(seed * GOLDEN + 1) ^ (step * GOLDEN))  # on the host: a copy to a GPU would wait for it
    low = (sample_ids & 0xFFFFFFFF).to(torch.int32)
    high = ((sample_ids >> 32) & 0xFFFFFFFF).to(torch.int32)
    sample_key = mix(mix(low ^ _int32(key)) + high * _int32(GOLDEN))
    return mix(sample_key ^ mix(positions.to(torch.int32) * _int32(GOLDEN)))


def threshold_of(p: float) -> int:
    """The word, as unsigned, from which an element is kept."""
    return min(int(p * 2**32), 2**32 - 1)


def keep_mask_reference(keys: Tensor, layer_id: int, num_features: int, p: float) -> Tensor:
    """Return bool [*keys.shape, D], True where an element is kept (with probability 1 - p).

    Args:
        keys: int32, from `token_keys`.
        layer_id: number of the layer in the model, 32 bits.
        p: rate of dropping, in [0, 1).
    """
    features_D = torch.arange(num_features, dtype=torch.int32, device=keys.device)
    words = mix(keys[..., None] ^ mix(features_D * _int32(GOLDEN) + _int32(layer_id)))
    threshold = _int32(threshold_of(p) ^ (1 << 31))  # unsigned order = signed order, top bit flipped
    return (words ^ _int32(1 << 31)) >= threshold


def dropout_reference(x: Tensor, keys: Tensor, layer_id: int, p: float) -> Tensor:
    """Inverted dropout of `x` [*keys.shape, D]: kept elements are scaled by 1 / (1 - p)."""
    keep = keep_mask_reference(keys, layer_id, x.shape[-1], p)
    return x * keep * (1.0 / (1.0 - p))


@torch.library.custom_op("tritune::dropout", mutates_args=())
def opaque_dropout(x: Tensor, keys: Tensor, layer_id: int, p: float) -> Tensor:
    """`dropout_reference` as one operator that compilers do not look into.

    Inductor's CPU code for the wrapping 32-bit products is wrong, or does not compile (torch 2.13: NaN from finite inputs).
    """
    return dropout_reference(x, keys, layer_id, p)


@opaque_dropout.register_fake
def _(x: Tensor, keys: Tensor, layer_id: int, p: float) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx, inputs, output) -> None:
    _, keys, ctx.layer_id, ctx.p = inputs
    ctx.save_for_backward(keys)


def _backward(ctx, gradient: Tensor):
    return opaque_dropout(gradient, *ctx.saved_tensors, ctx.layer_id, ctx.p), None, None, None  # the same mask again


opaque_dropout.register_autograd(_backward, setup_context=_keep)


@jit
def mix_words(x):
    """`mix` in a kernel; `x`: uint32."""
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


@jit
def keep_tile(keys, layer_id, cols, threshold):
    """`keep_mask_reference` of a tile in a kernel: bool [len(keys), len(cols)].

    keys: uint32; cols: int32 feature numbers; layer_id, threshold: uint32. A feature's word is made once for all rows.
    """
    words = mix_words(cols.to(tl.uint32) * 0x9E3779B9 + layer_id)
    return mix_words(keys[:, None] ^ words[None, :]) >= threshold


@functools.lru_cache(maxsize=4096)
def mask_numbers(layer_ids: tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """Return int32 [1 + len(layer_ids)] on `device`: the threshold and the ids, copied there once a group of layers.

    As arguments, their values would choose between compiled variants (1, multiples of 16).
    """
    return torch.tensor([_int32(threshold_of(p)), *map(_int32, layer_ids)], dtype=torch.int32, device=device)
