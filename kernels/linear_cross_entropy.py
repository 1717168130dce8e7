"""Negative log-likelihood of target tokens from hidden states and an output head, logits never stored whole.

The reference takes the head as a callable, so that a head with an adapter, a bias, a softcap or a scale is computed as
it is: nobody reads `.weight` past it. Chunks of tokens are recomputed in backward (`torch.utils.checkpoint`).

Shape suffixes: M predicted tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint


def token_nll_reference(
    hidden_MH: Tensor, head: Callable[[Tensor, int, int], Tensor], targets_M: Tensor, chunk_tokens: int
) -> Tensor:
    """Return -log p(target) for each token, [M], in float32 or wider.

    Args:
        hidden_MH: final hidden states of the tokens that predict.
        head: called as head(hidden[i:j], i, j), returns logits [j - i, V].
        targets_M: int64.
        chunk_tokens: logits are made for this many tokens at a time.
    """

    def chunk_nll(hidden: Tensor, start: int, stop: int) -> Tensor:
        logits = head(hidden, start, stop)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return cross_entropy(logits.to(wide), targets_M[start:stop], reduction="none")

    num_tokens = hidden_MH.shape[0]
    if num_tokens <= chunk_tokens:
        return chunk_nll(hidden_MH, 0, num_tokens)
    parts = []
    for start in range(0, num_tokens, chunk_tokens):
        stop = min(start + chunk_tokens, num_tokens)
        parts.append(checkpoint(chunk_nll, hidden_MH[start:stop], start, stop, use_reentrant=False))
    return torch.cat(parts)
