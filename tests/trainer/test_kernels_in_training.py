"""Runs with our kernels, interpreted, beside one process without them: the same curve, whatever shards or recomputes."""

from __future__ import annotations

import json

import harness
import pytest
import today
import torch
from test_activations import batch, loss_and_gradients
from test_activations import scorer as plain_scorer
from transformers import AutoModelForCausalLM
from tritune.kernels.dispatch import KERNELS, Choice
from tritune.kernels.install import install
from tritune.launch.verify import verify
from tritune.trainer.config import TrainConfig
from tritune.trainer.config.choices import Activations
from tritune.trainer.model.activations import checkpoint_activations
from tritune.trainer.verify.compare import compare_float32

METHODS = {"full": ["method=full"], "lora": ["method=lora", "method.rank=4", "method.dropout=0.1"]}
STEPS = 2


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """Nine rows, three micro-batches of ragged lengths a rank and one that fills; parameters are saved at each step."""
    root = tmp_path_factory.mktemp("kernels")
    harness.write_prompts(root / "rows.jsonl", 9, seed=5)
    return [
        f"model.path={harness.save_small_llama(root / 'model', 64)}", f"data.train={root / 'rows.jsonl'}",
        "data.max_length=64", f"train.max_steps={STEPS}", "train.batch_size=9", "train.micro_batch_size=2",
        "backend.device=cpu", "checkpoint.every=1", "checkpoint.keep_last=9", "optim.lr=5e-3", "optim.schedule=constant",
        "export.enabled=false", "report.enabled=false", "evaluation.base=false", "evaluation.samples=0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def references(common, tmp_path_factory):
    """By method: one process, kernels off."""
    root = tmp_path_factory.mktemp("references")
    cells = [[*common, *METHODS[m], "kernels=reference", f"run.dir={root / m}"] for m in METHODS]
    harness.run_many(cells, root / "logs")
    return {m: root / m for m in METHODS}


def require_the_same(run, reference):
    steps = compare_float32(run, reference)
    assert len(steps) == STEPS
    assert all(step.holds for step in steps), steps


OTHERS = [
    ("lora", "fsdp", "none"), ("lora", "fsdp", "full"), ("lora", "fsdp", "selective"), ("lora", "zero3", "none"),
    ("lora", "zero3", "full"), ("full", "fsdp", "none"), ("full", "fsdp", "full"), ("full", "zero3", "none"),
    ("lora", "ddp", "none"), ("full", "ddp", "full"), ("lora", "zero2", "none"), ("lora", "zero3", "selective"),
]  # fmt: skip
CELLS = [("full", "zero3", "full"), *(pytest.param(*cell, marks=pytest.mark.slow) for cell in today.some(OTHERS, 3))]


@pytest.mark.parametrize(("method", "backend", "keeps"), CELLS)
def test_two_ranks_with_kernels_train_what_one_without_them_does(common, references, tmp_path, method, backend, keeps):
    """Accumulation and an uneven last micro-batch; the head frozen under LoRA and tied and training under `full`."""
    settings = [
        *common,
        *METHODS[method],
        f"backend={backend}",
        "kernels=triton",
        f"train.activation_checkpointing={keeps}",
    ]
    job = harness.run([*settings, f"run.dir={tmp_path / 'run'}"], tmp_path / "logs", world_size=2)
    said = job.output()
    assert "kernels   triton (asked for): linear_cross_entropy, lora, rms_norm, rope, glu" in said
    fused = "lora group x 2, lora mlp x 2, lora layer x 2" if method == "lora" else "glu x 2"
    assert fused in said
    assert "linear_cross_entropy x 1" in said
    require_the_same(tmp_path / "run", references[method])


@pytest.mark.slow
def test_a_run_goes_on_with_other_kernels(common, references, tmp_path):
    """Which kernels compute is no part of what a run is."""
    settings = [*common, *METHODS["lora"], f"run.dir={tmp_path / 'run'}"]
    first = harness.start([*settings, "kernels=triton"], tmp_path / "logs")
    harness.wait_for_step(first, tmp_path / "run", 1)
    first.signal(15)
    assert first.wait() == [75]
    harness.run([*settings, "kernels=reference", "run.resume=require"], tmp_path / "logs")
    require_the_same(tmp_path / "run", references["lora"])


@pytest.mark.slow
@pytest.mark.parametrize("method", today.some(list(METHODS), 2, "parity of kernels"))
def test_parity_holds_with_kernels(common, tmp_path, method):
    """Without them it is what tests/verify/test_parity.py proves."""
    backends = "verify.backends=[fsdp,zero3]"
    argv = [*common, *METHODS[method], "kernels=triton", "launch.num_procs=2", "verify.steps=2", backends]
    assert verify(["parity", *argv, f"run.dir={tmp_path}"]) == 0
    found = json.loads((tmp_path / "parity.json").read_text())
    assert found["holds"]
    assert list(found["backends"]) == ["fsdp", "zero3"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(harness.save_small_llama(tmp_path_factory.mktemp("model"), 160))


RECOMPUTED = [
    ("full", False),
    *(pytest.param(*c, marks=pytest.mark.slow) for c in (("selective", False), ("full", True))),
]


@pytest.mark.parametrize(("keeps", "offload"), RECOMPUTED)
def test_recomputed_kernels_give_the_same_bits(pretrained, keeps, offload):
    """Masks are a function of the tokens' keys, which recomputation replays: dropout 0.3 and values in B."""

    def made(keeps, offload):
        scorer = plain_scorer(pretrained)  # not wrapped yet: kernels go in first, as in a run
        scorer.fused_head = install(scorer.model, {k: Choice("triton", "") for k in KERNELS}).head
        settings = TrainConfig(activation_checkpointing=Activations(keeps), activation_offload=offload)
        checkpoint_activations(scorer, settings, scorer.keys)
        return scorer

    losses, gradients, _ = loss_and_gradients(made("none", False))
    again, recomputed, _ = loss_and_gradients(made(keeps, offload))
    assert again.equal(losses)
    for name, gradient in gradients.items():
        assert recomputed[name].equal(gradient), name
    reference, expected, _ = loss_and_gradients(plain_scorer(pretrained))
    torch.testing.assert_close(losses, reference, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=2e-5 * float(gradient.abs().max()))


def test_the_scorer_s_sum_is_the_sum_of_its_tokens(pretrained):
    scorer = plain_scorer(pretrained, dropout=0.0).eval()
    for fused in (False, True):
        if fused:
            scorer.fused_head = install(scorer.model, {k: Choice("triton", "") for k in KERNELS}).head
        tokens, total = scorer(batch(12, 3), "token_nll"), scorer(batch(12, 3), "summed_nll")
        torch.testing.assert_close(tokens.sum(), total, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_a_kernel_that_fails_its_check_gives_way_in_the_log(tritune, tiny, tmp_path, monkeypatch):
    from tritune.kernels import selfcheck

    right = selfcheck.rope
    monkeypatch.setattr(selfcheck, "rope", lambda q, k, c, s: [x * 1.001 for x in right(q, k, c, s)])
    said = tritune(*tiny, "kernels=triton", "kernels.glu=reference", "train.max_steps=1", f"run.dir={tmp_path}")
    assert said.code == 0
    lines = [line for line in said.lines() if line.startswith("kernels ")]
    assert lines[0] == "kernels   triton (asked for): linear_cross_entropy, lora, rms_norm"
    assert lines[1].startswith("kernels   reference (its self-check found ")
    assert lines[1].endswith("times the reference's error, and 2 are allowed): rope")
    assert lines[2] == "kernels   reference (asked for): glu"
    assert lines[3] == "kernels   in place: rms_norm x 5, linear_cross_entropy x 1"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kernels=triton", "model.dtype=float64"], "kernels=triton: .* would be wrong in float64"),
        (["kernels=triton", "train.compile=true"], "kernels=triton: torch.compile would stop at each of them"),
        (["kernels.rope=triton", "train.compile=true"], r"kernels\.rope=triton: .*Use auto"),
        (["kernels.rope=fast"], r"kernels\.rope=fast"),
        (["kernels.ropes=triton"], r"kernels\.ropes.*rope"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_loaded(tritune, tiny, tmp_path, overrides, message):
    import re

    said = tritune(*tiny, *overrides, f"run.dir={tmp_path}")
    assert said.code == 2
    assert re.search(message, said.err), said.err
    assert "Traceback" not in said.err


def test_auto_on_a_cpu_is_the_reference_even_where_an_interpreter_could_run(tritune, tiny, tmp_path):
    said = tritune(*tiny, "train.max_steps=1", f"run.dir={tmp_path}")
    assert said.code == 0
    line = "kernels   reference (on cpu): linear_cross_entropy, lora, rms_norm, rope, glu"
    assert torch.cuda.is_available() or line in said.lines()
