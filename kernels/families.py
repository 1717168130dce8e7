"""Forwards of decoder blocks that call our kernels, one function a kind of block for all families of `FAMILIES`.

Each follows transformers' own forward of that block line by line, and differs only where a kernel stands. `self` is
transformers' module, whose parameters, names and configuration stay as they are; its functions (attention, the plain
rotation) are looked up in the module that defines its class.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from tritune.kernels.cross_entropy import LossOptions
from tritune.kernels.linear_cross_entropy import linear_cross_entropy
from tritune.kernels.lora import Projection, lora_linear, lora_mlp
from tritune.kernels.rms_norm import add_rms_norm, rms_norm
from tritune.kernels.rope import rope
from tritune.kernels.swiglu import glu


@dataclass(frozen=True)
class Family:
    """What differs between families.

    Attributes:
        window: where attention finds its sliding window: on the module, on the config, or nowhere.
        softcap: whether attention scores are capped.
        adds_before_norm: whether the second norm reads the sum of residual and attention, undropped.
    """

    window: str | None = None
    softcap: bool = False
    adds_before_norm: bool = True


FAMILIES = {
    "llama": Family(),
    "mistral": Family(window="config"),
    "qwen2": Family(window="module"),
    "qwen3": Family(window="module"),
    "phi3": Family(window="config", adds_before_norm=False),
    "gemma2": Family(window="module", softcap=True, adds_before_norm=False),
    "gemma3_text": Family(window="module", adds_before_norm=False),
}


def _defined_in(module: nn.Module) -> ModuleType:
    return sys.modules[type(module).__module__]


def norm_forward(eps: float, offset: float, self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    """The norm of `x`; with a residual, (the norm of their sum, their sum)."""
    if residual is None:
        return rms_norm(x, self.weight, eps, offset)
    return add_rms_norm(x, residual, self.weight, eps, offset)


def layer_forward(self: Any, hidden_states: Tensor, **kwargs) -> Tensor:
    """A block of two residual branches, the first sum made by the second norm."""
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    normed, residual = self.post_attention_layernorm(attended, hidden_states)
    return residual + self.mlp(normed)


def attention_forward(
    family: Family, rotates: bool, fused: bool, self: Any, hidden_states: Tensor, position_embeddings: Any = None,
    attention_mask: Tensor | None = None, past_key_values: Any = None, cache: Any = None, **kwargs,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Self-attention; `rotates`: with our rotation; `fused`: queries, keys and values are one LoRA group.

    transformers 5.24 calls `cache` what was `past_key_values` before.
    """
    code, shape = _defined_in(self), hidden_states.shape[:-1]
    q, k, v = _queries_keys_values(self, hidden_states, fused)
    q, k, v = (x.view(*shape, -1, self.head_dim) for x in (q, k, v))
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    q, k = (rope if rotates else code.apply_rotary_pos_emb)(q, k, *position_embeddings)
    cache = past_key_values if cache is None else cache
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    options: dict[str, Any] = {}
    if family.window is not None:
        options["sliding_window"] = getattr(self if family.window == "module" else self.config, "sliding_window", None)
    if family.softcap:
        options["softcap"] = self.attn_logit_softcapping
    attend = code.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, code.eager_attention_forward)
    dropout = self.attention_dropout if self.training else 0.0
    attended, scores = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **options, **kwargs)
    return self.o_proj(attended.reshape(*shape, -1).contiguous()), scores


# What `attention_forward` reads, and what it hands on to the attention function unread.
_READS = {"hidden_states", "position_embeddings", "attention_mask", "past_key_values", "cache"}
_HANDED_ON = {"self", "kwargs", "cache_position", "position_ids"}


def unread(block: nn.Module) -> list[str]:
    """Parameters of an attention's own forward that `attention_forward` does not know: another version of transformers may
    have given it something to do that ours would leave out in silence."""
    return sorted(set(inspect.signature(type(block).forward).parameters) - _READS - _HANDED_ON)


def _queries_keys_values(self: Any, x: Tensor, fused: bool) -> tuple[Tensor, ...]:
    layers = attention_inputs(self)
    outputs = lora_group(layers, x) if fused else [layer(x) for layer in layers]
    if len(outputs) == 3:
        return tuple(outputs)
    queries = self.config.num_attention_heads * self.head_dim
    rest = self.config.num_key_value_heads * self.head_dim
    return outputs[0].split([queries, rest, rest], dim=-1)


