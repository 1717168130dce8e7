"""Whatever a user can get wrong ends with status 2 and one message: the value, the rule, the remedy. Nothing is lost.

Most of it is refused before the weights are read: a test fails if the model is loaded all the same.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import harness
import pytest
import torch
from safetensors.torch import load_file, save_file
from tritune.trainer.errors import EXIT_INPUT, EXIT_STOPPED, InputError
from tritune.trainer.run.directory import RunDir

REWRITTEN = ("status.json", "train.log", "lock.json")  # they tell of the newest start, which was refused
PROGRESS = ("run ", "data ", "kernels ", "model ", "backend ")  # what may be said before the refusal
ROW = {"prompt": "hello there", "response": "general"}


@pytest.fixture
def unloaded(monkeypatch):
    """Fail the test if weights are read or made."""

    def load_model(*_):
        pytest.fail("the model was loaded before the fault was seen")

    monkeypatch.setattr("tritune.trainer.build.load", load_model)


@pytest.fixture
def refused(tritune, tiny, tmp_path):
    """Start a run and require a refusal whose one message holds all `words`; return the message."""

    def call(*overrides: str, words: list[str], base: list[str] | None = None) -> str:
        result = tritune(*(tiny if base is None else base), f"run.dir={tmp_path / 'run'}", *overrides)
        assert result.code == EXIT_INPUT, result.err
        assert "Traceback" not in result.err
        said = [line for line in result.lines() if not line.startswith(PROGRESS)]
        assert said[0].startswith("tritune: "), result.err
        assert all(line.startswith("  - ") for line in said[1:]), result.err  # several faults, under one heading
        message = "\n".join(said)
        for word in words:
            assert word in message
        status = tmp_path / "run" / "status.json"
        if status.is_file():
            written = json.loads(status.read_text())
            assert (written["state"], written["exit_code"]) == ("failed", EXIT_INPUT)
            assert message == f"tritune: {written['culprit']}"
        return message

    return call


@pytest.fixture
def write(tmp_path):
    def to_file(rows: list[dict] | str | bytes, name: str = "rows.jsonl") -> Path:
        if isinstance(rows, list):
            rows = "".join(json.dumps(row) + "\n" for row in rows)
        path = tmp_path / name
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        return path

    return to_file


@pytest.fixture
def pretrained(shared, tmp_path):
    """A copy of a small pretrained model (no chat template) that may be damaged, and overrides of a run on it."""
    folder = tmp_path / "model"
    shutil.copytree(shared / "models" / "stories260K", folder)
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o755)
    base = [f"model.path={folder}", "data.max_length=128", "train.batch_size=4", "train.max_steps=1"]
    base.append("backend.device=cpu")
    return folder, base


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def kept(directory: Path) -> dict[str, bytes]:
    """What a refused start must leave as it is."""
    return {name: content for name, content in contents(directory).items() if name not in REWRITTEN}


# -- keys


@pytest.mark.usefixtures("unloaded")
def test_unknown_key(refused, tmp_path):
    message = refused("optim.learning_rate=1e-3", words=["optim.learning_rate=1e-3", "no such key", "optim."])
    assert "1 fault" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("unloaded")
def test_several_unknown_keys_at_once(refused):
    words = ["2 faults", "Did you mean optim.lr?", "Did you mean train.batch_size?", "optim.lrr=1", "train.bach_size=4"]
    refused("optim.lrr=1", "train.bach_size=4", words=words)


# -- files


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("key", ["train", "validation", "test", "retention"])
def test_missing_file(refused, write, tmp_path, key):
    write([ROW], "there.jsonl")
    path = tmp_path / "not-there.jsonl"
    refused(f"data.{key}={path}", words=[f"data.{key}={path}", "does not exist", "there is: there.jsonl"])
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("unloaded")
def test_missing_folder(refused, tmp_path):
    path = tmp_path / "nowhere" / "rows.jsonl"
    refused(f"data.train={path}", words=[str(path), "does not exist", f"The folder {tmp_path / 'nowhere'}", "absolute"])


@pytest.mark.usefixtures("unloaded")
def test_file_of_an_unread_kind(refused, write):
    path = write("x", "rows.docx")
    refused(f"data.train={path}", words=[str(path), ".docx", ".jsonl"])


@pytest.mark.usefixtures("unloaded")
def test_malformed_json_line(refused, write):
    path = write(json.dumps(ROW) + '\n{"prompt": "a", "response": \n' + json.dumps(ROW) + "\n")
    refused(f"data.train={path}", words=[f"{path}:2", "not JSON", "column", "Mend or remove the line"])


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"prompt": ' + "7" * 5000 + ', "response": "b"}'], ids=["deep", "digits"]
)
def test_json_that_python_cannot_hold(refused, write, line):
    """Valid by the grammar, beyond the interpreter's limits: still one message that names the line."""
    path = write(json.dumps(ROW) + "\n" + line + "\n")
    refused(f"data.train={path}", words=[f"{path}:2"])


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(("line", "kind"), [("[1, 2]", "list"), ('"text"', "str"), ("null", "NoneType"), ("3", "int")])
def test_json_line_that_is_no_object(refused, write, line, kind):
    path = write(json.dumps(ROW) + "\n\n" + line + "\n")
    refused(f"data.train={path}", words=[f"{path}:3", f"JSON {kind}", "object", "Write {"])


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("value", [None, 1.5, ["a"], {"a": 1}, True])
def test_cell_of_a_wrong_type(refused, write, value):
    path = write([ROW, {"prompt": "a", "response": value}])
    refused(f"data.train={path}", words=[f"{path}:2", "column response", json.dumps(value), "must be text"])


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_half_a_surrogate_pair(refused, write, share):
    """`\\ud83d` without its other half is valid JSON and no text: it cannot be encoded."""
    path = write([ROW] * 3 + [{"prompt": "a \ud83d", "response": "b"}])
    refused(f"data.train={path}", f"data.validation_share={share}", words=[f"{path}:4"])


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("objective", ["classify", "pretrain"])
def test_half_a_surrogate_pair_in_a_text(refused, write, objective):
    path = write([{"text": f"a {i}", "label": f"l{i % 2}"} for i in range(3)] + [{"text": "a \ud83d", "label": "l0"}])
    refused(f"objective={objective}", "data.max_length=64", f"data.train={path}", words=[f"{path}:4"])


