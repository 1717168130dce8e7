"""Documents in one row do not see one another: losses, hidden states and gradients are those of each alone."""

from __future__ import annotations

import copy
import json
import random

import harness
import numpy as np
import pytest
import torch
from test_scorer import FAMILIES, PAD, build
from transformers import AutoModelForSequenceClassification
from tritune.kernels.dispatch import KERNELS, Choice
from tritune.kernels.families import FAMILIES as KERNEL_FAMILIES
from tritune.kernels.install import install
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.loader import collate
from tritune.trainer.errors import InputError
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.lora_layers import add_lora
from tritune.trainer.methods.prefix import PrefixConfig
from tritune.trainer.methods.prompt import PromptConfig
from tritune.trainer.model.attention import (
    VARLEN,
    choose_attention,
    document_bounds,
    require_documents_apart,
    varlen_attention,
    within_rows,
)
from tritune.trainer.model.scorer import KeepFloat64, TokenScorer

PACKS = [np.array([3, 0, 5]), np.array([1]), np.array([2, 4, 6, 7])]  # ragged, one alone, short ones
LENGTHS = (9, 14, 2, 6, 7, 1, 3, 5)


def rows() -> Examples:
    rng, made = np.random.default_rng(5), harness.Rows()
    for i, n in enumerate(LENGTHS):
        made.add(rng.integers(3, PAD, n), rng.random(n) < 0.7, f"row {i}", label=i % 3)
    return made.freeze()


def outcome(scorer, batches, want="token_nll"):
    """What each document got, by its sample number, and the gradients of the sum."""
    scorer.zero_grad()
    found: dict[int, list] = {}
    for batch in batches:
        values = scorer(batch, want)
        values.sum().backward()
        owner = batch.document_of(batch.predict) if want == "token_nll" else torch.arange(len(batch.starts))
        for sample in range(len(batch.starts)):
            found[int(batch.sample_ids[sample])] = values[owner == sample].detach()
    return found, {n: p.grad.clone() for n, p in scorer.named_parameters() if p.grad is not None}


def require_same(scorer, want="token_nll", tolerance=1e-11, step=0):
    data = rows()
    alone, gradients = outcome(scorer, [collate(data, [i], PAD, step) for i in range(len(data))], want)
    packed, summed = outcome(scorer, [collate(data, PACKS, PAD, step)], want)
    assert alone.keys() == packed.keys()
    for sample, values in alone.items():
        assert torch.allclose(packed[sample], values, rtol=tolerance, atol=tolerance), sample
    assert gradients.keys() == summed.keys()
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        assert float((summed[name] - gradient).abs().max()) <= tolerance * max(scale, 1.0), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_document_is_alone_in_its_pack(family, attention):
    """In float64, where 1e-11 leaves room for the order of sums alone; sliding windows of 4 are among the families."""
    if attention == "eager" and family not in ("llama", "mistral", "gemma3_text"):
        pytest.skip("transformers makes the masks of all families alike; gemma2 is eager anyhow")
    model = build(family, dtype=torch.float64)
    if family != "gemma2":
        model.set_attn_implementation(attention)
    require_same(TokenScorer(model, None, 0, 7))


def test_classes_are_read_off_each_documents_end():
    model = build("llama", AutoModelForSequenceClassification, torch.float64, num_labels=3)
    require_same(TokenScorer(model, None, 0, 7), "class_logits")
    require_same(TokenScorer(build("llama", dtype=torch.float64), None, 0, 7), "last_logits")


def test_lora_drops_the_same_elements():
    model = build("llama", dtype=torch.float64)
    keys = add_lora(LoraConfig(rank=3, dropout=0.3, targets=["all-linear"]), model, [], seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.2)
    scorer = TokenScorer(model.double(), keys, 3, 7).train()
    require_same(scorer, step=4)
    dropped, _ = outcome(scorer, [collate(rows(), PACKS, PAD, 4)])
    kept, _ = outcome(scorer.eval(), [collate(rows(), PACKS, PAD, 4)])
    assert not torch.allclose(dropped[0], kept[0]), "nothing was dropped: no proof"


OWN_TOKENS = {"prefix": PrefixConfig(num_virtual_tokens=3), "prompt": PromptConfig(num_virtual_tokens=3)}


@pytest.mark.parametrize("method", sorted(OWN_TOKENS))
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_document_has_virtual_tokens_of_its_own(family, method):
    """Those of another document, or its positions, would give other losses; among the families are windows of 4."""
    model, config = build(family, dtype=torch.float64), OWN_TOKENS[method]
    if method == "prefix" and family in ("gpt2", "phi3"):  # one layer makes queries, keys and values
        with pytest.raises(InputError, match=f"attention of {family}: a layer has no self_attn with k_proj"):
            config.attach(model, [], 0, ())
        return
    before, _ = outcome(TokenScorer(model, None, 0, 7), [collate(rows(), PACKS, PAD)])
    config.attach(model, [], 0, ())
    require_same(TokenScorer(model, None, 0, 7))
    after, gradients = outcome(TokenScorer(model, None, 0, 7), [collate(rows(), PACKS, PAD)])
    assert len(gradients) == (2 * model.config.num_hidden_layers if method == "prefix" else 1)
    assert all(g.abs().max() > 1e-4 for g in gradients.values())
    assert not torch.allclose(before[0], after[0], atol=1e-3)


