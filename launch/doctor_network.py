"""What machines can only say together: whether they meet, see the same files and clock, run the same software at one speed."""

from __future__ import annotations

import os
import socket
import statistics
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tritune.launch.doctor_checks import FAIL, PASS, WARN, Check, versions
from tritune.trainer.parallel.distributed import World

MESSAGE = 1 << 25  # bytes of the all-reduce
LONG_SECONDS = 900  # the checks of one machine may take so much longer than another's
SLOW = 1.5  # times the median of all machines
SKEW_WARN, SKEW_FAIL = 1.0, 30.0  # seconds


def meet(asked: str, seconds: int) -> tuple[World | None, Check]:
    """Join the other ranks, or say who cannot reach whom.

    Args:
        asked: `backend.device`.
        seconds: to wait for them.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    use_cuda = torch.cuda.is_available() and asked != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a wait that fails then raises, where NCCL would abort
    try:
        if use_cuda:
            torch.cuda.set_device(device)
        if rank != 0:
            _reach(seconds)
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=timedelta(seconds=seconds))
        dist.monitored_barrier(dist.new_group(backend="gloo"), timeout=timedelta(seconds=seconds))
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=LONG_SECONDS))
    except Exception as error:  # noqa: BLE001  said as a failed check
        text = (
            f"rank {rank} on {os.uname().nodename} met nobody at {where} in {seconds} s: {str(error).splitlines()[0]}"
        )
        remedy = ("The address must name the first machine as the others see it (getent hosts NAME on each), the port must be "
                  "free there and open between the machines; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the "
                  "interface")  # fmt: skip
        return None, Check(FAIL, "rendezvous", text, remedy)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(rank, size, device, local, group), Check(PASS, "rendezvous", where)


def _reach(seconds: int) -> None:
    """Connect to the rendezvous once, so that a wrong name is told from a silent port."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except socket.gaierror as error:
            raise ConnectionError(f"{address} does not resolve ({error.strerror})") from None
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(f"no answer ({error})") from None
            time.sleep(0.5)


def mutual_checks(world: World, folder: Path, host: str, own: list[Check]) -> list[Check]:
    """All machines' checks and those between them; every rank gets the same list."""
    found = [check for checks in world.gather(own) for check in checks]
    hosts: list[str] = world.gather(host)
    found.append(Check(PASS, "rendezvous", f"{world.size} ranks on {len(set(hosts))} machine(s) met at "
                                           f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"))  # fmt: skip
    found.append(_same_software(world, hosts))
    found.append(_clocks(world, hosts))
    found.append(_same_files(world, folder, hosts))
    found += [_all_reduce(world), _pace(world, hosts)]
    return found


def _same_software(world: World, hosts: list[str]) -> Check:
    every = world.gather(versions())
    differences = []
    for name in every[0]:
        by_version: dict[str | None, set[str]] = {}
        for host, found in zip(hosts, every, strict=True):
            by_version.setdefault(found[name], set()).add(host)
        if len(by_version) > 1:
            said = ", ".join(f"{version} on {' '.join(sorted(where))}" for version, where in by_version.items())
            differences.append(f"{name}: {said}")
    if differences:
        return Check(
            FAIL, "same software", "; ".join(differences), "Install one environment for all, or use a container"
        )
    return Check(PASS, "same software", "the same versions on every machine")


def _clocks(world: World, hosts: list[str]) -> Check:
    """Each clock against rank 0's, read right after a collective, less half of how long one takes."""
    for _ in range(3):
        world.max(0)
    began = time.perf_counter()
    world.max(0)
    error = time.perf_counter() - began
    clocks = world.gather(time.time())
    skew = [clock - clocks[0] for clock in clocks]
    worst = max(range(world.size), key=lambda r: abs(skew[r]))
    text = f"{hosts[worst]} is {skew[worst]:+.2f} s from {hosts[0]} (measured to {error:.2f} s)"
    size = abs(skew[worst]) - error
    state = FAIL if size > SKEW_FAIL else WARN if size > SKEW_WARN else PASS
    return Check(state, "clocks", text, "Let the machines keep time (chrony, NTP): logs and tokens are dated by it")


def _same_files(world: World, folder: Path, hosts: list[str]) -> Check:
    """A file that rank 0 writes must be seen by all, in the folder where the run will be."""
    folder = Path(world.gather(str(folder))[0])
    name = world.gather(f".tritune-doctor-{os.getpid()}-{time.time_ns()}")[0]
    writable = True
    if world.rank == 0:
        try:
            (folder / name).write_text(name)
        except OSError:
            writable = False
    writable = world.gather(writable)[0]
    deadline = time.monotonic() + 10
    seen = False
    while writable and not seen and time.monotonic() < deadline:
        seen = (folder / name).is_file()
        time.sleep(0 if seen else 0.2)
    all_seen = world.gather(seen)
    if world.rank == 0 and writable:
        (folder / name).unlink()
    blind = sorted({h for h, s in zip(hosts, all_seen, strict=True) if not s})
    if blind:
        text = f"{', '.join(blind)} does not see what {hosts[0]} writes to {folder}"
        return Check(FAIL, "shared files", text, "Checkpoints need one file system: give a run.dir on it")
    return Check(PASS, "shared files", f"{folder} is the same on every machine")


def _all_reduce(world: World) -> Check:
    data = torch.ones(MESSAGE // 4, device=world.device)
    times = []
    for _ in range(5):
        world.max(0)
        began = time.perf_counter()
        try:
            dist.all_reduce(data)
        except RuntimeError as error:
            return Check(FAIL, "all-reduce", str(error).splitlines()[0], "NCCL_DEBUG=INFO says which transport failed")
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        data.fill_(1.0)
    took = statistics.mean(world.gather(statistics.median(times[1:])))
    bus = 2 * (world.size - 1) / world.size * MESSAGE / took / 1e9
    slow = world.device.type == "cuda" and bus < 10
    return Check(WARN if slow else PASS, "all-reduce", f"{MESSAGE >> 20} MiB in {took * 1e3:.1f} ms, bus {bus:.2f} GB/s",
                 "NCCL may run over Ethernet: NCCL_DEBUG=INFO says which transport it took")  # fmt: skip


def _pace(world: World, hosts: list[str]) -> Check:
    """The same product on every rank at once; synchronous training waits for the slowest."""
    size = 4096 if world.device.type == "cuda" else 512
    a = torch.ones(
        size, size, device=world.device, dtype=torch.bfloat16 if world.device.type == "cuda" else torch.float32
    )
    times = []
    for _ in range(4):
        world.max(0)
        began = time.perf_counter()
        for _ in range(20):
            a @ a
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    seconds = world.gather(statistics.mean(times[1:]))  # a mean: other work comes and goes
    by_host = {
        h: statistics.median(s for h2, s in zip(hosts, seconds, strict=True) if h2 == h) for h in dict.fromkeys(hosts)
    }
    fastest = min(by_host.values())
    slow = [
        f"{h} takes {s / fastest:.1f} times as long as the fastest" for h, s in by_host.items() if s > SLOW * fastest
    ]
    if slow:
        return Check(
            WARN, "pace", "; ".join(slow), "Look for other work, heat or a lower clock there, or leave the node out"
        )
    return Check(PASS, "pace", f"{20 * 2 * size**3 / fastest / 1e9:.0f} GFLOP/s a rank, alike on every machine")
