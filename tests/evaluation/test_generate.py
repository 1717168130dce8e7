"""Answers: batches equal single prompts and transformers' own `generate`, and begin where training's answers began."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from encoded import conversations
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from tritune.launch.cli import main as cli
from tritune.trainer.config import Config, GenerateConfig, ModelConfig
from tritune.trainer.config.data import DataConfig
from tritune.trainer.data.encode import Labelled
from tritune.trainer.data.kinds import Record
from tritune.trainer.data.label_prompt import label_template
from tritune.trainer.data.prompts import chat_ids, plain_template, read_prompts, text_ids
from tritune.trainer.evaluation.generate import generate, lack_of_room
from tritune.trainer.model.tokenizer import byte_tokenizer, load_tokenizer
from tritune.trainer.objectives.classify_token import ClassifyTokenConfig

CPU = torch.device("cpu")
PROMPTS = [
    "Once upon a time",
    "The cat",
    "One day, a little girl named Lily went to the park. She saw",
    "He",
    "Tom and",
]


def random_model(family: str, **changes):
    settings = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
                "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3, **changes}  # fmt: skip
    torch.manual_seed(4)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()


@pytest.fixture(params=["llama", "gpt2", "stories260K"])
def model_and_tokenizer(request):
    """With absolute positions (GPT-2) a left-padded prompt must still begin at position 0."""
    if request.param == "stories260K":
        folder = request.getfixturevalue("shared") / "models" / "stories260K"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = "<unk>"
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer
    return random_model(request.param), byte_tokenizer()


def ids_of(tokenizer, texts=PROMPTS) -> list[list[int]]:
    return [tokenizer(t)["input_ids"] for t in texts]


def by_hand(model, ids: list[int], count: int, stops: list[int]) -> list[int]:
    """Greedy decoding without a cache, without padding, without `generate`."""
    said: list[int] = []
    while len(said) < count:
        with torch.no_grad():
            said.append(int(model(input_ids=torch.tensor([ids + said]), use_cache=False).logits[0, -1].argmax()))
        if said[-1] in stops:
            break
    return said


def test_greedy_batches_equal_single_prompts_and_transformers(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    prompts, stops = ids_of(tokenizer), [2]
    config = GenerateConfig(max_new_tokens=24, batch_size=3)
    said = generate(model, model.generate, tokenizer, prompts, config, stops, CPU)
    alone = [generate(model, model.generate, tokenizer, [p], config, stops, CPU)[0] for p in prompts]
    assert said == alone
    plain = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=stops, pad_token_id=0)
    for ids, answers in zip(prompts, said, strict=True):
        expected = by_hand(model, ids, 24, stops)
        theirs = model.generate(input_ids=torch.tensor([ids]), generation_config=plain)[0, len(ids) :].tolist()
        assert theirs == expected
        assert len(answers) == 1
        assert answers[0].text == tokenizer.decode([t for t in expected if t not in stops], skip_special_tokens=True)
        assert answers[0].num_tokens == len(expected)
        assert answers[0].stopped == (expected[-1] in stops)
    assert len({a[0].text for a in said}) == len(prompts), "an answer that knows nothing of its prompt proves nothing"


def test_the_stories_go_on_as_they_should(shared):
    """What the data's README shows of this model."""
    folder = shared / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<unk>"
    said = generate(model, model.generate, tokenizer, ids_of(tokenizer, PROMPTS[::-1]), GenerateConfig(), [2, 1], CPU)
    assert said[-1][0].text.startswith(", there was a little girl named Lily. She loved to play outside in the park.")


def test_a_stop_token_ends_an_answer_and_is_not_in_it():
    """Each token that the model says is made the stop token in turn; a longer answer in the same batch goes on."""
    model, tokenizer = random_model("llama"), byte_tokenizer()
    prompts = ids_of(tokenizer, PROMPTS[:2])
    config = GenerateConfig(max_new_tokens=12)
    whole = [by_hand(model, p, 12, []) for p in prompts]
    for k in (0, 3, 11):
        stop = whole[0][k]
        end = whole[0].index(stop)
        first, second = generate(model, model.generate, tokenizer, prompts, config, [stop, 2], CPU)
        assert first[0].stopped
        assert first[0].num_tokens == end + 1
        assert first[0].text == tokenizer.decode(whole[0][:end], skip_special_tokens=True)
        rest = by_hand(model, prompts[1], 12, [stop, 2])
        assert second[0].num_tokens == len(rest)
        assert second[0].text == tokenizer.decode([t for t in rest if t not in (stop, 2)], skip_special_tokens=True)
    cut = generate(model, model.generate, tokenizer, prompts, GenerateConfig(max_new_tokens=5), [], CPU)[0][0]
    assert (cut.num_tokens, cut.stopped) == (5, False)


