"""Only regular files are opened, and whatever else stands at a path is refused by its name, never waited for."""

from __future__ import annotations

import json
import os
import re
import socket

import pytest
from tritune.trainer.config.choices import TextUnit
from tritune.trainer.data.files import read_blocks, source_files
from tritune.trainer.data.opening import open_regular, what_is
from tritune.trainer.data.records import read_rows
from tritune.trainer.errors import InputError

KEY = "data.train"
ROW = '{"text": "a"}\n'


def a_fifo(folder):
    os.mkfifo(folder / "rows.jsonl")
    return "rows.jsonl", "named pipe"


def a_socket(folder):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(folder / "rows.jsonl"))  # a socket's whole path has at most 107 bytes
    return "rows.jsonl", "a socket"


def a_device(folder):
    (folder / "rows.jsonl").symlink_to("/dev/zero")
    return "rows.jsonl", "a device"


def a_link_to_nothing(folder):
    (folder / "rows.jsonl").symlink_to(folder / "gone")
    return "rows.jsonl", r"a link to .*gone, which does not exist.*Mend the link"


def a_link_to_itself(folder):
    (folder / "rows.jsonl").symlink_to("rows.jsonl")
    return "rows.jsonl", r"Too many levels.*Replace the link"


def a_long_name(folder):
    return "a" * 300 + ".jsonl", r"File name too long.*shorter name"


def a_name_with_nul(folder):
    return "a\0.jsonl", "no file has this name"


def a_name_that_is_not_utf8(folder):
    name = os.fsdecode(b"\xff.jsonl")
    (folder / name).write_text(ROW)
    return name, "its name is not UTF-8.*Rename"


STRANGE = [
    a_fifo,
    a_socket,
    a_device,
    a_link_to_nothing,
    a_link_to_itself,
    a_long_name,
    a_name_with_nul,
    a_name_that_is_not_utf8,
]


@pytest.mark.parametrize("make", STRANGE, ids=lambda make: make.__name__)
def test_what_is_no_regular_file_is_refused_by_name(tmp_path, make):
    name, message = make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        source_files(str(tmp_path / name), KEY)
    assert ascii(name)[1:100].rstrip("'") in caught.value.value  # of a long name the beginning is shown
    if os.path.lexists(tmp_path / name[:99]):  # in a folder of good ones it is not passed over in silence
        (tmp_path / "good.jsonl").write_text(ROW)
        for source in (tmp_path, tmp_path / "*.jsonl"):
            with pytest.raises(InputError, match=message):
                source_files(str(source), KEY)
        with pytest.raises(InputError, match=message):
            list(read_blocks(tmp_path / name))


def test_what_may_not_be_read_is_refused(tmp_path, monkeypatch):
    """Root may read everything: the system's answers are made up, its errors are not."""
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(
            InputError, match=r"data\.train=.*rows\.jsonl: it cannot be opened: Permission denied\. Let"
        ):
            source_files(str(path), KEY)

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(InputError, match="Permission denied"):
        open_regular(path)
    monkeypatch.setattr("pathlib.Path.iterdir", forbidden)
    with pytest.raises(InputError, match=r"data\.train=.*Permission denied"):
        source_files(str(tmp_path), KEY)
    monkeypatch.setattr("pathlib.Path.stat", forbidden)
    with pytest.raises(InputError, match="Permission denied"):
        what_is(path, "data.test=x")


def test_a_pipe_put_in_a_files_place_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "rows.jsonl")
    monkeypatch.setattr("tritune.trainer.data.opening.what_is", lambda *_: "file")
    with pytest.raises(InputError, match="named pipe"):
        open_regular(tmp_path / "rows.jsonl")


# -- folders saved by datasets ---------------------------------------------------------------------------

GOOD = {"_data_files": [{"filename": "data.arrow"}], "_split": None, "_fingerprint": "x", "_format_type": None}
BROKEN = [
    b"{}", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"_data_files": 3}', b'{"_data_files": [{}]}', b'{"_data_files": [3]}',
    b'{"_data_files": [{"filename": 3}]}', b'{"_data_files": [{"filename": "../../rows"}]}', b'{"_data_files": {"a": 1}}',
]  # fmt: skip


@pytest.mark.parametrize("state", BROKEN, ids=lambda state: state[:40].decode("latin-1"))
def test_a_saved_folder_whose_state_is_broken(tmp_path, state):
    (tmp_path / "state.json").write_bytes(state)
    with pytest.raises(InputError, match=rf"{KEY}=.*state\.json does not say which data_files.*Save"):
        source_files(str(tmp_path), KEY)


@pytest.mark.parametrize("splits", ["{}", "[]", "{", '{"splits": 3}', '{"splits": "train"}', '{"splits": [["train"]]}'])
def test_a_saved_folder_whose_splits_are_broken(tmp_path, splits):
    (tmp_path / "dataset_dict.json").write_text(splits)
    with pytest.raises(InputError, match=r"dataset_dict\.json does not say which splits"):
        source_files(str(tmp_path), KEY)


def test_a_saved_folder_that_does_not_load(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(InputError, match=r"state\.json does not say"):
        source_files(str(tmp_path), KEY)
    (tmp_path / "dataset_dict.json").unlink()
    (tmp_path / "state.json").write_text(json.dumps(GOOD))
    with pytest.raises(InputError, match=r"dataset_info\.json is not there"):
        source_files(str(tmp_path), KEY)
    (tmp_path / "data.arrow").write_bytes(b"garbage")
    for info in ("{}", "[1]", "[1", '{"features": 3}', '{"features": {"a": {"_type": "Nothing"}}}'):
        (tmp_path / "dataset_info.json").write_text(info)
        with pytest.raises(InputError, match=rf"{KEY}={re.escape(str(tmp_path))}: the saved dataset does not read"):
            list(read_rows(str(tmp_path), KEY, TextUnit.line))
    (tmp_path / "dataset_info.json").unlink()
    os.mkfifo(tmp_path / "dataset_info.json")
    with pytest.raises(InputError, match="named pipe"):
        list(read_rows(str(tmp_path), KEY, TextUnit.line))
