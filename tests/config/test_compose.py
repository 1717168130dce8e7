"""The configuration's edge: what composes, what is refused, and that every fault is said at once with a remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import harness
import pytest
import tritune.conf
import yaml
from tritune.launch.cli import main as command_line
from tritune.trainer.config import IDENTITY, Config
from tritune.trainer.config.check import check
from tritune.trainer.config.compose import GROUPS, compose_partly, load_config, split_argv, to_dict
from tritune.trainer.config.registry import built_in
from tritune.trainer.config.schema import schemas
from tritune.trainer.errors import EXIT_INPUT, ConfigFaults
from tritune.trainer.methods.lora import LoraConfig

CONF = Path(tritune.conf.__file__).parent
SECRET = "a-secret-7f3e"
OPTIONS = sorted((p.parent.name, p.stem) for p in CONF.glob("*/*.yaml"))
MINIMAL = {"model": "model=tiny", "data": "data.train=rows.jsonl", "end": "train.max_steps=1"}


def faults(*overrides: str, config_dir: Path | None = None, world_size: int | None = None) -> list[str]:
    """Every fault of the overrides, through the door that the trainer uses."""
    try:
        load_config(list(overrides), None if config_dir is None else str(config_dir), world_size)
    except ConfigFaults as error:
        return error.faults
    return []


def minimal(*overrides: str, without: str = "") -> list[str]:
    return [text for name, text in MINIMAL.items() if name != without] + list(overrides)


def only(found: list[str]) -> str:
    assert len(found) == 1, found
    return found[0]


def keys_of(found: list[str]) -> set[str]:
    return {f.partition("=")[0] for f in found}


@pytest.fixture
def user_dir(tmp_path):
    """Write a file of the user's own groups; return the folder for `--config-dir`."""

    def write(text: str, group: str = "experiment", name: str = "mine") -> Path:
        (tmp_path / "groups" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / group / f"{name}.yaml").write_text(text)
        return tmp_path / "groups"

    return write


# -- what ships


def test_every_shipped_file_is_a_group_option():
    assert {group for group, _ in OPTIONS} == set(GROUPS)
    assert {p.name for p in CONF.glob("*.yaml")} == {"config.yaml"}


@pytest.mark.parametrize(("group", "name"), [o for o in OPTIONS if o[0] != "experiment"])
def test_every_group_option_composes(group, name):
    overrides = minimal(f"{group}={name}", without="model" if group == "model" else "")
    found = faults(*overrides)
    if (group, name) == ("model", "hub"):  # the template for models of the user's own
        assert keys_of(found) == {"model.path"}, found
        found = faults(*overrides, "model.path=somewhere")
    if group == "method" and not built_in("method")[name].merges:  # never merged, and so not exported without its base
        assert keys_of(found) == {"export.enabled"}, found
        found = faults(*overrides, "export.enabled=false")
    assert found == []


@pytest.mark.parametrize("name", [n for g, n in OPTIONS if g == "experiment"])
def test_every_experiment_lacks_only_its_paths(name):
    missing = keys_of(faults(f"experiment={name}"))
    assert missing <= {"model.path", "model.tokenizer", "data.train", "data.test", "data.retention"}
    assert faults(f"experiment={name}", *(f"{key}=somewhere" for key in missing), world_size=1) == []


@pytest.mark.parametrize("name", [n for g, n in OPTIONS if g == "experiment"])
def test_every_value_of_an_experiment_reaches_the_config(name):
    """A key of the file that ended anywhere else would be ignored silently."""
    config, _ = compose_partly([f"experiment={name}"])
    tree = to_dict(config)
    content = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
    for default in content.pop("defaults"):
        [(entry, option)] = default.items()
        group = entry.removeprefix("override /")
        chosen = to_dict(compose_partly([f"{group}={option}"])[0])[group]
        given = content.get(group, {})
        assert {k: v for k, v in tree[group].items() if k not in given} == {
            k: v for k, v in chosen.items() if k not in given
        }
    for group, values in content.items():
        for key, value in values.items():
            found = tree[group][key]
            assert found == (float(value) if isinstance(found, float) else value), (group, key)


