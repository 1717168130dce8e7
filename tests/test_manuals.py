"""The manuals: the front page is short, links lead somewhere, every file has its line and every key its meaning."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from tritune.trainer.config import reference as config_reference

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("trainer", "kernels", "launch", "benchmarks", "conf")
MANUALS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / folder / "README.md" for folder in FOLDERS)]


def listed(manual: Path) -> list[str]:
    """The paths in the table "Every file": the first of a cell from the root, the others in the same folder."""
    found = []
    for line in manual.read_text().partition("## Every file")[2].splitlines():
        names = re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("| `") else []
        found += names[:1] + [n if "/" in n else f"{names[0].rpartition('/')[0]}/{n}" for n in names[1:]]
    return found


def only_a_docstring(path: Path) -> bool:
    return path.name == "__init__.py" and len(path.read_text().splitlines()) <= 3


def committed_files(folder: str) -> list[str]:
    out = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", folder], cwd=ROOT, capture_output=True, text=True
    )
    if out.returncode:
        pytest.skip("the files of a checkout are asked of git")
    kinds = (".py", ".j2", ".sh")
    return [
        f for f in out.stdout.split() if f.endswith(kinds) and (ROOT / f).is_file() and not only_a_docstring(ROOT / f)
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_has_one_line_in_its_folder_s_manual(folder):
    lines = listed(ROOT / folder / "README.md")
    assert lines
    assert not [name for name in lines if not (ROOT / name).exists()], "lines of files that are gone"
    assert not [name for name in lines if not name.startswith(f"{folder}/")], "lines that belong elsewhere"
    assert not [name for name, count in Counter(lines).items() if count > 1], "files with two lines"
    folders = tuple(name for name in lines if name.endswith("/"))
    assert not [f for f in committed_files(folder) if f not in lines and not f.startswith(folders)], (
        "files without a line"
    )


def anchors(manual: Path) -> set[str]:
    """GitHub's: lower case, without punctuation, hyphens for spaces."""
    titles = re.findall(r"^#+ (.*)$", manual.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("manual", MANUALS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(manual):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", manual.read_text()) if "://" not in link]
    assert links or manual.name == "CONTRIBUTING.md" or manual.parent.name == "conf"
    for link in links:
        path, _, anchor = link.partition("#")
        target = (manual.parent / path) if path else manual
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_the_front_page_s_proof_is_the_record_s():
    """Each figure of its table stands in the row of the whole table that it is of."""
    whole = (ROOT / "benchmarks" / "README.md").read_text()
    (head,) = re.findall(r"^\| \| (ddp.*) \|$", whole, re.MULTILINE)
    (row,) = re.findall(r"^\| float32, lora, 3 \| (.*) \|$", whole, re.MULTILINE)
    record = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    front = re.findall(r"^\| `([\w@]+)` \| (\S+) \| (\S+) \| (\S+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(front) == 6
    for backend, *figures in front:
        assert " ".join(figures) == record[backend], backend


def test_the_keys_are_what_the_generator_gives(tmp_path):
    committed = (ROOT / "conf" / "README.md").read_text()
    anew = tmp_path / "README.md"
    anew.write_text(committed)
    config_reference.main(anew)
    assert anew.read_text() == committed, f"run {config_reference.MARKS[0]}"


def test_every_key_has_a_meaning_and_every_option_a_line():
    reference = config_reference.reference()
    empty = re.findall(r"^\| (`[^|]*`) \|.*\|\s*\|$", reference, re.MULTILINE)
    assert not empty, "a comment beside the field, or a docstring of its words, says what it means"
    keys = re.findall(r"^\| `([a-z_]+(?:\.[a-z_<>]+)+)` \|", reference, re.MULTILINE)
    assert len(keys) > 150
    assert {"optim.lr", "method.rank", "backend.shards", "launch.partition", "data.sources.<name>.weight"} <= set(keys)


def test_comments_are_read_where_they_stand():
    """Beside a field, at the end of one of several lines, and within its brackets; never those of the field before."""
    from tritune.trainer.config import VerifyConfig
    from tritune.trainer.config.data import SourceConfig

    said = config_reference.comments(VerifyConfig)
    assert said["order"].startswith("of a step's micro-batches")
    assert said["backends"].startswith("parity: NAME")
    assert config_reference.comments(SourceConfig)["path"] == "as data.train"
