"""Rows with planted faults at known lines, and rows without any. All from a seed."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

PASSWORD, KEY = "hunter2Hunter", "sk-proj-Ab3dEfGh1jKlMn0pQrSt"
CARD, EMAIL, PHONE = "4111 1111 1111 1111", "jane.doe@example.com", "+44 20 7946 0958"
MAX_LENGTH = 480  # the byte tokenizer has a token a byte


class Words:
    """Texts of made-up words, no two alike."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
        self.words = ["".join(self.rng.choices(syllables, k=self.rng.randint(1, 3))) for _ in range(3000)]

    def text(self, low: int, high: int) -> str:
        return " ".join(self.rng.choices(self.words, k=self.rng.randint(low, high)))

    def row(self) -> dict[str, str]:
        return {"prompt": self.text(8, 20), "response": self.text(6, 20)}


def one_word_changed(text: str) -> str:
    words = text.split(" ")
    words[len(words) // 2] = "changed"
    return " ".join(words)


def clean_rows(count: int, seed: int) -> list[dict[str, str]]:
    words = Words(seed)
    return [words.row() for _ in range(count)]


def as_messages(row: dict) -> dict:
    return {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]}


def write(path: Path, rows: list[dict | bytes]) -> Path:
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def faulty_sft(folder: Path, messages: bool) -> tuple[Path, Path, dict[str, dict[str, set[int]]]]:
    """train.jsonl and test.jsonl with every fault of chat data, and finding -> file -> its lines (from 1)."""
    words = Words(1)
    train = clean_rows(200, 2)
    test = clean_rows(60, 3)
    shape = as_messages if messages else dict
    long = {"prompt": words.text(35, 35), "response": words.text(5, 5)}
    train[5] = {**long}
    train[59] = {**long, "prompt": one_word_changed(long["prompt"])}  # line 60 like line 6
    train[49] = {**train[4]}  # line 50 as line 5
    train[69] = {"prompt": "short", "response": words.text(200, 200)}
    train[79] = {"prompt": words.text(200, 200), "response": "beyond"}
    train[89] = {"prompt": words.text(9, 9), "response": ""}
    train[99]["response"] += f" pay with {CARD} now"
    train[100]["prompt"] += f" write to {EMAIL}"
    train[101]["prompt"] += f" call {PHONE} soon"
    train[109] = {
        "prompt": train[10]["prompt"].upper(),
        "response": words.text(30, 30),
    }  # line 110 asks what line 11 does
    train[129]["prompt"] = " "
    train[130]["response"] += " CafÃ© crÃ¨me, s\u2019il vous plaÃ®t"
    train[131]["response"] += " na\ufffdve"
    train[132]["prompt"] += f" my password is {PASSWORD}"
    train[133]["response"] += f" export OPENAI_API_KEY={KEY}"
    test[2] = {**train[6]}
    train[7] = {"prompt": words.text(35, 35), "response": words.text(5, 5)}
    test[3] = {**train[7], "prompt": one_word_changed(train[7]["prompt"])}
    test[4] = {"prompt": train[8]["prompt"], "response": words.text(30, 30)}
    rows: list[dict | bytes] = [shape(row) for row in train]
    rows[9] = b'{"prompt": "this line ends here'
    rows[19] = {"messages": [{"role": "wizard", "content": "x"}]} if messages else {"prompt": "x", "response": [1, 2]}
    rows[29] = shape({"prompt": "a \0 byte", "response": "yes"})
    rows[39] = b'{"prompt": "\xff\xfe", "response": "x"}'
    rows[119] = {"other": "columns"}
    expected = {
        "bad_rows": {"train.jsonl": {10, 20, 30, 40, 120}},
        "duplicates_exact": {"train.jsonl": {50}},
        "duplicates_near": {"train.jsonl": {60}},
        "leakage_exact": {"test.jsonl": {3}},
        "leakage_near": {"test.jsonl": {4}},
        "leakage_prompt": {"test.jsonl": {5}},
        "truncation": {"train.jsonl": {70}},
        "truncated_answers": {"train.jsonl": {70}},
        "unsupervised": {"train.jsonl": {80}},
        "empty_answers": {"train.jsonl": {90}},
        "empty_prompts": {"train.jsonl": {130}},
        "mojibake": {"train.jsonl": {131, 132}},
        "credentials": {"train.jsonl": {133, 134}},
        "personal": {"train.jsonl": {100, 101, 102}},
        # line 110 of train against line 11, line 5 of test against line 9 of train
        "same_prompt": {"train.jsonl": {110}, "test.jsonl": {5}},
    }
    return write(folder / "train.jsonl", rows), write(folder / "test.jsonl", [shape(r) for r in test]), expected


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def labelled(count: int, seed: int) -> list[list[str]]:
    words = Words(seed)
    return [[words.text(10, 25), ["red", "green", "blue"][i % 3]] for i in range(count)]


def faulty_labels(folder: Path) -> tuple[Path, Path, dict[str, dict[str, set[int]]]]:
    """train.csv and test.csv (the header is line 1) with the faults of classification."""
    words = Words(11)
    train, test = labelled(300, 12), labelled(60, 13)  # row i stands on line i + 2
    train[18] = [train[8][0].upper(), "green" if train[8][1] != "green" else "red"]  # line 20 against line 10
    train[28] = [*train[9]]  # line 30 as line 11
    train[38] = ["three", "cells", "here"]
    train[48] = ["  ", "red"]
    train[58] = [words.text(12, 12), "rare"]
    train[68] = [train[68][0] + f" at {EMAIL}", train[68][1]]
    train[78] = ["a \0 byte", "red"]
    train[88] = [words.text(200, 200), "red"]
    long = words.text(40, 40)
    train[98] = [long, "blue"]
    train[108] = [one_word_changed(long), "blue"]
    test[8] = [*train[12]]
    test[18] = [words.text(12, 12), "unheard"]
    expected = {
        "contradictions": {"train.csv": {20}},
        "duplicates_exact": {"train.csv": {30}},
        "bad_rows": {"train.csv": {40, 50, 80}},
        "personal": {"train.csv": {70}},
        "truncation": {"train.csv": {90}},
        "leakage_exact": {"test.csv": {10}},
        "unknown_labels": {"test.csv": {20}},
    }
    header = ["text", "label"]
    return (
        write_csv(folder / "train.csv", [header, *train]),
        write_csv(folder / "test.csv", [header, *test]),
        expected,
    )


BOS_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{- message['content'] + eos_token -}}
{%- else -%}{{- message['content'] + '\\n' -}}{%- endif -%}
{%- endfor -%}
"""
ENDLESS_TEMPLATE = """\
{%- for message in messages -%}{{- message['role'] + ': ' + message['content'] + '\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}
"""
MARKED, UNMARKED = (
    """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
OPEN{{- message['content'] + '<|im_end|>' -}}CLOSE{{- '\\n' -}}
{%- else -%}{{- message['content'] + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\nSure: ' -}}{%- endif -%}
""".replace("OPEN", opening).replace("CLOSE", closing)
    for opening, closing in (("{%- generation -%}", "{%- endgeneration -%}"), ("", ""))
)
