"""Compile every launch that the public functions make, for chips that are not here; prints JSON. Run it as a script.

The launches are recorded, not listed: `JITFunction.run` is replaced by a note of kernel, arguments and options, and the
public functions are called at the widths of real models. So what is compiled is what would run. Must not be interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
launches: dict[str, tuple] = {}


def note(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
    """Stands in for `JITFunction.run`: what the launcher would compile, by Triton's own rules of specialisation."""
    names = [p.name for p in kernel.params]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        one = special and isinstance(value, int) and not isinstance(value, bool) and value == 1
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {k: kwargs[k] for k in OPTIONS if k in kwargs}
    name = f"{Path(kernel.fn.__code__.co_filename).stem}.{kernel.fn.__name__}"
    key = json.dumps(
        [name, signature, {k: str(v) for k, v in constants.items()}, options, sorted(map(str, attributes))]
    )
    launches[key] = (name, kernel, signature, constants, attributes, options)


def record() -> None:
    """Call the public functions as real models would, in bfloat16 and once in float32."""
    JITFunction.run = note
    from tritune.kernels import language

    language.why_not = lambda device, dtype: None
    from tritune.kernels.cross_entropy import LossOptions
    from tritune.kernels.dropout import token_keys
    from tritune.kernels.linear_cross_entropy import linear_cross_entropy
    from tritune.kernels.linear_kl import linear_kl
    from tritune.kernels.lora import Projection, lora_linear, lora_mlp
    from tritune.kernels.nf4 import quantize
    from tritune.kernels.rms_norm import add_rms_norm, rms_norm
    from tritune.kernels.rope import rope
    from tritune.kernels.swiglu import geglu, swiglu

    for dtype in (torch.bfloat16, torch.float32):

        def new(*shape, dtype=dtype, grad=True):
            return torch.zeros(*shape, dtype=dtype, requires_grad=grad)

        widest = 16384 if dtype is torch.bfloat16 else 8192
        for width in (128, 1152, 4096, widest // 2, widest):
            rms_norm(new(16, width), new(width, grad=False), 1e-6).sum().backward()  # frozen, as under LoRA
            sum(t.sum() for t in add_rms_norm(new(16, width), new(16, width), new(width, grad=False), 1e-6)).backward()
        for width in (128, 1152, 4096, widest // 2):
            rms_norm(new(16, width), new(width), 1e-6, 1.0).sum().backward()
            sum(t.sum() for t in add_rms_norm(new(16, width), new(16, width), new(width), 1e-6)).backward()
        for heads, kv_heads, width, rotated in ((32, 8, 128, 128), (32, 32, 96, 72), (4, 1, 256, 256)):
            cos = new(1, 8, rotated, grad=False)
            sum(t.sum() for t in rope(new(2, heads, 8, width), new(2, kv_heads, 8, width), cos, cos)).backward()
        for width in (1000, 14336):
            for function in (swiglu, geglu):
                function(*new(4, 2 * width).chunk(2, dim=-1)).sum().backward()
        for vocabulary in (1000, 128256):
            targets = torch.zeros(4, dtype=torch.int64)
            for options in (LossOptions(), LossOptions(0.1, 1e-4, 30.0, 0.5)):
                for trains in (False, True):
                    x, w = new(4, 16), new(vocabulary, 16, grad=trains)
                    linear_cross_entropy(x, w, targets, options=options)[0].sum().backward()
                    weights = torch.ones(4)
                    linear_cross_entropy(x, w, targets, options=options, weights_M=weights, reduction="sum")[
                        0
                    ].backward()
            linear_kl(new(4, 16), new(vocabulary, 16, grad=False), new(4, 16), new(vocabulary, 16)).sum().backward()
        for rank in (8, 16, 64):
            keys = token_keys(0, 0, torch.arange(2), 64)

            def update(n, k, rank=rank):
                return Projection(new(n, k, grad=False), None, new(rank, k), new(n, rank))

            group = [update(64, 1024), update(32, 1024), update(32, 1024)]
            sum(y.sum() for y in lora_linear(new(2, 64, 1024), group, keys, 0.1)).backward()
            pair = [update(96, 1024), update(96, 1024)]
            lora_mlp(new(2, 64, 1024), pair, update(64, 96), "silu", keys, 0.1).sum().backward()
        for double in (True, False):
            quantize(torch.ones(64, 64), double=double).dequantize(dtype)


def assembled(ptx: str) -> dict[str, int]:
    """What NVIDIA's assembler says of registers and spills on sm_90, bytes per thread."""
    tool = get_ptxas(90).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        done = subprocess.run([tool, "-v", "-arch=sm_90a", file.name, "-o", os.devnull], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    return {
        "registers": int(re.search(r"Used (\d+) registers", done.stderr)[1]),
        "spilled": int(spills[1]) + int(spills[2]),
    }


def core() -> set[str]:
    """The keys of one launch of each kernel, in bfloat16."""
    first = {launch[0]: key for key, launch in reversed(launches.items()) if "*bf16" in launch[2].values()}
    return set(first.values())


def main(parts: set[int], count: int, targets: list[str]) -> None:
    """Compile one launch of each kernel for each of `targets`, and of all others those whose turn it is.

    Args:
        parts: which of the `count` parts of all (launch, target): numbers from 0.
    """
    record()
    always, turn = core(), 0
    for key, (name, kernel, signature, constants, attributes, options) in launches.items():
        for target in TARGETS:
            if target != "sm_90" and "*bf16" not in signature.values():
                continue  # float32 makes the same tiles; it is compiled for Hopper
            turn += 1
            if target not in targets or (key not in always and turn % count not in parts):
                continue
            source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
            compiled = triton.compile(source, target=TARGETS[target], options=options)
            said = {"kernel": name, "target": target, "constants": {k: str(v) for k, v in constants.items()}}
            said |= {"types": sorted(set(signature.values())), "shared": compiled.metadata.shared, **options}
            said |= {"dot": "tt.dot" in compiled.asm["ttir"], "launches": len(launches)}
            if target == "sm_90":
                said |= assembled(compiled.asm["ptx"]) | {"wgmma": "wgmma" in compiled.asm["ptx"]}
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    drawn = [a.removeprefix("--part=").split("/") for a in sys.argv[1:] if a.startswith("--part=")]
    main({int(i) for i, _ in drawn}, int(drawn[0][1]), [a for a in sys.argv[1:] if a in TARGETS] or list(TARGETS))
