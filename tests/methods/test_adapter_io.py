"""What we export loads elsewhere and computes the same: adapters in PEFT, whole models in plain transformers."""

from __future__ import annotations

import json
import warnings

import harness
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from tritune.trainer.build import require_trained_embeddings
from tritune.trainer.config import Config, ModelConfig
from tritune.trainer.config.choices import Bias, Dtype
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.loader import collate
from tritune.trainer.errors import InputError
from tritune.trainer.export import Source, export
from tritune.trainer.methods.adapter_io import save_adapter
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.full import FullConfig
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.lora_layers import lora_layers
from tritune.trainer.model.load import is_tied, load_architecture, load_model
from tritune.trainer.model.scorer import TokenScorer
from tritune.trainer.model.tokenizer import byte_tokenizer, choose_pad_token, load_tokenizer, stop_token_ids
from tritune.trainer.objectives.classes import Classes

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # asked for; float32 sums of a few hundred terms in another order leave about 1e-6


def rows(vocab: int, num_labels: int = 3, lengths=(12, 5, 20, 9)) -> Examples:
    g = torch.Generator().manual_seed(0)
    result = harness.Rows()
    for i, n in enumerate(lengths):
        ids = torch.randint(3, vocab, (n,), generator=g).tolist()
        result.add(ids, [True] * n, f"row {i}", label=i % num_labels)
    return result.freeze()


def train(model, keys, vocab, classify=None, steps=6, lr=0.02):
    """A few steps of plain AdamW over the scorer: enough that every B, bias and saved module has moved."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    scorer, data = TokenScorer(model, keys, 0, 64).train(), rows(vocab)
    for step in range(steps):
        batch = collate(data, range(4), 0, step)
        optimizer.zero_grad()
        loss = classify(scorer, batch).terms["nll"] if classify else scorer(batch, "token_nll").mean()
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    assert all(layer.lora_B.abs().min(dim=1).values.max() > 0 for layer in lora_layers(model).values())
    return model.eval()


def logits(model, vocab):
    batch = collate(rows(vocab), range(4), 0)
    mask = (torch.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]).long()
    with torch.no_grad():
        out = model(input_ids=batch.input_ids, attention_mask=mask).logits
    return out[mask.bool()] if out.ndim == 3 else out


def load_in_peft(base, adapter):
    """PEFT's loader; it only warns when keys are missing, and that is a failure here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("error", message=".*unexpected.*keys.*")
        return PeftModel.from_pretrained(base, adapter).eval()


def check_in_peft(config: LoraConfig, model, base_dir, tmp_path, vocab, heads=(), auto=AutoModelForCausalLM, **options):
    """Train `model`, save, load with PEFT on the base from disk, compare; return PEFT's model and the saved tensors."""
    keys = apply_method(config, model, list(heads), 0)
    base = auto.from_pretrained(base_dir, **options).eval()
    train(model, keys, vocab, Classes(3) if heads else None)
    size = save_adapter(tmp_path / "adapter", config, model, list(heads), str(base_dir))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert size == file.stat().st_size
    ours = logits(model, vocab)
    untouched = logits(base, vocab)
    assert (ours - untouched).abs().max() > 0.01, "training must have changed what is compared"
    peft = load_in_peft(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(peft, vocab), ours, **CLOSE)
    return peft, load_file(file)


def tiny(tmp_path, model_type="qwen2", tied=False, auto=AutoModelForCausalLM, **changes):
    """A random base on disk, biases not zero, and the same model again to adapt."""
    settings = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": tied, "pad_token_id": 0,
        "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(model_type, **settings, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


