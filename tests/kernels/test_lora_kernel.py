"""LoRA groups and the fused MLP against the formula of the paper in float64; masks against the reference's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import DEVICE, DTYPES, draw, evaluate, require_twice, widened
from torch.nn.functional import linear
from tritune.kernels import lora
from tritune.kernels.dropout import dropout_reference, keep_mask_reference, token_keys
from tritune.kernels.lora import Projection, lora_linear, lora_mlp, lora_update_reference
from tritune.kernels.lora_dropout import (
    add_dropped_x_gradient,
    dropped_a_gradient,
    dropped_down,
    dropped_down_reference,
)
from tritune.kernels.nf4 import dequantize_reference, quantize
from tritune.kernels.swiglu import glu_reference

examples = settings(max_examples=20, deadline=None, derandomize=True)
LAYER_IDS = [5, 0xFFFFFFFF, 1 << 31]


def keys_of(rows: int, length: int) -> torch.Tensor:
    return token_keys(3, 7, torch.arange(rows) + 2**33, length).to(DEVICE)


def projection(outputs, inputs, rank, layer_id, seed, dtype, bias=False, trains=True):
    """One that is drawn, and the tensors of it that want a gradient."""
    weight = draw(outputs, inputs, seed=seed, dtype=dtype, grad=False, scale=inputs**-0.5)
    offset = draw(outputs, seed=seed + 1, dtype=dtype, grad=trains) if bias else None
    a = draw(rank, inputs, seed=seed + 2, dtype=dtype, scale=inputs**-0.5) if rank else None
    b = draw(outputs, rank, seed=seed + 3, dtype=dtype) if rank else None
    return Projection(weight, offset, a, b, 0.75, layer_id)


def flat(projections):
    """Their tensors as a list, and how to put others back in their place."""
    given = [
        (i, name)
        for i, p in enumerate(projections)
        for name in ("weight", "bias", "a", "b")
        if getattr(p, name) is not None
    ]

    def rebuilt(tensors):
        changed = list(projections)
        for (i, name), tensor in zip(given, tensors, strict=True):
            changed[i] = changed[i]._replace(**{name: tensor})
        return changed

    return [getattr(projections[i], name) for i, name in given], rebuilt


def formula(x, projections, keys, p):
    outputs = []
    for one in projections:
        y = linear(x, one.weight, one.bias)
        if one.a is not None:
            y = lora_update_reference(
                y, dropout_reference(x, keys, one.layer_id, p) if p else x, one.a, one.b, one.scaling
            )
        outputs.append(y)
    return outputs


@examples
@given(
    shape=st.sampled_from([(1, 1), (2, 7), (1, 64), (3, 50)]), inputs=st.sampled_from([16, 33, 70, 130]),
    ranks=st.sampled_from([(4,), (64,), (16, 16, 16), (8, 0, 8), (4, 24), (0, 5)]), p=st.sampled_from([0.0, 0.1]),
    bias=st.booleans(), strided=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_lora_linear(shape, inputs, ranks, p, bias, strided, dtype, seed):
    """Any subset of a group adapted, each with a rank and a mask of its own."""
    x = draw(*shape, 2 * inputs if strided else inputs, seed=seed, dtype=dtype)
    keys = keys_of(*shape)
    projections = [
        projection(20 + 9 * i, inputs, r, LAYER_IDS[i], seed + 10 * i, dtype, bias) for i, r in enumerate(ranks)
    ]
    tensors, rebuilt = flat(projections)

    def part(x):
        return x[..., ::2] if strided else x

    require_twice(
        lambda x, *t: lora_linear(part(x), rebuilt(t), keys, p),
        lambda x, *t: formula(part(x), rebuilt(t), keys, p),
        [x, *tensors],
    )


@examples
@given(
    shape=st.sampled_from([(1, 1), (2, 33)]), merged=st.booleans(),
    ranks=st.sampled_from([(4, 4, 4), (0, 8, 0), (0, 0, 16), (8, 8, 0)]),
    p=st.sampled_from([0.0, 0.1]), activation=st.sampled_from(["silu", "gelu_tanh"]), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_lora_mlp(shape, merged, ranks, p, activation, dtype, seed):
    inputs, hidden, keys = 33, 40, keys_of(*shape)
    x = draw(*shape, inputs, seed=seed, dtype=dtype)
    if merged:
        first = [projection(2 * hidden, inputs, ranks[0] or ranks[1], LAYER_IDS[0], seed + 10, dtype)]
    else:
        first = [projection(hidden, inputs, ranks[i], LAYER_IDS[i], seed + 10 * i, dtype) for i in range(2)]
    last = projection(inputs, hidden, ranks[2], LAYER_IDS[2], seed + 30, dtype)
    tensors, rebuilt = flat([*first, last])

    def plain(x, *tensors):
        *first, last = rebuilt(tensors)
        outputs = formula(x, first, keys, p)
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        return formula(glu_reference(gate, up, activation), [last], keys, p)

    def ours(x, *tensors):
        *first, last = rebuilt(tensors)
        return lora_mlp(x, first, last, activation, keys, p)

    require_twice(ours, plain, [x, *tensors])


@pytest.mark.parametrize("p", [0.5, *(pytest.param(p, marks=pytest.mark.slow) for p in (0.05, 0.9))])
def test_masks_of_all_three_kernels_are_the_reference_s_bit_for_bit(p):
    """Ones and unit vectors through the products: what comes out is the mask itself, times 1 / (1 - p)."""
    tokens, width, layer_ids = 70, 130, [3, 0xDEADBEEF]
    keys = keys_of(2, 35).reshape(-1)
    masks = [keep_mask_reference(keys, layer_id, width, p) for layer_id in layer_ids]
    scale = torch.tensor(1.0 / (1.0 - p), dtype=torch.float32)
    ones = torch.ones(tokens, width, device=DEVICE)
    for i, mask in enumerate(masks):
        for start in (0, 64, 112, width - 16):  # A = rows of the identity: S = columns of drop(1)
            a = torch.zeros(32, width, device=DEVICE)
            a[16 * i : 16 * i + 16, start : start + 16] = torch.eye(16, device=DEVICE)
            s = dropped_down(ones, a, keys, layer_ids, p)[:, 16 * i : 16 * i + 16]
            assert torch.equal(s, (mask * scale.to(DEVICE))[:, start : start + 16])
        ds = torch.zeros(tokens, 32, device=DEVICE)
        ds[:, 16 * i] = 1.0
        da = dropped_a_gradient(ones, ds, keys, layer_ids, p)  # counts what is kept of each feature
        torch.testing.assert_close(da[16 * i], mask.sum(0).float() * scale.to(DEVICE), rtol=1e-6, atol=0)
        a = torch.zeros(32, width, device=DEVICE)
        a[16 * i] = 1.0
        dx = torch.zeros(tokens, width, device=DEVICE)
        add_dropped_x_gradient(dx, ds, a, keys, layer_ids, p)
        assert torch.equal(dx, mask * scale.to(DEVICE))


@pytest.mark.parametrize(("tokens", "width", "rank", "count"), [(1, 16, 16, 1), (70, 130, 16, 3), (200, 33, 64, 2)])
def test_the_three_products_are_the_reference_and_its_gradients(tokens, width, rank, count):
    keys, layer_ids, p = keys_of(1, tokens).reshape(-1), LAYER_IDS[:count], 0.25

    class Products(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, a):
            ctx.save_for_backward(x, a)
            return dropped_down(x, a, keys, layer_ids, p)

        @staticmethod
        def backward(ctx, ds):
            x, a = ctx.saved_tensors
            dx = torch.zeros_like(x)
            add_dropped_x_gradient(dx, ds.contiguous(), a, keys, layer_ids, p)
            return dx, dropped_a_gradient(x, ds.contiguous(), keys, layer_ids, p)

    inputs = [draw(tokens, width, seed=1), draw(rank * count, width, seed=2)]
    require_twice(Products.apply, lambda x, a: dropped_down_reference(x, a, keys, layer_ids, p), inputs)


def test_a_mask_does_not_depend_on_the_batch_around_its_token():
    """Recomputed, split or packed otherwise: the token's key decides. One key beyond 2^31 and one below."""
    x, keys, p = draw(6, 33, seed=1, grad=False), keys_of(2, 3).reshape(-1), 0.3
    group = [projection(20, 33, 8, LAYER_IDS[0], 2, torch.float32)]
    whole = lora_linear(x, group, keys, p)[0]
    assert (keys < 0).any() and (keys > 0).any()  # noqa: PT018
    for order in ([3], [5, 0], [1, 2, 4]):
        torch.testing.assert_close(lora_linear(x[order], group, keys[order], p)[0], whole[order], rtol=1e-6, atol=1e-6)
    assert torch.equal(lora_linear(x, group, keys, p)[0], whole)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_splits_and_slices_are_summed(monkeypatch, p):
    """Tokens beyond a split of dA and beyond a slice of dY."""
    monkeypatch.setattr(lora, "SLICE_BYTES", 1)
    monkeypatch.setattr(lora, "SLICE_TOKENS", 128)
    monkeypatch.setattr("tritune.kernels.lora_dropout.SPLIT_FEATURES", 32)
    monkeypatch.setattr("tritune.kernels.lora_dropout.SPLIT_TOKENS", 100)  # no tile divides it
    keys = keys_of(2, 300)
    tensors, rebuilt = flat(
        [projection(20, 33, 16, LAYER_IDS[0], 1, torch.float32), projection(9, 33, 4, LAYER_IDS[1], 5, torch.float32)]
    )
    require_twice(
        lambda x, *t: lora_linear(x, rebuilt(t), keys, p), lambda x, *t: formula(x, rebuilt(t), keys, p),
        [draw(2, 300, 33, seed=9), *tensors],
    )  # fmt: skip


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("double", [True, False])
def test_over_a_base_in_nf4(p, double):
    """The dense weight is what the format says, made for one product at a time; the formula gets that weight."""
    dense = [
        projection(70, 33, 8, LAYER_IDS[0], 1, torch.float32),
        projection(20, 33, 0, LAYER_IDS[1], 5, torch.float32),
    ]
    packed = [quantize(one.weight, double=double) for one in dense]
    keys, factors = keys_of(2, 20), [dense[0].a, dense[0].b]
    x = draw(2, 20, 33, seed=9)

    def ours(x, a, b):
        return lora_linear(x, [dense[0]._replace(weight=packed[0], a=a, b=b), Projection(packed[1])], keys, p)

    def plain(x, a, b):
        weights = [dequantize_reference(w, torch.float32).to(x.dtype) for w in packed]
        return formula(x, [dense[0]._replace(weight=weights[0], a=a, b=b), Projection(weights[1])], keys, p)

    require_twice(ours, plain, [x, *factors])


