"""Secrets go, everything else stays, and JSON and YAML are still that."""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
import string
import time

import pytest
import yaml
from tritune.trainer.config import Config
from tritune.trainer.config.compose import to_dict
from tritune.trainer.redact import redact, redact_tree

BODY = "aB3dE5gH7jK9mN1pQ2"
HEX = "0123456789abcdef0123456789abcdef01234567"
SHAPES = [
    f"hf_{BODY}{BODY}"[:37],
    f"wandb_v1_{BODY}_{BODY}",
    "AKIAIOSFODNN7EXAMPLE",
    f"ghp_{BODY}{BODY}",
    f"gho_{BODY}{BODY}",
    f"github_pat_11ABCDEFG0{BODY}_{BODY}",
    f"sk-{BODY}{BODY}",
    f"sk-ant-api03-{BODY}-{BODY}",
    f"sk-proj-{BODY}_{BODY}",
    f"xoxb-123456789012-{BODY}",
    f"glpat-{BODY}",
    f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{BODY}",
]
VALUE = "tr0ub4dor&3"
NAMES = ["api_key", "openai.api_key", "x-api-key", "apiKey", "access_token", "hf_token", "auth_token", "HF_TOKEN",
         "password", "db_password", "secret", "client_secret", "AWS_SECRET_ACCESS_KEY", "model.hub_token"]  # fmt: skip
ORDINARY = """\
model.pad_token=<pad>
pad_token: <|endoftext|>
tokens: 123456789012
tokenizer: hf-internal-testing/tiny-random-gpt2
tokenizer=/models/hf_cache/tokenizer_hf_something_long_enough_here
label_tokens: 35
add_tokens: ['<tool>', '<think>']
max_tokens=4096
max_new_tokens: 128
data.require_stop_token: true
eos_token_id=2
token=<pad>
keep_last: 2
monkey=1
lr: 0.001
key: value
keys=text,label
step 100/2000  loss 1.2345  grad 0.123  lr 1.00e-04  12,345 tok/s  1.00 GiB  ETA 4:05
digest: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
revision: 0123456789abcdef0123456789abcdef01234567
hf://PolyAI/banking77@config:train[:10%]
https://huggingface.co/docs:80/x@y
the password was wrong, and so was the token
a bearer of bad news: authorization is needed
mask-learning sk-learn-compatible-estimators-of-all-kinds
api_key: null
password: ''
"""


