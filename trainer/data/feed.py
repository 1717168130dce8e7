"""The loader of a run: over rows that are all known, or over a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from transformers import PreTrainedTokenizerBase
from tritune.trainer.config import Config, ObjectiveConfig
from tritune.trainer.config.choices import Packing
from tritune.trainer.config.data import DataConfig, training_sources
from tritune.trainer.config.registry import code_of
from tritune.trainer.data.cache import key_of
from tritune.trainer.data.files import source_files
from tritune.trainer.data.loader import Dealer, Loader, TrainLoader
from tritune.trainer.data.opening import open_regular
from tritune.trainer.data.order import Order, draws_of, softened
from tritune.trainer.data.records import hub_version
from tritune.trainer.data.splits import DECIDES, Splits, encoder_of, source_of, tokenizer_key
from tritune.trainer.data.stream import Stream
from tritune.trainer.data.stream_loader import StreamLoader
from tritune.trainer.run.state import TrainState

HEAD_BYTES = 1 << 20  # of each file of a stream, for its digest


def make_loader(
    config: Config,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
    state: TrainState,
    dealer: Dealer,
    say: Callable[[str], None],
) -> Loader:
    """The loader of the training rows.

    Raises:
        InputError: the first rows of a stream cannot be trained on.
    """
    data, train = config.data, config.train
    if data.streaming:
        assert train.max_steps is not None, "config.check() requires it"
        stream, digest = open_stream(data, config.objective, config.seed, tokenizer, stops)
        return StreamLoader(stream, state, dealer, train.max_steps, digest, say)
    examples = splits.examples["train"]
    draws = None
    if data.sources:
        counts = (np.bincount(examples.sources, minlength=len(data.sources)) // examples.unit).tolist()
        draws = draws_of(counts, list(data.sources.values()), data.temperature)
    capacity = data.max_length * examples.unit if data.packing is Packing.best_fit else None
    order = Order(examples, config.seed, draws, capacity, data.pack_window)
    return TrainLoader(order, state, dealer, train.epochs, train.max_steps)


def open_stream(
    data: DataConfig, objective: ObjectiveConfig, seed: int, tokenizer: PreTrainedTokenizerBase, stops: list[int]
) -> tuple[Stream, str]:
    """The stream of the training rows, and a hash of what decides its tokens but for the content of the files."""
    encoder, _ = encoder_of(data, objective, tokenizer, stops)
    named = training_sources(data)
    sources = [source_of(path, key, data, objective, encoder) for path, key in named.values()]
    for source in sources:
        source.settle()
    weights = softened([s.weight or 1.0 for s in data.sources.values()] or [1.0], data.temperature)
    files = [_versions(path, key) for path, key in named.values()]
    mapped = [s.data.columns for s in sources]
    decides = {name: str(getattr(data, name)) for name in DECIDES}
    digest = key_of([files, tokenizer_key(tokenizer), mapped, decides, *code_of(objective)])
    shares = (weights / weights.sum()).tolist()
    return Stream(sources, shares, data.labels, seed, data.pack_window), digest


def _versions(path: str, key: str) -> list[list[str | int]]:
    """What tells one content of a source from another without reading it all: the hub's version, or sizes and beginnings."""
    if path.startswith("hf://"):
        return [[path, hub_version(path)]]
    found: list[list[str | int]] = []
    for file in source_files(path, key):
        with open_regular(file) as opened:  # whatever it is called: data that moved is the same data
            found.append([file.stat().st_size, hashlib.sha256(opened.read(HEAD_BYTES)).hexdigest()])
    return found