def test_an_input_that_needs_no_gradient_gets_none_and_factors_do():
    """The first layer over frozen embeddings: its input's gradient is not computed at all."""
    tensors, rebuilt = flat([projection(20, 33, 8, LAYER_IDS[0], 1, torch.float32)])
    x = draw(2, 5, 33, seed=2, grad=False)
    require_twice(
        lambda x, *t: lora_linear(x, rebuilt(t)), lambda x, *t: formula(x, rebuilt(t), None, 0.0), [x, *tensors]
    )


def test_backward_twice_gives_the_same_bits():
    keys, x = keys_of(2, 20), draw(2, 20, 33, seed=1)
    group = [projection(40, 33, 8, LAYER_IDS[i], 5 * i, torch.float32) for i in range(2)]
    y = lora_mlp(x, group, projection(33, 40, 8, LAYER_IDS[2], 20, torch.float32), "silu", keys, 0.1)
    wanted = [x, group[0].a, group[1].b]
    first = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    second = torch.autograd.grad(y.sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_input_and_low_rank_products_are_kept():
    """No dropped input, no mask, no output: what waits for backward is X, S, keys and parameters."""
    saved = []

    def keep(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    x, keys = draw(1, 64, 48, seed=1), keys_of(1, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        lora_linear(x, [projection(20, 48, 4, LAYER_IDS[0], 2, torch.float32)], keys, 0.1)
    assert sorted(saved) == sorted([(64, 48), (64, 16), (1, 64), (20, 48), (4, 48), (20, 4)])


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_factors_that_are_transposed_views(p):
    """Rank 16 is what the kernels take as it is: nothing else would make a contiguous copy."""
    one, keys = projection(20, 33, 0, 1, 1, torch.float32), keys_of(2, 20)
    factors = [draw(33, 16, seed=5), draw(16, 20, seed=6)]
    require_twice(
        lambda x, w, a, b: lora_linear(x, [one._replace(weight=w, a=a.t(), b=b.t())], keys, p),
        lambda x, w, a, b: formula(x, [one._replace(weight=w, a=a.t(), b=b.t())], keys, p),
        [draw(2, 20, 33, seed=7), one.weight, *factors],
    )


def test_refusals():
    one = projection(20, 33, 4, 1, 1, torch.float32)
    x = draw(2, 5, 33, seed=1)
    with pytest.raises(ValueError, match=r"dropout of 0\.1 on an input \(2, 5, 33\) with keys None"):
        lora_linear(x, [one], None, 0.1)
    with pytest.raises(ValueError, match=r"keys \(2, 4\): one key a token"):
        lora_linear(x, [one], keys_of(2, 4), 0.1)
    with pytest.raises(ValueError, match=r"LoRA's base is frozen"):
        lora_linear(x, [one._replace(weight=one.weight.clone().requires_grad_())])
    with pytest.raises(ValueError, match=r"torch\.float64.*\*_reference"):
        lora_linear(widened(x), [one])


def test_the_formula_is_peft_s():
    """The judge of the formula: PEFT's own layer, without dropout."""
    from peft import LoraConfig, get_peft_model

    base = torch.nn.Sequential()
    base.add_module("q", torch.nn.Linear(33, 20))
    model = get_peft_model(base.to(DEVICE), LoraConfig(r=4, lora_alpha=3, target_modules=["q"]))
    layer = model.base_model.model.q
    torch.nn.init.normal_(layer.lora_B.default.weight)
    parts = [
        layer.base_layer.weight.detach(),
        layer.base_layer.bias.detach(),
        layer.lora_A.default.weight,
        layer.lora_B.default.weight,
    ]
    x = draw(2, 5, 33, seed=1)
    ours = evaluate(lambda x, a, b: lora_linear(x, [Projection(*parts[:2], a, b, 0.75)]), [x, *parts[2:]])
    theirs = evaluate(lambda x, a, b: layer(x), [x, *parts[2:]])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_candidate_forward_by_concatenation_is_the_same_function():
    """It lives in benchmarks/ until a GPU has said whether it is faster."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from lora_concat import ConcatGroup

    group = [projection(20 + 9 * i, 33, rank, LAYER_IDS[i], 10 * i, torch.float32) for i, rank in enumerate((4, 16, 8))]
    x = draw(50, 33, seed=9, grad=False)
    with torch.no_grad():
        candidate = ConcatGroup(group)
        ours = candidate.forward(candidate.buffer(x))
        exact = formula(x.double(), rebuilt_double(group), None, 0.0)
        shipped = lora_linear(x, group)
    for found, truth, y in zip(ours, exact, shipped, strict=True):
        assert (found - truth).abs().max() <= 2.0 * max((y - truth).abs().max(), 1e-6)


def rebuilt_double(group):
    tensors, rebuilt = flat(group)
    return rebuilt([widened(t) for t in tensors])
