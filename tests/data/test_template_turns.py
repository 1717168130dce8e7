"""What is trained of conversations with system turns, tools and several roles, written down token by token.

`[` and `]` in an expectation stand around what is trained; between two spaces is one token.
"""

from __future__ import annotations

import json
import random
import re
import timeit
from mmap import mmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices
from tritune.trainer.data import isolated
from tritune.trainer.data.confined_rows import ConfinedRows
from tritune.trainer.data.masks import token_spans
from tritune.trainer.data.spans import ChatTemplate
from tritune.trainer.data.templates import render
from tritune.trainer.errors import InputError
from tritune.trainer.model.chat_templates import CHATML
from tritune.trainer.model.tokenizer import byte_tokenizer

UNMARKED = re.sub(r"\{%- (end)?generation -%\}", "", CHATML)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}"
    "{{ 'tools' }}{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls %}{% if not loop.first or m.content %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>\n' }}{{ c.function | tojson }}{{ '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user\n' }}"
    "{% else %}{{ '\n' }}{% endif %}{{ '<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "one ?"},
    {"role": "assistant", "content": "uno !"},
    {"role": "user", "content": "user two"},
    {"role": "assistant", "content": "dos"},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL_TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "sum"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "name": "add", "content": "tool"},
    {"role": "tool", "name": "add", "content": "seven"},
    {"role": "assistant", "content": "so", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "eight"},
    {"role": "assistant", "content": "it is eight"},
]
TOOL = {"name": "add"}


