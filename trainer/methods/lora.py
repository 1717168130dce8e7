"""`method=lora`: low-rank updates on the linear layers; the base stays frozen."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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


REGEX = "re:"  # before a pattern that is a regular expression
_END = r"(.*\.)?({})"  # a whole name, or its end from a dot on


@dataclass
class LoraConfig(MethodConfig):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) and its relatives, which combine."""

    name: str = "lora"
    rank: int = 16  # of the update of each adapted layer
    alpha: float = 32.0  # the update is scaled by alpha / rank
    rank_pattern: dict[str, int] = field(default_factory=dict)  # other ranks, by regular expressions for ends of names
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # the same for alpha; the first that matches counts
    rslora: bool = False  # scale by alpha / sqrt(rank) instead (rank-stabilised LoRA, arXiv 2312.03732)
    dora: bool = False  # learn the length of each row of the updated weight as well (DoRA, arXiv 2402.09353)
    lora_plus_ratio: float = 1.0  # B, biases and lengths learn at so many times the rate (LoRA+, arXiv 2402.12354)
    dropout: float = 0.0  # share of the adapted layers' inputs that the update does not see
    targets: list[str] = field(
        default_factory=lambda: ["all-linear"]
    )  # ends of layers' names, globs, or `re:` and a regular expression for whole names (PEFT's target_modules as a text)
    exclude: list[str] = field(default_factory=list)  # of `targets`, in the same words, what stays as it is
    bias: Bias = Bias.none
    modules_to_save: list[str] = field(default_factory=list)  # trained whole and saved with the adapter

    title = "LoRA"
    made = MappingProxyType({Form.adapter: "A LoRA adapter for", Form.merged: "A LoRA adapter merged into"})
    tags = ("lora",)
    freezes_base = True
    writes_adapter = True
    peft_type = "LORA"
    peft_opens = True
    of_the_run = ("name", "dropout", "lora_plus_ratio")
    usual_rate = (5e-4, 0.781)

    def check(self, rule: Rule) -> None:
        rule(self.rank >= 1, "method.rank", "it must be at least 1. Common values are 8 to 64")
        rule(0.0 <= self.dropout < 1.0, "method.dropout", "it must be at least 0 and below 1. Use e.g. 0.05")
        rule(0 < self.alpha < math.inf, "method.alpha", "the update is scaled by alpha / rank. Use a positive value")
        rule(bool(self.targets), "method.targets", "no layer is named. Use [all-linear] or name patterns")
        for key in ("targets", "exclude", "modules_to_save"):
            wrong = [p for p in getattr(self, key) if p.startswith(REGEX) and not _compiles(p.removeprefix(REGEX))]
            said = f"{', '.join(wrong)} is no regular expression, which {REGEX} announces. Write e.g. re:.*\\.layers\\.[01]\\..*"
            rule(not wrong, f"method.{key}", said)
        for key in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, key)
            wrong = [p or "''" for p in patterns if not p or not _compiles(p) or not _compiles(_END.format(p))]
            rule(not wrong, f"method.{key}", f"{', '.join(wrong)} is no regular expression. Write e.g. q_proj")
        ranks, alphas = self.rank_pattern.values(), self.alpha_pattern.values()
        rule(all(r >= 1 for r in ranks), "method.rank_pattern", "a rank must be at least 1. Common values are 8 to 64")
        rule(all(0 < a < math.inf for a in alphas), "method.alpha_pattern", "an alpha must be positive. Use e.g. 32")
        ratio = self.lora_plus_ratio
        said = "the rate of B is so many times that of A: a positive number. Use 1 for the same, or e.g. 16"
        rule(0 < ratio < math.inf, "method.lora_plus_ratio", said)

    def rank_of(self, name: str) -> int:
        """The rank of a layer's update."""
        return self.rank_pattern.get(self.pattern_of(self.rank_pattern, name), self.rank)

    def scaling_of(self, name: str) -> float:
        """The factor of a layer's update."""
        alpha, rank = self.alpha_pattern.get(self.pattern_of(self.alpha_pattern, name), self.alpha), self.rank_of(name)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def pattern_of(self, patterns: Mapping[str, Any], name: str) -> str:
        """The first of `patterns` that matches the layer's name or its end from a dot on, as in PEFT; "" where none does."""
        return next((p for p in patterns if re.fullmatch(_END.format(p), name)), "")

    def rate_factor(self, name: str, shape: Sequence[int]) -> float:
        # As in PEFT and in the paper's code: whatever is a vector goes with B.
        return self.lora_plus_ratio if name.endswith(".lora_B") or len(shape) == 1 else 1.0

    def attach(self, model: PreTrainedModel, heads: list[str], seed: int, unused: Collection[str]) -> TokenKeys | None:
        from tritune.trainer.methods.lora_layers import add_lora

        return add_lora(self, model, heads, seed, unused)

    def embeddings_remedy(self) -> str:
        return "Add method.modules_to_save=[embed_tokens,lm_head], or use tokens that the model has"

    @property
    def begins_with_weights(self) -> bool:
        return self.dora

    def of_adapter(self, settings: dict[str, Any], value: str) -> LoraConfig:
        from tritune.trainer.methods.lora_files import of_settings

        return of_settings(settings, value)

    def take(self, model: PreTrainedModel, heads: list[str], tensors: dict[str, Tensor], value: str) -> bool:
        from tritune.trainer.methods.lora_files import take

        take(self, model, heads, tensors, value)
        return True

    def facts(self) -> list[tuple[str, str]]:
        rows = [("rank, alpha, dropout", f"{self.rank}, {self.alpha}, {self.dropout}")]
        rows += [
            (f"other {k}s", str(dict(p))) for k, p in (("rank", self.rank_pattern), ("alpha", self.alpha_pattern)) if p
        ]
        return rows + ([("kind", self._kind())] if self._kind() != "LoRA" else [])

    def describe(self, model: PreTrainedModel, unused: Collection[str]) -> list[str]:
        from tritune.trainer.methods.lora_layers import lora_layers
        from tritune.trainer.methods.targets import describe_targets

        return describe_targets(self._kind(), self, model, list(lora_layers(model)), unused)

    def _kind(self) -> str:
        relatives = {
            "DoRA": self.dora, "rank-stabilised": self.rslora, f"B at {self.lora_plus_ratio:g} times the rate":
            self.lora_plus_ratio != 1.0,
        }  # fmt: skip
        named = [name for name, holds in relatives.items() if holds]
        return f"LoRA ({', '.join(named)})" if named else "LoRA"

    def idle_layers(self, model: PreTrainedModel, unused: Collection[str]) -> list[str]:
        from tritune.trainer.methods.targets import unused_targets

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

    def adapter_tensors(
        self, model: PreTrainedModel, heads: list[str], read: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        from tritune.trainer.methods.lora_files import adapter_tensors

        return adapter_tensors(self, model, heads, read)

    def adapter_settings(self, model: PreTrainedModel, heads: list[str]) -> dict[str, Any]:
        from tritune.trainer.methods.lora_files import adapter_settings

        return adapter_settings(self, model, heads)

    def needs_peft(self, heads: list[str]) -> bool:
        plain = self.bias is Bias.none and not self.modules_to_save and not heads
        return not plain or self.dora or bool(self.rank_pattern or self.alpha_pattern)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True
