"""Likely keys and passwords in a text. A model that was trained on one can be asked for it.

A finding is a hint for a person who then looks, and a false alarm costs more than a miss: keys by their known shapes; the
password of a URL; a password or key that is named as such, where its value is no word, no placeholder and no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tritune.trainer.data.personal import Finding
from tritune.trainer.redact import known_shapes

_PASSWORD = "passw(?:or)?[dt]|passphrase|passcode|pwd|kennwort|contraseña|mot de passe|senha"
# One of these is in every text that has something to find: searching for words is ten times as fast as one pattern of them all,
# and for their rarest character ten times as fast again.
_SHAPES = {
    "_": ("hf_", "wandb_v", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"), "-": ("PRIVATE KEY-----", "glpat-", "sk-"),
    ":": (":/",), "I": ("AKIA", "ASIA", "AIza"), "J": ("eyJ",), "x": ("xox",),
}  # fmt: skip
_PASSWORDS = ("passw", "passphrase", "passcode", "mot de passe")
_OTHERS = ("pwd", "kennwort", "contrase", "senha")
_KEYS, _OF_KEYS = ("key", "token"), ("api", "access", "secret", "auth")
_NAMED = re.compile(
    rf"(?i:\b(?P<password>{_PASSWORD})|\b(?:api|access|secret|auth)[_ -]?(?:key|token)|\bclient[_ -]?secret)"
    r"(?P<between>[\"']?\s{0,3}(?:[:=]|is|was)[:=]?\s{0,3})(?P<quote>[\"'`]?)"
    r"(?P<value>[^\s\"'`<>,;(){}\[\]]{6,200}+)(?P<after>[(\[{]?)"
)
_PLACEHOLDER = re.compile(
    r"(?i:your|my_|example|sample|dummy|change|insert|placeholder|redacted|hidden|xxx|\*{3}|\.{3}|#{3}|1234567890|abcdef|p[a@]ss?w[o0]rd"
    r"|process\.env|os\.environ|none|null|true|false|string|secret|token|key|^\$|^%|^@|^/|://)"
)


def find_credentials(text: str) -> Iterator[Finding]:
    """Likely keys (kind `key`) and passwords (kind `password`) in the order of their kinds; the first one at a place only."""
    found: list[Finding] = []
    if _may_have_shapes(text):
        found = [Finding(kind, start, stop) for kind, start, stop in known_shapes(text)]
        yield from found
    if not _may_name(text.lower()):
        return
    for match in _NAMED.finditer(text):
        start, stop = match.span("value")
        stop -= len(match["value"]) - len(match["value"].rstrip(".!?:"))
        taken = any(f.start < stop and start < f.stop for f in found)
        if not taken and not match["after"] and _is_random(text[start:stop], quoted=bool(match["quote"])):
            yield Finding("password" if match["password"] else "key", start, stop)


def _may_have_shapes(text: str) -> bool:
    return any(character in text and _any_in(hints, text) for character, hints in _SHAPES.items())


def _may_name(low: str) -> bool:
    """Whether a text in lower case may hold what `_NAMED` finds: the name of a password, or both words of a key's."""
    if "pass" in low and _any_in(_PASSWORDS, low):
        return True
    if _any_in(_OTHERS, low) or ("secret" in low and "client" in low):
        return True
    return _any_in(_KEYS, low) and _any_in(_OF_KEYS, low)


def _any_in(words: tuple[str, ...], text: str) -> bool:
    """As `any` over a generator, which takes twice as long for words in short texts."""
    for word in words:  # noqa: SIM110
        if word in text:
            return True
    return False


def _is_random(value: str, quoted: bool) -> bool:
    """Whether no person would write it but as a secret: letters and digits; in prose, no dotted or hyphenated name."""
    if len(value) < 6 or _PLACEHOLDER.search(value):
        return False
    letters, digits = any(c.isalpha() for c in value), any(c.isdigit() for c in value)
    signs = any(not c.isalnum() and c not in "._-" for c in value)
    plain = re.fullmatch(r"[A-Za-z_]\w*(?:\.\w+)+", value) is not None and not quoted  # module.attribute
    return letters and digits and not plain and (signs or quoted or len(value) >= 7)
