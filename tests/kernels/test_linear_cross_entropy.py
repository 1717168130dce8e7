"""Token losses through the head, in chunks, against log-softmax written out, in float64."""

from __future__ import annotations

import pytest
import torch
from judge import DEVICE
from torch import nn
from tritune.kernels.linear_cross_entropy import token_nll_reference

M, H, V = 13, 6, 19


class Head(nn.Module):
    """A head with what heads have: a bias, a scale, a cap; it notes what it was called with."""

    def __init__(self, bias: bool, cap: float | None = None, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(V, H, dtype=torch.float64, generator=g).to(DEVICE, dtype))
        self.bias = nn.Parameter(torch.randn(V, dtype=torch.float64, generator=g).to(DEVICE, dtype)) if bias else None
        self.cap, self.calls = cap, []

    def forward(self, hidden, start, stop):
        self.calls.append((start, stop, len(hidden)))
        return self.logits(hidden)

    def logits(self, hidden):
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def inputs(m=M, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(m, H, dtype=torch.float64, generator=g).to(DEVICE, dtype).requires_grad_()
    return hidden, torch.randint(V, (m,), generator=g).to(DEVICE)


def straightforward(hidden, head, targets):
    logits = head.logits(hidden)
    return torch.logsumexp(logits, dim=-1) - logits[torch.arange(len(targets)), targets]


# One NLL is a dot product of H terms and a log-sum-exp of V: relative errors of about (H + V) eps = 25 * 2.2e-16 of
# values
# below 40. 1e-12 leaves a factor of five.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("chunk", [1, 2, 5, 12, 13, 14, 10_000])
def test_value_and_gradients(bias, cap, chunk):
    head = Head(bias, cap)
    hidden, targets = inputs()
    nll = token_nll_reference(hidden, head, targets, chunk)
    expected = straightforward(hidden, head, targets)
    assert nll.shape == (M,)
    assert nll.dtype == torch.float64
    torch.testing.assert_close(nll, expected, **TOLERANCE)
    weight = torch.randn(M, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    wanted = [hidden, *head.parameters()]
    ours = torch.autograd.grad((nll * weight).sum(), wanted)
    theirs = torch.autograd.grad((expected * weight).sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("chunk", [2, 100])
def test_gradcheck(chunk):
    head = Head(bias=True, cap=8.0)
    hidden, targets = inputs(5)

    def function(hidden, weight, bias):
        def call(h, i, j):
            return torch.tanh(nn.functional.linear(h, weight, bias) / 8.0) * 8.0

        return token_nll_reference(hidden, call, targets, chunk)

    assert torch.autograd.gradcheck(function, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("chunk", [1, 4, 13, 50])
def test_chunks_cover_every_token_once_and_are_never_larger(chunk):
    head = Head(bias=True)
    hidden, targets = inputs()
    nll = token_nll_reference(hidden, head, targets, chunk)
    forward = list(head.calls)
    assert all(stop - start == rows <= chunk for start, stop, rows in forward)
    assert [i for start, stop, _ in forward for i in range(start, stop)] == list(range(M))
    nll.sum().backward()
    again = head.calls[len(forward) :]
    # recomputed, with the same places: a head whose dropout goes by token needs them
    assert sorted(again) == (sorted(forward) if chunk < M else [])


@pytest.mark.parametrize("chunk", [1, 100])
def test_zero_tokens(chunk):
    """A filler micro-batch: no loss, and gradients that are zero and not absent (every rank reduces all of them)."""
    head = Head(bias=True)
    hidden, targets = inputs(0)
    nll = token_nll_reference(hidden, head, targets, chunk)
    assert nll.shape == (0,)
    nll.sum().backward()
    for tensor in (hidden, head.weight, head.bias):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_low_precision_logits_are_widened_before_the_softmax():
    """bfloat16 logits: the only error is that of the logits themselves, at most half a unit in 8 bits each.

    In one chunk: a product of other rows may be rounded otherwise.
    """
    head, (hidden, targets) = Head(bias=True, dtype=torch.bfloat16), inputs(dtype=torch.bfloat16)
    nll = token_nll_reference(hidden, head, targets, M)
    assert nll.dtype == torch.float32
    logits = head.logits(hidden).detach().double()
    expected = torch.logsumexp(logits, -1) - logits[torch.arange(M), targets]
    # of the same bfloat16 logits, float32 is off by about V eps32 of values below 40
    torch.testing.assert_close(nll.double(), expected, rtol=V * 2.0**-23, atol=V * 2.0**-23)


def test_huge_logits_do_not_overflow():
    head = Head(bias=False)
    hidden, targets = inputs()
    with torch.no_grad():
        head.weight.mul_(1e4)
    nll = token_nll_reference(hidden, head, targets, 4)
    assert torch.isfinite(nll).all()
    torch.testing.assert_close(nll, straightforward(hidden, head, targets), rtol=1e-12, atol=1e-8)
    assert (nll > -1e-8).all()
