"""What is said of rows that are left out holds no secret, whole or cut: in errors, in the cache and in the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tritune.trainer.config import Config
from tritune.trainer.config.choices import BadRows, Unsupervised
from tritune.trainer.data.splits import read_splits
from tritune.trainer.data.tables import REJECTS
from tritune.trainer.errors import InputError
from tritune.trainer.model.tokenizer import byte_tokenizer

TOKEN, PASSWORD = "hf_AbC123dEf456GhI789jKl012MnO345pQr6", "pa\"ss'wo\\rd-é-1x9"
ROWS = [
    {"prompt": [TOKEN, PASSWORD, TOKEN], "response": "a"},
    {"prompt": ["x" * 30, TOKEN], "response": "b"},  # a cut at 60 characters falls into it
    {"prompt": ["x" * 50, PASSWORD], "response": "c"},
    {"prompt": {"password": "hunter2hunter2"}, "response": "d"},
]
MESSAGES = [{"messages": [{"role": "nobody", "content": "x" * pad + TOKEN + PASSWORD}]} for pad in (0, 10, 30, 45)]


def settings(folder: Path, rows: list[dict], **data) -> Config:
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
    good = good if "messages" in rows[0] else {"prompt": "q", "response": "r"}
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [good, *rows]) + f"no JSON {TOKEN}\n")
    made = Config()
    made.cache.dir = str(folder / "cache")
    made.data.train = str(folder / "rows.jsonl")
    for name, value in {"unsupervised": Unsupervised.drop, **data}.items():
        setattr(made.data, name, value)
    return made


def held(text: str) -> list[str]:
    """Pieces of the secrets of eight characters that stand in the text."""
    secrets = (TOKEN, PASSWORD, json.dumps(PASSWORD)[1:-1], "hunter2hunter2")
    return [s[i : i + 8] for s in secrets for i in range(len(s) - 7) if s[i : i + 8] in text]


@pytest.mark.parametrize("rows", [ROWS, MESSAGES], ids=["text", "messages"])
def test_no_secret_is_in_the_rejects_of_the_cache(tmp_path, monkeypatch, rows):
    monkeypatch.setenv("MY_PASSWORD", PASSWORD)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    read_splits(settings(tmp_path, rows, bad_rows=BadRows.skip), byte_tokenizer(), None)
    (file,) = (tmp_path / "cache").rglob(REJECTS)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len([json.loads(line) for line in lines]) == 5
    assert held(file.read_text(encoding="utf-8")) == []
    assert "***" in lines[0]


@pytest.mark.parametrize("row", [*ROWS, *MESSAGES], ids=range(8))
def test_no_piece_of_a_secret_is_in_an_error(tmp_path, monkeypatch, row):
    from tritune.trainer.shown import shown

    monkeypatch.setenv("MY_PASSWORD", PASSWORD)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(InputError) as found:
        read_splits(settings(tmp_path, [row]), byte_tokenizer(), None)
    assert held(shown(str(found.value))) == []
