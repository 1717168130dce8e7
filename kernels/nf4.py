"""NF4, the 4-bit format of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3, appendix E), laid out as in bitsandbytes.

    block of 64 values w:     a = max |w|       c = index of the level nearest to w / a       w^ = level[c] a
    twice quantised, a too:   o = mean a        b = max |a - o| over 256 blocks               a^ = (map[d] b + o),
                              d = index of the map's entry nearest to (a - o) / b

The 16 levels are quantiles of a normal distribution, of which each half reaches 1 and 0 is exact. The map is the signed
dynamic one of Dettmers et al. 2022 (arXiv 2110.02861): 2^e midpoints of equal parts of (0.1, 1) times 10^(e - 6) for each
e in 0 ... 6, both signs, and 0 and 1. Two codes share a byte, the first in the high half; the values count through the tensor
row by row, so that a block may cross rows. 4.127 bits a weight.

Arithmetic is float32 with each product and sum rounded by itself and one rounding on store, so that the kernel, the reference
and bitsandbytes agree to the bit. Quantisation multiplies by 1 / a, as bitsandbytes does on GPU. On CPU (0.50) it divides in
the last block where that is short, and first rounds (a - o) / b to one of 65,536 points, which is coarser than its map: `d`
here is the nearest, as on GPU.

Shape suffixes: B blocks, L values of a block.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from tritune.kernels.language import cdiv, jit, row_tile, tl, why_not

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SECOND_BLOCK = 256  # first-level blocks per second-level block
AT_ONCE = 2**20  # values that are quantised at a time: their float32 copies are all that is needed beside the weight
TINY = (
    2.0**-126
)  # the least normal number: a smaller one may be flushed to 0; such a block keeps its `a`, codes nearer to 0


def dynamic_map() -> Tensor:
    """Return the 256 ascending float32 levels of the second level, on CPU."""
    levels = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32, device="cpu")
        levels.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    positive = torch.cat(levels)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")
    return torch.cat([positive, -positive, ends]).sort().values


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 levels and the 256 of the map; copied to a device once."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device), dynamic_map().to(device)


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """A quantised tensor.

    Attributes:
        packed: uint8 [ceil(numel / 2)].
        scales: uint8 [B], codes `d`; or float32 [B], `a` itself, where there is no second level.
        second: the second level, (`b`, float32 [ceil(B / 256)]; `o`, float32 []), or None.
        shape: of the tensor.
        block_size: L, even.
    """

    packed: Tensor
    scales: Tensor
    second: tuple[Tensor, Tensor] | None
    shape: torch.Size
    block_size: int = 64

    def __post_init__(self) -> None:
        """Refuse what the kernel would read past the end of."""
        _require_block_size(self.block_size)
        numel = self.shape.numel()
        blocks = cdiv(numel, self.block_size)
        wanted = [(self.packed, torch.uint8, cdiv(numel, 2))]
        if self.second is None:
            wanted += [(self.scales, torch.float32, blocks)]
        else:
            absmax, offset = self.second
            wanted += [(self.scales, torch.uint8, blocks), (absmax, torch.float32, cdiv(blocks, SECOND_BLOCK))]
            wanted += [(offset, torch.float32, 1)]
        for tensor, dtype, size in wanted:
            if tensor.dtype != dtype or tensor.numel() != size or not tensor.is_contiguous():
                raise ValueError(
                    f"a part of an NF4 weight is {tuple(tensor.shape)} of {tensor.dtype}: shape {tuple(self.shape)} in blocks"
                    f" of {self.block_size} needs {size} contiguous values of {dtype}. Quantise the weight again"
                )

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def to(self, device: torch.device | str) -> Nf4Weight:
        second = None if self.second is None else (self.second[0].to(device), self.second[1].to(device))
        return Nf4Weight(self.packed.to(device), self.scales.to(device), second, self.shape, self.block_size)

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the values in `dtype`, of `shape`: by the kernel where it runs, by the reference elsewhere, to the same bits.

        Args:
            dtype: float32, float16 or bfloat16 (others: the reference).
            out: written and returned; of that shape, dtype and device. Rows may lie apart, their elements not.

        Raises:
            ValueError: `out` is not such a tensor.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        rows = _rows(out, self, dtype)
        if why_not(self.device, dtype) is None:
            _launch(self, rows)
        else:
            out.copy_(dequantize_reference(self, dtype))
        return out

    def to_state_dict(self, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the entries of a bitsandbytes checkpoint.

        Args:
            prefix: name of the weight, such as `model.layers.0.mlp.up_proj.weight`.
            dtype: that bitsandbytes shall dequantise to: float32, float16 or bfloat16.
        """
        levels, map_ = _tables(self.device)
        facts: dict[str, Any] = {"quant_type": "nf4", "blocksize": self.block_size}
        facts |= {"dtype": str(dtype).removeprefix("torch."), "shape": list(self.shape)}
        entries = {"": self.packed[:, None], ".absmax": self.scales, ".quant_map": levels.clone()}  # no shared storage
        if self.second is not None:
            entries |= {".nested_absmax": self.second[0], ".nested_quant_map": map_.clone()}
            facts |= {
                "nested_blocksize": SECOND_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": self.second[1].item(),
            }
        entries[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
        return {prefix + key: value for key, value in entries.items()}


def quantize(w: Tensor, block_size: int = 64, double: bool = True) -> Nf4Weight:
    """Quantise a tensor to the nearest levels, the lower one of two as near.

    Args:
        w: any float dtype, shape and strides; computed on in float32.
        block_size: of `BLOCK_SIZES`; numel need not be a multiple.
        double: quantise the blocks' absmax too.

    Raises:
        ValueError: no elements, no float dtype, another block size, or a value that is not finite in float32.
    """
    _require_block_size(block_size)
    if not w.dtype.is_floating_point or not w.numel():
        raise ValueError(
            f"a tensor {tuple(w.shape)} of {w.dtype}: NF4 takes floating-point tensors with elements. Leave it as it is"
        )
    levels, map_ = _tables(w.device)
    packed, absmax_B = _packed(w.detach().reshape(-1), levels, block_size)
    if not double:
        return Nf4Weight(packed, absmax_B, None, w.shape, block_size)
    offset = absmax_B.mean()
    if not torch.isfinite(offset):
        raise ValueError(
            f"the mean of the blocks' absmax, up to {absmax_B.max().item()}, is {offset.item()}: double quantisation needs it"
            " finite in float32. Use double=False, or repair the checkpoint"
        )
    second_codes, second_absmax = _nearest(absmax_B - offset, map_, SECOND_BLOCK)
    second_codes[second_absmax == 0] = 0  # every code means 0 there; bitsandbytes writes this one
    scales = second_codes.reshape(-1)[: len(absmax_B)].contiguous()
    return Nf4Weight(packed, scales, (second_absmax, offset), w.shape, block_size)


def _packed(flat: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the packed codes and the absmax of `flat` [numel], of any float dtype; some blocks at a time are float32."""
    size, parts = block_size * max(AT_ONCE // block_size, 1), []
    for start in range(0, len(flat), size):
        piece = flat[start : start + size].to(torch.float32)
        codes_BL, absmax_B = _nearest(piece, levels, block_size)
        if not torch.isfinite(absmax_B).all():
            first = int((~torch.isfinite(piece)).to(torch.uint8).argmax())
            raise ValueError(
                f"w holds {flat[start + first].item()} at flat index {start + first}: the largest magnitude scales a block,"
                " so each value must be finite in float32. Repair the checkpoint, or leave this weight in its own dtype"
            )
        codes = codes_BL.reshape(-1)[: len(piece) + len(piece) % 2]  # an odd one out is paired with a zero's code
        parts.append(((codes[0::2] << 4) | codes[1::2], absmax_B))
    packed, absmax = zip(*parts, strict=True)
    return torch.cat(packed), torch.cat(absmax)


def _nearest(flat: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the codes, uint8 [B, L], and the absmax, float32 [B], of `flat` [numel] padded with zeros to whole blocks."""
    x_BL = pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    absmax_B = x_BL.abs().amax(1)
    scaled_BL = x_BL * (1.0 / absmax_B.clamp(min=TINY))[:, None]
    return torch.bucketize(scaled_BL, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8), absmax_B


def dequantize_reference(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """See `Nf4Weight.dequantize`."""
    levels, map_ = _tables(weight.device)
    absmax_B = weight.scales
    if weight.second is not None:
        second_absmax, offset = weight.second
        absmax_B = map_[absmax_B.int()] * second_absmax.repeat_interleave(SECOND_BLOCK)[: len(absmax_B)] + offset
    values = levels[torch.stack((weight.packed >> 4, weight.packed & 15), -1).view(-1).int()]
    numel = weight.shape.numel()
    values_BL = pad(values[:numel], (0, -numel % weight.block_size)).view(-1, weight.block_size)
    return (values_BL * absmax_B[:, None]).view(-1)[:numel].view(weight.shape).to(dtype)


def from_bitsandbytes(packed: Tensor, quant_state: Any) -> Nf4Weight:
    """Take over a weight of bitsandbytes (`Params4bit.data` and `.quant_state`), without a copy where it is contiguous.

    Raises:
        ValueError: it is not NF4, or its second level is another than bitsandbytes' own.
    """
    nested = quant_state.state2
    if quant_state.quant_type != "nf4" or (nested is not None and nested.blocksize != SECOND_BLOCK):
        raise ValueError(
            f"quant_type {quant_state.quant_type!r}, nested block size {nested and nested.blocksize}: taken over are 'nf4' and"
            f" {SECOND_BLOCK}. Dequantise with bitsandbytes and quantise here"
        )
    second = None
    if nested is not None:
        if not torch.equal(nested.code, _tables(nested.code.device)[1]):
            raise ValueError(
                "nested_quant_map is not the signed dynamic map, the one that the kernel computes with."
                " Dequantise with bitsandbytes and quantise here"
            )
        second = (nested.absmax, quant_state.offset.to(torch.float32))
    packed = packed.contiguous().view(-1).view(torch.uint8)  # bitsandbytes may store bytes under another dtype
    return Nf4Weight(packed, quant_state.absmax, second, torch.Size(quant_state.shape), quant_state.blocksize)


@jit
def _dequantize(
    packed_ptr, scales_ptr, second_ptr, offset_ptr, levels_ptr, map_ptr, out_ptr, numel, num_bytes, num_blocks, width, out_stride,
    DOUBLE: tl.constexpr, CROSSES: tl.constexpr, SECOND: tl.constexpr, HALF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = blocks < num_blocks
    if DOUBLE:
        code = tl.load(scales_ptr + blocks, mask=inside, other=0).to(tl.int32)
        second = tl.load(second_ptr + blocks // SECOND, mask=inside, other=0.0)
        absmax = tl.load(map_ptr + code) * second + tl.load(offset_ptr)
    else:
        absmax = tl.load(scales_ptr + blocks, mask=inside, other=0.0)
    places = blocks[:, None] * HALF + tl.arange(0, HALF)[None, :]
    byte = tl.load(packed_ptr + places, mask=places < num_bytes, other=0).to(tl.int32)
    high = tl.load(levels_ptr + (byte >> 4)) * absmax[:, None]
    low = tl.load(levels_ptr + (byte & 15)) * absmax[:, None]
    start = blocks * (2 * HALF)
    row = start // width  # a 64-bit division per block, not per value
    col = (start - row * width)[:, None] + tl.arange(0, 2 * HALF)[None, :]
    out = row[:, None] * out_stride + col
    if CROSSES:
        out += col // width * (out_stride - width)
    values = tl.interleave(high, low).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out, values, mask=start[:, None] + tl.arange(0, 2 * HALF)[None, :] < numel)


def _launch(weight: Nf4Weight, out: Tensor) -> None:
    """Dequantise into `out` [rows, width], elements of a row side by side, in one launch."""
    levels, map_ = _tables(weight.device)
    second, offset = weight.second or (None, None)
    numel, num_blocks = out.numel(), len(weight.scales)
    width = numel if out.is_contiguous() else out.shape[1]
    blocks, _, warps = row_tile(weight.block_size, num_blocks)
    _dequantize[(cdiv(num_blocks, blocks),)](
        weight.packed, weight.scales, second, offset, levels, map_, out, numel, len(weight.packed), num_blocks, width,
        out.stride(0),
        DOUBLE=second is not None, CROSSES=width % weight.block_size != 0 and width < numel, SECOND=SECOND_BLOCK,
        HALF=weight.block_size // 2, BLOCKS=blocks, num_warps=warps,
        enable_fp_fusion=False,  # map[d] b + o in two roundings, as the reference and bitsandbytes have it
    )  # fmt: skip


def _rows(out: Tensor, weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """`out` as a matrix of rows; raise unless it can be written."""
    if out.shape == weight.shape and out.dtype == dtype and out.device == weight.device:
        width = out.shape[-1] if out.ndim else 1
        if out.is_contiguous():
            return out.view(-1, width)
        if out.stride(-1) == 1 or width == 1:
            try:
                rows = out.view(-1, width)
            except RuntimeError:  # leading dimensions without one common stride
                rows = None
            if rows is not None and rows.stride(0) >= width:
                return rows
    raise ValueError(
        f"out is {tuple(out.shape)} of {out.dtype} on {out.device} with strides {out.stride()}: the values are"
        f" {tuple(weight.shape)} of {dtype} on {weight.device}, elements of a row side by side, rows one stride apart and not"
        " overlapping. Pass such a view, or no `out`"
    )


def _require_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size {block_size}: bitsandbytes reads {BLOCK_SIZES}. Use 64, the paper's")
