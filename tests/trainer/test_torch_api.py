"""What we use of torch is what its oldest, its locked and its newest supported version have, and all of it is listed."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from read_torch import RECORDS
from tritune.trainer.model.activations import KEPT_OPS
from tritune.trainer.torch_api import NEWEST, OLDEST, USES, Use

ROOT = Path(__file__).resolve().parents[2]
ALL = [use for uses in USES.values() for use in uses]
VERSIONS = {path.stem: json.loads(path.read_text())["names"] for path in RECORDS.glob("*.json")}
# Modules whose names are private, young or moved now and then; of `torch.distributed` itself only what begins with `_`.
WATCHED = ("torch.distributed.", "torch.nn.attention.", "torch.nn.parallel.", "torch.utils.checkpoint.", "torch.library.",
           "torch.utils.deterministic.", "torch.overrides.", "torch.autograd.graph.", "torch.autograd.function.")  # fmt: skip


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def fault(use: Use, read: list[str] | str | None) -> str | None:
    """Why a version that has `read` cannot take the call."""
    if read is None:
        return "it is not there"
    if use.call is None:
        return None
    if isinstance(read, str):
        return "it is no function"
    given = [g.strip() for g in use.call.split(",") if g.strip()]
    if use.ours:
        named = [p.rstrip("=") for p in read]
        return None if named == given else f"torch gives it {named}"
    parameters, kind = [], inspect.Parameter.POSITIONAL_OR_KEYWORD
    for text in read:
        if text.startswith("**"):
            parameters.append(inspect.Parameter(text[2:], inspect.Parameter.VAR_KEYWORD))
        elif text.startswith("*"):
            if text != "*":
                parameters.append(inspect.Parameter(text[1:], inspect.Parameter.VAR_POSITIONAL))
            kind = inspect.Parameter.KEYWORD_ONLY
        else:
            default = None if text.endswith("=") else inspect.Parameter.empty
            parameters.append(inspect.Parameter(text.rstrip("="), kind, default=default))
    positional = [g for g in given if not g.endswith("=")]
    try:
        bound = inspect.Signature(parameters).bind(*positional, **{g[:-1]: None for g in given if g.endswith("=")})
    except TypeError as error:
        return str(error)
    return next((f"{p} is not at its place" for p in positional if bound.arguments.get(p) != p), None)


@pytest.mark.parametrize("version", sorted(VERSIONS))
def test_every_use_is_one_that_the_version_takes(version):
    names = VERSIONS[version]
    assert set(names) == {use.name for use in ALL}, "run `python tests/trainer/read_torch.py` on the wheels again"
    for use in ALL:
        if number(use.since) > number(version):
            known = [p.rstrip("=") for p in names[use.name]]
            assert [g for g in re.findall(r"\w+(?==)", use.call) if g not in known], (
                f"{use.name} is older than {use.since}"
            )
        else:
            found = fault(use, names[use.name])
            assert found is None, f"{use.name} of torch {version}: {found}"


def test_the_range_is_the_one_that_is_recorded_and_asked_for():
    asked = re.search(r'"torch>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert asked is not None
    assert asked[1] == OLDEST
    assert number(asked[2]) == (number(NEWEST)[0], number(NEWEST)[1] + 1)
    assert {OLDEST, NEWEST} <= set(VERSIONS)
    assert max(map(number, VERSIONS)) == number(NEWEST)


def test_a_use_that_does_not_fit_is_found():
    def refused(call: str | None, read: list[str] | str | None, ours: bool = False) -> str:
        return fault(Use("torch.x", call, "", ours=ours), read) or ""

    assert not refused("a, b=", ["a", "*", "b=", "c="])
    assert not refused("a, b=", ["a", "**others"])
    assert "unexpected keyword argument 'b'" in refused("a, b=", ["a", "c="])
    assert "missing a required" in refused("a", ["a", "b"])
    assert "a is not at its place" in refused("a, b", ["b", "a"])
    assert "too many positional" in refused("a, b", ["a", "*", "b"])
    assert "torch gives it ['self', 'a', 'b']" in refused("self, a", ["self", "a", "b="], ours=True)
    assert refused(None, None) == "it is not there"
    assert refused("", "there") == "it is no function"


def described(name: str) -> list[str] | str:
    """The installed torch's, as `read_torch` writes it."""
    if " --" in name:
        module, option = name.split(" ")
        assert option in importlib.import_module(module).get_args_parser()._option_string_actions
        return "there"
    parts = name.split(".")
    depth = next(n for n in range(len(parts), 0, -1) if _is_module(".".join(parts[:n])))
    found = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:-1]:
        found = getattr(found, part)
    if depth == len(parts):
        return "there"
    annotated = parts[-1] in getattr(found, "__annotations__", {})
    if not hasattr(found, parts[-1]):
        assert annotated or f"self.{parts[-1]} " in inspect.getsource(found), name
        return "there"
    found = getattr(found, parts[-1])
    if not inspect.isroutine(found) and not isinstance(found, type):
        return "there"
    texts, star = [], False
    for parameter in inspect.signature(found).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.KEYWORD_ONLY) and not star:
            star = True
            texts.append("*" + (parameter.name if parameter.kind is parameter.VAR_POSITIONAL else ""))
        if parameter.kind is parameter.VAR_KEYWORD:
            texts.append(f"**{parameter.name}")
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            texts.append(parameter.name + "=" * (parameter.default is not parameter.empty))
    return texts


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_the_installed_version_is_as_it_was_read():
    """The reader against Python itself; and a build of torch that differs from the wheel of its version is found."""
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in VERSIONS:
        pytest.skip(f"there is no record of torch {version}")
    for name, read in VERSIONS[version].items():
        if not name.startswith("torch.ops."):
            assert described(name) == read, name