def attention_inputs(self: Any) -> list[nn.Module]:
    """The layers that share an attention's input."""
    return [self.qkv_proj] if hasattr(self, "qkv_proj") else [self.q_proj, self.k_proj, self.v_proj]


def mlp_inputs(self: Any) -> list[nn.Module]:
    """The layers that share an MLP's input."""
    return [self.gate_up_proj] if hasattr(self, "gate_up_proj") else [self.gate_proj, self.up_proj]


def mlp_forward(activation: str, fused: bool, self: Any, x: Tensor) -> Tensor:
    """down(act(gate) * up); `fused`: as one LoRA node."""
    inputs = mlp_inputs(self)
    if fused:
        layers = [*inputs, self.down_proj]
        *first, last = [projection_of(layer) for layer in layers]
        return lora_mlp(x, first, last, activation, *_dropout_of(layers))
    outputs = [layer(x) for layer in inputs]
    gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
    return self.down_proj(glu(gate, up, activation))


def lora_forward(self: Any, x: Tensor) -> Tensor:
    """An adapted layer on its own."""
    return lora_group([self], x)[0]


def head_forward(
    options: LossOptions, self: Any, hidden: Tensor, targets: Tensor | None = None, reduction: Any = "none",
    chunk_tokens: int | None = None,
) -> Tensor:  # fmt: skip
    """Logits of `hidden`; with targets, their losses (float32), logits never stored. A call of the module, so that
    whatever gathers its weight does so around either."""
    if targets is None:
        return linear(hidden, self.weight, self.bias)
    settings: dict[str, Any] = {"reduction": reduction, "options": options, "chunk_tokens": chunk_tokens}
    return linear_cross_entropy(hidden, self.weight, targets, self.bias, **settings)[0]


def lora_group(layers: list[Any], x: Tensor) -> tuple[Tensor, ...]:
    """Outputs of layers that share `x`, at least one of them adapted."""
    return lora_linear(x, [projection_of(layer) for layer in layers], *_dropout_of(layers))


def is_adapted(layer: nn.Module) -> bool:
    """Whether `layer` is a linear layer with a LoRA update and nothing else, which it says by `update_only`: base_layer, lora_A,
    lora_B, scaling, layer_id, p, keys. DoRA's lengths, say, no kernel computes."""
    return getattr(layer, "update_only", False) and isinstance(getattr(layer, "base_layer", None), nn.Linear)


def fusable(layers: list[nn.Module]) -> bool:
    """Whether the layers, each adapted or plain and frozen, are a group with an update in it."""
    return all(map(_is_frozen_linear, layers)) and any(is_adapted(layer) for layer in layers)


def _is_frozen_linear(layer: nn.Module) -> bool:
    base = base_of(layer)
    return hasattr(base, "stored") or (type(base) is nn.Linear and not base.weight.requires_grad)


def base_of(layer: Any) -> Any:
    """The linear layer itself, without its adapter."""
    return layer.base_layer if is_adapted(layer) else layer


def projection_of(layer: Any) -> Projection:
    base = base_of(layer)
    weight, shape = base.stored if hasattr(base, "stored") else (base.weight, None)  # in NF4: the bytes and the shape
    if not is_adapted(layer):
        return Projection(weight, base.bias, shape=shape)
    return Projection(weight, base.bias, layer.lora_A, layer.lora_B, layer.scaling, layer.layer_id, shape)


def _dropout_of(layers: list[Any]) -> tuple[Tensor | None, float]:
    """The keys of the running forward's tokens and the rate of dropping; the rate is one for all adapted layers."""
    adapted = next(layer for layer in layers if is_adapted(layer))
    p = adapted.p if adapted.training else 0.0
    return (adapted.keys.get() if p else None), p


def activation_of(block: Any) -> str | None:
    """Which of our activations an MLP's own computes, by its values; None: neither."""
    function = block.act_fn if hasattr(block, "act_fn") else block.activation_fn
    x = torch.linspace(-6.0, 6.0, 257)
    silu, gelu = nn.functional.silu(x), nn.functional.gelu(x, approximate="tanh")
    y = function(x)
    return next(
        (n for n, z in (("silu", silu), ("gelu_tanh", gelu)) if torch.allclose(y, z, rtol=1e-6, atol=1e-6)), None
    )
