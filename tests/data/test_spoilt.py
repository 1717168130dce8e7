"""Texts that were decoded wrongly: ftfy's classes of damage, made here by decoding wrongly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritune.trainer.data.spoilt import find_spoilt

TEXTS = [
    "Le café crème, s’il vous plaît – 3 € « oui »", "Grüße aus Köln, Straße", "¿Qué? ¡Señor!", "Привет, как дела",
    "Καλημέρα κόσμε", "日本語のテキスト", "안녕하세요", "שלום", "naïve “quotes”… and – dashes", "smile 😀 and ✨",
    "ÉCOLE « CAFÉ», VOCÊ®, ÀÉÎÔÛ, SÃO PAULO, «Où»", "30 °C ± 2 µm ½ × 3", "Łódź, Đà Nẵng, Ærø, œuvre",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_right_text_is_left_alone(text):
    assert find_spoilt(text) is None


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_utf8_that_was_read_as_another_encoding_is_found(text, encoding):
    wrong = "".join(
        bytes([byte]).decode(encoding, errors="ignore") or chr(byte) for byte in text.encode()
    )  # cp1252 leaves five bytes without a character, which readers hand on as they are
    found = find_spoilt(f"before {wrong} behind")
    assert found is not None
    assert found.meant in text
    assert found.found in wrong


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_is_never_spoilt(text):
    assert find_spoilt(text) is None
    assert str(find_spoilt(text + "\ufffd")) == "U+FFFD, for what could not be decoded"
