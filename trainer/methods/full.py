"""`method=full`: the model's own parameters train, all of them or those that its keys name (transfer learning)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from tritune.trainer.config.axes import MethodConfig, Rule
from tritune.trainer.config.choices import Form

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass
class FullConfig(MethodConfig):
    """Every parameter trains unless these keys say which. Patterns are ends or globs of names of parameters and modules. A new
    classification head trains in any case."""

    name: str = "full"
    train: list[str] = field(default_factory=list)  # what trains; with neither this nor `last_layers`, everything
    last_layers: int | None = None  # train so many of the last layers, and the norm and the head behind them
    freeze: list[str] = field(default_factory=list)  # what of these stays as it is

    title = "every parameter"
    made = MappingProxyType({Form.full: "All parameters trained, from"})

    @property
    def keeps_weights(self) -> bool:
        return bool(self.train or self.freeze) or self.last_layers is not None

    def what_trains(self) -> str:
        return "part of the parameters" if self.keeps_weights else self.title

    def made_as(self, form: Form) -> str:
        return "Part of the parameters trained, from" if self.keeps_weights else super().made_as(form)

    def embeddings_remedy(self) -> str:
        return "Name them in method.train and not in method.freeze, or use tokens that the model has"

    def check(self, rule: Rule) -> None:
        least = "it must be at least 0. Use 0 to train what stands behind the layers alone"
        rule(self.last_layers is None or self.last_layers >= 0, "method.last_layers", least)

    def attach(self, model: PreTrainedModel, heads: list[str], seed: int, unused: Collection[str]) -> None:
        if not self.keeps_weights:
            model.requires_grad_(True)
            return
        from tritune.trainer.methods.parts import mark_parts

        mark_parts(self, model, heads, unused)

    def describe(self, model: PreTrainedModel, unused: Collection[str]) -> list[str]:
        from tritune.trainer.methods.parts import describe_parts

        return describe_parts(model, unused)

    def facts(self) -> list[tuple[str, str]]:
        given = {"trained": self.train, "last layers trained": self.last_layers, "frozen": self.freeze}
        return [(what, str(value)) for what, value in given.items() if value not in ([], None)]

    def whole_tensors(
        self, model: PreTrainedModel, dtype: torch.dtype, read: Callable[[Tensor], Tensor], say: Callable[[str], None]
    ) -> Iterator[tuple[str, Tensor]]:
        from tritune.trainer.methods.states import cast_tensors

        return cast_tensors(model, dtype, read)

    def whole_shapes(self, model: PreTrainedModel) -> dict[str, list[int]]:
        from tritune.trainer.methods.states import shapes_of

        return shapes_of(model)
