"""`method=prompt`: trainable embeddings before the text of each document; the base stays frozen."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tritune.trainer.config.axes import MethodConfig, Rule
from tritune.trainer.config.choices import Form

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Init(StrEnum):
    """What the virtual tokens begin as: embeddings of random tokens of the vocabulary, of a text's tokens, or random numbers."""

    vocabulary = "vocabulary"
    text = "text"
    random = "random"


@dataclass
class PromptConfig(MethodConfig):
    """Prompt tuning (Lester et al. 2021, arXiv 2104.08691)."""

    name: str = "prompt"
    num_virtual_tokens: int = 20  # embeddings before each document
    init: Init = Init.vocabulary
    init_text: str | None = None  # with init=text: its tokens, cut or repeated to num_virtual_tokens

    title = "prompt tuning"
    made = MappingProxyType({Form.adapter: "A soft prompt for"})
    tags = ("prompt-tuning",)
    freezes_base = True
    writes_adapter = True
    merges = False
    peft_type = "PROMPT_TUNING"
    usual_rate = (5e-3, 0.0)

    def check(self, rule: Rule) -> None:
        rule(
            self.num_virtual_tokens >= 1,
            "method.num_virtual_tokens",
            "it must be at least 1. Common values are 10 to 100",
        )
        rule(
            (self.init is Init.text) == bool(self.init_text),
            "method.init_text",
            "it is the text that method.init=text begins with. Give both or neither",
        )

    @property
    def positions_taken(self) -> int:
        return self.num_virtual_tokens

    def attach(self, model: PreTrainedModel, heads: list[str], seed: int, unused: Collection[str]) -> None:
        from tritune.trainer.methods.prompt_layers import add_virtual_tokens

        add_virtual_tokens(self, model, heads, seed)

    def begin(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, rows: Callable[[list[int]], Tensor]
    ) -> None:
        from tritune.trainer.methods.prompt_layers import begin_with

        begin_with(self, model, tokenizer, seed, rows)

    def facts(self) -> list[tuple[str, str]]:
        return [("virtual tokens, their beginning", f"{self.num_virtual_tokens}, {self.init.value}")]

    def adapter_tensors(
        self, model: PreTrainedModel, heads: list[str], read: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        from tritune.trainer.methods.prompt_files import tensors_of
        from tritune.trainer.methods.prompt_layers import virtual_tokens

        return tensors_of(model, read(virtual_tokens(model).weight), heads, read)

    def adapter_settings(self, model: PreTrainedModel, heads: list[str]) -> dict[str, Any]:
        from tritune.trainer.methods.prompt_layers import virtual_tokens

        num_tokens, width = virtual_tokens(model).weight.shape
        config = model.config.get_text_config()
        return {
            "peft_type": self.peft_type, "num_virtual_tokens": num_tokens, "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads, "token_dim": width, "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM", "modules_to_save": heads or None,
        }  # fmt: skip

    def of_adapter(self, settings: dict[str, Any], value: str) -> PromptConfig:
        from tritune.trainer.methods.prompt_files import num_virtual_tokens, require_known

        # How it began says nothing of what it computes.
        began = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
        require_known(settings, began, value)
        return PromptConfig(num_virtual_tokens=num_virtual_tokens(settings, value))

    def put_adapter(self, model: PreTrainedModel, tensors: dict[str, Tensor], value: str) -> None:
        from tritune.trainer.methods.prompt_files import put
        from tritune.trainer.methods.prompt_layers import virtual_tokens

        put(self, model, tensors, lambda embeddings: virtual_tokens(model).take(embeddings), value)
