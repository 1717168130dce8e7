"""`method=prefix`: trainable keys and values before those of each document, in every layer; the base stays frozen."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tritune.trainer.config.axes import MethodConfig, Rule
from tritune.trainer.config.choices import Form

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass
class PrefixConfig(MethodConfig):
    """Prefix tuning (Li and Liang 2021, arXiv 2101.00190), without the network that makes the prefix from a smaller one."""

    name: str = "prefix"
    num_virtual_tokens: int = 20  # keys and values in each layer that every token of a document sees
    init_std: float = (
        1.0  # standard deviation of the first keys and values (PEFT draws with 1); 0 lets them begin at zero
    )

    title = "prefix tuning"
    made = MappingProxyType({Form.adapter: "A prefix for"})
    tags = ("prefix-tuning",)
    freezes_base = True
    writes_adapter = True
    merges = False
    peft_type = "PREFIX_TUNING"
    usual_rate = (5e-3, 0.0)

    def check(self, rule: Rule) -> None:
        rule(
            self.num_virtual_tokens >= 1,
            "method.num_virtual_tokens",
            "it must be at least 1. Common values are 10 to 100",
        )
        rule(
            0 <= self.init_std < float("inf"), "method.init_std", "a standard deviation is a number, at least 0. Use 1"
        )

    @property
    def positions_taken(self) -> int:
        return self.num_virtual_tokens

    def attach(self, model: PreTrainedModel, heads: list[str], seed: int, unused: Collection[str]) -> None:
        from tritune.trainer.methods.prefix_layers import add_prefixes

        add_prefixes(self, model, heads, seed)

    def facts(self) -> list[tuple[str, str]]:
        return [("virtual tokens", str(self.num_virtual_tokens))]

    def adapter_tensors(
        self, model: PreTrainedModel, heads: list[str], read: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        from tritune.trainer.methods.prefix_layers import joined
        from tritune.trainer.methods.prompt_files import tensors_of

        return tensors_of(model, joined(model, read), heads, read)

    def adapter_settings(self, model: PreTrainedModel, heads: list[str]) -> dict[str, Any]:
        from tritune.trainer.methods.prefix_layers import prefixes

        layers = prefixes(model)
        num_tokens, num_heads, width = layers[0].key.shape
        return {
            "peft_type": self.peft_type, "num_virtual_tokens": num_tokens, "num_layers": len(layers),
            "num_attention_heads": num_heads, "token_dim": num_heads * width, "num_transformer_submodules": 1,
            "prefix_projection": False, "encoder_hidden_size": None, "modules_to_save": heads or None,
        }  # fmt: skip

    def unread_by_peft(self, model: PreTrainedModel, heads: list[str]) -> str:
        import inspect
        from importlib.metadata import version

        from packaging.version import Version

        # PEFT asks a classifier's forward for `past_key_values`, which transformers calls `cache` since 5.24.
        asked = inspect.signature(type(model).forward).parameters
        if not heads or "past_key_values" in asked or Version(version("peft")) > Version("0.21.2"):
            return ""
        return f"PEFT {version('peft')} runs no prefix of a classifier under transformers {version('transformers')}"

    def of_adapter(self, settings: dict[str, Any], value: str) -> PrefixConfig:
        from tritune.trainer.methods.prompt_files import num_virtual_tokens, require_known

        # The file holds what the projection made, which is all that computes.
        require_known(settings, {"init_weights", "prefix_projection", "encoder_hidden_size"}, value)
        return PrefixConfig(num_virtual_tokens=num_virtual_tokens(settings, value))

    def take(self, model: PreTrainedModel, heads: list[str], tensors: dict[str, Tensor], value: str) -> bool:
        from tritune.trainer.methods.prefix_layers import joined, split
        from tritune.trainer.methods.prompt_files import EMBEDDINGS, tensors_of
        from tritune.trainer.methods.states import as_it_is, copy_into

        places = tensors_of(model, joined(model, as_it_is), heads, as_it_is)
        copy_into(places, tensors, value)
        split(model, tensors[EMBEDDINGS])
        return True

    def put_adapter(self, model: PreTrainedModel, tensors: dict[str, Tensor], value: str) -> None:
        from tritune.trainer.methods.prefix_layers import split
        from tritune.trainer.methods.prompt_files import put

        put(self, model, tensors, lambda embeddings: split(model, embeddings), value)
