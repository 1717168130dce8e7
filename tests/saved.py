"""A finished run and its checkpoints, to be damaged and compared; the run itself is a fixture of the tests of checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import harness
import torch
from safetensors.torch import load_file, save_file
from tritune.trainer.checkpoint.manifest import MANIFEST, describe, verify

STEPS = (2, 4, 6)
LAST, BEFORE = "step-00000006", "step-00000004"
FIGURES = ("step", "loss", "grad_norm", "lr", "tokens", "label_tokens", "epoch")  # all but speed and memory


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def figures(directory: Path) -> list[list]:
    """What training computed, as it was written: equal text is equal bits."""
    return [[json.dumps(row[k]) for k in FIGURES] for row in harness.rows(directory)]


def require_same_run(directory: Path, unbroken: Path) -> None:
    assert [row["step"] for row in harness.rows(directory)] == list(range(1, 7))
    assert figures(directory) == figures(unbroken)
    assert harness.rows(directory, "evaluations.jsonl") == harness.rows(unbroken, "evaluations.jsonl")
    assert json.loads((directory / "status.json").read_text())["state"] == "done"
    ours, theirs = (json.loads((d / "summary.json").read_text())["eval"] for d in (directory, unbroken))
    assert ours["validation"]["tuned"] == theirs["validation"]["tuned"]
    # the weights, too, and the moments; not the files, whose headers safetensors writes in a random order
    ours, theirs = (d / "checkpoints" / LAST for d in (directory, unbroken))
    assert verify(ours)["tensors"] == verify(theirs)["tensors"]
    ours, theirs = load_file(shard(ours)), load_file(shard(theirs))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if bits(ours[name]) != bits(theirs[name])] == []


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def shard(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.safetensors"))


def flatten(checkpoint: Path, number: int = 3) -> None:
    """Write a checkpoint anew as formats 2 and 3 had it: each tensor as runs of its flattened elements, in two files."""
    (path,) = checkpoint.glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    for rank in (0, 1):
        cuts = {name: tensor.numel() // 3 for name, tensor in tensors.items()}
        runs = {n: t.view(-1)[cuts[n] :] if rank else t.view(-1)[: cuts[n]] for n, t in tensors.items()}
        offsets = {name: {"saved_offsets": [cuts[name] * rank]} for name in tensors}
        held = {n: run.clone() for n, run in runs.items() if run.numel()}
        save_file(held, checkpoint / f"shard-{rank + 1:05d}.safetensors", {"DCP_SHARDING_INFO": json.dumps(offsets)})

    def as_then(manifest: dict) -> None:
        manifest["format"] = number
        del manifest["files"][path.name]
        manifest["files"] |= {p.name: describe(p) for p in checkpoint.glob("*.safetensors")}

    if number == 2:
        state = json.loads((checkpoint / "state.json").read_text())
        del state["run"]
        (checkpoint / "state.json").write_text(json.dumps(state))
    reseal(checkpoint, as_then)


def list_in_manifest(checkpoint: Path, name: str, file: Path) -> None:
    """Make the manifest vouch for a file as it is now."""
    reseal(checkpoint, lambda manifest: manifest["files"].update({name: describe(file)}))


def reseal(checkpoint: Path, change: Callable[[dict], object] = lambda manifest: None) -> None:
    """A manifest of another hand: its own hash and those of the files that are there are right."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"] = {
        n: describe(checkpoint / n) if (checkpoint / n).is_file() else e for n, e in manifest["files"].items()
    }
    change(manifest)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest}))
