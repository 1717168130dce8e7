"""Whole optimizer steps on one GPU: our kernels off and on, beside transformers with PEFT, with and without Liger.

    python benchmarks/steps.py [--only WORD ...] [--checkpointing auto] [--steps 10] [--out DIR]
    python benchmarks/steps.py --smoke [--out DIR]     on CPU: tiny, float32, Triton's interpreter; measures nothing

8b-lora is LoRA of rank 16 on the seven linears of Llama-3-8B's shapes; 1b-full trains all of Llama-3.2-1B's, embeddings
tied. Weights are random, bfloat16, and made on the device; a step is 4 rows of 2,048 random tokens, forward, backward, update.
Every variant keeps what it trains in bfloat16 and updates it by PyTorch's fused AdamW, so that only the model's own work
differs. The project itself keeps float32 masters, which costs all of ours the same. `peft-float32` is PEFT as it comes:
adapters in float32, under autocast.

Each variant runs in a process of its own. Activation checkpointing is the same for all variants of a model: `auto` is
off unless one of them then runs out of memory, in which case all of them are run again with it on.

Model FLOP/s count 4 N a token for LoRA (forward, and gradients of inputs) and 6 N for full training, N the weights of linear
layers, output head included, embeddings not; attention, adapters and what checkpointing computes again are not counted.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, write_record
from torch import Tensor, nn

SHAPES: dict[str, dict[str, Any]] = {
    "8b-lora": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
    "1b-full": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip
VARIANTS = {
    "8b-lora": ["ours-off", "ours-on", "peft", "peft-float32", "peft-liger"],
    "1b-full": ["ours-off", "ours-on", "transformers", "transformers-liger"],
}
FLOPS_PER_WEIGHT = {"8b-lora": 4, "1b-full": 6}
RANK, ALPHA, RATE, CHUNK_TOKENS = 16, 32.0, 1e-5, 4096
WARM_UP, TIMEOUT = 3, 240.0
PEERS = ("triton", "transformers", "peft", "liger-kernel")


def make_model(name: str, smoke: bool, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama with random weights, made where they stay."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[name] | HEADS | (SMALL if smoke else {})
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    config = LlamaConfig(
        **sizes, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_parameters=rope, use_cache=False
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model


def weights_that_multiply(model: nn.Module) -> int:
    """N: weights of linear layers without adapters', a tied head's too."""
    return sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n)


def ours(name: str, model: Any, on: bool, ids: Tensor, dtype: torch.dtype) -> tuple[Callable[[], Tensor], list[str]]:
    """The project's own layers and scorer; `on`: with the kernels in place. Returns the loss, and what was installed."""
    from tritune.kernels.dispatch import choose
    from tritune.kernels.install import Installed, install
    from tritune.trainer.batch import rows_of
    from tritune.trainer.methods.lora import LoraConfig
    from tritune.trainer.methods.lora_layers import add_lora
    from tritune.trainer.model.scorer import TokenScorer

    keys = add_lora(LoraConfig(rank=RANK, alpha=ALPHA), model, [], 0) if name == "8b-lora" else None
    model.to(ids.device)  # adapters are made on CPU, in float32
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    done = install(model, choose("triton", {}, ids.device, dtype)) if on else Installed()
    batch = rows_of(ids)
    scorer = TokenScorer(model, keys, 0, CHUNK_TOKENS, fused_head=done.head)
    return lambda: scorer(batch, "summed_nll") / len(batch.predict), done.lines()


