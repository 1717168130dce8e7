"""What the tokenizer has no token for: counted by split in every objective, and no byte that is spelled."""

from __future__ import annotations

import json

import pytest
from options import learning
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from tritune.trainer.audit.cheap import cheap_findings
from tritune.trainer.audit.findings import Severity
from tritune.trainer.config import Config
from tritune.trainer.config.data import Check, DataConfig
from tritune.trainer.data.encode import Conversations, Documents
from tritune.trainer.data.kinds import Record
from tritune.trainer.data.splits import read_splits
from tritune.trainer.model.tokenizer import byte_tokenizer

LETTERS = "abcdefghij \n"


def letters() -> PreTrainedTokenizerFast:
    """A token a letter, and `<unk>` for all others."""
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<unk>", "<eos>", *LETTERS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


def found(tmp_path, objective, rows, tokenizer, **settings):
    path, config = tmp_path / f"{objective}.jsonl", Config()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.train, config.cache.dir, config.cache.num_procs = str(path), str(tmp_path / "cache"), 1
    config.objective = learning(objective)
    config.data.max_length = 8192
    for key, value in settings.items():
        setattr(config.data, key, value)
    splits = read_splits(config, tokenizer, None)
    findings = cheap_findings(config.data, config.objective, splits, tokenizer)
    return {f.details["kind"]: f for f in findings if f.name is Check.unspelt}


@pytest.mark.parametrize("objective", ["sft", "classify", "pretrain"])
def test_the_share_and_the_characters_in_every_objective(tmp_path, objective):
    spiked = "abc{}{"
    rows = {
        "sft": [{"prompt": "abc", "response": spiked}, {"prompt": "a{", "response": "abc"}],
        "classify": [{"text": spiked, "label": "x"}, {"text": "abc{", "label": "y"}],
        "pretrain": [{"text": spiked}, {"text": "abc{"}],
    }[objective]
    seen = found(tmp_path, objective, rows, letters())
    assert seen["unknown"].details["characters"] == {"{": 3, "}": 1}
    assert seen["unknown"].severity is Severity.warning
    assert seen["unknown"].count == 2
    assert set(seen) == {"unknown"} | ({"unknown_answers"} if objective == "sft" else set())
    if objective == "sft":
        assert seen["unknown_answers"].details["characters"] == {"{": 2, "}": 1}
        assert seen["unknown_answers"].details["share"] == 3 / 11, "of two answers and their ends"
        assert "cannot learn" in seen["unknown_answers"].text


def test_a_thousandth_is_a_note_and_more_a_warning(tmp_path):
    for count, severity in ((3000, Severity.note), (500, Severity.warning)):
        rows = [{"text": "a" * count + "{", "label": "x"}, {"text": "b", "label": "y"}]
        assert found(tmp_path / str(count), "classify", rows, letters())["unknown"].severity is severity


@pytest.fixture(autouse=True)
def _folders(tmp_path):
    for name in ("3000", "500"):
        (tmp_path / name).mkdir()


def test_bytes_are_counted_apart_and_line_ends_are_none(tmp_path, shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "phi-3-mini")
    rows = [{"prompt": "one\ntwo\tthree", "response": "plain\n\nlines"}, {"prompt": "Say it.", "response": "𓀀 and {"}]
    seen = found(tmp_path, "sft", rows, tokenizer)
    assert set(seen) == {"by_bytes"}
    assert seen["by_bytes"].details["characters"] == {"𓀀": 4}
    assert seen["by_bytes"].places[0].endswith(":2")
    assert not found(tmp_path, "sft", rows, byte_tokenizer()), "which has a token for every byte"


def test_bits_per_byte_do_not_count_what_is_not_spelled():
    text = "abc{}d é"
    out = Documents(letters(), separate=False)([Record("here", text=text)])
    [row] = out.columns.batch().to_pylist()
    assert row["num_bytes"] == len("bcd "), "the first is not predicted"
    assert out.token_bytes[0].tolist() == [1, 1, 1, 0, 0, 1, 1, 0]


def test_a_turn_end_that_is_called_the_unknown_token_is_none():
    """GPT-2 has one token for the end of a text, its beginning and the unknown."""
    tokenizer = byte_tokenizer()
    tokenizer.unk_token = "<eos>"
    tokenizer.chat_template = None
    out = Conversations(tokenizer, DataConfig(), [])([Record("here", prompt="a", response="b")])
    assert not out.remarks
