"""A YAML file that anyone may have written: read, or refused in about a second with one message."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml
from tritune.trainer.config.compose import compose_partly
from tritune.trainer.config.yaml_file import MOST_BYTES, MOST_DEPTH, read_mapping, read_yaml
from tritune.trainer.errors import InputError
from tritune.trainer.verbs import report as report_verb
from tritune.trainer.verbs import run_verb

LAUGHS = "x0: &x0 [a,a,a,a,a,a,a,a,a]\n" + "".join(
    f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MAPPINGS = "x0: &x0 {a: b}\n" + "".join(
    f"x{i}: &x{i} {{a: *x{i - 1}, b: *x{i - 1}, c: *x{i - 1}}}\n" for i in range(1, 30)
)
HOSTILE = {
    "seed: 1\nseed: 2\n": "the key seed stands twice",
    "model: {path: a, path: b}\n": "the key path stands twice",
    "seed: " + "9" * 5000 + "\n": "an integer of 5,000 digits",
    "seed: 0x" + "f" * 5000 + "\n": "digits",
    "seed: " + ":".join(["59"] * 3000) + "\n": "digits",
    LAUGHS + "model: {config: *x9}\n": "values",
    MAPPINGS + "model: {config: *x29}\n": "values",
    "model: {config: &a {b: *a}}\n": "an alias of what it stands in",
    "model: " + "[" * 100_000 + "\n": f"deeper than {MOST_DEPTH} levels",
    "".join(" " * i + "a:\n" for i in range(1000)): f"deeper than {MOST_DEPTH} levels",
    "model: !!python/object/apply:os.system [id]\n": "could not determine a constructor",
    "? [a, b]\n: 3\n": "unhashable",
    "a: *unknown\n": "undefined alias",
    "\x00": "not valid YAML",
    "a: " + "b" * MOST_BYTES: "bytes",
}


@pytest.mark.parametrize("text", HOSTILE, ids=[t[:12].strip() + str(i) for i, t in enumerate(HOSTILE)])
def test_hostile_files_are_refused_as_an_experiment_and_as_a_run(text, tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n" + text)
    (tmp_path / "config.yaml").write_text(text)
    began = time.monotonic()
    config, faults = compose_partly(["experiment=mine"], str(tmp_path))
    assert config is None
    assert len(faults) == 1
    assert HOSTILE[text] in faults[0]
    assert str(tmp_path / "experiment" / "mine.yaml") in faults[0]
    assert faults[0].endswith("Mend the file")
    assert run_verb(report_verb, [f"run.dir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert HOSTILE[text] in said
    assert "Traceback" not in said
    assert (
        time.monotonic() - began < 10
    )  # both together take some 0.2 s on an idle machine, and over 20 each without bounds


def test_files_that_defaults_bring_are_read_with_the_same_bounds(tmp_path):
    for group, name, text in (("experiment", "mine", "# @package _global_\ndefaults:\n- override /model: bad\n- _self_\n"),
                              ("model", "bad", LAUGHS + "config: *x9\n")):  # fmt: skip
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(text)
    _, faults = compose_partly(["experiment=mine"], str(tmp_path))
    assert len(faults) == 1
    assert "model/bad.yaml: with its aliases laid out" in faults[0]


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.yaml", tmp_path / "zero.yaml", tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(InputError, match="no regular file"):
            read_yaml(path)


def test_a_mapping_has_keys_of_text(tmp_path):
    for text, words in (("- a\n", "a list"), ("", "a NoneType"), ("1: 2\n", "its key 1 is no text")):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(InputError, match=words):
            read_mapping(tmp_path / "config.yaml")


def test_ordinary_files_say_what_pyyaml_reads_and_a_date_is_text(tmp_path):
    import tritune.conf

    for path in Path(tritune.conf.__file__).parent.rglob("*.yaml"):
        assert read_yaml(path)[1] == yaml.safe_load(path.read_text())
    (tmp_path / "a.yaml").write_text("a: 2024-01-01\nb: 9999-99-99\nc: &x [1, 0x1f]\nd: [*x, *x]\n")
    expected = {"a": "2024-01-01", "b": "9999-99-99", "c": [1, 31], "d": [[1, 31], [1, 31]]}
    assert read_yaml(tmp_path / "a.yaml")[1] == expected


@pytest.mark.parametrize(
    ("override", "words"),
    [("seed=" + "9" * 5000, "too many digits"), ("model.config=" + "[" * 1000 + "]" * 1000, "does not parse"),
     ("data.labels=[" + ",".join(["a"] * 100_000) + "]", "characters")],
)  # fmt: skip
def test_overrides_that_the_parser_cannot_take_are_faults(override, words):
    began = time.monotonic()
    _, faults = compose_partly([override])
    assert len([f for f in faults if words in f]) == 1
    assert time.monotonic() - began < 10


def test_too_many_overrides_are_one_fault():
    _, faults = compose_partly([f"model.config.k{i}={i}" for i in range(10_000)])
    assert faults == ["overrides: there are 10,000, and at most 1,000 are read. Put them into a YAML of --config-dir"]
