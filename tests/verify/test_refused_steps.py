"""A step that is not finite leaves no trace, on any backend: what was accumulated for it is forgotten."""

from __future__ import annotations

import harness
import planted
import pytest
from tritune.launch import processes

BACKENDS = {
    "fsdp": ["backend=fsdp"],
    "zero1": ["backend=zero1"],
    "zero1+offload": ["backend=zero1", "backend.offload=optimizer"],
    "zero2": ["backend=zero2"],
    "zero2+offload": ["backend=zero2", "backend.offload=optimizer"],
    "zero3": ["backend=zero3"],
    "zero3+offload": ["backend=zero3", "backend.offload=all"],
}


@pytest.fixture(scope="module")
def common(tmp_path_factory, sft_file):
    model = harness.save_small_llama(tmp_path_factory.mktemp("model"), 160)
    return [
        f"model.path={model}", f"data.train={sft_file}", "data.max_length=160", "train.batch_size=12",
        "train.micro_batch_size=2", "train.max_steps=4", "backend.device=cpu", "evaluation.base=false",
        "export.enabled=false", "report.enabled=false", "optim.lr=1e-2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(common, tmp_path_factory):
    """By kind: what one process does, run once."""
    root, kept = tmp_path_factory.mktemp("one"), {}

    def get(kind: str, overrides: list[str], expected: list[int]) -> list[float | None]:
        if kind not in kept:
            run = root / kind.replace(" ", "-")
            job = harness.start([*overrides, "backend=single", f"run.dir={run}"], root / "logs")
            assert job.wait() == expected, job.output()
            kept[kind] = [r["loss"] for r in harness.rows(run)]
        return kept[kind]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bad loss", "bad gradient"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_left_of_it(common, one_process, tmp_path, monkeypatch, backend, kind):
    """A bad loss in one step; or a learning rate after which every gradient is NaN, and the run gives up alike."""
    if kind == "bad loss":
        monkeypatch.setattr(processes, "_rank", planted.rank_with_one_bad_step)
    else:
        common = [
            *common,
            "optim.lr=1e30",
            "optim.schedule=constant",
            "optim.warmup_ratio=0",
            "optim.max_grad_norm=1e9",
        ]
    expected = [0] if kind == "bad loss" else [1]
    one = one_process(kind, common, expected)
    two = harness.start([*common, *BACKENDS[backend], f"run.dir={tmp_path / 'two'}"], tmp_path / "logs", 2)
    assert two.wait() == expected * 2, two.output()
    curves = [one, [r["loss"] for r in harness.rows(tmp_path / "two")]]
    assert len(curves[0]) == len(curves[1]) >= 3
    for a, b in zip(*curves, strict=True):
        assert (a is None) == (b is None)  # JSON has no infinity
        assert a is None or b == pytest.approx(a, rel=1e-5)
    if kind == "bad loss":
        assert [loss is None for loss in curves[1]] == [False, True, False, False]
        assert curves[1][2] < curves[1][0]
