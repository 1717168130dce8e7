"""The loss curve does not depend on the number of processes nor on how a batch is split.

Rows are ragged, dropout is on, the last batch of an epoch is short. A mean of micro-batch means would be off by a third of the
largest gradient here; an own mask per rank or per split would show in the third digit.
"""

from __future__ import annotations

import harness
import pytest

STEPS = 20  # 120 rows in batches of 8 are 15 steps an epoch: a second, reordered epoch begins
METHODS = {
    "lora": ["method=lora", "method.rank=4", "method.dropout=0.1", "optim.lr=2e-3"],
    "full": ["method=full", "optim.lr=1e-3"],
}
# fp32: the bound that we promise. fp64: what remains is the order of sums, about 1e-16 a sum, grown over 20 Adam steps.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


@pytest.fixture(scope="module")
def curves(tmp_path_factory, sft_file):
    """Every cell's rows: processes are started once for each world size."""
    root = tmp_path_factory.mktemp("parity")
    found = {}
    for world_size in (1, 2):
        cells, directories = [], {}
        for method, method_overrides in METHODS.items():
            for dtype in TOLERANCE:
                for micro_batch_size in ("null", "3"):
                    name = f"{method}-{dtype}-{micro_batch_size}-{world_size}"
                    directories[name] = root / name
                    cells.append([
                        "model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48",
                        f"model.dtype={dtype}", f"data.train={sft_file}", "data.max_length=160", "train.batch_size=9",
                        f"train.max_steps={STEPS}", f"train.micro_batch_size={micro_batch_size}", "backend.device=cpu",
                        "export.enabled=false", "report.enabled=false", f"run.dir={directories[name]}", *method_overrides,
                    ])  # fmt: skip
        harness.run_many(cells, root / "logs", world_size)
        found |= {name: harness.rows(directory) for name, directory in directories.items()}
    return found


@pytest.mark.parametrize("cell", ["null-2", "3-1", "3-2"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", METHODS)
def test_same_curve(curves, method, dtype, cell):
    reference, other = curves[f"{method}-{dtype}-null-1"], curves[f"{method}-{dtype}-{cell}"]
    assert len(reference) == len(other) == STEPS
    assert [r["label_tokens"] for r in reference] == [r["label_tokens"] for r in other]
    for expected, actual in zip(reference, other, strict=True):
        for key in ("loss", "grad_norm"):
            assert actual[key] == pytest.approx(expected[key], rel=TOLERANCE[dtype], abs=0), (expected["step"], key)
    assert reference[-1]["loss"] < reference[0]["loss"]  # it learns, so the curve says something


def test_dropout_matters(curves, sft_file, tmp_path):
    """Another seed draws other masks: were dropout off, parity would be proved of nothing."""
    cells = []
    for p in ("0.0", "0.1"):
        cells.append([
            "model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48", f"data.train={sft_file}",
            "data.max_length=160", "train.batch_size=9", "train.max_steps=3", "backend.device=cpu",
            "export.enabled=false", "report.enabled=false", *METHODS["lora"], f"method.dropout={p}", f"run.dir={tmp_path / p}",
        ])  # fmt: skip
    harness.run_many(cells, tmp_path / "logs")
    without, with_dropout = (harness.rows(tmp_path / p) for p in ("0.0", "0.1"))
    assert abs(without[2]["loss"] / with_dropout[2]["loss"] - 1) > 1e-4
