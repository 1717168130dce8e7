"""Records -> tokens: masks, cuts, blocks, bytes, labels, and the padding token."""

from __future__ import annotations

import random

import numpy as np
import pytest
from encoded import blocks, conversations, documents, labelled
from harness import mask_of
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from tritune.trainer.config import Config, ModelConfig
from tritune.trainer.config.choices import Unsupervised
from tritune.trainer.data.kinds import Record
from tritune.trainer.data.loader import collate
from tritune.trainer.errors import InputError
from tritune.trainer.model.tokenizer import adds_bos, byte_tokenizer, choose_pad_token, load_tokenizer, stop_token_ids
from tritune.trainer.objectives.classify import ClassifyConfig
from tritune.trainer.objectives.classify_token import ClassifyTokenConfig


def config(**data) -> Config:
    result = Config()
    for name, value in data.items():
        setattr(result.data, name, value)
    return result


def plain(tokenizer=None):
    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def pair(prompt, response, place="rows.jsonl:1") -> Record:
    return Record(place, prompt=prompt, response=response)


def chat(*contents, place="rows.jsonl:1") -> Record:
    messages = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return Record(place, messages=messages)


def row(examples, i):
    return examples.ids(i).tolist(), mask_of(examples, i)


def all_ids(examples) -> list[int]:
    return [t for i in range(len(examples)) for t in examples.ids(i).tolist()]


def places(examples) -> list[str]:
    return [examples.place(i) for i in range(len(examples))]


def random_text(rng: random.Random, size: int) -> str:
    """Any script: ASCII, accents (composed and not), CJK, astral, spaces of all sorts, joiners."""
    pools = [
        "abc XYZ,.",
        "àéîõü",
        "e\u0301o\u0308",
        "日本語漢字かな",
        "😀👩‍👩‍👧🏳️‍🌈",
        "\n\t \u00a0\u2028",
        "שלוםعربي",
        "\ufb01\u2126\u212b",
    ]
    return "".join(rng.choice(rng.choice(pools)) for _ in range(size))


# -- conversations ---------------------------------------------------------------------------------------


def test_prompt_and_response_without_a_template():
    tokenizer = plain()
    examples = conversations([pair("Say hi", "hi!")], tokenizer, config())
    ids, supervised = row(examples, 0)
    assert tokenizer.decode(ids) == "<bos>Say hi\nhi!<eos>"
    assert [i for i, s in zip(ids, supervised, strict=True) if s] == tokenizer("hi!", add_special_tokens=False)[
        "input_ids"
    ] + [tokenizer.eos_token_id]
    assert supervised == [False] * 8 + [True] * 4
    assert ids.count(tokenizer.bos_token_id) == 1


def test_prompt_and_response_on_a_real_tokenizer(shared):
    tokenizer = plain(AutoTokenizer.from_pretrained(shared / "models" / "stories260K"))
    ids, supervised = row(conversations([pair("Tell me a story", "Once upon a time")], tokenizer, config()), 0)
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert ids[-1] == 2
    assert supervised[-1]
    assert tokenizer.decode([i for i, s in zip(ids, supervised, strict=True) if s]).strip() == "Once upon a time</s>"
    assert tokenizer.decode([i for i, s in zip(ids, supervised, strict=True) if not s]) == "<s> Tell me a story\n"


def test_a_tokenizer_that_ends_every_text_itself():
    """`add_eos_token`: the end must stand after the response, once, and not between prompt and response."""
    from tokenizers import processors

    tokenizer = plain()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)]
    )
    assert tokenizer("a")["input_ids"][-1] == eos
    ids, supervised = row(conversations([pair("q", "r")], tokenizer, config()), 0)
    assert tokenizer.decode(ids) == "<bos>q\nr<eos>"
    assert supervised == [False, False, False, True, True]


def test_pairs_go_through_a_template_where_there_is_one():
    tokenizer = byte_tokenizer()
    examples = conversations([pair("q", "r"), chat("q", "r")], tokenizer, config())
    assert row(examples, 0) == row(examples, 1)
    assert (
        tokenizer.decode(row(examples, 0)[0]) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nr<|im_end|>\n"
    )


def test_messages_without_a_template_are_refused():
    with pytest.raises(InputError, match=r"model\.chat_template"):
        conversations([chat("q", "r")], plain(), config())


def test_only_answers_and_stop_tokens_are_targets():
    """Through to the batch: what the loss sees, decoded."""
    tokenizer = byte_tokenizer()
    batch = collate(conversations([chat("one", "uno", "two", "dos")], tokenizer, config()), [0], tokenizer.pad_token_id)
    assert tokenizer.decode(batch.targets.tolist()) == "uno<|im_end|>dos<|im_end|>"


