"""Prefix and prompt tuning against PEFT: the same model and values give the same logits, gradients and curves, and each side
opens what the other wrote."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import harness
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
)
from tritune.launch import cli
from tritune.launch.verify import verify
from tritune.trainer.batch import rows_of
from tritune.trainer.config import Config, ModelConfig
from tritune.trainer.config.backends import BackendConfig
from tritune.trainer.errors import InputError
from tritune.trainer.methods.adapter_io import save_adapter
from tritune.trainer.methods.prefix import PrefixConfig
from tritune.trainer.methods.prefix_layers import joined, prefixes, split
from tritune.trainer.methods.prompt import PromptConfig
from tritune.trainer.methods.prompt_layers import virtual_tokens
from tritune.trainer.methods.states import whole
from tritune.trainer.model.scorer import TokenScorer
from tritune.trainer.model.tokenizer import byte_tokenizer
from tritune.trainer.open import open_model
from tritune.trainer.parallel.distributed import start

NUM, VOCAB = 5, len(byte_tokenizer())
IDS = torch.randint(5, VOCAB, (3, 20), generator=torch.Generator().manual_seed(3))
METHODS = {"prefix": PrefixConfig(num_virtual_tokens=NUM), "prompt": PromptConfig(num_virtual_tokens=NUM)}
THEIRS = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
# Windows of 12 leave the prefix behind; heads of 8 are not hidden size / heads.
FAMILIES: dict[str, dict] = {
    "llama": {"num_key_value_heads": 4}, "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16}, "mistral": {"num_key_value_heads": 2, "sliding_window": 12},
    "gemma3_text": {"num_key_value_heads": 2, "sliding_window": 12, "head_dim": 8},
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*past_key_values.*:FutureWarning"
)  # PEFT's word for transformers' `cache`


def build(family: str, auto=AutoModelForCausalLM, dtype=torch.float32, **changes):
    settings = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
                "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
                "eos_token_id": 2, "initializer_range": 0.3, **FAMILIES[family], **changes}  # fmt: skip
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(family, **settings), dtype=dtype)


def values(method: str, model) -> torch.Tensor:
    return joined(model, whole) if method == "prefix" else virtual_tokens(model).weight


def gradients(method: str, model) -> torch.Tensor:
    if method == "prompt":
        return virtual_tokens(model).weight.grad
    return torch.stack([p.grad for layer in prefixes(model) for p in (layer.key, layer.value)], dim=1).flatten(1)


def both(method: str, family: str):
    """PEFT's model as it begins, and ours with its values."""
    ours = build(family)
    theirs = peft.get_peft_model(copy.deepcopy(ours), THEIRS[method](task_type="CAUSAL_LM", num_virtual_tokens=NUM))
    METHODS[method].attach(ours, [], 0, ())
    begun = theirs.get_prompt_embedding_to_save("default")
    if method == "prefix":
        split(ours, begun)
    else:
        virtual_tokens(ours).take(begun)
    return ours, theirs, theirs.prompt_encoder["default"].embedding.weight


