"""Keys and passwords: what is found, and the prose, code and placeholders that are left alone."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritune.trainer.data.credentials import find_credentials

FOUND = {
    "my password is hunter2.": ("password", "hunter2"),
    "Password: s3cr3tPa55": ("password", "s3cr3tPa55"),
    "pwd=Tr0ub4dor&3;": ("password", "Tr0ub4dor&3"),
    "Passwort: geheim123": ("password", "geheim123"),
    '{"password": "k9!xyZ"}': ("password", "k9!xyZ"),
    "postgres://bob:hunter2@db.example.com/x": ("password", "bob:hunter2"),
    "api_key = 'A1b2C3d4E5f6'": ("key", "A1b2C3d4E5f6"),
    "access token: 5f4dcc3b5aa765d61d8327deb882cf99": ("key", "5f4dcc3b5aa765d61d8327deb882cf99"),
    "AWS: AKIAIOSFODNN7ABCDEFG.": ("key", "AKIAIOSFODNN7ABCDEFG"),
    "hf_abcdefghijklmnopqrstUVWXYZ123": ("key", "hf_abcdefghijklmnopqrstUVWXYZ123"),
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIB\n-----END RSA PRIVATE KEY-----": ("key", "\nMIIEpAIB\n"),
}
LEFT = """
the password is required to log in, and passwords expire after 90 days
password = get_password1(user)
password is config.db2.password
password: YOUR_PASSWORD_1, api_key="your-api-key-123", token = "<token1>", secret_key=os.environ["KEY1"]
password: P@ssw0rd1 and password123 are the worst of all
The API key is stored in Vault2024, see https://example.com/a1b2
skip sk-abc, ask-me-anything-about-anything-2024
tokens: 128256, secret santa, api keys are rotated
http://localhost:8080/path@x and a:b
"""


@pytest.mark.parametrize("text", FOUND)
def test_found(text):
    kind, value = FOUND[text]
    assert [(f.kind, text[f.start : f.stop]) for f in find_credentials(text)] == [(kind, value)]


@pytest.mark.parametrize("text", LEFT.strip().splitlines())
def test_left_alone(text):
    assert [text[f.start : f.stop] for f in find_credentials(text)] == []


def test_real_rows_hold_none(shared):
    """Instructions with much code in them, and receipts; looked through by a person."""
    for path in ("instruct/instruct_2000_permissive.jsonl", "extraction/sroie_receipts.jsonl"):
        for line in (shared / path).read_text().splitlines():
            text = "\n".join(str(value) for value in json.loads(line).values())
            assert list(find_credentials(text)) == []


@given(st.text("passwordkeysecret:= is'\"0123aB.{}<> \n", max_size=400))
def test_any_text_gives_findings_within_it(text):
    for finding in find_credentials(text):
        assert 0 <= finding.start < finding.stop <= len(text)
