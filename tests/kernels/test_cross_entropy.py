"""Losses from hidden states and a head, and KL to a teacher, against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from judge import DEVICE, DTYPES, draw, evaluate, require_twice, widened
from tritune.kernels import cross_entropy, linear_cross_entropy
from tritune.kernels.cross_entropy import LossOptions, cross_entropy_, cross_entropy_reference
from tritune.kernels.linear_cross_entropy import chunk_of, linear_cross_entropy_reference
from tritune.kernels.linear_kl import linear_kl, linear_kl_reference

examples = settings(max_examples=30, deadline=None, derandomize=True)
loss_of = linear_cross_entropy.linear_cross_entropy


def targets_of(tokens: int, vocabulary: int, ignored: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return torch.where(torch.rand(tokens, generator=generator) < ignored, -100, targets).to(DEVICE)


@examples
@given(
    tokens=st.sampled_from([0, 1, 2, 13, 40]), vocabulary=st.sampled_from([2, 101, 1000, 8193]),
    width=st.sampled_from([8, 17, 33]), trains=st.booleans(), bias=st.booleans(), summed=st.booleans(), counted=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    options=st.sampled_from([LossOptions(), LossOptions(label_smoothing=0.1), LossOptions(z_loss=0.01), LossOptions(softcap=3.0),
                             LossOptions(0.1, 0.01, 5.0, 0.5)]),
    chunk=st.sampled_from([1, 5, 4096]), strided=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_linear_cross_entropy(
    tokens, vocabulary, width, trains, bias, summed, counted, ignored, options, chunk, strided, dtype, seed
):
    """Frozen and trainable heads, summed with weights and per token, ignored rows compacted or skipped."""
    hidden = draw(tokens, 2 * width, seed=seed, dtype=dtype)
    weight = draw(vocabulary, width, seed=seed + 1, dtype=dtype, grad=trains)
    inputs = [hidden, weight] + ([draw(vocabulary, seed=seed + 2, dtype=dtype, grad=trains)] if bias else [])
    targets = targets_of(tokens, vocabulary, ignored, seed)
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).to(DEVICE) if summed else None
    kept = int((targets != -100).sum()) if counted else None

    def part(x):
        return x[:, ::2] if strided else x[:, :width]

    def ours(x, w, b=None):
        loss, lse = loss_of(
            part(x), w, targets, b, reduction="sum" if summed else "none", weights_M=weights, options=options, num_kept=kept,
            chunk_tokens=chunk,
        )  # fmt: skip
        assert not lse.requires_grad
        assert loss.dtype == lse.dtype == torch.float32
        return loss

    def formula(x, w, b=None):
        loss, _ = linear_cross_entropy_reference(part(x), w, targets, b, options, weights)
        return loss.sum() if summed else loss

    require_twice(ours, formula, inputs)


def test_an_upstream_gradient_without_strides():
    """`loss.sum()` sends back one number with a stride of 0, of which a kernel must not read the neighbours."""
    hidden, weight, targets = draw(10, 8, seed=1), draw(100, 8, seed=2), targets_of(10, 100, 0.0, 3)
    require_twice(
        lambda x, w: loss_of(x, w, targets)[0].sum(), lambda x, w: linear_cross_entropy_reference(x, w, targets)[0].sum(),
        [hidden, weight],
    )  # fmt: skip


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_logsumexp(ignored):
    hidden, weight, targets = draw(9, 8, seed=1), draw(300, 8, seed=2), targets_of(9, 300, ignored, 3)
    for kept in (None, int((targets != -100).sum())):
        _, lse = loss_of(hidden, weight, targets, num_kept=kept)
        _, exact = linear_cross_entropy_reference(widened(hidden), widened(weight), targets)
        torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_reference_s_loss_is_pytorch_s():
    """The formulas themselves, against torch.nn.functional.cross_entropy, in float64."""
    logits, targets = draw(20, 50, seed=1, dtype=torch.float64), targets_of(20, 50, 0.3, 2)
    for smoothing in (0.0, 0.2):
        loss, _ = cross_entropy_reference(logits, targets, LossOptions(label_smoothing=smoothing))
        judge = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(loss, judge, rtol=1e-12, atol=1e-12)
    lse = torch.logsumexp(3.0 * torch.tanh(0.5 * logits / 3.0), dim=-1)
    loss, found = cross_entropy_reference(logits, targets, LossOptions(z_loss=0.1, softcap=3.0, scale=0.5))
    kept = targets != -100
    torch.testing.assert_close(found[kept], lse[kept], rtol=1e-12, atol=1e-12)
    bent = 3.0 * torch.tanh(0.5 * logits / 3.0)
    plain = torch.nn.functional.cross_entropy(bent, targets, reduction="none")
    torch.testing.assert_close(loss[kept], (plain + 0.1 * lse**2)[kept], rtol=1e-12, atol=1e-12)
    assert not loss[~kept].any()


def test_token_losses_and_summed_losses_agree_on_gradients():
    """Weights known in forward (three products), or met in backward (four): the same gradient of the head."""
    hidden, weight = draw(30, 16, seed=1), draw(500, 16, seed=2)
    targets, weights = (
        targets_of(30, 500, 0.2, 3),
        torch.rand(30, generator=torch.Generator().manual_seed(4)).to(DEVICE),
    )
    summed = torch.autograd.grad(
        loss_of(hidden, weight, targets, reduction="sum", weights_M=weights)[0], [hidden, weight]
    )
    tokens = torch.autograd.grad((loss_of(hidden, weight, targets)[0] * weights).sum(), [hidden, weight])
    for a, b in zip(summed, tokens, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_backward_twice_gives_the_same_bits():
    hidden, weight, targets = draw(10, 8, seed=1), draw(100, 8, seed=2), targets_of(10, 100, 0.0, 3)
    for reduction in ("none", "sum"):
        loss = loss_of(hidden, weight, targets, reduction=reduction)[0].sum()
        first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
        second = torch.autograd.grad(loss, [hidden, weight])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_logits_are_never_whole(monkeypatch):
    """The slab holds a chunk, and without a gradient to make no logit is written over."""
    seen = []

    def note(logits, targets, options, weights, loss, lse, gradient):
        seen.append((tuple(logits.shape), gradient))
        cross_entropy_(logits, targets, options, weights, loss, lse, gradient)

    monkeypatch.setattr(linear_cross_entropy, "cross_entropy_", note)
    hidden, weight, targets = draw(11, 4, seed=1), draw(50, 4, seed=2, grad=False), targets_of(11, 50, 0.0, 3)
    with torch.no_grad():
        loss_of(hidden, weight, targets, chunk_tokens=4)
    assert seen == [((4, 50), False), ((4, 50), False), ((3, 50), False)]
    seen.clear()
    loss_of(hidden, weight, targets, chunk_tokens=4, num_kept=11)[0].sum().backward()
    assert seen == [((4, 50), True), ((4, 50), True), ((3, 50), True)], "a frozen head: one pass, in forward"
    assert chunk_of(128256, torch.bfloat16) == 2048
    assert chunk_of(262144, torch.float32) == 512


def test_a_row_wider_than_a_block_far_into_memory():
    """Offsets count in 64 bits: rows of a slab with a stride of 2^31 elements would wrap."""
    if DEVICE.type != "cpu":
        pytest.skip("memory is only reserved, not touched, on CPU")
    stride = 2**31 + 7
    logits = torch.empty_strided(
        (2, 5000), (stride, 1), dtype=torch.float16
    )  # 4 GiB of address space, two pages of it used
    logits.copy_(draw(2, 5000, seed=1, dtype=torch.float16, grad=False))
    loss, lse = torch.empty(2), torch.empty(2)
    targets = torch.tensor([4999, 17])
    expected, _ = cross_entropy_reference(logits.double(), targets)
    cross_entropy_(logits, targets, LossOptions(), None, loss, lse, True)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_head_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"a head of torch\.float16 for hidden states of torch\.float32"):
        loss_of(draw(2, 4, seed=1), draw(9, 4, seed=2, dtype=torch.float16), torch.tensor([1, 2]))


@examples
@given(
    tokens=st.sampled_from([0, 1, 13]), vocabulary=st.sampled_from([2, 300, 2050]), temperature=st.sampled_from([1.0, 2.5]),
    trains=st.booleans(), chunk=st.sampled_from([5, 4096]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_linear_kl(tokens, vocabulary, temperature, trains, chunk, dtype, seed):
    """The student's head frozen, losses per token; or training, losses summed. The teacher has another width."""
    assume(tokens != 1 or vocabulary > 2)  # one sum of two terms that nearly cancel: the plain formula's error is luck
    student = [draw(tokens, 8, seed=seed, dtype=dtype), draw(vocabulary, 8, seed=seed + 1, dtype=dtype, grad=trains)]
    teacher = [
        draw(tokens, 5, seed=seed + 2, dtype=dtype, grad=False),
        draw(vocabulary, 5, seed=seed + 3, dtype=dtype, grad=False),
    ]
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).to(DEVICE)

    def ours(*inputs):
        how = {"reduction": "sum", "weights_M": weights} if trains else {}
        return linear_kl(*inputs, temperature=temperature, chunk_tokens=chunk, **how)

    def formula(*inputs):
        kl = linear_kl_reference(*inputs, temperature=temperature)
        return (kl * weights).sum() if trains else kl

    require_twice(ours, formula, student + teacher)


