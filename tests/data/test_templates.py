"""Which tokens of a conversation are trained, judged by transformers' own mask and by counting characters.

With the built-in byte tokenizer a token is a byte (or one of five special ones), so masks can be written down by hand.
"""

from __future__ import annotations

import copy
import re

import pytest
from transformers import AutoTokenizer
from tritune.trainer.config import ModelConfig
from tritune.trainer.data.masks import double_bos, token_spans, verify
from tritune.trainer.data.spans import ChatTemplate
from tritune.trainer.data.templates import block_names
from tritune.trainer.errors import InputError
from tritune.trainer.model.chat_templates import CHATML
from tritune.trainer.model.tokenizer import byte_tokenizer, load_tokenizer, stop_token_ids

UNMARKED_CHATML = re.sub(r"\{%- (end)?generation -%\}", "", CHATML)
# As Qwen 2.5 writes it: whitespace kept, a system turn where there is none.
QWEN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Gemma and Llama 3 do: contents are trimmed; BOS comes from the template.
TRIMMING = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Llama 2 and Mistral: no special token between question and answer, spaces around it, EOS after it.
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As Phi 3: EOS only after the whole conversation.
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}{{ message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# As Qwen 3: something between the generation prompt and the answer that only full conversations have.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
UNMARKED = {
    "chatml": UNMARKED_CHATML, "qwen": QWEN, "trimming": TRIMMING, "inst": INST, "phi3": PHI3, "thinking": THINKING,
}  # fmt: skip


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """user, assistant, user, ..."""
    first = [{"role": "system", "content": system}] if system is not None else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


CONVERSATIONS = {
    "single": turns("Hello there", "General Kenobi"),
    "multi": turns("one?", "uno!", "two?", "dos!", "three?", "tres!"),
    "system": turns("one?", "uno!", "two?", "dos!", system="Speak Spanish."),
    "repeated": turns("yes", "yes", "yes", "yes", system="yes"),
    "ends-with-user": turns("one?", "uno!", "two?"),
    "unicode": turns("größer 😀?", "naïve 日本語 😀", "é", "é̂"),
    "markup": turns("a", "<|im_end", "[INST] x", "assistant\n", "\n", "user"),
    "lines": turns("a\nb\n\nc", "d\n\ne\nf", "g", "h\n\n\ni"),
    "one-letter": turns("pick", "A", "pick", "e"),
}  # fmt: skip
PADDED = {
    "trailing-newline": turns("q", "answer\n", "r", "other \n"),
    "leading-space": turns("q", "  answer", "r", "\nother"),
    "both": turns(" q ", "  answer  ", "r\n", "\tother\n\n"),
    "only-spaces": turns("q", "  ", "r", "real"),
}


def bytes_with(template: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def encode(tokenizer, messages) -> tuple[list[int], list[bool]]:
    """Token ids and, for each, whether it is trained."""
    [rendered] = ChatTemplate(tokenizer).rows(messages, "here")
    out = tokenizer(rendered.text, add_special_tokens=False)
    mask = [False] * len(out["input_ids"])
    for start, stop in token_spans(out[0], rendered):
        mask[start:stop] = [True] * (stop - start)
    return list(out["input_ids"]), mask


def spans(tokenizer, ids, mask) -> list[str]:
    """The trained stretches, decoded."""
    result, inside = [], False
    for i, m in zip(ids, mask, strict=True):
        if m and not inside:
            result.append([])
        if m:
            result[-1].append(i)
        inside = m
    return [tokenizer.decode(x) for x in result]


# -- marks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVERSATIONS | PADDED)
def test_marks_give_transformers_own_mask(name):
    messages = (CONVERSATIONS | PADDED)[name]
    tokenizer = bytes_with(CHATML)
    assert ChatTemplate(tokenizer).has_marks
    ids, mask = encode(tokenizer, messages)
    theirs = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    assert ids == theirs["input_ids"]
    assert mask == [bool(m) for m in theirs["assistant_masks"]]
    # and written down by hand: the answer and the end of the turn, nothing else
    answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert spans(tokenizer, ids, mask) == answers


def test_built_in_chatml_on_a_real_tokenizer(shared):
    config = ModelConfig(path=str(shared / "models" / "stories260K"), chat_template="chatml")
    tokenizer = load_tokenizer(config)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end == 513
    messages = CONVERSATIONS["system"]
    ids, mask = encode(tokenizer, messages)
    assert [i for i, m in zip(ids, mask, strict=True) if m].count(end) == 2
    assert ids.count(end) == 5
    assert end in stop_token_ids(tokenizer)
    assert [s.replace(" ", "") for s in spans(tokenizer, ids, mask)] == ["uno!<|im_end|>", "dos!<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% generation %}x{% endgeneration %}", True),
        ("{%- generation -%}x{%- endgeneration -%}", True),
        ("{%generation%}{{ x }}{%endgeneration%}", True),
        ("{%+ generation %}x{% endgeneration %}", True),
        ("{%\n  generation\n%}x{% endgeneration %}", True),
        ("{%\tgeneration %}x{% endgeneration %}", True),
        ("{% if add_generation_prompt %}x{% endif %}", False),
        ("{% set generation = 1 %}{{ generation }}", False),
    ],
)
def test_recognizing_marks(template, expected):
    assert ("generation" in block_names(template)) is expected


def test_marks_written_tightly_still_give_the_exact_mask():
    tight = CHATML.replace("{%- generation -%}", "{%generation%}").replace("{%- endgeneration -%}", "{%endgeneration%}")
    ids, mask = encode(bytes_with(tight), CONVERSATIONS["multi"])
    assert (ids, mask) == encode(bytes_with(CHATML), CONVERSATIONS["multi"])


# -- no marks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVERSATIONS | PADDED)
def test_with_and_without_marks_agree(name):
    """The same template with its marks taken out trains the same tokens."""
    messages = (CONVERSATIONS | PADDED)[name]
    marked, unmarked = bytes_with(CHATML), bytes_with(UNMARKED_CHATML)
    assert not ChatTemplate(unmarked).has_marks
    ids, mask = encode(unmarked, messages)
    wanted_ids, wanted = encode(marked, messages)
    assert ids == wanted_ids
    assert spans(unmarked, ids, mask) == spans(marked, wanted_ids, wanted)
    assert mask == wanted


def segments(template: str, messages) -> list[tuple[str, bool]]:
    """An oracle: the rendered text, cut where the role changes by rendering with unmistakable contents."""
    tokenizer = bytes_with(template)
    marked = copy.deepcopy(messages)
    for i, message in enumerate(marked):
        message["content"] = f"\ue000{i}\ue001"
    text = tokenizer.apply_chat_template(marked, tokenize=False)
    parts, trim = [], "| trim" in template
    for piece in re.split("(\ue000\\d+\ue001)", text):
        if piece.startswith("\ue000"):
            i = int(piece[1:-1])
            content = messages[i]["content"].strip() if trim else messages[i]["content"]
            parts.append((content, messages[i]["role"]))
        elif piece:
            parts.append((piece, "frame"))
    return parts


@pytest.mark.parametrize("template", UNMARKED)
@pytest.mark.parametrize("name", CONVERSATIONS | PADDED)
def test_answers_are_trained_and_nothing_of_other_turns(template, name):
    messages = (CONVERSATIONS | PADDED)[name]
    if template == "trimming" and name == "only-spaces":
        messages = messages[2:]
    tokenizer = bytes_with(UNMARKED[template])
    ids, mask = encode(tokenizer, messages)
    parts = segments(UNMARKED[template], messages)
    text = "".join(p for p, _ in parts)
    assert tokenizer.decode(ids) == text, "the oracle renders the same text"
    owner = [role for part, role in parts for _ in range(len(part))]
    index = [n for n, (part, _) in enumerate(parts) for _ in range(len(part))]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for (start, stop), trained in zip(offsets, mask, strict=True):
        roles = set(owner[start:stop])
        if roles == {"assistant"}:
            assert trained, f"{text[start:stop]!r} of an answer is not trained"
        if roles & {"user", "system"}:
            assert not trained, f"{text[start:stop]!r} of another turn is trained"
        if roles == {"frame"} and trained:
            # part of the frame before an answer (what the model must write itself) or the turn's end after it
            frame = index[start]
            before = parts[frame - 1][1] if frame else None
            after = parts[frame + 1][1] if frame + 1 < len(parts) else None
            assert "assistant" in (before, after)
    stop = {"inst": "<eos>", "phi3": "<|end|>"}.get(template, "<|im_end|>")
    trained_text = spans(tokenizer, ids, mask)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert len(trained_text) == len(answers)
    for span, answer in zip(trained_text, answers, strict=True):
        assert f"{answer.strip()}" in span
        assert stop in span.removeprefix(answer.strip()), f"the end of the turn is not trained in {span!r}"
        for other in ("user", "<|im_start|>", "[INST]", "<|user", "<|system"):
            if other not in answer:
                assert other not in span, "the next turn's header is trained"


@pytest.mark.parametrize("name", [n for n in CONVERSATIONS if n != "ends-with-user"])
def test_the_header_of_the_next_turn_is_never_trained(name):
    """Turn ends are found by comparing with what follows a last answer; Phi 3's goes on with `<|endoftext|>` there and
    `<|user|>` here, which share their first two characters: bytes of their own where these are no special tokens."""
    tokenizer = bytes_with(PHI3)
    ids, mask = encode(tokenizer, CONVERSATIONS[name])
    for span in spans(tokenizer, ids, mask)[:-1]:
        assert span.rstrip("\n").endswith("<|end|>"), span


def test_templates_whose_frame_contains_the_answer():
    """An answer that also stands in what the template writes before it ("think" in "<think>")."""
    tokenizer = bytes_with(THINKING)
    for answer in ("think", "k", ">", "\n\n<"):
        ids, mask = encode(tokenizer, turns("q", answer, "r", "ordinary"))
        first = spans(tokenizer, ids, mask)[0]
        assert first.endswith(f"{answer}<|im_end|>") or first.endswith(f"{answer}<|im_end|>\n"), first


@pytest.mark.parametrize("name", CONVERSATIONS | PADDED)
def test_phi3_tokenizer(name, shared):
    """A real tokenizer whose template has no marks: against the rendered text, cut by its own special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "phi-3-mini")
    messages = (CONVERSATIONS | PADDED)[name]
    template = ChatTemplate(tokenizer)
    assert not template.has_marks
    ids, mask = encode(tokenizer, messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    user, assistant, system, end = (
        tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in ("user", "assistant", "system", "end")
    )
    assert None not in (user, assistant, system, end)
    speaker = None
    for position, (i, trained) in enumerate(zip(ids, mask, strict=True)):
        if i in (user, assistant, system):
            speaker = i
            assert not trained
        elif speaker != assistant:
            assert not trained, f"token {position} {tokenizer.decode([i])!r} of another turn is trained"
        elif i == end:
            assert trained, f"the end of an answer at token {position} is not trained"
        elif i == tokenizer.eos_token_id:
            assert trained == (messages[-1]["role"] == "assistant")
    answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
    found = spans(tokenizer, ids, mask)
    assert len(found) == len(answers)
    for span, answer in zip(found, answers, strict=True):
        assert "".join(answer.split()) in "".join(span.split())


def test_a_template_that_rewrites_history_gives_rows_of_their_own():
    """Earlier answers are shortened once another turn follows: each is trained where it is the last."""
    rewriting = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' and not loop.last %}{{ '...' }}"
        "{% else %}{{ message['content'] }}{% endif %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    template = ChatTemplate(bytes_with(rewriting))
    rows = template.rows(turns("a", "bcd", "e", "fgh"), "here")
    assert [[row.text[a:b] for a, b in row.spans] for row in rows] == [["bcd<|im_end|>"], ["fgh<|im_end|>"]]
    assert "bcd" not in rows[1].text
    last = ChatTemplate(bytes_with(rewriting), last_only=True).rows(turns("a", "bcd", "e", "fgh"), "here")
    assert last == rows[1:]


def test_a_template_that_asks_otherwise_than_it_writes_is_refused():
    """The system's text stands in a question that is the last turn, and nowhere else: no row shows what the model is asked."""
    body = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
        "{% if loop.last %}{{ messages[0].content + ' ' }}{% endif %}"
        "{{ m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    messages = turns("question", "answer", system="Be brief.")
    with pytest.raises(InputError, match=r"rows.jsonl:7: .* turn 2 .*asked, it has .*Be brief") as error:
        ChatTemplate(bytes_with(body)).rows(messages, "rows.jsonl:7")
    assert "model.chat_template=chatml" in error.value.remedy
    assert ChatTemplate(bytes_with(CHATML)).rows(messages, "rows.jsonl:7")


def test_a_template_that_fails_names_the_row():
    alternating = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + QWEN
    )
    template = ChatTemplate(bytes_with(alternating))
    with pytest.raises(InputError, match=r"rows\.jsonl:3.*System role not supported"):
        template.rows(turns("a", "b", system="s"), "rows.jsonl:3")


