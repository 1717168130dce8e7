"""Signatures of torch, read from a wheel that need not run here: `python tests/trainer/read_torch.py WHEEL...`.

For each use in `trainer/torch_api.py`, `torch_signatures/VERSION.json` gets what the wheel's source says: a list of parameters
(`name`, `name=` with a default, `*` before those by keyword alone, `*args`, `**kwargs`), "there" for what is not called, null
for what is not. Nothing of the wheel is imported; operators come from torchgen's list.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from functools import cached_property
from pathlib import Path

RECORDS = Path(__file__).with_name("torch_signatures")
Read = list[str] | str | None


class Wheel:
    """The sources in a wheel."""

    def __init__(self, path: Path) -> None:
        self.files = zipfile.ZipFile(path)
        self.names = set(self.files.namelist())
        self.version = path.name.split("-")[1].partition("+")[0]
        self.parsed: dict[str, ast.Module] = {}

    @cached_property
    def operators(self) -> str:
        return self.files.read("torchgen/packaged/ATen/native/native_functions.yaml").decode()

    def file_of(self, module: str) -> str | None:
        base = module.replace(".", "/")
        return next((n for n in (f"{base}/__init__.py", f"{base}.py") if n in self.names), None)

    def body(self, module: str) -> list[ast.stmt]:
        file = self.file_of(module)
        assert file is not None
        if module not in self.parsed:
            self.parsed[module] = ast.parse(self.files.read(file))
        return list(_statements(self.parsed[module].body))

    def read(self, name: str) -> Read:
        """What is at `name`, a path of modules and members, an operator, or `MODULE --OPTION` of a command line."""
        if " " in name:
            module, _, option = name.partition(" ")
            return "there" if any(_is_option(node, option) for s in self.body(module) for node in ast.walk(s)) else None
        if name.startswith("torch.ops.aten."):
            operator = name.removeprefix("torch.ops.aten.").removesuffix(".default")
            return "there" if f"\n- func: {operator}(" in self.operators else None
        parts = name.split(".")
        depth = max(n for n in range(1, len(parts) + 1) if self.file_of(".".join(parts[:n])))
        module, members = ".".join(parts[:depth]), parts[depth:]
        if not members:
            return "there"
        found = self.definition(module, members[0])
        for member in members[1:]:
            found = found and self.member(*found, member)
        return found and self.signature(*found)

    def definition(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """The module that defines what `module` calls `name`, and the definition."""
        found: tuple[str, ast.AST] | None = None
        for statement in self.body(module):
            if isinstance(statement, ast.ImportFrom):
                package = self.source_of(module, statement)
                for alias in statement.names if self.file_of(package) else []:
                    if alias.name == "*":
                        found = (self.definition(package, name) if package != module else None) or found
                    elif (alias.asname or alias.name) == name and package != module:
                        found = self.definition(package, alias.name) or found
            elif name in _defined(statement):
                found = module, statement
        return found

    def source_of(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        package = module if (self.file_of(module) or "").endswith("__init__.py") else module.rpartition(".")[0]
        parts = package.split(".")
        return ".".join([*parts[: len(parts) - statement.level + 1], *([statement.module] if statement.module else [])])

    def member(self, module: str, owner: ast.AST, name: str) -> tuple[str, ast.AST] | None:
        """A member of a class, its own or inherited; attributes that `__init__` sets are members too."""
        if not isinstance(owner, ast.ClassDef):
            return None
        for base in self.classes(module, owner):
            found = [s for s in _statements(base[1].body) if name in _defined(s)]
            if found:
                return base[0], found[-1]
            sets = [n for n in ast.walk(base[1]) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
            if any(n.attr == name and isinstance(n.value, ast.Name) and n.value.id == "self" for n in sets):
                return base[0], ast.Pass()
        return None

    def classes(self, module: str, owner: ast.ClassDef) -> list[tuple[str, ast.ClassDef]]:
        """A class and those that it inherits from, as far as they are written in Python."""
        found = [(module, owner)]
        for base in owner.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            defined = self.definition(module, base.id) if isinstance(base, ast.Name) else None
            if defined and isinstance(defined[1], ast.ClassDef):
                found += self.classes(defined[0], defined[1])
        return found

    def signature(self, module: str, node: ast.AST) -> Read:
        if isinstance(node, ast.ClassDef):
            made = self.member(module, node, "__init__") or self.member(module, node, "__new__")
            if made and isinstance(made[1], ast.FunctionDef):
                return _parameters(made[1].args)[1:]
            made_of = [c for _, c in reversed(self.classes(module, node)) if _has_fields(c)]
            fields = [s for c in made_of for s in c.body if isinstance(s, ast.AnnAssign)]
            found = {ast.unparse(s.target): s.value is not None for s in fields}
            return [name + "=" * default for name, default in found.items()]
        if not isinstance(node, ast.FunctionDef) or {"property", f"{node.name}.setter"} & {
            *map(ast.unparse, node.decorator_list)
        }:
            return "there"
        return _parameters(node.args)[1 if "classmethod" in map(ast.unparse, node.decorator_list) else 0 :]


def _statements(body: list[ast.stmt]):
    """Statements, those in the branches of `if` and `try` too, and no overloads."""
    for statement in body:
        if isinstance(statement, ast.If | ast.Try):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, part, []))
        elif "overload" not in [ast.unparse(d).rpartition(".")[2] for d in getattr(statement, "decorator_list", [])]:
            yield statement


def _defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def _has_fields(node: ast.ClassDef) -> bool:
    """Whether the class's annotations are parameters."""
    words = [ast.unparse(part) for part in (*node.decorator_list, *node.bases)]
    return any("dataclass" in word or word.endswith("NamedTuple") for word in words)


def _is_option(node: ast.AST, option: str) -> bool:
    return isinstance(node, ast.Call) and any(isinstance(a, ast.Constant) and a.value == option for a in node.args)


def _parameters(arguments: ast.arguments) -> list[str]:
    positional = arguments.posonlyargs + arguments.args
    required = len(positional) - len(arguments.defaults)
    found = [a.arg + "=" * (i >= required) for i, a in enumerate(positional)]
    if arguments.vararg or arguments.kwonlyargs:
        found.append("*" + (arguments.vararg.arg if arguments.vararg else ""))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(argument.arg + "=" * (default is not None))
    return found + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def main(paths: list[str]) -> None:
    from tritune.trainer.torch_api import USES

    for path in paths:
        wheel = Wheel(Path(path))
        names = sorted({use.name for uses in USES.values() for use in uses})
        record = {"torch": wheel.version, "names": {name: wheel.read(name) for name in names}}
        file = RECORDS / f"{'.'.join(wheel.version.split('.')[:2])}.json"
        lines = (f"    {json.dumps(n)}: {json.dumps(read)}" for n, read in record["names"].items())
        file.write_text(f'{{\n  "torch": "{wheel.version}",\n  "names": {{\n' + ",\n".join(lines) + "\n  }\n}\n")
        print(file, sum(read is None for read in record["names"].values()), "not there")


if __name__ == "__main__":
    main(sys.argv[1:])
