"""Host memory while a model is loaded: no rank of FSDP or ZeRO-3 may hold much more than its own part.

    python benchmarks/loading.py [--ranks 4] [--layers 17] [--only LABEL ...]

A random Llama of about a billion parameters is written as bf16 safetensors in several files, and deleted afterwards. In
every rank the trainer's own functions load it in the order of `build`; a thread samples /proc/self/status every 2 ms. Measured
is the rise, over where it stood just before, of the peak of RssAnon (memory that only this process has and must keep)
until every parameter is in its place, which is when the backend asks for the optimizer: masters and moments come after.
The peak of RssFile (pages of the mapped files, in the system's cache anyway) stands apart. `prepared` is the same rise when
the backend is ready: with masters and moments, and what the engine imports on its way; where every parameter trains
they are many times the model, and loading ends before them.

The bound: rise <= the rank's part + 20 % of the model, in bytes of the dtype that it is held in; of a base in NF4 (`qlora`) the
part + one decoder layer in bf16. `ddp`, which loads the model
whole on each rank, stands beside it without one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import MIB, Peak, run_ranks, write_record
from safetensors.torch import save_file
from tritune.launch.processes import preload

VOCAB, HIDDEN, INTERMEDIATE, HEADS = 32000, 2048, 5632, 16
LAYER = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE  # parameters of a decoder layer
SLACK = 0.2  # of the model's bytes
CASES = [  # label, backend, method, model.dtype
    ("fsdp-lora-bf16", "fsdp", "lora", "bfloat16"),
    ("zero3-lora-bf16", "zero3", "lora", "bfloat16"),
    ("fsdp-qlora-bf16", "fsdp", "lora", "bfloat16"),
    ("zero3-qlora-bf16", "zero3", "lora", "bfloat16"),
    ("fsdp-full-fp32", "fsdp", "full", "float32"),
    ("zero3-full-fp32", "zero3", "full", "float32"),
    ("whole-lora-bf16", "ddp", "lora", "bfloat16"),
]
WHOLE_RANKS = 2


class Placed(Exception):
    pass


def load(overrides: list[str], processes: int, to_the_end: bool) -> dict[str, Any]:
    """In a rank: load as `build` does, and return how memory rose."""
    from tritune.trainer import build
    from tritune.trainer.backends import shards_parameters
    from tritune.trainer.config.compose import load_config
    from tritune.trainer.methods.apply import apply_method
    from tritune.trainer.model.load import load_architecture, storage_dtype, widen_masters
    from tritune.trainer.model.loading import load as load_placed
    from tritune.trainer.model.optim import make_optimizer
    from tritune.trainer.model.scorer import TokenScorer
    from tritune.trainer.model.tokenizer import load_tokenizer
    from tritune.trainer.parallel import distributed

    config = load_config(overrides, None, processes)
    world = distributed.start(config.backend, False)
    tokenizer = load_tokenizer(config.model)
    architecture = load_architecture(config.model, len(tokenizer))
    placed, prepared = Peak(2.0), Peak(2.0)
    figures: dict[str, Any] = {}

    def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        figures["placed"] = placed.stop()
        if not to_the_end:
            raise Placed
        return make_optimizer(config.optim, model)

    world.gather(None)  # all begin together
    placed.start()
    prepared.start()
    model, weights = load_placed(
        config.model,
        architecture,
        tokenizer,
        None,
        config.seed,
        storage_dtype(config.model.dtype, config.method),
        shards_parameters(config.backend),
        print,
    )
    keys = apply_method(config.method, model, [], config.seed)
    widen_masters(model)
    if weights is not None:
        weights.take(model)
    figures["model_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    backend = build.make_backend(config.backend, build.make_mesh(config.backend, world), config.model.dtype)
    scorer = TokenScorer(model, keys, config.seed, config.kernels.loss_chunk_tokens)
    try:
        backend.prepare(scorer, optimizer, weights)
        figures["prepared"] = prepared.stop()
    except Placed:
        pass
    world.gather(None)  # the others' connections must live until they are done
    return figures


def save_model(where: Path, layers: int) -> None:
    """Write a Llama in bf16, a file for every four layers, never holding more than one file's tensors."""
    from transformers import AutoConfig
    from tritune.trainer.model.tokenizer import byte_tokenizer

    config = AutoConfig.for_model(
        "llama", vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=256, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(where)
    byte_tokenizer().save_pretrained(where)
    files = [
        {
            "model.embed_tokens.weight": (VOCAB, HIDDEN),
            "lm_head.weight": (VOCAB, HIDDEN),
            "model.norm.weight": (HIDDEN,),
        }
    ]
    for layer in range(layers):
        if layer % 4 == 0:
            files.append({})
        start = f"model.layers.{layer}"
        files[-1] |= {f"{start}.self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        files[-1] |= {f"{start}.mlp.{x}_proj.weight": (INTERMEDIATE, HIDDEN) for x in ("gate", "up")}
        files[-1] |= {f"{start}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
        files[-1] |= {f"{start}.{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
    index: dict[str, str] = {}
    for i, shapes in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = {n: torch.empty(s, dtype=torch.bfloat16).uniform_(-0.03, 0.03) for n, s in shapes.items()}
        save_file(tensors, where / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, name)
    (where / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def measure(case: tuple[str, str, str, str], ranks: int, folder: Path) -> dict[str, Any]:
    label, backend, method, dtype = case
    overrides = [
        f"model.path={folder / 'model'}", f"data.train={folder / 'rows.txt'}", "objective=pretrain", f"backend={backend}",
        f"method={method}", f"model.dtype={dtype}", "backend.device=cpu", "data.max_length=64", "train.max_steps=1",
        "optim.lr=1e-4", f"model.storage={'nf4' if 'qlora' in label else 'plain'}",
    ]  # fmt: skip
    found = run_ranks(load, (overrides, ranks, method == "lora"), ranks, folder / label)
    model, part = found[0]["model_bytes"], found[0]["model_bytes"] // ranks
    rises = [f["placed"]["anon"] for f in found]
    case_figures = {
        "case": label, "ranks": ranks, "parameters": found[0]["parameters"], "model_bytes": model,
        "rise_anon_bytes": rises, "rise_file_bytes": [f["placed"]["file"] for f in found],
    }  # fmt: skip
    if backend != "ddp":
        bound = part + (2 * LAYER if "qlora" in label else round(SLACK * model))
        case_figures |= {"part_bytes": part, "bound_bytes": bound, "holds": max(rises) <= bound}
        case_figures["over_part_share_of_model"] = round((max(rises) - part) / model, 4)
    if "prepared" in found[0]:
        case_figures["prepared_anon_bytes"] = [f["prepared"]["anon"] for f in found]
    return case_figures


def shown(figures: dict[str, Any]) -> str:
    rise, file = max(figures["rise_anon_bytes"]) / MIB, max(figures["rise_file_bytes"]) / MIB
    text = f"{figures['case']:16} x {figures['ranks']}  anon +{rise:,.0f} MiB, file +{file:,.0f} MiB"
    text += f", model {figures['model_bytes'] / MIB:,.0f} MiB"
    if "bound_bytes" in figures:
        text += f", bound {figures['bound_bytes'] / MIB:,.0f} MiB: {'holds' if figures['holds'] else 'BROKEN'}"
    if "prepared_anon_bytes" in figures:
        text += f"; when ready +{max(figures['prepared_anon_bytes']) / MIB:,.0f} MiB"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=17, help="17: 1.0 billion parameters")
    parser.add_argument("--only", nargs="+", choices=[c[0] for c in CASES], default=[c[0] for c in CASES])
    args = parser.parse_args()
    preload(on_cpu=True)
    cases = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", args.layers)
        (folder / "rows.txt").write_text("one row\n")
        measured = partial(measure, folder=folder)
        for case in CASES:
            if case[0] in args.only:
                cases.append(measured(case, WHOLE_RANKS if case[1] == "ddp" else args.ranks))
                print(shown(cases[-1]), flush=True)
    write_record("loading", {"slack": SLACK, "cases": cases})


if __name__ == "__main__":
    main()