def test_stories_all_linear(shared, tmp_path):
    base = shared / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft, tensors = check_in_peft(LoraConfig(rank=4, alpha=8.0), model, base, tmp_path, 512, dtype=torch.float32)
    assert len(tensors) == 5 * 7 * 2
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert len(settings["target_modules"]) == 7, "short names where these are enough"
    merged = peft.merge_and_unload()
    # merged in float32, W + s B A is rounded once more: relative 6e-8 of weights, over 5 layers
    torch.testing.assert_close(logits(merged, 512), logits(model, 512), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"], ["input_layernorm", "norm"]]
)
def test_modules_to_save_on_an_untied_model(saved, tmp_path):
    model, base = tiny(tmp_path)
    _, tensors = check_in_peft(LoraConfig(rank=2, alpha=4.0, modules_to_save=saved), model, base, tmp_path, 50)
    if saved == ["lm_head"]:
        assert torch.equal(tensors["base_model.model.lm_head.weight"], model.lm_head.weight)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_modules_to_save_on_a_tied_model_are_right_or_refused(saved, tmp_path):
    """One matrix with two names: saved under one of them, PEFT unties it and the other stays as it was."""
    model, base = tiny(tmp_path, tied=True)
    try:
        check_in_peft(LoraConfig(rank=2, alpha=4.0, modules_to_save=saved), model, base, tmp_path, 50)
    except InputError as error:
        assert "modules_to_save" in str(error)  # noqa: PT017


@pytest.mark.parametrize("bias", [Bias.all, Bias.lora_only])
@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "o_proj"]])
def test_biases(bias, targets, tmp_path):
    model, base = tiny(tmp_path)
    config = LoraConfig(rank=2, alpha=4.0, bias=bias, targets=targets)
    _, tensors = check_in_peft(config, model, base, tmp_path, 50)
    biased = 9 if bias is Bias.all or targets == ["all-linear"] else 3
    assert sum(n.endswith("bias") for n in tensors) == biased


def test_biases_of_norms_and_a_biased_head(tmp_path):
    """Phi has biases everywhere, the head and the norms included."""
    model, base = _phi(tmp_path)
    config = LoraConfig(rank=2, alpha=4.0, bias=Bias.all, modules_to_save=["lm_head"])
    check_in_peft(config, model, base, tmp_path, 50)


def _phi(tmp_path):
    settings = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", **settings))
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


@pytest.mark.parametrize(
    ("targets", "exclude", "count"),
    [
        (["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"], [], 2),
        (["model.layers.[02].mlp.*"], [], 6),
        (["all-linear"], ["*layers.1*", "down_proj"], 12),
        (["lm_head", "q_proj"], [], 4),
    ],
)
def test_targets_that_no_suffix_expresses(targets, exclude, count, tmp_path):
    model, base = tiny(tmp_path)
    config = LoraConfig(rank=2, alpha=4.0, targets=targets, exclude=exclude)
    peft, tensors = check_in_peft(config, model, base, tmp_path, 50)
    assert len(tensors) == 2 * count
    injected = {n for n, m in peft.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    assert {n.removeprefix("base_model.model.") for n in injected} == set(lora_layers(model))


def test_layers_ten_and_one_are_not_confused(tmp_path):
    """`layers.1.` against `layers.11.`: full names, matched by their end."""
    model, base = _deep(tmp_path)
    config = LoraConfig(rank=2, alpha=4.0, targets=["model.layers.1.*"])
    peft, _ = check_in_peft(config, model, base, tmp_path, 50)
    injected = {n for n, m in peft.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    assert len(injected) == 7
    assert all(".layers.1." in n for n in injected)


def _deep(tmp_path):
    settings = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "initializer_range": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings))
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


def test_rank_alpha_and_dropout_arrive_in_peft(tmp_path):
    model, base = tiny(tmp_path)
    config = LoraConfig(rank=3, alpha=7.5, dropout=0.25, targets=["q_proj"])
    peft, _ = check_in_peft(config, model, base, tmp_path, 50)
    theirs = peft.peft_config["default"]
    assert (theirs.r, theirs.lora_alpha, theirs.lora_dropout) == (3, 7.5, 0.25)
    assert theirs.base_model_name_or_path == str(base)
    layer = peft.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 2.5


