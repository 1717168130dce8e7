"""An objective in one file from outside the package: found, refused with reasons, trained, proved, and read again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import harness
import pytest
from tritune.launch import cli
from tritune.launch.verify import verify
from tritune.trainer.config import registry
from tritune.trainer.config.compose import load_config
from tritune.trainer.errors import ConfigFaults

PLUGIN = Path(__file__).parents[1] / "plugins" / "contrast.py"
WORDS = [f"plugins=[{PLUGIN}]", "objective=contrast"]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Files that a test loads are unknown to the next."""
    monkeypatch.setattr(registry, "_PLUGINS", {axis: {} for axis in registry.AXES})
    monkeypatch.setattr(registry, "_LOADED", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("contrast", "scale", "mine_of_a_test"):
        sys.modules.pop(name, None)


def faults(*overrides: str, **arguments) -> list[str]:
    with pytest.raises(ConfigFaults) as raised:
        load_config([*overrides], training=False, **arguments)
    return raised.value.faults


def test_an_option_of_a_user_s_file_has_its_keys_and_its_rules():
    words = ["model=tiny", *WORDS]
    assert load_config([*words, "objective.beta=0.5"], training=False).objective.beta == 0.5
    assert load_config([*words, "evaluation.metric=pairs_right"], training=False).evaluation.metric == "pairs_right"
    (fault,) = faults(*words, "objective.beta=-1")
    assert fault.startswith("objective.beta=-1.0: it scales a difference.")
    (fault,) = faults(*words, "objective.betta=1")
    assert "Did you mean objective.beta?" in fault


def test_without_its_file_the_option_is_unknown():
    (fault,) = faults("model=tiny", "objective=contrast")
    assert fault.startswith("objective=contrast: there is no such objective.")


@pytest.mark.parametrize(("text", "said"), [
    (None, "the file does not exist"),
    ("raise RuntimeError('no')", "it does not import: RuntimeError: no"),
    ("x = 1", "it holds no dataclass with a name that is a subclass of ObjectiveConfig or MethodConfig"),
    ("from dataclasses import dataclass\nfrom tritune.trainer.config.axes import ObjectiveConfig\n"
     "@dataclass\nclass Mine(ObjectiveConfig):\n    name: str = 'sft'\n", "there is an option objective=sft already"),
])  # fmt: skip
def test_a_file_that_gives_no_option_is_refused(tmp_path, text, said):
    path = tmp_path / "mine_of_a_test.py"
    if text is not None:
        path.write_text(text)
    (fault,) = faults("model=tiny", f"plugins=[{path}]")
    assert fault.startswith(f"plugins={path}: {said}")


@pytest.mark.parametrize(("name", "text", "said"), [
    ("my.own.py", "", "a module has no such name"),
    ("ends_a_process.py", "import sys; sys.exit(3)", "it does not import: SystemExit"),
    ("plain_class.py", "from tritune.trainer.config.axes import ObjectiveConfig\n"
     "class Mine(ObjectiveConfig):\n    name: str = 'mine'\n", "it holds no dataclass with a name"),
    ("odd_key.py", "from dataclasses import dataclass\nfrom tritune.trainer.config.axes import ObjectiveConfig\n"
     "@dataclass\nclass Mine(ObjectiveConfig):\n    name: str = 'mine'\n    what: object = None\n", "its keys cannot be read"),
])  # fmt: skip
def test_a_file_that_is_wrong_in_a_way_of_its_own_is_refused(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text)
    (fault,) = faults("model=tiny", f"plugins=[{path}]")
    assert fault.startswith(f"plugins={path}: {said}")
    sys.modules.pop(path.stem, None)


def test_the_code_and_the_keys_of_a_user_s_option_are_part_of_what_is_cached():
    option = load_config(["model=tiny", *WORDS], training=False).objective
    other = load_config(["model=tiny", *WORDS, "objective.beta=0.3"], training=False).objective
    assert registry.code_of(option)[0] == registry.code_of(other)[0]
    assert registry.code_of(option) != registry.code_of(other)
    assert registry.code_of(registry.default_option("objective")) == []


def test_a_file_that_is_called_as_a_module_is_refused(tmp_path):
    (tmp_path / "json.py").write_text("")
    (fault,) = faults("model=tiny", f"plugins=[{tmp_path / 'json.py'}]")
    assert "another module is called json" in fault


def test_only_the_command_line_names_code(tmp_path):
    """A YAML, or the configuration of a run that is read, would run whoever's code wrote it."""
    (tmp_path / "experiment").mkdir()
    code = tmp_path / "code.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\nplugins: [{code}]\n")
    (fault,) = faults("model=tiny", "experiment=mine", config_dir=str(tmp_path))
    assert "only the command line names Python files that are run" in fault
    (fault,) = faults(kept={"plugins": [str(code)], "objective": {"name": "mine"}})
    assert fault.startswith("objective=mine in config.yaml of the run: no option that is loaded is called so.")
    assert str(code) in fault
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_it_trains_and_is_read_again(tiny, sft_file, tmp_path, tritune, capfd):
    run = tmp_path / "run"
    words = [*tiny, *WORDS, "data.bad_rows=skip", f"run.dir={run}", "data.validation_share=0.2", "report.enabled=true",
             "evaluation.metric=pairs_right", "train.use_best=true"]  # fmt: skip
    done = tritune(*words, "objective.twice=true")
    assert done.code == 0, done.err
    steps = harness.rows(run)
    assert all({"loss_answer", "loss_pair", "pairs_right"} <= set(row) for row in steps)
    assert steps[0]["loss"] == pytest.approx(steps[0]["loss_answer"] + 0.5 * steps[0]["loss_pair"], rel=0.05)
    assert "answers against their words in reverse" in (run / "report.html").read_text()
    again = [f"run.dir={run}", f"data.test={sft_file}", "evaluation.splits=[test]"]
    capfd.readouterr()
    registry._PLUGINS["objective"].clear()  # as in another process
    registry._LOADED.clear()
    assert cli.main(["evaluate", *again]) == 2
    assert "only the command line names Python files that are run" in capfd.readouterr().err
    assert cli.main(["evaluate", *again, WORDS[0]]) == 0
    assert set(json.loads((run / "evaluation.json").read_text())["eval"]["test"]) == {"loss", "pairs_right"}


