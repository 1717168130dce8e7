"""What a model reads before it answers: the same tokens that stood before the answers it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase
from tritune.trainer.config import GenerateConfig, ObjectiveConfig
from tritune.trainer.config.axes import Learns
from tritune.trainer.config.choices import SpecialTokens, TextUnit
from tritune.trainer.config.data import DataConfig
from tritune.trainer.config.registry import reading_text
from tritune.trainer.data.columns import columns_of, how_to_map
from tritune.trainer.data.control import ControlTokens
from tritune.trainer.data.forms import asked, conversation, merged, tools_of
from tritune.trainer.data.label_prompt import is_secret, label_prompt, label_template
from tritune.trainer.data.records import Row, read_all
from tritune.trainer.data.spans import ChatTemplate
from tritune.trainer.data.templates import render
from tritune.trainer.errors import InputError, some_names
from tritune.trainer.model.tokenizer import adds_bos

# How prompt and response are rendered where a tokenizer has no chat template (`encode.Conversations`), as a template: an
# export carries it, so that other tools render prompts as training did.
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- message['content'] + eos_token -}}"
    "{%- else -%}{{- BOS + message['content'] + '\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
)


ASKED = "the prompt"

T = TypeVar("T")


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """`PLAIN_TEMPLATE` for this tokenizer, which may or may not begin a text with BOS."""
    return PLAIN_TEMPLATE.replace("BOS", "bos_token" if adds_bos(tokenizer) else "''")


def name_rendering(tokenizer: PreTrainedTokenizerBase, objective: ObjectiveConfig, read_back: bool = False) -> bool:
    """Give a tokenizer the chat template by which the model was trained, where it has another or none: of prompts and
    responses, or of a text and its label. Return whether it renders the tokens of training.

    Args:
        read_back: as of `label_prompt.is_secret`, whose prompts are not written into a template.
    """
    exact = True
    if objective.learns is Learns.answers and not tokenizer.chat_template:
        tokenizer.chat_template = plain_template(tokenizer)
    elif objective.label_prompt is not None and not is_secret(objective.label_prompt, read_back):
        tokenizer.chat_template, exact = label_template(tokenizer, objective)
    return exact


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], place: str, tools: list[Any] | None = None,
    keep: bool = False,
) -> list[int]:  # fmt: skip
    """Token ids of a conversation up to where the assistant begins to speak.

    Args:
        keep: take control tokens in its texts for what they are (`data.special_tokens`).

    Raises:
        InputError: the template fails on it.
    """
    control = _control(tokenizer, tokenizer.chat_template, len(tokenizer), keep)
    hidden = not keep and bool(control.found_in_turns(messages, tools))
    if hidden:
        messages, tools = control.mask(messages, place), control.mask(tools, place)
    text = render(tokenizer, messages, place, add_generation_prompt=True, tools=tools)
    return next(control.encode([text], [hidden], [place], specials=False))[0]


@lru_cache(maxsize=4)
def _control(tokenizer: PreTrainedTokenizerBase, template: str | None, size: int, keep: bool) -> ControlTokens:
    """Made once: its twin of a tokenizer of 150,000 tokens takes a second. `size` and `template` may change."""
    return ControlTokens(tokenizer, ChatTemplate(tokenizer).frame if template else (), keep)


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer: the fields of its row, its token ids, and where it stands; or why it cannot be asked."""

    fields: dict[str, Any]
    ids: list[int]
    place: str
    fault: InputError | None = None


def read_prompts(
    given: Sequence[str], generate: GenerateConfig, data: DataConfig, objective: ObjectiveConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Prompt]:  # fmt: skip
    """Prompts of the command line, then those of `generate.file`, rendered as the model was trained to read them.

    A row of a file has `messages` (an answer at their end is left out), `prompt` (and `input`) or `text`; one that has none of
    these, or that the template fails on, has a `fault`.

    Raises:
        InputError: the file does not open.
    """
    keep = data.special_tokens is SpecialTokens.keep
    read = read_asked(
        given, generate.file, data, lambda row, its: _prompt(row, its, generate, objective, tokenizer, keep)
    )
    return [Prompt(row.fields, [], row.place, p) if isinstance(p, InputError) else p for row, p in read]


