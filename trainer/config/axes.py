"""What an objective and a method say of themselves: the bases of their configurations, with what the house asks of them.

An option of `objective` or `method` is one dataclass, in a file of its own in `trainer/objectives/` or `trainer/methods/`: its
fields are the option's keys, and its other attributes and methods answer for it. Nobody else spells an option's name; whoever
wants to know something asks the object, `config.objective` or `config.method`. A file of the package imports PyTorch
only inside its methods, since the launcher and `tritune config` read it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from tritune.trainer.config.choices import Form, Kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rule = Callable[[bool, str, str], None]  # whether it holds, the key, and what is said where it does not


class Learns(Enum):
    """What of a row is learnt, and with that how rows are read, audited and rendered."""

    text = "text"  # documents, joined and cut into blocks; every token
    answers = "answers"  # what is said in reply, in the tokens that the chat template puts around it
    labels = "labels"  # one of a set of classes


class Head(Enum):
    """What stands on the model's last layer."""

    language_model = "language_model"
    classes = "classes"  # a new linear layer, one output a class


@dataclass(frozen=True)
class Metric:
    """A figure that evaluation reports, which `evaluation.metric` may name."""

    higher_is_better: bool = False


def lower_is_better(*names: str) -> dict[str, Metric]:
    """Losses, and what is made of them."""
    return {name: Metric() for name in names}


# What a choice among classes is measured by.
CLASSIFICATION = {
    name: Metric(higher_is_better=True) for name in ("accuracy", "macro_precision", "macro_recall", "macro_f1")
}


