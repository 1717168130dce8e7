"""Attention among packed documents: none sees another.

Positions that begin anew tell transformers' masks where a document begins, for `sdpa` and `eager` and for sliding windows
(`masking_utils`, transformers >= 5.13). On a GPU in half precision PyTorch's variable-length attention takes the bounds instead
and computes no pair of documents at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from tritune.trainer.batch import Batch, Packs, rows_of
from tritune.trainer.errors import InputError
from tritune.trainer.torch_api import varlen_attn

VARLEN = "tritune_varlen"
Score = Callable[[Batch], Tensor]  # of every predicted token


def document_bounds(batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
    """What a decoder is told of the documents in its rows: their positions, and for variable-length attention their bounds."""
    packs = batch.packs
    told: dict[str, Any] = {}
    if packs is not None:
        told["position_ids"] = packs.positions
    if model.config._attn_implementation == VARLEN:
        num_rows, width = batch.input_ids.shape
        rows = torch.arange(num_rows + 1, dtype=torch.int32, device=batch.input_ids.device) * width
        told |= {
            "cu_seq_lens_q": rows if packs is None else packs.bounds,
            "max_length_q": packs.longest if packs else width,
        }
    return told


@contextmanager
def within_rows(model: PreTrainedModel) -> Iterator[None]:
    """Ordinary attention, for a call that knows of no documents: transformers' own forward, generation with its cache."""
    if model.config._attn_implementation != VARLEN:
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(VARLEN)


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, sliding_window: int | None = None, cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None, **ignored: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within documents, as transformers calls an attention function.

    Args:
        query: [B, H, T, D]; key, value: [B, G, T, D] with H a multiple of G.
        cu_seq_lens_q: int32 [S + 1], from `document_bounds`.

    Raises:
        RuntimeError: the bounds did not arrive, so that documents would see one another; a dropout or a softcap, which PyTorch's
            kernel does not compute.
    """
    if ignored.get("dropout") or ignored.get("softcap"):
        raise RuntimeError(f"{VARLEN} computes neither attention dropout nor softcaps: use model.attention=sdpa")
    num_rows, num_heads, num_positions, width = query.shape
    if cu_seq_lens_q is None or max_length_q is None:
        raise RuntimeError(f"{VARLEN} was not told where documents end: use model.attention=sdpa")
    q, k, v = (x.transpose(1, 2).reshape(num_rows * num_positions, x.shape[1], width) for x in (query, key, value))
    before = -1 if sliding_window is None else sliding_window - 1
    out = varlen_attn(q, k, v, cu_seq_lens_q, max_length_q, scale=scaling, window=(before, 0))
    return out.view(num_rows, num_positions, num_heads, width), None


def choose_attention(model: PreTrainedModel, device: torch.device) -> str:
    """Let a model that reads packs take the variable-length kernel where it can; return what computes its attention."""
    config = model.config.get_text_config()
    half = model.dtype in (torch.bfloat16, torch.float16)
    plain = not getattr(config, "attn_logit_softcapping", None) and not getattr(config, "attention_dropout", 0.0)
    if device.type == "cuda" and half and plain and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(VARLEN, varlen_attention)
        AttentionMaskInterface.register(VARLEN, lambda *args, **kwargs: None)
        model.set_attn_implementation(VARLEN)
    return str(model.config._attn_implementation)


@torch.no_grad()
def require_documents_apart(score: Score, vocab_size: int, device: torch.device, half: bool) -> None:
    """Refuse a model whose packed documents see one another: its losses would be silently wrong.

    Two documents packed, and each alone, must have the same losses.

    Raises:
        InputError: they differ by more than rounding.
    """
    size = 12
    ids = (torch.arange(2 * size) * 7919 + 3) % vocab_size
    alone = rows_of(ids.view(2, size))
    bounds = torch.tensor([0, size, 2 * size], dtype=torch.int32)
    packs = Packs(torch.arange(size).repeat(2)[None], torch.arange(2).repeat_interleave(size)[None], bounds, size)
    together = replace(alone, input_ids=ids[None], packs=packs)
    expected, found = score(alone.to(device)), score(together.to(device))
    tolerance = 2**-5 if half else 1e-4
    error = float(((found - expected).abs() / expected.abs().clamp(min=1)).max())
    if not error <= tolerance:
        rule = f"packed documents have other losses than alone, by {error:.1e}: they see one another in this model"
        raise InputError("data.packing=best_fit", rule, "Use data.packing=none, or another model.attention")
