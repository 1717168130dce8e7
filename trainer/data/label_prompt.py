"""The prompt of classification by token: what stands around a row's text, for training, for `generate`, and as a chat template.

Text and prompt are tokenized as one, as whoever serves the model will do with a string: `.` and a line end are one token to some.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from tritune.trainer.config import ObjectiveConfig
from tritune.trainer.data.rendering import ONE_TEXT
from tritune.trainer.model.tokenizer import adds_bos
from tritune.trainer.redact import MARK, redact

TEXT = "{text}"  # the place of the row's text in `objective.prompt`
_PROBES = ("red box 1.", " blank before", "two\nlines and a blank ", "Naïve 漢字 🙂?")
_TEMPLATE = (
    "{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}"
    f"{{{{- raise_exception('{ONE_TEXT}.') -}}}}"
    "{%- endif -%}"
    "{{- BEGIN + GAP + HEAD + messages[0]['content'] + TAIL -}}"
)
# A blank that some tokenizers put before a text at its start, if it has none, and not after BOS.
_GAPS = ("''", "' '", "('' if messages[0]['content'][:1] == ' ' else ' ')")


@dataclass(frozen=True)
class LabelPrompt:
    """What stands around a text.

    Attributes:
        head, tail: before and after it; both empty for a classifier by a head.
        begin: ids before all of it: BOS, where the tokenizer begins a text with it and a tail follows.
        specials: whether the tokenizer adds its own special tokens. What follows the text must follow its words, not an
            end-of-text token that some tokenizers put there.
    """

    head: str
    tail: str
    begin: list[int]
    specials: bool

    def around(self, text: str) -> str:
        return self.head + text + self.tail


def label_prompt(tokenizer: PreTrainedTokenizerBase, objective: ObjectiveConfig) -> LabelPrompt:
    """The prompt of `objective`; nothing around the text where it has none."""
    prompt = TEXT if objective.label_prompt is None else objective.label_prompt
    head, _, tail = prompt.partition(TEXT)
    begin = [tokenizer.bos_token_id] if tail and adds_bos(tokenizer) else []
    return LabelPrompt(head, tail, begin, specials=not tail)


def is_secret(prompt: str, read_back: bool) -> bool:
    """Whether the prompt holds what must not be written down, or may have lost it.

    Args:
        read_back: it comes from a run's `config.yaml`, where `***` may stand for a secret. Given by the user, it is only that.
    """
    return redact(prompt) != prompt or (read_back and MARK in prompt)


def label_template(tokenizer: PreTrainedTokenizerBase, objective: ObjectiveConfig) -> tuple[str, bool]:
    """Return a chat template that renders one user's turn into the prompt, and whether its tokens are those of training."""
    prompt = label_prompt(tokenizer, objective)
    before, after = _specials(tokenizer, prompt)
    expected = [
        prompt.begin + tokenizer(prompt.around(text), add_special_tokens=prompt.specials)["input_ids"]
        for text in _PROBES
    ]
    templates = [_filled(gap, BEGIN=before, HEAD=prompt.head, TAIL=prompt.tail + after) for gap in _GAPS]
    for template in templates:
        if [_rendered(tokenizer, template, text) for text in _PROBES] == expected:
            return template, True
    return templates[0], False


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str, text: str) -> list[int]:
    turns = [{"role": "user", "content": text}]
    whole: Any = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    return tokenizer(whole, add_special_tokens=False)["input_ids"]


def _specials(tokenizer: PreTrainedTokenizerBase, prompt: LabelPrompt) -> tuple[str, str]:
    """The special tokens before and after all of it, as text."""
    if not prompt.specials:
        return _spelt(tokenizer, prompt.begin), ""
    bare, whole = (tokenizer("a", add_special_tokens=s)["input_ids"] for s in (False, True))
    first = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    before, after = whole[:first], whole[first + len(bare) :]
    return _spelt(tokenizer, before), _spelt(tokenizer, after)


def _spelt(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def _filled(gap: str, **texts: str) -> str:
    """The template with `gap` and texts; JSON's escapes are Jinja's but beyond the basic plane, where characters are kept."""
    values = {"GAP": gap} | {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()}
    return re.sub("|".join(values), lambda found: values[found[0]], _TEMPLATE)
