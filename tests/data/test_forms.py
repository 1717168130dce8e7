"""The forms in which the field writes the rows of a chat: each becomes the turns that were meant; what is unread is named."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from options import learning
from tritune.trainer.config.choices import SystemTurn, TextUnit
from tritune.trainer.config.data import DataConfig
from tritune.trainer.data.chunks import Row
from tritune.trainer.data.kinds import Reading, Record
from tritune.trainer.data.records import read_rows
from tritune.trainer.data.turns import UNTRAINED, merged_system
from tritune.trainer.errors import InputError


@pytest.fixture(scope="module")
def cases() -> Path:
    path = Path(__file__).resolve().parents[3] / "shared" / "cases"
    if not path.is_dir():
        pytest.skip(f"the cases are absent: {path}")
    return path


def record(row: dict, objective: str = "sft", **config) -> Record:
    return Reading(DataConfig(**config), learning(objective)).record(Row(row, "f:1"))


def spoken(row: dict, **config) -> list[tuple[str, str | None]]:
    """The turns of a row, whatever its kind."""
    found = record(row, **config)
    if found.messages is None:
        return [("user", found.prompt), ("assistant", found.response)]
    return [(m["role"], m["content"]) for m in found.messages]


Q, A = ("user", "q"), ("assistant", "a")
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = ("system", "s")
EARLIER = [("user", "q0"), ("assistant", "a0")]
FORMS = {
    "messages": ({"messages": TALK}, [Q, A]),
    "messages as JSON in a cell": ({"messages": json.dumps(TALK)}, [Q, A]),
    "messages as Python prints them": ({"messages": repr([{**m, "x": None} for m in TALK])}, [Q, A]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [Q, A]),
    "sharegpt with a system column": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, [SYSTEM, Q, A],
    ),
    "roles in capitals": ({"messages": [{"role": "User", "content": "q"}, {"role": "ASSISTANT", "content": "a"}]}, [Q, A]),
    "gemini": ({"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]}, [Q, A]),
    "pairs of input and output": ({"conversation": [{"system": "s", "input": "q", "output": "a"}]}, [SYSTEM, Q, A]),
    "pairs of human and assistant": (
        {"conversation": [{"human": "q0", "assistant": "a0"}, {"human": "q", "assistant": "a"}]}, [*EARLIER, Q, A],
    ),
    "texts that alternate": ({"conversation": ["q", "a"]}, [Q, A]),
    "an input that pandas left out": ({"instruction": "q", "input": float("nan"), "output": "a"}, [Q, A]),
    "developer": ({"messages": [{"role": "developer", "content": "s"}, *TALK]}, [SYSTEM, Q, A]),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": ["a"]}]},
        [Q, A],
    ),
    "several content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_text", "text": "y"}]},
                      TALK[1]]},
        [("user", "x\ny"), A],
    ),
    "alpaca": ({"instruction": "q", "input": "x", "output": "a"}, [("user", "q\n\nx"), A]),
    "alpaca with a null input": ({"instruction": "q", "input": None, "output": "a"}, [Q, A]),
    "alpaca with system and history": (
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q0", "a0"]]}, [SYSTEM, *EARLIER, Q, A],
    ),
    "alpaca with empty system and history": (
        {"instruction": "q", "input": "", "output": "a", "system": "", "history": []}, [Q, A],
    ),
    "history as JSON in a cell": ({"query": "q", "response": "a", "history": '[["q0", "a0"]]'}, [*EARLIER, Q, A]),
    "history of messages": (
        {"query": "q", "response": "a", "history": [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}]},
        [*EARLIER, Q, A],
    ),
    "dolly": ({"instruction": "q", "context": "x", "response": "a", "category": "c"}, [("user", "q\n\nx"), A]),
    "openorca": ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, [SYSTEM, Q, A]),
    "ms-swift": ({"query": "q", "response": "a"}, [Q, A]),
    "input and output alone": ({"input": "q", "output": "a"}, [Q, A]),
    "question, context and answer": ({"question": "q", "context": "x", "answer": "a"}, [("user", "q\n\nx"), A]),
    "names in capitals": ({"Question": "q", "Answer": "a"}, [Q, A]),
    "prompt and completion as messages": (
        {"prompt": [{"role": "system", "content": "s"}, TALK[0]], "completion": [TALK[1]]}, [SYSTEM, Q, A],
    ),
    "a prompt of messages and a text": ({"prompt": [TALK[0]], "completion": "a"}, [Q, A]),
    "a text and one message": ({"prompt": "q", "completion": TALK[1]}, [Q, A]),
    "messages as JSON in two cells": ({"prompt": json.dumps([TALK[0]]), "completion": json.dumps([TALK[1]])}, [Q, A]),
    "other JSON in a prompt is its text": ({"prompt": '[{"a": 1}]', "response": "a"}, [("user", '[{"a": 1}]'), A]),
    "anthropic": (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "12"},
                                                   {"type": "text", "text": "q"}]}, TALK[1]]},
        [("tool", "12"), Q, A],
    ),
    "a tool that gave back an object": (
        {"messages": [TALK[0], {"role": "tool", "content": {"c": 12}}, TALK[1]]}, [Q, ("tool", '{"c": 12}'), A],
    ),
    "openai's older function": (
        {"messages": [TALK[0], {"role": "function", "name": "f", "content": "12"}, TALK[1]]}, [Q, ("tool", "12"), A],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_the_field_becomes_the_turns_that_were_meant(name):
    row, expected = FORMS[name]
    assert spoken(row) == expected


@pytest.mark.parametrize("name", FORMS)
def test_a_form_reads_all_its_columns(name):
    """But for what stands beside the conversation, which is named."""
    reading = Reading(DataConfig(), learning("sft"))
    reading.record(Row(FORMS[name][0], "f:1"))
    assert set(reading.unread.rows) == {f"column {n}" for n in ("id", "category") if n in FORMS[name][0]}


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALL_TEXT = '{"name": "f", "arguments": {"x": 1}}'
CALLS = {
    "arguments as an object": {"tool_calls": [CALL]},
    "arguments as text": {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
    "without a wrapper": {"tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
    "calls as text": {"tool_calls": json.dumps([CALL])},
    "a call alone": {"tool_calls": CALL},
    "function_call": {"function_call": {"name": "f", "arguments": '{"x": 1}'}},
    "parameters": {"tool_calls": [{"function": {"name": "f", "parameters": {"x": 1}}}]},
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_tools_have_one_spelling(name):
    found = record({"messages": [TALK[0], {"role": "assistant", "content": None, **CALLS[name]}]})
    assert found.messages[1] == {"role": "assistant", "content": None, "tool_calls": [CALL]}


def test_calls_in_other_places_have_the_same_spelling():
    sharegpt = record({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": CALL_TEXT},
                                         {"from": "observation", "value": "12"}, {"from": "gpt", "value": "a"}]})  # fmt: skip
    assert sharegpt.messages[1] == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert [m["role"] for m in sharegpt.messages] == ["user", "assistant", "tool", "assistant"]
    anthropic = record({"messages": [TALK[0], {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"},
                                     {"type": "text", "text": "w"},
                                     {"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}}]}]})  # fmt: skip
    assert anthropic.messages[1] == {
        "role": "assistant", "content": "w", "tool_calls": [{"id": "c", **CALL}], "reasoning_content": "t",
    }  # fmt: skip


def test_tools_have_one_spelling():
    schema = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    whole = [{"type": "function", "function": schema}]
    for column, given in (
        ("tools", whole),
        ("tools", [schema]),
        ("tools", json.dumps([schema])),
        ("functions", [schema]),
    ):
        assert record({"messages": TALK, column: given}).tools == whole
        assert record({"prompt": "q", "response": "a", column: given}).tools == whole
    assert record({"messages": TALK, "tools": ""}).tools is None


def test_loss_flags_of_messages_are_obeyed():
    for name, no, yes in (
        ("weight", 0, 1),
        ("train", False, True),
        ("loss", False, True),
        ("weight", 0.0, 1.0),
        ("loss", "false", "true"),
    ):
        talk = [TALK[0], {**TALK[1], name: no}, TALK[0], {**TALK[1], name: yes}]
        messages = record({"messages": talk}).messages
        assert [UNTRAINED in m for m in messages] == [False, True, False, False]
        assert not any(name in m for m in messages)
        ignoring = record({"messages": talk}, ignore=[name]).messages
        assert ignoring == [*TALK, *TALK]


def test_flags_that_cannot_be_obeyed_are_refused():
    with pytest.raises(InputError, match=r"weight of message 1 is 0\.5"):
        record({"messages": [TALK[0], {**TALK[1], "weight": 0.5}]})
    with pytest.raises(InputError, match="train_detail"):
        record({"messages": [TALK[0], {**TALK[1], "train_detail": []}]})
    with pytest.raises(InputError, match=r"weight is 0\.3"):
        record({"prompt": "q", "response": "a", "weight": "0.3"})
    with pytest.raises(InputError, match="loss says that it is not to be learnt"):
        record({"text": "t", "loss": False}, "pretrain")
    assert record({"prompt": "q", "response": "a", "weight": 1, "train": True}).response == "a"
    assert record({"text": "t", "train": "a train to Rome"}, "pretrain").text == "t"


MERGED = [
    ([SYSTEM, Q, A], [("user", "s\n\nq"), A]),
    ([Q, A, SYSTEM, Q, A], [Q, A, ("user", "s\n\nq"), A]),
    ([SYSTEM, SYSTEM, Q, A], [("user", "s\n\ns\n\nq"), A]),
    ([SYSTEM, A], [("user", "s"), A]),
    ([Q, A, SYSTEM], [Q, A, ("user", "s")]),
    ([Q, A], [Q, A]),
]


@pytest.mark.parametrize(("before", "after"), MERGED)
def test_system_turns_are_merged_where_asked(before, after):
    messages = [{"role": role, "content": text} for role, text in before]
    assert [(m["role"], m["content"]) for m in merged_system(messages)] == after
    assert merged_system(merged_system(messages)) == merged_system(messages)
    assert spoken({"messages": messages}, system_turn=SystemTurn.merge) == after
    assert spoken({"messages": messages}) == before


def test_two_system_turns_that_differ_are_refused():
    row = {"messages": [{"role": "system", "content": "s"}, *TALK], "system": "t"}
    with pytest.raises(InputError, match="two system turns that differ"):
        record(row)
    assert spoken(row, ignore=["system"]) == [SYSTEM, Q, A]
    assert spoken({**row, "system": "s"}) == [SYSTEM, Q, A]


def test_columns_are_joined_where_a_mapping_says_so():
    row = {"sentence1": "x", "sentence2": "y", "label": 1}
    found = record(row, "classify", columns={"text": "sentence1+sentence2"})
    assert (found.text, found.label) == ("x\ny", "1")
    assert record({"a+b": "z", "label": "l"}, "classify", columns={"text": "a+b"}).text == "z"


# -- the cases from outside --------------------------------------------------------------------------------


def case(cases: Path, name: str, objective: str = "sft", **config) -> list[Record]:
    reading = Reading(DataConfig(**config), learning(objective))
    return [reading.record(row) for row in read_rows(str(cases / name), "data.train", TextUnit.line)]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("sharegpt.jsonl", [("user", "Question 0?"), ("assistant", "Answer 0.")]),
        ("alpaca_array.json", [("user", "Say 0\n\nwith 0"), ("assistant", "I say 0")]),
        ("prompt_completion_chat.jsonl", [("system", "Be brief."), ("user", "Name colour 0"), ("assistant", "Blue.")]),
        ("content_parts.jsonl", [("user", "Hello 0"), ("assistant", "Hi.")]),
        ("developer_role.jsonl", [("system", "Be brief."), ("user", "Hello 0"), ("assistant", "Hi.")]),
        ("messages_json_cell.csv", [("user", "Hello 0"), ("assistant", "Hi.")]),
        ("utf16.jsonl", [("user", "Grüße 0?"), ("assistant", "Guten Tag.")]),
        ("dolly_context.jsonl", [("user", "Summarise.\n\nThe boat is blue and old."), ("assistant", "An old blue boat.")]),
        ("alpaca_system_history.jsonl", [("system", "You are a weather clerk."), ("user", "Weather today?"),
                                         ("assistant", "Sun."), ("user", "And tomorrow?"), ("assistant", "Rain 0.")]),
    ],
)  # fmt: skip
def test_the_cases_are_read(cases, name, first):
    records = case(cases, name)
    values = asdict(records[0])
    turns = values["messages"] or [
        {"role": "user", "content": values["prompt"]},
        {"role": "assistant", "content": values["response"]},
    ]
    assert [(m["role"], m["content"]) for m in turns] == first


def test_the_cases_of_tools_are_one(cases):
    """Parquet's filled-in nulls and arguments as JSON text change nothing."""
    reference = case(cases, "tools_reference.jsonl")
    assert [r.digest() for r in case(cases, "tools_aligned.parquet")] == [r.digest() for r in reference]
    texts = case(cases, "tools_openai_str.jsonl")
    assert [r.digest() for r in texts] == [r.digest() for r in reference[: len(texts)]]