def test_cuts_are_counted():
    tokenizer = plain()
    # bos + 2 + "\n" + response + eos: 4 + n + 1 tokens
    records = [pair("qq", "r" * n, f"f:{n}") for n in (3, 10, 20)]
    examples = conversations(records, tokenizer, config(max_length=10))
    assert examples.lengths.tolist() == [8, 10, 10]
    report = examples.report
    assert (report.rows, report.tokens, report.truncated_rows, report.truncated_tokens) == (3, 28, 2, 5 + 15)
    assert report.supervised_tokens == 4 + 6 + 6
    assert "2 rows cut by 20 tokens" in report.line()
    exact = conversations([pair("qq", "r" * 5)], tokenizer, config(max_length=10))
    assert exact.report.truncated_rows == 0
    assert exact.lengths.tolist() == [10]


def test_only_stop_tokens_that_are_kept_count():
    """A cut answer ends without a stop token: if that is so in every row, the model never learns to end."""
    tokenizer = plain()
    rows = [pair("q", "r" * 30, f"f:{i}") for i in range(3)]
    assert conversations(rows, tokenizer, config(max_length=100)).report.stop_rows == 3
    mixed = conversations([*rows, pair("q", "r", "f:9")], tokenizer, config(max_length=10))
    assert mixed.report.stop_rows == 1
    with pytest.raises(InputError, match="stop token"):
        conversations(rows, tokenizer, config(max_length=10))
    conversations(rows, tokenizer, config(max_length=10, require_stop_token=False))


def test_a_template_that_never_ends_an_answer_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with pytest.raises(InputError, match="stop token"):
        conversations([chat("q", "r")], tokenizer, config())
    assert conversations([chat("q", "r")], tokenizer, config(require_stop_token=False)).report.supervised_tokens >= 1


