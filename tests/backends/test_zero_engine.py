"""What importing DeepSpeed must not bring with it."""

from __future__ import annotations

import os
import subprocess
import sys


def test_joining_compiles_nothing_and_leaves_torch_as_it_was(tmp_path):
    """DeepSpeed's CPU extension costs a minute, and a run killed meanwhile leaves a lock that every later one waits for."""
    code = (
        "import torch\n"
        "from tritune.trainer.backends import zero_engine\n"
        "from tritune.trainer.parallel.distributed import ensure_group\n"
        "ensure_group(torch.device('cpu'))\n"
        "zero_engine._join()\n"
        "assert not hasattr(torch, 'build_shm_op')\n"
    )
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir()), "something was compiled"