def their_loss(theirs, ids):
    logits = theirs(input_ids=ids).logits[:, -ids.shape[1] :]
    return logits, torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize(
    ("method", "family"), [*(("prefix", f) for f in FAMILIES), ("prompt", "llama"), ("prompt", "gemma3_text")]
)
def test_it_computes_and_learns_what_peft_does(method, family):
    ours, theirs, parameter = both(method, family)
    scorer = TokenScorer(ours, None, 0, 7)
    logits, expected = their_loss(theirs, IDS)
    assert torch.allclose(scorer.logits(IDS), logits, rtol=1e-5, atol=1e-5)
    loss = scorer(rows_of(IDS), "token_nll").mean()
    for x in (loss, expected):
        x.backward()
    assert float((gradients(method, ours) - parameter.grad).abs().max()) <= 1e-5
    assert float(parameter.grad.abs().max()) > 1e-3
    assert not any(p.grad is not None for n, p in ours.named_parameters() if not p.requires_grad)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (ours, theirs)]
    curve = []
    for step in range(10):
        pair = scorer(rows_of(IDS), "token_nll").mean(), their_loss(theirs, IDS)[1]
        for optimizer, x in zip(optimizers, pair, strict=True):
            optimizer.zero_grad()
            x.backward()
            optimizer.step()
        curve.append(pair[1].item())
        assert pair[0].item() == pytest.approx(pair[1].item(), rel=1e-4), step
    assert curve[-1] < 0.99 * curve[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("base")
    build("llama", num_key_value_heads=2).save_pretrained(where)
    byte_tokenizer().save_pretrained(where)
    return where


def read(adapter: Path):
    return open_model(Config(model=ModelConfig(path=str(adapter))), None, start(BackendConfig(), False))


@torch.no_grad()
def of_tokens(model) -> torch.Tensor:
    logits = model.eval()(input_ids=IDS).logits
    return logits[:, -IDS.shape[1] :] if logits.dim() == 3 else logits


def peft_opens(base: Path, adapter: Path, auto=AutoModelForCausalLM, **options) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return of_tokens(peft.PeftModel.from_pretrained(auto.from_pretrained(base, **options), adapter))


@pytest.mark.parametrize("method", METHODS)
def test_peft_opens_what_is_written_and_so_do_we(base, tmp_path, method):
    model = AutoModelForCausalLM.from_pretrained(base)
    METHODS[method].attach(model, [], 4, ())
    save_adapter(tmp_path / "a", METHODS[method], model, [], str(base))
    assert torch.equal(
        load_file(tmp_path / "a" / "adapter_model.safetensors")["prompt_embeddings"], values(method, model)
    )
    expected = of_tokens(model)
    assert torch.allclose(peft_opens(base, tmp_path / "a"), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(of_tokens(read(tmp_path / "a").model), expected)
    assert not torch.allclose(of_tokens(AutoModelForCausalLM.from_pretrained(base)), expected, atol=0.1)


def as_peft_asks(forward):
    """PEFT 0.21 asks a classifier's forward for `past_key_values`, which transformers calls `cache` since 5.24."""

    def asked(self, input_ids=None, past_key_values=None, **given):
        return forward(self, input_ids=input_ids, past_key_values=past_key_values, **given)

    return asked


@pytest.mark.parametrize("method", METHODS)
def test_a_classifier_s_head_goes_with_it(base, tmp_path, monkeypatch, method):
    options = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}}
    model = AutoModelForSequenceClassification.from_pretrained(base, **options)
    METHODS[method].attach(model, ["score"], 4, ())
    save_adapter(tmp_path / "a", METHODS[method], model, ["score"], str(base))
    (tmp_path / "a" / "labels.json").write_text(json.dumps(["a", "b", "c"]))
    expected = of_tokens(model)
    monkeypatch.setattr(LlamaForSequenceClassification, "forward", as_peft_asks(LlamaForSequenceClassification.forward))
    found = peft_opens(base, tmp_path / "a", AutoModelForSequenceClassification, **options)
    monkeypatch.undo()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    opened = read(tmp_path / "a")
    assert opened.labels == ["a", "b", "c"]
    assert torch.equal(of_tokens(opened.model), expected)


@pytest.mark.parametrize("method", METHODS)
def test_we_open_what_peft_writes(base, tmp_path, method):
    torch.manual_seed(1)
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": NUM}
    if method == "prefix":  # the file holds what the projection makes
        settings |= {"prefix_projection": True, "encoder_hidden_size": 12}
    else:
        settings |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "hi", "tokenizer_name_or_path": str(base)}
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), THEIRS[method](**settings))
    expected = of_tokens(theirs)
    theirs.save_pretrained(tmp_path / "a")
    assert torch.allclose(of_tokens(read(tmp_path / "a").model), expected, rtol=1e-5, atol=1e-5)


def written(base: Path, where: Path, method: str, change) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    METHODS[method].attach(model, [], 4, ())
    save_adapter(where, METHODS[method], model, [], str(base))
    settings = json.loads((where / "adapter_config.json").read_text())
    tensors = load_file(where / "adapter_model.safetensors")
    change(settings, tensors)
    (where / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, where / "adapter_model.safetensors")
    return where


