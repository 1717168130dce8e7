"""A run killed on one backend goes on, on any other and on any number of processes."""

from __future__ import annotations

import json
import shutil

import harness
import pytest
import today
from tritune.launch.verify import verify

STEPS, SAVED = 6, 3
BACKENDS = ["ddp", "fsdp", "hsdp", "zero2", "zero3"]
METHODS = {"full": ["method=full"], "lora": ["method=lora", "method.rank=4", "method.dropout=0.1", "method.bias=all"]}


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    root = tmp_path_factory.mktemp("portable")
    harness.write_prompts(root / "rows.jsonl", 40, seed=5)  # 12 rows a step: the fourth step begins on what is left
    return [
        f"model.path={harness.save_small_llama(root / 'model', 160)}", f"data.train={root / 'rows.jsonl'}",
        "data.max_length=160", "train.batch_size=12", "train.micro_batch_size=2", f"train.max_steps={STEPS}",
        f"checkpoint.every={SAVED}", "backend.device=cpu", "evaluation.base=false", "export.enabled=false",
        "report.enabled=false", "optim.lr=5e-3",
    ]  # fmt: skip


def tensors(directory, step):
    """What a checkpoint holds, whole, by name."""
    from tritune.trainer.verify.compare import saved_tensors

    return {
        n: t for group in saved_tensors(directory / "checkpoints" / f"step-{step:08d}", "") for n, t in group.items()
    }


def go_on(common, source, where, backend, world_size):
    """Copy the run as it stood after its first checkpoint and let another backend end it."""
    shutil.copytree(source, where)
    shutil.rmtree(where / "checkpoints" / f"step-{STEPS:08d}")
    overrides = [*common, f"backend={backend}", "run.resume=require", f"run.dir={where}"]
    harness.run(overrides, where / "logs", world_size)
    return harness.rows(where)


def check(rows, unbroken, exact):
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    assert [r["batch"] for r in rows] == [r["batch"] for r in unbroken]
    for a, b in zip(rows, unbroken, strict=True):
        assert a["loss"] == (b["loss"] if exact else pytest.approx(b["loss"], rel=1e-5)), a["step"]
        assert a["grad_norm"] == (b["grad_norm"] if exact else pytest.approx(b["grad_norm"], rel=1e-4)), a["step"]


def readers_of(writer, method):
    """The writer itself, to the bit, and today's of the fourteen others: three or four of `full`, one of `lora`."""
    others = [(reader, size) for reader in BACKENDS for size in (1, 2, 4) if (reader, size) != (writer, 2)]
    return [(writer, 2), *today.some(others, 4 if method == "full" else 14, f"{writer} {method}")]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("writer", BACKENDS)
def test_every_backend_reads_what_another_wrote(common, tmp_path, writer, method):
    common = [*common, *METHODS[method]]
    source = tmp_path / "unbroken"
    harness.run([*common, f"backend={writer}", f"run.dir={source}"], tmp_path / "logs", 2)
    unbroken, last = harness.rows(source), tensors(source, STEPS)
    for reader, world_size in readers_of(writer, method):
        same = (reader, world_size) == (writer, 2)
        where = tmp_path / f"{reader}-{world_size}"
        check(go_on(common, source, where, reader, world_size), unbroken, same)
        for name, values in tensors(where, STEPS).items():
            if same:
                assert values.equal(last[name]), name
            else:
                assert values.double() == pytest.approx(last[name].double(), abs=1e-5, rel=1e-4), name
        shutil.rmtree(where)


STREAM = ["data.streaming=true", "data.packing=best_fit", "data.pack_window=16", "checkpoint.every=5"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "then"),
    [
        (["backend=zero3"], []),
        (["backend=fsdp", "data.packing=best_fit"], []),
        (["backend=zero2", *STREAM], ["verify.to_backend=fsdp", "verify.to_procs=1"]),
        (["backend=hsdp"], ["verify.to_backend=zero3+offload", "verify.to_procs=4"]),
    ],
)
def test_the_verb(common, tmp_path, own, then):
    argv = [o for o in common if not o.startswith("checkpoint")] + METHODS["lora"] + own + then
    argv += ["launch.num_procs=2", "verify.steps=24", "verify.kill_at=6", f"run.dir={tmp_path}"]  # time to be killed in
    assert verify(["resume", *argv]) == 0
    found = json.loads((tmp_path / "resume.json").read_text())
    assert found["holds"]
    assert found["batches_equal"]
    assert 6 <= found["killed_after"] < 24
    assert found["same_backend_and_processes"] is (not then)
    assert (found["bit_equal"] and found["rng_equal"]) is (not then)


@pytest.mark.slow
def test_the_verb_finds_a_run_that_forgets(common, tmp_path, monkeypatch):
    """Moments that start again at zero are what a resume loses most easily."""
    import planted
    from tritune.launch import processes

    monkeypatch.setattr(processes, "_rank", planted.rank_that_forgets_its_moments)
    argv = [o for o in common if not o.startswith("checkpoint")] + METHODS["full"] + ["backend=fsdp"]
    argv += ["launch.num_procs=2", "verify.steps=24", "verify.kill_at=6", f"run.dir={tmp_path}"]
    assert verify(["resume", *argv]) == 1
    assert not json.loads((tmp_path / "resume.json").read_text())["holds"]
