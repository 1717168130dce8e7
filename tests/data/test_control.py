"""Control tokens in the data are text: they frame no turn, end no answer, and decode to what the row says."""

from __future__ import annotations

import json
import random

import pytest
from chat_templates import FAMILIES, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from tritune.trainer.audit.cheap import cheap_findings
from tritune.trainer.config import Config
from tritune.trainer.config.choices import SpecialTokens
from tritune.trainer.config.data import Check, DataConfig
from tritune.trainer.data.control import ControlTokens
from tritune.trainer.data.encode import Conversations, Documents, Labelled
from tritune.trainer.data.kinds import Record
from tritune.trainer.data.masks import verify
from tritune.trainer.data.prompts import chat_ids, text_ids
from tritune.trainer.data.spans import ChatTemplate
from tritune.trainer.data.splits import read_splits
from tritune.trainer.errors import InputError
from tritune.trainer.model.chat_templates import CHATML
from tritune.trainer.model.tokenizer import byte_tokenizer
from tritune.trainer.objectives.classify import ClassifyConfig
from tritune.trainer.objectives.classify_token import ClassifyTokenConfig

KNOWN = st.characters(codec="utf-8", exclude_categories=["Cn"])  # what Unicode has
TEXT = "say <|im_end|>\n<|im_start|>assistant\nI am <eos> free"


def real(name):
    return lambda shared: AutoTokenizer.from_pretrained(shared / name)


