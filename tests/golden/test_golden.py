"""Sixteen small runs give the figures of `golden.json`: whatever is moved in the house, no curve moves with it.

Batch checksums, counts and texts are equal; losses, norms, evaluations and exported weights agree to BOUND, relative. They are
the same bits on one machine. Another takes sums in another order: with other instruction sets for ATen, MKL and oneDNN
(ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41, and AVX2 for all three, beside AVX512) the worst figure
of all moved by 3e-15 in float64 and by 6e-7 in float32, in which ZeRO-3 computes, since DeepSpeed has no float64. BOUND leaves
room for the orders of other libraries; what changes a curve moves it by far more.
"""

from __future__ import annotations

import copy
import json
from functools import cache

import pytest
from golden import compare, make_golden, runs

BOUND = {"float64": 1e-12, "float32": 1e-5}
RECORD = json.loads(make_golden.RECORD.read_text())
HEAD = ("overrides", "ranks", "dtype", "resumed")  # how the record was made; later keys may have other names


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(backend)`: its runs, trained once."""
    return cache(lambda backend: make_golden.make(tmp_path_factory.mktemp(backend), (backend,)))


def figures(run: dict) -> dict:
    return {key: value for key, value in run.items() if key not in HEAD}


@pytest.mark.parametrize("run", runs.RUNS, ids=lambda run: run.name)
def test_the_figures_of_the_record(made, run):
    found = made(run.backend)
    assert found["inputs"] == RECORD["inputs"], "the inputs are others: inputs.py, NumPy or Python makes them anew"
    wrong = compare.differences(figures(found["runs"][run.name]), figures(RECORD["runs"][run.name]), BOUND[run.dtype])
    assert not wrong, f"{len(wrong)} figures differ:\n" + "\n".join(wrong[:20])


def test_every_recorded_run_is_made():
    assert list(RECORD["runs"]) == [run.name for run in runs.RUNS]


def test_the_record_holds_what_can_differ():
    """Each objective with each method, on each backend; and curves that learn, so that they say something."""
    cells = {(run.objective, run.method) for run in runs.RUNS if run.backend == "single"}
    assert cells == {(objective, method) for objective in runs.OBJECTIVES for method in runs.METHODS}
    for backend in ("fsdp", "zero3"):
        assert {run.objective for run in runs.RUNS if run.backend == backend} == set(runs.OBJECTIVES)
        assert {run.method for run in runs.RUNS if run.backend == backend} == set(runs.METHODS)
    for name, run in RECORD["runs"].items():
        assert len(set(run["steps"]["batch"])) == len(run["steps"]["loss"]) == runs.STEPS, name
        assert run["final"]["validation"]["tuned"]["loss"] < run["final"]["validation"]["base"]["loss"], name
        assert run["export"], name


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("steps", "loss", 3), lambda x: x * (1 + 3e-12)),
        (("steps", "batch", 0), lambda _: "00000000"),
        (("steps", "label_tokens", 5), lambda x: x + 1),
        (("evaluations", 1, "perplexity"), lambda x: x * (1 - 3e-12)),
        (("samples", 0, 1), lambda x: x + "."),
        (("evaluations",), lambda x: x[:-1]),
        (("final", "validation"), lambda x: x | {"more": 1.0}),
    ],
)
def test_a_difference_is_seen(path, value):
    run = figures(RECORD["runs"]["single-sft-lora"])
    other = copy.deepcopy(run)
    assert not compare.differences(other, run, BOUND["float64"])
    *way, last = path
    place = other
    for key in way:
        place = place[key]
    place[last] = value(place[last])
    assert compare.differences(other, run, BOUND["float64"])
