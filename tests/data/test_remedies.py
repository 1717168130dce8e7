"""Each refusal of rows names a remedy, and the remedy works on the very case: fault -> message -> applied -> the run goes on."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tritune.trainer.config.compose import load_config
from tritune.trainer.data.prompts import read_prompts
from tritune.trainer.data.splits import read_splits
from tritune.trainer.errors import InputError
from tritune.trainer.model.tokenizer import byte_tokenizer

GOOD = {"prompt": "What is it?", "response": "It is this."}
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LABELLED = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
OVERRIDE = re.compile(r"(?:data|objective)[\w.]*=(?:\[[^\]]*\]|[\w+]+)")


@dataclass
class Fault:
    """A file that is refused.

    Attributes:
        rows: of a JSONL file; or the bytes of a file, whose name is `name`.
        says: what the message must hold.
        mend: what the message tells the user to do to the file; None where it gives overrides, which are taken from it.
        kept: how many rows are trained then.
    """

    rows: list[dict] | bytes
    says: list[str]
    objective: str = "sft"
    overrides: list[str] = field(default_factory=list)
    name: str = "rows.jsonl"
    mend: Callable[[Path, str], Path | None] | None = None
    kept: int = 1


def talk(**more) -> list[dict]:
    """A row whose answer has more, and one that can be read."""
    return [{"messages": [TALK[0], {**TALK[1], **more}]}, {"messages": TALK}]


def by_command(path: Path, message: str) -> Path:
    """Run the command that the message gives."""
    command = re.search(r"(?:iconv|jq) .*? > [\w.]+", message)
    assert command is not None
    subprocess.run(command[0], shell=True, check=True, cwd=path.parent)
    made = path.parent / command[0].rpartition(" ")[2]
    return made.rename(path.with_name("mended" + (made.suffix or path.suffix)))


def rewritten(old: bytes, new: bytes) -> Callable[[Path, str], None]:
    def mend(path: Path, _: str) -> None:
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))

    return mend


def good_rows(path: Path, _: str) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({k: v for k, v in r.items() if k != "label"}) + "\n" for r in rows if r["label"])
    )


def by_pandas(path: Path) -> None:
    import pandas

    pandas.DataFrame(json.loads(path.read_text())).to_json(path, orient="records", lines=True)


SKIP = "data.bad_rows=skip"
FAULTS = {
    "text is missing": Fault(
        [{"sentence": r["text"], "label": r["label"]} for r in LABELLED],
        ["text is missing", "data.columns.text=sentence"],
        "classify",
        kept=2,
    ),
    "two texts": Fault(
        [{"sentence1": "x", "sentence2": "y", **r} for r in ({"label": 0}, {"label": 1})],
        ["text is missing", "data.columns.text=sentence1+sentence2"],
        "classify",
        kept=2,
    ),
    "label is missing": Fault(
        [{"text": r["text"], "kind": r["label"]} for r in LABELLED],
        ["label is missing", "data.columns.label=kind"],
        "classify",
        kept=2,
    ),
    "response is missing": Fault(
        [{"prompt": "q", "reply": "a"}], ["response is missing", "data.columns.response=reply"]
    ),
    "a later row lacks it": Fault([GOOD, {"prompt": "q", "reply": "a"}], ["the column response is missing", SKIP]),
    "prompt is missing": Fault([{"ask": "q", "response": "a"}], ["prompt is missing", "data.columns.prompt=ask"]),
    "text for sft": Fault([{"text": "t" * 9}], ["objective=pretrain"]),
    "pairs": Fault(
        [{"prompt": "q", "chosen": "a", "rejected": "b"}], ["a row of preferences", "data.columns.response=chosen"]
    ),
    "pairs of conversations": Fault(
        [{"chosen": TALK, "rejected": TALK}], ["a row of preferences", "data.columns.messages=chosen"]
    ),
    "pairs of answers as messages": Fault(
        [{"prompt": [TALK[0]], "chosen": [TALK[1]], "rejected": [TALK[1]]}],
        ["a row of preferences", "data.columns.response=chosen"],
    ),
    "pairs of texts": Fault(
        [{"chosen": "Human: q", "rejected": "Human: r"}], ["a row of preferences", "objective=pretrain"]
    ),
    "a rejected response": Fault(
        [{"query": "q", "response": "a", "rejected_response": "b"}],
        ["rejected_response", "data.ignore=[rejected_response]"],
    ),
    "two responses": Fault([{"prompt": "q", "response_0": "a", "response_1": "b"}], ["response_0 and response_1"]),
    "pairs of a source": Fault(
        [{"q": "x", "prompt": "q", "chosen": "a", "rejected": "b"}],
        ["data.sources.one.columns.response=chosen"],
        overrides=["data.sources.one.path={path}", "data.sources.one.columns.prompt=q"],
    ),
    "verdicts": Fault(
        [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False}],
        ["label is True", "good or bad"],
        mend=good_rows,
    ),
    "verdicts that are none": Fault([{**GOOD, "label": 1}], ["label is 1", "data.ignore=[label]"]),
    "verdicts on conversations": Fault([{"messages": TALK, "kto_tag": False}], ["kto_tag is False"]),
    "a weight between": Fault(talk(weight=0.5)[:1], ["weight of message 1 is 0.5", "data.ignore=[weight]"]),
    "parts of a turn": Fault(talk(train_detail=[])[:1], ["train_detail", "data.ignore=[train_detail]"]),
    "a row not to be learnt": Fault([{**GOOD, "weight": 0}, GOOD], ["weight says that it is not to be learnt"]),
    "a weight of a row": Fault([{**GOOD, "loss_weight": 0.3}], ["loss_weight is 0.3", "data.ignore=[loss_weight]"]),
    "an unknown role": Fault(talk(role="robot"), ["message 1", "known role", SKIP]),
    "an image": Fault(
        talk(content=[{"type": "image_url", "image_url": {"url": "x"}}]), ["a part of type image_url", SKIP]
    ),
    "no content": Fault(talk(content=None), ["message 1", SKIP]),
    "calls that are no JSON": Fault(
        talk(tool_calls=[{"function": {"name": "f", "arguments": "{x"}}]), ["arguments that are not JSON", SKIP]
    ),
    "calls without a name": Fault(talk(tool_calls=[{"function": {}}]), ["has no name", SKIP]),
    "tools that are no list": Fault(
        [{"messages": TALK, "tools": {"a": 1}}, {"messages": TALK}], ["no list of tools", SKIP]
    ),
    "messages that are no JSON": Fault([{"messages": "[{"}, {"messages": TALK}], ["column messages is not JSON", SKIP]),
    "messages that are none": Fault([{"messages": 3}, {"messages": TALK}], ["not a list of messages", SKIP]),
    "a null prompt": Fault([{**GOOD, "prompt": None}, GOOD], ["prompt is null, and must be text", SKIP]),
    "half of a character": Fault([{**GOOD, "prompt": "\ud800"}, GOOD], ["surrogate", SKIP]),
    "two system turns": Fault(
        [{"messages": [{"role": "system", "content": "s"}, *TALK], "system": "t"}],
        ["two system turns", "data.ignore=[system]"],
    ),
    "history of something else": Fault(
        [{**GOOD, "history": [1]}], ["no pair of a question and its answer", "data.ignore=[history]"]
    ),
    "messages and an input": Fault(
        [{"prompt": [TALK[0]], "input": "x", "response": "a"}], ["list of messages", "data.ignore=[input]"]
    ),
    "an empty label": Fault([{"text": "x", "label": ""}, *LABELLED], ["label is empty", SKIP], "classify", kept=2),
    "several labels": Fault(
        [{"text": "x", "label": ["a", "b"]}, *LABELLED], ["label is", "must be text", SKIP], "classify", kept=2
    ),
    "a group that is missing": Fault(
        [GOOD, {**GOOD, "who": "me"}], ["column who is missing", SKIP], overrides=["data.group=who"]
    ),
    "rows within an object": Fault(
        json.dumps({"version": 1, "data": [GOOD]}).encode(),
        ["its data holds rows", "jq -c '.data[]'"],
        name="rows.json",
        mend=by_command,
    ),
    "latin 1": Fault(
        '{"prompt": "é", "response": "a"}\n'.encode("latin1"), ["0xe9 is not UTF-8", "iconv -f latin1"], mend=by_command
    ),
    "windows": Fault(
        '{"prompt": "“é”", "response": "a"}\n'.encode("cp1252"), ["not UTF-8", "iconv -f windows-1252"], mend=by_command
    ),
    "an array that is not closed": Fault(
        json.dumps([GOOD])[:-1].encode(), ["not closed"], name="rows.json", mend=rewritten(b"}", b"}]")
    ),
    "cells that are not quoted": Fault(
        b"prompt;response\nq;a;b\n", ["3 cells", "semicolons"], name="rows.csv", mend=rewritten(b"a;b", b'"a;b"')
    ),
    "a column twice": Fault(
        b"prompt,response,response\nq,a,b\n",
        ["stands twice"],
        name="rows.csv",
        mend=rewritten(b"response\n", b"other\n"),
    ),
    "a row within an object": Fault(
        [{"custom_id": "1", "body": {"messages": TALK}}], ["its body holds a row"], mend=by_command
    ),
    "a turn of the user's to be learnt": Fault(
        [{"messages": [{**TALK[0], "train": True}, TALK[1]]}],
        ["turns of user are not trained", "data.train_on=[assistant,user]"],
    ),
    "pairs of one message": Fault(
        [
            {
                "conversations": [TALK[0]],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            }
        ],
        ["data.columns.prompt=conversations data.columns.response=chosen"],
    ),
    "a table by columns": Fault(
        json.dumps({"prompt": ["q", "r"], "response": ["a", "b"]}).encode(),
        ["a table of 2 rows written by columns", "orient"],
        mend=lambda path, _: by_pandas(path),
        kept=2,
    ),
    "a table as pandas writes it": Fault(
        json.dumps({"prompt": {"0": "q", "1": "r"}, "response": {"0": "a", "1": "b"}}).encode(),
        ["a table of 2 rows written by columns", "orient"],
        name="rows.json",
        mend=lambda path, _: by_pandas(path),
        kept=2,
    ),
    "a line that is no JSON": Fault(
        b'{"prompt": "q", "response": "a"}\n{"prompt"\n', ["not JSON"], mend=rewritten(b'\n{"prompt"\n', b"\n")
    ),
}


def read(tmp_path: Path, objective: str, path: Path, overrides: list[str]) -> int:
    """How many rows are trained on."""
    given = [o.format(path=path) if "{path}" in o else o for o in overrides]
    if not any(o.startswith("data.sources") for o in given):
        given.append(f"data.train={path}")
    if not any(o.startswith("objective=") for o in given):
        given.append(f"objective={objective}")
    config = load_config(
        ["model=tiny", f"cache.dir={tmp_path / 'cache'}", "cache.num_procs=1", *given], None, training=False
    )
    return len(read_splits(config, byte_tokenizer(), None).examples["train"])


def remedies(message: str) -> list[str]:
    """The overrides of the first sentence of a message that has any."""
    sentences = re.split(r"\. ", message)
    return next((found for s in sentences[1:] if (found := OVERRIDE.findall(s))), [])


@pytest.mark.parametrize("name", FAULTS)
def test_the_remedy_works_on_the_case(tmp_path, name):
    fault = FAULTS[name]
    path = tmp_path / fault.name
    rows = fault.rows
    path.write_bytes(rows if isinstance(rows, bytes) else "".join(json.dumps(r) + "\n" for r in rows).encode())
    with pytest.raises(InputError) as caught:
        read(tmp_path, fault.objective, path, fault.overrides)
    message = str(caught.value)
    assert all(word in message for word in fault.says), message
    applied: list[str] = []
    if fault.mend is not None:
        path = fault.mend(path, message) or path
    else:
        applied = remedies(caught.value.remedy and f". {caught.value.remedy}")
        assert applied, message
    assert read(tmp_path, fault.objective, path, [*fault.overrides, *applied]) == fault.kept


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_without_a_system_role(tmp_path):
    """The remedy is named, and what is trained is the user's turn with the system's words before it."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "system", "content": "s"}, *TALK]}) + "\n")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    given = ["model=tiny", f"cache.dir={tmp_path / 'cache'}", "objective=sft", f"data.train={path}"]
    with pytest.raises(InputError, match="no system here") as caught:
        read_splits(load_config(given, None, training=False), tokenizer, None)
    config = load_config([*given, *re.findall(r"data\.system_turn=\w+", caught.value.remedy)], None, training=False)
    examples = read_splits(config, tokenizer, None).examples["train"]
    assert (
        tokenizer.decode(examples.ids(0)) == "<|im_start|>user\ns\n\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )
    prompt = {"prompt": "q", "system": "s"}
    (tmp_path / "asked.jsonl").write_text(json.dumps(prompt) + "\n")
    config.generate.file = str(tmp_path / "asked.jsonl")
    (asked,) = read_prompts([], config.generate, config.data, config.objective, tokenizer)
    assert asked.ids == examples.ids(0)[: len(asked.ids)].tolist(), "the model is asked as it was trained"


def test_each_source_and_split_has_a_mapping(tmp_path):
    rows = {
        "one": {"ask": "q", "reply": "a"},
        "two": {"prompt": "r", "response": "b"},
        "validation": {"in": "s", "out": "c"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    given = [
        *(f"data.sources.{name}.path={tmp_path / name}.jsonl" for name in ("one", "two")),
        "data.sources.one.columns={prompt: ask, response: reply}",
        f"data.validation={tmp_path / 'validation.jsonl'}",
        "data.split_columns.validation={prompt: in, response: out}",
    ]
    config = load_config(
        ["model=tiny", f"cache.dir={tmp_path / 'cache'}", "objective=sft", *given], None, training=False
    )
    tokenizer = byte_tokenizer()
    splits = read_splits(config, tokenizer, None).examples
    said = [tokenizer.decode(splits[name].ids(i)) for name, i in (("train", 0), ("train", 1), ("validation", 0))]
    assert all(f"\n{q}<" in text and f"\n{a}<" in text for text, q, a in zip(said, "qrs", "abc", strict=True))


def test_what_has_no_likely_column_names_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": "x", "b": "y", "c": "z"}))
    with pytest.raises(InputError, match=r"prompt and response is missing.*data\.columns\.prompt=<one of a, b, c>"):
        read(tmp_path, "sft", path, [])
    assert read(tmp_path, "sft", path, ["data.columns.prompt=a", "data.columns.response=c"]) == 1


def test_a_mapping_that_fits_no_row_names_those_that_do(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**GOOD, "who": "me"}))
    with pytest.raises(
        InputError,
        match=r"data\.columns\.system=sytem: no row of .* Name one of the first row's: prompt, response, who",
    ):
        read(tmp_path, "sft", path, ["data.columns.system=sytem"])
    assert read(tmp_path, "sft", path, ["data.columns.system=who"]) == 1
