"""The tokenizer's Rust half on texts of rows: what fails in it is said of the row."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase
from tritune.trainer.errors import InputError, is_panic, reason


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer's Rust half, neither cutting nor padding."""
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.no_truncation()
    backend.no_padding()
    return backend


def encode_batch(backend: Tokenizer, texts: Sequence[str], places: Sequence[str], specials: bool) -> list[Encoding]:
    """Encode texts, each of the row at its place, with or without the special tokens that the tokenizer itself adds.

    Raises:
        InputError: the tokenizer fails on a text: a pattern of it that goes back without an end, an unknown word.
    """
    try:
        return backend.encode_batch(list(texts), add_special_tokens=specials)
    except BaseException as error:
        _require_tokenizers(error)
        for text, place in zip(texts, places, strict=True):
            _encode_one(backend, text, place, specials)
        raise


def _encode_one(backend: Tokenizer, text: str, place: str, specials: bool) -> None:
    try:
        backend.encode(text, add_special_tokens=specials)
    except BaseException as error:  # noqa: BLE001  looked at by the next line
        _require_tokenizers(error)
        rule = f"the tokenizer fails on this row ({reason(error)})"
        raise InputError(place, rule, "Remove the row, or give another model.tokenizer") from None


def _require_tokenizers(error: BaseException) -> None:
    """Raise what is no fault of the tokenizer's again."""
    if isinstance(error, MemoryError) or not (isinstance(error, Exception) or is_panic(error)):
        raise error