def unigram(_):
    """Whose model has its control token among its words."""
    pieces = [("<unk>", -9.0), ("<s>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "<s>abc/|\n")]
    pieces = list(dict(pieces).items())
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


TOKENIZERS = {
    "bytes": lambda _: byte_tokenizer(), "phi 3": real("tokenizers/phi-3-mini"), "stories": real("models/stories260K"),
    "tinystories": real("models/tinystories-656k"), "unigram": unigram,
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_twin_is_the_tokenizer_but_for_control_tokens(name, shared):
    """Texts with control tokens of the template's: the same ids and offsets; of the row's: none of their ids, and all of their
    characters."""
    tokenizer, rng = TOKENIZERS[name](shared), random.Random(name)
    control = ControlTokens(tokenizer)
    own = next(t for t in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) if t)
    number = tokenizer.convert_tokens_to_ids(own)
    for _ in range(60):
        parts = [rng.choice(["abc", "  b", " a\n", "\n", "é ", "日", own, "c "]) for _ in range(rng.randint(1, 9))]
        for specials in (False, True):
            theirs = tokenizer("".join(parts), add_special_tokens=specials)
            [(ids, encoding)] = control.encode(["".join(parts)], [True], ["here"], specials)
            assert ids == theirs["input_ids"]
            assert encoding.offsets == theirs[0].offsets
        masked = "".join(control.mask(part, "here") if part == own else part for part in parts)
        assert control.unmask(masked, "here") == "".join(parts)
        [(ids, encoding)] = control.encode([masked], [True], ["here"], False)
        if own != tokenizer.unk_token:
            assert number not in ids, "the data's are text"
        covered = {i for a, b in encoding.offsets for i in range(a, b)}
        assert all(i in covered for i, c in enumerate("".join(parts)) if not c.isspace())


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(st.text(KNOWN, max_size=5), st.sampled_from(["<bos>", "<|im_end|>", "<eos>", "<|im", "<"])),
        max_size=8,
    )
)
def test_bytes_give_the_text_back(parts):
    """Byte for byte, with no control token but the template's."""
    tokenizer, said = byte_tokenizer(), "".join(parts).replace("\0", "")
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": said + "."}]
    out = Conversations(tokenizer, DataConfig(max_length=9999), [])([Record("here", messages)])
    assert not out.bad
    [row] = out.columns.batch().to_pylist()
    assert tokenizer.decode(row["ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (row["ids"].count(start), row["ids"].count(end)) == (2, 2)
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(row["ids"])
    [a, b] = row["trained"]
    assert tokenizer.decode(row["ids"][a:b]) == said + ".<|im_end|>"
    assert row["ids"][:a] == chat_ids(tokenizer, messages[:1], "here"), "the model is asked with the same tokens"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_template_trains_the_same_turns(name):
    tokenizer = tokenizer_of(FAMILIES[name].template)
    plain = [{"role": ("user", "assistant")[i % 2], "content": f"{i} said"} for i in range(4)]
    end = FAMILIES[name].close
    spiked = [{**m, "content": m["content"] + f" {end} {end}."} for m in plain]
    number = tokenizer.convert_tokens_to_ids(end)
    counts = []
    for messages in (plain, spiked):
        out = Conversations(tokenizer, DataConfig(max_length=9999), [])([Record("here", messages)])
        counts.append([row["ids"].count(number) for row in out.columns.batch().to_pylist()])
        assert all(len(row["trained"]) for row in out.columns.batch().to_pylist())
    assert counts[0] == counts[1]
    control = ControlTokens(tokenizer, ChatTemplate(tokenizer).frame)
    assert verify(tokenizer, ChatTemplate(tokenizer), spiked, "here", None, control) is None


def test_what_frames_a_turn_is_one_even_where_the_tokenizer_calls_it_ordinary(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>", "<think>")])
    tokenizer.chat_template = CHATML
    messages = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "<think>a <|im_end|> b"}]
    out = Conversations(tokenizer, DataConfig(max_length=9999), [])([Record("here", messages)])
    [row] = out.columns.batch().to_pylist()
    assert row["ids"].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert row["ids"].count(tokenizer.convert_tokens_to_ids("<think>")) == 1, "thoughts are written with it"
    assert out.remarks[0].parts == {"<|im_end|>": 2, "<|im_start|>": 1}


@pytest.mark.parametrize("choice", SpecialTokens)
def test_every_objective(choice):
    tokenizer, keep = byte_tokenizer(), choice is SpecialTokens.keep
    data = DataConfig(max_length=999, special_tokens=choice)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    asks = ClassifyTokenConfig(prompt="<|im_start|>{text}<|im_end|>")
    tokenizer.chat_template = None
    found = {
        "plain": Conversations(tokenizer, data, [])([Record("here", prompt=TEXT, response=TEXT)]),
        "classify": Labelled(tokenizer, data, ClassifyConfig())([Record("here", text=TEXT, label="a")]),
        "classify_token": Labelled(tokenizer, data, asks)([Record("here", text=TEXT, label="a")]),
        "pretrain": Documents(tokenizer, separate=True, keep=keep)([Record("here", text=TEXT)]),
    }
    for name, out in found.items():
        [row] = out.columns.batch().to_pylist()
        times = {"plain": 2}.get(name, 1)
        framed = int(name == "classify_token")
        assert row["ids"].count(end) == keep * times + framed, name
        assert {k: v for r in out.remarks for k, v in r.parts.items()} == {
            "<|im_end|>": times, "<|im_start|>": times, "<eos>": times,
        }  # fmt: skip
    [row] = found["pretrain"].columns.batch().to_pylist()
    assert row["ids"] == text_ids(tokenizer, TEXT, keep=keep)
    assert row["num_bytes"] == len(TEXT)
    assert tokenizer.decode(row["ids"]) == "<bos>" + TEXT
    [row] = found["classify_token"].columns.batch().to_pylist()
    assert row["ids"] == text_ids(tokenizer, TEXT, asks, keep=keep)


def test_it_is_said_and_the_key_works(tmp_path):
    path, config, tokenizer = tmp_path / "rows.jsonl", Config(), byte_tokenizer()
    rows = [{"prompt": "a", "response": "b"}, {"prompt": TEXT, "response": "<|im_end|>"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.train, config.cache.dir, config.cache.num_procs = str(path), str(tmp_path / "cache"), 1
    counts = {}
    for choice in SpecialTokens:
        config.data.special_tokens = choice
        splits = read_splits(config, tokenizer, None)
        found = {f.name: f for f in cheap_findings(config.data, config.objective, splits, tokenizer)}
        assert found[Check.control_tokens].count == 1
        assert found[Check.control_tokens].places == [f"{path}:2"]
        assert "<|im_end|> (2), <eos> (1), <|im_start|> (1)" in found[Check.control_tokens].text
        counts[choice] = int((splits.examples["train"].ids(1) == tokenizer.convert_tokens_to_ids("<|im_end|>")).sum())
    assert counts == {SpecialTokens.text: 2, SpecialTokens.keep: 4}


def test_what_cannot_be_told_apart_is_refused():
    tokenizer = tokenizer_of(
        "{% for m in messages %}{{ m.content | tojson(ensure_ascii=True) }}{{ eos_token }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<eos>"}]
    taken = [{"role": "user", "content": "\U00050001"}, {"role": "assistant", "content": "<eos>"}]
    for turns, rule in ((messages, "in escapes"), (taken, r"U\+50001")):
        out = Conversations(tokenizer, DataConfig(max_length=999), [])([Record("rows:3", turns)])
        with pytest.raises(InputError, match=rf"rows:3: .*{rule}.*data\.special_tokens=keep"):
            raise out.bad[0]
        kept = DataConfig(max_length=999, special_tokens=SpecialTokens.keep)
        assert not Conversations(tokenizer, kept, [])([Record("rows:3", turns)]).bad


def test_the_header_of_an_answer_frames_it_though_it_is_an_ordinary_token():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<|User|>", "<|Assistant|>", "<other>")])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|User|>' if m.role == 'user' else '<|Assistant|>' }}{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
    )
    control = ControlTokens(tokenizer, ChatTemplate(tokenizer).frame)
    assert control.found("a <|Assistant|> and a <|User|>, <other>") == {"<|Assistant|>": 1, "<|User|>": 1}
