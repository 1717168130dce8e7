"""Conversations for a base model that has no chat template: the built-in `plain` one is used, and said."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from transformers import PreTrainedTokenizerBase
from tritune.trainer.config import ModelConfig, ObjectiveConfig
from tritune.trainer.config.axes import Learns
from tritune.trainer.config.data import DataConfig, Kind, data_of, held_out_sources, training_sources
from tritune.trainer.data.kinds import Reading
from tritune.trainer.data.records import read_all
from tritune.trainer.errors import INPUT_ERRORS, InputError
from tritune.trainer.model.tokenizer import set_template

PLAIN = "plain"
_OF_A_CHAT = {"system", "history", "tools"}  # columns that make prompt and response a conversation


def settle_template(
    model: ModelConfig, data: DataConfig, objective: ObjectiveConfig, tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
) -> ModelConfig:  # fmt: skip
    """The model's settings with a chat template, and the tokenizer with it, where the rows need one and there is none.

    One of a tokenizer, or one that was asked for, stays. The first row of each source is read.
    """
    if objective.learns is not Learns.answers or model.chat_template is not None or tokenizer.chat_template:
        return model
    sources = [*training_sources(data).values(), *held_out_sources(data).values()]
    if not any(_chats(data_of(data, key), objective, path, key) for path, key in sources):
        return model
    model = replace(model, chat_template=PLAIN)
    set_template(tokenizer, model)
    say("template  the rows are conversations and the tokenizer has no chat template: model.chat_template=plain is used, which "
        "needs no new token; chatml or a Jinja file is another")  # fmt: skip
    return model


def _chats(data: DataConfig, objective: ObjectiveConfig, path: str, key: str) -> bool:
    """Whether the first row that reads is a conversation. What is wrong with a source is said where it is read whole."""
    with suppress(*INPUT_ERRORS):
        for row in read_all(path, key, data.text_unit):
            if not isinstance(row, InputError):
                reading = Reading(data, objective, key=key)
                layout, record = reading.layout(row), reading.record(row)
                return (
                    reading.kind is Kind.messages or bool(record.messages) or bool(_OF_A_CHAT & layout.columns.keys())
                )
    return False
