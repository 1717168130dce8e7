"""Exports load in plain transformers and in PEFT, and compute what was trained. None of this uses the exporter's own check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from tritune.launch.cli import main as cli
from tritune.trainer.config import ModelConfig
from tritune.trainer.config.backends import BackendConfig
from tritune.trainer.config.compose import load_config
from tritune.trainer.export.check import probe_ids
from tritune.trainer.model.tokenizer import byte_tokenizer, load_tokenizer
from tritune.trainer.open import open_model
from tritune.trainer.parallel.distributed import start

ADDED = ["<tool>", "<think>"]
TEMPLATE = (
    "{%- for m in messages -%}{{- '[' + m['role'] + '] ' -}}{%- if m['role'] == 'assistant' -%}"
    "{%- generation -%}{{- m['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- m['content'] + '\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '[assistant] ' -}}{%- endif -%}\n"
)
FAMILIES = {
    "phi3": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0,
               "attn_logit_softcapping": 2.0, "sliding_window": 16},
}  # fmt: skip


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def base_folder(where: Path, family: str) -> Path:
    """A random model with its tokenizer, saved as Hugging Face does; logits of a size at which faults show."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(1)
    settings = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
                "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings, **FAMILIES[family]))
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture
def base(request, tmp_path, shared) -> Path:
    if request.param == "stories260K":
        return shared / "models" / "stories260K"
    return base_folder(tmp_path / "base", request.param)


@pytest.fixture
def common(sft_file, tmp_path) -> list[str]:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    return [
        f"data.train={sft_file}", "data.max_length=128", "train.batch_size=8", "train.max_steps=4", "optim.lr=2e-2",
        "optim.schedule=constant", "optim.warmup_ratio=0", "backend.device=cpu", "report.enabled=false",
        "evaluation.samples=0", f"model.add_tokens={ADDED}", f"model.chat_template={tmp_path}/chat.jinja",
    ]  # fmt: skip


def attention(base: Path) -> list[str]:
    """Gemma 2 caps its attention scores, which only eager attention does."""
    return ["model.attention=eager"] if AutoConfig.from_pretrained(base).model_type == "gemma2" else []


def opened(run: Path):
    """The run's checkpoint, with the layers it was trained with."""
    kept = yaml.safe_load((run / "config.yaml").read_text())
    config = load_config([f"run.dir={run}"], kept=kept, training=False)
    return open_model(config, run, start(BackendConfig(), False))


def probe(vocab: int) -> torch.Tensor:
    """Rows that no code under test chose; the added tokens are among them."""
    ids = torch.randint(5, vocab, (3, 21), generator=torch.Generator().manual_seed(99))
    ids[:, -1] = vocab - 1
    ids[:, 5] = vocab - 2
    return ids


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


def require_equal(found: torch.Tensor, trained: torch.Tensor, untouched: torch.Tensor) -> None:
    """1e-5 of the largest logit, as asked; and training must have moved it by much more."""
    scale = max(float(trained.abs().max()), 1.0)
    assert float((trained - untouched).abs().max()) > 1000 * 1e-5 * scale
    assert found.shape == trained.shape
    assert float((found - trained).abs().max()) <= 1e-5 * scale


