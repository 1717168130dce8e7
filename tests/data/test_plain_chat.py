"""Conversations for a base without a chat template: the built-in `plain` one."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer
from tritune.trainer.config import Config, ModelConfig
from tritune.trainer.config.data import SourceConfig
from tritune.trainer.data.plain_chat import settle_template
from tritune.trainer.data.spans import ChatTemplate
from tritune.trainer.model.chat_templates import plain_template
from tritune.trainer.model.tokenizer import byte_tokenizer, load_tokenizer

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
PAIR = {"prompt": "hi", "response": "ho"}
SYSTEM = {**PAIR, "system": "be brief"}
HALVES = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}


def bare(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def settled(tmp_path, *rows, **data):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config()
    config.data.train = str(tmp_path / "rows.jsonl")
    for key, value in data.items():
        setattr(config.data, key, value)
    said, tokenizer = [], bare(tmp_path)
    model = settle_template(config.model, config.data, config.objective, tokenizer, said.append)
    return model, tokenizer, said


@pytest.mark.parametrize("row", [CHAT, SHAREGPT, SYSTEM, HALVES], ids=["chat", "sharegpt", "system", "halves"])
def test_rows_that_are_conversations_get_it_and_it_is_said(tmp_path, row):
    model, tokenizer, said = settled(tmp_path, row)
    assert model.chat_template == "plain"
    assert "### Assistant" in tokenizer.chat_template
    assert len(said) == 1
    assert "model.chat_template=plain" in said[0]


@pytest.mark.parametrize("row", [PAIR, {"what": 1}])
def test_other_rows_stay_as_they_are(tmp_path, row):
    model, tokenizer, said = settled(tmp_path, row)
    assert (model.chat_template, tokenizer.chat_template, said) == (None, None, [])


def test_one_source_of_several_or_a_held_out_file_is_enough(tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps(CHAT) + "\n")
    chats = str(tmp_path / "chats.jsonl")
    assert settled(tmp_path, PAIR, validation=chats)[0].chat_template == "plain"
    sources = {"a": SourceConfig(path=str(tmp_path / "rows.jsonl")), "b": SourceConfig(path=chats)}
    assert settled(tmp_path, PAIR, train=None, sources=sources)[0].chat_template == "plain"


def test_a_template_that_is_there_stays(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(CHAT) + "\n")
    config, tokenizer = Config(), byte_tokenizer()
    config.data.train = str(tmp_path / "rows.jsonl")
    assert settle_template(config.model, config.data, config.objective, tokenizer, print) is config.model
    config.model.chat_template = "chatml"
    assert settle_template(config.model, config.data, config.objective, bare(tmp_path), print) is config.model


def answers(tokenizer, messages, tools=None) -> tuple[str, list[str]]:
    """The rendered text and what of it is trained."""
    (row,) = ChatTemplate(tokenizer).rows(messages, "f:1", tools)
    return row.text, [row.text[start:stop] for start, stop in row.spans]


def test_everything_a_row_holds_is_in_the_text():
    tokenizer = bare(None)
    tokenizer.chat_template = plain_template(begins=False)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one and one?"},
        {"role": "assistant", "content": "", "reasoning_content": "easy", "tool_calls": [call, call]},
        {"role": "tool", "content": "2", "name": "add"},
        {"role": "assistant", "content": "two"},
    ]
    text, trained = answers(tokenizer, messages, [{"type": "function", "function": {"name": "add"}}])
    end = tokenizer.eos_token
    called = 'Call: {"name": "add", "arguments": {"a": 1}}'
    assert trained == [f"<think>\neasy\n</think>\n{called}\n{called}{end}", f"two{end}"]
    for part in (
        "### Tools:",
        "### System:\nBe brief.",
        "### User:\none and one?",
        "### Tool add:\n2",
        '"name": "add"',
    ):
        assert part in text


@pytest.mark.parametrize("name", ["stories260K", "tinystories-656k"])
def test_no_token_is_added_and_the_first_is_the_one_that_texts_begin_with(shared, name):
    path = str(shared / "models" / name)
    tokenizer = load_tokenizer(ModelConfig(path=path, chat_template="plain"))
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(path))
    ids = tokenizer.apply_chat_template(CHAT["messages"], tokenize=True, return_dict=False)
    assert ids[:1] == tokenizer("a")["input_ids"][:1] or tokenizer.bos_token_id not in tokenizer("a")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) <= 1 or tokenizer.bos_token_id == tokenizer.eos_token_id