@pytest.mark.slow
def test_every_sharding_trains_the_same_model(tmp_path):
    """Pairs in packs, two updates of each window, two terms."""
    harness.write_prompts(tmp_path / "rows.jsonl", 120, seed=3)
    argv = [
        f"model.path={harness.save_small_llama(tmp_path / 'model', 160)}", f"data.train={tmp_path / 'rows.jsonl'}",
        "data.max_length=160", "backend.device=cpu", "launch.num_procs=2", "verify.parameters_every=10", *WORDS,
        "optim.lr=2e-3", "train.batch_size=12", "train.micro_batch_size=3", "data.bad_rows=skip", "verify.steps=12",
        "data.packing=best_fit", "objective.twice=true", "verify.backends=[fsdp,zero3]", f"run.dir={tmp_path / 'proof'}",
    ]  # fmt: skip
    assert verify(["parity", *argv]) == 0
    found = json.loads((tmp_path / "proof" / "parity.json").read_text())
    assert found["holds"]
    assert found["reference"][-1]["loss"] < 0.8 * found["reference"][0]["loss"]


@pytest.mark.slow
def test_a_method_of_one_file_is_proved_and_exported(tmp_path, tritune):
    """Factors beside a frozen base: on every sharding the same model, merged in the end, and no adapter where PEFT has none."""
    harness.write_prompts(tmp_path / "rows.jsonl", 60, seed=3)
    argv = [
        f"model.path={harness.save_small_llama(tmp_path / 'model', 160)}", f"data.train={tmp_path / 'rows.jsonl'}",
        "data.max_length=160", "backend.device=cpu", "launch.num_procs=2", f"plugins=[{PLUGIN.parent / 'scale.py'}]",
        "method=scale", "method.targets=[down_proj,q_proj]", "optim.lr=5e-2", "train.batch_size=12", "train.micro_batch_size=3",
    ]  # fmt: skip
    proof = [
        "verify.steps=8",
        "verify.parameters_every=4",
        "verify.backends=[fsdp,zero3]",
        f"run.dir={tmp_path / 'proof'}",
    ]
    assert verify(["parity", *argv, *proof]) == 0
    found = json.loads((tmp_path / "proof" / "parity.json").read_text())
    assert found["holds"]
    assert found["reference"][-1]["loss"] < found["reference"][0]["loss"]
    alone = [word for word in argv if not word.startswith("launch.")]
    refused = tritune(*alone, "train.max_steps=2", "export.form=adapter", f"run.dir={tmp_path / 'run'}")
    assert refused.code == 2
    assert "PEFT's layout has no adapter of method=scale. Use merged" in refused.err
    assert tritune(*alone, "train.max_steps=2", f"run.dir={tmp_path / 'run'}").code == 0
    exported = json.loads((tmp_path / "run" / "summary.json").read_text())["export"]
    assert (exported["form"], exported["reader"]) == ("merged", "transformers")
    assert exported["max_difference"] <= exported["allowed"]
