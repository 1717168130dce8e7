"""What a row holds and its template leaves out is found, and stops a run; what it writes in its own way is not."""

from __future__ import annotations

import json
import re

import pytest
from chat_templates import FAMILIES, tokenizer_of
from tritune.trainer.audit.cheap import cheap_findings
from tritune.trainer.audit.findings import blocking
from tritune.trainer.config import Config
from tritune.trainer.config.choices import Unrendered
from tritune.trainer.config.data import Check
from tritune.trainer.data.spans import ChatTemplate
from tritune.trainer.data.splits import read_splits
from tritune.trainer.data.unrendered import unrendered
from tritune.trainer.errors import InputError
from tritune.trainer.model.chat_templates import CHATML
from tritune.trainer.model.tokenizer import byte_tokenizer

CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "town 7", "days": 3, "raw": 'a\n"b"'}},
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "It tells \"all\".", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["town 7", "town 8"]}}}}}  # fmt: skip
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in town 7?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"degrees": 12}'},
    {"role": "assistant", "content": "It is 12 degrees.", "reasoning_content": "twelve\n\ndegrees"},
]
HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
FOOT = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SAID = "{{ (m.reasoning_content or '') + (m.content or '') }}"
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
WAYS = {  # each writes everything, in its own way
    "as they stand": TOOLS + HEAD + SAID + CALLS + FOOT,
    "JSON in JSON": "{{ tools | tojson | tojson if tools }}" + HEAD + SAID
    + "{% for c in m.tool_calls or [] %}{{ c.function | tojson | tojson }}{% endfor %}" + FOOT,
    "in ASCII": "{{ tools | tojson(ensure_ascii=True, indent=2) if tools }}" + HEAD + "{{ (m.reasoning_content or '') | tojson }}"
    "{{ (m.content or '') | tojson(ensure_ascii=True) }}" + CALLS + FOOT,
    "trimmed and indented": TOOLS + HEAD
    + "{{ ((m.reasoning_content or '') | trim + '\n' + (m.content or '') | trim) | indent(4) }}" + CALLS + FOOT,
    "as XML": "{% for t in tools or [] %}<name>{{ t.function.name }}</name>{{ t.function.description }}"
    "{% for p in t.function.parameters.properties %}<p>{{ p }}</p>{% for o in t.function.parameters.properties[p].enum or [] %}"
    "<o>{{ o }}</o>{% endfor %}{% endfor %}{% endfor %}" + HEAD + SAID
    + "{% for c in m.tool_calls or [] %}<f={{ c.function.name }}>"
    "{% for k, v in c.function.arguments.items() %}<p={{ k }}>\n{{ v }}\n</p>{% endfor %}</f>{% endfor %}" + FOOT,
}  # fmt: skip
FAULTS = {
    "contents of system turns": HEAD.replace("{{", "{% if m.role != 'system' %}{{", 1) + TOOLS + SAID + CALLS
    + FOOT.replace("{% endfor %}", "{% endif %}{% endfor %}", 1),
    "tool calls": TOOLS + HEAD + SAID + FOOT,
    "tools": HEAD + SAID + CALLS + FOOT,
    "thoughts": TOOLS + HEAD + "{{ m.content or '' }}" + CALLS + FOOT,
    "contents of tool turns": TOOLS + HEAD + "{{ '' if m.role == 'tool' else " + SAID[2:-2] + "}}" + CALLS + FOOT,
    "contents of user turns": TOOLS + HEAD + "{{ m.content[:9] if m.role == 'user' else " + SAID[2:-2] + "}}" + CALLS + FOOT,
}  # fmt: skip


def missing(template, messages, tools=None, **options):
    rows = ChatTemplate(tokenizer_of(template), **options).rows(messages, "here", tools)
    return unrendered(messages, tools, rows)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_missing_where_all_is_written(way):
    assert missing(WAYS[way], TALK, [TOOL]) == {}
    text = [{**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}]
    written = [*TALK[:2], {**TALK[2], "tool_calls": [{"function": text[0]}]}, *TALK[3:]]
    if way != "as XML":
        assert missing(WAYS[way], written, [TOOL]) == {}


@pytest.mark.parametrize("what", FAULTS)
def test_what_is_left_out_is_named(what):
    assert set(missing(FAULTS[what], TALK, [TOOL])) == {what}