def resized_base(base: Path, size: int):
    """What a user of the adapter does: load the base and make room for the added tokens, whose rows start anyhow."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1234)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def check_tokenizer(folder: Path, base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = AutoTokenizer.from_pretrained(base)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.get_vocab() == {**before.get_vocab(), **{t: len(before) + i for i, t in enumerate(ADDED)}}
    text = f"The cat {ADDED[0]} sat {ADDED[1]}\n"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(len(before)) == ids.count(len(before) + 1) == 1
    generation = json.loads((folder / "generation_config.json").read_text())
    stops = generation["eos_token_id"]
    assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    assert tokenizer.pad_token_id not in (stops if isinstance(stops, list) else [stops])


def check_card(folder: Path, base: Path, data: Path, library: str) -> None:
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert text.startswith("---\n")
    assert front["library_name"] == library
    assert front["base_model"] == base.name
    assert front["pipeline_tag"] == "text-generation"
    assert str(data.parent) not in text, "no paths of this machine"
    assert data.name in text


def check_whole(folder: Path, base: Path, run: Path, merged: bool) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    trained = opened(run)
    tied = AutoConfig.from_pretrained(base).tie_word_embeddings
    assert model.config.tie_word_embeddings == tied
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    names = {n for file in folder.glob("*.safetensors") for n in load_file(file)}
    assert not any("lora" in n or "base_layer" in n for n in names)
    assert ("lm_head.weight" in names) != tied, "a tied matrix is written once"
    assert model.config.use_cache is True
    size = len(trained.tokenizer)
    assert model.config.vocab_size == size
    ids = probe(size)
    require_equal(logits(model, ids), logits(trained.model, ids), logits(resized_base(base, size), ids))
    assert not (folder / "adapter_config.json").exists()
    assert merged == (trained.config.method.name == "lora")


@pytest.mark.parametrize("base", [slow("stories260K"), slow("qwen3"), "phi3", "gemma2"], indirect=True)
def test_full(tritune, common, base, sft_file, tmp_path):
    run = tmp_path / "run"
    result = tritune(*common, *attention(base), f"model.path={base}", f"run.dir={run}")
    assert result.code == 0, result.err
    check_whole(run / "export", base, run, merged=False)
    check_tokenizer(run / "export", base)
    check_card(run / "export", base, sft_file, "transformers")
    said = json.loads((run / "summary.json").read_text())["export"]
    assert said["form"] == "full"
    assert said["num_bytes"] == sum(p.stat().st_size for p in (run / "export").glob("*.safetensors"))
    assert said["max_difference"] <= said["allowed"]


@pytest.mark.parametrize("base", ["stories260K", "qwen3", slow("phi3"), slow("gemma2")], indirect=True)
def test_adapter_and_merged(tritune, common, base, sft_file, tmp_path, capfd):
    run = tmp_path / "run"
    lora = ["method=lora", "method.rank=4", "method.alpha=10", "method.modules_to_save=[embed_tokens,lm_head]"]
    result = tritune(*common, *attention(base), *lora, f"model.path={base}", f"run.dir={run}")
    assert result.code == 0, result.err
    folder = run / "export"
    assert json.loads((run / "summary.json").read_text())["export"]["form"] == "adapter"
    check_tokenizer(folder, base)
    check_card(folder, base, sft_file, "peft")
    trained, ids = opened(run), None
    size = len(trained.tokenizer)
    ids = probe(size)
    peft = PeftModel.from_pretrained(resized_base(base, size), folder)
    untouched = logits(resized_base(base, size), ids)
    require_equal(logits(peft, ids), logits(trained.model, ids), untouched)

    merged = tmp_path / "merged"
    code = cli(["export", f"run.dir={run}", "export.form=merged", f"export.dir={merged}"])
    assert code == 0, capfd.readouterr().err
    check_whole(merged, base, run, merged=True)
    check_tokenizer(merged, base)
    check_card(merged, base, sft_file, "transformers")
    assert (folder / "adapter_config.json").is_file(), "the other export is left as it was"


@pytest.mark.slow
def test_merged_by_hand(tritune, common, shared, tmp_path):
    """W + alpha / rank * B A in float64, from the checkpoint's own tensors."""
    base, run = shared / "models" / "stories260K", tmp_path / "run"
    plain = [o for o in common if not o.startswith("model.")]
    lora = ["method=lora", "method.rank=3", "method.alpha=7", "export.form=merged"]
    assert tritune(*plain, *lora, f"model.path={base}", f"run.dir={run}").code == 0
    saved: dict[str, torch.Tensor] = {}
    for file in (run / "checkpoints" / "step-00000004").glob("*.safetensors"):
        saved |= load_file(file)
    before, after = load_file(base / "model.safetensors"), load_file(run / "export" / "model.safetensors")
    assert after.keys() == before.keys()
    moved = 0
    for name, weight in before.items():
        owner = name.removesuffix(".weight")
        a, b = saved.get(f"model.{owner}.lora_A"), saved.get(f"model.{owner}.lora_B")  # stored flat
        expected = weight.double()
        if a is not None:
            expected = expected + 7 / 3 * b.double().view(-1, 3) @ a.double().view(3, -1)
            assert float((expected - weight).abs().max()) > 1e-3
            moved += 1
        assert after[name].dtype == torch.float32
        torch.testing.assert_close(after[name].double(), expected, rtol=3e-7, atol=3e-7)
    assert moved == 5 * 7


