"""Every launch of every kernel compiled for chips that are not here: it fits, spills nothing, and uses the tensor cores.

Each day one launch of each kernel for every chip, and a part of all the others: every launch for every chip in `PARTS` days.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import today

SHARED = {
    "sm_80": 166_912,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "gfx942": 65_536,
}  # bytes a block may have, by the makers
KERNELS = {
    "cross_entropy._cross_entropy", "linear_kl._kl", "lora_dropout._a_gradient", "lora_dropout._down",
    "lora_dropout._x_gradient", "nf4._dequantize", "rms_norm._backward", "rms_norm._forward", "rope._rope",
    "swiglu._backward", "swiglu._forward",
}  # fmt: skip


PARTS = 6


def compiled(cache: Path, *arguments: str, packages: Path | None = None) -> list[dict]:
    env = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    env.pop("TRITON_INTERPRET", None)
    if packages is not None:
        env["PYTHONPATH"] = str(packages)
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("compile_all.py")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def hold(rows: list[dict], targets: set[str]) -> None:
    assert {(r["kernel"], r["target"]) for r in rows} == {(k, t) for k in KERNELS for t in targets}
    for row in rows:
        assert row["shared"] <= SHARED[row["target"]], row
        if row["target"] == "sm_90":
            assert row["spilled"] == 0, row
            # Hopper's matrix instruction takes 16-bit factors; float32 is kept exact ("ieee") and has none.
            assert row["wgmma"] == (row["dot"] and "*bf16" in row["types"]), row
    assert {r["kernel"] for r in rows if r["dot"]} == {k for k in KERNELS if k.startswith("lora_dropout")}


def halves(tmp_path: Path, *arguments: str, packages: Path | None = None) -> list[dict]:
    """Two processes, two chips each."""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(
            lambda chips: compiled(tmp_path / chips[0], *arguments, *chips, packages=packages),
            (("sm_80", "sm_90"), ("sm_100", "gfx942")),
        )
        return [row for half in found for row in half]


@pytest.mark.slow
def test_launches_for_every_chip(tmp_path):
    rows = halves(tmp_path, *today.some([f"--part={i}/{PARTS}" for i in range(PARTS)], PARTS, "compile"))
    hold(rows, set(SHARED))
    assert rows[0]["launches"] > 100
    assert len(rows) > rows[0]["launches"] // PARTS


@pytest.mark.slow
def test_launches_with_the_triton_of_torch_2_11(tmp_path):
    """3.6.0, in a folder of its own that goes before the installed one."""
    packages = tmp_path / "triton36"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), "triton==3.6.0"]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip("triton 3.6.0 cannot be had from the registry")
    assert len(list(packages.glob("triton-3.6.0*"))) == 1
    parts = today.some([f"--part={i}/{2 * PARTS}" for i in range(2 * PARTS)], 2 * PARTS, "triton 3.6")
    hold(halves(tmp_path, *parts, packages=packages), set(SHARED))