def test_a_models_own_generation_settings_do_not_leak_in():
    """Hub models ship a repetition penalty, a length or beams: `temperature: 0 takes the likeliest token` is then a lie."""
    model, tokenizer = random_model("llama"), byte_tokenizer()
    prompts, config = ids_of(tokenizer), GenerateConfig(max_new_tokens=16)
    expected = [by_hand(model, p, 16, [2]) for p in prompts]
    model.generation_config = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=3.0, top_k=5, max_length=3,
        min_new_tokens=16, num_beams=2, suppress_tokens=[expected[0][0]], pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    said = generate(model, model.generate, tokenizer, prompts, config, [2], CPU)
    assert [a[0].num_tokens for a in said] == [len(e) for e in expected]
    texts = [tokenizer.decode([t for t in e if t != 2], skip_special_tokens=True) for e in expected]
    assert [a[0].text for a in said] == texts


def test_samples_follow_the_seed():
    model, tokenizer = random_model("llama"), byte_tokenizer()
    prompts = ids_of(tokenizer)
    config = GenerateConfig(max_new_tokens=10, num_samples=4, temperature=1.0, batch_size=2)

    def draw(seed, config=config):
        torch.rand(7)  # what was drawn before does not matter
        return generate(model, model.generate, tokenizer, prompts, config, [2], CPU, seed)

    first = draw(1)
    assert draw(1) == first
    assert draw(2) != first
    assert [len(a) for a in first] == [4] * len(prompts)
    assert len({a.text for a in first[0]}) > 1
    cold = draw(1, GenerateConfig(max_new_tokens=10, num_samples=3, temperature=1e-4))
    greedy = draw(1, GenerateConfig(max_new_tokens=10))
    assert [[a.text for a in answers] for answers in cold] == [[a[0].text] * 3 for a in greedy]
    narrow = draw(1, GenerateConfig(max_new_tokens=10, num_samples=3, temperature=5.0, top_k=1))
    assert [[a.text for a in answers] for answers in narrow] == [[a[0].text] * 3 for a in greedy]


def test_room_in_the_context():
    assert lack_of_room([1] * 28, "a:1", 100, 128) is None
    assert lack_of_room([1] * 500, "a:1", 100, None) is None
    assert re.search(r"a:2.*29 tokens.*max_new_tokens=100.*128", str(lack_of_room([1] * 29, "a:2", 100, 128)))
    assert "no token" in str(lack_of_room([], "a:1", 100, 128))


# -- prompts are what training put before the answers ---------------------------------------------------

MARKED = (
    "{{- bos_token -}}{%- for m in messages -%}{{- '<' + m['role'] + '>' -}}{%- if m['role'] == 'assistant' -%}"
    "{%- generation -%}{{- m['content'] + eos_token -}}{%- endgeneration -%}{%- else -%}{{- m['content'] -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)
UNMARKED = MARKED.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which is it, red or blue?"},
    {"role": "assistant", "content": "It is blue."},
]


def tokenizer_of(name: str, shared: Path):
    """Tokenizers with and without BOS, with and without a blank that they put before a text."""
    models = {"bytes": ModelConfig(tokenizer="bytes"), "stories": ModelConfig(path=f"{shared}/models/stories260K"),
              "tinystories": ModelConfig(path=f"{shared}/models/tinystories-656k"),
              "phi3": ModelConfig(path=f"{shared}/tokenizers/phi-3-mini")}  # fmt: skip
    tokenizer = load_tokenizer(models["phi3" if name == "llama2" else name])
    if name == "llama2":  # the same vocabulary, and BOS before every text
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def groups(config: Config):
    """What prompts are read by."""
    return config.generate, config.data, config.objective