def test_shards_and_their_index(tritune, common, tmp_path):
    base, run = base_folder(tmp_path / "base", "qwen3"), tmp_path / "run"
    result = tritune(*common, f"model.path={base}", f"run.dir={run}", "export.shard_gb=2e-5")
    assert result.code == 0, result.err
    index = json.loads((run / "export" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (run / "export").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert not (run / "export" / "model.safetensors").exists()
    check_whole(run / "export", base, run, merged=False)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("full", "float32"), ("adapter", "bfloat16"), slow("merged", "bfloat16"),
     slow("full", "bfloat16"), slow("adapter", "float32"), slow("merged", "float32")],
)  # fmt: skip
def test_verb_writes_what_the_run_wrote(tritune, common, sft_file, tmp_path, capfd, form, dtype):
    """`tritune export run.dir=` afterwards: the same files, to the last bit of weights and the last setting."""
    base, run, again = base_folder(tmp_path / "base", "qwen3"), tmp_path / "run", tmp_path / "again"
    plain = [o for o in common if not o.startswith("model.")]  # the tokenizer's own ChatML: it has a second stop token
    lora = [] if form == "full" else ["method=lora", "method.rank=4"]
    options = [*lora, f"model.dtype={dtype}", f"export.form={form}", f"model.path={base}"]
    result = tritune(*plain, *options, f"run.dir={run}")
    assert result.code == 0, result.err
    assert cli(["export", f"run.dir={run}", f"export.dir={again}"]) == 0, capfd.readouterr().err
    first, second = run / "export", again
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for name in (p.name for p in first.glob("*.safetensors")):
        ours, theirs = load_file(first / name), load_file(second / name)
        assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
        assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    if form != "adapter":
        assert AutoModelForCausalLM.from_pretrained(first).dtype == getattr(torch, dtype)
    settings = {p.name: json.loads(p.read_text()) for p in first.glob("*.json")}
    assert [n for n, s in settings.items() if s != json.loads((second / n).read_text())] == []


