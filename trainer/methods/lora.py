"""`method=lora`: low-rank updates on the linear layers; the base stays frozen."""

from __future__ import annotations

from dataclasses import dataclass, field

from tritune.trainer.config.axes import MethodConfig, Rule
from tritune.trainer.config.choices import Bias


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

    adapts = True

    def check(self, rule: Rule) -> None:
        rule(self.rank >= 1, "method.rank", "a rank is at least 1. Common values are 8 to 64")
        rule(0.0 <= self.dropout < 1.0, "method.dropout", "a dropout rate lies in [0, 1). Use e.g. 0.05")
        rule(self.alpha > 0, "method.alpha", "the update is scaled by alpha / rank. Use a positive value")
        rule(bool(self.targets), "method.targets", "no layer is named. Use [all-linear] or name patterns")
