"""`tritune audit` on planted faults, each at its line, and on rows without any."""

from __future__ import annotations

import json
import subprocess
import sys

import corpus
import pytest

SFT = ["objective=sft", "model=tiny", f"data.max_length={corpus.MAX_LENGTH}"]
CLASSIFY = ["objective=classify", "model=tiny", f"data.max_length={corpus.MAX_LENGTH}"]


@pytest.mark.parametrize("messages", [False, True], ids=["prompt-response", "messages"])
def test_every_planted_fault_of_chat_data_is_found_at_its_line(audit, tmp_path, messages):
    train, test, expected = corpus.faulty_sft(tmp_path, messages)
    result = audit(*SFT, f"data.train={train}", f"data.test={test}")
    assert result.code == 2
    assert result.names() == set(expected)
    for name, lines in expected.items():
        assert result.lines(name) == lines, name
    assert "audit: bad_rows:" in result.err  # the row whose answer lies beyond the cut is one of many, and left out
    assert "audit.fail_on" in result.err
    rejects = [json.loads(line) for line in (result.folder / "rejects.jsonl").read_text().splitlines()]
    left_out = {(r["fate"], int(r["place"].rpartition(":")[2])) for r in rejects}
    assert left_out == {*(("bad", n) for n in expected["bad_rows"]["train.jsonl"]), ("unsupervised", 80)}
    assert all(r["why"] and r["source"] == "data.train" for r in rejects)


def test_every_planted_fault_of_labelled_data_is_found_at_its_line(audit, tmp_path):
    train, test, expected = corpus.faulty_labels(tmp_path)
    result = audit(*CLASSIFY, f"data.train={train}", f"data.test={test}")
    assert result.code == 2
    assert result.names() == {*expected, "label_balance", "duplicates_near"}
    for name, lines in expected.items():
        assert result.lines(name) == lines, name
    assert result.lines("duplicates_near") == {"train.csv": {20, 110}}  # 20 is another's text in capitals
    (balance,) = [f for f in result.report["findings"] if f["name"] == "label_balance"]
    assert balance["details"]["labels"] == {"rare": 1}
    assert result.report["splits"]["train"]["labels"] == {"blue": 98, "green": 98, "rare": 1, "red": 98} | {
        label: count for label, count in result.report["splits"]["train"]["labels"].items() if label != "rare"
    }
    assert sum(result.report["splits"]["train"]["labels"].values()) == 300 - 3


@pytest.mark.parametrize("kind", ["prompt-response", "messages", "labels", "text"])
def test_nothing_is_found_in_clean_rows(audit, tmp_path, kind):
    rows = corpus.clean_rows(2000, 5)
    options = [*SFT]
    if kind == "labels":
        path = corpus.write_csv(tmp_path / "train.csv", [["text", "label"], *corpus.labelled(2000, 5)])
        options = [*CLASSIFY]
    elif kind == "text":
        path = tmp_path / "train.txt"
        path.write_text("\n\n".join(row["prompt"] for row in rows))
        options = ["objective=pretrain", "model=tiny", "data.max_length=64"]
    else:
        path = corpus.write(
            tmp_path / "train.jsonl", [corpus.as_messages(r) if kind == "messages" else r for r in rows]
        )
    result = audit(*options, f"data.train={path}", "data.test_share=0.1", "data.validation_share=0.1")
    assert result.err == ""
    assert result.code == 0
    assert result.report["findings"] == []
    assert "nothing found" in result.out
    splits = result.report["splits"]
    assert set(splits) == {"train", "validation", "test"}
    if kind != "text":
        assert sum(split["rows"] for split in splits.values()) == 2000
        for split in splits.values():
            assert sum(count for *_, count in split["histogram"]) == split["rows"]


