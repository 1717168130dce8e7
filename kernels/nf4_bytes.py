"""An NF4 weight as one tensor of bytes, which any engine shards, gathers and copies as it does every other parameter.

    b (float32 a second-level block), o (float32), padding | d (a byte a block), padding | packed codes

Each part begins at a multiple of 16 bytes. Nothing casts bytes, so that an engine's mixed precision leaves the scales alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tritune.kernels.language import cdiv
from tritune.kernels.nf4 import SECOND_BLOCK, Nf4Weight

BLOCK_SIZE = 64
_ALIGNED = 16


def _parts(shape: torch.Size) -> tuple[int, int, int]:
    """Second-level blocks, blocks and bytes of codes."""
    numel = shape.numel()
    blocks = cdiv(numel, BLOCK_SIZE)
    return cdiv(blocks, SECOND_BLOCK), blocks, cdiv(numel, 2)


def _starts(shape: torch.Size) -> tuple[int, int, int]:
    """Where the second part and the third begin, and where all ends."""
    second, blocks, packed = _parts(shape)
    scales = cdiv(4 * (second + 1), _ALIGNED) * _ALIGNED
    codes = scales + cdiv(blocks, _ALIGNED) * _ALIGNED
    return scales, codes, codes + packed


def num_bytes(shape: torch.Size) -> int:
    """Of a weight of `shape`: 0.516 a value of a large one."""
    return _starts(shape)[2]


def to_bytes(weight: Nf4Weight) -> Tensor:
    """Return uint8 [num_bytes(weight.shape)].

    Raises:
        ValueError: the weight has another block size, or one level of scales.
    """
    if weight.second is None or weight.block_size != BLOCK_SIZE:
        raise ValueError(
            f"blocks of {weight.block_size}, quantised once or twice: bytes hold blocks of 64, quantised twice"
        )
    second, blocks, _ = _parts(weight.shape)
    scales, codes, size = _starts(weight.shape)
    data = torch.zeros(size, dtype=torch.uint8, device=weight.device)
    data[: 4 * second] = weight.second[0].view(torch.uint8)
    data[4 * second : 4 * (second + 1)] = weight.second[1].reshape(1).view(torch.uint8)
    data[scales : scales + blocks] = weight.scales
    data[codes:] = weight.packed
    return data


def from_bytes(data: Tensor, shape: torch.Size) -> Nf4Weight:
    """The weight of `shape` whose bytes are `data`, uint8 [num_bytes(shape)]; views of it where it is aligned."""
    if data.storage_offset() % _ALIGNED:
        data = data.clone()
    second, blocks, _ = _parts(shape)
    scales, codes, size = _starts(shape)
    floats = data[: 4 * (second + 1)].view(torch.float32)
    parts = data[codes:size], data[scales : scales + blocks], (floats[:second], floats[second])
    return Nf4Weight(*parts, shape, BLOCK_SIZE)
