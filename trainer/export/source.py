"""What is to be exported, and in which form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from tritune.trainer.config import Config
from tritune.trainer.config.choices import Form
from tritune.trainer.errors import InputError
from tritune.trainer.methods.start import merges
from tritune.trainer.methods.states import Read, whole


@dataclass(frozen=True)
class Source:
    """What is to be exported.

    Attributes:
        model: the Hugging Face model, with the method's layers in it.
        logits: input ids -> logits, as the model computed them in training.
        heads: modules that are new; labels: of a classifier.
        facts: of the run, for the model card: step, tokens, scores, abstention.
        read: the values of one of the model's tensors, which may be meta tensors.
        read_back: `objective.prompt` comes from the run's `config.yaml`, where `***` may stand for a secret.
    """

    config: Config
    model: PreTrainedModel
    logits: Callable[[Tensor], Tensor]
    tokenizer: PreTrainedTokenizerBase
    heads: list[str]
    labels: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    read_back: bool = False
    read: Read = whole

    @property
    def abstain_below(self) -> float | None:
        """The probability below which a classifier abstains; None where it never does."""
        return (self.facts.get("abstain") or {}).get("below")


def choose_form(source: Source, say: Callable[[str], None]) -> Form:
    """`export.form`, settled where it is `auto`.

    Raises:
        InputError: there is no form in which this model could be written.
    """
    wanted = source.config.export.form
    if not source.config.method.freezes_base:
        return Form.full
    if not source.config.method.writes_adapter:
        return Form.merged
    if source.config.model.path is None and not source.config.method.merges:
        rule = f"method={source.config.method.name} is written beside its base, and random weights are nowhere to be loaded"
        raise InputError("model.path=null", rule, "Train on a model that is somewhere: model.path=<folder or hub id>")
    if source.config.model.path is None:  # random weights made from a config: there is no base to put it on
        if wanted is Form.auto:
            say("export    merged, since the base has random weights and an adapter would have nothing to go on")
        return Form.merged
    if merges(source.config.model):
        if wanted is Form.adapter:
            rule = (
                "the base is a merge of model.adapter, which lies nowhere, and the adapter would have nothing to go on"
            )
            raise InputError("export.form=adapter", rule, "Use export.form=merged, or model.adapter_mode=keep")
        return Form.merged
    return Form.adapter if wanted is Form.auto else wanted