def before_answer(record: Record, tokenizer) -> list[int]:
    """The ids of a training row up to its first supervised token."""
    examples = conversations([record], tokenizer, Config(data=DataConfig(require_stop_token=False)))
    return examples.ids(0)[: int(examples.trained(0)[0])].tolist()


@pytest.mark.parametrize("template", ["own", "marked", "unmarked"])
@pytest.mark.parametrize("name", ["bytes", "stories", "tinystories", "phi3", "llama2"])
def test_a_chats_prompt_is_what_training_read(shared, tmp_path, name, template):
    tokenizer = tokenizer_of(name, shared)
    if template != "own":
        tokenizer.chat_template = {"marked": MARKED, "unmarked": UNMARKED}[template]
    elif not tokenizer.chat_template:
        pytest.skip("it has none")
    talk = TALK if name != "phi3" or template != "own" else TALK[1:]
    trained = before_answer(Record("a:1", messages=talk), tokenizer)
    assert trained[:2].count(tokenizer.bos_token_id) <= 1
    assert chat_ids(tokenizer, talk[:-1], "a:1") == trained
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"messages": talk[:-1]}) + "\n")
    config = Config(generate=GenerateConfig(file=str(path)))
    assert [p.ids for p in read_prompts([], *groups(config), tokenizer)] == [trained, trained]
    single = before_answer(Record("a:1", prompt="Which?", response="It is blue."), tokenizer)
    assert read_prompts(["Which?"], *groups(Config()), tokenizer)[0].ids == single
    with_system = Config(generate=GenerateConfig(system="Be brief."))
    if talk is TALK:
        assert read_prompts([talk[1]["content"]], *groups(with_system), tokenizer)[0].ids == trained


@pytest.mark.parametrize("name", ["bytes", "stories", "tinystories", "phi3", "llama2"])
def test_the_plain_template_gives_what_training_read(shared, tmp_path, name):
    """A tokenizer without a template: training joins prompt and answer, and its export carries a template that does so."""
    tokenizer = tokenizer_of(name, shared)
    tokenizer.chat_template = None
    texts = ["Which is it?", " blank before", "two\nlines", "trailing ", "<s>x", "123", "é ß 日本"]
    trained = [before_answer(Record("a:1", prompt=t, response="It is blue."), tokenizer) for t in texts]
    tokenizer.chat_template = plain_template(tokenizer)
    talks = [[{"role": "user", "content": t}] for t in texts]
    found = [chat_ids(tokenizer, talk, "a:1") for talk in talks]
    assert [t for t, a, b in zip(texts, found, trained, strict=True) if a != b] == []
    tokenizer.save_pretrained(tmp_path)
    elsewhere = AutoTokenizer.from_pretrained(tmp_path)
    said = [elsewhere.apply_chat_template(t, add_generation_prompt=True, return_dict=True)["input_ids"] for t in talks]
    ours = [text for text, a, b in zip(texts, said, trained, strict=True) if a != b]
    assert set(ours) <= {"<s>x"}, "which is text to us where others take it for the token"


ASKS = ["{text}\nLabel:", "Is it {text}? It is", "A \"{text}\" \\n'{{x}}' é🙂:", "Say {text}", "{text}"]


