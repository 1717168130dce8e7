"""Minimal chat templates, one for each way in which families in use treat a conversation, and conversations to try them on.

Each was written for these tests after what a family does, none is a copy.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tritune.trainer.model.tokenizer import byte_tokenizer

START, END = "<|im_start|>", "<|im_end|>"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>' }}{{ c.function | tojson }}{{ '</tool_call>' }}{% endfor %}"
)
TOOLS = "{% if tools %}{{ '<|im_start|>system\nTools: ' }}{{ tools | tojson }}{{ '<|im_end|>\n' }}{% endif %}"
# Thoughts of a turn, from its own key or from its content, and what is left.
THOUGHT = (
    "{% set text = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template, and what a reference has to know of it.

    Attributes:
        close: what ends an answer.
        merges: whether turns of one role that follow one another are written as one.
        extra: what may follow `close` at the end of a whole conversation, and is trained there.
    """

    template: str
    close: str = END
    merges: bool = False
    extra: str = ""


def _each(body: str, before: str = "", after: str = ASK) -> str:
    return f"{before}{{% for m in messages %}}{body}{{% endfor %}}{after}"


_PLAIN = "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}"
_CALLING = "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}" + CALLS + "{{ '<|im_end|>\n' }}"

FAMILIES = {
    "plain": Family(_each(_CALLING, TOOLS)),
    "marks the answer": Family(
        _each(
            "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content or '' }}" + CALLS
            + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}" + _PLAIN + "{% endif %}", TOOLS
        )
    ),
    "marks the header": Family(
        _each(
            "{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' + (m.content or '') }}" + CALLS
            + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}" + _PLAIN + "{% endif %}", TOOLS
        )
    ),
    "strips earlier thoughts": Family(
        _each(
            "{% set text = m.content or '' %}{% if m.role == 'assistant' and not loop.last and '</think>' in text %}"
            "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
            "{{ '<|im_start|>' + m.role + '\n' + text }}" + CALLS + "{{ '<|im_end|>\n' }}", TOOLS
        )
    ),
    "thoughts since the last question": Family(  # and an empty one where the last turn has none
        _each(
            "{% if m.role == 'assistant' %}" + THOUGHT + "{{ '<|im_start|>assistant\n' }}"
            "{% if loop.index0 > ns.asked and (loop.last or thought) %}"
            "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}{% else %}{{ text }}{% endif %}"
            + CALLS + "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}"
            "{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}"
            "{% else %}" + _PLAIN + "{% endif %}",
            TOOLS + "{% set ns = namespace(asked=-1) %}"
            "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}",
        )
    ),
    "marks, and strips thoughts": Family(
        _each(
            "{% if m.role == 'assistant' %}" + THOUGHT + "{{ '<|im_start|>assistant\n' }}{% generation %}"
            "{% if loop.last and thought %}{{ '<think>\n' + thought + '\n</think>\n' }}{% endif %}{{ text }}" + CALLS
            + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}" + _PLAIN + "{% endif %}", TOOLS
        )
    ),
    "adds an empty thought to the last": Family(
        _each(
            "{% set text = m.content or '' %}{% if m.role == 'assistant' and loop.last and '</think>' not in text %}"
            "{% set text = '<think>\n\n</think>\n\n' + text %}{% endif %}{{ '<|im_start|>' + m.role + '\n' + text }}"
            + CALLS + "{{ '<|im_end|>\n' }}", TOOLS
        )
    ),
    "reads the first turn": Family(
        _each(
            "{% if not (loop.first and m.role == 'system') %}" + _CALLING + "{% endif %}",
            "{% if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
            "{% endif %}" + TOOLS,
        )
    ),
    "writes a system turn of its own": Family(
        _each(
            "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
            + _CALLING, TOOLS
        )
    ),
    "trims": Family(
        _each(
            "{{ '<|im_start|>' + m.role + '\n\n' + (m.content or '') | trim }}" + CALLS + "{{ '<|im_end|>' }}",
            "{{ bos_token }}" + TOOLS, "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}",
        )
    ),
    "merges turns": Family(
        _each(
            "{% if loop.first or messages[loop.index0 - 1].role != m.role %}{{ '<|im_start|>' + m.role + '\n' }}{% else %}"
            "{{ '\n\n' }}{% endif %}{{ m.content or '' }}" + CALLS
            + "{% if loop.last or messages[loop.index0 + 1].role != m.role %}{{ '<|im_end|>\n' }}{% endif %}", TOOLS
        ), merges=True,
    ),
    "takes turns, without a system": Family(
        _each(
            "{% if m.role not in ('user', 'assistant') or (m.role == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('roles take turns') }}{% endif %}"
            "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (m.content or '') | trim }}" + CALLS
            + "{{ '<|im_end|>\n' }}",
            "{{ bos_token }}", "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}",
        )
    ),
    "ends the whole with its own token": Family(
        _each(_CALLING, TOOLS, ASK.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")),
        extra="\n<eos>",
    ),
    "speaks in channels": Family(
        _each(
            "{% if m.role == 'assistant' %}" + THOUGHT + "{% if thought and loop.last %}"
            "{{ '<|im_start|>assistant<|channel|>analysis<|message|>' + thought + '<|im_end|>' }}{% endif %}"
            "{{ '<|im_start|>assistant<|channel|>final<|message|>' + text }}" + CALLS
            + "{{ '<|return|>' if loop.last else '<|im_end|>' }}{% else %}"
            "{{ '<|im_start|>' + m.role + '<|message|>' + (m.content or '') + '<|im_end|>' }}{% endif %}",
            TOOLS, "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}",
        ), close="<|return|>",
    ),
    "puts the system into the last question": Family(
        _each(
            "{% if m.role == 'user' %}{{ '[INST] ' }}"
            "{% if loop.index0 == ns.asked and ns.system %}{{ ns.system + '\n\n' }}{% endif %}"
            "{{ m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + (m.content or '') | trim }}" + CALLS
            + "{{ eos_token }}{% elif m.role == 'tool' %}{{ '[RESULT]' + m.content + '[/RESULT]' }}{% endif %}",
            "{{ bos_token }}{% set ns = namespace(system='', asked=-1) %}{% for m in messages %}"
            "{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}"
            "{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}", "",
        ), close="<eos>",
    ),
}  # fmt: skip

