"""The two chat templates that are built in: `model.chat_template=chatml` and `plain`."""

from __future__ import annotations

# ChatML, with generation marks so that the response mask is exact.
CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}"
    "{%- else -%}{{- message['content'] + '<|im_end|>\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# Headings in words that every tokenizer has: nothing is added to the vocabulary, so that a LoRA of the linear layers alone can
# learn it. A heading ends with its line, where no tokenizer joins it with the answer, and an answer with the base's own end.
PLAIN = """\
{%- for message in messages -%}
{%- set content = message['content'] if message['content'] else '' -%}
{%- if message['role'] == 'assistant' -%}
{{- '### Assistant:\\n' -}}
{%- generation -%}
{%- if message['reasoning_content'] -%}{{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n' -}}{%- endif -%}
{{- content -}}
{%- for call in message['tool_calls'] or [] -%}
{%- set function = call['function'] if 'function' in call else call -%}
{{- ('\\n' if content or not loop.first else '') -}}
{{- 'Call: {"name": ' + function['name'] | tojson + ', "arguments": ' -}}
{{- (function['arguments'] if function['arguments'] is string else function['arguments'] | tojson) + '}' -}}
{%- endfor -%}
{{- eos_token -}}
{%- endgeneration -%}
{{- '\\n\\n' -}}
{%- else -%}
{{- '### ' + message['role'] | capitalize + (' ' + message['name'] if message['name'] else '') + ':\\n' + content + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}
"""
_TOOLS = """\
{%- if tools -%}
{{- '### Tools:\\n' -}}
{%- for tool in tools -%}{{- tool | tojson + '\\n' -}}{%- endfor -%}
{{- '\\n' -}}
{%- endif -%}
"""


def plain_template(begins: bool) -> str:
    """`PLAIN`, with the tools before it and, where texts of this tokenizer begin with its BOS token (`begins`), that first."""
    return ("{{- bos_token -}}\n" if begins else "") + _TOOLS + PLAIN
