"""`tritune verify parity`: it holds for every backend, and it fails where gradients are wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import harness
import planted
import pytest
import today
from tritune.launch import processes
from tritune.launch.verify import checked, verify

ALL = "ddp,fsdp,fsdp+offload,hsdp@4,zero1,zero2,zero3,zero3+offload"
METHODS = {
    "full": ["method=full", "optim.lr=2e-3"],
    "lora": ["method=lora", "method.rank=4", "method.dropout=0.1", "optim.lr=5e-3"],
}


@pytest.fixture(scope="module")
def rows_and_model(tmp_path_factory):
    """A pretrained model in safetensors, so that sharded backends read their parts of it, and rows of ragged lengths."""
    root = tmp_path_factory.mktemp("parity")
    harness.write_prompts(root / "rows.jsonl", 120, seed=3)
    return [
        f"model.path={harness.save_small_llama(root / 'model', 160)}", f"data.train={root / 'rows.jsonl'}",
        "data.max_length=160", "train.max_steps=1", "backend.device=cpu", "launch.num_procs=2",
        "verify.parameters_every=10",
    ]  # fmt: skip


def certificate(directory, kind="parity"):
    return json.loads((directory / f"{kind}.json").read_text())


def test_a_proof_needs_no_end_of_training(tmp_path, capfd):
    """Its length is verify.steps, whether the configuration gives another, or none; a wrong one is one fault, of that key."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    words = ["model=tiny", f"data.train={tmp_path}/rows.jsonl", "verify.steps=7"]
    for end in ([], ["train.epochs=3"], ["train.max_steps=1"]):
        train = checked([*words, *end], None).train
        assert (train.max_steps, train.epochs) == (7, None)
    assert verify(["parity", *words, "verify.steps=0", f"run.dir={tmp_path / 'run'}"]) == 2
    said = capfd.readouterr().err
    assert "verify.steps=0" in said
    assert "train." not in said


# Each day both methods and both splits of a batch, on all backends; which goes with which changes.
SPLITS = [
    cell for day in today.some([(("full", 1), ("lora", 3)), (("full", 3), ("lora", 1))], 2, "parity") for cell in day
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "micro_batches"), SPLITS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_backend_in_float32(rows_and_model, tmp_path, method, micro_batches, ranks):
    """24 rows a step, so that each rank has as many micro-batches; the last step of an epoch is short."""
    backends = [b for b in ALL.split(",") if ("@4" in b) == (ranks == 4)]
    argv = [
        *rows_and_model,
        *METHODS[method],
        "train.batch_size=24",
        f"train.micro_batch_size={24 // ranks // micro_batches}",
    ]
    assert verify(["parity", *argv, f"verify.backends=[{','.join(backends)}]", f"run.dir={tmp_path}"]) == 0
    found = certificate(tmp_path)
    assert found["holds"]
    assert list(found["backends"]) == backends
    reference = found["reference"]
    assert reference[-1]["loss"] < 0.9 * reference[0]["loss"]  # it learns, so the curve says something
    for cell in found["backends"].values():
        for step, expected in zip(cell["steps"], reference, strict=True):
            assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
            assert step["same_batch"]
        assert len(cell["steps"]) == 20
        assert cell["steps"][-1]["parameters"] <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("method", today.some(list(METHODS), 2, "bfloat16"))
def test_every_backend_in_bfloat16(rows_and_model, tmp_path, method):
    """Without clipping: a few bf16 gradients add up exactly in float32, so orders move nothing and losses are the same bits.

    With clipping, the rounding of the norm moves the reference and the backends alike: `benchmarks/parity.py` has it.
    """
    argv = [
        *rows_and_model,
        *METHODS[method],
        "model.dtype=bfloat16",
        "train.batch_size=24",
        "train.micro_batch_size=4",
    ]
    argv += ["optim.max_grad_norm=1e9", "verify.orders=3"]
    assert verify(["parity", *argv, f"verify.backends=[{ALL}]", f"run.dir={tmp_path}"]) == 0
    found = certificate(tmp_path)
    assert found["holds"]
    rounded, wide = ([row["loss"] for row in found[key]] for key in ("reference", "float32"))
    assert rounded != wide  # it computes in bf16
    assert rounded == pytest.approx(wide, rel=2**-6)
    for cell in found["backends"].values():
        for step, bound in zip(cell["steps"], found["bounds"], strict=True):
            assert step["loss_difference"] <= bound["loss"]
            assert step["grad_norm_difference"] <= bound["grad_norm"]