def used(path: Path) -> set[str]:
    """Full names of what a file takes from watched modules, or by private names."""
    tree, known, found = ast.parse(path.read_text()), {"torch": "torch"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {a.asname: a.name for a in node.names if a.asname and a.name.startswith("torch.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            found |= {f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            first, _, rest = whole.partition(".")
            if first in known and re.fullmatch(r"[\w.]+", whole):
                found.add(f"{known[first]}.{rest}")
    return {name for name in found if name.startswith(WATCHED) and watched(name)} | {
        n for n in found if re.search(r"\._[^_]", n)
    }


def watched(name: str) -> bool:
    """Of `torch.distributed` what lies in its modules: the names in itself are documented and have stayed for years."""
    parts = name.split(".")
    return parts[1] != "distributed" or (len(parts) > 3 and parts[2].islower() and parts[2] != "group")


def test_every_use_is_listed():
    listed = {use.name.replace("._Deterministic", "") for use in ALL}
    found = set()
    for folder in ("trainer", "kernels", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= used(path)
            missing = {
                n
                for n in used(path)
                if not any(u == n or u.startswith(f"{n}.") or n.startswith(f"{u}.") for u in listed)
            }
            assert not missing, f"{path.relative_to(ROOT)} uses {sorted(missing)}: list them in trainer/torch_api.py"
    assert {
        "torch.distributed.distributed_c10d._get_default_store", "torch.distributed.checkpoint.save",
        "torch.distributed.fsdp.fully_shard", "torch.utils.deterministic.fill_uninitialized_memory", "torch.library.custom_op",
    } <= found  # fmt: skip


def test_what_is_listed_is_used():
    for file, uses in USES.items():
        text = (ROOT / file).read_text()
        for use in uses:
            assert re.split(r"[.]| --", use.name.removesuffix(".default"))[-1] in text, f"{use.name} in {file}"
    listed = {use.name for use in USES["trainer/model/activations.py"] if use.name.startswith("torch.ops.")}
    assert listed == {f"torch.ops.{op}" for op in KEPT_OPS}
