"""How far the parts of the house know one another: `python benchmarks/structure.py` reads the source and prints a table.

    python benchmarks/structure.py                 as it is here
    python benchmarks/structure.py REVISION        and beside it as it was at a commit, counted in the same way
    python benchmarks/structure.py --takers        the functions that take the whole Config, by name

Counted are trainer/ and launch/; what a figure leaves out is in its row.
"""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 350
OBJECTIVES = re.compile(r"(?<![a-z_])(pretrain|sft|classify|classify_token)(?![a-z_])|LanguageModel|Classes")
METHODS = re.compile(r"lora|^'full'$|method=full", re.IGNORECASE)  # a variable may well be called full
BUILD = "trainer/build.py"
# What a verb begins with, and only that: the whole configuration comes in here.
ENTRIES = {
    "trainer/__main__.py run",
    "trainer/audit/verb.py audit",
    "trainer/verbs.py evaluate",
    "trainer/verbs.py generate",
    "trainer/verbs.py export",
    "trainer/verbs.py report",
}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
DOCUMENTED = ast.Module | ast.ClassDef | FUNCTIONS


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def is_config(path: Path) -> bool:
    """Whether it declares or checks keys: trainer/config*.py, or a folder of that name."""
    return place(path).startswith("trainer/config")


def takers(path: Path) -> list[str]:
    """Functions with a parameter of type `Config`, `Config | None` among them."""
    found = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, FUNCTIONS):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            types = [ast.unparse(a.annotation).strip("\"'") for a in arguments if a.annotation is not None]
            if any(re.fullmatch(r"(\w+\.)?Config( \| None)?", t) for t in types):
                found.append(f"{place(path)}:{node.lineno} {node.name}")
    return found


def outsiders() -> list[str]:
    """`takers` of all files but those of the configuration and build.py, without the entries of the verbs."""
    paths = [p for p in files("trainer", "launch") if not is_config(p) and place(p) != BUILD]
    return [t for path in paths for t in takers(path) if re.sub(r":\d+", "", t) not in ENTRIES]


def passings(path: Path) -> int:
    """How often `config` goes the whole way: calls that are given it whole, as `config` or as `run.config`."""
    return sum(
        any(_is_whole(a) for a in (*node.args, *(k.value for k in node.keywords)))
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
    )


def _is_whole(node: ast.expr) -> bool:
    return ast.unparse(node) in ("config", "run.config", "*config", "**config")


def words(path: Path) -> Iterator[str]:
    """Every name of the code, and every text as `'text'`; docstrings and comments are none of them."""
    module = parsed(path)
    documentation = {
        id(n.body[0].value)
        for n in ast.walk(module)
        if isinstance(n, DOCUMENTED) and n.body and isinstance(n.body[0], ast.Expr)
    }
    for node in ast.walk(module):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in documentation:
                yield f"'{text}'"
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.arg(arg=text) | ast.alias(name=text):
                yield text
            case ast.ImportFrom(module=str(text)) | ast.keyword(arg=str(text)):
                yield text
            case ast.FunctionDef(name=text) | ast.AsyncFunctionDef(name=text) | ast.ClassDef(name=text):
                yield text


def mentions(paths: list[Path], pattern: re.Pattern[str]) -> dict[str, int]:
    """By file: how many names and texts of its code match."""
    counts = {place(path): sum(bool(pattern.search(word)) for word in words(path)) for path in paths}
    return {name: count for name, count in counts.items() if count}


def keys() -> list[str]:
    """Every key of the configuration, as CLASS.FIELD: fields of its dataclasses that are no group themselves."""
    classes = {}
    for path in [p for p in files("trainer") if is_config(p) or {"objectives", "methods"} & set(p.parts)]:
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                classes[node.name] = node
    found = []
    for name, node in classes.items():
        inherited = {field for base in _bases(node, classes) for field, _ in _fields(base)}
        found += [f"{name}.{field}" for field, kind in _fields(node) if kind not in classes and field not in inherited]
    return found


def _bases(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> list[ast.ClassDef]:
    direct = [classes[b.id] for b in node.bases if isinstance(b, ast.Name) and b.id in classes]
    return [*direct, *(above for base in direct for above in _bases(base, classes))]


def _fields(node: ast.ClassDef) -> list[tuple[str, str]]:
    annotated = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    annotated = [n for n in annotated if not ast.unparse(n.annotation).startswith("ClassVar")]
    return [(n.target.id, ast.unparse(n.annotation)) for n in annotated]  # type: ignore[union-attr]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def table() -> dict[str, int | str]:
    """Every figure by what it counts."""
    house = files("trainer", "launch")
    whole = outsiders()
    objectives = mentions([p for p in house if "objectives" not in p.parts], OBJECTIVES)
    methods = mentions([p for p in house if "methods" not in p.parts], METHODS)
    long = [place(p) for p in files("trainer", "launch", "kernels") if lines(p) > MAX_LINES]
    return {
        "functions that take the whole Config (not config*, build.py, the verbs' entries)": len(whole),
        "files with such functions": len({name.partition(":")[0] for name in whole}),
        "calls in build.py that pass the whole config on": passings(ROOT / BUILD),
        "names of objectives outside objectives/": sum(objectives.values()),
        "files with such names": len(objectives),
        "the same outside config* as well": sum(n for f, n in objectives.items() if not is_config(ROOT / f)),
        "names of methods outside methods/": sum(methods.values()),
        "files with names of methods": len(methods),
        "names of methods outside config* as well": sum(n for f, n in methods.items() if not is_config(ROOT / f)),
        f"files over {MAX_LINES} lines (kernels/ too)": len(long),
        "lines of trainer/ and launch/": sum(map(lines, house)),
        "files of trainer/ and launch/": len(house),
        "keys of the configuration": len(keys()),
    }


def table_of(revision: str) -> dict[str, Any]:
    """The same of a commit, by this very script, laid beside that commit's source."""
    packed = subprocess.run(
        ["git", "archive", revision, "trainer", "launch", "kernels"], cwd=ROOT, check=True, capture_output=True
    )
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
            archive.extractall(folder, filter="data")
        script = Path(folder) / "benchmarks" / "structure.py"
        script.parent.mkdir()
        script.write_text(Path(__file__).read_text())
        return runpy.run_path(str(script))["table"]()


def main(arguments: list[str]) -> None:
    if arguments == ["--takers"]:
        print(*outsiders(), sep="\n")
        return
    columns = [*((name, table_of(name)) for name in arguments), ("here", table())]
    print(f"| counted | {' | '.join(name for name, _ in columns)} |\n| --- {'| --- ' * len(columns)}|")
    for row in columns[-1][1]:
        print(f"| {row} | {' | '.join(f'{figures[row]:,}' for _, figures in columns)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