@pytest.mark.usefixtures("unloaded")
def test_csv_with_a_short_row(refused, write):
    path = write('prompt,response\na,"b\nb"\nc\nd,e\n', "rows.csv")
    refused(f"data.train={path}", words=[f"{path}:4", "1 cells", "the header 2", "Quote cells"])


@pytest.mark.usefixtures("unloaded")
def test_csv_with_a_column_twice(refused, write):
    """One of the two would be dropped without a word."""
    path = write("prompt,response,response\na,b,c\n", "rows.csv")
    refused(f"data.train={path}", words=[str(path), "response"])


@pytest.mark.usefixtures("unloaded")
def test_missing_column(refused, write):
    path = write([{"frage": "a", "antwort": "b"}])
    refused(f"data.train={path}", words=[f"{path}:1", "prompt + response", "frage, antwort", "data.columns.response="])


@pytest.mark.usefixtures("unloaded")
def test_column_missing_further_down(refused, write):
    path = write([ROW, ROW, {"prompt": "a"}])
    refused(f"data.train={path}", words=[f"{path}:3", "column response is missing", "data.bad_rows=skip"])


@pytest.mark.usefixtures("unloaded")
def test_mapped_column_that_is_missing(refused, write):
    path = write([ROW])
    words = [f"{path}:1", "prompt, response", "data.columns."]
    refused(f"data.train={path}", "data.columns.response=antwort", words=words)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt"])
