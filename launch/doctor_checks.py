"""What one machine can say of itself: software, GPUs, kernels, network settings, disk."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

PASS, WARN, FAIL = "pass", "warn", "fail"
LOW_SPACE, NO_SPACE = 20e9, 1e9  # bytes free in the run directory's file system
SLOW_SYNC = 2.0  # seconds for 64 MiB, written and synced
COMPARED = ("torch", "deepspeed", "transformers", "triton", "safetensors", "numpy")


@dataclass(frozen=True)
class Check:
    """`remedy`: what to do unless it passed."""

    state: str
    name: str
    text: str
    remedy: str = ""


def local_checks(device: str, folder: Path, host: str) -> list[Check]:
    """Everything that needs no other machine.

    Args:
        device: `backend.device`.
        folder: of `run_folder`.
        host: this machine's name, which is put into the name of each check.
    """
    checks = [_software(), *_gpus(device), _kernels(device), *_network(), *_disk(folder)]
    return [Check(c.state, f"{host} {c.name}", c.text, c.remedy) for c in checks]


def run_folder(run_dir: str | None) -> Path:
    """The run directory, or the nearest folder above it that exists."""
    path = Path(run_dir or "runs").absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def versions() -> dict[str, str | None]:
    """Of what must be alike on all machines."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("tritune", *COMPARED):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _software() -> Check:
    wrong = []
    for text in metadata.requires("tritune") or []:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(have, prereleases=True):
            wrong.append(f"{need.name} {have}, needs {need.specifier}")
    shown = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    if wrong:
        return Check(FAIL, "software", "; ".join(wrong), "pip install -e . in this environment, on every machine")
    return Check(PASS, "software", shown)


def _gpus(device: str) -> list[Check]:
    import torch

    count = torch.cuda.device_count() if device != "cpu" else 0
    if not count:
        state = FAIL if device == "cuda" else PASS
        remedy = "Check nvidia-smi, CUDA_VISIBLE_DEVICES, --gres, and that torch was built for CUDA"
        return [Check(state, "GPUs", f"none; torch {torch.__version__} computes on the CPU", remedy)]
    found = [torch.cuda.get_device_properties(i) for i in range(count)]
    names = sorted({f"{p.name} {p.total_memory / 2**30:.0f} GiB" for p in found})
    alike = Check(PASS if len(names) == 1 else WARN, "GPUs", f"{count} x {', '.join(names)}; CUDA {torch.version.cuda}",
                  "The slowest GPU sets the pace. Choose nodes of one kind (launch.constraint)")  # fmt: skip
    apart = [f"{i}-{j}" for i in range(count) for j in range(i) if not torch.cuda.can_device_access_peer(i, j)]
    peers = Check(WARN if apart else PASS, "topology", f"no peer access between {', '.join(apart)}" if apart else
                  "each GPU reaches every other", "Traffic goes through host memory: see nvidia-smi topo -m")  # fmt: skip
    return [alike, *([peers] if count > 1 else [])]


def _kernels(asked: str) -> Check:
    import torch
    from tritune.kernels.dispatch import KERNELS, choose
    from tritune.kernels.selfcheck import Sizes, self_check

    use_cuda = torch.cuda.is_available() and asked != "cpu"
    device = torch.device("cuda" if use_cuda else "cpu")
    dtype = torch.bfloat16 if use_cuda else torch.float32
    choices = choose("auto", dict.fromkeys(KERNELS, "auto"), device, dtype, False)
    sizes = Sizes(((4096, True),), (32, 8, 128, 128), (14336, "silu"), (32000, 4096), ((4096, 4096, 16, 0.1),))
    checked = self_check(choices, sizes, device, dtype)
    fallen = [f"{n}: {checked[n].reason}" for n, c in choices.items()
              if c.implementation == "triton" and checked[n].implementation != "triton"]  # fmt: skip
    if fallen:
        return Check(FAIL, "kernels", "; ".join(fallen), "Please report it; kernels=reference trains without them")
    used = [n for n, c in checked.items() if c.implementation == "triton"]
    return Check(PASS, "kernels", f"Triton's agree with the reference: {', '.join(used)}" if used else
                 f"the reference ({next(iter(checked.values())).reason})")  # fmt: skip


def _network() -> list[Check]:
    names = {name for _, name in socket.if_nameindex()}
    checks = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
        asked = os.environ.get(variable)
        if asked and not asked.startswith("^"):
            exact = variable != "NCCL_SOCKET_IFNAME" or asked.startswith("=")
            wanted = asked.removeprefix("=").split(",")
            missing = [w for w in wanted if not any(n == w if exact else n.startswith(w) for n in names)]
            if missing:
                checks.append(Check(FAIL, "network", f"{variable}={asked}: there is no interface {', '.join(missing)}",
                                    f"Unset it, or choose from {', '.join(sorted(names))}"))  # fmt: skip
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError as error:
        checks.append(Check(WARN, "network", f"this machine's own name {socket.gethostname()} does not resolve ({error})",
                            "Add it to /etc/hosts or DNS: other ranks are told this name"))  # fmt: skip
    return checks or [Check(PASS, "network", f"interfaces {', '.join(sorted(names))}")]


def _disk(folder: Path) -> list[Check]:
    probe = folder / f".tritune-doctor-{socket.gethostname()}-{os.getpid()}"
    free = shutil.disk_usage(folder).free
    space = f"{free / 1e9:.1f} GB free in {folder}"
    remedy = "A checkpoint holds parameters and two moments in float32, 12 bytes for each that trains. Free some space"
    checks = [Check(FAIL if free < NO_SPACE else WARN if free < LOW_SPACE else PASS, "space", space, remedy)]
    began = time.perf_counter()
    size = min(1 << 26, int(free / 4))
    try:
        with probe.open("wb") as file:
            file.write(os.urandom(1 << 16) * (size >> 16))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        text = f"{folder} cannot be written: {error.strerror}"
        return [*checks, Check(FAIL, "run directory", text, "Give a run.dir that this user may write on every machine")]
    took = time.perf_counter() - began
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True).stdout.strip()
    slow = took > SLOW_SYNC * size / (1 << 26) + 0.5
    text = f"{folder} ({kind or 'unknown file system'}) takes {size / took / 1e6:.0f} MB/s, synced"
    return [*checks, Check(WARN if slow else PASS, "run directory", text,
                           "Saves will be slow: use a parallel file system, or checkpoint.asynchronous=true")]  # fmt: skip