def test_classifier_with_a_score_head(shared, tmp_path):
    """As a run does it: our loader (the checkpoint holds a tied matrix), labels, LoRA, and PEFT on a stock
    classifier."""
    path = shared / "models" / "tinystories-656k"
    settings = ModelConfig(path=str(path))
    tokenizer = load_tokenizer(settings)
    architecture = load_architecture(settings, len(tokenizer))
    choose_pad_token(tokenizer, None, stop_token_ids(tokenizer, architecture.eos_token_id))
    labels = ["no", "perhaps", "yes"]
    model = load_model(settings, architecture, tokenizer, labels, 0, torch.float32)
    config = LoraConfig(rank=4, alpha=8.0)
    keys = apply_method(config, model, ["score"], 0)
    train(model, keys, 2048, Classes(3))
    save_adapter(tmp_path / "adapter", config, model, ["score"], str(path))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.score.weight"].shape == (3, 128)

    architecture = load_architecture(settings, len(tokenizer))
    base = load_model(settings, architecture, tokenizer, labels, 99, torch.float32).eval()
    assert not torch.equal(base.score.weight, model.score.weight)
    ours, before = logits(model, 2048), logits(base, 2048)
    assert (ours - before).abs().max() > 0.01
    peft = load_in_peft(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(peft, 2048), ours, **CLOSE)

    # And without any code of ours: the stock loader, told the number of labels and the padding token. It would start
    # this
    # checkpoint's embeddings at random (they are only there as `lm_head.weight`), so the base is written again first.
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).save_pretrained(tmp_path / "base")
    stock = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, pad_token_id=tokenizer.pad_token_id
    )
    torch.testing.assert_close(logits(load_in_peft(stock, tmp_path / "adapter"), 2048), ours, **CLOSE)


def test_a_classifier_from_a_tied_checkpoint_starts_from_its_weights(shared):
    """Loaded naively, embeddings that a checkpoint holds only as `lm_head.weight` would be random."""
    for name in ("tinystories-656k", "stories260K"):
        settings = ModelConfig(path=str(shared / "models" / name))
        tokenizer = load_tokenizer(settings)
        architecture = load_architecture(settings, len(tokenizer))
        model = load_model(settings, architecture, tokenizer, ["a", "b"], 0, torch.float32)
        causal = AutoModelForCausalLM.from_pretrained(settings.path, dtype=torch.float32)
        theirs = dict(causal.base_model.named_parameters())
        ours = dict(model.base_model.named_parameters())
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), key
        assert model.config.id2label == {0: "a", 1: "b"}


# -- whole models ----------------------------------------------------------------------------------------


def full(path, **model) -> Config:
    config = Config(model=ModelConfig(path=str(path), **model))
    config.method = FullConfig()
    return config


def loaded(config: Config, labels=None):
    tokenizer = load_tokenizer(config.model)
    architecture = load_architecture(config.model, len(tokenizer))
    choose_pad_token(tokenizer, config.model.pad_token, stop_token_ids(tokenizer, architecture.eos_token_id))
    model = load_model(config.model, architecture, tokenizer, labels, 0, torch.float32)
    keys = apply_method(config.method, model, ["score"] if labels else [], 0)
    return model, tokenizer, keys


def write(directory, config, model, tokenizer, heads=()) -> int:
    """Export and return the size of the weights."""
    labels = list(model.config.id2label.values()) if heads else []
    model.eval()
    source = Source(config, model, lambda ids: model(input_ids=ids).logits, tokenizer, list(heads), labels)
    return export(source, directory, print).num_bytes


