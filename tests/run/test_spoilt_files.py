"""A run directory whose files were spoilt before a resume: each is named, or written anew; nothing hangs or is a traceback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import harness
import pytest
from tritune.trainer.checkpoint.names import saved_steps
from tritune.trainer.errors import EXIT_INPUT, InputError
from tritune.trainer.run.directory import RunDir
from tritune.trainer.run.files import FILES, read_config, read_json, read_lines, read_rows, require_files

CONTENTS = {
    "empty": b"", "zeros": bytes(200), "garbage": b"\xff\xfe\x00garbage", "deep": b"[" * 100_000, "number": b"5",
    "digits": b"9" * 5000, "cut": b'{"a": ', "null": b"null", "list": b"[]", "object": b"{}",
    "bomb": b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 20)),
}  # fmt: skip
OTHERS = {
    "fifo": os.mkfifo, "folder": Path.mkdir, "endless": lambda p: p.symlink_to("/dev/zero"),
    "dangling": lambda p: p.symlink_to("/nowhere/x"),
}  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS)
def test_spoilt_contents_are_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(CONTENTS[content])
    (tmp_path / "config.yaml").write_bytes(CONTENTS[content])
    if content != "object":
        with pytest.raises(InputError, match=r"x\.json: the file is spoilt .* Mend it"):
            read_json(tmp_path / "x.json", dict, "Mend it")
    else:
        assert read_json(tmp_path / "x.json", dict, "Mend it") == {}
    with pytest.raises(InputError, match=r"config\.yaml: the file is spoilt .* Move it away"):
        read_config(tmp_path)
    rows, spoilt = read_rows(tmp_path / "x.json")
    assert rows == []
    assert spoilt == CONTENTS[content].count(b"\n")


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_file_is_not_read(tmp_path, what):
    for name in FILES:
        OTHERS[what](tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: it is no regular file"):
            require_files(tmp_path)
        with pytest.raises(InputError, match=name):
            RunDir(tmp_path).acquire()
        for read in (lambda p: read_json(p, dict, ""), read_lines):
            with pytest.raises(InputError, match=name):
                read(tmp_path / name)
        (tmp_path / name).rmdir() if what == "folder" else (tmp_path / name).unlink()
    require_files(tmp_path)


@pytest.fixture(scope="module")
def trained(sft_file, tmp_path_factory) -> tuple[list[str], Path]:
    """A run of four steps whose last checkpoint is gone: started again it trains one step more."""
    from tritune.trainer.__main__ import main

    directory = tmp_path_factory.mktemp("trained") / "run"
    overrides = [
        "model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48", f"data.train={sft_file}",
        "data.max_length=160", "train.batch_size=8", "train.max_steps=4", "backend.device=cpu", "export.enabled=false",
        "report.enabled=false", "checkpoint.every=1", "data.test_share=0.1", "generate.max_new_tokens=2",
    ]  # fmt: skip
    with harness.keeping_signals():
        assert main([*overrides, f"run.dir={directory}"]) == 0
    shutil.rmtree(saved_steps(directory / "checkpoints")[-1])
    return overrides, directory


@pytest.mark.parametrize("name", ["config.yaml", "base.json"])
def test_what_a_resume_needs_is_named_and_goes_on_without(tritune, trained, tmp_path, name):
    overrides, source = trained
    shutil.copytree(source, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(CONTENTS["garbage"])
    command = [*overrides, f"run.dir={tmp_path / 'run'}"]
    result = tritune(*command)
    assert result.code == EXIT_INPUT, result.err
    assert f"{name}: the file is spoilt" in result.err
    assert "Traceback" not in result.err
    (tmp_path / "run" / name).unlink()  # as it says
    if name == "config.yaml":
        result = tritune(*command, "seed=9")
        assert result.code == EXIT_INPUT
        assert "step-00000003 is of a run with other values: seed: 0 -> 9" in result.err, "the checkpoint knows"
    assert tritune(*command).code == 0
    losses = [[row["loss"] for row in harness.rows(d)] for d in (source, tmp_path / "run")]
    assert losses[0] == losses[1]


def test_what_a_start_writes_anew_may_be_spoilt(tritune, trained, tmp_path):
    overrides, source = trained
    run = tmp_path / "run"
    shutil.copytree(source, run)
    for number, name in enumerate(("status.json", "lock.json", "samples.json", "summary.json", "data.json", "environment.json",
                                   "train.log", "attempts.jsonl")):  # fmt: skip
        (run / name).write_bytes(list(CONTENTS.values())[number % 5])
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + b"\x00\xff\n[1]\nnull\n{}\n")
    (run / "base.json").write_text("{}")
    result = tritune(*overrides, f"run.dir={run}")
    assert result.code == 0, result.err
    assert "metrics.jsonl is spoilt: 4 of its lines are no rows" in result.err
    assert "samples.json is spoilt: what the base model answered is left out" in result.err
    assert [row["loss"] for row in harness.rows(run)] == [row["loss"] for row in harness.rows(source)]
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert json.loads((run / "summary.json").read_text())["eval"]["test"]["base"] is None
    assert "base.json has no figures of test" in result.err
    (last,) = saved_steps(run / "checkpoints")[-1:]
    shutil.rmtree(last)
    log.write_text("")  # nothing can bring its rows back
    result = tritune(*overrides, f"run.dir={run}")
    assert result.code == 0, result.err
    assert "metrics.jsonl has 0 rows up to step 3, where train.log_every=1 makes 3" in result.err
