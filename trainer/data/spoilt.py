"""Signs that a text was decoded wrongly on its way here: U+FFFD, and UTF-8 that was once read as Windows-1252 or Latin-1.

A finding is a hint for a person who then looks, and a false alarm costs more than a miss: a run of such characters counts where
it spells, byte for byte, a character that texts have. "É»" at the end of a French quotation spells a phonetic sign, and is left.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

REPLACEMENT = "\ufffd"


def _readings() -> dict[str, int]:
    """What stands for each byte from 0x80 on in a text that was read wrongly: by Windows-1252, by Latin-1."""
    found = {chr(byte): byte for byte in range(0x80, 0x100)}
    for byte in range(0x80, 0xA0):
        found.setdefault(bytes([byte]).decode("cp1252", errors="ignore") or chr(byte), byte)
    return found


_BYTES = _readings()
_NEXT = "[" + re.escape("".join(c for c, byte in _BYTES.items() if byte < 0xC0)) + "]"
_TWICE = re.compile(f"[Â-ß]{_NEXT}|[à-ï]{_NEXT}{{2}}|[ð-ô]{_NEXT}{{3}}")
# What texts have: Latin letters and signs, Greek, Cyrillic, Hebrew, Arabic, dashes and quotes, the euro, letterlike signs,
# arrows, symbols, the scripts of Asia, ligatures, pictures.
_USUAL = re.compile(
    "[\u00a0-\u017f\u0386-\u03ce\u0400-\u045f\u05d0-\u05ea\u0621-\u064a\u0900-\u0e5b\u2010-\u2044\u20ac\u2100-\u22ff"
    "\u2500-\u27bf\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\ufb00-\ufb06\ufeff\uff01-\uff5e\U0001f000-\U0001faff]"
)


@dataclass(frozen=True)
class Spoilt:
    """Characters that stand for others: `found` as it is in the text, `meant` as it was before, empty where that is lost."""

    found: str
    meant: str

    def __str__(self) -> str:
        return f"{self.found!r} for {self.meant!r}" if self.meant else "U+FFFD, for what could not be decoded"


def find_spoilt(text: str) -> Spoilt | None:
    """The first sign of a wrong decoding, or None."""
    if text.isascii():
        return None
    for match in _TWICE.finditer(text):
        meant = bytes(_BYTES[c] for c in match[0]).decode("utf-8", errors="ignore")
        if _USUAL.fullmatch(meant):
            return Spoilt(match[0], meant)
    return Spoilt(REPLACEMENT, "") if REPLACEMENT in text else None
