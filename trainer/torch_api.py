"""What the supported versions of torch do differently, and the one place that knows it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, *, scale: float | None, window: tuple[int, int]
) -> Tensor:  # fmt: skip
    """PyTorch's variable-length attention of documents in a row, with grouped heads on every version.

    Up to 2.11 it takes as many heads of keys and values as of queries: they are repeated there, at a cost in memory.

    Args:
        query: [T, H, D], half precision; key, value: [T, G, D] with H a multiple of G.
        bounds: int32 [S + 1], where documents begin and the last one ends.
        longest: tokens of the longest document.
        window: how many tokens before and after its own a query sees, -1 for all.

    Returns:
        [T, H, D], in the dtype of `query`.
    """
    from torch.nn.attention import varlen  # imports Dynamo: seconds that only who attends so should pay

    function: Any = varlen.varlen_attn
    groups = query.shape[1] // key.shape[1]
    grouped = {}
    if groups > 1:
        if "enable_gqa" in (function.__kwdefaults__ or {}):
            grouped = {"enable_gqa": True}
        else:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return function(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=window, **grouped)
