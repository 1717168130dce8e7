"""Rows of `predictions.jsonl` that need no model to be looked at."""

from __future__ import annotations

import json

import torch
from harness import Rows
from tritune.trainer.evaluation.predictions import SHOWN, Recorder, described, write_predictions
from tritune.trainer.model.tokenizer import byte_tokenizer
from tritune.trainer.objectives.language_model import LanguageModel


def test_a_book_is_not_written_whole():
    """Of a text without a prompt its beginning, which is said; a short one, and an answer, are whole."""
    tokenizer, rows = byte_tokenizer(), Rows()
    long, short = tokenizer("abcdefgh" * 100)["input_ids"], tokenizer("brief")["input_ids"]
    rows.add(long, [False] + [True] * (len(long) - 1), "a:1")
    rows.add(short, [False] + [True] * (len(short) - 1), "a:2")
    rows.add(long, [False] * 9 + [True] * (len(long) - 9), "a:3")
    recorder = Recorder(LanguageModel())
    for i, tokens in enumerate((len(long) - 1, len(short) - 1, len(long) - 9)):
        recorder.kept[i] = {"nll": torch.tensor(2.0 * tokens), "tokens": torch.tensor(tokens)}
    book, brief, answer = described(recorder, rows.freeze(), [], tokenizer)
    assert book["reference"] == ("abcdefgh" * 100)[:SHOWN]
    assert (book["shown"], book["tokens"], book["loss"]) == (SHOWN, 800, 2.0)
    assert (brief["reference"], "shown" in brief) == ("brief", False)
    assert (answer["reference"], "shown" in answer) == ("abcdefgh" * 99, False)


def test_secrets_of_a_text_are_blotted_out_and_labels_are_not(tmp_path):
    key = "hf_" + "QwErTy123" * 4
    line = {"input": f"my key is {key}", "answer": "reset_password", "probabilities": {"reset_password": 0.75}}
    assert write_predictions(tmp_path / "p.jsonl", iter([line])) == 1
    assert json.loads((tmp_path / "p.jsonl").read_text()) == {**line, "input": "my key is ***"}
