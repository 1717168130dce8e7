"""Counter-based dropout against an independent implementation in plain Python integers, and against statistics.

Every test is deterministic (a hash of fixed numbers), so a bound holds or fails for ever; it is derived as what a
truly random mask would break with a probability of about 1e-9 (six standard deviations of a binomial).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from judge import DEVICE
from scipy.stats import chi2, poisson
from torch.testing import assert_close
from tritune.kernels.dropout import dropout_reference, keep_mask_reference, mix, token_keys
from tritune.trainer.methods.token_keys import TokenKeys, layer_id_of

SIGMAS = 6.0
MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9


# -- the specification again, in Python's unbounded integers ---------------------------------------------


def fmix32(h: int) -> int:
    """MurmurHash3's finalizer, from its public description."""
    h &= MASK
    h ^= h >> 16
    h = h * 0x85EBCA6B & MASK
    h ^= h >> 13
    h = h * 0xC2B2AE35 & MASK
    return h ^ h >> 16


def key_of(seed: int, step: int, sample: int, position: int) -> int:
    key = fmix32(seed * GOLDEN + 1)
    key = fmix32(key ^ step * GOLDEN & MASK)
    key = fmix32(fmix32(key ^ sample & MASK) + (sample >> 32 & MASK) * GOLDEN)
    return fmix32(key ^ fmix32(position * GOLDEN))


def kept(key: int, layer_id: int, feature: int, p: float) -> bool:
    return fmix32(key ^ fmix32(layer_id + feature * GOLDEN)) >= p * 2**32


def ids(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=DEVICE)


def bits(x: torch.Tensor) -> np.ndarray:
    return x.cpu().numpy().astype(np.int64) & MASK


def test_mix_has_the_published_values_of_murmur3():
    """MurmurHash3_x86_32 of an empty message is fmix32(seed): known answers of its test suites."""
    x = torch.tensor([0, 1, -1], dtype=torch.int32, device=DEVICE)
    assert bits(mix(x)).tolist() == [0, 0x514E28B7, 0x81F16F39]


def test_mix_is_a_bijection_with_full_avalanche():
    g = torch.Generator().manual_seed(0)
    x = torch.unique(torch.randint(-(2**31), 2**31, (1 << 16,), generator=g)).to(DEVICE, torch.int32)
    assert len(np.unique(bits(mix(x)))) == len(x)
    for bit in range(32):
        flipped = mix(x ^ (torch.tensor(1, dtype=torch.int32) << bit))
        changed = bits(mix(x)) ^ bits(flipped)
        rates = np.array([(changed >> out & 1).mean() for out in range(32)])
        # Appleby measured a bias below 0.25 % for this finalizer; sampling adds 6 sigma of 65,536 random draws.
        assert np.abs(rates - 0.5).max() < 0.0025 + SIGMAS * 0.5 / 256


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**40 + 3, -1])
@pytest.mark.parametrize("step", [0, 1, 77, 2**31 + 5])
def test_bits_equal_plain_python(seed, step):
    samples = [0, 1, 5, 2**31, 2**32 - 1, 2**32, 2**33 + 7, 2**62 + 1]
    keys = token_keys(seed, step, ids(*samples), 5)
    expected = [[key_of(seed, step, s, t) for t in range(5)] for s in samples]
    assert bits(keys).tolist() == expected
    for layer_id, p in [(0, 0.5), (layer_id_of("model.layers.3.mlp.up_proj"), 0.1), (MASK, 0.9), (2**31, 1e-3)]:
        mask = keep_mask_reference(keys, layer_id, 9, p)
        wanted = [[[kept(k, layer_id, f, p) for f in range(9)] for k in row] for row in expected]
        assert mask.tolist() == wanted


def test_low_bits_of_seed_and_step_count():
    a = token_keys(7, 3, ids(1, 2), 4)
    assert torch.equal(a, token_keys(7 + 2**32, 3 + 2**32, ids(1, 2), 4))
    for other in (token_keys(8, 3, ids(1, 2), 4), token_keys(7, 4, ids(1, 2), 4), token_keys(7, 3, ids(2, 3), 4)):
        assert not (a == other).any(), "32-bit words that agree by chance: 8 * 2^-32"


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_keep_rate(p):
    """Kept of n is Binomial(n, 1 - p): six standard deviations."""
    keys = token_keys(11, 5, torch.arange(32, device=DEVICE), 128)
    mask = keep_mask_reference(keys, layer_id_of("a"), 256, p)
    n = mask.numel()
    assert abs(mask.double().mean().item() - (1 - p)) <= SIGMAS * math.sqrt(p * (1 - p) / n)
    # and in every feature, every position and every sample, with the same rule on fewer draws
    for dims in [(0, 1), (0, 2), (1, 2)]:
        rates = mask.double().mean(dim=dims)
        draws = n // rates.numel()
        # the normal bound needs a few expected drops; below, the Poisson tail says the same
        limit = SIGMAS * math.sqrt(p * (1 - p) / draws)
        rare = min(p, 1 - p) * draws
        if rare < 50:
            limit = max(limit, poisson.isf(1e-9, rare) / draws)
        assert (rates - (1 - p)).abs().max().item() <= limit