@pytest.mark.gpu
@pytest.mark.slow
def test_on_one_process_of_a_gpu_where_there_is_one(rows_and_model, tmp_path):
    """Through the command, in a process that has not told DeepSpeed of CPUs alone."""
    argv = [*rows_and_model, *METHODS["lora"], "launch.num_procs=1", "train.batch_size=8", "train.micro_batch_size=4",
            "verify.steps=3", "verify.backends=[fsdp,zero2]", "backend.device=auto", f"run.dir={tmp_path}"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    command = [sys.executable, "-m", "tritune.launch.cli", "verify", "parity", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=170)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert list(certificate(tmp_path)["backends"]) == ["fsdp", "zero2"]


TRAPS = {
    "loss divided twice": (planted.rank_with_the_loss_divided_twice, "zero2"),
    "sync flag after the forward": (planted.rank_with_the_flag_set_after_the_forward, "ddp"),
    "head through full_tensor": (planted.rank_with_the_head_read_through_full_tensor, "fsdp"),
    "mean of each rank": (planted.rank_with_a_mean_of_its_own, "ddp"),
}


@pytest.mark.slow
@pytest.mark.parametrize("trap", TRAPS)
def test_wrong_gradients_are_caught(rows_and_model, tmp_path, monkeypatch, capsys, trap):
    """Without the fault the same proof holds: `test_every_backend_in_float32`."""
    rank, backend = TRAPS[trap]
    argv = [*rows_and_model, *METHODS["full"], "train.batch_size=24", "train.micro_batch_size=4", "verify.steps=4"]
    monkeypatch.setattr(processes, "_rank", rank)
    assert verify(["parity", *argv, f"verify.backends=[{backend}]", f"run.dir={tmp_path}"]) == 1
    found = certificate(tmp_path)
    assert not found["holds"]
    assert found["backends"][backend]["steps"], found["backends"][backend]["verdict"]  # it ran, and was found wrong
    assert "does not hold" in capsys.readouterr().out


@pytest.mark.slow
def test_what_cannot_run_is_refused_by_name(rows_and_model, tmp_path, capsys):
    argv = [*rows_and_model, *METHODS["full"], "train.batch_size=12", "verify.steps=2"]
    assert verify(["parity", *argv, "verify.backends=[ddp,hsdp@3]", f"run.dir={tmp_path}"]) == 0
    cells = certificate(tmp_path)["backends"]
    assert cells["ddp"]["verdict"] == "holds"
    assert cells["hsdp@3"]["verdict"].startswith("refused: backend.shards=None: 3 ranks cannot be split")
    assert "hsdp@3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "there is parity, resume"),
        (["quality"], "there is parity, resume"),
        (["parity", "verify.backends=[fsdq]"], "verify.backends: fsdq"),
        (["parity", "verify.backends=[ddp+offload]"], "all but single and ddp offload"),
        (["resume", "verify.kill_at=20", "verify.steps=20"], "verify.kill_at=20"),
        (["resume", "verify.steps=1"], "verify.steps=1"),
    ],
)
def test_wrong_input(argv, message, tmp_path, capfd, sft_file):
    config = ["model=tiny", f"data.train={sft_file}", "train.max_steps=4", "backend.device=cpu", f"run.dir={tmp_path}"]
    assert verify([*argv, *config] if argv else argv) == 2
    said = capfd.readouterr().err
    assert message in said
    assert "Traceback" not in said
