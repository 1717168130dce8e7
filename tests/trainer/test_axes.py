"""An axis is a joint only if its names are nowhere else: no file outside of its folder spells an option of `objective` or
`method`, takes something from an option's file, or asks what class its configuration has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tritune.trainer.config.registry import AXES, built_in

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"objective": "objectives", "method": "methods"}
# Words that are another thing's name as well, by file: of what is exported, and of what a layer keeps.
OTHERS = {("trainer/config/choices.py", "full"), ("trainer/config/choices.py", "adapter")}
# Words that the house says of rows and texts everywhere: such an option is seen by `method=`, its class and its module.
COMMON = {"prompt"}


def sources(axis: str) -> list[Path]:
    files = [p for folder in ("trainer", "launch") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    return [p for p in files if FOLDERS[axis] not in p.parts]


def documentation(module: ast.Module) -> set[int]:
    held = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in ast.walk(module) if isinstance(n, held) and n.body and isinstance(n.body[0], ast.Expr)]
    return {id(n.body[0].value) for n in nodes}


def spellings(axis: str, text: str) -> list[str]:
    """What in a file's source names an option: texts, the options' classes and modules."""
    options = built_in(axis)
    classes, module = {kind.__name__ for kind in options.values()}, ast.parse(text)
    names = "|".join(map(re.escape, options))
    named, held = re.compile(rf"\b{axis}=({names})(?![\w.])"), documentation(module)
    found = []
    for node in ast.walk(module):
        match node:
            case ast.Constant(value=str(said)) if id(node) not in held:
                found += [said] if said in {*options} - COMMON else [m[0] for m in named.finditer(said)]
            case ast.ImportFrom(module=str(where)):
                package = f"tritune.trainer.{FOLDERS[axis]}"
                found += [where] if where in {f"{package}.{name}" for name in options} else []
                found += [f"{where}.{a.name}" for a in node.names if where == package and a.name in options]
            case ast.Name(id=word) | ast.Attribute(attr=word) if word in classes:
                found.append(word)
    return found


@pytest.mark.parametrize("axis", AXES)
def test_no_option_is_named_outside_of_its_folder(axis):
    found = {
        (str(p.relative_to(ROOT)), word) for p in sources(axis) for word in spellings(axis, p.read_text())
    } - OTHERS  # fmt: skip
    assert not found


def test_every_way_to_name_one_is_seen():
    """So that the test above can fail."""
    text = """
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods import full
if config.method.name == "lora" or isinstance(config.method, LoraConfig):
    raise ValueError(f"method=full trains {what}")
"""
    assert sorted(spellings("method", text)) == [
        "LoraConfig", "lora", "method=full", "tritune.trainer.methods.full", "tritune.trainer.methods.lora",
    ]  # fmt: skip
    assert spellings("objective", 'x = ["sft", "objective=classify_token"]') == ["sft", "objective=classify_token"]


@pytest.mark.parametrize("axis", AXES)
def test_each_option_is_one_file_and_one_yaml(axis):
    for name, kind in built_in(axis).items():
        assert kind.__module__ == f"tritune.trainer.{FOLDERS[axis]}.{name}"
        assert kind().name == name
        assert (ROOT / "conf" / axis / f"{name}.yaml").is_file()


def test_no_exception_is_out_of_use():
    found = {
        (str(p.relative_to(ROOT)), word)
        for axis in AXES
        for p in sources(axis)
        for word in spellings(axis, p.read_text())
    }
    assert found >= OTHERS
