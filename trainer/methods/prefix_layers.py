"""Trainable keys and values, which an attention function of our own puts before those of the tokens.

transformers calls an attention function by name, after rotation and cache. The prefix comes in there, and no cache carries it: a
layer that activation checkpointing computes again adds nothing twice, and packs, generation and Triton's attention blocks all
pass through the one place. Each prefix belongs to its attention module and is read in a forward of its own, where FSDP2 and
ZeRO-3 have gathered it.
"""

from __future__ import annotations

import sys
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from tritune.trainer.config.choices import Attention
from tritune.trainer.errors import InputError
from tritune.trainer.methods.prefix import PrefixConfig
from tritune.trainer.methods.prompt_files import decoder_of, past_length, release_heads, require_text_alone
from tritune.trainer.methods.states import Read
from tritune.trainer.methods.token_keys import layer_id_of
from tritune.trainer.model.layers import decoder_layers


class Prefix(nn.Module):
    """Keys and values of one layer, [num_virtual_tokens, kv_heads, head_dim] each, as they are after rotation."""

    def __init__(self, num_tokens: int, num_heads: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_tokens = num_tokens  # ZeRO-3 takes the parameters' shapes away
        self.key = nn.Parameter(torch.empty(num_tokens, num_heads, width, dtype=dtype))
        self.value = nn.Parameter(torch.empty(num_tokens, num_heads, width, dtype=dtype))

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the prefix before `key` and `value`, [B, G, T, D] each, in every row."""

        def before(mine: Tensor, theirs: Tensor) -> Tensor:
            rows = mine.to(theirs.dtype).transpose(0, 1).expand(theirs.shape[0], -1, -1, -1)
            return torch.cat([rows, theirs], dim=2)

        return before(self.key, key), before(self.value, value)

    def reset(self, seed: int, layer_id: int, std: float) -> None:
        """Normal values, which depend on (seed, layer_id) alone."""
        generator = torch.Generator().manual_seed((seed * 0x9E3779B9 + layer_id) % 2**63)
        with torch.no_grad():
            for parameter in (self.key, self.value):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def add_prefixes(config: PrefixConfig, model: PreTrainedModel, heads: list[str], seed: int) -> None:
    """Freeze `model`, give each layer a prefix, and let attention and positions take it in; new heads train too.

    Raises:
        InputError: the family's attention is none that a prefix goes into.
    """
    require_text_alone(config, model)
    inner = _inner_attention(model)
    layers = {n: _attention_in(config, model, m) for n, m in _named(model, decoder_layers(model)).items()}
    model.requires_grad_(False)
    release_heads(model, heads)
    shapes = {(m.k_proj.out_features // m.head_dim, m.head_dim) for m in layers.values()}
    if len(shapes) != 1:
        raise _no_prefix(config, model, f"its layers have keys of several shapes: {sorted(shapes)}")
    (shape,) = shapes
    for name, attention in layers.items():
        dtype = torch.promote_types(attention.k_proj.weight.dtype, torch.float32)
        attention.prefix = Prefix(config.num_virtual_tokens, *shape, dtype)
        attention.prefix.reset(seed, layer_id_of(name), config.init_std)
    _let_in(model, inner)
    decoder, told = decoder_of(model), cast(Any, model)
    told.positions_taken = config.num_virtual_tokens
    decoder.forward = MethodType(partial(_shifted, config.num_virtual_tokens), decoder)  # type: ignore[method-assign]


def prefixes(model: nn.Module) -> list[Prefix]:
    """By layer."""
    return [m for m in model.modules() if isinstance(m, Prefix)]


def joined(model: nn.Module, read: Read) -> Tensor:
    """All of them as PEFT's file holds them: [num_virtual_tokens, layers * 2 * kv_heads * head_dim]."""
    parts = [read(p) for layer in prefixes(model) for p in (layer.key, layer.value)]
    return torch.stack(parts, dim=1).flatten(1)


@torch.no_grad()
def split(model: nn.Module, embeddings: Tensor) -> None:
    """Take the prefixes from what `joined` gives.

    Raises:
        ValueError: it is of another shape.
    """
    parts = [p for layer in prefixes(model) for p in (layer.key, layer.value)]
    num_tokens = parts[0].shape[0]
    width = len(parts) * parts[0][0].numel()
    if list(embeddings.shape) != [num_tokens, width]:
        raise ValueError(f"it is {list(embeddings.shape)}, and the base needs {[num_tokens, width]}")
    for parameter, value in zip(parts, embeddings.view(num_tokens, len(parts), -1).unbind(1), strict=True):
        parameter.copy_(value.view_as(parameter))


def _shifted(num_virtual: int, decoder: Any, input_ids: Tensor | None = None, **given: Any) -> Any:
    """The decoder's own forward, with positions that begin behind the prefix."""
    positions = given.pop("position_ids", None)
    if positions is None:
        tokens = input_ids if input_ids is not None else given["inputs_embeds"]
        positions = (torch.arange(tokens.shape[1], device=tokens.device) + past_length(given))[None]
    return type(decoder).forward(decoder, input_ids=input_ids, position_ids=positions + num_virtual, **given)


def attend(
    inner: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, sliding_window: int | None = None, position_ids: Tensor | None = None, **given: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of `inner` behind the module's prefix, as transformers calls an attention function.

    Args:
        query: [B, H, T, D]; key, value: [B, G, K, D], those of a cache among them.
        attention_mask: of the tokens' own keys, [B or 1, 1, T, K]; None where attention is causal in a whole row.
        position_ids: of the queries, behind the prefix; a sliding window leaves the prefix behind by these.
    """
    own = _causal(query, key) if attention_mask is None else attention_mask
    mask = _behind(module.prefix.num_tokens, own, sliding_window, position_ids)
    key, value = module.prefix(key, value)
    mask = mask.expand(query.shape[0], *mask.shape[1:])
    if inner == Attention.eager:  # each family has its own
        function = sys.modules[type(module).__module__].eager_attention_forward
        mask = _additive(mask, query.dtype)
    else:
        function = ALL_ATTENTION_FUNCTIONS[inner]
    return function(module, query, key, value, mask, sliding_window=sliding_window, position_ids=position_ids, **given)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    whole = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    return whole.tril(num_keys - num_queries)[None, None]


def _behind(num_virtual: int, own: Tensor, window: int | None, positions: Tensor | None) -> Tensor:
    """`own` with the prefix before it: every query sees all of it, or what lies in its window."""
    if window is None:
        seen = own.new_ones(1, dtype=torch.bool).expand(*own.shape[:3], num_virtual)
    else:
        if positions is None:
            raise RuntimeError(
                "a sliding window came without positions: this version of transformers is not known here"
            )
        ahead = positions[:, None, :, None] - torch.arange(num_virtual, device=own.device) < window
        own = own.expand(max(own.shape[0], ahead.shape[0]), -1, -1, -1)
        seen = ahead.expand(own.shape[0], *own.shape[1:3], num_virtual)
    return torch.cat([seen if own.dtype is torch.bool else _additive(seen, own.dtype), own], dim=3)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _let_in(model: PreTrainedModel, inner: str) -> None:
    """Have the model call `attend`, with the masks of `inner`."""
    name = f"tritune_prefix_{inner}"
    AttentionInterface.register(name, partial(attend, inner))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    model.set_attn_implementation(name)


def _inner_attention(model: PreTrainedModel) -> str:
    inner = str(model.config._attn_implementation)
    if inner not in list(Attention):
        rule = "a prefix goes before the keys of these two alone: sdpa, eager"
        raise InputError(f"model.attention={inner}", rule, "Use model.attention=sdpa")
    return inner


def _named(model: nn.Module, layers: list[nn.Module]) -> dict[str, nn.Module]:
    wanted = set(layers)
    return {n: m for n, m in model.named_modules() if m in wanted}


def _attention_in(config: PrefixConfig, model: PreTrainedModel, layer: nn.Module) -> Any:
    """The layer's attention, whose keys and values have one shape of heads and which calls attention functions by name."""
    attention: Any = getattr(layer, "self_attn", None)
    projections: list[Any] = [getattr(attention, name, None) for name in ("k_proj", "v_proj")]
    if (
        attention is None
        or not all(isinstance(p, nn.Linear) for p in projections)
        or not hasattr(attention, "head_dim")
    ):
        raise _no_prefix(config, model, "a layer has no self_attn with k_proj, v_proj and head_dim")
    if projections[0].out_features != projections[1].out_features:
        raise _no_prefix(config, model, "its keys and values have different sizes")
    if not getattr(model, "_supports_attention_backend", False):
        raise _no_prefix(config, model, "its attention is none that transformers lets others replace")
    return attention


def _no_prefix(config: PrefixConfig, model: PreTrainedModel, why: str) -> InputError:
    rule = f"no prefix goes into the attention of {model.config.model_type}: {why}"
    return InputError(
        f"method={config.name}", rule, "Use method=lora, or a model of the Llama, Mistral, Qwen or Gemma family"
    )