def test_nothing_is_dropped_at_zero():
    keys = token_keys(0, 0, torch.arange(64, device=DEVICE), 64)
    assert keep_mask_reference(keys, 3, 512, 0.0).all()
    x = torch.randn(64, 64, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(dropout_reference(x, keys, 3, 0.0), x)


def test_nearly_everything_is_dropped_below_one():
    keys = token_keys(0, 0, torch.arange(64, device=DEVICE), 64)
    p = 1.0 - 2.0**-20
    count = int(keep_mask_reference(keys, 3, 512, p).sum())  # 2^21 draws at 2^-20: Poisson(2)
    assert count <= poisson.isf(1e-9, 2.0)


def phi(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of two masks times sqrt(n): standard normal for independent ones; its square is the 2 x 2
    chi-square."""
    a, b = a.reshape(-1).double(), b.reshape(-1).double()
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / torch.sqrt((a * a).sum() * (b * b).sum())) * math.sqrt(a.numel())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_independent_across_every_coordinate(p):
    """Masks of neighbouring (and not so neighbouring) seeds, steps, samples, positions, layers, features do not
    correlate."""

    def draw(seed=3, step=9, sample=100, position=0, layer_id=1000, feature=0):
        keys = token_keys(seed, step, torch.arange(sample, sample + 32, device=DEVICE), position + 64)[:, position:]
        return keep_mask_reference(keys, layer_id, feature + 64, p)[..., feature:]

    base = draw()
    lags = [1, 2, 3, 8, 16, 31, 32, 33, 64, 128, 1 << 10]
    for name, origin in [
        ("seed", 3),
        ("step", 9),
        ("sample", 100),
        ("position", 0),
        ("layer_id", 1000),
        ("feature", 0),
    ]:
        for lag in lags:
            score = phi(base, draw(**{name: origin + lag}))
            assert abs(score) < SIGMAS, f"{name} + {lag}: {score:.1f} sigma"
    # coordinates that a weak hash would confuse: t and f, sample and position, seed and step exchanged
    keys = token_keys(3, 9, torch.arange(64, device=DEVICE), 64)
    mask = keep_mask_reference(keys, 5, 64, p)
    for a, b in itertools.combinations(range(3), 2):
        off = mask.transpose(a, b)
        different = torch.ones(64, 64, 64, dtype=torch.bool, device=DEVICE)
        index = torch.arange(64, device=DEVICE)
        shape_a = [64 if d == a else 1 for d in range(3)]
        shape_b = [64 if d == b else 1 for d in range(3)]
        different &= index.reshape(shape_a) < index.reshape(shape_b)  # each unordered pair once
        assert abs(phi(mask[different], off[different])) < SIGMAS
    assert abs(phi(draw(seed=4, step=7), draw(seed=7, step=4))) < SIGMAS


@pytest.mark.parametrize("along", ["feature", "position", "sample", "layer_id", "step", "seed"])
def test_runs_of_four_are_uniform(along):
    """Chi-square on the 16 patterns of four neighbours at p = 1/2: pairs, triples and quadruples at once (15
    degrees)."""
    if along == "feature":
        quads = keep_mask_reference(token_keys(1, 2, torch.arange(64, device=DEVICE), 64), 7, 64 * 4, 0.5).reshape(
            -1, 4
        )
    elif along == "position":
        quads = keep_mask_reference(token_keys(1, 2, torch.arange(64, device=DEVICE), 64 * 4), 7, 64, 0.5)
        quads = quads.reshape(64, 64, 4, 64).movedim(2, -1).reshape(-1, 4)
    elif along == "sample":
        quads = keep_mask_reference(token_keys(1, 2, torch.arange(64 * 4, device=DEVICE), 64), 7, 64, 0.5)
        quads = quads.reshape(64, 4, 64, 64).movedim(1, -1).reshape(-1, 4)
    else:
        masks = []
        for i in range(4):
            seed, step, layer_id = 1 + i * (along == "seed"), 2 + i * (along == "step"), 7 + i * (along == "layer_id")
            masks.append(
                keep_mask_reference(token_keys(seed, step, torch.arange(64, device=DEVICE), 64), layer_id, 64, 0.5)
            )
        quads = torch.stack(masks, dim=-1).reshape(-1, 4)
    counts = torch.bincount((quads.long() * torch.tensor([1, 2, 4, 8], device=DEVICE)).sum(-1), minlength=16).double()
    expected = counts.sum() / 16
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < chi2.isf(1e-9, 15)
    assert statistic > chi2.ppf(1e-9, 15), "too even to be random"


def test_tokens_share_a_key_no_more_often_than_chance():
    """131,072 tokens in 32-bit words: n^2 / 2^33 = 2 expected pairs, Poisson."""
    keys = torch.cat(
        [
            token_keys(seed, step, torch.arange(64, device=DEVICE), 128).reshape(-1)
            for seed in range(4)
            for step in range(4)
        ]
    )
    n = keys.numel()
    assert n == 1 << 17
    assert n - len(torch.unique(keys)) <= poisson.isf(1e-9, n * n / 2**33)


def test_the_real_sites_of_a_model_are_distinct_and_independent():
    names = [
        f"model.layers.{i}.{n}" for i in range(32) for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    ]
    layer_ids = [layer_id_of(n) for n in names]
    assert len(set(layer_ids)) == len(layer_ids)
    keys = token_keys(0, 1, torch.arange(16, device=DEVICE), 32)
    masks = torch.stack([keep_mask_reference(keys, s, 32, 0.1).reshape(-1) for s in layer_ids]).double()
    masks -= masks.mean(dim=1, keepdim=True)
    masks /= masks.norm(dim=1, keepdim=True)
    scores = (masks @ masks.T).fill_diagonal_(0.0) * math.sqrt(masks.shape[1])
    assert scores.abs().max() < SIGMAS + 0.5  # 4,560 pairs: half a sigma more keeps the chance at 1e-8


def test_depends_on_nothing_but_its_coordinates():
    """Padding to a larger width, another order of rows, another split: the same bits for the same token."""
    samples, p, layer_id = ids(4, 900, 17, 2**35), 0.3, layer_id_of("x")
    keys = token_keys(5, 6, samples, 12)
    mask = keep_mask_reference(keys, layer_id, 24, p)
    wide = token_keys(5, 6, samples, 50)
    assert torch.equal(wide[:, :12], keys)
    assert torch.equal(keep_mask_reference(wide, layer_id, 24, p)[:, :12], mask)
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    assert torch.equal(keep_mask_reference(token_keys(5, 6, samples[order], 12), layer_id, 24, p), mask[order])
    for row in range(4):
        alone = token_keys(5, 6, samples[row : row + 1], 12)
        assert torch.equal(keep_mask_reference(alone, layer_id, 24, p)[0], mask[row])
    some = torch.tensor([40, 3, 17], device=DEVICE)  # as the output head sees them: any tokens, flattened
    assert torch.equal(keep_mask_reference(keys.reshape(-1)[some], layer_id, 24, p), mask.reshape(-1, 24)[some])
    assert torch.equal(keep_mask_reference(keys, layer_id, 10, p), mask[..., :10]), "nor on the number of features"


def test_value_and_gradient():
    keys = token_keys(1, 1, ids(0, 1, 2), 7)
    x = (
        torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        .to(DEVICE)
        .requires_grad_()
    )
    y = dropout_reference(x, keys, 9, 0.25)
    keep = keep_mask_reference(keys, 9, 16, 0.25)
    assert 0 < keep.sum() < keep.numel()
    # one multiplication by a rounded 1 / (1 - p) against one division: 2 units in the last place
    assert_close(y, torch.where(keep, x / 0.75, torch.zeros_like(x)), rtol=2 * 2.0**-52, atol=0)
    weight = torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (grad,) = torch.autograd.grad((y * weight).sum(), x)
    assert_close(grad, torch.where(keep, weight / 0.75, torch.zeros_like(x)), rtol=2 * 2.0**-52, atol=0)
    assert y.dtype == torch.float64
    assert dropout_reference(x.detach().bfloat16(), keys, 9, 0.25).dtype == torch.bfloat16


def test_a_layer_that_sees_other_tokens_is_refused():
    keys = TokenKeys()
    with pytest.raises(RuntimeError, match=r"method\.exclude"):
        keys.dropout(torch.ones(2, 3, 4), 1, 0.5)
    keys.set(token_keys(0, 0, ids(1, 2), 3))
    assert keys.dropout(torch.ones(2, 3, 4, device=DEVICE), 1, 0.5).shape == (2, 3, 4)
    assert keys.dropout(torch.ones(6, 4, device=DEVICE), 1, 0.5).shape == (6, 4), "a flattened view of the same tokens"
    with pytest.raises(RuntimeError, match="does not hold the forward's tokens"):
        keys.dropout(torch.ones(2, 5, 4, device=DEVICE), 1, 0.5)
