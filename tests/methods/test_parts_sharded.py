"""Part of the parameters, or bottlenecks beside them, on shards: the same model on every backend and for every objective, packed
and not; a run that goes on elsewhere, and what it exports."""

from __future__ import annotations

import json
import shutil

import harness
import pytest
from tritune.launch.verify import verify

METHODS = {
    "adapter": ["method=adapter", "method.size=6", "method.where=[attention,mlp]", "method.placement=parallel",
                "method.dropout=0.1"],
    # A frozen layer below, layers with frozen and trained weights in one group, and a tied head that stays frozen.
    "part": ["method=full", "method.last_layers=1", "method.train=[layers.0.self_attn]", "method.freeze=[layers.1.mlp]"],
}  # fmt: skip
# By itself ZeRO-3 keeps parameters as small as these whole on each rank, and would prove nothing.
ZERO3 = ["backend=zero3", "backend.persistence_elements=0"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("parts")
    return [
        f"model.path={harness.save_small_llama(root / 'model', 192)}", "data.max_length=160", "backend.device=cpu",
        "optim.lr=5e-3", "train.batch_size=12", "train.micro_batch_size=3", "evaluation.base=false", "evaluation.samples=0",
        "report.enabled=false",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_sharding_trains_the_same_model(words, sft_file, tmp_path, method):
    argv = [*words, f"data.train={sft_file}", *METHODS[method], *ZERO3, "launch.num_procs=2", "verify.steps=6",
            "verify.parameters_every=3", "verify.backends=[fsdp,hsdp,zero2,zero3]", f"run.dir={tmp_path}"]  # fmt: skip
    assert verify(["parity", *argv]) == 0
    found = json.loads((tmp_path / "parity.json").read_text())
    assert found["holds"]
    assert found["reference"][-1]["loss"] < found["reference"][0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_on_another_backend_and_exports(words, sft_file, tmp_path, method):
    common = [*words, f"data.train={sft_file}", *METHODS[method], "train.max_steps=6", "checkpoint.every=3"]
    source, other = tmp_path / "unbroken", tmp_path / "other"
    harness.run([*common, *ZERO3, f"run.dir={source}"], tmp_path / "logs", 2)
    shutil.copytree(source, other, ignore=lambda *_: ["step-00000006", "export"])
    harness.run([*common, "backend=fsdp", "run.resume=require", f"run.dir={other}"], other / "logs")
    for a, b in zip(harness.rows(other), harness.rows(source), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), a["step"]
    for run in (source, other):
        exported = json.loads((run / "summary.json").read_text())["export"]
        assert (exported["form"], exported["reader"].split()[0]) == {
            "adapter": ("adapter", "Tritune"),
            "part": ("full", "transformers"),
        }[method]
        assert exported["max_difference"] <= exported["allowed"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_objective_packed_and_not(words, sft_file, label_file, tmp_path, method):
    """Each pair on two ranks of one of the backends, as on one process."""
    backends, cells = [["backend=fsdp"], ["backend=hsdp"], ["backend=zero2"], ZERO3], {}
    for i, objective in enumerate(("pretrain", "sft", "classify", "classify_token")):
        rows = sft_file if objective == "sft" else label_file
        for j, packing in enumerate(("none", "best_fit")[: 1 if objective == "pretrain" else 2]):  # its blocks are full
            common = [*words, f"data.train={rows}", *METHODS[method], f"objective={objective}", f"data.packing={packing}",
                      "train.max_steps=2", "export.enabled=false"]  # fmt: skip
            cells[f"{objective}-{packing}"] = (common, backends[(i + j + (method == "part")) % 4])

    def given(names, size):
        return [
            [*cells[n][0], *(cells[n][1] if size == 2 else []), f"run.dir={tmp_path / f'{n}-{size}'}"] for n in names
        ]

    apart = [n for n in cells if "zero" in cells[n][1][0]]  # DeepSpeed takes a process group for good
    harness.run_many(given(cells, 1), tmp_path / "logs1")
    harness.run_many(given([n for n in cells if n not in apart], 2), tmp_path / "logs2", 2)
    for name in apart:
        harness.run(*given([name], 2), tmp_path / f"logs-{name}", 2)
    for name in cells:
        alone, sharded = (harness.rows(tmp_path / f"{name}-{size}") for size in (1, 2))
        assert len(alone) == 2
        for a, b in zip(alone, sharded, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), name
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4), name
