"""`method=adapter`: bottleneck layers after or beside the blocks of each decoder layer; the base stays frozen."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tritune.trainer.config.axes import MethodConfig, Rule
from tritune.trainer.config.choices import Form

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from tritune.trainer.methods.token_keys import TokenKeys


class Placement(StrEnum):
    """What a bottleneck reads: `serial` the output of its block, `parallel` the block's own input."""

    serial = "serial"
    parallel = "parallel"


class Activation(StrEnum):
    """Between the two projections."""

    relu = "relu"
    gelu = "gelu"
    silu = "silu"
    tanh = "tanh"


@dataclass
class AdapterConfig(MethodConfig):
    """Bottleneck adapters: serial after attention and MLP (Houlsby et al. 2019, arXiv 1902.00751) or after the MLP alone
    (Pfeiffer et al. 2020, 2005.00247), or parallel to either (He et al. 2021, 2110.04366). The up projection starts at zero."""

    name: str = "adapter"
    size: int = 64  # of the bottleneck
    placement: Placement = Placement.serial
    where: list[str] = field(
        default_factory=lambda: ["mlp"]
    )  # `attention`, `mlp`, or ends or globs of the names of other blocks of a decoder layer
    activation: Activation = Activation.relu
    scale: float = 1.0  # of what a bottleneck adds
    dropout: float = 0.0  # share of a bottleneck's activations that training drops

    title = "bottleneck adapters"
    made = MappingProxyType({Form.adapter: "Bottleneck adapters for"})
    freezes_base = True
    writes_adapter = True
    in_peft = False
    merges = False
    usual_rate = (5e-4, 0.781)

    def check(self, rule: Rule) -> None:
        rule(self.size >= 1, "method.size", "it must be at least 1. Common values are 16 to 256")
        rule(bool(self.where), "method.where", "no block is named. Use [mlp], [attention,mlp] or name patterns")
        rule(self.scale > 0, "method.scale", "what a bottleneck adds is scaled by it. Use a positive value, e.g. 1")
        rule(0.0 <= self.dropout < 1.0, "method.dropout", "it must be at least 0 and below 1. Use e.g. 0.05")

    def attach(self, model: PreTrainedModel, heads: list[str], seed: int, unused: Collection[str]) -> TokenKeys | None:
        from tritune.trainer.methods.adapter_layers import add_bottlenecks

        return add_bottlenecks(self, model, heads, seed, unused)

    def describe(self, model: PreTrainedModel, unused: Collection[str]) -> list[str]:
        from tritune.trainer.methods.adapter_layers import describe_bottlenecks

        return describe_bottlenecks(model)

    def unread_by_peft(self, model: PreTrainedModel, heads: list[str]) -> str:
        return "PEFT has no such method"

    def facts(self) -> list[tuple[str, str]]:
        bottleneck = f"{self.size}, {self.placement.value}, {self.activation.value}, scale {self.scale}"
        return [("bottleneck", bottleneck), ("at", ", ".join(self.where)), ("dropout", str(self.dropout))]

    def adapter_tensors(
        self, model: PreTrainedModel, heads: list[str], read: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        from tritune.trainer.methods.adapter_layers import bottleneck_tensors

        return bottleneck_tensors(model, heads, read)

    def adapter_settings(self, model: PreTrainedModel, heads: list[str]) -> dict[str, Any]:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return {key: str(value) if isinstance(value, StrEnum) else value for key, value in given.items()}
