"""Seals: whatever bit of an entry flips, no other token is handed out; the run ends, and the next start is right again."""

from __future__ import annotations

import json
import random
from pathlib import Path

import harness
import numpy as np
import pytest
import torch
from saved import flip
from tritune.trainer.config import Config
from tritune.trainer.data.cache import build_once
from tritune.trainer.data.entry import MANIFEST, Entry, read_entry
from tritune.trainer.data.examples import Columns, Examples
from tritune.trainer.data.loader import Dealer, TrainLoader
from tritune.trainer.data.order import Order
from tritune.trainer.data.seal import BLOCK_BYTES, Damaged
from tritune.trainer.data.tables import Divider, TableFiles
from tritune.trainer.errors import EXIT_FAILED, DamagedRows
from tritune.trainer.run.state import TrainState

ROWS, BATCHES = 40, 6


def build(folder: Path, rows: int = ROWS, width: int = 900) -> dict:
    """Several record batches, each with more tokens than a block holds, and rejects."""
    rng = np.random.default_rng(1)
    with TableFiles(folder, ["train", "test"]) as files:
        divider = Divider({"test": 0.1}, Config().data, None, files.write, files.reject)
        for number in range(BATCHES):
            columns = Columns()
            for row in range(rows):
                ids = rng.integers(3, 32_000, int(rng.integers(2, width)))
                columns.add(ids, [(1, len(ids))], f"f:{number * rows + row}", label="ab"[row % 2], digest=rng.bytes(16))
            for name in ("train", "test"):
                files.write(name, divider.sinks[name].take(columns.batch(), []))
        files.reject("f:9", "bad", "it is cut")
        return {"tables": files.finish(divider.sinks)}


@pytest.fixture
def folder(tmp_path) -> Path:
    build_once(tmp_path, "key", build, lambda: None)
    return tmp_path / "key"


def opened(entry: Entry) -> Examples:
    return Examples([entry.table], ["a", "b"], [entry.digest], entry.report, guards=[entry.guard])


def content(folder: Path) -> list:
    """Everything that an entry gives, as it is read in training."""
    said: list = []
    for name, entry in sorted((read_entry(folder, "key") or {}).items()):
        rows = opened(entry)
        said += [name, entry.digest, vars(entry.report), rows.labels.tolist(), rows.num_bytes.tolist()]
        for row in range(len(rows)):
            said += [rows.ids(row).tobytes(), rows.spans(row).tobytes(), rows.place(row)]
        said.append(entry.table["digest"].to_pylist())
    return said


def test_any_flip_is_found_before_a_token_is_read(folder):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng, whole, found = random.Random(seed), content(folder), {Damaged: 0, DamagedRows: 0}
    files = sorted(folder.iterdir())
    assert len(whole) > 2 * ROWS
    for number in range(200):
        path = files[number % len(files)]
        bit, manifest = rng.randrange(8 * path.stat().st_size), (folder / MANIFEST).read_bytes()
        flip(path, bit)
        try:
            assert content(folder) == whole, f"{path.name} bit {bit} changes what is read"
            assert path.name == MANIFEST, f"{path.name} bit {bit} is not found"  # a blank of its JSON
        except (Damaged, DamagedRows) as error:
            found[type(error)] += 1
        if path.name == MANIFEST:
            flip(path, bit)
        else:
            flip(path, bit)
            (folder / MANIFEST).write_bytes(manifest)  # which goes with the first token that changed
    assert content(folder) == whole
    assert min(found.values()) > 20, found


def test_rows_of_whole_blocks_are_read_beside_a_damaged_one(folder):
    """A block is looked at when it is first needed: else a start would read everything."""
    entry = (read_entry(folder, "key") or {})["train"]
    rows, chunk = opened(entry), entry.table["ids"].chunks[3]
    at = (folder / "train.arrow").read_bytes().index(np.asarray(chunk.values).tobytes())
    flip(folder / "train.arrow", 8 * (at + BLOCK_BYTES + 5))
    read = opened((read_entry(folder, "key") or {})["train"])
    assert np.array_equal(read.ids(0), rows.ids(0))
    first, ends = 3 * ROWS, np.cumsum(rows.lengths[3 * ROWS : 4 * ROWS]) * 4
    inside = first + int(np.flatnonzero(ends > BLOCK_BYTES + 5)[0])
    with pytest.raises(DamagedRows, match=r"train\.arrow changed on the disk .* Start again") as caught:
        read.ids(inside)
    assert str(folder) in caught.value.value
    assert not (folder / MANIFEST).exists(), "the next start is to build it"
    with pytest.raises(DamagedRows):
        opened(entry).require_whole()


