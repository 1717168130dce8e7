"""Which tokens of a rendered text are trained, and whether they are those that the model is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from tritune.trainer.data.control import ControlTokens
from tritune.trainer.data.spans import ASSISTANT, ChatTemplate, Rendered, shared
from tritune.trainer.errors import InputError
from tritune.trainer.shown import bounded


def token_spans(encoding: Encoding, rendered: Rendered) -> list[tuple[int, int]]:
    """Token spans `[start, stop)` to be trained, one for each of `rendered.spans`, empty where it has no token of its own.

    A token is inside when it lies in the span. It may reach past the span's end over white space alone: some tokenizers let a
    turn's end swallow the line end. One that begins before the span is not trained, although transformers' mask has it: it is
    not what the model is asked for after the prompt. Tokens of no width are left out at a span's ends; the few tokenizers that
    make such have none within one.

    Args:
        encoding: of `rendered.text`, without special tokens.
    """
    return [_tokens_in(encoding, rendered.text, start, stop) for start, stop in rendered.spans]


def _tokens_in(encoding: Encoding, text: str, start: int, stop: int) -> tuple[int, int]:
    chars, first, last = encoding.token_to_chars, None, None
    left, right = start, stop - 1
    while left <= right and (first := encoding.char_to_token(left)) is None:  # a character that no token has
        left += 1
    while right >= left and (last := encoding.char_to_token(right)) is None:
        right -= 1
    if first is None or last is None:
        return 0, 0
    while first <= last and (chars(first) or (0, 0))[0] < start:
        first += 1
    # A character can have several tokens, its bytes; what was found is the first of them.
    while last + 1 < len(encoding) and (after := chars(last + 1)) is not None and after[0] < min(stop, after[1]):
        last += 1
    while last >= first and (end := (chars(last) or (0, 0))[1]) > stop and not text[stop:end].isspace():
        last -= 1
    return (first, last + 1) if first <= last else (0, 0)


def verify(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    messages: list[dict],
    place: str,
    tools: list | None = None,
    control: ControlTokens | None = None,
) -> str | None:
    """Re-tokenize a conversation's trained answers; return what is wrong, None when nothing is.

    Wrong is: the tokens before a trained answer are not those that inference feeds (`prompt`), so the model is trained on
    something that it will not meet; or the answer's tokens do not spell its content.

    Args:
        control: hides control tokens in the texts, as when the row is trained.

    Raises:
        InputError: the template fails.
    """
    control = control or ControlTokens(tokenizer, keep=True)
    hidden = not control.keep and bool(control.found_in_turns(messages, tools))
    if hidden:
        messages, tools = control.mask(messages, place), control.mask(tools, place)

    def encode(text: str) -> tuple[list[int], Encoding]:
        return next(control.encode([text], [hidden], [place], specials=False))

    for row in template.rows(messages, place, tools):
        ids, encoding = encode(row.text)
        spans = [span for span in token_spans(encoding, row) if span[0] < span[1]]
        for index in row.turns:
            if messages[index]["role"] != ASSISTANT or (index and messages[index - 1]["role"] == ASSISTANT):
                continue
            try:
                prompt = template.prompt(messages[:index], place, tools)
            except InputError:  # nobody can ask for this turn
                continue
            if index == 0 and not row.text.startswith(prompt):
                continue
            content = None if hidden else messages[index].get("content")
            said = _asked_otherwise(tokenizer, ids, spans, encode(prompt)[0], content)
            if said is not None:
                return f"turn {index}: {said}"
    return None


def _asked_otherwise(
    tokenizer: PreTrainedTokenizerBase,
    trained: list[int],
    spans: list[tuple[int, int]],
    asked: list[int],
    content: object,
) -> str | None:
    same = shared(trained, asked)
    if same < len(asked):
        there, here = (tokenizer.convert_ids_to_tokens(ids[same : same + 3]) for ids in (asked, trained))
        return f"token {same} before the answer is {here} in training and {there} when the model is asked"
    span = next((span for span in spans if span[0] >= same), None)
    if span is None or span[0] > same:
        found = "none is trained" if span is None else f"the first that is trained is token {span[0]}"
        return f"the model is asked for token {same}, and {found}"
    spelt = tokenizer.decode(trained[slice(*span)], clean_up_tokenization_spaces=False)
    if isinstance(content, str) and content.strip() not in spelt:
        return f"its tokens spell {bounded(str(spelt), 80)!r}, and its content is {bounded(content, 80)!r}"
    return None


def double_bos(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Whether a text begins with two BOS tokens: the template wrote one and the tokenizer another."""
    return tokenizer.bos_token_id is not None and list(ids[:2]) == [tokenizer.bos_token_id] * 2
