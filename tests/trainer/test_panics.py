"""A library in Rust that panics raises no `Exception`: it is a fault of what was read all the same, and no rank waits for it."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tritune.trainer.errors import EXIT_INPUT, InputError, of_panic
from tritune.trainer.parallel.distributed import World
from tritune.trainer.verbs import exit_status


def panic() -> None:
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("a!")}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    backend.encode("a" * 40 + "!")


def test_a_verb_says_it_and_ends_with_2(capsys):
    assert exit_status(panic) == EXIT_INPUT
    said = capsys.readouterr().err
    assert "tritune: model.tokenizer: a library panicked on what it read (PanicException: Onig" in said
    assert "Traceback" not in said


def test_ranks_fail_together():
    world = World(0, 1, torch.device("cpu"), 1)
    with pytest.raises(InputError, match="a library panicked"), world.raise_on_all("reading"):
        panic()
    with pytest.raises(KeyboardInterrupt), world.raise_on_all("reading"):
        raise KeyboardInterrupt


def test_what_is_no_panic_stays_what_it_is():
    with pytest.raises(SystemExit):
        of_panic(SystemExit(3))
