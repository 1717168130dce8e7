"""Keys under their old names: read as what they are called now, wherever they stand, and said once."""

from __future__ import annotations

import pytest
import yaml
from tritune.trainer.config import renamed
from tritune.trainer.config.compose import compose_partly, load_config, to_dict
from tritune.trainer.config.identity import identity_of
from tritune.trainer.errors import ConfigFaults, InputError
from tritune.trainer.run.directory import RunDir
from tritune.trainer.run.identity import check_resume, placeless, require_same_run

MINIMAL = ["model=tiny", "data.train=rows.jsonl", "train.max_steps=1"]
OLD, NEW = "optim.max_norm", "optim.max_grad_norm"


@pytest.fixture(autouse=True)
def nothing_said_yet():
    renamed._say.cache_clear()


def of_a_yaml(tmp_path, optim: str, *overrides: str):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\noptim: {{{optim}}}\n")
    return load_config(["experiment=mine", *MINIMAL, *overrides], str(tmp_path))


def as_an_older_version(config) -> dict:
    """What it wrote to `config.yaml`."""
    tree = to_dict(config)
    tree["optim"]["max_norm"] = tree["optim"].pop("max_grad_norm")
    del tree["data"]["held_out"]
    tree["data"]["unsupervised"] = "refuse"
    return tree


def test_an_override(capsys):
    config = load_config([*MINIMAL, f"{OLD}=0.25"])
    assert (config.optim.max_grad_norm, config.optim.max_norm) == (0.25, None)
    assert to_dict(config) == to_dict(load_config([*MINIMAL, f"{NEW}=0.25"]))
    assert "max_norm" not in to_dict(config)["optim"]
    load_config([*MINIMAL, f"{OLD}=0.5"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1, "once a process"
    assert said.startswith(f"tritune: {OLD} is called {NEW} now")


def test_other_ranks_are_silent(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert load_config([*MINIMAL, f"{OLD}=0.25"]).optim.max_grad_norm == 0.25
    assert capsys.readouterr().err == ""


def test_a_yaml_of_the_user_s(tmp_path, capsys):
    assert of_a_yaml(tmp_path, "max_norm: 0.25, lr: 1e-3").optim.max_grad_norm == 0.25
    assert capsys.readouterr().err.startswith(f"tritune: {OLD} is called {NEW} now")


@pytest.mark.parametrize("key", [OLD, NEW])
def test_an_override_beats_a_yaml(tmp_path, key):
    assert of_a_yaml(tmp_path, "max_norm: 0.25", f"{key}=0.75").optim.max_grad_norm == 0.75


@pytest.mark.parametrize("value", ["many", "-1"])
def test_what_is_wrong_with_it_is_said_of_the_new_key(value):
    with pytest.raises(ConfigFaults) as error:
        load_config([*MINIMAL, f"{OLD}={value}"])
    (fault,) = error.value.faults
    assert fault.startswith(f"{NEW}={value}")


def test_a_reference_is_a_fault_as_ever(tmp_path, monkeypatch):
    monkeypatch.setenv("NORM", "0.125")
    with pytest.raises(ConfigFaults, match="interpolations are not read here"):
        of_a_yaml(tmp_path, 'max_norm: "${oc.env:NORM}"')


def test_no_remedy_names_it():
    _, faults = compose_partly([*MINIMAL, "optim.max_nrm=1"])
    assert faults == [f"optim.max_nrm=1: there is no such key. Did you mean {NEW}?"]


def test_a_run_of_an_older_version_is_read(capsys):
    kept = as_an_older_version(load_config([*MINIMAL, f"{NEW}=0.25"]))
    assert load_config([], kept=kept).optim.max_grad_norm == 0.25
    assert load_config([f"{NEW}=0.5"], kept=kept).optim.max_grad_norm == 0.5
    assert capsys.readouterr().err == "", "nobody typed it"


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """And is still another run with another value."""
    config, other = load_config([*MINIMAL, f"{NEW}=0.25"]), load_config([*MINIMAL, f"{NEW}=0.5"])
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(as_an_older_version(config)))
    saved = placeless(identity_of(config))
    saved |= {OLD: saved.pop(NEW), "data.unsupervised": "refuse"}
    ours, others = identity_of(config), identity_of(other)
    check_resume(config.run.resume, ours, RunDir(tmp_path))
    require_same_run(saved, ours, checkpoint)
    for refuse in (lambda: check_resume(other.run.resume, others, RunDir(tmp_path)),
                   lambda: require_same_run(saved, others, checkpoint)):  # fmt: skip
        with pytest.raises(InputError, match=rf"{NEW}: 0.25 -> 0.5"):
            refuse()


def test_the_new_name_goes_before_the_old_one(tmp_path):
    override = "# @package _global_\ndefaults: [{override /optim: mine}]\noptim: {max_grad_norm: 0.7}\n"
    for name, text in (("optim/mine", "defaults: [adamw]\nmax_norm: 0.25\n"), ("experiment/newer", override)):
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir()
        path.write_text(text)
    config = load_config([*MINIMAL, "experiment=newer"], str(tmp_path))
    assert (config.optim.max_grad_norm, config.optim.max_norm) == (0.7, None)
