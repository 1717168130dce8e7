"""NF4 against bitsandbytes, bit for bit; the kernel against the reference, bit for bit; both against the definition.

On CPU bitsandbytes (0.50.2) departs from its own GPU code, and from ours, in three places: it divides by the absmax in a short
last block (elsewhere both multiply by its reciprocal), stores 1e-38 there if that block is zero (we: 0), and looks second-level
codes up in a table of 65,536 points. Its path for other dtypes has no table: float64 of the same values is the judge.
"""

from __future__ import annotations

import re
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import DEVICE
from tritune.kernels import nf4
from tritune.kernels.language import DTYPES, why_not
from tritune.kernels.nf4 import NF4_LEVELS, Nf4Weight, dequantize_reference, quantize

LEVELS = torch.tensor(NF4_LEVELS, dtype=torch.float64)
MIDPOINTS = ((LEVELS[1:] + LEVELS[:-1]) / 2).float()
U = 2.0**-24  # relative error of one rounding to float32

needs_kernel = pytest.mark.skipif(why_not(DEVICE, torch.float32) is not None, reason="no Triton kernel can run here")


@pytest.fixture
def bnb():
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes, the judge, is not installed").functional
    torch.set_flush_denormal(False)  # libraries loaded by other tests turn it on; the judge's zero blocks rely on 1e-38
    with torch.compiler.set_stance("force_eager"):  # it compiles its fallback for odd sizes, anew for each
        yield functional


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


# -- against bitsandbytes ----------------------------------------------------------------------------------


def test_levels_are_the_papers_quantiles():
    """Appendix E: 8 and 7 quantiles of evenly spaced probabilities from 0.9677083 to 1/2, over the largest, and zero."""
    quantile, end = NormalDist().inv_cdf, 0.9677083
    positive = [quantile(end + (0.5 - end) * i / 8) for i in range(8)]
    negative = [-quantile(end + (0.5 - end) * i / 7) for i in range(7)]
    expected = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float64) / positive[0]
    # The published values went through float32 probabilities: off by 2^-25, times the quantile's slope of up to 14 at the end
    # (1 / density), over 1.85, for the level and for the divisor: 4.5e-7.
    assert (LEVELS - expected).abs().max() < 4.5e-7
    assert torch.equal(LEVELS.float().double(), LEVELS)  # each one is a float32


def test_dynamic_map_is_that_of_bitsandbytes(bnb):
    assert torch.equal(nf4.dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("numel", [1, 2, 63, 64, 65, 127, 1000, 64 * 256, 64 * 256 + 1, 64 * 300 + 7, 100_001])
def test_parts_and_values_equal_bitsandbytes(bnb, numel, block_size, dtype):
    w = draw(numel, seed=numel, dtype=dtype)
    for double in (False, True):
        ours = quantize(w, block_size, double)
        packed, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4", compress_statistics=double)
        assert torch.equal(ours.packed, packed.view(-1))
        if double:
            assert torch.equal(ours.second[1], state.offset)
            assert torch.equal(ours.second[0], state.state2.absmax)
            centred = (quantize(w, block_size, double=False).scales - state.offset).double()
            exact = torch.ops.bitsandbytes.quantize_blockwise(centred, bnb.create_dynamic_map(), nf4.SECOND_BLOCK)[0]
            assert torch.equal(ours.scales, exact)
        else:
            assert torch.equal(ours.scales, state.absmax)
        theirs = nf4.from_bitsandbytes(packed, state)
        for out_dtype in (torch.float32, torch.float16, torch.bfloat16):
            state.dtype = out_dtype
            assert torch.equal(dequantize_reference(theirs, out_dtype), bnb.dequantize_4bit(packed, state).view(-1))


def test_table_of_bitsandbytes_on_cpu(bnb):
    """Its CPU codes are those of a point of its table beside the value; where they differ from ours, ours lie nearer."""
    w = draw(64 * 20_000) * torch.rand(20_000, generator=torch.Generator().manual_seed(1)).repeat_interleave(64)
    ours = quantize(w)
    theirs = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)[1].absmax
    map_, second = nf4.dynamic_map(), ours.second[0].repeat_interleave(nf4.SECOND_BLOCK)[:20_000]
    centred = quantize(w, double=False).scales - ours.second[1]
    beside = centred / second + torch.tensor([[-1.01], [1.01]]) / 65535  # half a spacing, and a little for rounding
    low, high = torch.bucketize(beside, (map_[1:] + map_[:-1]) / 2)
    assert ((low <= theirs) & (theirs <= high)).all()
    ours_off, theirs_off = ((map_[c.int()].double() * second - centred).abs() for c in (ours.scales, theirs))
    assert (ours_off <= theirs_off + 4 * U * second).all()  # of two as near to float32, either


