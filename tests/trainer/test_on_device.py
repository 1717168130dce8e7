"""Whole runs at world size 1, on a GPU where there is one: backends alike, packs alike, a resume bit for bit."""

from __future__ import annotations

import json

import harness
import pytest
import torch
from on_device import run_on_device
from tritune.trainer.model.attention import VARLEN

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.xdist_group("runs")]
STEPS = 6
BACKENDS = ["single", "fsdp", "zero3"]  # DeepSpeed keeps the groups of a process's first engine: one of ZeRO only


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_file):
    """Folders of runs that one process trained, and its log."""
    root = tmp_path_factory.mktemp("device")
    common = [
        "model=tiny", f"data.train={sft_file}", "data.max_length=160", "train.batch_size=8", "train.micro_batch_size=4",
        f"train.max_steps={STEPS}", "method=lora", "method.rank=4", "method.dropout=0.1", "optim.lr=2e-3",
        "evaluation.base=false", "evaluation.samples=0", "export.enabled=false", "report.enabled=false",
    ]  # fmt: skip
    packed = ["model.dtype=bfloat16", "data.packing=best_fit"]
    exact = [*packed, "train.deterministic=true"]
    cells: list[tuple[str, list[str], int | None]] = [
        *((name, [f"backend={name}"], None) for name in BACKENDS),
        ("packed", packed, None), ("unpacked", [*packed, "train.unpack=true"], None),
        ("whole", exact, None), ("resumed", exact, STEPS // 2), ("resumed", exact, None),
    ]  # fmt: skip
    codes = run_on_device([([*common, *more, f"run.dir={root / n}"], at) for n, more, at in cells], root / "log")
    assert codes == [0] * (len(cells) - 2) + [75, 0], (root / "log").read_text()[-6000:]
    return root


def test_the_device_is_the_one_that_there_is(runs):
    said = (runs / "log").read_text()
    assert ("triton (on cuda)" in said) == torch.cuda.is_available(), said[-3000:]


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_every_backend_trains_what_a_single_process_trains(runs, backend):
    """In float32, to the bounds that are promised everywhere."""
    expected, found = (harness.rows(runs / name) for name in ("single", backend))
    assert len(found) == len(expected) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["batch"] == theirs["batch"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert expected[-1]["loss"] < expected[0]["loss"]


def test_packs_in_bfloat16_train_what_their_documents_do_alone(runs):
    """A token's logit is off by about 2^-9; a mean over hundreds of tokens by far less. Each document seen by the next
    would move losses in the second digit."""
    packed, alone = (harness.rows(runs / name) for name in ("packed", "unpacked"))
    for ours, theirs in zip(packed, alone, strict=True):
        assert ours["batch"] == theirs["batch"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2**-8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="variable-length attention runs on GPUs alone")
def test_packs_in_bfloat16_take_variable_length_attention(runs):
    assert f"attention {VARLEN}" in (runs / "log").read_text()


def test_a_stopped_run_goes_on_bit_for_bit(runs):
    """With kernels that sum in an order of their own refused."""
    whole, resumed = (harness.rows(runs / name) for name in ("whole", "resumed"))
    assert json.loads((runs / "resumed" / "status.json").read_text())["state"] != "stopped"
    assert [r["step"] for r in resumed] == list(range(1, STEPS + 1))
    for ours, theirs in zip(resumed, whole, strict=True):
        assert [ours[k] for k in ("batch", "loss", "grad_norm", "rng")] == [
            theirs[k] for k in ("batch", "loss", "grad_norm", "rng")
        ]
