"""Models and tokenizers whose vocabulary or depth is that of real ones, and whose other sizes are tiny."""

from __future__ import annotations

from itertools import islice, product
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tritune.trainer.model.chat_templates import CHATML


def save_tokenizer(where: Path, size: int):
    """A byte-level BPE of `size` tokens (every pair of bytes, then triples), saved; returns it."""
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(islice(product(alphabet, alphabet), size - len(special) - len(alphabet)))
    pairs = [left + right for left, right in merges]
    merges += islice(product(pairs, alphabet), size - len(special) - len(alphabet) - len(merges))
    pieces = [*alphabet, *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate([*special, *pieces])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(where)
    return tokenizer


def save_llama(where: Path, vocabulary: int, layers: int, hidden: int = 8, **settings) -> Path:
    """A tied Llama with random weights and a tokenizer of `vocabulary` tokens; returns `where`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = save_tokenizer(where, vocabulary)
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"vocab_size": len(tokenizer), "num_hidden_layers": layers, "max_position_embeddings": 256}
    shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True, **settings}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).save_pretrained(where)
    return where