def failing(kind: str):
    """A tokenizer that reads most texts: a pattern that goes back without an end panics in Rust, an unknown word is an error."""
    if kind == "panic":
        backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abcdef!")}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    else:
        backend = Tokenizer(models.WordLevel(vocab={"a": 0, "b": 1}, unk_token="zz"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("kind", ["panic", "error"])
def test_a_row_that_the_tokenizer_fails_on_is_named(kind):
    texts = ("a", "a" * 40 + "!")
    rows = [Record(f"rows:{i}", text=text, label="x") for i, text in enumerate(texts)]
    pairs = [pair("a", text, f"rows:{i}") for i, text in enumerate(texts)]
    tokenizer = failing(kind)
    for encode in (
        lambda: conversations(pairs, tokenizer, config()),
        lambda: documents(rows, tokenizer, 64),
        lambda: labelled(rows, tokenizer, labels_config(), ["x"]),
    ):
        with pytest.raises(InputError, match=r"rows:1: the tokenizer fails on this row \(.*model\.tokenizer"):
            encode()


def test_rows_without_an_answer():
    tokenizer = byte_tokenizer()
    good, mute = chat("q", "r", place="f:1"), chat("q", place="f:2")
    with pytest.raises(InputError, match=r"f:2.*1 of 2 rows"):
        conversations([good, mute], tokenizer, config())
    examples = conversations([good, mute], tokenizer, config(unsupervised=Unsupervised.drop))
    assert places(examples) == ["f:1"]
    assert (examples.report.dropped, examples.report.dropped_places) == (1, ["f:2"])
    with pytest.raises(InputError, match="every row"):
        conversations([mute], tokenizer, config(unsupervised=Unsupervised.drop))


def test_rows_whose_answer_is_cut_off():
    tokenizer = byte_tokenizer()
    rows = [chat("q", "r", place="f:1"), chat("q" * 90, "r", place="f:2")]
    with pytest.raises(InputError, match=r"f:2 \(its answer lies beyond the cut\)"):
        conversations(rows, tokenizer, config(max_length=60))
    kept = conversations(rows, tokenizer, config(max_length=60, unsupervised=Unsupervised.drop))
    assert places(kept) == ["f:1"]
    assert kept.report.rows == 1


@pytest.mark.parametrize(("others", "ends"), [(49, True), (50, False)])
def test_few_rows_whose_answer_is_cut_off_are_left_out_by_default(others, ends):
    rows = [chat("q" * 90, "r", place="f:0"), *(chat("q", f"r{i}", place=f"f:{i + 1}") for i in range(others))]
    if ends:
        with pytest.raises(InputError, match=r"f:0 \(its answer lies beyond the cut\).*data.unsupervised=drop"):
            conversations(rows, byte_tokenizer(), config(max_length=60))
        return
    report = conversations(rows, byte_tokenizer(), config(max_length=60)).report
    assert (report.rows, report.dropped, report.beyond) == (50, 1, 1)
    assert "f:0 (its answer lies beyond the cut)" in report.line()
    with pytest.raises(InputError, match="f:0"):
        conversations(rows, byte_tokenizer(), config(max_length=60, unsupervised=Unsupervised.refuse))
    with pytest.raises(InputError, match=r"f:0.*f:x"):  # an empty answer is another matter, however few there are
        conversations([*rows, chat("q", place="f:x")], byte_tokenizer(), config(max_length=60))


def test_an_answer_at_position_zero_alone_is_no_supervision():
    """The first token of a row is never predicted."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    rows = [Record("f:1", messages=[{"role": "assistant", "content": "a"}])]
    with pytest.raises(InputError, match="no token to train on"):
        conversations(rows, tokenizer, config())


# -- text ------------------------------------------------------------------------------------------------


def tokenizers(shared):
    return {
        "bytes": byte_tokenizer(),
        "stories260K": AutoTokenizer.from_pretrained(shared / "models" / "stories260K"),
        "tinystories-656k": AutoTokenizer.from_pretrained(shared / "models" / "tinystories-656k"),
        "phi-3-mini": AutoTokenizer.from_pretrained(shared / "tokenizers" / "phi-3-mini"),
    }


@pytest.mark.parametrize("length", [2, 7, 16, 1000])
def test_blocks_cover_every_token_once(length):
    tokenizer, rng = byte_tokenizer(), random.Random(1)
    texts = [random_text(rng, n) for n in (5, 0, 40, 1, 13)]
    examples = blocks([Record(f"f:{i}", text=t) for i, t in enumerate(texts)], tokenizer, config(max_length=length))
    stream = [i for t in texts for i in tokenizer(t)["input_ids"]]
    rest = len(stream) % length == 1  # a last block of one token predicts nothing
    assert all_ids(examples) == (stream[:-1] if rest else stream)
    assert (examples.lengths[:-1] == length).all()
    assert 2 <= examples.lengths[-1] <= length
    for i in range(len(examples)):
        assert row(examples, i)[1] == [False] + [True] * (int(examples.lengths[i]) - 1)
    assert examples.report.tokens == len(all_ids(examples))
    # bytes of what is predicted: a byte token spells one, a special one none, whole characters at their last byte
    assert examples.num_bytes.sum() <= sum(len(t.encode()) for t in texts)


def test_blocks_separate_documents_with_eos_where_no_bos_is_added():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    assert not adds_bos(tokenizer)
    examples = blocks([Record("f:1", text="ab"), Record("f:2", text="cd")], tokenizer, config(max_length=100))
    assert tokenizer.decode(all_ids(examples)) == "ab<eos>cd<eos>"
    assert adds_bos(byte_tokenizer())
    bos = blocks([Record("f:1", text="ab"), Record("f:2", text="cd")], byte_tokenizer(), config(max_length=100))
    assert tokenizer.decode(all_ids(bos)) == "<bos>ab<bos>cd"


def test_bytes_of_blocks_sum_to_the_predicted_text():
    tokenizer = byte_tokenizer()
    examples = blocks([Record("f:1", text="x" * 50)], tokenizer, config(max_length=10))
    # 51 tokens with BOS: blocks of 10 whose first tokens (BOS, and four letters) are not predicted, and one letter
    # left over
    assert examples.num_bytes.tolist() == [9, 9, 9, 9, 9]


@pytest.mark.parametrize("name", ["bytes", "stories260K", "tinystories-656k", "phi-3-mini"])
def test_documents_count_every_byte(name, shared):
    """Bits per byte divide by it: the bytes of all predicted tokens are the text's own, whatever the characters; but for those
    that the tokenizer does not know, and so does not spell."""
    tokenizer, rng = tokenizers(shared)[name], random.Random(2)
    texts = [random_text(rng, n) for n in range(1, 120)] + ["Once upon a time, there was a cat.", "é", "😀", "ab"]
    examples = documents([Record(f"f:{i}", text=t) for i, t in enumerate(texts)], tokenizer, 10_000)
    found = dict(zip(places(examples), examples.num_bytes.tolist(), strict=True))
    for i, text in enumerate(texts):
        ids = tokenizer(text, return_offsets_mapping=True)
        if len(ids["input_ids"]) < 2:
            assert f"f:{i}" not in found
            continue
        # without a BOS the first token is not predicted, and what it completes does not count
        first = 0 if adds_bos(tokenizer) else len(text[: ids["offset_mapping"][0][1]].encode())
        spans = zip(ids["input_ids"], ids["offset_mapping"], strict=True)
        unknown = [text[a:b] for number, (a, b) in spans if number == tokenizer.unk_token_id]
        unknown = unknown[not adds_bos(tokenizer) and ids["input_ids"][0] == tokenizer.unk_token_id :]
        assert found[f"f:{i}"] == len(text.encode()) - first - len("".join(unknown).encode()), repr(text)


def test_documents_are_cut_and_counted():
    tokenizer = byte_tokenizer()
    examples = documents([Record("f:1", text="é" * 10), Record("f:2", text="")], tokenizer, 8)
    assert examples.lengths.tolist() == [8]
    assert examples.report.truncated_tokens == 21 - 8
    # 7 byte tokens: three whole characters and half of one; whichever half a character is counted at, 6 to 8 bytes
    assert 6 <= examples.num_bytes[0] <= 8


# -- classification --------------------------------------------------------------------------------------


def labels_config(max_length=512, objective=None) -> Config:
    result = config(max_length=max_length)
    result.objective = objective or ClassifyConfig()
    return result


def test_labels():
    tokenizer = byte_tokenizer()
    records = [Record(f"f:{i}", text=f"text {i}", label=x) for i, x in enumerate(["b", "a", "c", "a"])]
    examples = labelled(records, tokenizer, labels_config(), ["a", "b", "c"])
    assert examples.labels.tolist() == [1, 0, 2, 0]
    assert not any(any(mask_of(examples, i)) for i in range(4))
    assert [tokenizer.decode(row(examples, i)[0]) for i in range(4)] == [f"<bos>text {i}" for i in range(4)]
    assert collate(examples, [2, 0], 0).labels.tolist() == [2, 1]
    unknown = labelled([Record("f:9", text="x", label="d")], tokenizer, labels_config(), ["a", "b"])
    assert unknown.labels.tolist() == [-1]
    with pytest.raises(InputError, match=r"f:9.*empty"):
        labelled([Record("f:9", text=" \n", label="a")], tokenizer, labels_config(), ["a", "b"])


def test_long_texts_are_cut_and_the_prompt_around_them_is_not():
    tokenizer = byte_tokenizer()
    long = Record("f:1", text="x" * 50, label="a")
    head = labelled([long], tokenizer, labels_config(20), ["a", "b"])
    assert tokenizer.decode(row(head, 0)[0]) == "<bos>" + "x" * 19
    assert (head.report.truncated_rows, head.report.truncated_tokens) == (1, 31)
    token = labelled([long], tokenizer, labels_config(20, ClassifyTokenConfig(prompt="T: {text}\nL:")), ["a", "b"])
    assert tokenizer.decode(row(token, 0)[0]) == "<bos>T: " + "x" * 13 + "\nL:"
    with pytest.raises(InputError, match="no room"):
        labelled([long], tokenizer, labels_config(3, ClassifyTokenConfig(prompt="{text}\nL:")), ["a", "b"])


# -- the padding token -----------------------------------------------------------------------------------


def fast(**special):
    words = ["a", "b", "<unk>", "<s>", "</s>", "<pad>", "<|end|>", "<|vision_pad|>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(w, special=True) for w in words[2:]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize(
    ("special", "stops", "expected"),
    [
        ({"pad_token": "<pad>", "eos_token": "</s>"}, ["</s>"], "<pad>"),
        ({"pad_token": "</s>", "eos_token": "</s>", "bos_token": "<s>"}, ["</s>"], "<s>"),
        ({"pad_token": "</s>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}, ["</s>"], "<s>"),
        ({"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}, ["</s>"], "<unk>"),
        ({"pad_token": "<|end|>", "eos_token": "</s>", "bos_token": "<s>"}, ["</s>", "<|end|>"], "<s>"),
        ({"eos_token": "</s>", "bos_token": "<s>"}, ["</s>"], "<s>"),
        ({"pad_token": "<unk>", "unk_token": "<unk>", "eos_token": "</s>", "bos_token": "<s>"}, ["</s>"], "<s>"),
        ({"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}, ["</s>", "<pad>"], "<s>"),
        (
            {"pad_token": "</s>", "eos_token": "</s>", "extra_special_tokens": ["<|vision_pad|>"]},
            ["</s>"],
            "<|vision_pad|>",
        ),
    ],
)
def test_padding_is_no_stop_token(special, stops, expected):
    tokenizer = fast(**special)
    vocab = tokenizer.get_vocab()
    assert choose_pad_token(tokenizer, None, [vocab[s] for s in stops]) == expected
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id not in [vocab[s] for s in stops]


def test_only_a_stop_token_left():
    """GPT-2 has one special token for everything: taken, since our masks go by length."""
    tokenizer = fast(eos_token="</s>")
    assert choose_pad_token(tokenizer, None, stop_token_ids(tokenizer)) == "</s>"
    with pytest.raises(InputError, match=r"model\.pad_token"):
        choose_pad_token(fast(), None, [])


def test_a_wanted_padding_token():
    tokenizer = fast(eos_token="</s>", bos_token="<s>")
    assert choose_pad_token(tokenizer, "<|end|>", stop_token_ids(tokenizer)) == "<|end|>"
    with pytest.raises(InputError, match=r"model\.pad_token=</s>"):
        choose_pad_token(tokenizer, "</s>", stop_token_ids(tokenizer))
    with pytest.raises(InputError, match=r"model\.pad_token=<none>"):
        choose_pad_token(tokenizer, "<none>", stop_token_ids(tokenizer))


def test_real_tokenizers_never_pad_with_a_stop_token(shared):
    for name, tokenizer in tokenizers(shared).items():
        for model_stops in (None, 2, [2, tokenizer.eos_token_id, tokenizer.pad_token_id]):
            stops = stop_token_ids(tokenizer, model_stops)
            assert tokenizer.eos_token_id in stops
            choose_pad_token(tokenizer, None, stops)
            assert tokenizer.pad_token_id not in stops, name


def test_a_stop_token_is_trained_even_if_it_is_the_padding_token(shared):
    """pad == eos, the classic: masks by id would never train the end of an answer."""
    tokenizer = plain(AutoTokenizer.from_pretrained(shared / "models" / "stories260K"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    examples = conversations([pair("a", "b"), pair("a", "b and much more than that")], tokenizer, config())
    batch = collate(examples, [0, 1], tokenizer.eos_token_id)
    assert (batch.input_ids[0] == 2).sum() > 1, "padding looks like the stop token"
    assert (batch.targets == 2).sum() == 2, "one stop token a row is a target: the real one"
    assert batch.num_tokens == examples.lengths.sum()


def test_stop_tokens():
    tokenizer = byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(tokenizer) == sorted({2, end})
    assert stop_token_ids(tokenizer, 7) == sorted({2, 7, end})
    assert stop_token_ids(tokenizer, [7, 8]) == sorted({2, 7, 8, end})
    assert stop_token_ids(plain()) == [2]


def test_the_models_own_stop_tokens_count_as_stop_tokens():
    """Gemma's turns end with `<end_of_turn>`, which only the model's config calls a stop token: data is not refused."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<end_of_turn>"], special_tokens=True)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\\n' + m['content'] | trim }}"
        "{{ '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\\n' }}{% endif %}"
    )
    examples = conversations([chat("q", "r")], tokenizer, config(), [tokenizer.convert_tokens_to_ids("<end_of_turn>")])
    assert "r<end_of_turn>" in tokenizer.decode(examples.ids(0)[examples.trained(0)].tolist())


def test_load_tokenizer(tmp_path, shared):
    tokenizer = load_tokenizer(ModelConfig(tokenizer="bytes", add_tokens=["<x>"]))
    assert tokenizer.convert_ids_to_tokens(tokenizer("a<x>b", add_special_tokens=False)["input_ids"]) == [
        "a",
        "<x>",
        "b",
    ]
    assert tokenizer.padding_side == "right"
    with pytest.raises(InputError, match=r"model\.tokenizer="):
        load_tokenizer(ModelConfig(tokenizer=str(tmp_path)))
    with pytest.raises(InputError, match=r"model\.chat_template="):
        load_tokenizer(ModelConfig(tokenizer="bytes", chat_template=str(tmp_path / "none.jinja")))
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert (
        load_tokenizer(ModelConfig(tokenizer="bytes", chat_template=str(tmp_path / "t.jinja"))).chat_template
        == "{{ messages }}"
    )


def test_byte_tokenizer_reads_any_text():
    tokenizer, rng = byte_tokenizer(), random.Random(3)
    for n in range(60):
        text = random_text(rng, n)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
        assert np.all(np.array(ids) >= 3)