def test_values_at_the_midpoints(bnb):
    """The same codes in whole blocks; in a short one, which bitsandbytes divides on CPU, some are one code off."""
    absmax = torch.rand(300, generator=torch.Generator().manual_seed(0)) + 0.5
    near = MIDPOINTS * absmax[:, None]
    near = torch.cat([near, near.nextafter(torch.tensor(9.0)), near.nextafter(torch.tensor(-9.0)), absmax[:, None]], 1)
    whole = torch.cat([near, torch.zeros(300, 64 - near.shape[1])], 1)
    assert torch.equal(quantize(whole).packed, bnb.quantize_4bit(whole, quant_type="nf4")[0].view(-1))
    for short in near:
        off = quantize(short).packed.int() - bnb.quantize_4bit(short, quant_type="nf4")[0].view(-1).int()
        assert set(off.tolist()) <= {16 * a + b for a in (-1, 0, 1) for b in (-1, 0, 1)}


@pytest.mark.parametrize("double", [False, True])
def test_zero_blocks(bnb, double):
    w = torch.cat([draw(64), torch.zeros(64), draw(64), torch.zeros(5)])
    ours = quantize(w, double=double)
    assert not dequantize_reference(ours, torch.float32)[w == 0].any()
    assert torch.equal(ours.packed, bnb.quantize_4bit(w, quant_type="nf4")[0].view(-1))
    assert not dequantize_reference(quantize(torch.zeros(3, 70), double=double), torch.float32).any()


@pytest.mark.parametrize("double", [False, True])
def test_zero_blocks_where_small_numbers_are_flushed(double):
    """Some libraries turn this on for the whole process when they are loaded, and GPUs do it in places."""
    torch.set_flush_denormal(True)
    try:
        assert not dequantize_reference(quantize(torch.zeros(3, 70), double=double), torch.float32).any()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("double", [False, True])
def test_checkpoint_entries_are_read_by_bitsandbytes(bnb, double):
    ours = quantize(draw(6, 128), double=double)
    entries = ours.to_state_dict("layer.weight", torch.float16)
    packed = entries.pop("layer.weight")
    state = bnb.QuantState.from_dict(dict(entries), device=torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(packed, state), dequantize_reference(ours, torch.float16))
    theirs = bnb.quantize_4bit(draw(6, 128), quant_type="nf4", compress_statistics=double)[1].as_dict(packed=True)
    assert set(entries) == {f"layer.weight.{key}" for key in theirs}
    stored, state = bnb.quantize_4bit(draw(6, 128), quant_type="nf4", quant_storage=torch.bfloat16)
    assert torch.equal(nf4.from_bitsandbytes(stored, state).packed, ours.packed)
    with pytest.raises(ValueError, match="fp4"):
        nf4.from_bitsandbytes(*bnb.quantize_4bit(draw(64), quant_type="fp4"))


# -- against the definition --------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.sampled_from([32, 64, 512]), st.booleans(), st.integers(0, 10_000))
def test_error_of_each_element(numel, block_size, double, seed):
    """No element is further from its value than the nearest level is, but for rounding and the error of the absmax.

    In units of a: w (1 / a) is off by 2u, the midpoint by u / 2, so a wrong code lies up to 2 * 2.5u further than the nearest;
    the product is rounded: 6u; 8u here. The second level in units of |o| + b, with a - o and the sum rounded too: 16u here.
    """
    w = draw(numel, seed=seed) * torch.rand(numel, generator=torch.Generator().manual_seed(seed)) ** 4
    weight = quantize(w, block_size, double)
    absmax = quantize(w, block_size, double=False).scales.double()
    allowed = 8 * U * absmax
    if double:
        b, o = (x.double() for x in weight.second)
        b = b.repeat_interleave(nf4.SECOND_BLOCK)[: len(absmax)]
        nearest = ((absmax - o)[:, None] - nf4.dynamic_map().double() * b[:, None]).abs().amin(1)
        assert (nearest <= 0.00704 * b + 2 * U * o).all()  # half the widest gap of the map, and its missing -1
        allowed = allowed + nearest + 16 * U * (b + o.abs())
    x, a = w.double()[:, None], absmax.repeat_interleave(block_size)[:numel, None]
    nearest = (x - LEVELS * a).abs().amin(1)
    assert (nearest <= 0.1520 * a[:, 0]).all()  # half the gap between -1 and -0.696
    error = (dequantize_reference(weight, torch.float32).double() - w.double()).abs()
    assert (error <= nearest + allowed.repeat_interleave(block_size)[:numel]).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 2000), st.booleans(), st.integers(0, 10_000))
