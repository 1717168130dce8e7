"""The GPU benchmarks where there is no GPU: every path of theirs that a CPU can run, and the refusal to measure there."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EPS = 2.0**-23
pytestmark = pytest.mark.slow


def run(script: str, *arguments: str, peers: Path | None = None) -> subprocess.CompletedProcess[str]:
    variables = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if peers is not None:
        variables["PYTHONPATH"] = os.pathsep.join([str(peers), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)


def fake_peer(folder: Path, distribution: str, module: str, code: str) -> None:
    """An installed package of this name and version 0.0.1 whose import runs `code`."""
    package, facts = folder / module, folder / f"{module}-0.0.1.dist-info"
    package.mkdir(parents=True)
    facts.mkdir()
    (package / "__init__.py").write_text(code)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.0.1\n")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path, str]:
    """One smoke run with a peer that dies at import and one that refuses: the record, its folder, what was printed."""
    out = tmp_path_factory.mktemp("kernels")
    fake_peer(out / "peers", "cut-cross-entropy", "cut_cross_entropy", "import os\nos._exit(7)\n")
    fake_peer(out / "peers", "liger-kernel", "liger_kernel", "raise RuntimeError('not on this machine')\n")
    only = ["vocabulary512-trained", "vocabulary512-frozen-ignored", "dropout", "norm", "rope", "glu", "nf4"]
    some = ["--providers", "eager", "ours", "liger", "cce", "torch", "peft"]  # each is a process of seconds
    done = run("kernels.py", "--smoke", "--out", str(out), "--only", *only, *some, peers=out / "peers")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "kernels.json").read_text()), out, done.stdout


def test_our_errors_are_at_most_twice_those_of_eager(kernels: tuple[dict, Path, str]) -> None:
    record, _, _ = kernels
    assert {row["kernel"] for row in record["cases"]} == {
        "linear_cross_entropy", "lora", "rms_norm", "add_rms_norm", "rope", "swiglu", "geglu", "nf4",
    }  # fmt: skip
    for row in record["cases"]:
        eager, ours = row["providers"]["eager"]["errors"], row["providers"]["ours"]["errors"]
        assert set(ours) == set(eager), row["name"]
        for name, exact in eager.items():
            for kind in ("max", "rms"):
                allowed = 2.0 * max(exact[kind], EPS)
                assert ours[name][kind] <= allowed, (row["name"], name, kind)
    trained = next(row for row in record["cases"] if row["kernel"] == "linear_cross_entropy" and row["trains"])
    assert set(trained["providers"]["ours"]["errors"]) == {"loss", "d hidden", "d weight"}
    assert 2.0 < trained["providers"]["eager"]["loss"] < 3.0  # as peaked as a trained model's logits


def test_every_provider_is_measured_or_named_with_its_reason(kernels: tuple[dict, Path, str]) -> None:
    record, out, printed = kernels
    text = (out / "kernels.md").read_text()
    for row in record["cases"]:
        assert set(row["providers"]) == set(record["titles"]), row["name"]
        for name, cell in row["providers"].items():
            if "skipped" in cell:
                assert cell["skipped"], (row["name"], name)
            else:
                assert min(cell[side]["p50"] for side in ("forward_ms", "both_ms")) > 0, (row["name"], name)
                assert cell["errors"] or "masks" in cell["errors_of"], (row["name"], name)
        assert all(row["floors"][run]["both_ms"] > 0 for run in ("floor-first", "floor-last")), row["name"]
    head = next(row for row in record["cases"] if row["kernel"] == "linear_cross_entropy")["providers"]
    assert "exit 7" in head["cce"]["skipped"]
    assert "not on this machine" in head["liger"]["skipped"]
    assert head["ours-chunks"]["skipped"] == "left out by --providers"
    assert "AGPL" in head["unsloth"]["skipped"]
    assert "skipped" not in head["torch"]
    lora = next(row for row in record["cases"] if row["kernel"] == "lora")["providers"]
    assert not {n for n in ("ours", "eager", "peft") if "skipped" in lora[n]}
    assert "- CCE: not measured: its process died (exit 7)" in text
    assert "cce: its process died (exit 7) in linear_cross_entropy-" in printed
    assert record["versions"]["liger-kernel"] == "0.0.1"


def test_tables_and_plots_hold_every_case(kernels: tuple[dict, Path, str], tmp_path: Path) -> None:
    record, out, _ = kernels
    text = (out / "kernels.md").read_text()
    assert "nothing here is a measurement" in text
    assert text.count("\n## ") == len(record["cases"])
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    measured = sum("skipped" not in cell for row in record["cases"] for cell in row["providers"].values())
    assert len(rows) == measured + 2 * len(record["cases"])
    assert len({line.count("|") for line in rows}) == 1
    (tmp_path / "kernels.json").write_text(json.dumps(record))
    done = run("kernels.py", "--render", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kernels.md").read_text() == text
    for kernel in {row["kernel"] for row in record["cases"]}:
        picture = (tmp_path / f"kernels-{kernel}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5000, kernel


def test_a_target_is_judged_only_by_what_was_measured(
    kernels: tuple[dict, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tables = importlib.import_module("kernel_tables")
    record, _, _ = kernels
    row = json.loads(json.dumps(record["cases"][0]))
    row["target"] = {"milliseconds": 24.0, "gigabytes": 0.6, "of_floor": None}
    row["providers"]["ours"] |= {"both_ms": {"p50": 23.0}, "peak_bytes": 700_000_000}
    smoke, real = (tables.markdown(record | {"smoke": smoke, "cases": [row]}) for smoke in (True, False))
    assert "Target: milliseconds 24, gigabytes 0.6; not measured." in smoke
    assert "Target: at most 24 ms: 23.00 ms, met; at most 0.6 GB: 0.70 GB, MISSED." in real
    assert "nothing here is a measurement" not in real


def test_steps_of_a_whole_model_agree_with_transformers(tmp_path: Path) -> None:
    done = run("steps.py", "--smoke", "--out", str(tmp_path), "--only", "ours-on", "peft-float32", "transformers")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "steps.json").read_text())
    lora, full = (run["variants"] for run in record["runs"])
    assert list(lora) == ["ours-on", "peft-float32"]
    assert lora["ours-on"]["installed"][0].startswith("in place: rms_norm")
    assert lora["ours-on"]["trained"] == lora["peft-float32"]["trained"]
    assert lora["ours-on"]["loss"] == pytest.approx(lora["peft-float32"]["loss"], rel=1e-6)
    assert full["ours-on"]["loss"] == pytest.approx(full["transformers"]["loss"], rel=1e-6)
    assert full["transformers-liger"].get("skipped") or full["transformers-liger"]["loss"]
    # Two layers of attention (hidden 64, keys 32) and MLP (96), and the tied head of 512.
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64) + 512 * 64
    for run_, share in zip(record["runs"], (4, 6), strict=True):
        cell = run_["variants"]["ours-on"]
        assert cell["weights_that_multiply"] == weights
        assert cell["model_flops_per_second"] == pytest.approx(cell["tokens_per_second"] * share * weights)


@pytest.mark.parametrize("script", ["kernels.py", "steps.py"])
def test_without_a_gpu_nothing_is_measured(script: str, tmp_path: Path) -> None:
    done = run(script, "--out", str(tmp_path))
    assert done.returncode == 2
    assert "--smoke" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