ADDED = [START, END, "<|channel|>", "<|message|>", "<|return|>"]
_POOL = [
    "yes",
    "Yes.",
    "a",
    "\n",
    "",
    " x ",
    "assistant\n",
    "user",
    "<|im_end",
    "think",
    "y\n\nz ",
    "größer 😀",
    "[/INST]",
]
_TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}


def tokenizer_of(template: str):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ADDED})
    tokenizer.chat_template = template
    return tokenizer


def conversation(rng: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Turns and tools: repeated contents, thoughts in contents or beside them, calls, system turns, the assistant first."""
    with_tools = rng.random() < 0.3
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(["Be brief.", "yes"])})
    if rng.random() < 0.2:
        messages.append({"role": "assistant", "content": rng.choice(["Welcome.", "yes"])})
    pool = rng.sample(_POOL, 3)
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": rng.choice(pool)})
        if with_tools and rng.random() < 0.5:
            for _ in range(rng.randint(1, 2)):
                call = {
                    "type": "function",
                    "function": {"name": "add", "arguments": {"a": rng.choice([1, "yes", "é\n"])}},
                }
                messages.append({"role": "assistant", "content": rng.choice(["", "so", None]), "tool_calls": [call]})
                messages.append({"role": "tool", "content": rng.choice(["1", "yes"])})
        said, thought = rng.choice(pool), rng.choice(["parity", "yes"])
        match rng.randint(0, 5):
            case 0:
                messages.append({"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{said}"})
            case 1:
                messages.append({"role": "assistant", "content": said, "reasoning_content": thought})
            case _:
                messages.append({"role": "assistant", "content": said})
        if rng.random() < 0.1:
            messages.append({"role": "assistant", "content": rng.choice(pool)})
    if rng.random() < 0.2:
        messages.append({"role": "user", "content": rng.choice(pool)})
    return messages, [_TOOL] if with_tools else None