def words(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words, punctuation and single white space characters, which are written ~ (space) and $ (line end)."""
    backend = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def shown(tokenizer, messages, tools=None, **options) -> str:
    [rendered] = ChatTemplate(tokenizer, **options).rows(messages, "here", tools)
    assert rendered.text == tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert all(a < b for a, b in rendered.spans)
    encoding = tokenizer(rendered.text, add_special_tokens=False)[0]
    pieces = [rendered.text[a:b].replace(" ", "~").replace("\n", "$") for a, b in encoding.offsets]
    for start, stop in token_spans(encoding, rendered):
        pieces[start], pieces[stop - 1] = "[ " + pieces[start], pieces[stop - 1] + " ]"
    return " ".join(pieces)


CHATML_ROWS = {
    ("assistant",): (
        "<|im_start|> system $ be ~ kind <|im_end|> $ <|im_start|> user $ one ~ ? <|im_end|> $ "
        "<|im_start|> assistant $ [ uno ~ ! <|im_end|> ] $ <|im_start|> user $ user ~ two <|im_end|> $ "
        "<|im_start|> assistant $ [ dos <|im_end|> ] $"
    ),
    ("user",): (
        "<|im_start|> system $ be ~ kind <|im_end|> $ <|im_start|> user $ [ one ~ ? <|im_end|> ] $ "
        "<|im_start|> assistant $ uno ~ ! <|im_end|> $ <|im_start|> user $ [ user ~ two <|im_end|> ] $ "
        "<|im_start|> assistant $ dos <|im_end|> $"
    ),
    ("system", "assistant"): (
        "<|im_start|> system $ [ be ~ kind <|im_end|> ] $ <|im_start|> user $ one ~ ? <|im_end|> $ "
        "<|im_start|> assistant $ [ uno ~ ! <|im_end|> ] $ <|im_start|> user $ user ~ two <|im_end|> $ "
        "<|im_start|> assistant $ [ dos <|im_end|> ] $"
    ),
}


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
@pytest.mark.parametrize("roles", CHATML_ROWS)
def test_chatml(template, roles):
    tokenizer = words(template)
    assert shown(tokenizer, TALK, train_on=roles) == CHATML_ROWS[roles]
    last = shown(tokenizer, TALK, train_on=roles, last_only=True)
    cut = CHATML_ROWS[roles].rindex("[")
    assert last == CHATML_ROWS[roles][:cut].replace("[ ", "").replace(" ]", "") + CHATML_ROWS[roles][cut:]


def test_llama_3():
    head = "<|start_header_id|> {} <|end_header_id|> $ $ "
    system, user, assistant = (head.format(role) for role in ("system", "user", "assistant"))
    assert shown(words(LLAMA), TALK) == (
        f"<bos> {system}be ~ kind <|eot_id|> {user}one ~ ? <|eot_id|> {assistant}[ uno ~ ! <|eot_id|> ] "
        f"{user}user ~ two <|eot_id|> {assistant}[ dos <|eot_id|> ]"
    )


def test_gemma():
    assert shown(words(GEMMA), TALK[1:], train_on=("assistant", "user"), last_only=False) == (
        "<bos> <start_of_turn> user $ [ one ~ ? <end_of_turn> ] $ <start_of_turn> model $ [ uno ~ ! <end_of_turn> ] $ "
        "<start_of_turn> user $ [ user ~ two <end_of_turn> ] $ <start_of_turn> model $ [ dos <end_of_turn> ] $"
    )
    with pytest.raises(InputError, match=r"rows:9.*no system turns here"):
        ChatTemplate(words(GEMMA)).rows(TALK, "rows:9")


def test_tools():
    start = "<|im_start|> assistant $ "
    call = '<tool_call> $ { " name " : ~ " add " , ~ " arguments " : ~ { " a " : ~ 1 } } $ </tool_call>'
    before = '<|im_start|> system $ be ~ kind $ tools $ { " name " : ~ " add " } <|im_end|> $ '
    before += "<|im_start|> user $ sum <|im_end|> $ "
    expected = (
        f"{before}{start}[ {call} $ {call} <|im_end|> ] $ <|im_start|> user $ <tool_response> $ tool $ </tool_response> $ "
        f"<tool_response> $ seven $ </tool_response> <|im_end|> $ {start}[ so $ {call} <|im_end|> ] $ "
        f"<|im_start|> user $ <tool_response> $ eight $ </tool_response> <|im_end|> $ {start}[ it ~ is ~ eight <|im_end|> ] $"
    )
    assert shown(words(TOOLS), TOOL_TALK, [TOOL]) == expected
    cut = expected.rindex("[")
    bare = expected[:cut].replace("[ ", "").replace(" ]", "")
    assert shown(words(TOOLS), TOOL_TALK, [TOOL], last_only=True) == bare + expected[cut:]
    assert shown(words(TOOLS), TOOL_TALK, [TOOL], train_on=("tool",)) == (
        f"{before}{start}{call} $ {call} <|im_end|> $ <|im_start|> user $ <tool_response> $ [ tool $ </tool_response> ] $ "
        f"<tool_response> $ [ seven $ </tool_response> <|im_end|> ] $ {start}so $ {call} <|im_end|> $ "
        f"<|im_start|> user $ <tool_response> $ [ eight $ </tool_response> <|im_end|> ] $ {start}it ~ is ~ eight <|im_end|> $"
    )


def test_phi_3(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "phi-3-mini")
    [rendered] = ChatTemplate(tokenizer).rows(TALK, "here")
    encoding = tokenizer(rendered.text, add_special_tokens=False)[0]
    trained = [encoding.tokens[a:b] for a, b in token_spans(encoding, rendered)]
    assert trained == [["uno", "▁!", "<|end|>\n"], ["d", "os", "<|end|>\n", "<|endoftext|>"]]
    assert [t for t in encoding.tokens if t.startswith("<|")] == [
        "<|system|>\n", "<|end|>\n", "<|user|>\n", "<|end|>\n", "<|assistant|>\n", "<|end|>\n", "<|user|>\n", "<|end|>\n",
        "<|assistant|>\n", "<|end|>\n", "<|endoftext|>",
    ]  # fmt: skip


PLAIN_MARK = "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}"
assert PLAIN_MARK in CHATML
WITH_MARKS = {
    "one mark a turn": CHATML,
    "two marks a turn": CHATML.replace(
        PLAIN_MARK,
        "{% generation %}{{ message['content'][:2] }}{% endgeneration %}{{ '<pad>' }}"
        "{% generation %}{{ message['content'][2:] }}",
    ),
}
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(texts, min_size=2, max_size=7), st.sampled_from(sorted(WITH_MARKS)))
def test_marks_are_transformers_own_spans(contents, name):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = WITH_MARKS[name]
    messages = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    [rendered] = ChatTemplate(tokenizer).rows(messages, "here")
    text, marks = _render_with_assistant_indices(
        _compile_jinja_template(tokenizer.chat_template), messages, None, None, False, **tokenizer.special_tokens_map
    )
    assert rendered.text == text
    assert rendered.spans == [span for span in marks if span[0] < span[1]]
    encoding = tokenizer(text, add_special_tokens=False)[0]
    inside = [any(a <= i < b for a, b in rendered.spans) for i, _ in encoding.offsets]
    mask = [False] * len(encoding)
    for start, stop in token_spans(encoding, rendered):
        mask[start:stop] = [True] * (stop - start)
    assert mask == inside


def test_marks_inside_a_macro_are_refused():
    tokenizer = words(
        "{% macro m(x) %}{% generation %}{{ x }}{% endgeneration %}{% endmacro %}{{ m(messages[0].content) }}"
    )
    with pytest.raises(InputError, match=r"rows:4.*in a macro"):
        ChatTemplate(tokenizer).rows(TALK, "rows:4")
    assert ChatTemplate(tokenizer).prompt(TALK, "rows:4") == "be kind"


@pytest.mark.parametrize("template", [CHATML, UNMARKED, LLAMA, TOOLS])
def test_text_is_that_of_apply_chat_template(template):
    """Random rows with keys that templates read, None among them; with and without tools and generation prompt."""
    rng = random.Random(3)
    source = (
        template + "{{ messages[0] | tojson(indent=1) }}{{ messages[-1].reasoning_content }}{{ documents }}{{ tools }}"
    )
    for tokenizer in (words(template), words(source)):
        for _ in range(40):
            messages = [
                {"role": rng.choice(["user", "assistant", "tool"]), "content": rng.choice(["a b", "<é>", ""])}
                for _ in range(5)
            ]
            messages[-1] |= {
                "thinking": rng.choice(["hm", None]),
                "tool_calls": rng.choice([None, [CALL]]),
                "x": (1, 2.5),
            }
            for options in (
                {"tools": [TOOL]},
                {"add_generation_prompt": True},
                {"tools": None},
                {"enable_thinking": False},
            ):
                assert render(tokenizer, messages, "here", **options) == tokenizer.apply_chat_template(
                    json.loads(json.dumps(messages)), tokenize=False, **options
                )


def test_a_row_costs_less_than_transformers_takes_for_its_text_alone(shared, monkeypatch):
    """Twice the work, spans included; 25 us against 33 us here where nothing else ran. As processes that tokenize do it."""
    monkeypatch.setattr(isolated, "_mark", mmap(-1, 1))
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "phi-3-mini")
    template, row = (
        ChatTemplate(tokenizer),
        [{"role": "user", "content": "word " * 50}, {"role": "assistant", "content": "so " * 80}],
    )
    render_all = ConfinedRows(template)
    ours, theirs = [], []
    for _ in range(7):
        ours.append(timeit.timeit(lambda: render_all([(row, "here", None)] * 200), number=1))
        theirs.append(timeit.timeit(lambda: tokenizer.apply_chat_template(row, tokenize=False), number=200))
    assert min(ours) < 1.3 * min(theirs)