def test_the_loader_knows_of_the_fault_before_the_window_comes(folder):
    entry = (read_entry(folder, "key") or {})["train"]
    last = np.asarray(entry.table["ids"].chunks[-1].values)
    at = (folder / "train.arrow").read_bytes().index(last.tobytes())
    for start in range(0, last.nbytes, BLOCK_BYTES):  # every row of the last batch
        flip(folder / "train.arrow", 8 * (at + start))
    read, state = opened((read_entry(folder, "key") or {})["train"]), TrainState()
    loader = TrainLoader(Order(read, 0), state, Dealer(1, None, 0, 0, 1, torch.device("cpu")), 1, None)
    fault = loader.fault()
    assert fault is None
    for (batch,) in loader:
        assert batch.sample_ids.max() < (BATCHES - 1) * ROWS, "a row of a damaged block was handed out"
        loader.advance()
        fault = loader.fault()
        if fault is not None:
            break
    assert state.step > 0
    assert isinstance(fault, DamagedRows)
    with pytest.raises(DamagedRows):
        next(iter(loader))


def spoil(cache: Path) -> Path:
    """Flip a bit in the tokens of the only entry's training rows, where no start looks."""
    (table,) = cache.glob("*/train.arrow")
    (entry,) = [e for n, e in (read_entry(table.parent, table.parent.name) or {}).items() if n == "train"]
    values = np.asarray(entry.table["ids"].chunks[-1].values)
    at = table.read_bytes().index(values.tobytes())
    flip(table, 8 * (at + values.nbytes // 2))
    return table.parent


def test_a_run_ends_and_the_next_start_is_the_same_run(tritune, tiny, tmp_path):
    cache, run = tmp_path / "cache", [*tiny, "train.max_steps=3", f"cache.dir={tmp_path / 'cache'}"]
    assert tritune(*run, f"run.dir={tmp_path / 'whole'}").code == 0
    folder = spoil(cache)
    result = tritune(*run, f"run.dir={tmp_path / 'run'}")
    assert result.code == EXIT_FAILED
    assert "Traceback" not in result.err
    assert f"tritune: cache {folder}: train.arrow changed on the disk after it was written" in result.err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    result = tritune(*run, f"run.dir={tmp_path / 'run'}")
    assert result.code == 0, result.err
    assert f"{folder} is damaged and not used: manifest.json: No such file" in result.err
    losses = [[row["loss"] for row in harness.rows(tmp_path / name)] for name in ("whole", "run")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_all_ranks_end_on_what_one_finds(tmp_path):
    """Each rank reads rows of its own, and one alone meets the damage; the other must not wait in a collective."""
    rows = tmp_path / "rows.jsonl"
    harness.write_prompts(rows, 1500, seed=3)
    run = [
        "model=tiny", "model.config.hidden_size=16", "model.config.intermediate_size=16", f"data.train={rows}",
        "data.max_length=160", "train.batch_size=2", "backend.device=cpu", "backend=ddp", "export.enabled=false",
        "report.enabled=false", f"cache.dir={tmp_path / 'cache'}", "checkpoint.every=5", "backend.timeout_seconds=60",
    ]  # fmt: skip
    harness.run([*run, "train.max_steps=1", f"run.dir={tmp_path / 'first'}"], tmp_path, 2)
    spoil(tmp_path / "cache")
    logs = tmp_path / "logs"
    job = harness.start([*run, "train.max_steps=400", f"run.dir={tmp_path / 'run'}"], logs, 2)
    assert job.wait(60.0) == [EXIT_FAILED] * 2, job.output()
    assert "changed on the disk after it was written" in job.output()
    assert "Traceback" not in job.output(), "no rank lost its peer in a collective"
