"""Before a run: each chosen kernel beside its reference on the run's own shapes and dtype, forward and backward.

A kernel passes when its error (root mean square over a tensor) is at most twice the reference's own in the same dtype, or a
rounding of the largest value, where the reference happens to be exact; both against the reference in the next wider dtype.
One that does not pass, or that raises, gives way to the reference, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tritune.kernels.dispatch import Choice
from tritune.kernels.dropout import dropout_reference, token_keys
from tritune.kernels.families import FAMILIES, activation_of, base_of, is_adapted, mlp_inputs
from tritune.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tritune.kernels.lora import Projection, lora_linear, lora_update_reference
from tritune.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from tritune.kernels.rope import rope, rope_reference
from tritune.kernels.swiglu import glu, glu_reference

TOKENS = 128  # rows of a check


@dataclass(frozen=True)
class Sizes:
    """What a model's kernels will see, None where it has no such thing.

    Attributes:
        norms: (width, whether the weight trains), each kind once.
        rotation: heads, heads of keys, features of a head, features rotated.
        mlp: width and activation.
        head: vocabulary and width.
        lora: (outputs, inputs, rank, rate of dropping), each kind once.
    """

    norms: tuple[tuple[int, bool], ...]
    rotation: tuple[int, int, int, int] | None
    mlp: tuple[int, str] | None
    head: tuple[int, int] | None
    lora: tuple[tuple[int, int, int, float], ...]


def sizes_of(model: Any, idle: Collection[nn.Module] = ()) -> Sizes:
    """Read them off a transformers model's modules but `idle`, which never run, whatever its parameters are made of."""
    modules = [m for _, m in model.named_modules(memo=set(idle))]
    config = model.config.get_text_config()
    known = config.model_type in FAMILIES  # others keep their own attention and MLP
    weights = [m.weight for m in modules if type(m).__name__.endswith("RMSNorm") and hasattr(m, "weight")]
    norms = {(w.numel(), w.requires_grad) for w in weights}
    attention = next((m for m in modules if hasattr(m, "o_proj") and hasattr(m, "head_dim")), None) if known else None
    rotation = None
    if attention is not None:
        share = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        rotated = int(attention.head_dim * share) // 2 * 2
        rotation = (config.num_attention_heads, config.num_key_value_heads, attention.head_dim, rotated)
    block = next((m for m in modules if hasattr(m, "down_proj")), None) if known else None
    mlp = None
    if block is not None:
        activation = activation_of(block)
        inputs = mlp_inputs(block)
        width = base_of(inputs[0]).out_features // (3 - len(inputs))
        mlp = None if activation is None else (width, activation)
    output: Any = model.get_output_embeddings()
    head = (output.out_features, output.in_features) if type(output) is nn.Linear else None
    adapted = [m for m in modules if is_adapted(m)]
    lora = {(m.base_layer.out_features, m.base_layer.in_features, m.lora_A.shape[0], m.p) for m in adapted}
    return Sizes(tuple(sorted(norms)), rotation, mlp, head, tuple(sorted(lora)))


