"""`objective=pretrain`: continued pre-training, the next token of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tritune.trainer.config.axes import Learns, ObjectiveConfig, lower_is_better
from tritune.trainer.config.choices import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from tritune.trainer.objectives.loss import Objective, Sources


@dataclass
class PretrainConfig(ObjectiveConfig):
    name: str = "pretrain"

    title = "continued pre-training on plain text"
    learns = Learns.text
    kinds = (Kind.text,)
    metrics = lower_is_better("loss", "perplexity", "bits_per_byte")

    def loss(self, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, sources: Sources) -> Objective:
        from tritune.trainer.objectives.language_model import LanguageModel

        return LanguageModel(sources)
