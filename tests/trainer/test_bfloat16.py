"""bfloat16: masters stay float32, the curve stays close to float32's, one rank and two train the same."""

from __future__ import annotations

import harness
import pytest
from safetensors import safe_open

pytestmark = pytest.mark.slow

METHODS = {"full": ["method=full"], "lora": ["method=lora", "method.dropout=0.1"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_file):
    root = tmp_path_factory.mktemp("bf16")
    for world_size in (1, 2):
        cells = []
        for method, extra in METHODS.items():
            for dtype in ("bfloat16", "float32")[: 3 - world_size]:  # float32 is the judge of one process
                cells.append([
                    "model=tiny", f"model.dtype={dtype}", f"data.train={sft_file}", "data.max_length=160",
                    "train.batch_size=8", "train.micro_batch_size=2", "train.max_steps=12", "optim.lr=2e-3",
                    "backend.device=cpu", "evaluation.base=false", "export.enabled=false", "report.enabled=false",
                    f"run.dir={root}/{method}-{dtype}-{world_size}", *extra,
                ])  # fmt: skip
        harness.run_many(cells, root / "logs", world_size)
    return root


@pytest.mark.parametrize("method", METHODS)
def test_close_to_float32(runs, method):
    """bf16 has 8 bits: a token's logit is off by about 2^-9 relative; a mean over hundreds of tokens by far less."""
    wide, narrow = (harness.rows(runs / f"{method}-{d}-1") for d in ("float32", "bfloat16"))
    for a, b in zip(wide, narrow, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2**-8)
    assert [r["loss"] for r in wide] != [r["loss"] for r in narrow]
    assert narrow[-1]["loss"] < 0.9 * narrow[0]["loss"]  # it learns, so closeness says something


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_as_one(runs, method):
    """The same micro-batches: bf16 gradients are the same bits, their float32 sums differ in order alone."""
    one, two = (harness.rows(runs / f"{method}-bfloat16-{n}") for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3 if a["step"] > 1 else 1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2 if a["step"] > 1 else 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_holds_float32_masters(runs, method):
    shards = list((runs / f"{method}-bfloat16-2" / "checkpoints" / "step-00000012").glob("*.safetensors"))
    dtypes = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            dtypes |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert dtypes
    assert set(dtypes.values()) == {"F32"}


def test_resumes_bit_for_bit(tmp_path, sft_file):
    import signal

    arguments = ["model=tiny", "model.dtype=bfloat16", f"data.train={sft_file}", "data.max_length=160",
                 "train.batch_size=8", "train.micro_batch_size=3", "train.max_steps=30", "checkpoint.every=4",
                 "optim.lr=2e-3", "backend.device=cpu", "export.enabled=false",
        "report.enabled=false", *METHODS["lora"]]  # fmt: skip
    harness.run([*arguments, f"run.dir={tmp_path / 'whole'}"], tmp_path / "logs", 2)
    job = harness.start([*arguments, f"run.dir={tmp_path / 'killed'}"], tmp_path / "logs", 2)
    harness.wait_for_step(job, tmp_path / "killed", 9)
    job.signal(signal.SIGKILL)
    job.wait()
    harness.run([*arguments, f"run.dir={tmp_path / 'killed'}"], tmp_path / "logs", 2)
    whole, killed = (harness.rows(tmp_path / name) for name in ("whole", "killed"))
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in whole] == [
        (r["step"], r["loss"], r["grad_norm"]) for r in killed
    ]