@pytest.mark.slow
def test_float32_export_of_a_bfloat16_run_keeps_the_masters(tritune, common, tmp_path, capfd):
    base, run, again = base_folder(tmp_path / "base", "qwen3"), tmp_path / "run", tmp_path / "again"
    options = ["model.dtype=bfloat16", "export.dtype=float32", f"model.path={base}", f"run.dir={run}"]
    result = tritune(*common, *options)
    assert result.code == 0, result.err
    saved: dict[str, torch.Tensor] = {}
    for file in (run / "checkpoints" / "step-00000004").glob("*.safetensors"):
        saved |= load_file(file)
    assert cli(["export", f"run.dir={run}", f"export.dir={again}"]) == 0, capfd.readouterr().err
    for folder in (run / "export", again):
        for name, weight in load_file(folder / "model.safetensors").items():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, saved[f"model.{name}"].view(weight.shape)), (folder.name, name)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_classifier(tritune, label_file, tmp_path, capfd, method):
    base, run = base_folder(tmp_path / "base", "qwen3"), tmp_path / "run"
    options = ["objective=classify", f"data.train={label_file}", f"model.path={base}", f"method={method}"]
    options += ["train.max_steps=6", "train.batch_size=16", "optim.lr=2e-2", "data.max_length=96", "seed=5"]
    options += ["backend.device=cpu", "report.enabled=false", "optim.warmup_ratio=0", f"run.dir={run}"]
    result = tritune(*options)
    assert result.code == 0, result.err
    folder, trained = run / "export", opened(run)
    ids = probe(261)

    def stock(path):
        torch.manual_seed(77)  # another head than the run began with
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, pad_token_id=0)

    untouched = logits(stock(base), ids)
    if method == "full":
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
        assert model.config.label2id == {"blue": 0, "green": 1, "red": 2}
        assert model.config.architectures == ["Qwen3ForSequenceClassification"]
    else:
        assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
        model = PeftModel.from_pretrained(stock(base), folder)
        assert json.loads((folder / "labels.json").read_text()) == ["blue", "green", "red"]
    require_equal(logits(model, ids), logits(trained.model, ids), untouched)
    front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert front["pipeline_tag"] == "text-classification"


@pytest.mark.slow
def test_a_full_classifiers_names_stand_in_its_config(tritune, label_file, tmp_path):
    """Labels that need care: the order is the run's, not the alphabet's, and JSON keeps them."""
    base, run = base_folder(tmp_path / "base", "qwen3"), tmp_path / "run"
    data = tmp_path / "odd.jsonl"
    names = {"red": 'r"ed, "', "green": "grün", "blue": "blue/1"}
    rows = [json.loads(line) for line in label_file.read_text().splitlines()[:60]]
    data.write_text("\n".join(json.dumps({**r, "label": names[r["label"]]}) for r in rows))
    order = json.dumps([names[n] for n in ("red", "blue", "green")], ensure_ascii=False)
    options = ["objective=classify", f"data.train={data}", f"model.path={base}", f"run.dir={run}", "optim.lr=2e-2",
               "train.max_steps=2", "data.max_length=96", "backend.device=cpu", "report.enabled=false"]  # fmt: skip
    quoted = "data.labels=[" + ",".join(f"'{n}'" for n in json.loads(order)) + "]"
    result = tritune(*options, quoted)
    assert result.code == 0, result.err
    config = AutoConfig.from_pretrained(run / "export")
    assert config.id2label == {0: names["red"], 1: names["blue"], 2: names["green"]}


def test_added_tokens_are_found_wherever_they_stand(shared):
    """A Llama tokenizer puts a blank before a text: what is matched after that is found behind a blank alone."""
    for folder in ("models/stories260K", "models/tinystories-656k", "tokenizers/phi-3-mini"):
        tokenizer = load_tokenizer(ModelConfig(path=str(shared / folder), add_tokens=ADDED))
        one, two = tokenizer.convert_tokens_to_ids(ADDED)
        for text in (f"a {ADDED[0]} b", f"a{ADDED[0]}b", f"x.{ADDED[0]}{ADDED[1]}\n"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids.count(one) == 1, (folder, text)
            assert ids.count(two) == text.count(ADDED[1]), (folder, text)


@pytest.mark.parametrize("words", [2, 5, 40])
def test_the_tokens_of_the_comparison_are_the_tokenizers(words):
    """Also of one with fewer tokens than the last ones that are always tried."""
    vocab = {f"w{i}": i for i in range(words)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, "w0")), pad_token="w1")
    config = AutoConfig.for_model("llama", vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                  num_attention_heads=1, num_key_value_heads=1)  # fmt: skip
    ids = probe_ids(AutoModelForCausalLM.from_config(config), tokenizer)
    assert ids.shape == (2, 32)
    assert int(ids.min()) >= 0
    assert int(ids.max()) == words - 1 - (words == 2)