def test_chosen_groups_bring_their_schema():
    config = load_config(minimal("method=lora", "method.rank=4", "objective=classify_token"))
    assert isinstance(config, Config)
    assert isinstance(config.method, LoraConfig)
    assert (config.method.rank, config.method.name, config.objective.name) == (4, "lora", "classify_token")


def test_config_survives_yaml():
    """What is written to config.yaml says every key, in plain types."""
    config = load_config(minimal("method=lora", "model.dtype=float64", "train.micro_batch_size=4"))
    tree = yaml.safe_load(yaml.safe_dump(to_dict(config)))
    assert tree["model"]["dtype"] == "float64"
    assert tree["train"]["micro_batch_size"] == 4
    assert tree["method"]["targets"] == ["all-linear"]
    assert set(tree) == set(Config.__dataclass_fields__)


# -- refused, all faults at once, with what to do


def test_faults_are_reported_together_with_the_nearest_key(tritune):
    given = ["optim.lrr=1", "train.bach_size=4", "model.tokeniser=bytes", "optim.lr=fast", "seed=x", "method=lorra"]
    result = tritune(*minimal(*given))
    assert result.code == EXIT_INPUT
    assert result.err.count("tritune:") == 1
    assert "Traceback" not in result.err
    assert result.lines()[0] == f"tritune: the configuration has {len(given)} faults:"
    assert len(result.lines()) == 1 + len(given)
    for expected in (
        "optim.lrr=1: there is no such key. Did you mean optim.lr?",
        "train.bach_size=4: there is no such key. Did you mean train.batch_size?",
        "model.tokeniser=bytes: there is no such key. Did you mean model.tokenizer?",
        "method=lorra: there is no such method. Did you mean lora?",
    ):
        assert expected in result.err
    assert "optim.lr=fast" in result.err
    assert "seed=x" in result.err


def test_rules_are_checked_besides_unknown_keys():
    found = faults(*minimal("optim.lrr=1", "train.batch_size=0", "optim.betas=[0.9]", "data.max_length=1"))
    assert keys_of(found) == {"optim.lrr", "train.batch_size", "optim.betas", "data.max_length"}


def test_a_mistyped_value_is_not_reported_again_as_missing():
    """`train.max_steps=ten` was given: that the run has no end is not a second fault."""
    found = faults(*minimal("train.max_steps=ten", without="end"))
    assert "train.max_steps=ten" in only(found)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr=fast", ["'fast'", "float"]),
        ("train.max_steps=1.5", ["1.5", "int"]),
        ("train.batch_size=true", ["True", "int"]),
        ("export.enabled=perhaps", ["perhaps", "bool"]),
        ("model.dtype=float16", ["float16", "float32", "bfloat16"]),
        ("optim.schedule=cosin", ["cosin", "cosine", "linear"]),
        ("data.labels=red", ["list"]),
        ("optim.eps=null", ["float"]),
        ("data.columns=[text]", ["dict"]),
        ("data.columns.label=[a,b]", ["data.columns.label=[a,b]", "str"]),
    ],
)
def test_mistyped_values_say_what_is_expected(override, words):
    message = only(faults(*minimal(override)))
    for word in [override, *words]:
        assert word in message


@pytest.mark.parametrize("group", GROUPS)
def test_unknown_group_choices_name_what_there_is(group):
    message = only(faults(f"{group}=zzz", "model.path=x", "data.train=a", "train.max_steps=1"))
    names = [n for g, n in OPTIONS if g == group]
    assert message.startswith(f"{group}=zzz: there is no such {group}.")
    assert all(n in message for n in names), message


def test_unknown_experiment_names_the_nearest():
    assert "Did you mean shakespeare?" in only(faults("experiment=shakespear"))


