"""Load the tokenizer and settle what it leaves open: the padding token, the stop tokens, the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from tritune.trainer.config import ModelConfig
from tritune.trainer.errors import InputError, reason
from tritune.trainer.model.chat_templates import CHATML, plain_template
from tritune.trainer.model.folder import require_sound
from tritune.trainer.model.hub import ask_hub_or_cache
from tritune.trainer.model.tokenizer_limits import require_bounded


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `model.tokenizer`, else of `model.path`, with added tokens and the chosen chat template.

    Raises:
        InputError: it does not load, has no fast implementation, or the template file is missing.
    """
    source = config.tokenizer or config.path
    assert source is not None, "config.check() requires one of the two"
    key = "model.tokenizer" if config.tokenizer else "model.path"
    if source == "bytes":
        tokenizer: PreTrainedTokenizerBase = byte_tokenizer()
    else:
        require_sound(source, f"{key}={source}")
        ask_hub_or_cache(source)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=config.revision if source == config.path else None, trust_remote_code=False
            )
        except Exception as error:  # noqa: BLE001  whatever a broken file makes the libraries raise
            remedy = "Give a folder with tokenizer.json, or a hub id that this machine can reach"
            raise InputError(f"{key}={source}", f"no tokenizer loads from it ({reason(error)})", remedy) from None
    if not tokenizer.is_fast:
        raise InputError(f"model.tokenizer={source}", "it has no fast form, whose offsets the masks need", "Convert it")
    if source != "bytes":
        require_bounded(tokenizer, f"{key}={source}")
    set_template(tokenizer, config)
    if isinstance(tokenizer.chat_template, dict):
        if "default" not in tokenizer.chat_template:
            rule = f"the tokenizer has several templates ({', '.join(tokenizer.chat_template)}) and none named default"
            raise InputError("model.chat_template=None", rule, "Give model.chat_template=<file>")
        tokenizer.chat_template = tokenizer.chat_template["default"]
    if config.add_tokens:
        # Not normalised: some normalisers put a space before, and the token would not be found within a word.
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in config.add_tokens])
    tokenizer.padding_side = "right"
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte and five special ones: reads any text, needs no file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a plain text with its BOS token."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model_stops: int | Sequence[int] | None = None) -> list[int]:
    """Every id that ends an answer: the model's (`generation_config.eos_token_id`), the tokenizer's, ChatML's turn end."""
    single = model_stops is None or isinstance(model_stops, int)
    stops: set[int | None] = {model_stops} if single else set(model_stops)  # type: ignore[arg-type]
    stops.add(tokenizer.eos_token_id)
    if tokenizer.chat_template and "<|im_end|>" in tokenizer.chat_template:
        stops.add(tokenizer.get_vocab().get("<|im_end|>"))
    return sorted(i for i in stops if i is not None)


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, wanted: str | None, stops: list[int]) -> str:
    """Set a padding token that is no stop token and cannot stand in a text, where there is one; return what was chosen.

    Our own masks go by length and never by id, so no choice can hide a real stop token from training. What the choice
    protects is whoever loads the export with tools that mask by id (and Hugging Face's sequence classifiers, which
    pool the last token that is not padding).
    """
    vocab = tokenizer.get_vocab()
    if wanted is not None:
        if wanted not in vocab:
            raise InputError(f"model.pad_token={wanted}", "the tokenizer has no such token", "Choose one that it has")
        if vocab[wanted] in stops:
            raise InputError(f"model.pad_token={wanted}", "it is a stop token", "Choose one that ends no answer")
        tokenizer.pad_token = wanted
        return wanted
    named = sorted(t for t in tokenizer.all_special_tokens if "pad" in t.lower())
    candidates = [tokenizer.pad_token, *named, tokenizer.bos_token, tokenizer.unk_token, tokenizer.eos_token]
    if tokenizer.pad_token == tokenizer.unk_token:
        candidates = candidates[1:]  # unknown words do stand in texts
    usable = [t for t in candidates if t is not None and vocab[t] not in stops] or [tokenizer.eos_token]
    if usable[0] is None:
        raise InputError("model.pad_token=None", "the tokenizer has no special token to pad with", "Name a token")
    tokenizer.pad_token = usable[0]
    return usable[0]


def set_template(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Give the tokenizer the template of `model.chat_template`: a built-in one by name, or a Jinja file.

    Raises:
        InputError: there is no such file, or it is not UTF-8.
    """
    if config.chat_template is None:
        return
    if config.chat_template == "chatml":
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        tokenizer.chat_template = CHATML
        return
    if config.chat_template == "plain":
        tokenizer.chat_template = plain_template(adds_bos(tokenizer))
        return
    path = Path(config.chat_template)
    if not path.is_file():
        raise InputError(
            f"model.chat_template={path}", "the file does not exist", "Give a Jinja file, or plain or chatml"
        )
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"model.chat_template={path}", "the file is not UTF-8", "Convert it") from None
