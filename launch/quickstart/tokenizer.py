"""Train a byte-level BPE tokenizer on the demo's own text and save it as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

VOCAB_SIZE = 1536


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Learn merges from `texts` and save; whatever else is read falls back to bytes, so no text is unknown.

    Special tokens and chat template are those of the built-in byte tokenizer.
    """
    from tritune.trainer.model.tokenizer import byte_tokenizer

    plain = byte_tokenizer()
    learned = plain.train_new_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    learned.chat_template = plain.chat_template  # which train_new_from_iterator leaves behind
    learned.save_pretrained(folder)