def test_unknown_verb_names_the_nearest(capsys):
    assert command_line(["trian"]) == EXIT_INPUT
    message = capsys.readouterr().err.strip()
    assert message == "tritune: trian: there is no such verb. Did you mean train? (tritune --help)"
    assert command_line(["zzz"]) == EXIT_INPUT
    message = capsys.readouterr().err.strip()
    assert "zzz" in message
    assert "train" in message
    assert "config" in message


def test_no_verb_at_all_shows_the_usage(capsys):
    assert command_line([]) == EXIT_INPUT
    assert "usage: tritune VERB" in capsys.readouterr().out


def test_config_verb_prints_values_and_faults(capsys):
    assert command_line(["config", *minimal("optim.lr=2e-3")]) == 0
    out = capsys.readouterr()
    assert yaml.safe_load(out.out)["optim"]["lr"] == 2e-3
    assert out.err == ""
    assert command_line(["config", *minimal("optim.lrr=2e-3")]) == EXIT_INPUT
    assert "Did you mean optim.lr?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override", ["+optim.momentum=0.9", "++optim.lr=1", "~optim.lr", "optim.lr=1,2", "optim.lr", "a b=1"]
)
def test_override_forms_that_mean_something_else_are_refused(override):
    assert override in only(faults(*minimal(override)))


@pytest.mark.parametrize(
    "override", ["hydra.run.dir=x", "hydra.searchpath=[x]", "hydra/launcher=basic", "method@optim=lora"]
)
def test_hydra_itself_is_not_configured(override):
    message = only(faults(*minimal(override)))
    assert message.startswith(override), message


def test_the_name_of_an_option_is_not_set_alone():
    assert "Write method=lora" in only(faults(*minimal("method.name=lora")))


