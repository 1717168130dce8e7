"""Trainable embeddings before each document: the decoder reads longer rows, and gives back the hidden states of the tokens.

Positions that begin anew say where a pack's documents begin, and each gets a copy. With an attention mask or a cache a row is one
document: that is how transformers generates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from tritune.trainer.errors import InputError
from tritune.trainer.methods.prompt import Init, PromptConfig
from tritune.trainer.methods.prompt_files import decoder_of, past_length, release_heads, require_text_alone


class VirtualTokens(nn.Module):
    """Embeddings [num_virtual_tokens, D]."""

    def __init__(self, num_tokens: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_tokens = num_tokens  # ZeRO-3 takes the parameter's shape away
        self.weight = nn.Parameter(torch.empty(num_tokens, width, dtype=dtype))

    def forward(self, embeddings: Tensor, sources: Tensor) -> Tensor:
        """Rows of virtual and real tokens.

        Args:
            embeddings: of the tokens, [B, T, D].
            sources: int64 [B, W]: below num_virtual_tokens a virtual token, above it b * T + t of a real one.
        """
        table = torch.cat([self.weight.to(embeddings.dtype), embeddings.flatten(0, 1)])
        return table[sources]

    @torch.no_grad()
    def take(self, values: Tensor) -> None:
        """Take these values.

        Raises:
            ValueError: they are of another shape.
        """
        if values.shape != self.weight.shape:
            raise ValueError(f"it is {list(values.shape)}, and the base needs {list(self.weight.shape)}")
        self.weight.copy_(values)


@dataclass(frozen=True)
class Layout:
    """Where virtual tokens go among real ones. Shape suffixes: B rows, T positions, W positions with the virtual ones.

    Attributes:
        sources: int64 [B, W], as `VirtualTokens` reads it.
        positions: int64 [B, W], from 0 in each document; what a narrower row has behind its last token begins anew, too.
        real: int64 [B, T], flat positions b * W + w of the real tokens.
    """

    sources: Tensor
    positions: Tensor
    real: Tensor

    def bounds(self) -> dict[str, Any]:
        """For variable-length attention: where documents begin."""
        starts = (self.positions.reshape(-1) == 0).nonzero()[:, 0]
        bounds = torch.cat([starts, starts.new_tensor([self.positions.numel()])])
        return {"cu_seq_lens_q": bounds.int(), "max_length_q": int(bounds.diff().max())}


def lay_out(begins: Tensor, positions: Tensor, num_virtual: int) -> Layout:
    """Put `num_virtual` tokens before each document.

    Args:
        begins: bool [B, T], where documents begin; before the first of a row there is padding alone.
        positions: int64 [B, T], of the tokens in their documents.
    """
    (num_rows, num_tokens), device = begins.shape, begins.device
    behind = torch.arange(num_tokens, device=device) + num_virtual * begins.cumsum(1)  # [B, T], where each token goes
    width = int(behind.max()) + 1
    sources = torch.zeros(num_rows, width, dtype=torch.int64, device=device)
    places = torch.arange(width, device=device) - behind[:, -1:] - 1
    numbers = torch.arange(num_rows * num_tokens, device=device).view(num_rows, num_tokens)
    sources.scatter_(1, behind, numbers + num_virtual)
    places.scatter_(1, behind, positions + num_virtual)
    rows, columns = begins.nonzero(as_tuple=True)
    virtual = torch.arange(num_virtual, device=device)
    before = behind[rows, columns][:, None] - num_virtual + virtual
    sources[rows[:, None], before] = virtual
    places[rows[:, None], before] = virtual
    return Layout(sources, places, behind + width * torch.arange(num_rows, device=device)[:, None])


def add_virtual_tokens(config: PromptConfig, model: PreTrainedModel, heads: list[str], seed: int) -> None:
    """Freeze `model` and let its decoder read virtual tokens before each document; new heads train too.

    Raises:
        InputError: the family takes in more than tokens.
    """
    require_text_alone(config, model)
    table: Any = model.get_input_embeddings().weight
    decoder, told = decoder_of(model), cast(Any, model)
    told.positions_taken = config.num_virtual_tokens
    model.requires_grad_(False)
    release_heads(model, heads)
    tokens = VirtualTokens(config.num_virtual_tokens, table.shape[1], torch.promote_types(table.dtype, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    tokens.take(torch.randn(tokens.weight.shape, generator=generator))
    decoder.virtual_tokens = tokens
    decoder.forward = MethodType(_behind_virtual_tokens, decoder)


def virtual_tokens(model: PreTrainedModel) -> VirtualTokens:
    return decoder_of(model).virtual_tokens


def begin_with(
    config: PromptConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int,
    rows: Callable[[list[int]], Tensor],
) -> None:  # fmt: skip
    """Give the virtual tokens embeddings that the model has, where `config.init` says so.

    Args:
        rows: embeddings of tokens, [ids, D].

    Raises:
        InputError: the text has no token.
    """
    if config.init is Init.random:
        return
    num_tokens = config.num_virtual_tokens
    if config.init is Init.vocabulary:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(len(tokenizer), (num_tokens,), generator=generator).tolist()
    else:
        ids = list(tokenizer(config.init_text)["input_ids"])
        if not ids:
            raise InputError(
                f"method.init_text={config.init_text!r}", "the tokenizer makes no token of it", "Write more"
            )
        ids = (ids * -(-num_tokens // len(ids)))[:num_tokens]
    virtual_tokens(model).take(rows(ids))


def _behind_virtual_tokens(
    decoder: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **given: Any,
) -> Any:  # fmt: skip
    """The decoder's own forward on rows with the virtual tokens; hidden states are those of the real ones."""
    forward, virtual = type(decoder).forward, decoder.virtual_tokens
    num_virtual, mask = virtual.num_tokens, attention_mask
    if mask is not None:
        attention_mask = _with_virtual(mask, num_virtual)
    if past_length(given):  # they are in the cache
        positions = None if position_ids is None else position_ids + num_virtual
        return forward(
            decoder, input_ids=input_ids, attention_mask=attention_mask, position_ids=positions,
            inputs_embeds=inputs_embeds, **given,
        )  # fmt: skip
    embeddings = decoder.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
    num_rows, num_tokens, width = embeddings.shape
    first = torch.arange(num_tokens, device=embeddings.device).expand(num_rows, -1)
    positions = first if position_ids is None else position_ids.expand(num_rows, -1)
    if mask is not None:
        begins = _first_seen(mask)
    else:
        caches = any(given.get(name) is not None for name in ("cache", "past_key_values"))
        begins = (first if caches else positions) == 0
    layout = lay_out(begins, positions, num_virtual)
    if "cu_seq_lens_q" in given:
        given |= layout.bounds()
    out = forward(
        decoder, attention_mask=attention_mask, position_ids=layout.positions,
        inputs_embeds=virtual(embeddings, layout.sources), **given,
    )  # fmt: skip
    out.last_hidden_state = out.last_hidden_state.reshape(-1, width)[layout.real]
    return out


def _first_seen(mask: Tensor) -> Tensor:
    """Where each row's document begins behind its padding, bool [B, T]; `mask` is an attention mask of that shape."""
    return (mask != 0) & (mask.cumsum(1) == 1)


def _with_virtual(mask: Tensor, num_virtual: int) -> Tensor:
    """The attention mask [B, T + num_virtual] with the virtual tokens behind the padding on the left, as `lay_out` puts them."""
    num_rows, num_tokens = mask.shape
    behind = torch.arange(num_tokens, device=mask.device) + num_virtual * (mask.cumsum(1) > 0)
    return mask.new_ones(num_rows, num_tokens + num_virtual).scatter_(1, behind, mask)
