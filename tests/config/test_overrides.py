"""Names of files and folders go through Hydra's grammar, and to other processes, and come back as they were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritune.launch import torchrun
from tritune.trainer.config.compose import load_config
from tritune.trainer.config.overrides import override, value_of

NAMES = [
    "é", "漢字", "🙂", "a b", "a'b", 'a"b', "a\\b", "a\\", "a\nb", "$(touch x)", "a,b", "{a}", "[a]", "a=b", "#", "\\'",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_one_that_the_configuration_has(name):
    config = load_config(["model=tiny", "data.train=rows", "train.max_steps=1", override("run.dir", name)])
    assert config.run.dir == name


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12))
def test_any_text_comes_back(text):
    assert value_of(override("run.dir", text)) == text


def test_what_needs_no_quotes_has_none():
    assert override("run.dir", "runs/a-1") == "run.dir=runs/a-1"


@pytest.mark.parametrize("name", NAMES)
def test_several_processes_get_the_directory_that_was_given(name, monkeypatch, tmp_path, sft_file):
    """JSON's quoting made `run.dir=é` the folder `\\u00e9`."""
    seen = []
    monkeypatch.setattr(torchrun, "_watched", lambda argv, *rest: seen.append(argv[-1]) or 0)
    given = [
        "model=tiny",
        f"data.train={sft_file}",
        "train.max_steps=1",
        override("run.dir", name),
        "launch.num_procs=2",
    ]
    assert torchrun.train(given) == 0
    assert value_of(seen[0]) == name