def test_round_trip_is_idempotent(numel, double, seed):
    """The extreme of a block is +-1 times its absmax: it comes back, and so do the levels. The absmax's own codes need not, for
    their mean moves; and beside much larger ones a small absmax may come out negative, which this draw avoids."""
    w = draw(numel, seed=seed)
    w[::32] = 0.03 + 0.02 * torch.rand(len(w[::32]), generator=torch.Generator().manual_seed(seed))
    once = quantize(w, double=double)
    again = quantize(dequantize_reference(once, torch.float32), double=double)
    assert torch.equal(again.packed, once.packed)
    if not double:
        assert torch.equal(again.scales, once.scales)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_refuses_what_is_not_finite(bad):
    w = draw(3, 50).double()
    w[1, 20] = bad
    with pytest.raises(ValueError, match=re.escape(f"{bad} at flat index 70") + ".*finite in float32.*Repair"):
        quantize(w)


def test_refusals():
    with pytest.raises(ValueError, match=r"up to 3\.\d+e\+38.*double=False"):
        quantize(torch.full((1000,), 3e38))
    for w in (torch.ones(4, dtype=torch.int32), torch.empty(0, 64)):
        with pytest.raises(ValueError, match="floating-point tensors with elements"):
            quantize(w)
    with pytest.raises(ValueError, match="block_size 48"):
        quantize(draw(64), 48)
    good = quantize(draw(3, 65))
    for part in (good.packed[:-1], good.packed.repeat_interleave(2)[::2]):
        with pytest.raises(ValueError, match="needs 98 contiguous"):
            Nf4Weight(part, good.scales, good.second, good.shape)
    empty = torch.empty
    for out in (empty(3, 130)[:, ::2], empty(3, 64), empty(3, 65).half(), empty(65).expand(3, 65)):
        with pytest.raises(ValueError, match="no `out`"):
            good.dequantize(torch.float32, out=out)


# -- the kernel against the reference ----------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_kernel_equals_reference(dtype, data):
    rows, cols = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 200) | st.sampled_from([64, 128, 192]))
    left, right = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20))
    block_size, double = data.draw(st.sampled_from([32, 64, 4096])), data.draw(st.booleans())
    w = draw(cols, rows, seed=rows * cols).T if data.draw(st.booleans()) else draw(rows, 2 * cols)[:, ::2]
    weight = quantize(w.to(DEVICE), block_size, double)
    assert torch.equal(quantize(w.contiguous(), block_size, double).packed, weight.packed.cpu())
    expected = dequantize_reference(weight, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "dequantize_reference", None)  # no falling back
        assert torch.equal(weight.dequantize(dtype), expected)
        wide = torch.full((rows, left + cols + right), 7.0, dtype=dtype, device=DEVICE)
        view = wide[:, left : left + cols]
        assert weight.dequantize(dtype, out=view) is view
    assert torch.equal(view, expected)
    assert (torch.cat([wide[:, :left], wide[:, left + cols :]], 1) == 7).all()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (3, 2, 50), (1, 3, 64, 130), (100_003,)])  # the last: 49 programs, 7 b's
def test_kernel_on_other_shapes(monkeypatch, shape, double, dtype):
    weight = quantize(draw(*shape), double=double).to(DEVICE)
    expected = dequantize_reference(weight, dtype)
    monkeypatch.setattr(nf4, "dequantize_reference", None)
    assert torch.equal(weight.dequantize(dtype), expected)
    if len(shape) > 2:  # leading dimensions that one stride joins
        wide = torch.zeros(*shape[:-1], shape[-1] + 3, dtype=dtype, device=DEVICE)
        assert torch.equal(weight.dequantize(dtype, out=wide[..., :-3]), expected)


@needs_kernel
def test_offsets_beyond_31_bits():
    """Rows 2^29 elements apart (memory that is reserved, not touched, on CPU): the fifth begins at 2^31."""
    weight = quantize(draw(5, 128)).to(DEVICE)
    out = torch.empty(4 * 2**29 + 128, dtype=torch.float16, device=DEVICE).as_strided((5, 128), (2**29, 1))
    assert torch.equal(weight.dequantize(torch.float16, out=out), dequantize_reference(weight, torch.float16))