@pytest.mark.parametrize("name", ["bytes", "stories", "tinystories", "phi3", "llama2"])
def test_the_label_template_gives_what_training_read(shared, tmp_path, name):
    """Classification by token: a text in one turn of the user becomes, with other tools, the tokens before the label."""
    tokenizer = tokenizer_of(name, shared)
    tokenizer.save_pretrained(tmp_path)
    elsewhere = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["Which is it?", " blank before", "two\nlines", "trailing ", "ends.\n", "\n", "123", "é ß 日本 🙂", "a. "]
    for prompt in ASKS:
        objective = ClassifyTokenConfig(prompt=prompt)
        encode = Labelled(tokenizer, DataConfig(max_length=500), objective)
        usable = [text for text in texts if text.strip()]
        trained = encode([Record("a:1", text=text) for text in usable]).columns.batch()["ids"].to_pylist()
        assert [text_ids(tokenizer, text, objective) for text in usable] == trained
        elsewhere.chat_template, exact = label_template(tokenizer, objective)
        assert exact
        talks = [[{"role": "user", "content": text}] for text in usable]
        said = [
            elsewhere.apply_chat_template(t, add_generation_prompt=True, return_dict=True)["input_ids"] for t in talks
        ]
        assert [t for t, a, b in zip(usable, said, trained, strict=True) if a != b] == [], prompt
        for talk in (talks[0] * 2, [{"role": "system", "content": "x"}]):
            with pytest.raises(Exception, match="one text, in one turn of the user"):
                elsewhere.apply_chat_template(talk)
        # A row that is too long loses of its text, and never of what follows it.
        whole = max(trained, key=len)
        after = prompt.partition("{text}")[2]
        cut = Labelled(tokenizer, DataConfig(max_length=len(whole) - 2), objective)
        [short] = cut([Record("a:1", text=usable[trained.index(whole)])]).columns.batch()["ids"].to_pylist()
        assert len(short) == len(whole) - 2
        kept = next(n for n in range(len(whole), -1, -1) if short[len(short) - n :] == whole[len(whole) - n :])
        assert short[: len(short) - kept] == whole[: len(short) - kept]
        spelt = str(tokenizer.decode(tokenizer(after, add_special_tokens=False)["input_ids"])).strip()
        assert tokenizer.decode(whole[len(whole) - kept :]).endswith(spelt)


def test_rows_that_are_no_prompt(tmp_path):
    tokenizer = byte_tokenizer()
    path = tmp_path / "p.jsonl"
    config = Config(generate=GenerateConfig(file=str(path)))
    talks = [[], ["hello"], [{"content": "no role"}], [{"role": "assistant", "content": "only this"}]]
    for row in ({"question_text": "x"}, {"prompt": None}, {"prompt": 5.5}, *({"messages": t} for t in talks)):
        path.write_text(json.dumps({"prompt": "good"}) + "\n" + json.dumps(row) + "\n")
        good, bad = read_prompts([], *groups(config), tokenizer)
        assert good.fault is None
        assert "p.jsonl:2" in str(bad.fault)
    tokenizer.chat_template = None
    path.write_text(json.dumps({"messages": TALK}) + "\n")
    (bad,) = read_prompts([], *groups(config), tokenizer)
    assert "chat template" in str(bad.fault)


# -- the verb ---------------------------------------------------------------------------------------------


@pytest.fixture
def stories(shared) -> str:
    return f"model.path={shared / 'models' / 'stories260K'}"


def call(capfd, *argv: str) -> tuple[int, str, str]:
    capfd.readouterr()
    code = cli(["generate", *argv])
    out = capfd.readouterr()
    return code, out.out, out.err


def test_prompts_with_every_awkward_character(capfd, stories):
    """Hydra's grammar must not see them: commas, quotes, equals signs, braces, line ends."""
    odd = ['a, b, "c"', "it's", "x=1, y={2}", "two\nlines\n", "[1,2]", "--prompt", "${oc.env:HOME}", "ünï", "a\\b"]
    argv = [part for text in odd[:-1] for part in ("--prompt", text)] + [f"--prompt={odd[-1]}"]
    code, out, err = call(capfd, stories, *argv, "generate.max_new_tokens=3")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [r["prompt"] for r in rows] == odd
    assert all(len(r["answers"]) == 1 and r["answers"][0]["num_tokens"] <= 3 for r in rows)