def test_personal_data_is_never_shown_whole(audit, tmp_path):
    train, test, _ = corpus.faulty_sft(tmp_path, messages=False)
    bad = {"messages": [{"role": "wizard", "content": f"mail {corpus.EMAIL}"}]}
    with train.open("a") as file:
        file.write(json.dumps({"prompt": f"mail {corpus.EMAIL}", "response": [f"or call {corpus.PHONE}"]}) + "\n")
        file.write(json.dumps(bad) + "\n")
    result = audit(*SFT, f"data.train={train}", f"data.test={test}")
    written = [path.read_text() for path in result.folder.iterdir()]
    for secret in (corpus.CARD, corpus.EMAIL, corpus.PHONE, corpus.PASSWORD, corpus.KEY):
        for text in (result.out, result.err, *written):
            assert secret not in text
            assert json.dumps(secret) not in text
    (finding,) = [f for f in result.report["findings"] if f["name"] == "personal"]
    assert finding["details"] == {"card": 1, "email": 1, "phone": 1}
    (given,) = [f for f in result.report["findings"] if f["name"] == "credentials"]
    assert given["details"] == {"password": 1, "key": 1}
    (spoilt,) = [f for f in result.report["findings"] if f["name"] == "mojibake"]
    assert spoilt["notes"] == ["'Ã©' for 'é'", "U+FFFD, for what could not be decoded"]
    assert any("email j…@e….com" in note for note in finding["notes"])
    off = audit(*SFT, f"data.train={train}", "audit.personal=false", "audit.near_duplicates=false")
    assert not {"personal", "credentials", "duplicates_near"} & off.names()


def test_the_page_fits_on_a_screen(audit, tmp_path):
    train, test, _ = corpus.faulty_sft(tmp_path, messages=True)
    out = audit(*SFT, f"data.train={train}", f"data.test={test}").out
    assert 20 < len(out.splitlines()) <= 60
    assert max(map(len, out.splitlines()[:-1])) <= 100  # but for the path at its end
    assert "train.jsonl:10: this line is not JSON" in out


