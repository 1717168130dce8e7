"""`objective=classify`: classification by a new head on the last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tritune.trainer.config.axes import CLASSIFICATION, Head, Learns, ObjectiveConfig, lower_is_better
from tritune.trainer.config.choices import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from tritune.trainer.objectives.loss import Objective, Sources


@dataclass
class ClassifyConfig(ObjectiveConfig):
    name: str = "classify"

    title = "classification by a new head"
    learns = Learns.labels
    kinds = (Kind.text_label,)
    head = Head.classes
    metrics = lower_is_better("loss") | CLASSIFICATION

    def loss(self, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, sources: Sources) -> Objective:
        from tritune.trainer.objectives.classes import Classes

        return Classes(len(labels), sources=sources)