def test_file_that_is_not_utf8(refused, write, name):
    lines = b'{"prompt": "a", "response": "b"}\n' * 2 if name.endswith("jsonl") else b"prompt,response\nna,me\n"
    path = write(lines + "caf\xe9,b\n".encode("latin1"), name)
    objective = ["objective=pretrain"] if name.endswith("txt") else []
    refused(*objective, f"data.train={path}", words=[f"{path}:3", "0xe9", "not UTF-8", "iconv"])


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n \n"),
        ("a.csv", ""),
        ("a.csv", "prompt,response\n"),
        ("a.txt", ""),
        ("a.txt", " \n"),
    ],
)
def test_empty_file(refused, write, name, text):
    path = write(text, name)
    objective = ["objective=pretrain"] if name.endswith("txt") else []
    refused(*objective, f"data.train={path}", words=[str(path)])


@pytest.mark.usefixtures("unloaded")
def test_empty_validation_file(refused, write):
    path = write("", "valid.jsonl")
    refused(f"data.validation={path}", words=[f"data.validation={path}", "holds no row", "Give"])


@pytest.mark.usefixtures("unloaded")
def test_empty_split(refused, write):
    path = write([ROW, ROW, ROW])  # equal rows fall to the same split
    message = refused(f"data.train={path}", "data.validation_share=0.01", words=["of 3 rows none", "another share"])
    assert "data.validation_share=0.01" in message


@pytest.mark.usefixtures("unloaded")
def test_file_broken_after_a_first_run(tritune, finished, tmp_path):
    """The run that is there keeps every file; mended, the same command goes on with it."""
    overrides, rows, directory = finished
    whole, before = rows.read_text(), kept(directory)
    try:
        rows.write_text(whole + "{\n")
        result = tritune(*overrides, f"run.dir={directory}")
    finally:
        rows.write_text(whole)
    assert result.code == EXIT_INPUT
    assert f"{rows}:{whole.count(chr(10)) + 1}" in result.err
    assert kept(directory) == before


def test_mended_file_goes_on(tritune, finished):
    overrides, _, directory = finished
    result = tritune(*overrides, f"run.dir={directory}")
    assert result.code == 0
    assert "resume    from step-00000002" in result.err


# -- labels

CLASSIFY = ["objective=classify", "data.max_length=64"]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("objective", ["classify", "classify_token"])
def test_label_outside_the_set(refused, label_file, objective):
    words = [f"{label_file}:2", "'green'", "not in the label set", "red, blue", "data.labels"]
    refused(*CLASSIFY, f"objective={objective}", f"data.train={label_file}", "data.labels=[red,blue]", words=words)


@pytest.mark.usefixtures("unloaded")
def test_validation_label_that_training_never_saw(refused, label_file, write):
    path = write([{"text": "a", "label": "red"}, {"text": "b", "label": "violet"}], "valid.jsonl")
    words = [f"{path}:2", "'violet'", "not in the label set", "data.labels"]
    refused(*CLASSIFY, f"data.train={label_file}", f"data.validation={path}", words=words)


@pytest.mark.usefixtures("unloaded")
def test_labels_duplicated(refused, label_file):
    words = ["data.labels=", "red", "twice", "Name each once"]
    refused(*CLASSIFY, f"data.train={label_file}", "data.labels=[red,green,red,blue]", words=words)


@pytest.mark.usefixtures("unloaded")
def test_one_label_only(refused, write):
    path = write([{"text": "a", "label": "red"}] * 3)
    refused(*CLASSIFY, f"data.train={path}", words=["red", "at least two", "data.columns.label"])


@pytest.mark.usefixtures("unloaded")
def test_empty_text_to_classify(refused, write):
    path = write([{"text": "a", "label": "red"}, {"text": " ", "label": "blue"}])
    refused(*CLASSIFY, f"data.train={path}", words=[f"{path}:2", "text is empty", "Remove the row"])


# -- what is trained


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("drop", [[], ["data.unsupervised=drop"]], ids=["refuse", "drop"])
def test_chat_rows_without_an_assistant(refused, write, drop):
    path = write([{"messages": [{"role": "user", "content": f"hello {i}"}]} for i in range(5)])
    words = [f"{path}:1", "and 2 more", "every row has no token to train on", "chat template"]
    refused(*drop, f"data.train={path}", words=words)