@pytest.fixture(autouse=True)
def no_secrets_in_the_environment(monkeypatch):
    for name in ("MY_API_KEY", "SERVICE_TOKEN", "DB_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("secret", SHAPES)
def test_known_shapes_go_wherever_they_stand(secret):
    for text in ("{}", "error: {} is refused", "'{}'", "a={}", "<{}>", "x/{}/y", "line\n{}\nline", r"line\n{}\nline"):
        clean = redact(text.replace("{}", secret))
        assert BODY[:8] not in clean
        assert "EXAMPLE" not in clean
        assert clean.replace("(***)", "***") == text.replace("{}", "***")
        assert redact(clean) == clean


@pytest.mark.parametrize("name", NAMES)
def test_values_beside_a_telling_key_go(name):
    for text in (f"{name}={VALUE} next=1", f'"{name}": "{VALUE}"', f"{name}: {VALUE}", f"{name} = '{VALUE}'",
                 f"{{'{name}': '{VALUE}', 'next': 1}}", json.dumps(json.dumps({name: VALUE, "next": 1})),
                 f"https://host/path?{name}=tr0ub4dor&next=1", f"--{name} {VALUE} --next 1",
                 json.dumps(["x", f"--{name}", VALUE])):  # fmt: skip
        clean = redact(text)
        assert "tr0ub4" not in clean, clean
        assert "***" in clean
        assert name in clean
        assert ("next" in clean) == ("next" in text)
        assert redact(clean) == clean


def test_urls_and_headers():
    assert redact("git clone https://user:hunter2@host.com/x.git") == "git clone https://***@host.com/x.git"
    assert redact("postgres://u:p@ss:w@db:5432/x") == "postgres://***@db:5432/x"
    assert redact("ssh://git@github.com/x") == "ssh://git@github.com/x"
    assert redact(f"Authorization: Bearer {VALUE}-{BODY}") == "Authorization: Bearer ***"
    assert redact('{"Authorization": "Basic dXNlcjpwYXNz"}') == '{"Authorization": "Basic ***"}'
    assert redact(f"sent bearer {BODY}") == "sent bearer ***"


def test_a_key_of_forty_hex_digits_goes_only_from_a_key_variable():
    assert redact(f"export WANDB_API_KEY={HEX}") == "export WANDB_API_KEY=***"
    assert redact(f"DEPLOY_KEY={HEX}") == "DEPLOY_KEY=***"
    assert redact(f"commit {HEX}") == f"commit {HEX}"
    assert redact(f"cache_digest={HEX}") == f"cache_digest={HEX}"


def test_a_private_key_goes_whole():
    text = f"x\n-----BEGIN RSA PRIVATE KEY-----\n{BODY}\n{BODY}\n-----END RSA PRIVATE KEY-----\ny"
    assert redact(text) == "x\n-----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----\ny"


@pytest.mark.parametrize(
    "name", ["MY_API_KEY", "SERVICE_TOKEN", "DB_PASSWORD", "db_passwd", "GOOGLE_CREDENTIALS", "KEY"]
)
def test_values_of_variables_go(name, monkeypatch):
    assert redact("x correct-horse-7 y") == "x correct-horse-7 y"
    monkeypatch.setenv(name, "correct-horse-7")
    assert redact("x correct-horse-7 y") == "x *** y"
    monkeypatch.setenv(name, 'quo"ted\\secret')
    assert redact('x quo"ted\\secret y') == "x *** y"
    assert json.loads(redact(json.dumps({"a": 'see quo"ted\\secret', "b": 1}))) == {"a": "see ***", "b": 1}
    monkeypatch.delenv(name)
    assert redact("x correct-horse-7 y") == "x correct-horse-7 y"


@pytest.mark.parametrize(
    ("name", "value"),
    [("MY_API_KEY", "short"), ("MY_API_KEY", "disabled"), ("TOKENIZERS_PARALLELISM", "not-a-secret-1"),
     ("MONKEY", "not-a-secret-1"), ("SSH_KEY", "/home/user/.ssh/id_rsa"), ("SSH_KEY", "~/.ssh/id_ed25519"),
     ("MAX_TOKENS_SEEN", "/data/one"), ("PATH_TO", "not-a-secret-1"), ("KEYBOARD", "not-a-secret-1")],
)  # fmt: skip
def test_other_variables_stay(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert redact(f"x {value} y") == f"x {value} y"


def test_a_number_goes_only_where_json_can_spare_it(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "12345678")
    text = '{"tokens": 12345678, "x": "12345678", "password": 12345678}'
    assert json.loads(redact(text)) == {"tokens": 12345678, "x": "***", "password": "***"}


def test_the_longer_of_two_secrets_goes_whole(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct-horse")
    monkeypatch.setenv("SERVICE_TOKEN", "correct-horse-battery-1")
    assert redact("correct-horse-battery-1") == "***"


@pytest.mark.parametrize("line", ORDINARY.splitlines())
def test_ordinary_text_stays(line):
    assert redact(line) == line
    assert redact(f"2026-01-01 00:00:00 {line}") == f"2026-01-01 00:00:00 {line}"


def test_our_own_files_stay():
    config = to_dict(Config())
    metrics = {"step": 3, "loss": 0.5, "tokens": 81920, "label_tokens": 512, "tokens_per_second": 12345.6}
    environment = {"command": ["trainer/__main__.py", "experiment=sft", "model.pad_token=<pad>"], "python": "3.11.7",
                   "packages": {"tokenizers": "0.22.1", "torch": None}, "host": "node-17", "cpus": 16}  # fmt: skip
    for tree in (config, metrics, environment, {"sha256": "9f86d081884c7d65" * 4}):
        assert redact_tree(tree) == tree
        for text in (json.dumps(tree), json.dumps(tree, indent=1), yaml.safe_dump(tree, sort_keys=False)):
            assert redact(text) == text


def test_a_tree_is_redacted_in_keys_lists_and_under_telling_keys():
    tree = {"a": [f"x {SHAPES[0]}", 1, None, {"password": "hello there", "n": 2}], SHAPES[1]: True,
            "tokenizer": "bytes", "api_key": ["one", "two", None], "secret": {"x": "y"}, "t": ("api_key=abc",)}  # fmt: skip
    before = json.dumps(tree)
    assert redact_tree(tree) == {"a": ["x ***", 1, None, {"password": "***", "n": 2}], "***": True,
            "tokenizer": "bytes", "api_key": ["***", "***", None], "secret": {"x": "***"}, "t": ("api_key=***",)}  # fmt: skip
    assert json.dumps(tree) == before
    assert redact_tree(redact_tree(tree)) == redact_tree(tree)


def random_tree(rng: random.Random, depth: int = 0):
    """Trees of secrets, ordinary text and odd characters."""
    kind = rng.random()
    if depth < 3 and kind < 0.35:
        return {random_key(rng): random_tree(rng, depth + 1) for _ in range(rng.randint(0, 4))}
    if depth < 3 and kind < 0.5:
        return [random_tree(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    if kind < 0.65:
        return rng.choice([1, 0.5, -3, True, False, None, 123456789012])
    parts = [rng.choice([*SHAPES, *ORDINARY.splitlines(), VALUE, "".join(rng.choices(string.printable, k=6)),
                         f"api_key={VALUE}", f"https://u:{VALUE}@h/", f"Authorization: Bearer {BODY}",
                         "plain", ", ", "\n", '"', "'", "\\", ": ", "- "]) for _ in range(rng.randint(1, 4))]  # fmt: skip
    return rng.choice([" ", "\n", ", ", ": ", "|", " = "]).join(parts)  # a secret glued to a word is none we would know


def random_key(rng: random.Random) -> str:
    return rng.choice([*NAMES, "lr", "tokens", "pad_token", "a b", SHAPES[0], "note", "optim.lr"])


def leaked(text: str) -> list[str]:
    return [s for s in SHAPES if s in text]


def loads_yaml(text: str):
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def test_random_json_and_yaml_stay_valid_and_redacting_twice_changes_nothing():
    rng = random.Random(0)
    changed = 0
    for _ in range(1500):
        tree = {"root": random_tree(rng), "other": random_tree(rng)}
        text = json.dumps(tree, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
        clean = redact(text)
        changed += clean != text
        json.loads(clean)
        assert redact(clean) == clean, clean
        tidy = redact_tree(tree)
        assert redact_tree(tidy) == tidy
        json.dumps(tidy)
        block = redact(yaml.safe_dump(tree, sort_keys=False))
        assert redact(block) == block, block
        try:
            loads_yaml(block)
        except yaml.YAMLError as error:
            pytest.fail(f"{error}\n{block}")
        assert not leaked(clean) + leaked(json.dumps(tidy)) + leaked(block)
    assert changed > 300


def test_a_plain_yaml_value_is_marked_so_that_it_is_no_alias():
    text = yaml.safe_dump({SHAPES[0]: 1, "a": SHAPES[1], "b": [SHAPES[2]], "password": "my long phrase"})
    assert yaml.safe_load(redact(text)) == {"(***)": 1, "a": "(***)", "b": ["(***)"], "password": "(***)"}
    assert yaml.safe_load(redact(f"[x, {SHAPES[0]}, {{a: {SHAPES[1]}}}]")) == ["x", "(***)", {"a": "(***)"}]


def test_it_is_quick():
    """Every line of a log goes through it. Measured: 50 to 80 microseconds a line; the limit allows for a busy machine."""
    lines = ORDINARY.splitlines() * 20
    best = min(timed(lines) for _ in range(5))
    assert best / len(lines) < 1e-3
    assert timed(["a" * 100_000, "key " * 20_000, "://" * 20_000, "token=" * 10_000, '"' * 50_000]) < 5.0


def timed(lines: list[str]) -> float:
    began = time.perf_counter()
    for line in lines:
        redact(line)
    return time.perf_counter() - began


def test_every_key_of_the_config_stays_as_it_is():
    def names(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls)]

    for group in dataclasses.fields(Config):
        value = getattr(Config(), group.name)
        for name in names(type(value)) if dataclasses.is_dataclass(value) else [group.name]:
            assert redact(f"{group.name}.{name}=Something-Long-123") == f"{group.name}.{name}=Something-Long-123"
            assert redact_tree({name: "Something-Long-123"}) == {name: "Something-Long-123"}


def test_a_url_that_lost_a_slash_is_one_all_the_same():
    for text in ("https:/bob:S3cr3t@example.com/x", "hf://https:/bob:S3cr3t@example.com/x", "s3:/a:S3cr3t@b"):
        assert "S3cr3t" not in redact(f"run.dir={text}: there is none"), text
    for text in ("C:/a:b@c", "ratio 1:/2:3@4", "see https:/example.com/a:b"):
        assert redact(text) == text


def test_a_secret_in_colour_is_one_all_the_same():
    token = "hf_AbC123dEf456GhI789jKl012MnO345pQr6"
    for code in ("\x1b[m", "\x1b[0m", "\x1b[31m", "\x1b[1;31m", "\x1b[2J"):
        assert redact(f"{code}{token}\x1b[0m") == f"{code}***\x1b[0m"


def test_a_secret_that_was_quoted_for_python_yaml_hydra_or_a_shell_is_one_all_the_same(monkeypatch):
    secret = "pa\"ss'wo\\rd-é-1x9"
    monkeypatch.setenv("MY_PASSWORD", secret)
    hydra = secret.replace("'", "\\'")
    for text in (secret, repr(secret), json.dumps(secret), f"'{hydra}'", shlex.quote(f"a={secret}")):
        assert "rd-é-1x9" not in redact(text), text
    assert "rd-é-1x9" not in redact(yaml.safe_dump({"a": secret}, default_style="'", allow_unicode=True))


LONG_RUNS = ["sk-", "sk-a1", "eyJ-", "eyJaaaaaaaa.", "hf_", "password=)))", "password=x)", "password x ", "password: x   ", "--",
             "-----BEGIN PRIVATE KEY-----", "\n", "hf_AbC123dEf456GhI789jKl012MnO345pQr6 "]  # fmt: skip


@pytest.mark.parametrize("unit", LONG_RUNS)
def test_time_grows_with_the_length_and_not_with_its_square(unit):
    """32,000 characters of `sk-` took 5 s, and 26 line breaks before a token 21 s, each more of them twice that.

    Now some 50 ms: four times the length four times as long, where a square would make it sixteen. Short times are noise.
    """
    tail = "! password x hf_AbC123dEf456GhI789jKl012MnO345pQr6"
    short = min(timed([(unit * 16_000)[:16_000] + tail]) for _ in range(3))
    long = min(timed([(unit * 64_000)[:64_000] + tail]) for _ in range(2))
    assert long < max(8 * short, 0.5)
    assert long < 5


def test_what_ended_in_one_match_is_still_found_after_it():
    token = "hf_AbC123dEf456GhI789jKl012MnO345pQr6"
    for before in ("sk-learn-and-no-secret-at-all ", "eyJabcdefghij.com ", "-----BEGIN RSA PRIVATE KEY----- "):
        assert redact(before + token) == before + "***"
    key = "-----BEGIN PRIVATE KEY-----"
    assert "MIIE" not in redact(f"{key} and {key}\nMIIEabcdefgh\n-----END PRIVATE KEY-----")