def read_asked(
    given: Sequence[str], file: str | None, data: DataConfig, made: Callable[[Row, DataConfig], T]
) -> Iterator[tuple[Row, T | InputError]]:
    """Rows of the command line, then those of `generate.file`, each with what `made` makes of it or with its fault.

    Args:
        data: how the file's rows are read.

    Raises:
        InputError: the file does not open.
    """
    rows: list[tuple[Row | InputError, DataConfig]] = [
        (Row({"prompt": text}, f"--prompt {i}"), DataConfig()) for i, text in enumerate(given, 1)
    ]
    if file is not None:
        rows += [(row, data) for row in read_all(file, "generate.file", TextUnit.line)]
    for row, its in rows:
        if isinstance(row, InputError):
            yield Row({}, row.value), row
            continue
        try:
            one: T | InputError = made(row, its)
        except InputError as fault:
            one = fault
        yield row, one


def _prompt(
    row: Row, data: DataConfig, generate: GenerateConfig, objective: ObjectiveConfig, tokenizer: PreTrainedTokenizerBase,
    keep: bool,
) -> Prompt:  # fmt: skip
    columns = columns_of(row.fields.keys(), data)
    chat = bool(tokenizer.chat_template) and generate.template and objective.learns is Learns.answers
    if "messages" in columns:
        turns = conversation(row, columns, data)
        _require_template(tokenizer, row)
        if turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if not turns:
            raise InputError(row.place, "nothing stands before the answer", "Write what is to be answered")
    else:
        said = asked(row, _text_columns(row, columns, objective), data)
        if isinstance(said, str) and not chat:
            return Prompt(row.fields, text_ids(tokenizer, said, objective, keep), row.place)
        if not isinstance(said, str):
            _require_template(tokenizer, row)
        turns = [{"role": "user", "content": said}] if isinstance(said, str) else said
    if generate.system is not None:
        turns = [{"role": "system", "content": generate.system}, *turns]
    turns = merged(turns, data)
    tools = tools_of(row, columns["tools"]) if "tools" in columns else None
    return Prompt(row.fields, chat_ids(tokenizer, turns, row.place, tools, keep), row.place)


def _text_columns(row: Row, columns: dict[str, str], objective: ObjectiveConfig) -> dict[str, str]:
    """The columns of a row that is no conversation: its prompt with what belongs to it, or its text."""
    if "text" in columns and ("prompt" not in columns or objective.learns is not Learns.answers):
        return {"prompt": columns["text"]}
    if "prompt" not in columns:
        rule = f"it has {some_names(row.fields)}, and a prompt is a text in messages, prompt or text"
        raise InputError(row.place, rule, how_to_map(["prompt"], row.fields, columns, "data.columns"))
    return columns


def _require_template(tokenizer: PreTrainedTokenizerBase, row: Row) -> None:
    if not tokenizer.chat_template:
        rule = "it is a conversation and there is no chat template"
        raise InputError(row.place, rule, "Give model.chat_template=<file>")


def text_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, objective: ObjectiveConfig | None = None, keep: bool = False
) -> list[int]:
    """Token ids of a text to go on from; for classification by token, of the question whose answer is the label."""
    control = _control(tokenizer, None, len(tokenizer), keep)
    hidden = not keep and bool(control.found(text))
    text = control.mask(text, ASKED) if hidden else text
    prompt = label_prompt(tokenizer, objective or reading_text())
    ids = next(control.encode([prompt.around(text)], [hidden], [ASKED], specials=prompt.specials))[0]
    if objective is not None and objective.label_prompt is not None:
        return prompt.begin + ids
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids  # some end every text