def theirs(name: str, model: Any, variant: str, ids: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """transformers' own forward and loss."""
    if variant.endswith("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    wide = variant == "peft-float32"
    if name == "8b-lora":
        from peft import LoraConfig, get_peft_model

        targets = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(model, config, autocast_adapter_dtype=wide)

    def loss() -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=wide and dtype is torch.bfloat16):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    return loss


def measure(plan: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: one variant's steps."""
    name, variant, smoke = plan["model"], plan["variant"], plan["smoke"]
    device, dtype = (torch.device("cpu"), torch.float32) if smoke else (torch.device("cuda"), torch.bfloat16)
    if variant.endswith("liger"):
        importlib.import_module("liger_kernel.transformers")  # where it is absent, before minutes are spent
    model = make_model(name, smoke, device, dtype)
    multiplying = weights_that_multiply(model)
    generator = torch.Generator(device).manual_seed(1)
    shape = (2, 16) if smoke else (4, 2048)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator, device=device)
    if plan["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    installed: list[str] = []
    if variant.startswith("ours"):
        loss, installed = ours(name, model, variant == "ours-on", ids, dtype)
    else:
        loss = theirs(name, model, variant, ids, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    seconds: list[float] = []
    losses: list[float] = []
    for step in range(1 if smoke else WARM_UP + plan["steps"]):
        if not smoke:
            torch.cuda.synchronize()
            if step == WARM_UP:
                torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))  # waits for the GPU, as a loop that logs does
        if not smoke:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    timed = seconds if smoke else seconds[WARM_UP:]
    rate = ids.numel() / statistics.median(timed)
    return {
        "tokens_per_second": rate, "model_flops_per_second": rate * multiplying * FLOPS_PER_WEIGHT[name],
        "peak_bytes": None if smoke else torch.cuda.max_memory_allocated(), "step_seconds": timed, "loss": losses[0],
        "weights_that_multiply": multiplying, "trained": sum(p.numel() for p in trained),
        "trained_dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in trained}), "installed": installed,
    }  # fmt: skip


def child(path: Path) -> int:
    try:
        answer = measure(json.loads(path.read_text()))
    except torch.OutOfMemoryError as error:
        answer = {"skipped": f"out of memory: {str(error)[:150]}", "out_of_memory": True}
    except ModuleNotFoundError as error:
        answer = {"skipped": f"{error.name} is not installed"}
    except Exception as error:  # noqa: BLE001  whatever a peer raises is its answer
        answer = {"skipped": f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}", "raised": True}
    path.with_suffix(".answer").write_text(json.dumps(answer))
    return 0


def run(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A variant's answer, whatever becomes of its process."""
    path = folder / f"{plan['model']}-{plan['variant']}-{plan['checkpointing']}.json"
    path.write_text(json.dumps(plan))
    variables = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if plan["smoke"]:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--child", str(path)]
    try:
        done = subprocess.run(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"skipped": f"killed {TIMEOUT:.0f} s after its start", "raised": True}
    answer = path.with_suffix(".answer")
    last = done.stderr.strip().splitlines()[-1:]
    cell = {"skipped": f"its process died (exit {done.returncode}): {' '.join(last)[:200]}", "raised": True}
    if answer.exists():
        cell = json.loads(answer.read_text())
    print(f"{plan['model']} {plan['variant']:19} checkpointing {'on' if plan['checkpointing'] else 'off'}: {shown(cell)}",
          flush=True)  # fmt: skip
    return cell


def model_runs(name: str, variants: list[str], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All variants of a model, with the same activation checkpointing."""
    tries = {"auto": [False, True], "on": [True], "off": [False]}[args.checkpointing]
    for checkpointing in tries:
        plans = [{"model": name, "variant": variant, "checkpointing": checkpointing, "steps": args.steps,
                  "smoke": args.smoke} for variant in variants]  # fmt: skip
        with ThreadPoolExecutor(2 if args.smoke else 1) as pool:
            cells = dict(zip(variants, pool.map(lambda plan: run(plan, folder), plans), strict=True))
        full = [variant for variant, cell in cells.items() if cell.get("out_of_memory")]
        if not full or checkpointing is tries[-1]:
            break
        print(f"{name}: {', '.join(full)} did not fit, so all variants are run again with checkpointing on", flush=True)
    return {"model": name, "shape": SHAPES[name] | HEADS | (SMALL if args.smoke else {}), "checkpointing": checkpointing,
            "flops_per_weight_and_token": FLOPS_PER_WEIGHT[name], "variants": cells}  # fmt: skip


def shown(cell: dict[str, Any]) -> str:
    if "skipped" in cell:
        return f"skipped: {cell['skipped']}"
    peak = "-" if cell["peak_bytes"] is None else f"{cell['peak_bytes'] / 1e9:.1f} GB"
    flops = cell["model_flops_per_second"] / 1e12
    return (
        f"{cell['tokens_per_second']:,.0f} tokens/s, {flops:,.4g} model TFLOP/s, peak {peak}, loss {cell['loss']:.4f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="models or variants with it in their name"
    )
    parser.add_argument("--checkpointing", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--steps", type=int, default=10, help=f"timed ones, after {WARM_UP} others")
    parser.add_argument("--out", type=Path, help="folder of the record, instead of results/")
    parser.add_argument("--smoke", action="store_true", help="exercise everything on CPU; measures nothing")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1" if args.smoke else str(os.cpu_count()))
    if args.child:
        return child(args.child)
    if not args.smoke and not torch.cuda.is_available():
        print("benchmarks/steps.py: no CUDA GPU is here to measure on. Run it on one; `--smoke` exercises it on CPU",
              file=sys.stderr)  # fmt: skip
        return 2
    runs = []
    with tempfile.TemporaryDirectory() as where:
        try:  # what the record needs is missed now, not after the measurements
            write_record(str(Path(where) / "steps"), {})
        except (importlib.metadata.PackageNotFoundError, OSError) as error:
            print(f"benchmarks/steps.py: the record could not be written: {error!r}", file=sys.stderr)
            return 2
        for name, variants in VARIANTS.items():
            words = [w for w in args.only if w not in name]
            kept = [v for v in variants if not args.only or len(words) < len(args.only) or any(w in v for w in words)]
            if kept:
                runs.append(model_runs(name, kept, args, Path(where)))
    if not args.smoke or args.out:
        out = (args.out or RESULTS).resolve()
        out.mkdir(parents=True, exist_ok=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
        for package in PEERS:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "not installed"
        fields = {"benchmark": "steps", "smoke": args.smoke, "dtype": "float32" if args.smoke else "bfloat16",
                  "rank": RANK, "optimizer": "torch.optim.AdamW, fused, states in the dtype of what trains",
                  "versions": versions, "runs": runs}  # fmt: skip
        print(f"wrote {write_record(str(out / 'steps'), fields)}")
    failed = [f"{r['model']} {v}" for r in runs for v, c in r["variants"].items() if v[:4] == "ours" and "skipped" in c]
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
