"""The LoRA update against the formula of the paper, in float64."""

from __future__ import annotations

import pytest
import torch
from judge import DEVICE
from tritune.kernels.lora import lora_update_reference

EPS = 2.0**-52


def tensors(shape=(3, 5), k=17, n=11, r=4, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, dtype=torch.float64, generator=g).to(DEVICE).requires_grad_()

    return draw(*shape, n), draw(*shape, k), draw(r, k), draw(n, r)


@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (2, 3, 4), (0, 5)])
@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.3, -1.5])
def test_value_and_gradients(shape, scaling):
    y, x, a, b = tensors(shape)
    out = lora_update_reference(y, x, a, b, scaling)
    expected = y + scaling * (x @ a.T @ b.T)
    # A sum of m products is off by at most about m eps of the sum of their absolute values (Higham, 3.1): K + R terms
    # here, and a few operations more, in each of two different orders.
    terms = 17 + 4 + 4
    size = y.abs() + abs(scaling) * (x.abs() @ a.abs().T @ b.abs().T)
    assert ((out - expected).abs() <= 2 * terms * EPS * size).all()
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours = torch.autograd.grad((out * weight).sum(), (y, x, a, b), allow_unused=True)
    theirs = torch.autograd.grad((expected * weight).sum(), (y, x, a, b), allow_unused=True)
    # In these sizes every gradient sums at most 24 * 11 * 4 products of numbers below 5: far within 1e-11.
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    y, x, a, b = tensors((2, 3), k=5, n=4, r=2)
    assert torch.autograd.gradcheck(lambda *t: lora_update_reference(*t, 0.7), (y, x, a, b))
    assert torch.autograd.gradgradcheck(lambda *t: lora_update_reference(*t, 0.7), (y, x, a, b))


def test_scaling_reaches_every_gradient_once():
    """alpha doubled: the update and the gradients of x, A and B double, that of y does not (exact: a power of two)."""
    y, x, a, b = tensors()
    one = torch.autograd.grad(lora_update_reference(y, x, a, b, 0.5).sum(), (y, x, a, b))
    two = torch.autograd.grad(lora_update_reference(y, x, a, b, 1.0).sum(), (y, x, a, b))
    assert torch.equal(one[0], two[0])
    for before, after in zip(one[1:], two[1:], strict=True):
        assert torch.equal(2 * before, after)


def test_zero_b_changes_nothing():
    y, x, a, b = tensors()
    assert torch.equal(lora_update_reference(y, x, a, torch.zeros_like(b), 3.0), y)


def test_inputs_are_left_alone():
    y, x, a, b = tensors()
    copies = [t.detach().clone() for t in (y, x, a, b)]
    lora_update_reference(y, x, a, b, 2.0).sum().backward()
    for tensor, copy in zip((y, x, a, b), copies, strict=True):
        assert torch.equal(tensor, copy)