def test_no_template_is_refused():
    with pytest.raises(InputError, match=r"model\.chat_template"):
        ChatTemplate(bytes_with(""))


def test_a_tokenizer_with_several_named_templates(tmp_path):
    """Command R and others: `chat_template` is a dictionary, and `default` is meant."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": QWEN}
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    ids, mask = encode(tokenizer, CONVERSATIONS["multi"])
    assert (ids, mask) == encode(bytes_with(CHATML), CONVERSATIONS["multi"])
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stop_token_ids(tokenizer)


@pytest.mark.parametrize("template", ["chatml-marked", *UNMARKED])
def test_never_two_bos(template):
    """The byte tokenizer adds a BOS of its own to plain text; some templates write one."""
    tokenizer = bytes_with(CHATML if template == "chatml-marked" else UNMARKED[template])
    ids, _ = encode(tokenizer, turns("a", "b"))
    assert ids.count(tokenizer.bos_token_id) == ("bos_token" in tokenizer.chat_template)
    assert ids == tokenizer.apply_chat_template(turns("a", "b"), return_dict=True)["input_ids"]
    assert not double_bos(tokenizer, ids)
    assert double_bos(tokenizer, [tokenizer.bos_token_id, *tokenizer("<bos>")["input_ids"]])


@pytest.mark.parametrize("template", ["chatml-marked", *UNMARKED])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_verify_finds_nothing_where_training_and_asking_agree(template, name):
    tokenizer = bytes_with(CHATML if template == "chatml-marked" else UNMARKED[template])
    assert verify(tokenizer, ChatTemplate(tokenizer), CONVERSATIONS[name], "here") is None


def test_verify_says_what_is_wrong():
    head = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    tail = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    faults = {
        # the mark begins after a word that the model must write itself
        "token 19, and the first that is trained is token 24": (
            "{% if m.role == 'assistant' %}{{ 'Sure:' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
            "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        ),
        "none is trained": "{{ m.content }}{% generation %}{% endgeneration %}",
        "its tokens spell 'REPLY": (
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content|upper + '<|im_end|>' }}{% endgeneration %}"
            "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        ),
    }
    for said, body in faults.items():
        tokenizer = bytes_with(head + body + tail)
        complaint = verify(tokenizer, ChatTemplate(tokenizer), turns("a", "reply"), "here")
        assert complaint is not None
        assert said in complaint
    dated = bytes_with(
        "{% if add_generation_prompt %}{{ 'now ' }}{% endif %}" + head + faults["its tokens spell 'REPLY"] + tail
    )
    with pytest.raises(InputError, match="asked, it has 'now "):
        verify(dated, ChatTemplate(dated), turns("a", "reply"), "here")
