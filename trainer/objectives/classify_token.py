"""`objective=classify_token`: classification by one label token, said by the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tritune.trainer.config.axes import CLASSIFICATION, Learns, ObjectiveConfig, Rule, lower_is_better
from tritune.trainer.config.choices import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from tritune.trainer.objectives.loss import Objective, Sources


@dataclass
class ClassifyTokenConfig(ObjectiveConfig):
    name: str = "classify_token"
    prompt: str = "{text}\nLabel:"  # what the model reads before it says the label's one token

    title = "classification by a word that the model says"
    learns = Learns.labels
    kinds = (Kind.text_label,)
    metrics = lower_is_better("loss") | CLASSIFICATION

    @property
    def label_prompt(self) -> str:
        return self.prompt

    def with_label_prompt(self, prompt: str) -> ClassifyTokenConfig:
        return replace(self, prompt=prompt)

    def check(self, rule: Rule) -> None:
        rule("{text}" in self.prompt, "objective.prompt", "the row's text has no place. Write {text} where it goes")

    def label_tokens(self, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        from tritune.trainer.objectives.classes import label_token_ids

        return label_token_ids(labels, tokenizer)

    def loss(self, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, sources: Sources) -> Objective:
        from tritune.trainer.objectives.classes import Classes

        return Classes(len(labels), self.label_tokens(labels, tokenizer), sources)