@pytest.mark.parametrize(("change", "said"), [
    (lambda s, t: s.update(num_virtual_tokens=0), "num_virtual_tokens=0, and it is a whole number above 0"),
    (lambda s, t: s.update(num_virtual_tokens=True), "num_virtual_tokens=True"),
    (lambda s, t: s.update(num_virtual_tokens=NUM + 1), r"prompt_embeddings does not fit its base: it is \[5"),
    (lambda s, t: s.update(num_transformer_submodules=2), "with num_transformer_submodules"),
    (lambda s, t: s.update(of_the_future=1), "adapter with of_the_future"),
    (lambda s, t: s.update(peft_type="P_TUNING"), "it is a P_TUNING adapter"),
    (lambda s, t: t.update(prompt_embeddings=t["prompt_embeddings"][:, 1:].contiguous()), "does not fit its base"),
    (lambda s, t: t.update(other=t.pop("prompt_embeddings")), "its file holds no prompt_embeddings"),
    (lambda s, t: t.update({"base_model.score.weight": torch.ones(2)}), r"base_model.score.weight \[2\] has no place"),
    (lambda s, t: t["prompt_embeddings"].fill_(float("nan")), "holds NaN or Inf"),
])  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_a_file_that_is_wrong_is_refused(base, tmp_path, method, change, said):
    adapter = written(base, tmp_path / "a", method, change)
    with pytest.raises(InputError, match=said) as raised:
        read(adapter)
    assert raised.value.remedy


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("words", "said"), [
    (["export.form=merged"], "is no change of the base's weights and cannot be merged into them. Use adapter"),
    (["export.form=full"], "trains an adapter: adapter"),
    (["method.num_virtual_tokens=0"], "method.num_virtual_tokens=0: it must be at least 1"),
    (["export.enabled=true"], "is written beside its base, and one with random weights is nowhere to be loaded"),
    (["method.num_virtual_tokens=9000"], "positions, and none is left for text. Use at most a tenth"),
    (["model.config.max_position_embeddings=164"], "a context of 164 tokens, and the method takes 5. Use 159 or less"),
])  # fmt: skip
def test_what_cannot_be_is_refused(tiny, tritune, tmp_path, method, words, said):
    refused = tritune(*tiny, f"method={method}", "method.num_virtual_tokens=5", f"run.dir={tmp_path}/run", *words)
    assert refused.code == 2
    assert said in " ".join(refused.err.split())
    assert "Traceback" not in refused.err


@pytest.mark.slow
@pytest.mark.parametrize(("method", "objective"), [(m, o) for m in METHODS for o in ("sft", "classify")])
def test_it_trains_is_exported_and_is_read_again(tritune, tmp_path, label_file, capfd, method, objective):
    harness.write_prompts(tmp_path / "rows.jsonl", 40, seed=3)
    run, data = tmp_path / "run", label_file if objective == "classify" else tmp_path / "rows.jsonl"
    done = tritune(
        f"model.path={harness.save_small_llama(tmp_path / 'model', 160)}", f"method={method}", "optim.lr=2e-2",
        f"data.train={data}", "data.max_length=140", "method.num_virtual_tokens=6", f"objective={objective}",
        "backend.device=cpu", "train.batch_size=8", "train.max_steps=4", f"run.dir={run}", "data.packing=best_fit",
        "train.activation_checkpointing=full", "report.enabled=false",
    )  # fmt: skip
    assert done.code == 0, done.err
    exported = json.loads((run / "summary.json").read_text())["export"]
    assert exported["form"] == "adapter"
    assert exported["max_difference"] <= exported["allowed"]
    figures = []
    for which in (f"run.dir={run}", f"model.path={run}/export"):
        capfd.readouterr()
        words = [f"data.test={data}", "evaluation.splits=[test]", "backend.device=cpu", which]
        words += ["data.max_length=140"] if "export" in which else []  # a run knows its own
        assert cli.main(["evaluate", *words]) == 0
        figures.append([line for line in capfd.readouterr().out.splitlines() if "loss" in line])
    assert len(figures[0]) == 1
    assert figures[0] == figures[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_sharding_trains_the_same_and_goes_on_in_another(tmp_path, method):
    harness.write_prompts(tmp_path / "rows.jsonl", 60, seed=3)
    argv = [f"model.path={harness.save_small_llama(tmp_path / 'model', 160)}", f"method={method}", "optim.lr=2e-2",
            f"data.train={tmp_path / 'rows.jsonl'}", "data.max_length=150", "method.num_virtual_tokens=6",
            "backend.device=cpu", "launch.num_procs=2", "train.batch_size=12", "train.micro_batch_size=3",
            "data.packing=best_fit", "verify.steps=6"]  # fmt: skip
    proof = ["verify.parameters_every=3", "verify.backends=[fsdp,zero3]", f"run.dir={tmp_path / 'proof'}"]
    assert verify(["parity", *argv, *proof]) == 0
    found = json.loads((tmp_path / "proof" / "parity.json").read_text())
    assert found["holds"]
    assert found["reference"][-1]["loss"] < found["reference"][0]["loss"]
    resumed = ["backend=fsdp", "verify.to_backend=zero3", "verify.to_procs=1", f"run.dir={tmp_path / 'resumed'}"]
    assert verify(["resume", *argv, *resumed]) == 0
