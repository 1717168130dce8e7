"""Start runs as real processes, cheaply: a fork server imports torch and transformers once, each run is a fork of it.

A run can be killed, stopped and waited for like one that torchrun started; rank and world size come by the same
environment variables.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tritune.launch import processes
from tritune.launch.processes import Job, preload

preload(on_cpu=True)

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
from tritune.trainer.data.examples import Columns, Examples  # noqa: E402
from tritune.trainer.run.interrupted import SIGNALS  # noqa: E402
from tritune.trainer.run.pulse import proc_stat  # noqa: E402


class Rows:
    """Rows of a test, as ids with a mask of the tokens that are trained."""

    def __init__(self) -> None:
        self.columns, self.most = Columns(), -1

    def add(self, ids: Sequence[int], mask: Sequence[bool], place: str, label: int = -1, num_bytes: int = 0) -> None:
        edges = np.flatnonzero(np.diff(np.concatenate([[False, False], np.asarray(mask, bool)[1:], [False]]))).tolist()
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        self.most = max(self.most, label)
        self.columns.add(ids, spans, place, label=str(label) if label >= 0 else None, num_bytes=num_bytes)

    def freeze(self) -> Examples:
        return Examples([pa.Table.from_batches([self.columns.batch()])], [str(i) for i in range(self.most + 1)])


def mask_of(examples: Examples, row: int) -> list[bool]:
    """Which tokens of a row are trained."""
    mask = np.zeros(int(examples.lengths[row]), bool)
    mask[examples.trained(row)] = True
    return mask.tolist()


def start(overrides: list[str], logs: Path, world_size: int = 1, env: dict[str, str] | None = None) -> Job:
    """Start `python -m tritune.trainer OVERRIDES` on `world_size` processes; their output goes to files in `logs`."""
    return start_many([overrides], logs, world_size, env)


def start_many(cells: list[list[str]], logs: Path, world_size: int = 1, env: dict[str, str] | None = None) -> Job:
    """Start processes once and train each of `cells` in them, one after the other; the first that fails ends them."""
    return processes.start(cells, logs, world_size, env)


def run(overrides: list[str], logs: Path, world_size: int = 1, timeout: float = 240.0) -> Job:
    """Start a run, wait for it, and require that every rank ended with 0."""
    return run_many([overrides], logs, world_size, timeout)


def run_many(cells: list[list[str]], logs: Path, world_size: int = 1, timeout: float = 240.0) -> Job:
    """`run` for several, in the same processes."""
    job = start_many(cells, logs, world_size)
    codes = job.wait(timeout)
    assert codes == [0] * world_size, f"exit {codes}\n{job.output()}"
    return job


@contextmanager
def keeping_signals() -> Iterator[None]:
    """Around a run in this process, which catches signals: afterwards they are caught as before."""
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def rows(directory: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The rows of a log; a line still being written is left out."""
    path = directory / name
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def write_prompts(path: Path, count: int, seed: int) -> None:
    """Prompts and responses of very different lengths: masks are ragged."""
    rng = random.Random(seed)
    words = "the cat sat on a red mat while two dogs ran far away over green hills".split()  # noqa: SIM905
    with path.open("w") as file:
        for i in range(count):
            prompt = f"{i}: " + " ".join(rng.choices(words, k=rng.randint(1, 9)))
            response = " ".join(rng.choices(words, k=rng.randint(1, 12)))
            file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")


def save_small_llama(where: Path, positions: int) -> Path:
    """A tied two-layer Llama with random weights, far from zero, saved with the byte tokenizer; returns `where`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from tritune.trainer.model.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    settings = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": positions,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1,
                "tie_word_embeddings": True}  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


def save_small_vlm(where: Path, family: str = "gemma3", **text: object) -> Path:
    """A model that sees images, its vision tower deeper than its two-layer decoder, saved with the byte tokenizer.

    Args:
        family: gemma3, or another whose vision tower is CLIP's and whose decoder is a Llama's.
        text: changes to the decoder's settings.
    """
    import torch
    from transformers import AutoConfig
    from tritune.trainer.model.load import auto_class
    from tritune.trainer.model.tokenizer import byte_tokenizer

    tokenizer, gemma = byte_tokenizer(), family == "gemma3"
    vision = {"model_type": "siglip_vision_model" if gemma else "clip_vision_model", "hidden_size": 16, "image_size": 16,
              "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}  # fmt: skip
    decoder = {"model_type": "gemma3_text" if gemma else "llama", "vocab_size": len(tokenizer), "hidden_size": 32,
               "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
               "head_dim": 8, "max_position_embeddings": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
               "initializer_range": 0.1, **text}  # fmt: skip
    seen = {"mm_tokens_per_image": 4} if gemma else {}
    config = AutoConfig.for_model(family, vision_config=vision, text_config=decoder, image_token_index=3, **seen)
    torch.manual_seed(1)
    model = auto_class(config, classifier=False).from_config(config)
    for parameter in model.parameters():  # what starts at zero would stay so under any decay
        parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    (where / "preprocessor_config.json").write_text('{"size": 16}')
    return where


def children() -> set[int]:
    """Processes that this one started, also those that nobody has waited for."""
    numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return {n for n in numbers if (stat := proc_stat(n)) and int(stat[1]) == os.getpid()}


def wait_for_step(job: Job, directory: Path, step: int, timeout: float = 120.0) -> None:
    """Return as soon as the run has logged `step`, or has ended."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        logged = rows(directory)
        if (logged and logged[-1]["step"] >= step) or not job.alive():
            return
        time.sleep(0.002)
    raise TimeoutError(f"step {step} was not reached in {timeout} s:\n{job.output()}")
