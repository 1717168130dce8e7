"""A step waits for the device once, and the next step's rows are made while it computes."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
from torch.overrides import TorchFunctionMode
from tritune.trainer.build import build
from tritune.trainer.config.compose import load_config
from tritune.trainer.data.ahead import Ahead
from tritune.trainer.loop import fit
from tritune.trainer.metrics import meter
from tritune.trainer.metrics.progress import Progress
from tritune.trainer.parallel import distributed
from tritune.trainer.run.directory import RunDir
from tritune.trainer.run.pulse import Pulse
from tritune.trainer.run.stop import Stop

# What of a tensor on a GPU would wait for it.
READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__contains__")


class Waits(TorchFunctionMode):
    """Counts what would wait: by name, and where it was called from.

    transformers looks whether positions are packed, for a mask that variable-length attention on a GPU does not need.

    Attributes:
        on_host: within the meter, when its numbers have been copied to the host: reading them there waits for nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.on_host = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        table = name == "tensor" and (kwargs or {}).get("device") is not None
        if (name in READS or table) and not self.on_host:
            frame = sys._getframe(1)
            self.found.append(f"{name} in {Path(frame.f_code.co_filename).name} {frame.f_code.co_name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_waits_for_the_device_once(tiny, sft_file, tmp_path, monkeypatch, method):
    waits, steps = Waits(), 3
    measure, read = meter.Meter.step, meter.read_on_host
    counts: list[list[str]] = []

    def step(self, *args):
        measured = measure(self, *args)
        waits.on_host = False
        counts.append([w for w in waits.found if "masking_utils.py" not in w])
        waits.found = []
        return measured

    def on_host(values):
        found = read(values)
        waits.on_host = True
        return found

    monkeypatch.setattr(meter.Meter, "step", step)
    monkeypatch.setattr(meter, "read_on_host", on_host)
    sources = [f"data.sources.{name}.path={sft_file}" for name in "ab"] + ["data.sources.b.weight=2"]
    config = load_config([
        *(o for o in tiny if not o.startswith("data.train")), *sources, "data.packing=best_fit", f"method={method}",
        f"train.max_steps={steps}", "train.log_every=100", "train.micro_batch_size=2", "checkpoint.every=100",
        "evaluation.every=100", f"run.dir={tmp_path / 'run'}",
    ])  # fmt: skip
    directory = RunDir(tmp_path / "run")
    directory.acquire()
    with open(os.devnull, "w") as nowhere:
        progress, pulse = Progress(True, stream=nowhere), Pulse(0, 60.0, 10.0, 60.0)
        run = build(config, distributed.start(config.backend, False), directory, progress, Stop(), pulse)
        with waits:
            fit(run)
    run.loader.close()
    directory.close()
    assert counts == [["cpu in meter.py read_on_host"]] * steps


def test_the_next_window_is_made_by_another_thread_and_a_fault_waits_for_the_one_who_asks():
    made: list[tuple[int, str]] = []

    def make(number: int) -> int:
        made.append((number, threading.current_thread().name))
        if number == 3:
            raise ValueError("the third")
        return number * number

    ahead = Ahead(make)
    assert ahead.get(1) == 1
    ahead.begin(2)
    assert ahead.get(2) == 4
    ahead.begin(3)
    for _ in range(2):
        with pytest.raises(ValueError, match="the third"):
            ahead.get(3)
    assert ahead.get(4) == 16
    assert [number for number, _ in made] == [1, 2, 3, 4]
    assert {thread for _, thread in made} == {"ahead_0"}
    assert ahead.waited() > 0
    assert ahead.waited() == 0
    ahead.close()
    assert not any(t.name.startswith("ahead_0") for t in threading.enumerate())
