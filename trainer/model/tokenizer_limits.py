"""What a tokenizer may ask for, and that it reads a text.

Ids that an embedding can have, a normaliser that does not blow a text up, a template that is text.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase
from tritune.trainer.errors import InputError, is_panic

MOST_IDS = 10_000_000  # the largest published vocabulary has some 260,000
MOST_GROWTH = 1_000  # characters that a normaliser makes of one; published ones make a few


def require_bounded(tokenizer: PreTrainedTokenizerBase, value: str) -> None:
    """Refuse what would take all memory at the first text or with the first embedding.

    Raises:
        InputError: an id, or what the normaliser makes of a character, is beyond these; its template is no text; it fails.
    """
    remedy = "Download it anew from a source that you trust"
    template = tokenizer.chat_template
    named = template if isinstance(template, dict) else {"default": template}
    if not all(text is None or isinstance(text, str) for text in named.values()):
        raise InputError(value, "the chat template of its tokenizer_config.json is no text", remedy)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= MOST_IDS:
        rule = f"its highest id is {highest:,}, and an embedding would need a row for each below it"
        raise InputError(value, rule, remedy)
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is not None and (growth := _growth(json.loads(normalizer.__getstate__()))) > MOST_GROWTH:
        rule = f"its normaliser makes up to {growth:,} characters of one, and at most {MOST_GROWTH:,} are taken"
        raise InputError(value, rule, remedy)
    try:
        tokenizer("Is it 1 or 2?\n")
    except BaseException as error:  # a panic of the library's own language is no Exception
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        rule = f"its tokenizer reads no text ({type(error).__name__}: {error})"
        raise InputError(value, rule, remedy) from None


def _growth(step: dict[str, Any]) -> int:
    """Characters that a normaliser may make of one; decompositions, which are bounded, count as one."""
    if step.get("type") == "Sequence":
        total = 1
        for part in step.get("normalizers", []):
            total *= _growth(part)
        return total
    if step.get("type") == "Replace":
        return max(1, len(str(step.get("content", ""))))
    return 1 + len(str(step.get("prepend", ""))) if step.get("type") == "Prepend" else 1
