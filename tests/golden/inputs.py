"""What the golden runs read: texts, conversations, labelled texts and a small model, all a function of one seed.

Numbers come from NumPy's `RandomState`, whose stream is frozen for good (NEP 19): its uniform numbers and integers are the same
on every machine and in every version. PyTorch's fill kernels differ between instruction sets, so it draws no weight here.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from transformers import LlamaConfig

SEED = 20260
WORDS = "the cat sat on a red mat while two dogs ran far away over green hills and nobody saw them go".split()  # noqa: SIM905
CLASSES = {"x": "stone", "y": "river", "z": "cloud"}  # a label of one byte is a label of one token
HIDDEN, INNER, LAYERS, HEADS, KEY_HEADS, VOCABULARY = 32, 48, 2, 4, 2, 261  # the byte tokenizer's vocabulary


def write_inputs(root: Path) -> int:
    """Write every file below `root`; return a checksum of what was written."""
    random = np.random.RandomState(SEED)
    root.mkdir(parents=True, exist_ok=True)
    for name, count in (("texts", 26), ("texts_test", 5)):
        (root / f"{name}.txt").write_text("\n\n".join(_words(random, 4, 30) for _ in range(count)) + "\n")
    for name, count in (("prompts", 22), ("prompts_test", 6)):
        _write(root / f"{name}.jsonl", [_prompt(random) for _ in range(count)])
    for name, count in (("chats", 17), ("chats_test", 4)):
        _write(root / f"{name}.jsonl", [{"messages": _chat(random)} for _ in range(count)])
    for name, count in (("labels", 29), ("labels_test", 7)):
        _write(root / f"{name}.jsonl", [_labelled(random, i) for i in range(count)])
    checksum = 0
    for path in sorted(root.iterdir()):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return _write_model(root / "model", random, checksum)


def _words(random: np.random.RandomState, least: int, most: int) -> str:
    return " ".join(WORDS[i] for i in random.randint(len(WORDS), size=random.randint(least, most + 1)))


def _prompt(random: np.random.RandomState) -> dict:
    return {"prompt": _words(random, 1, 6), "response": _words(random, 1, 8)}


def _chat(random: np.random.RandomState) -> list[dict]:
    """One or two exchanges."""
    turns = []
    for _ in range(random.randint(1, 3)):
        turns.append({"role": "user", "content": _words(random, 1, 4)})
        turns.append({"role": "assistant", "content": _words(random, 1, 5)})
    return turns


def _labelled(random: np.random.RandomState, number: int) -> dict:
    label = list(CLASSES)[number % len(CLASSES)]
    return {"text": f"{_words(random, 1, 8)} {CLASSES[label]} {_words(random, 1, 3)}", "label": label}


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_model(where: Path, random: np.random.RandomState, checksum: int) -> int:
    """A tied Llama, float32, its weights far from zero: small ones would make all predictions alike."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at, keys = f"model.layers.{layer}", HIDDEN * KEY_HEADS // HEADS
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (keys if n in "kv" else HIDDEN, HIDDEN) for n in "qkvo"}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (INNER, HIDDEN) for n in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (HIDDEN, INNER)}
        shapes |= {f"{at}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,)}
    tensors = {}
    for name, shape in shapes.items():
        middle, bound = (1.0, 0.1) if len(shape) == 1 else (0.0, 0.25)
        tensors[name] = random.uniform(middle - bound, middle + bound, shape).astype(np.float32)
        checksum = zlib.crc32(tensors[name].tobytes(), checksum)
    settings = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=192, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    settings.save_pretrained(where)
    save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    return checksum