def test_full_model_loads_in_transformers_and_stays_tied(shared, tmp_path):
    config = full(shared / "models" / "stories260K")
    model, tokenizer, keys = loaded(config)
    assert is_tied(model)
    train(model, keys, 512, lr=1e-3)
    size = write(tmp_path / "out", config, model, tokenizer)
    assert size == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert size < 1.1 * 4 * sum(p.numel() for p in model.parameters()), "the tied matrix is written once"
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.config.use_cache is True
    torch.testing.assert_close(logits(again.eval(), 512), logits(model, 512), rtol=0, atol=0)
    text = "Once upon a time, there was a little girl"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert not list(tmp_path.glob(".partial*"))


def test_a_bfloat16_export_writes_the_tied_matrix_once(shared, tmp_path):
    config = full(shared / "models" / "stories260K", dtype=Dtype.bfloat16)
    model, tokenizer, _ = loaded(config)
    size = write(tmp_path / "out", config, model, tokenizer)
    assert size < 1.1 * 2 * sum(p.numel() for p in model.parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert again.lm_head.weight is again.model.embed_tokens.weight
    for name, value in again.named_parameters():
        assert torch.equal(value, model.get_parameter(name).bfloat16()), name
    assert all(p.dtype == torch.float32 for p in model.parameters()), "the masters are left as they were"


def test_added_tokens_survive(shared, tmp_path):
    config = full(shared / "models" / "stories260K", add_tokens=["<one>", "<two>"], chat_template="chatml")
    model, tokenizer, keys = loaded(config)
    assert len(tokenizer) == 512 + 2 + 2
    assert model.get_input_embeddings().num_embeddings == 516
    assert is_tied(model)
    train(model, keys, 516, lr=1e-3)
    write(tmp_path / "out", config, model, tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    reader = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.config.vocab_size == 516
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(logits(again, 516), logits(model, 516), rtol=0, atol=0)
    text = "a <one> b <two> <|im_start|>user"
    assert reader(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert len(reader) == 516
    assert reader.convert_tokens_to_ids("<two>") == tokenizer.convert_tokens_to_ids("<two>")
    assert reader.pad_token == tokenizer.pad_token
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert reader.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )


def test_an_adapter_with_added_tokens_is_whole_or_refused(shared, tmp_path):
    """Resizing draws the new rows at random and LoRA freezes them there: unless the adapter carries them, as PEFT's own
    `save_pretrained` does for resized embeddings, nobody who resizes the base gets the model that was trained."""
    base = shared / "models" / "stories260K"
    config = Config(model=ModelConfig(path=str(base), add_tokens=["<one>"]), method=LoraConfig(rank=2, alpha=4.0))
    torch.manual_seed(0)
    try:
        model, tokenizer, keys = loaded(config)
        require_trained_embeddings(model, 1, config.method)
        train(model, keys, 513)
        write(tmp_path / "out", config, model, tokenizer)
    except InputError:
        return
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(123)
    stock.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path / "out")))
    peft = load_in_peft(stock, tmp_path / "out")
    torch.testing.assert_close(logits(peft, 513), logits(model, 513), **CLOSE)


def test_classifier_exports_whole(shared, tmp_path):
    config = full(shared / "models" / "tinystories-656k")
    model, tokenizer, keys = loaded(config, ["no", "perhaps", "yes"])
    train(model, keys, 2048, Classes(3), steps=2, lr=1e-3)
    write(tmp_path / "out", config, model, tokenizer, ["score"])
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert again.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}
    torch.testing.assert_close(logits(again, 2048), logits(model, 2048), rtol=0, atol=0)


def test_adapter_export_holds_the_tokenizer_and_replaces_what_was_there(tmp_path):
    model, base = tiny(tmp_path)
    config = Config(model=ModelConfig(path=str(base)), method=LoraConfig(rank=2, alpha=4.0))
    apply_method(config.method, model, [], 0)
    write(tmp_path / "out", config, model, byte_tokenizer())
    (tmp_path / "out" / "stale.safetensors").write_text("of an earlier export")
    size = write(tmp_path / "out", config, model, byte_tokenizer())
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    assert "stale.safetensors" not in files
    assert size == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
