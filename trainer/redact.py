"""Secrets out of text: logs, config files, reports and trackers see `***` instead.

Three kinds: the values of environment variables that are named like secrets, strings of a known shape (`hf_...`), and
values that stand beside a telling key (`api_key=...`). JSON and YAML stay valid: a bare `***` at the start of a YAML
value would be an alias, so that there, and only there, the mark is `(***)`.

Text may be hostile: no pattern here takes more than linear time. A run of characters that several matches could begin in
is taken whole (possessively) and judged once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import yaml

MARK, PLAIN_MARK = "***", "(***)"
MIN_LENGTH = 8  # a shorter value of a variable is in too many words

_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:KEYS?|[A-Z0-9]*(?:APIKEY|ACCESSKEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?|PAT)(?:_|$)",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[\d.,eE+-]+")
_PATH = re.compile(r"(?:~|\.\.?|[A-Za-z]:)?(?:[/\\][\w.@ -]*)+")
_RANDOM = re.compile(r"(?=[^/\\]*\d)(?=[^/\\]*[A-Z])[^/\\]{20,}")

# A word begins here. In JSON text a line break is `\n`, whose letter must not be taken for a part of the word, nor may the
# letter that ends a terminal's code.
_CODES = "|".join(rf"(?<=\x1b\[{digits}[A-Za-z])" for digits in ("", r"\d", r"\d\d", r"\d;\d", r"\d;\d\d"))
_BEGIN = rf"(?:(?<![A-Za-z0-9])|(?<=\\[nrt])|{_CODES})"

_SHAPES = re.compile(
    _BEGIN
    + r"(?:hf_(?=[A-Za-z]*[A-Z0-9])[A-Za-z0-9]{20,}|wandb_v\d+_[\w-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[a-z]-[A-Za-z0-9-]{10,}|AIza[\w-]{35})"
)
_SK = re.compile(_BEGIN + r"sk-[\w-]{20,}+")
_SK_BODY = re.compile(r"[A-Za-z0-9]{16}")
_JWT = re.compile(_BEGIN + r"eyJ[\w-]{8,}+(?:\.eyJ[\w-]{8,}+(?P<signature>\.[\w-]*+)?)?")
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----((?:[^-]|-(?!----BEGIN |----END ))*+)-----END [A-Z ]*PRIVATE KEY-----"
)
# A path library makes `scheme:/user:password@host` of a URL.
_URL = re.compile(r"(?:(?<=://)|(?<=[A-Za-z][\w+.-]:/)(?!/))[^\s/@:\"'<>]*:[^\s/\"'<>]+(?=@)")
_HEADER = re.compile(
    r"(?i:authorization\\?[\"']?\s*[:=]\s*\\?[\"']?)(?i:(?:bearer|basic|token|apikey)\s+)?(?P<a>[^\s\"'\\,]{8,})"
    r"|(?i:\bbearer\s+)(?P<b>(?=[^\s\"']*\d)[\w.~+/=-]{16,})"
)

# The last part of a key. A mere `..._token` is no secret: pad_token, stop_token.
_KEY = (
    _BEGIN + r"(?i:api[_-]?keys?|(?:secret|private|access|account|encryption|signing)[_-]?keys?"
    r"|(?:access|auth|api|hf|hub|hugging_?face|wandb|bearer|refresh|git|github|gitlab|slack|bot|oauth2?|service"
    r"|secret)[_-]?tokens?|passwords?|passwd|passphrase|secrets?|credentials?)"
)
_SECRET_KEY = re.compile(_KEY + r"\Z")
# Of keys that may be innocent, only a value that looks like a secret goes.
_PERHAPS = r"(?:[A-Z0-9]_KEY(?=\\?[\"']?\s*[:=]\s*\\?[\"']?[0-9a-f]{40}\b)|(?<![\w.-])token(?==(?=[\w-]*\d)[\w-]{16,}))"
_STOP = r"(?=[\s\"'&;]|[,\])}]{1,32}(?:[\s\"'&;,\\]|\Z)|\\[nrt\"]|\Z)"  # where a bare value ends
_PAIR = re.compile(
    rf"(?P<key>{_KEY}|{_PERHAPS})(?:"
    r"(?P<q>\\?[\"'])?(?P<sep>[ \t]*[:=][ \t]*|(?<=[\w])[ \t]+(?=\S)|(?<=[\"']),\s*)"
    r"(?:\"(?P<double>(?:[^\"\\\n]|\\.)*)\"|\\\"(?P<escaped>[^\"\\\n]*)\\\"|''(?P<doubled>[^'\n]+)''"
    r"|'(?P<single>(?:[^'\n]|'')*)'"
    rf"|(?P<bare>[^\s\"'&;\\](?:[^\s\"'&;\\]|\\\\|\\(?![nrt\"\\]))*?){_STOP}))"
)
_NOTHING = re.compile(r"(?i:none|null|true|false|~|-?\d{1,3}|\$\{[^}]*\}|'+|\*\*\*|\(\*\*\*\)?)?[,\])}]*")
_INDICATOR = re.compile(r"[\[{|>&!].*")  # a bare value that is YAML's own: a list, a block
# In YAML the value of a key without quotes goes on to the end of the line, blanks and all.
_LINE = re.compile(
    rf"^(?P<head>[ ]*(?:- )*[\w.-]*?{_KEY}:[ ]++)(?P<rest>[^\s\"'\[{{|>&!*#$(]\S*+(?:[^\S\n]++(?!\#)\S++)*+"
    r"(?:(?<![\"'\\])|[^\n]*+(?<![\"'\\])))",
    re.MULTILINE,
)
# How a YAML mapping or list begins.
_DOCUMENT = re.compile(r"(?:\#.*\n|---.*\n|[^\S\n]*+\n)*+(?:[\w\"'(][^\n:]*:(?:\s|$)|- )")
_FLAG = re.compile(r"--[\w.-]*\Z")
_FLAG_LENGTH, _LINE_LENGTH = 100, 4000  # so far back a flag or the beginning of a line is looked for
_DOCUMENT_LENGTH = 200_000  # YAML of more characters would take seconds to read
_YAML_KEY = re.compile(r"[ ]*(?:- )*(?:[\w./-]+[ ]*:|-)[ ]+\Z|[ ]*(?:- )+\Z")
_HINTS = re.compile(
    r"(?i:key|token|secret|passw|passphrase|credential|authorization|bearer|:/|hf_|wandb_v|akia|asia|gh[pousr]_"
    r"|_pat_|glpat|xox|sk-|aiza|eyj)"
)


def redact(text: str) -> str:
    """Return `text` with its secrets replaced by `***`; text without any comes back unchanged, and so does the result.

    One line or a whole file. Quick enough for every line of a log: some 50 microseconds without a secret.
    """
    clean = _redact(text, _mark, _secrets())
    return clean if clean == text else _still_valid(text, clean)


def redact_tree(value: Any) -> Any:
    """Return `value` with every string redacted, in dicts (keys, too), lists and tuples; other things as they are.

    What stands under a telling key (`api_key`) goes whole, whatever its shape. The argument is not changed. The
    environment is read once for the whole tree: read for every string, it took two thirds of the time in which
    300,000 rows that cannot be read are written down.
    """
    return _tree(value, _secrets())


def _tree(value: Any, secrets: re.Pattern[str] | None) -> Any:
    if isinstance(value, str):
        return _redact(value, lambda *_: MARK, secrets)
    if isinstance(value, dict):
        return {
            _tree(k, secrets): _blank(v) if isinstance(k, str) and _SECRET_KEY.search(k) else _tree(v, secrets)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [_tree(v, secrets) for v in value]
    if isinstance(value, tuple):
        return tuple(_tree(v, secrets) for v in value)
    return value


def known_shapes(text: str) -> Iterator[tuple[str, int, int]]:
    """What has the shape of a secret wherever it stands: ("key" or "password", start, stop) of text[start:stop].

    Keys of known services, signed tokens, private keys, passwords in URLs; not what a name beside it makes one.
    """
    if "PRIVATE KEY-----" in text:
        yield from (("key", *m.span(1)) for m in _PRIVATE_KEY.finditer(text))
    yield from (("password", *m.span()) for m in _URL.finditer(text) if m[0] != MARK)
    yield from (("key", *m.span()) for m in _SK.finditer(text) if _is_sk(m[0]))
    yield from (("key", *m.span()) for m in _JWT.finditer(text) if m["signature"])
    yield from (("key", *m.span()) for m in _SHAPES.finditer(text))


def _still_valid(text: str, clean: str) -> str:
    """`clean`, unless `text` is a JSON or YAML document that it broke: then the document is redacted as a tree.

    A string of a document may itself hold quotes, escaped, that look like a value's.
    """
    if text.lstrip()[:1] in ("{", "["):
        if _loaded(json.loads, clean) is None and (tree := _loaded(json.loads, text)) is not None:
            return (
                json.dumps(redact_tree(tree), indent=1 if "\n" in text.strip() else None) + text[len(text.rstrip()) :]
            )
        return clean
    if not 0 <= text.find("\n") < len(text) <= _DOCUMENT_LENGTH or not _DOCUMENT.match(text):
        return clean
    if _loaded(yaml.safe_load, clean) is not None:
        return clean
    tree = _loaded(yaml.safe_load, text)
    return clean if tree is None else yaml.safe_dump(redact_tree(tree), sort_keys=False, allow_unicode=True)


def _loaded(load: Callable[[str], Any], text: str) -> dict | list | None:
    """The document, or None where it is none."""
    try:
        tree = load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return None
    return tree if isinstance(tree, dict | list) else None


def _blank(value: Any) -> Any:
    if isinstance(value, dict):
        return {redact_tree(k): _blank(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_blank(v) for v in value]
    return value if isinstance(value, bool) or value is None or _NOTHING.fullmatch(str(value)) else MARK


def _redact(text: str, mark: Callable[[str, int, int], str], secrets: re.Pattern[str] | None) -> str:
    if secrets is not None:
        text = secrets.sub(lambda m: mark(text, *m.span()), text)
    if not _HINTS.search(text):
        return text
    if "PRIVATE KEY-----" in text:
        text = _PRIVATE_KEY.sub(lambda m: m[0].replace(m[1], MARK), text)
    text = _URL.sub(lambda m: m[0] if m[0] == MARK else MARK, text)
    text = _SK.sub(lambda m: mark(text, *m.span()) if _is_sk(m[0]) else m[0], text)
    text = _JWT.sub(lambda m: mark(text, *m.span()) if m["signature"] else m[0], text)
    text = _SHAPES.sub(lambda m: mark(text, *m.span()), text)
    text = _HEADER.sub(_header, text)
    text = _LINE.sub(lambda m: m[0] if _NOTHING.fullmatch(m["rest"]) else m["head"] + PLAIN_MARK, text)
    return _PAIR.sub(lambda m: _pair(m, mark), text)


def _is_sk(word: str) -> bool:
    return any(c.isdecimal() for c in word) and _SK_BODY.search(word, 3) is not None


def _header(match: re.Match[str]) -> str:
    group = "a" if match["a"] is not None else "b"
    if match[group].lower() in ("bearer", "basic", "token", "apikey") or _NOTHING.fullmatch(match[group]):
        return match[0]
    return match[0][: match.start(group) - match.start()] + MARK


def _pair(match: re.Match[str], mark: Callable[[str, int, int], str]) -> str:
    """Replace the value of a `key=value`, `"key": "value"`, `key: value` or `--key value`."""
    kind = next(k for k in ("double", "escaped", "doubled", "single", "bare") if match[k] is not None)
    value, sep, text = match[kind], match["sep"], match.string
    flag = sep.strip() in ("", ",")
    if flag and not _FLAG.search(text[max(match.start() - _FLAG_LENGTH, 0) : match.start()]):
        return match[0]  # prose: "the password was wrong"
    if (sep.strip() == "," and kind == "bare") or _NOTHING.fullmatch(value) or value.startswith("--"):
        return match[0]
    if kind == "bare" and _INDICATOR.fullmatch(value):
        return match[0]
    start, end = (match.start(kind) - match.start(), match.end(kind) - match.start())
    new = MARK
    if kind == "bare" and match["q"] == '"':
        new = f'"{MARK}"'  # JSON has no other bare values than numbers
    elif kind == "bare":
        new = mark(text, *match.span(kind))
    return match[0][:start] + new + match[0][end:]


def _mark(text: str, start: int, end: int) -> str:
    """`***`, or `(***)` where a plain YAML value or key begins."""
    far = max(start - _LINE_LENGTH, 0)
    line = text[max(text.rfind("\n", far, start) + 1, far) : start]
    before = line.rstrip(" ")
    plain = bool(_YAML_KEY.fullmatch(line)) or (not before and text[end : end + 2] in (": ", ":\n", ":"))
    if before and not plain and before[-1] in "[{,:":
        plain = (before[-1] in "[{" or line != before) and ("[" in before or "{" in before)
    return PLAIN_MARK if plain else MARK


def _secrets() -> re.Pattern[str] | None:
    """A pattern for the secrets that the environment holds now."""
    values = {os.environ.get(name, "") for name in os.environ if _names_secret(name)}
    return _pattern(tuple(sorted(v for v in values if len(v) >= MIN_LENGTH)))


@lru_cache(maxsize=4096)
def _names_secret(name: str) -> bool:
    return _SECRET_VARIABLE.search(name) is not None


@lru_cache(maxsize=16)
def _pattern(values: tuple[str, ...]) -> re.Pattern[str] | None:
    forms: set[str] = set()
    for value in values:
        value = value.strip()
        if len(value) < MIN_LENGTH or _is_ordinary(value):
            continue
        if _NUMBER.fullmatch(value):  # a number elsewhere may be any number, and JSON could not do without it
            forms.add(rf"(?<=[\"'=]){re.escape(value)}(?=[\"'\s,;&]|\Z)")
            continue
        lines = [s for s in value.splitlines() if re.fullmatch(r"[\w+/=.-]{16,}", s.strip())]
        for form in {
            value,
            json.dumps(value)[1:-1],
            json.dumps(value, ensure_ascii=False)[1:-1],
            quote(value, safe=""),
            repr(value)[1:-1],
            value.replace("'", "''"),  # in YAML
            value.replace("'", "\\'"),  # in an override
            value.replace("'", "'\"'\"'"),  # in a shell's script
        }:
            forms.add(re.escape(form))
        forms |= {re.escape(s.strip()) for s in lines if len(lines) > 1}
    # The longest first: one secret may be the beginning of another.
    return re.compile("|".join(sorted(forms, key=lambda f: (-len(f), f)))) if forms else None


def _is_ordinary(value: str) -> bool:
    """A path or a word: to hide it would hide much that is no secret. A secret path says where, not what."""
    if _PATH.fullmatch(value):
        return not any(_RANDOM.fullmatch(part) for part in re.split(r"[/\\]", value))
    return value.isalpha() and len(value) <= 12 and (value.islower() or value.isupper() or value.istitle())
