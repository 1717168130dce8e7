"""`method=full`: every parameter trains."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from tritune.trainer.config.axes import MethodConfig
from tritune.trainer.config.choices import Form

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass
class FullConfig(MethodConfig):
    name: str = "full"

    title = "every parameter"
    made = MappingProxyType({Form.full: "All parameters trained, from"})

    def attach(self, model: PreTrainedModel, heads: list[str], seed: int, unused: Collection[str]) -> None:
        model.requires_grad_(True)

    def whole_tensors(
        self, model: PreTrainedModel, dtype: torch.dtype, read: Callable[[Tensor], Tensor], say: Callable[[str], None]
    ) -> Iterator[tuple[str, Tensor]]:
        from tritune.trainer.methods.states import cast_tensors

        return cast_tensors(model, dtype, read)

    def whole_shapes(self, model: PreTrainedModel) -> dict[str, list[int]]:
        from tritune.trainer.methods.states import shapes_of

        return shapes_of(model)