def test_the_cases_that_are_refused(cases):
    with pytest.raises(InputError, match=r"kto_rows\.jsonl:1: column label is True: an answer labelled good or bad"):
        case(cases, "kto_rows.jsonl")
    with pytest.raises(InputError, match=r"text is missing.*data\.columns\.text=sentence$"):
        case(cases, "glue_like.parquet", "classify")
    messages = case(cases, "weight0.jsonl")[0].messages
    assert [UNTRAINED in m for m in messages] == [False, True, False, False]
    merged = case(cases, "system_first.jsonl", system_turn=SystemTurn.merge)[0].messages
    assert merged[0] == {"role": "user", "content": "Be brief.\n\nHello 0"}


def test_labels_may_be_true_and_false():
    assert record({"text": "a", "label": True}, "classify").label == "true"
    assert record({"text": "a", "label": False}, "classify").label == "false"


def test_a_talk_in_texts_with_other_lists_is_no_table_once_those_are_ignored():
    row = {"dialog": ["q", "a"], "act": [1, 2], "emotion": [0, 1]}
    with pytest.raises(InputError, match="written by columns"):
        record(row)
    found = record(row, columns={"messages": "dialog"}, ignore=["act", "emotion"])
    assert [(m["role"], m["content"]) for m in found.messages] == [Q, A]


@pytest.mark.parametrize("answer", ['[{"role":"admin","content":"hello"}]', '[{"from":"a","value":"v"}]'])
def test_an_answer_that_is_other_json_stays_text(answer):
    assert spoken({"prompt": "q", "response": answer}) == [Q, ("assistant", answer)]
