"""What an export of a classifier says of itself: written, read back, and refused where it is something else."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tritune.trainer.config import Config, ModelConfig, ObjectiveConfig
from tritune.trainer.config.choices import Overlong
from tritune.trainer.config.data import DataConfig
from tritune.trainer.data.prompts import chat_ids, name_rendering
from tritune.trainer.errors import InputError
from tritune.trainer.export.card_labels import labels_part
from tritune.trainer.export.carried import Carried, in_config, of_adapter, of_config, write_beside
from tritune.trainer.export.source import Form, Source
from tritune.trainer.model.tokenizer import byte_tokenizer, set_template
from tritune.trainer.objectives.classes import label_token_ids
from tritune.trainer.objectives.classify import ClassifyConfig
from tritune.trainer.objectives.classify_token import ClassifyTokenConfig
from tritune.trainer.objectives.sft import SftConfig
from tritune.trainer.open import _as_trained

LABELS = ["grün", 'b"lue```', "red"]
ABSTAIN = {
    "target": 0.9,
    "below": 0.625,
    "splits": {
        "validation": {"coverage": 0.5, "answered_accuracy": 0.91},
        "test": {"coverage": 0.0, "answered_accuracy": None},
    },
}


def source(objective: ObjectiveConfig, labels: list[str], below: bool = True) -> Source:
    heads = ["score"] if objective.name == "classify" else []
    facts = {"abstain": ABSTAIN} if below else {}
    return Source(Config(objective=objective, data=CUTS), None, None, byte_tokenizer(), heads, labels, facts)  # type: ignore[arg-type]


CUTS = DataConfig(max_length=96, overlong=Overlong.cut_prompt_middle)
TOKEN = ClassifyTokenConfig(prompt='Is "{text}"\n```\nit? ')

SECRET = ClassifyTokenConfig(prompt="password=hunter2xyz {text} it is ")


def test_what_a_config_says_comes_back():
    written = json.loads(json.dumps(in_config({"vocab_size": 7}, source(TOKEN, LABELS))))
    assert written["vocab_size"] == 7
    read = SimpleNamespace(**{**written, "id2label": {int(k): v for k, v in written["id2label"].items()}})
    tokens = label_token_ids(LABELS, byte_tokenizer())
    assert of_config(read, "x", []) == Carried(LABELS, TOKEN.prompt, tokens, 0.625, 96, Overlong.cut_prompt_middle)
    assert written["label2id"] == {label: i for i, label in enumerate(LABELS)}


def test_what_the_base_said_does_not_stay():
    """A model that was a classifier by token and was trained on as another one."""
    before = in_config({"vocab_size": 7}, source(TOKEN, LABELS))
    assert in_config(before, source(SftConfig(), [])) == {"vocab_size": 7}
    head = in_config(before, source(ClassifyConfig(), ["a", "b"], below=False))
    assert [key for key in head if key.startswith("tritune_")] == ["tritune_max_length", "tritune_overlong"]
    assert of_config(SimpleNamespace(vocab_size=7), "x", []) == Carried()


def test_what_stands_beside_an_adapter_comes_back(tmp_path):
    write_beside(tmp_path, source(TOKEN, LABELS))
    tokens = label_token_ids(LABELS, byte_tokenizer())
    read = of_adapter(tmp_path, "x", [])
    assert read == Carried(LABELS, TOKEN.prompt, tokens, 0.625, 96, Overlong.cut_prompt_middle)
    read.require_tokens(TOKEN, byte_tokenizer(), "x")
    for objective in (TOKEN, SECRET):
        write_beside(tmp_path, source(objective, LABELS))
        with pytest.raises(InputError, match="not those that this tokenizer has"):
            of_adapter(tmp_path, "x", LABELS[::-1]).require_tokens(TOKEN, byte_tokenizer(), "x")
    empty = tmp_path / "empty"
    empty.mkdir()
    write_beside(empty, source(SftConfig(), []))
    assert list(empty.iterdir()) == []
    assert of_adapter(empty, "x", []) == Carried()


@pytest.mark.parametrize(
    ("field", "value"),
    [("tritune_prompt", 5), ("tritune_prompt", "no place"), ("tritune_label_token_ids", [1, 2]),
     ("tritune_label_token_ids", None), ("tritune_label_token_ids", [1, 2, "3"]), ("tritune_abstain_below", 1.5),
     ("tritune_abstain_below", True), ("tritune_abstain_below", "0.5"), ("tritune_abstain_below", float("nan")),
     ("tritune_max_length", 1), ("tritune_max_length", "96"), ("tritune_overlong", "shorten"), ("tritune_overlong", [1])],
)  # fmt: skip
def test_something_else_is_refused(tmp_path, field, value):
    write_beside(tmp_path, source(TOKEN, LABELS))
    path = tmp_path / "tritune.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(InputError, match=field):
        of_adapter(tmp_path, "model.path=x", [])


@pytest.mark.parametrize("form", [Form.adapter, Form.merged])
def test_the_cards_part(form):
    """Prompts and labels are JSON, so that nothing in them ends a block."""
    text = "\n\n".join(labels_part(source(TOKEN, LABELS), form))
    lines = text.splitlines()
    assert json.dumps(TOKEN.prompt) in lines
    assert [line for line in lines if line.startswith("```")] == ["```text", "```"] * 2
    tokens = label_token_ids(LABELS, byte_tokenizer())
    for label, token in zip(LABELS, tokens, strict=True):
        assert any(line.startswith(json.dumps(label, ensure_ascii=False)) and f" {token} " in line for line in lines)
    assert "below 0.625" in text
    assert "at most 96 tokens of a row, `data.overlong=cut_prompt_middle`" in text
    assert (
        "on validation it answers 50.0% of the rows and is right in 91.0% of these; on test it answers 0.0% of the rows."
        in text
    )
    assert ("tritune.json" in text) == (form is Form.adapter)
    assert labels_part(source(SftConfig(), []), form) == []


@pytest.mark.parametrize("objective", [TOKEN, ClassifyConfig()])
def test_texts_are_cut_as_in_training(objective):
    """Of a classifier by token and by a head; what the config gives otherwise stays."""
    read = Carried(LABELS, TOKEN.prompt, [1, 2, 3], None, 96, Overlong.cut_prompt_middle)
    data = _as_trained(objective, DataConfig(), read, False)["data"]
    assert (data.max_length, data.overlong) == (96, Overlong.cut_prompt_middle)
    given = DataConfig(max_length=64, overlong=Overlong.drop)
    data = _as_trained(objective, given, read, False)["data"]
    assert (data.max_length, data.overlong) == (64, Overlong.drop)
    data = _as_trained(objective, DataConfig(), Carried(LABELS, TOKEN.prompt, [1, 2, 3]), False)["data"]
    assert (data.max_length, data.overlong) == (512, Overlong.cut)


def test_a_prompt_with_a_secret_is_given_by_whoever_asks(tmp_path):
    write_beside(tmp_path, source(SECRET, LABELS))
    read = of_adapter(tmp_path, "x", [])
    assert (read.prompt, len(read.token_ids)) == (None, 3)
    asked = _as_trained(SECRET, DataConfig(), read, True)
    assert (asked["objective"], asked["data"].labels) == (SECRET, LABELS)
    for objective, insist in ((ClassifyTokenConfig(), False), (SftConfig(), True)):
        with pytest.raises(InputError, match=r"objective=classify_token 'objective\.prompt="):
            _as_trained(objective, DataConfig(), read, insist)
    words = {"objective": SftConfig(), "data": DataConfig()}
    assert _as_trained(**words, carried=read, insist=False) == words


def test_asterisks_that_were_given_are_no_secret():
    """Of a prompt that was read back from `config.yaml` it cannot be known, and the card says so."""
    given = source(ClassifyTokenConfig(prompt="*** Review ***\n{text}\nIt is "), LABELS)
    assert in_config({}, given)["tritune_prompt"] == given.config.objective.prompt
    name_rendering(given.tokenizer, given.config.objective)
    assert "*** Review ***" in given.tokenizer.chat_template
    back = replace(given, read_back=True, tokenizer=byte_tokenizer())
    assert "tritune_prompt" not in in_config({}, back)
    name_rendering(back.tokenizer, back.config.objective, back.read_back)
    assert "*** Review" not in str(back.tokenizer.chat_template)
    assert "or `***` where one may have stood" in " ".join(labels_part(back, Form.merged))
    secret = " ".join(labels_part(source(SECRET, LABELS), Form.merged))
    assert "Its prompt held a secret and is not written here" in secret


def test_conversations_need_another_template_than_a_classifiers():
    """And the one that the message names reads them."""
    tokenizer, talk = (
        byte_tokenizer(),
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
    )
    name_rendering(tokenizer, TOKEN)
    with pytest.raises(InputError, match=r"answers with a label\. It is .* give model\.chat_template=plain, chatml or"):
        chat_ids(tokenizer, talk, "rows:1")
    set_template(tokenizer, ModelConfig(chat_template="plain"))
    assert "hello" in tokenizer.decode(chat_ids(tokenizer, talk, "rows:1"))
