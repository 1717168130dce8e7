"""`method=lora`: low-rank updates on the linear layers; the base stays frozen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tritune.trainer.config.axes import MethodConfig, Rule
from tritune.trainer.config.choices import Bias, Form

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel
    from tritune.trainer.methods.token_keys import TokenKeys


@dataclass
class LoraConfig(MethodConfig):
    """LoRA (Hu et al. 2021, arXiv 2106.09685)."""

    name: str = "lora"
    rank: int = 16  # of the update of each adapted layer
    alpha: float = 32.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # share of the adapted layers' inputs that the update does not see
    targets: list[str] = field(default_factory=lambda: ["all-linear"])  # suffixes or globs of linear layers
    exclude: list[str] = field(
        default_factory=list
    )  # suffixes or globs of layers that `targets` names and that stay as they are
    bias: Bias = Bias.none
    modules_to_save: list[str] = field(default_factory=list)  # trained whole and saved with the adapter

    title = "LoRA"
    made = MappingProxyType({Form.adapter: "A LoRA adapter for", Form.merged: "A LoRA adapter merged into"})
    tags = ("lora",)
    freezes_base = True
    writes_adapter = True
    usual_rate = (5e-4, 0.781)

    def check(self, rule: Rule) -> None:
        rule(self.rank >= 1, "method.rank", "it must be at least 1. Common values are 8 to 64")
        rule(0.0 <= self.dropout < 1.0, "method.dropout", "it must be at least 0 and below 1. Use e.g. 0.05")
        rule(self.alpha > 0, "method.alpha", "the update is scaled by alpha / rank. Use a positive value")
        rule(bool(self.targets), "method.targets", "no layer is named. Use [all-linear] or name patterns")

    def attach(self, model: PreTrainedModel, heads: list[str], seed: int, unused: Collection[str]) -> TokenKeys | None:
        from tritune.trainer.methods.lora_layers import add_lora

        return add_lora(self, model, heads, seed, unused)

    def facts(self) -> list[tuple[str, str]]:
        return [("rank, alpha, dropout", f"{self.rank}, {self.alpha}, {self.dropout}")]

    def idle_layers(self, model: PreTrainedModel, unused: Collection[str]) -> list[str]:
        from tritune.trainer.methods.lora_layers import unused_targets

        return unused_targets(self, model, unused)

    def require_mergeable(self, model: PreTrainedModel) -> None:
        from tritune.trainer.methods.merge import require_mergeable

        require_mergeable(model)

    def whole_tensors(
        self, model: PreTrainedModel, dtype: torch.dtype, read: Callable[[Tensor], Tensor], say: Callable[[str], None]
    ) -> Iterator[tuple[str, Tensor]]:
        from tritune.trainer.methods.merge import merged_tensors

        return merged_tensors(model, dtype, read, say)

    def whole_shapes(self, model: PreTrainedModel) -> dict[str, list[int]]:
        from tritune.trainer.methods.merge import merged_shapes

        return merged_shapes(model)

    def adapter_tensors(self, model: PreTrainedModel, heads: list[str]) -> dict[str, Tensor]:
        from tritune.trainer.methods.lora_files import adapter_tensors

        return adapter_tensors(self, model, heads)

    def adapter_settings(self, model: PreTrainedModel, heads: list[str]) -> dict[str, Any]:
        from tritune.trainer.methods.lora_files import adapter_settings

        return adapter_settings(self, model, heads)

    def needs_peft(self, heads: list[str]) -> bool:
        return not (self.bias is Bias.none and not self.modules_to_save and not heads)