@pytest.mark.parametrize("method", sorted(OWN_TOKENS))
def test_classes_are_read_behind_virtual_tokens(method):
    model = build("llama", AutoModelForSequenceClassification, torch.float64, num_labels=3)
    OWN_TOKENS[method].attach(model, ["score"], 0, ())
    require_same(TokenScorer(model, None, 0, 7), "class_logits")
    assert {n for n, p in model.named_parameters() if p.requires_grad} > {"score.weight"}


@pytest.mark.parametrize("family", sorted(KERNEL_FAMILIES))
def test_with_kernels(family):
    """Triton's interpreter in float32: the kernels' error against float64, packed, is at most twice PyTorch's own."""
    model, data = build(family), rows()
    exact = TokenScorer(copy.deepcopy(model).double(), None, 0, 7)
    with KeepFloat64():
        truth, _ = outcome(exact, [collate(data, [i], PAD) for i in range(len(data))])
    plain, _ = outcome(TokenScorer(copy.deepcopy(model), None, 0, 7), [collate(data, PACKS, PAD)])
    done = install(model, {kernel: Choice("triton", "asked for") for kernel in KERNELS})
    scorer = TokenScorer(model, None, 0, 7, fused_head=done.head)
    found, _ = outcome(scorer, [collate(data, PACKS, PAD)])
    for sample, values in truth.items():
        if not len(values):
            continue
        unit = 2.0**-23 * float(values.abs().max())
        own = float((plain[sample].double() - values).abs().max())
        assert float((found[sample].double() - values).abs().max()) <= 2 * own + 8 * unit, sample


def test_a_model_that_mixes_documents_is_refused():
    scorer = TokenScorer(build("llama"), None, 0, 7)
    require_documents_apart(lambda b: scorer(b, "token_nll"), PAD, torch.device("cpu"), half=False)
    forward = scorer.model.model.forward
    scorer.model.model.forward = lambda position_ids=None, **kwargs: forward(
        **kwargs
    )  # as a model that ignores positions
    with pytest.raises(InputError, match=r"data\.packing=best_fit.*see one another"):
        require_documents_apart(lambda b: scorer(b, "token_nll"), PAD, torch.device("cpu"), half=False)


def judged_varlen(version):
    """PyTorch's variable-length attention has no CPU code: here document by document through its SDPA, with the signature of
    a version of torch."""

    def documents(q, k, v, bounds, longest, scale, window_size, enable_gqa):
        assert longest == int(bounds.diff().max())
        assert enable_gqa or q.shape[1] == k.shape[1] == v.shape[1], "grouped heads, and nobody said so"
        out = torch.empty_like(q)
        for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            at = torch.arange(b - a)
            far = at[:, None] - at[None, :]
            mask = (far >= 0) & ((window_size[0] < 0) | (far <= window_size[0]))
            part = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
            out[a:b] = torch.nn.functional.scaled_dot_product_attention(
                *part, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
            )[0].transpose(0, 1)
        return out

    def torch_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        assert cu_seq_q is cu_seq_k
        assert max_q == max_k
        return documents(query, key, value, cu_seq_q, max_q, scale, window_size, False)

    def torch_2_13(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert cu_seq_q is cu_seq_k
        assert max_q == max_k
        return documents(query, key, value, cu_seq_q, max_q, scale, window_size, enable_gqa)

    return {"2.11": torch_2_11, "2.13": torch_2_13}[version]


@pytest.mark.parametrize("version", ["2.11", "2.13"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "qwen3", "phi3", "olmo2"])
def test_variable_length_attention_is_called_as_it_is_meant(family, version, monkeypatch):
    """Layouts, bounds, windows, scales and groups, with the kernel itself replaced: it runs on GPUs alone."""
    from transformers import AttentionInterface, AttentionMaskInterface

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", judged_varlen(version))
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, lambda *args, **kwargs: None)
    model, data = build(family, dtype=torch.float64), rows()
    expected, gradients = outcome(TokenScorer(model, None, 0, 7), [collate(data, PACKS, PAD)])
    ids = torch.arange(3, 9)[None]
    logits = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(VARLEN)
    scorer = TokenScorer(model, None, 0, 7)
    for batches in ([collate(data, PACKS, PAD)], [collate(data, range(len(data)), PAD)]):
        found, theirs = outcome(scorer, batches)
        for sample, values in expected.items():
            assert torch.allclose(found[sample], values, rtol=1e-11, atol=1e-11)
        for name, gradient in gradients.items():
            assert torch.allclose(theirs[name], gradient, rtol=1e-9, atol=1e-9), name
    with pytest.raises(RuntimeError, match="not told where documents end"):
        model(input_ids=ids, use_cache=False)
    assert torch.equal(scorer.logits(ids), logits), "a call that knows of no documents takes ordinary attention"
    with within_rows(model):
        assert "cu_seq_lens_q" not in document_bounds(collate(data, [0], PAD), model)


