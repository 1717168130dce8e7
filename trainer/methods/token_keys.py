"""Which tokens a layer is looking at: what counter-based dropout needs and a layer's input does not say."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tritune.kernels.dropout import dropout_reference, opaque_dropout


class TokenKeys:
    """Holds the keys of the tokens in the running forward; the scorer sets them, layers with dropout read them."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None

    def set(self, keys: Tensor) -> None:
        """`keys`: int32, one per token, of the shape of the layers' inputs without the last dimension."""
        self._keys = keys

    def get(self) -> Tensor | None:
        return self._keys

    def replay(self, function: Callable[..., Any], keys: Tensor | None, *args, **kwargs) -> Any:
        """Call `function` as at the time when `keys` were set; activation checkpointing does so in backward."""
        current, self._keys = self._keys, keys
        try:
            return function(*args, **kwargs)
        finally:
            self._keys = current

    def dropout(self, x: Tensor, layer_id: int, p: float) -> Tensor:
        """Drop elements of `x` [..., D] by the tokens' keys.

        Raises:
            RuntimeError: the layer sees another arrangement of tokens than the forward began with.
        """
        keys = self._keys
        if keys is None or keys.numel() * x.shape[-1] != x.numel():
            seen = None if keys is None else tuple(keys.shape)
            raise RuntimeError(
                f"dropout of layer {layer_id:#x}: input {tuple(x.shape)} does not hold the forward's tokens {seen}. "
                "Exclude this layer (method.exclude) or set method.dropout=0"
            )
        apply = opaque_dropout if torch.compiler.is_compiling() else dropout_reference
        return apply(x, keys.reshape(x.shape[:-1]), layer_id, p)


def layer_id_of(name: str) -> int:
    """A layer's number for the hash, from its name: adding or removing another layer does not move it."""
    return zlib.crc32(name.encode())