def test_files_in_and_out(capfd, stories, tmp_path):
    source, text, out = tmp_path / "p.jsonl", tmp_path / "p.txt", tmp_path / "deep" / "out.jsonl"
    rows = [{"prompt": "One day", "id": 7}, {"prompt": "Go on:", "input": "The cat"}, {"text": "The sun"}]
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = [stories, f"generate.file={source}", "generate.max_new_tokens=8", f"generate.out={out}"]
    code, printed, err = call(capfd, *argv, "-p", "Once")
    assert code == 0, err
    assert printed == ""
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{k: v for k, v in r.items() if k != "answers"} for r in written] == [{"prompt": "Once"}, *rows]
    again = call(capfd, *argv, "-p", "Once")
    assert (again[0], [json.loads(line) for line in out.read_text().splitlines()]) == (0, written)
    beside = [rows[0], {"prompt": None}, {"prompt": "word " * 600}, {"other": "x"}]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(r) + "\n" for r in beside) + '{"prompt": \n')
    code, printed, err = call(capfd, stories, f"generate.file={mixed}", "generate.max_new_tokens=8")
    assert code == 0, err
    lines = [json.loads(line) for line in printed.splitlines()]
    assert lines[0] == written[1]
    assert [line["answers"] for line in lines[1:]] == [[]] * 4
    assert [re.search(r"mixed\.jsonl:(\d)", line["error"])[1] for line in lines[1:]] == ["2", "3", "4", "5"]
    assert "4 of 5 prompts have no answer" in err
    text.write_text("Once\n\nGo on:\nThe cat\n")
    code, printed, err = call(capfd, stories, f"generate.file={text}", "generate.max_new_tokens=8")
    assert code == 0, err
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [r["text"] for r in lines] == ["Once", "Go on:", "The cat"]
    assert lines[0]["answers"] == written[0]["answers"]
    joined = call(capfd, stories, "--prompt", "Go on:\n\nThe cat", "generate.max_new_tokens=8")
    assert json.loads(joined[1])["answers"] == written[2]["answers"], "`input` follows the prompt as in training"
    sampled = [*argv[:3], "generate.temperature=1", "generate.num_samples=3", "seed=4"]
    assert call(capfd, *sampled)[1] == call(capfd, *sampled)[1]
    assert call(capfd, *sampled)[1] != call(capfd, *sampled, "seed=5")[1]


def test_refusals(capfd, stories, tmp_path):
    for argv, words in (
        ((stories,), "no prompt"),
        ((stories, "--prompt"), "without a text"),
        ((stories, f"generate.file={tmp_path}/absent.jsonl"), "does not exist"),
        ((stories, "--prompt", "x", "objective=classify"), "classifier"),
        ((stories, "--prompt", "x", "objective=classify_token"), "Give data.labels=[...]"),
        ((stories, "--prompt", "x", "generate.max_new_tokens=600"), "context of 512"),
        ((stories, "--prompt", "x", "generate.num_samples=2"), "generate.temperature"),
        (("--prompt", "x"), "model.path"),
        ((f"run.dir={tmp_path}", "--prompt", "x"), "no run"),
    ):
        code, out, err = call(capfd, *argv)
        assert (code, out) == (2, ""), (argv, err)
        assert words in err
        assert "Traceback" not in err


def test_a_classifiers_words(tritune, capfd, tiny, label_file, stories, tmp_path):
    """In whatever form it comes: a run, its adapter, the whole model."""
    data = [f"data.train={label_file}", "data.max_length=96", "objective=classify", "train.max_steps=1"]
    full, lora = tmp_path / "full", tmp_path / "lora"
    assert tritune(*tiny, *data, "export.enabled=true", f"run.dir={full}").code == 0
    base = [o for o in tiny if not o.startswith("model")]
    assert tritune(*base, stories, *data, "method=lora", "export.enabled=true", f"run.dir={lora}").code == 0
    assert (lora / "export" / "adapter_config.json").is_file()
    found = []
    for given in (
        f"run.dir={full}",
        f"model.path={full / 'export'}",
        f"run.dir={lora}",
        f"model.path={lora / 'export'}",
    ):
        asks = ["--prompt", "red", "--prompt", "red" + 400 * " more"]  # the second is far above max_length
        code, out, err = call(capfd, given, *asks, *(["objective=classify"] if "model.path" in given else []))
        assert code == 0, err
        assert ("data.max_length=96" in err) == ("model.path" in given)
        found.append([json.loads(line)["answers"][0] for line in out.splitlines()])
        assert all(a["text"] in a["probabilities"].keys() == {"red", "green", "blue"} for a in found[-1])
    for run, export in (found[:2], found[2:]):  # cut where it was in training, an export answers as its run does
        for ours, its in zip(run, export, strict=True):
            assert its["probabilities"] == pytest.approx(ours["probabilities"], abs=1e-5)