@pytest.mark.parametrize(
    "given",
    [
        ["optim.lr=0", "optim.eps=-1", "optim.warmup_ratio=1.5", "train.micro_batch_size=0", "evaluation.every=0",
         "evaluation.metric=acuracy", "checkpoint.keep_last=0", "data.validation_share=1.0", "launch.num_procs=0"],
        ["optim.lr=nan", "optim.warmup_steps=-1", "train.micro_batch_size=64", "train.epochs=-1", "train.patience=2",
         "kernels.loss_chunk_tokens=0", "backend.timeout_seconds=0", "optim.max_grad_norm=0"],
        ["optim.lr=inf", "train.patience=0", "checkpoint.every=-1", "evaluation.batch_size=0", "optim.betas=[0.9,1.0]"],
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(given):
    found = faults(*minimal(*given))
    assert {g.partition("=")[0] for g in given} - keys_of(found) == set()
    assert all(". " in f.partition(": ")[2] for f in found), "value: rule. Remedy"


def test_accumulation_that_disagrees_names_the_right_one():
    given = minimal("train.batch_size=32", "train.micro_batch_size=4")
    assert faults(*given, "train.accumulation=8", world_size=1) == []
    assert faults(*given, "train.accumulation=4", world_size=2) == []
    message = only(faults(*given, "train.accumulation=8", world_size=2))
    for word in ("train.accumulation=8", "train.batch_size=32", "2 rank(s)", "micro-batches of 4", "makes 4", "Leave"):
        assert word in message


def test_single_backend_with_several_processes_is_refused():
    message = only(faults(*minimal("backend=single"), world_size=2))
    assert "2 processes" in message
    assert "backend=ddp" in message


def test_check_reports_every_rule_that_a_broken_config_breaks():
    config = load_config(minimal())
    config.optim.lr, config.train.batch_size, config.checkpoint.keep_last = -1.0, 0, 0
    assert keys_of(check(config)) == {"optim.lr", "train.batch_size", "checkpoint.keep_last"}


# -- the user's own files


def test_own_experiment_is_found_and_applied(user_dir):
    text = "# @package _global_\ndefaults:\n  - override /method: lora\nmethod: {rank: 3}\noptim: {lr: 5e-4}\n"
    folder = user_dir(text)
    config = load_config(["experiment=mine", *minimal()], str(folder))
    assert (config.method.rank, config.optim.lr) == (3, 5e-4)


def test_unknown_keys_inside_an_own_experiment_are_all_named(user_dir, tritune):
    folder = user_dir("# @package _global_\noptim: {lrr: 1}\ntrain: {bach_size: 3, max_steps: ten}\nfoo: 1\n")
    result = tritune("--config-dir", str(folder), "experiment=mine", *minimal())
    assert result.code == EXIT_INPUT
    assert result.err.count("tritune:") == 1
    assert "Traceback" not in result.err
    file = folder / "experiment" / "mine.yaml"
    for expected in (
        f"{file}: optim.lrr: there is no such key. Did you mean optim.lr?",
        f"{file}: train.bach_size: there is no such key. Did you mean train.batch_size?",
        f"{file}: foo: there is no such key.",
        f"{file}: train.max_steps=ten",
    ):
        assert expected in result.err


def test_unknown_key_of_a_chosen_schema_names_that_schemas_key(user_dir):
    folder = user_dir("# @package _global_\ndefaults:\n  - override /method: lora\nmethod: {rnk: 3}\n")
    assert "method.rnk: there is no such key. Did you mean method.rank?" in only(faults("experiment=mine", *minimal(),
                                                                                      config_dir=folder))  # fmt: skip


def test_unknown_keys_besides_an_unknown_override_are_all_named(user_dir):
    folder = user_dir("# @package _global_\noptim: {lrr: 1}\n")
    found = faults("experiment=mine", *minimal("train.bach_size=2"), config_dir=folder)
    assert any("optim.lrr" in f for f in found)
    assert any("train.bach_size" in f for f in found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# @package _global_\noptim: [1\n", ["YAML"]),
        ("# @package _global_\n- 1\n", ["mapping"]),
        ("# @package _global_\noptim: 3\n", ["optim", "mapping"]),
        ("optim: {lr: 1e-3}\n", ["@package _global_"]),
        ("# @package _global_\ndefaults:\n  - override /method: lorra\nmethod: {rank: 4}\n", ["lorra", "lora"]),
        ("# @package _global_\ndefaults:\n  - override /metod: lora\n", ["metod"]),
        ("# @package _global_\nmodel: {_target_: os.system}\n", ["_target_"]),
        ("# @package _global_\nhydra: {run: {dir: elsewhere}}\n", ["hydra"]),
        ("# @package _global_\noptim:\n  lr: ???\n", ["optim.lr", "???"]),
    ],
    ids=["no-yaml", "list", "no-mapping", "no-package", "no-option", "no-group", "target", "hydra", "mandatory"],
)
def test_own_experiments_that_cannot_be_read_say_why(user_dir, tritune, text, words):
    folder = user_dir(text)
    result = tritune("--config-dir", str(folder), "experiment=mine", *minimal())
    assert result.code == EXIT_INPUT, result.err
    assert "Traceback" not in result.err
    assert str(folder / "experiment" / "mine.yaml") in result.err
    for word in words:
        assert word in result.err


def test_an_experiment_cannot_rename_an_option(user_dir):
    """`method: {name: lora}` would be a full fine-tuning that calls itself LoRA."""
    folder = user_dir("# @package _global_\nmethod: {name: lora}\n")
    message = only(faults("experiment=mine", *minimal(), config_dir=folder))
    assert "override /method: lora" in message or "method=lora" in message


def test_own_group_option_with_our_schema(user_dir):
    folder = user_dir("defaults: [schema_lora, _self_]\nrank: 5\n", group="method", name="small")
    assert load_config(["method=small", *minimal()], str(folder)).method.rank == 5
    folder = user_dir("defaults: [schema_lora, _self_]\nrnk: 5\n", group="method", name="small")
    assert "Did you mean method.rank?" in only(faults("method=small", *minimal(), config_dir=folder))


def test_missing_config_dir_is_named(tritune, tmp_path):
    result = tritune(f"--config-dir={tmp_path / 'none'}", *minimal())
    assert result.code == EXIT_INPUT
    assert f"--config-dir={tmp_path / 'none'}: the folder does not exist" in result.err


@pytest.mark.parametrize("argv", [["--config-dir"], ["optim.lr=1", "--config-dir", "x"]])
def test_config_dir_without_a_value_or_out_of_place_is_refused(tritune, argv):
    result = tritune(*argv)
    assert result.code == EXIT_INPUT
    assert "Traceback" not in result.err
    assert "--config-dir" in result.err


def test_config_dir_is_split_off():
    assert split_argv(["--config-dir", "d", "a=1"]) == ("d", ["a=1"])
    assert split_argv(["--config-dir=d", "a=1"]) == ("d", ["a=1"])
    assert split_argv(["a=1"]) == (None, ["a=1"])


# -- nothing in a value is run or looked up


@pytest.mark.parametrize("where", ["override", "quoted", "free", "list", "experiment", "both"])
def test_an_environment_variable_never_reaches_the_config(where, user_dir, monkeypatch):
    """A value is what was written. Looked up, a token of the shell would end in config.yaml, and in its backups."""
    monkeypatch.setenv("TRITUNE_TEST_SECRET", SECRET)
    reference = "${oc.env:TRITUNE_TEST_SECRET}"
    folder, overrides = None, minimal()
    if where == "override":
        overrides.append(f"data.test={reference}")
    if where == "quoted":
        overrides.append(f"data.test='{reference}'")
    if where == "free":
        overrides.append(f"model.config.x={reference}")
    if where == "list":
        overrides.append(f"model.add_tokens=['{reference}']")
    if where == "experiment":
        folder = user_dir(f"# @package _global_\ndata: {{test: '{reference}'}}\n")
        overrides.append("experiment=mine")
    if where == "both":
        folder = user_dir(f"# @package _global_\nmodel: {{config: {{x: ['{reference}']}}}}\n")
        overrides.append("experiment=mine")
    config, found = compose_partly(overrides, None if folder is None else str(folder))
    said = json.dumps([to_dict(config), found])
    assert SECRET not in said
    assert "oc.env:TRITUNE_TEST_SECRET" in said, "kept as it was written, or refused by name"


@pytest.mark.parametrize("reference", ["${oc.env:TRITUNE_TEST_UNSET}", "${no.such.key}", "${", "${nothing:1}", "???"])
def test_a_reference_that_leads_nowhere_is_a_fault_and_no_crash(tritune, reference):
    result = tritune(*minimal(f"run.dir='{reference}'", f"data.train='{reference}'"))
    assert result.code == EXIT_INPUT, result.err
    assert "Traceback" not in result.err
    assert reference in result.err


def test_an_environment_variable_is_not_printed_by_the_config_verb(monkeypatch, capsys):
    monkeypatch.setenv("TRITUNE_TEST_SECRET", SECRET)
    command_line(["config", *minimal("data.test=${oc.env:TRITUNE_TEST_SECRET}")])
    out = capsys.readouterr()
    assert SECRET not in out.out + out.err


@pytest.mark.parametrize("value", ["{_target_: os.makedirs, name: PLACE}", "{_target_: PLACE}"])
def test_targets_are_never_called(tritune, tiny, tmp_path, value):
    """In the one free mapping a `_target_` is a word like any other, or refused; in a schema it is an unknown key."""
    place = tmp_path / "made-by-a-config"
    content = value.replace("PLACE", str(place))
    tritune(*tiny, "train.max_steps=1", f"model.config._target_={content}", f"run.dir={tmp_path / 'run'}")
    assert not place.exists()
    assert "no such key" in only(faults(*minimal("optim._target_=os.makedirs")))


# -- going on with another configuration


@pytest.fixture(scope="module")
def finished(sft_file, tmp_path_factory):
    """A run of one step, made once; `stopped_run` copies it."""
    from tritune.trainer.__main__ import main

    overrides = [
        "model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48", f"data.train={sft_file}",
        "data.max_length=160", "train.batch_size=8", "train.max_steps=1", "backend.device=cpu",
        "export.enabled=false", "report.enabled=false",
    ]  # fmt: skip
    directory = tmp_path_factory.mktemp("finished") / "run"
    with harness.keeping_signals():
        assert main([*overrides, f"run.dir={directory}"]) == 0
    return overrides, directory


@pytest.fixture
def stopped_run(finished, tmp_path):
    overrides, directory = finished
    shutil.copytree(directory, tmp_path / "run")
    return [*overrides, f"run.dir={tmp_path / 'run'}"], tmp_path / "run"


def test_resume_with_changed_identity_names_old_and_new(tritune, stopped_run, monkeypatch):
    overrides, directory = stopped_run
    monkeypatch.setattr("tritune.trainer.build.load", lambda *_: pytest.fail("the model was loaded"))
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    result = tritune(*overrides, "train.batch_size=16", "optim.lr=3e-3", "seed=5")
    assert result.code == EXIT_INPUT
    assert "Traceback" not in result.err
    assert result.err.count("tritune:") == 1
    for expected in ("train.batch_size: 8 -> 16", "optim.lr: 0.005 -> 0.003", "seed: 0 -> 5", f"run.dir={directory}"):
        assert expected in result.err
    rewritten = ("status.json", "train.log", "lock.json")  # they tell of the newest start
    for path, content in before.items():
        assert path.name in rewritten or path.read_bytes() == content


@pytest.mark.parametrize(
    "override",
    [
        "data.max_length=150",
        "data.train_on=[user]",
        "model.config.hidden_size=48",
        "objective=pretrain",
        "method=lora",
        "train.max_steps=3",
    ],
)
def test_each_identity_group_is_compared(tritune, stopped_run, override):
    overrides, _ = stopped_run
    result = tritune(*overrides, override)
    assert result.code == EXIT_INPUT
    key = override.partition("=")[0]
    assert f"{key}: " in result.err or f"{key}.name: " in result.err
    assert " -> " in result.err


@pytest.mark.parametrize("override", ["train.micro_batch_size=4", "train.log_every=2", "evaluation.batch_size=8"])
def test_what_only_splits_or_shows_the_run_may_change(tritune, stopped_run, override):
    overrides, _ = stopped_run
    assert tritune(*overrides, override).code == 0


def test_identity_keys_exist():
    tree = to_dict(load_config(minimal()))
    for key in IDENTITY:
        node = tree
        for part in key.split("."):
            node = node[part]
    assert set(schemas()) <= set(tree)


def test_sources_are_made_by_the_keys_that_name_them():
    given = [
        "model=tiny",
        "train.max_steps=1",
        "data.sources.a.path=a.jsonl",
        "data.sources.b.path=b.jsonl",
        "data.sources.b.weight=2",
    ]
    config = load_config(given)
    assert {n: (s.path, s.weight) for n, s in config.data.sources.items()} == {
        "a": ("a.jsonl", None),
        "b": ("b.jsonl", 2.0),
    }
    for wrong, words in (
        ("data.sources.a.wieght=2", "data.sources.a.weight"), ("data.sources.a.weight=much", "data.sources.a.weight=much"),
        ("data.sources.a=x.jsonl", "data.sources.a.path"), ("data.sources.c.weight=1", "data.sources.c.path"),
        ("data.sources.b.epochs=2", "Set one of the two"), ("data.train=c.jsonl", "Give one of the two"),
    ):  # fmt: skip
        with pytest.raises(ConfigFaults) as refused:
            load_config([*given, wrong])
        assert words in str(refused.value), wrong