def test_kl_of_a_student_that_is_its_teacher():
    hidden, weight = draw(6, 8, seed=1), draw(200, 8, seed=2, grad=False)
    kl, gradient = evaluate(lambda x: linear_kl(x, weight, x, weight), [hidden])
    assert kl.abs().max() < 1e-5
    assert gradient.abs().max() < 1e-6


def test_the_reference_s_kl_is_pytorch_s():
    inputs = [draw(7, 4, seed=1, dtype=torch.float64), draw(30, 4, seed=2, dtype=torch.float64)]
    teacher = [draw(7, 6, seed=3, dtype=torch.float64), draw(30, 6, seed=4, dtype=torch.float64)]
    s, t = (torch.log_softmax(x @ w.t() / 2.0, dim=-1) for x, w in (inputs, teacher))
    judge = torch.nn.functional.kl_div(s, t, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(linear_kl_reference(*inputs, *teacher, 2.0), judge, rtol=1e-12, atol=1e-12)


def test_kl_per_token_with_a_head_that_trains_is_refused():
    with pytest.raises(ValueError, match=r"reduction='none' with a head that trains"):
        linear_kl(draw(2, 4, seed=1), draw(9, 4, seed=2), draw(2, 4, seed=3), draw(9, 4, seed=4))


def test_a_target_that_is_no_class_is_no_loss():
    """A step with it is refused as not finite, instead of trained on a loss that looks like one."""
    loss, _ = loss_of(draw(3, 8, seed=1), draw(50, 8, seed=2), torch.tensor([3, 50, -1], device=DEVICE))
    assert torch.isfinite(loss).tolist() == [True, False, False]


def test_classes_that_are_masked_out_count_for_nothing():
    """A whole block of -inf, before any other number was seen."""
    logits = draw(2, 2 * cross_entropy.BLOCK, seed=1, grad=False)
    logits[:, : cross_entropy.BLOCK] = -torch.inf
    targets, loss, lse = torch.tensor([cross_entropy.BLOCK + 5] * 2, device=DEVICE), torch.empty(2), torch.empty(2)
    expected, _ = cross_entropy_reference(logits.double(), targets)
    loss, lse = loss.to(DEVICE), lse.to(DEVICE)
    cross_entropy_(logits, targets, LossOptions(), None, loss, lse, True)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert not logits[:, : cross_entropy.BLOCK].any()
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("trains", [False, True])
def test_gradients_made_in_forward_are_freed_by_backward(reduction, trains):
    """The head's is 2 GB in float32: kept with a loss that the loop still names, it would outlive the optimizer's step."""
    hidden, weight = draw(10, 8, seed=1), draw(100, 8, seed=2, grad=trains)
    loss = loss_of(hidden, weight, targets_of(10, 100, 0.0, 3), reduction=reduction)[0].sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_second_derivative_is_refused_and_not_zero():
    hidden = draw(4, 8, seed=1)
    loss = loss_of(hidden, draw(50, 8, seed=2), targets_of(4, 50, 0.0, 3))[0].sum()
    factor = torch.ones((), device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss * factor, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_factor_of_a_gradient_is_not_rounded_to_the_gradient_s_dtype():
    """0-dimensional, it would take part in the product as bfloat16 on a GPU: the type rule says so, CPU happens to obey less."""
    from tritune.kernels.products import scaled

    x, factor = torch.ones(5, dtype=torch.bfloat16, device=DEVICE), torch.tensor(1.0 / 3001.0, device=DEVICE)
    assert torch.result_type(x, factor) == torch.bfloat16
    assert torch.result_type(x, factor.reshape(1)) == torch.float32
    assert torch.equal(scaled(x, factor, torch.float32), factor.expand(5))


def test_kl_with_weights_that_lie_apart():
    shapes = ((7, 4), (30, 4), (7, 4), (30, 4))
    inputs = [draw(*shape, seed=1 + i, grad=i == 0) for i, shape in enumerate(shapes)]
    apart = torch.rand(7, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)[:, 1]
    require_twice(
        lambda *t: linear_kl(*t, reduction="sum", weights_M=apart),
        lambda *t: (linear_kl_reference(*t) * apart).sum(),
        inputs,
    )


def test_the_tile_covers_any_vocabulary():
    assert cross_entropy.BLOCK < 8193, "the tests above cross a block's end"