@pytest.mark.usefixtures("unloaded")
def test_one_chat_row_without_an_assistant(refused, write):
    whole = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write([whole, {"messages": whole["messages"][:1]}, whole])
    refused(f"data.train={path}", words=[f"{path}:2", "1 of 3 rows has no token to train on", "data.unsupervised=drop"])


@pytest.mark.usefixtures("unloaded")
def test_truncation_that_cuts_every_answer(refused, write):
    path = write([{"prompt": "a long question " * 9, "response": "short"}] * 3)
    words = [f"{path}:1 (its answer lies beyond the cut)", "every row has no token", "data.max_length=40", "raise"]
    words += ["data.overlong=cut_prompt_start"]
    refused(f"data.train={path}", "data.max_length=40", words=words)


@pytest.mark.usefixtures("unloaded")
def test_truncation_that_cuts_every_stop_token(refused, write):
    path = write([{"prompt": "q", "response": "a long answer " * 9}] * 3)
    words = ["<|im_end|>", "no stop token is trained", "data.require_stop_token=false", "raise data.max_length=60"]
    refused(f"data.train={path}", "data.max_length=60", words=words)


@pytest.mark.usefixtures("unloaded")
def test_unknown_role(refused, write):
    path = write([{"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    refused(f"data.train={path}", words=[f"{path}:1", "robot", "assistant", "Roles are"])


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("value", [[], "hello", None, [3]])
def test_messages_that_are_no_list(refused, write, value):
    path = write([{"messages": value}])
    refused(f"data.train={path}", words=[f"{path}:1", "message"])


# -- the chat template


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}{{ messages }}", "Expected an expression"),
        ("{% for m in messages %}{{ m.content }}", "endfor"),
        ("{{ messages[9]['content'] }}", "has no"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
    ids=["raises", "syntax", "unclosed", "undefined", "zero", "filter", "recursion"],
)
def test_chat_template_that_fails(refused, write, text, word):
    path = write(text, "template.jinja")
    compiles = word not in ("Expected an expression", "endfor", "no_such_filter")
    said = "the chat template fails" if compiles else "not valid Jinja"
    refused(f"model.chat_template={path}", words=[said, word, "model.chat_template"])


@pytest.mark.usefixtures("unloaded")
def test_chat_template_that_refuses_a_row(refused, write):
    template = write(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system prompt here') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}", "template.jinja",
    )  # fmt: skip
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write([{"messages": turns}, {"messages": [{"role": "system", "content": "be kind"}, *turns]}])
    words = [f"{path}:2", "no system prompt here", "data.system_turn=merge", "mend the row", "model.chat_template"]
    refused(f"data.train={path}", f"model.chat_template={template}", words=words)


@pytest.mark.usefixtures("unloaded")
def test_chat_template_file_that_is_missing(refused, tmp_path):
    path = tmp_path / "none.jinja"
    refused(f"model.chat_template={path}", words=[f"model.chat_template={path}", "does not exist", "chatml"])


@pytest.mark.usefixtures("unloaded")
def test_chat_template_file_that_is_not_utf8(refused, write):
    path = write("{{ messages }} caf\xe9".encode("latin1"), "template.jinja")
    refused(f"model.chat_template={path}", words=[str(path), "UTF-8"])


# -- the model


@pytest.mark.usefixtures("unloaded")
def test_context_longer_than_the_models(refused):
    refused("data.max_length=513", words=["data.max_length=513", "context of 512 tokens", "Use 512 or less"])


def test_unknown_lora_target(refused):
    words = ["method.targets=query_key_value", "no linear layer has this name", "q_proj", "down_proj"]
    refused("method=lora", "method.targets=[q_proj,query_key_value]", words=words)


def test_lora_that_excludes_everything(refused):
    words = ["method.exclude=", "no layer is left", "Exclude less"]
    refused("method=lora", "method.targets=[q_proj]", "method.exclude=['*q_proj']", words=words)


def test_unknown_module_to_save(refused):
    words = ["method.modules_to_save=headd", "no module of this name", "lm_head"]
    refused("method=lora", "method.modules_to_save=[headd]", words=words)


@pytest.mark.usefixtures("unloaded")
def test_model_folder_that_is_not_there(refused, sft_file, pretrained, tmp_path):
    path = tmp_path / "no-model"
    words = [f"model.path={path}", "folder", "hub"]
    refused(f"model.path={path}", f"data.train={sft_file}", words=words, base=pretrained[1])


@pytest.mark.usefixtures("unloaded")
def test_model_folder_without_a_config(refused, sft_file, pretrained):
    folder, base = pretrained
    (folder / "config.json").unlink()
    refused(f"data.train={sft_file}", words=[f"model.path={folder}", "config.json"], base=base)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe{}"], ids=["cut", "list", "not-utf8"])
def test_model_folder_with_a_broken_file(refused, sft_file, pretrained, name, content):
    folder, base = pretrained
    (folder / name).write_bytes(content)
    refused(f"data.train={sft_file}", words=[f"model.path={folder}"], base=base)


@pytest.mark.usefixtures("unloaded")
def test_tokenizer_that_is_not_there(refused, tmp_path):
    path = tmp_path / "no-tokenizer"
    words = [f"model.tokenizer={path}", "no tokenizer loads", "tokenizer.json"]
    refused(f"model.tokenizer={path}", words=words)


@pytest.mark.usefixtures("unloaded")
def test_model_folder_without_a_tokenizer(refused, sft_file, pretrained):
    folder, base = pretrained
    (folder / "tokenizer.json").unlink()
    refused(f"data.train={sft_file}", words=[f"model.path={folder}", "no tokenizer loads", "tokenizer.json"], base=base)


@pytest.mark.usefixtures("unloaded")
def test_unknown_architecture(refused):
    refused("model.config.model_type=lama", words=["model.config.model_type=lama", "transformers knows"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.config.hiden_size=64", ["hiden_size", "hidden_size"]),
        ("model.config.hidden_size=wide", ["hidden_size", "wide"]),
        ("model.config.num_attention_heads=7", ["hidden size (32)", "attention heads (7)"]),
    ],
    ids=["unknown", "mistyped", "unfit"],
)
def test_key_of_the_architecture_that_is_wrong(refused, override, words):
    refused(override, words=["model.config", *words])


@pytest.mark.usefixtures("unloaded")
def test_unknown_padding_token(refused):
    refused("model.pad_token='<none>'", words=["model.pad_token=<none>", "no such token", "Choose"])


def test_weights_missing_from_a_checkpoint(refused, sft_file, pretrained):
    folder, base = pretrained
    weights = load_file(folder / "model.safetensors")
    gone = "model.layers.3.mlp.down_proj.weight"
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    words = [f"model.path={folder}", "1 weight(s) are missing", gone, "whole checkpoint"]
    refused(f"data.train={sft_file}", words=words, base=base)


def test_weights_of_another_shape(refused, sft_file, pretrained):
    folder, base = pretrained
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    weights[name] = torch.zeros(64, 100)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(f"data.train={sft_file}", words=[f"model.path={folder}", "shape"], base=base)


@pytest.mark.parametrize("damage", ["cut", "header", "none"])
def test_weights_that_do_not_read(refused, sft_file, pretrained, damage):
    folder, base = pretrained
    path = folder / "model.safetensors"
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "header":
        path.write_bytes(b"\xff" * 100)
    else:
        path.unlink()
    words = [f"model.path={folder}", "safetensors"]
    refused(f"data.train={sft_file}", words=words, base=base)


def test_weights_as_a_pickle_are_not_opened(refused, sft_file, pretrained):
    """Reading a pickle runs what is in it."""
    folder, base = pretrained
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    refused(f"data.train={sft_file}", words=[f"model.path={folder}", "safetensors"], base=base)


# -- the machine and the run directory


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.usefixtures("unloaded")
def test_gpu_where_there_is_none(refused):
    refused("backend.device=cuda", words=["backend.device=cuda", "no usable GPU", "backend.device=cpu"])


@pytest.mark.usefixtures("unloaded")
def test_resume_required_and_nothing_there(refused, tmp_path):
    refused("run.resume=require", words=["run.resume=require", str(tmp_path / "run"), "no checkpoint", "run.dir"])


@pytest.mark.usefixtures("unloaded")
def test_resume_forbidden_and_a_run_there(tritune, finished):
    overrides, _, directory = finished
    before = kept(directory)
    result = tritune(*overrides, f"run.dir={directory}", "run.resume=never")
    assert result.code == EXIT_INPUT
    for word in ("run.resume=never", "holds a run already", "another run.dir"):
        assert word in result.err
    assert kept(directory) == before


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("below", ["", "/run"])
def test_run_dir_that_is_a_file(refused, write, below):
    path = write("x", "occupied")
    refused(f"run.dir={path}{below}", words=[f"run.dir={path}{below}"])
    assert path.read_text() == "x"


def test_run_dir_in_use(tritune, tiny, tmp_path, monkeypatch):
    """The second run is refused by name and touches nothing; the first one goes on."""
    directory = tmp_path / "run"
    long_run = [*tiny, "train.max_steps=1000000", "evaluation.every=1000000", f"run.dir={directory}"]
    job = harness.start(long_run, tmp_path / "logs")
    try:
        harness.wait_for_step(job, directory, 2)
        job.signal(signal.SIGSTOP)  # so that every file is still: whatever changes was changed by the second run
        time.sleep(0.1)
        before = contents(directory)
        monkeypatch.setattr("tritune.trainer.build.load", lambda *_: pytest.fail("the model was loaded"))
        for overrides in (long_run, [*long_run, "seed=3"]):
            result = tritune(*overrides)
            assert result.code == EXIT_INPUT
            assert "Traceback" not in result.err
            assert len(result.lines()) == 1
            pid = str(job.processes[0].pid)
            for word in (f"run.dir={directory}", "a live run has this directory", pid, "another run.dir"):
                assert word in result.err
        assert contents(directory) == before
        job.signal(signal.SIGCONT)
        harness.wait_for_step(job, directory, harness.rows(directory)[-1]["step"] + 1)
        job.signal(signal.SIGTERM)
        assert job.wait() == [EXIT_STOPPED], job.output()
    finally:
        job.signal(signal.SIGCONT)
        job.signal(signal.SIGKILL)


@pytest.mark.slow
def test_the_lock_of_a_killed_run_does_not_hold(tiny, tmp_path):
    directory = tmp_path / "run"
    job = harness.start([*tiny, "train.max_steps=1000000", f"run.dir={directory}"], tmp_path / "logs")
    try:
        harness.wait_for_step(job, directory, 2)
        with pytest.raises(InputError, match="a live run"):
            RunDir(directory).acquire()
    finally:
        job.signal(signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL], job.output()
    owner = RunDir(directory)
    owner.acquire()
    owner.close()


@pytest.fixture(scope="module")
def finished_once(sft_file, tmp_path_factory):
    """A run of two steps on a file of its own, made once."""
    from tritune.trainer.__main__ import main

    folder = tmp_path_factory.mktemp("finished")
    rows = folder / "rows.jsonl"
    shutil.copy(sft_file, rows)
    overrides = [
        "model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48", f"data.train={rows}",
        "data.max_length=160", "train.batch_size=8", "train.max_steps=2", "backend.device=cpu",
        "export.enabled=false", "report.enabled=false",
    ]  # fmt: skip
    with harness.keeping_signals():
        assert main([*overrides, f"run.dir={folder / 'run'}"]) == 0
    return overrides, rows, folder / "run"


@pytest.fixture
def finished(finished_once, tmp_path):
    """Overrides without run.dir, the data file, a copy of the run."""
    overrides, rows, directory = finished_once
    shutil.copytree(directory, tmp_path / "copy")
    return overrides, rows, tmp_path / "copy"
