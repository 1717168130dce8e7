"""A whole model's weights written one tensor after another: the files that `save_pretrained` writes of it at once."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import harness
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from tritune.launch.cli import main as cli
from tritune.trainer.config.compose import load_config
from tritune.trainer.export.stream import plan, write_tensors
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.full import FullConfig
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.lora_layers import lora_layers
from tritune.trainer.methods.states import whole
from tritune.trainer.parallel.distributed import World
from tritune.trainer.trained import source_of

ALONE = World(0, 1, torch.device("cpu"))
LARGE = 1 << 30
SETTINGS = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0}
LLAMA = {**SETTINGS, "intermediate_size": 48, "num_key_value_heads": 2}
MODELS = {
    "tied": ("llama", LLAMA | {"tie_word_embeddings": True}, AutoModelForCausalLM),
    "untied": ("llama", LLAMA | {"tie_word_embeddings": False, "attention_bias": True}, AutoModelForCausalLM),
    "gpt2": ("gpt2", SETTINGS | {"n_positions": 64}, AutoModelForCausalLM),
    "classifier": ("qwen3", LLAMA | {"head_dim": 8, "num_labels": 3}, AutoModelForSequenceClassification),
}


def made(name: str):
    family, settings, auto = MODELS[name]
    torch.manual_seed(5)
    return auto.from_config(AutoConfig.for_model(family, **settings)), auto


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("model*")}


@pytest.mark.parametrize("shard_bytes", [LARGE, 9_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_files_of_save_pretrained_byte_for_byte(tmp_path, name, loaded, dtype, shard_bytes):
    """Drawn at random or read from files, which transformers saves in another order."""
    model, auto = made(name)
    if loaded:
        model.save_pretrained(tmp_path / "base")
        model = auto.from_pretrained(tmp_path / "base")
    tied: dict[int, torch.Tensor] = {}
    state = {n: tied.setdefault(id(t), t.detach().to(dtype)) for n, t in model.state_dict(keep_vars=True).items()}
    model.save_pretrained(tmp_path / "theirs", state_dict=state, max_shard_size=shard_bytes)
    ours, method = tmp_path / "ours", FullConfig()
    ours.mkdir()
    planned = plan(model, method.whole_shapes(model), dtype, shard_bytes)
    size = write_tensors(ours, planned, method.whole_tensors(model, dtype, whole, print))
    assert weights(ours) == weights(tmp_path / "theirs")
    assert size == sum(len(b) for n, b in weights(ours).items() if n.endswith(".safetensors"))
    assert len(weights(ours)) == (1 if shard_bytes == LARGE else len(planned.headers) + 1)


def test_each_tensor_is_let_go_before_the_next_is_made(tmp_path):
    import weakref

    model, _ = made("untied")
    method, alive = FullConfig(), []

    def watched(tensor):
        assert [a for a in alive if a() is not None] == []
        copy = whole(tensor).clone()
        alive.append(weakref.ref(copy.untyped_storage()))
        return copy

    planned = plan(model, method.whole_shapes(model), torch.float32, LARGE)
    write_tensors(tmp_path, planned, method.whole_tensors(model, torch.float32, watched, print))
    assert len(alive) == len(planned.places)


def test_merging_holds_one_tensor(tmp_path):
    """W + s B A of every layer, computed here in float64; the base's other tensors as they were."""
    model, _ = made("untied")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    method = LoraConfig(rank=3, alpha=5.0)
    apply_method(method, model, [], 0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    planned = plan(model, method.whole_shapes(model), torch.float32, LARGE)
    write_tensors(tmp_path, planned, method.whole_tensors(model, torch.float32, whole, print))
    found, layers = load_file(tmp_path / "model.safetensors"), lora_layers(model)
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or name.endswith(".bias"):
            assert torch.equal(found[name], tensor), name
        else:
            update = 5 / 3 * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
            torch.testing.assert_close(found[name].double(), tensor.double() + update, rtol=1e-6, atol=1e-6)


def test_what_did_not_come_or_came_otherwise_is_an_error(tmp_path):
    model, _ = made("untied")
    planned = plan(model, FullConfig().whole_shapes(model), torch.float32, LARGE)
    tensors = dict(FullConfig().whole_tensors(model, torch.float32, whole, print))
    with pytest.raises(ValueError, match=r"1 tensor\(s\) did not come, model.norm.weight"):
        write_tensors(tmp_path, planned, [(n, t) for n, t in tensors.items() if n != "model.norm.weight"])
    with pytest.raises(ValueError, match="bfloat16"):
        write_tensors(tmp_path, planned, [(n, t.bfloat16()) for n, t in tensors.items()])


def test_a_family_whose_files_hold_other_tensors_is_saved_by_transformers():
    """Mixtral's experts are one tensor in memory, and one each in its files."""
    config = AutoConfig.for_model("mixtral", **LLAMA, num_local_experts=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert plan(model, FullConfig().whole_shapes(model), torch.float32, LARGE) is None


# -- what a run trained, read from its files -------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return harness.save_small_llama(tmp_path_factory.mktemp("base"), 256)


@pytest.fixture
def common(sft_file, base) -> list[str]:
    return [
        f"data.train={sft_file}", f"model.path={base}", "data.max_length=128", "train.batch_size=8", "train.max_steps=2",
        "optim.lr=2e-2", "optim.warmup_ratio=0", "backend.device=cpu", "report.enabled=false", "evaluation.samples=0",
    ]  # fmt: skip


def source(run: Path):
    kept = yaml.safe_load((run / "config.yaml").read_text())
    return source_of(load_config([f"run.dir={run}"], kept=kept, training=False), run, ALONE, {})


def trained(run: Path) -> dict[str, torch.Tensor]:
    """The state dict of the model that the run trained, with its method's layers, as it is opened whole."""
    from tritune.trainer.open import open_model

    kept = yaml.safe_load((run / "config.yaml").read_text())
    config = load_config([f"run.dir={run}"], kept=kept, training=False)
    return open_model(config, run, ALONE, settle=False).model.state_dict()


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("full", "bfloat16"),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in (("full", "float32"), ("lora", "bfloat16"))),
    ],
)
def test_an_export_reads_one_tensor_at_a_time(tritune, common, tmp_path, method, dtype):
    """FSDP holds shards: the export of a run is made of its files, and the model of it has no values."""
    run = tmp_path / "run"
    form = "merged" if method == "lora" else "full"
    options = [
        f"method={method}",
        f"export.form={form}",
        "backend=fsdp",
        f"model.dtype={dtype}",
        "export.shard_gb=2e-5",
    ]
    result = tritune(*common, *options, f"run.dir={run}")
    assert result.code == 0, result.err
    found = source(run)
    assert {p.device.type for p in found.model.parameters()} == {"meta"}
    expected = trained(run)
    for name, tensor in found.model.state_dict(keep_vars=True).items():
        assert torch.equal(found.read(tensor), expected[name]), name
    assert len(list((run / "export").glob("model-*.safetensors"))) > 2
    stock = AutoModelForCausalLM.from_pretrained(run / "export").state_dict()
    if method == "full":
        for name, tensor in stock.items():
            assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert {t.dtype for t in stock.values()} == {getattr(torch, dtype)}
    index = json.loads((run / "export" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"], "it is one matrix with the embeddings"


def test_a_disk_that_is_full_half_way_leaves_nothing(tritune, common, tmp_path, capfd):
    """The kernel itself refuses the write that goes beyond so many bytes of a file."""
    run, target = tmp_path / "run", tmp_path / "out" / "export"
    assert tritune(*common, "method=full", f"run.dir={run}").code == 0
    limit = (run / "export" / "model.safetensors").stat().st_size * 2 // 3
    capfd.readouterr()
    kept, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, kept[1]))
    try:
        code = cli(["export", f"run.dir={run}", f"export.dir={target}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 1
    assert list(target.parent.iterdir()) == []
    assert "model.safetensors" in capfd.readouterr().err


@pytest.mark.slow
def test_two_ranks_export_what_their_shards_hold(common, tmp_path):
    """Rows on FSDP, runs of elements on ZeRO, which are up to three boxes of a matrix: each tensor comes whole, and the
    same bytes from every layout as when the run's model is opened whole."""
    cells = {
        name: [*common, "method=full", "model.dtype=bfloat16", f"backend={name}", f"run.dir={tmp_path / name}"]
        for name in ("fsdp", "zero3")
    }
    harness.run_many(list(cells.values()), tmp_path / "logs", world_size=2)
    for name in cells:
        run = tmp_path / name
        found, expected = source(run), trained(run)
        boxes = found.model.state_dict(keep_vars=True)
        assert all(torch.equal(found.read(tensor), expected[key]) for key, tensor in boxes.items()), name
        stock = AutoModelForCausalLM.from_pretrained(run / "export").state_dict()
        assert all(torch.equal(tensor, expected[key].to(tensor.dtype)) for key, tensor in stock.items()), name


@pytest.mark.slow
def test_the_memory_of_an_export_is_that_of_a_tensor(tmp_path):
    """A model of 400 MB of which the largest tensor has 33 MB is written with less than three such tensors in memory, where
    `save_pretrained` of the state in another dtype needs all of it."""
    config = AutoConfig.for_model("llama", **LLAMA | {"hidden_size": 1024, "intermediate_size": 8192, "vocab_size": 8192,
                                                      "num_hidden_layers": 3, "tie_word_embeddings": False})  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)

    def drawn(tensor):
        return torch.randn(tensor.shape, generator=generator)

    method, most = FullConfig(), 0
    largest = max(p.numel() for p in model.parameters()) * 4
    planned = plan(model, method.whole_shapes(model), torch.bfloat16, LARGE)

    def watched():
        nonlocal most
        for name, tensor in method.whole_tensors(model, torch.bfloat16, drawn, print):
            most = max(most, anonymous())
            yield name, tensor
            del tensor

    before = anonymous()
    size = write_tensors(tmp_path, planned, watched())
    assert size > 6 * largest
    assert max(most, anonymous()) - before < 3 * largest


def anonymous() -> int:
    """RssAnon of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
