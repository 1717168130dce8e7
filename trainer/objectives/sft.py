"""`objective=sft`: supervised fine-tuning, the tokens of the answers."""

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
class SftConfig(ObjectiveConfig):
    name: str = "sft"

    title = "supervised fine-tuning on prompts and answers"
    learns = Learns.answers
    kinds = (Kind.messages, Kind.prompt_response)
    metrics = lower_is_better("loss", "perplexity")

    def loss(self, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, sources: Sources) -> Objective:
        from tritune.trainer.objectives.language_model import LanguageModel

        return LanguageModel(sources)