@dataclass
class ObjectiveConfig:
    name: str = ""  # what is learnt of a row, and which loss measures it

    title: ClassVar[str] = ""  # in a report, what was done: "supervised fine-tuning on prompts and answers"
    learns: ClassVar[Learns] = Learns.answers
    kinds: ClassVar[tuple[Kind, ...]] = ()  # of rows that it reads; the first that a file's columns allow is taken
    head: ClassVar[Head] = Head.language_model
    metrics: ClassVar[Mapping[str, Metric]] = lower_is_better("loss")
    documents: ClassVar[int] = 1  # of a unit: what is made of a row, and shuffled, packed and dealt whole

    @property
    def label_prompt(self) -> str | None:
        """The text, with `{text}` in it, after which the model says the label; None where it says none."""
        return None

    def with_label_prompt(self, prompt: str) -> ObjectiveConfig:
        """The same with another `label_prompt`."""
        raise NotImplementedError

    def check(self, rule: Rule) -> None:
        """The rules that its own keys keep."""

    def documents_of(self, record: Any) -> Sequence[Any]:
        """The `documents` that are made of a `Record` (`data/kinds.py`), as records whose last answers are trained.

        Raises:
            InputError: the row is none that can be learnt from.
        """
        return [record]

    def label_tokens(self, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The one token for each label that is said; empty where none is."""
        return []

    def loss(self, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, sources: Any) -> Any:
        """The `Objective` (`objectives/loss.py`) that computes it.

        Args:
            labels: the classes, in the order of the outputs; empty unless `learns` is labels.
            sources: the `Sources` that the rows come from, and what each counts.
        """
        raise NotImplementedError


@dataclass
class MethodConfig:
    name: str = ""  # what trains: every parameter, or few beside a frozen base

    title: ClassVar[str] = ""  # in a report, what trains: "every parameter"
    made: ClassVar[Mapping[Form, str]] = {}  # on a model's card, by form, before the base's name: "A LoRA adapter for"
    tags: ClassVar[tuple[str, ...]] = ()  # on that card
    freezes_base: ClassVar[bool] = (
        False  # few parameters train beside it, and are merged into it or written apart from it
    )
    writes_adapter: ClassVar[bool] = False  # a file beside the base: `adapter_tensors` and `adapter_settings`
    in_peft: ClassVar[bool] = True  # PEFT has the method, and its layout is written; of others, one of our own
    merges: ClassVar[bool] = True  # into the base's weights
    peft_type: ClassVar[str] = ""  # of the adapters that `of_adapter` and `put_adapter` open
    peft_opens: ClassVar[bool] = False  # PEFT itself puts its adapters on their base, to be read
    of_the_run: ClassVar[tuple[str, ...]] = ("name",)  # keys that say how it trains, and nothing of what it trains
    usual_rate: ClassVar[tuple[float, float]] = (
        5e-5,
        1.5,
    )  # the learning rate at 2,000 features, and how it falls with these

    @property
    def keeps_weights(self) -> bool:
        """Whether a base's weights are part of what it trains, so that this is read on no other base."""
        return self.freezes_base

    def what_trains(self) -> str:
        """In a report; empty where there is no other word than its name."""
        return self.title

    def made_as(self, form: Form) -> str:
        """On a model's card, before the base's name."""
        return self.made.get(form, f"Trained by {self.name}, from")

    def embeddings_remedy(self) -> str:
        """How new tokens get embeddings that train, where `attach` left them frozen."""
        return "Use tokens that the model has"

    def check(self, rule: Rule) -> None:
        """The rules that its own keys keep."""

    @property
    def positions_taken(self) -> int:
        """Positions of the model's context that each document has before its first token."""
        return 0

    def attach(self, model: PreTrainedModel, heads: list[str], seed: int, unused: Collection[str]) -> Any:
        """Mark what trains, and add layers, in place.

        Args:
            heads: modules that are new and must train whatever the method (a classification head).
            seed: of the new weights.
            unused: parameters that take no part in the loss.

        Returns:
            The `TokenKeys` (`methods/token_keys.py`) of layers with dropout; None where there is no dropout.
        """
        raise NotImplementedError

    def rate_factor(self, name: str, shape: Sequence[int]) -> float:
        """By what a parameter's learning rate is multiplied: its name, which ends as in the Hugging Face model, and its shape."""
        return 1.0

    def begin(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, rows: Callable[[list[int]], Tensor]
    ) -> None:
        """Give new weights the first values that come from the model's own, once, after `attach` and before training.

        Args:
            rows: the model's embeddings of tokens, [ids, D]; its parameters may be meta tensors.
        """

    def facts(self) -> list[tuple[str, str]]:
        """Rows of the table on a model's card: what its keys were."""
        return []

    def describe(self, model: PreTrainedModel, unused: Collection[str]) -> list[str]:
        """For the log, after `attach`: what is adapted, and what one might think is and is not."""
        return []

    def idle_layers(self, model: PreTrainedModel, unused: Collection[str]) -> list[str]:
        """Layers that its keys name and that get nothing, since they take no part in the loss; before `attach`."""
        return []

    def require_mergeable(self, model: PreTrainedModel) -> None:
        """Refuse what `whole_tensors` would write wrongly.

        Raises:
            InputError: with the other form of export.
        """

    def whole_tensors(
        self, model: PreTrainedModel, dtype: torch.dtype, read: Callable[[Tensor], Tensor], say: Callable[[str], None]
    ) -> Iterator[tuple[str, Tensor]]:
        """The state dict in `dtype` under the base model's names, what trained beside it merged in: one tensor at a time, in
        the order of `whole_shapes`, each made when it is asked for and let go before the next is. A tied matrix comes under
        each of its names, and whoever writes takes one.

        Args:
            read: the values, whole, of a parameter or buffer of `model`, whose own may be meta tensors or shards.

        Raises:
            InputError: as `require_mergeable`; or, once all have come, that rounding would take most of what was trained.
        """
        raise NotImplementedError

    def whole_shapes(self, model: PreTrainedModel) -> dict[str, list[int]]:
        """Names and shapes of `whole_tensors`, from a model without values."""
        raise NotImplementedError

    def adapter_tensors(
        self, model: PreTrainedModel, heads: list[str], read: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """What an adapter's file holds, under PEFT's names; of a method that PEFT has not, under those in the model.

        Args:
            read: as of `whole_tensors`.
        """
        raise NotImplementedError

    def adapter_settings(self, model: PreTrainedModel, heads: list[str]) -> dict[str, Any]:
        """What `adapter_config.json` says of the method; of one that PEFT has not, the values of its keys."""
        raise NotImplementedError

    def needs_peft(self, heads: list[str]) -> bool:
        """Whether PEFT must be asked, before training, if it reads such an adapter: importing it takes seconds."""
        return True

    def unread_by_peft(self, model: PreTrainedModel, heads: list[str]) -> str:
        """Why the installed PEFT does not run such an adapter on this model; empty where it does."""
        return ""

    def of_adapter(self, settings: dict[str, Any], value: str) -> MethodConfig:
        """The method with the keys that an adapter's settings say, where they name its `peft_type`.

        Args:
            value: what a message is about.

        Raises:
            InputError: they ask for what is not computed here.
        """
        raise NotImplementedError

    @property
    def begins_with_weights(self) -> bool:
        """Whether going on from an adapter needs the base's values, and not their places in files alone."""
        return False

    def take(self, model: PreTrainedModel, heads: list[str], tensors: dict[str, Tensor], value: str) -> bool:
        """Give what `attach` added the values of an adapter's file; False where these are the parameters as they are.

        Raises:
            InputError: names or shapes differ; it begins with `value`.
        """
        return False

    def put_adapter(self, model: PreTrainedModel, tensors: dict[str, Tensor], value: str) -> None:
        """Attach the method to the base `model` with the values of an adapter's file. Arguments and errors as of `of_adapter`."""
        raise NotImplementedError