def self_check(
    choices: Mapping[str, Choice], sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> dict[str, Choice]:
    """Return `choices`, with the reference where a kernel fails its check; the reason carries what was found."""
    result = dict(choices)
    for kernel, choice in choices.items():
        if choice.implementation == "triton":
            try:
                worst = _CHECKS[kernel](sizes, device, dtype)
            except Exception as error:  # noqa: BLE001  whatever a compiler or a driver raises, the reference still computes
                result[kernel] = Choice(
                    "reference", f"its self-check raised {type(error).__name__}: {str(error)[:200]}"
                )
            else:
                if worst > 1.0:
                    rule = f"its self-check found {2 * worst:.1f} times the reference's error, and 2 are allowed"
                    result[kernel] = Choice("reference", rule)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the head's check alone takes some of its weight in float32
    return result


def excess(ours: Callable[..., Any], theirs: Callable[..., Any], inputs: list[Tensor]) -> float:
    """Return the largest error of `ours`, values and gradients, over what the rule allows; above 1 is a failure.

    Args:
        ours, theirs: functions of the inputs that return a tensor or several; theirs takes any dtype.
        inputs: those that require a gradient get one.
    """
    dtype = inputs[0].dtype
    wider = torch.float64 if dtype is torch.float32 else torch.float32
    truth = _run(theirs, [x.detach().to(wider).requires_grad_(x.requires_grad) for x in inputs])
    same, kernel = _run(theirs, inputs), _run(ours, inputs)
    worst = 0.0
    for exact, reference, result in zip(truth, same, kernel, strict=True):
        exact, reference, result = exact.detach(), reference.detach(), result.detach()
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        allowed = 2.0 * torch.maximum(_rms(reference.to(wider) - exact), rounding)
        error = _rms(result.to(wider) - exact)
        worst = max(worst, float(error / allowed) if torch.isfinite(error) else float("inf"))
    return worst


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _run(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [x for x in inputs if x.requires_grad]
    generator = torch.Generator().manual_seed(1)  # the same upstream gradients for each
    upstream = [torch.rand(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    return outputs + list(torch.autograd.grad(outputs, wanted, upstream))


def _new(
    device: torch.device, dtype: torch.dtype, *shape: int, grad: bool = True, scale: float = 1.0, seed: int = 0
) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed * 10**9 + len(shape) * 1000 + sum(shape))
    return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype).requires_grad_(grad)


def _check_norms(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
    def added(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return rms_norm_reference(total, w, 1e-6), total

    worst = 0.0
    for width, trains in sizes.norms:
        x, residual = (_new(device, dtype, TOKENS, width, seed=i) for i in range(2))
        weight = _new(device, dtype, width, grad=trains)
        worst = max(
            worst, excess(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), [x, weight])
        )
        worst = max(worst, excess(lambda x, r, w: add_rms_norm(x, r, w, 1e-6), added, [x, residual, weight]))
    return worst


def _check_rope(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
    if sizes.rotation is None:
        return 0.0
    heads, kv_heads, width, rotated = sizes.rotation
    q, k = _new(device, dtype, 1, heads, TOKENS, width), _new(device, dtype, 1, kv_heads, TOKENS, width)
    angles = torch.linspace(0.0, 6.0, TOKENS * rotated, device=device).view(1, TOKENS, rotated)
    return excess(rope, rope_reference, [q, k, angles.cos().to(dtype), angles.sin().to(dtype)])


def _check_glu(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
    if sizes.mlp is None:
        return 0.0
    width, activation = sizes.mlp

    def halves(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda both: function(*both.chunk(2, dim=-1), activation)

    return excess(halves(glu), halves(glu_reference), [_new(device, dtype, TOKENS, 2 * width)])


def _check_head(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
    if sizes.head is None:
        return 0.0
    vocabulary, width = sizes.head
    targets = torch.arange(TOKENS, device=device) * 7919 % vocabulary

    def ours(x: Tensor, w: Tensor) -> Tensor:  # in chunks, of which the last is short
        return linear_cross_entropy(x, w, targets, reduction="sum", chunk_tokens=TOKENS // 3)[0]

    def ours_by_token(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, targets, chunk_tokens=TOKENS // 3)[0]

    def by_token(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy_reference(x, w, targets)[0]

    x, w = _new(device, dtype, TOKENS, width), _new(device, dtype, vocabulary, width, scale=width**-0.5)
    worst = excess(ours, lambda x, w: by_token(x, w).sum(), [x, w])
    return max(worst, excess(ours_by_token, by_token, [x, w.detach()]))


def _check_lora(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
    """Each kind of adapted layer twice in one group, with a plain one between, beside the same layers one by one."""
    keys, worst = token_keys(0, 0, torch.zeros(1, dtype=torch.int64, device=device), TOKENS)[0], 0.0
    for outputs, inputs, rank, p in sizes.lora:

        def ours(x: Tensor, w: Tensor, a: Tensor, b: Tensor, p: float = p) -> tuple[Tensor, ...]:
            group = [Projection(w, None, a, b, 2.0, 5), Projection(w), Projection(w, None, a, b, 0.5, 6)]
            return lora_linear(x, group, keys, p)

        def theirs(x: Tensor, w: Tensor, a: Tensor, b: Tensor, p: float = p) -> tuple[Tensor, ...]:
            base = nn.functional.linear(x, w)

            def updated(layer_id: int, scaling: float) -> Tensor:
                dropped = dropout_reference(x, keys, layer_id, p) if p else x
                return lora_update_reference(base, dropped, a, b, scaling)

            return updated(5, 2.0), base, updated(6, 0.5)

        weight = _new(device, dtype, outputs, inputs, grad=False, scale=inputs**-0.5)
        factors = [_new(device, dtype, rank, inputs, scale=inputs**-0.5), _new(device, dtype, outputs, rank)]
        worst = max(worst, excess(ours, theirs, [_new(device, dtype, TOKENS, inputs), weight, *factors]))
    return worst


_CHECKS: dict[str, Callable[[Sizes, torch.device, torch.dtype], float]] = {
    "linear_cross_entropy": _check_head, "lora": _check_lora, "rms_norm": _check_norms, "rope": _check_rope,
    "glu": _check_glu,
}  # fmt: skip
