"""What the sinks share, and TensorBoard, whose own reader is the judge."""

from __future__ import annotations

import pytest
from tritune.trainer import tracking
from tritune.trainer.config import TrackingConfig
from tritune.trainer.errors import InputError
from tritune.trainer.tracking import Guarded, open_sinks, require_trackers, under


class Broken:
    def __init__(self, message: str = "disk full") -> None:
        self.calls: list[str] = []
        self.message = message

    def log(self, step, figures):
        self.calls.append(f"log {step}")
        if step >= 2:
            raise OSError(self.message)

    def summary(self, figures):
        self.calls.append("summary")

    def close(self, exit_code):
        self.calls.append(f"close {exit_code}")
        raise RuntimeError("still broken")


def test_a_failing_sink_is_announced_once_and_closed():
    said: list[str] = []
    sink, inner = Guarded("X", Broken(), said.append), None
    inner = sink.sink
    for step in range(5):
        sink.log(step, {"train/loss": 1.0})
    sink.summary({})
    sink.close(1)
    sink.close(1)
    assert inner.calls == ["log 0", "log 1", "log 2", "close 1"]
    assert len(said) == 2
    assert "X failed (OSError: disk full)" in said[0]
    assert "could not be closed either (RuntimeError: still broken)" in said[1]


def test_the_announcement_holds_no_secret():
    said: list[str] = []
    sink = Guarded("X", Broken("POST https://user:hunter22222@host/ failed"), said.append)
    sink.log(2, {})
    assert "hunter" not in said[0]
    assert "host/ failed" in said[0]


def test_an_interrupt_is_not_taken_for_a_failing_sink():
    class Interrupted(Broken):
        def log(self, step, figures):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded("X", Interrupted(), pytest.fail).log(1, {})


def test_nothing_is_opened_by_default(tmp_path):
    assert open_sinks(TrackingConfig(), tmp_path, {}, 0, pytest.fail) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_an_absent_package_is_refused_with_its_remedy(package, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == package else object())
    config = TrackingConfig(**{package: True})
    require_trackers(TrackingConfig())
    with pytest.raises(InputError, match=rf"tracking\.{package}=true: .*pip install {package}"):
        require_trackers(config)
    with pytest.raises(InputError):
        open_sinks(config, tmp_path, {}, 0, pytest.fail)


def test_names_of_figures():
    row = {"step": 3, "loss": 0.5, "lr": 1e-4, "note": "x", "memory": None}
    assert under("train", row) == {"train/loss": 0.5, "train/lr": 1e-4}
    results = {"test": {"base": None, "tuned": {"accuracy": 0.9}}, "retention": {"base": {"loss": 1}}}
    assert under("", results) == {"test/tuned/accuracy": 0.9, "retention/base/loss": 1}


def read_scalars(path, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path)).Reload()
    return [(e.step, round(e.value, 4)) for e in events.Scalars(name)], events


def test_tensorboard_resumes_without_repeated_steps(tmp_path):
    pytest.importorskip("tensorboard")
    config = TrackingConfig(tensorboard=True)
    (killed,) = open_sinks(config, tmp_path, {"optim": {"lr": 0.125}}, 0, pytest.fail)
    for step in range(1, 6):
        killed.log(step, {"train/loss": float(step)})  # never closed: it was killed, with a checkpoint of step 3
    assert read_scalars(tmp_path / "tensorboard", "train/loss")[0] == [(i, float(i)) for i in range(1, 6)]
    (resumed,) = open_sinks(config, tmp_path, {"optim": {"lr": 0.125}}, 3, pytest.fail)
    for step in range(4, 7):
        resumed.log(step, {"train/loss": step + 0.5})
    resumed.summary({"test/tuned/accuracy": 0.75})
    resumed.close(0)
    rows, events = read_scalars(tmp_path / "tensorboard", "train/loss")
    assert rows == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5)]
    assert [(e.step, e.value) for e in events.Scalars("test/tuned/accuracy")] == [(6, 0.75)]
    (text, *_) = events.Tensors("config/text_summary")
    assert "lr: 0.125" in text.tensor_proto.string_val[0].decode()