def test_calls_are_looked_for_in_the_answer_and_not_in_what_it_answers():
    """The name stands among the tools and the argument in the question, and neither in the answer."""
    messages = [TALK[1], {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {
        "city": "town 7"}}}]}]  # fmt: skip
    assert missing(FAULTS["tool calls"], messages, [TOOL]) == {"tool calls": 1}


def test_a_turn_that_says_what_another_says():
    first_only = (
        HEAD.replace("{{", "{% if loop.index0 != 2 %}{{", 1)
        + SAID
        + FOOT.replace("{% endfor %}", "{% endif %}{% endfor %}")
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": ("Go on.", f"{i} done")[i % 2]} for i in range(4)]
    assert missing(first_only, messages, last_only=True) == {"contents of user turns": 1}


def test_thoughts_of_answers_that_are_not_trained_may_be_left_out():
    thought = "<think>\nparity\n</think>\n\nYes."
    messages = [{"role": ("user", "assistant")[i % 2], "content": ("ask", thought)[i % 2]} for i in range(4)]
    template = FAMILIES["strips earlier thoughts"].template
    assert missing(template, messages) == missing(template, messages, last_only=True) == {}
    always = HEAD + "{{ m.content.split('</think>')[-1] }}" + FOOT
    assert missing(always, messages) == {"thoughts": 2}
    assert missing(always, messages, last_only=True) == {"thoughts": 1}


def settings(tmp_path, rows) -> Config:
    path, config = tmp_path / "rows.jsonl", Config()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.train, config.cache.dir, config.cache.num_procs = str(path), str(tmp_path / "cache"), 1
    config.data.max_length = 4096
    return config


def test_a_run_stops_and_its_remedies_work(tmp_path):
    """Calls and tools that ChatML does not know: refused, also from the cache; trained and said where that is wanted."""
    rows = [
        {"messages": [*TALK[1:4], {"role": "assistant", "content": "12."}], "tools": [TOOL]},
        {"messages": [TALK[1], TALK[4]]},
    ]
    config = settings(
        tmp_path, [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, *rows]
    )
    plain = "".join(re.split(r"\{%- (?:end)?generation -%\}", CHATML))
    for template in (CHATML, plain):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        config.data.unrendered = Unrendered.refuse
        for _ in range(2):
            with pytest.raises(InputError) as error:
                read_splits(config, tokenizer, None)
            assert error.value.value.endswith("rows.jsonl:2")
            assert "leaves out what 2 of 3 rows hold: thoughts (1), tool calls (1), tools (1)" in error.value.rule
            assert "data.unrendered=warn" in error.value.remedy
        config.data.unrendered = Unrendered.warn
        splits = read_splits(config, tokenizer, None)
        found = {f.name: f for f in cheap_findings(config.data, config.objective, splits, tokenizer)}
        assert found[Check.unrendered].details == {"split": "train", "thoughts": 1, "tool calls": 1, "tools": 1}
        assert "data.unrendered=warn" in found[Check.unrendered].text
        assert found[Check.empty_answers].count == 1, "an answer of a call that is not written is a stop token alone"
        assert found[Check.empty_answers].places[0].endswith("rows.jsonl:2")
        config.data.unrendered = Unrendered.refuse
        assert (
            blocking(cheap_findings(config.data, config.objective, splits, tokenizer), config.audit.fail_on) is not None
        )
    config.data.unrendered = Unrendered.refuse
    tokenizer.chat_template = WAYS["as they stand"]
    assert not read_splits(config, tokenizer, None).examples["train"].report.remarks


@pytest.mark.parametrize("said", ["", " \n", "<think>\n\n</think>\n\n"])
def test_an_answer_of_nothing_but_its_end_is_empty(tmp_path, said):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]}
    config, tokenizer = (
        settings(tmp_path, [row, {"messages": [TALK[1], {"role": "assistant", "content": "b"}]}]),
        byte_tokenizer(),
    )
    found = [
        f
        for f in cheap_findings(config.data, config.objective, read_splits(config, tokenizer, None), tokenizer)
        if f.name is Check.empty_answers
    ]
    assert [(f.count, f.places[0][-1]) for f in found] == [(1, "1")]