def test_variable_length_attention_is_told_of_virtual_tokens(monkeypatch):
    """Those of a prompt lengthen the documents; a prefix goes before the keys of another attention, which stays."""
    from transformers import AttentionInterface, AttentionMaskInterface

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", judged_varlen("2.13"))
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, lambda *args, **kwargs: None)
    model, data = build("mistral", dtype=torch.float64), rows()
    OWN_TOKENS["prompt"].attach(model, [], 0, ())
    expected, gradients = outcome(TokenScorer(model, None, 0, 7), [collate(data, PACKS, PAD)])
    model.set_attn_implementation(VARLEN)
    for batches in ([collate(data, PACKS, PAD)], [collate(data, range(len(data)), PAD)]):
        found, theirs = outcome(TokenScorer(model, None, 0, 7), batches)
        for sample, values in expected.items():
            assert torch.allclose(found[sample], values, rtol=1e-11, atol=1e-11)
        for name, gradient in gradients.items():
            assert torch.allclose(theirs[name], gradient, rtol=1e-9, atol=1e-9), name
    model = build("mistral", dtype=torch.bfloat16)
    OWN_TOKENS["prefix"].attach(model, [], 0, ())
    assert choose_attention(model, torch.device("cuda")) == "tritune_prefix_sdpa"


def write(path, count, seed=0):
    rng, words = random.Random(seed), "the cat sat on a red mat and ran far away over hills".split()  # noqa: SIM905
    with path.open("w") as file:
        for i in range(count):
            prompt, answer = (" ".join(rng.choices(words, k=rng.randint(1, n))) for n in (12, 20))
            file.write(json.dumps({"prompt": f"{i} {prompt}", "response": answer}) + "\n")


def test_the_same_run_packed_and_unpacked(tritune, tmp_path):
    """The plan fixes a step's documents; how they are computed changes nothing, LoRA's dropout included."""
    write(tmp_path / "rows.jsonl", 90)
    curves = {}
    for name, *changes in (
        ("packed",), ("unpacked", "train.unpack=true"), ("ones", "train.micro_batch_size=1"),
        ("rows", "train.unpack=true", "train.micro_batch_size=2"),
    ):  # fmt: skip
        done = tritune(
            "model=tiny", f"data.train={tmp_path}/rows.jsonl", "data.packing=best_fit", "data.max_length=400",
            "train.batch_size=3", "train.max_steps=6", "method=lora", "method.dropout=0.1", "optim.lr=1e-2",
            "backend.device=cpu", "export.enabled=false", "report.enabled=false", f"run.dir={tmp_path}/{name}", *changes,
        )  # fmt: skip
        assert done.code == 0, done.err
        assert "would be another run" in done.err
        curves[name] = harness.rows(tmp_path / name)
    for name, curve in curves.items():
        for ours, theirs in zip(curve, curves["packed"], strict=True):
            assert ours["batch"] == theirs["batch"], "the same documents"
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), name
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), name


def test_the_same_run_on_other_world_sizes(tritune, tmp_path):
    """Packed and apart, on one process and on two, replicated and sharded: the plan fixes a step's documents."""
    write(tmp_path / "rows.jsonl", 90)
    same = ["model=tiny", f"data.train={tmp_path}/rows.jsonl", "data.packing=best_fit", "data.max_length=400",
            "train.batch_size=3", "train.max_steps=5", "method=lora", "method.dropout=0.1", "optim.lr=1e-2",
            "backend.device=cpu", "export.enabled=false", "report.enabled=false"]  # fmt: skip
    assert tritune(*same, f"run.dir={tmp_path}/alone").code == 0
    cells = {
        "ddp": ["backend=ddp"], "apart": ["backend=ddp", "train.unpack=true", "train.micro_batch_size=2"],
        "fsdp": ["backend=fsdp"], "zero3": ["backend=zero3", "train.micro_batch_size=1"],
    }  # fmt: skip
    harness.run_many([[*same, *c, f"run.dir={tmp_path}/{n}"] for n, c in cells.items()], tmp_path / "logs", 2)
    alone = harness.rows(tmp_path / "alone")
    for name in cells:
        for ours, theirs in zip(harness.rows(tmp_path / name), alone, strict=True):
            assert ours["batch"] == theirs["batch"], name
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), name
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), name


def test_another_packing_is_another_run(tritune, tmp_path):
    write(tmp_path / "rows.jsonl", 60)
    same = ["model=tiny", f"data.train={tmp_path}/rows.jsonl", "data.max_length=300", "train.batch_size=4", "train.max_steps=2",
            "backend.device=cpu", "export.enabled=false", "report.enabled=false", f"run.dir={tmp_path}/run"]  # fmt: skip
    assert tritune(*same, "data.packing=best_fit").code == 0
    refused = tritune(*same)
    assert refused.code == 2
    assert "data.packing: best_fit -> none" in refused.err