def test_a_second_bos_is_found(audit, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(corpus.BOS_TEMPLATE)
    rows = corpus.clean_rows(50, 6)
    rows[11]["prompt"] = "<bos>" + rows[11]["prompt"]
    rows[12]["prompt"] += "<bos><bos>"  # within a text it is the text's
    path = corpus.write(tmp_path / "train.jsonl", rows)
    options = [*SFT, f"data.train={path}", f"model.chat_template={template}"]
    assert audit(*options).names() == {"control_tokens"}, "in the rows it is text"
    options.append("data.special_tokens=keep")
    result = audit(*options)
    assert result.lines("double_bos") == {"train.jsonl": {12}}
    assert result.names() == {"double_bos", "control_tokens"}
    assert result.code == 2
    assert audit(*options, "audit.fail_on=[]").code == 0


def test_a_second_bos_is_found_within_blocks_of_text(audit, tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n\n".join(["one two three four", "<bos>five six seven eight", "nine ten eleven twelve"]))
    result = audit(
        "objective=pretrain", "model=tiny", "data.max_length=500", f"data.train={path}", "data.special_tokens=keep"
    )
    assert result.severity("double_bos") == {"fault"}
    path.write_text("\n\n".join(["one two three four", "five six seven eight", "nine ten eleven twelve"]))
    assert (
        "double_bos"
        not in audit("objective=pretrain", "model=tiny", "data.max_length=500", f"data.train={path}").names()
    )


@pytest.mark.parametrize("template", [corpus.MARKED, corpus.UNMARKED], ids=["marked", "unmarked"])
def test_a_template_that_asks_otherwise_than_it_trains_is_found(audit, tmp_path, template):
    file = tmp_path / "template.jinja"
    file.write_text(template)
    path = corpus.write(tmp_path / "train.jsonl", corpus.clean_rows(200, 7))
    result = audit(*SFT, f"data.train={path}", f"model.chat_template={file}")
    assert result.severity("template_mismatch") == {"fault"}
    assert len(result.lines("template_mismatch")["train.jsonl"]) >= 64 + 32
    assert result.code == 2
    assert "template_mismatch" in result.err
    file.write_text(template.replace("Sure: ", ""))
    assert "template_mismatch" not in audit(*SFT, f"data.train={path}", f"model.chat_template={file}").names()


def test_a_template_without_a_stop_token_is_found(audit, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(corpus.ENDLESS_TEMPLATE)
    path = corpus.write(tmp_path / "train.jsonl", corpus.clean_rows(50, 8))
    result = audit(*SFT, f"data.train={path}", f"model.chat_template={file}")
    assert result.names() == {"no_stop_token"}
    assert result.code == 2
    chosen = audit(*SFT, f"data.train={path}", f"model.chat_template={file}", "data.require_stop_token=false")
    assert chosen.severity("no_stop_token") == {"note"}
    assert chosen.code == 0


def test_what_the_config_allows_ends_nothing(audit, tmp_path):
    train, test, _ = corpus.faulty_sft(tmp_path, messages=False)
    options = [*SFT, f"data.train={train}", f"data.test={test}", "data.bad_rows=skip", "data.unsupervised=drop"]
    result = audit(*options)
    assert result.severity("bad_rows") == result.severity("unsupervised") == {"note"}
    assert result.code == 0
    strict = audit(*options, "audit.fail_on=[leakage_near,personal]")
    assert strict.code == 2
    assert "leakage_near, personal" in strict.err.replace("personal, leakage_near", "leakage_near, personal")
    refused = audit(*options, "data.overlong=refuse", "data.bad_rows=refuse")
    assert 70 in refused.lines("bad_rows")["train.jsonl"]


def test_repetitions_that_training_leaves_out_are_notes(audit, tmp_path):
    train, test, _ = corpus.faulty_sft(tmp_path, messages=False)
    options = [*SFT, f"data.train={train}", f"data.test={test}"]
    names = ("duplicates_exact", "duplicates_near")
    for key, severities in (("keep", "ww"), ("drop", "nw"), ("drop_near", "nn")):
        result = audit(*options, f"data.duplicates={key}")
        assert "".join(next(iter(result.severity(name)))[0] for name in names) == severities


def test_a_split_that_stands_in_train_ends_it(audit, tmp_path):
    rows = corpus.clean_rows(100, 9)
    train = corpus.write(tmp_path / "train.jsonl", rows)
    few = corpus.write(tmp_path / "few.jsonl", [*corpus.clean_rows(96, 10), *rows[:4]])
    many = corpus.write(tmp_path / "many.jsonl", [*corpus.clean_rows(95, 10), *rows[:5]])
    assert audit(*SFT, f"data.train={train}", f"data.validation={few}").names() == {"leakage_exact"}
    result = audit(*SFT, f"data.train={train}", f"data.validation={many}")
    assert result.names() == {"leakage_exact", "split_leaked"}
    assert result.code == 2
    assert "5% of validation" in result.err


def test_what_training_leaves_out_of_a_split_ends_nothing(audit, tmp_path):
    """One source, divided: its repetitions are left out over all splits. Those of a file of its own stay in it."""
    rows = corpus.clean_rows(60, 9)
    both = corpus.write(tmp_path / "both.jsonl", [*rows, *rows[:15]])
    divided = [*SFT, f"data.train={both}", "data.validation_share=0.2", "data.held_out=contiguous"]
    assert audit(*divided).code == 2
    dropped = audit(*divided, "data.duplicates=drop")
    assert dropped.code == 0
    assert dropped.severity("split_leaked") == dropped.severity("leakage_exact") == {"note"}
    own = [f"data.train={corpus.write(tmp_path / 'train.jsonl', rows)}", f"data.validation={both}"]
    assert audit(*SFT, *own, "data.duplicates=drop").severity("split_leaked") == {"fault"}


def test_what_cannot_be_read_is_said_beside_the_rest(audit, tmp_path):
    rows = corpus.clean_rows(40, 9)
    train = corpus.write(tmp_path / "train.jsonl", [*rows, rows[0]])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    result = audit(*SFT, f"data.train={train}", f"data.test={empty}")
    assert result.code == 2
    assert result.severity("unreadable") == result.severity("bad_rows") == {"fault"}
    assert "empty.jsonl: the file holds no row" in result.out
    assert result.lines("duplicates_exact") == {"train.jsonl": {41}}
    missing = audit(*SFT, f"data.train={tmp_path / 'absent.jsonl'}")
    assert missing.code == 2
    assert "does not exist" in missing.err


def test_a_template_that_fails_on_every_row_is_said_with_its_reason(audit, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ raise_exception('no such turns') }}")
    path = corpus.write(tmp_path / "train.jsonl", corpus.clean_rows(20, 9))
    probe = audit(*SFT, f"data.train={path}", f"model.chat_template={file}")
    assert probe.code == 2
    assert "no such turns" in probe.err
    file.write_text(
        corpus.MARKED.replace("Sure: ", "") + "{{ raise_exception('no ' + 7) if messages[0].content|length > 25 }}"
    )
    result = audit(*SFT, f"data.train={path}", f"model.chat_template={file}")
    assert result.names() == {"unreadable", "bad_rows"}
    assert len(result.lines("bad_rows")["train.jsonl"]) == 20


def test_the_retention_text_is_read_as_text(audit, tmp_path):
    train = corpus.write(tmp_path / "train.jsonl", corpus.clean_rows(40, 9))
    texts = [{"text": row["prompt"]} for row in corpus.clean_rows(40, 10)]
    texts[20]["text"] += f" {corpus.EMAIL}"
    retention = corpus.write(tmp_path / "retention.jsonl", [*texts, b"{", texts[3]])
    result = audit(*SFT, f"data.train={train}", f"data.retention={retention}", "audit.fail_on=[bad_rows]")
    assert result.code == 2
    for name, line in (("bad_rows", 41), ("duplicates_exact", 42), ("personal", 21)):
        assert result.lines(name) == {"retention.jsonl": {line}}
    assert len(result.names()) == 3


def test_several_sources_are_one_train(audit, tmp_path):
    rows = corpus.clean_rows(60, 9)
    one = corpus.write(tmp_path / "one.jsonl", rows[:40])
    two = corpus.write(tmp_path / "two.jsonl", [*rows[40:], rows[0], b"{"])
    result = audit(*SFT, f"data.sources.a.path={one}", f"data.sources.b.path={two}")
    assert result.lines("duplicates_exact") == {"two.jsonl": {21}}
    assert result.lines("bad_rows") == {"two.jsonl": {22}}
    assert result.report["splits"]["train"]["rows"] == 61


def test_rows_beyond_the_context_are_refused(audit, tmp_path):
    path = corpus.write(tmp_path / "train.jsonl", corpus.clean_rows(20, 9))
    result = audit("objective=sft", "model=tiny", "data.max_length=513", f"data.train={path}")
    assert result.names() == {"over_context"}
    assert result.code == 2


def test_wrong_settings_are_refused_with_what_there_is(audit, tmp_path):
    path = corpus.write(tmp_path / "train.jsonl", corpus.clean_rows(20, 9))
    result = audit(*SFT, f"data.train={path}", "audit.fail_on=[double_boss]", "audit.similarity=0")
    assert result.code == 2
    assert "double_boss" in result.err
    assert "double_bos," in result.err
    assert "audit.similarity" in result.err
    nothing = audit(*SFT)
    assert nothing.code == 2
    assert "data.train" in nothing.err


def test_banking77_is_stopped_by_nothing(audit, shared):
    files = [f"data.{n}={shared}/intent/banking77_{n}.csv" for n in ("train", "test")]
    result = audit("objective=classify", f"model.path={shared}/models/stories260K", "data.max_length=128", *files)
    assert result.code == 0
    assert result.names() == {"truncation", "duplicates_near", "leakage_near", "unspelt"}
    assert result.report["splits"]["train"]["rows"] == 10003
    assert min(result.report["splits"]["train"]["labels"].values()) == 35


def test_in_a_process_of_its_own(tmp_path):
    """As it is called: nothing of ours is imported before it."""
    train = corpus.write(tmp_path / "train.jsonl", corpus.clean_rows(60, 9))
    command = [
        sys.executable,
        "-m",
        "tritune.launch.cli",
        "audit",
        *SFT,
        f"data.train={train}",
        f"audit.out={tmp_path}/out",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing found" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"audit.json", "rejects.jsonl", "lengths.svg"}


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_rows_that_are_left_out_as_too_long_are_not_without_an_answer(audit, tmp_path, overlong):
    rows = [{"prompt": "why? " * 200 if i < 6 else f"why {i}?", "response": f"so {i}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = audit(*SFT, f"data.train={tmp_path / 'rows.jsonl'}", f"data.overlong={overlong}")
    assert (result.code, "unsupervised" in result.names()) == ((0, False) if overlong == "drop" else (2, True))
