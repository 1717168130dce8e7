"""Chat templates are programs from strangers: they run here, without reach and within limits.

Reach: Jinja's immutable sandbox (no underscored attributes, no changing of what is passed in), plain JSON data only, no loader.
Trial (`isolated.py`): before a template is used it renders a few conversations in a process that the system's limits end,
which hold in C code too.
Limits (`sandbox_limits.py`), for every row: the clock is read in every loop, call and filter, by code that the compiler adds,
so it holds in any thread; a timer signal reaches only the main one. Filters for web pages and `lipsum`, which no chat needs,
are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import lru_cache, wraps
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import new_context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from tritune.trainer.data import isolated, sandbox_limits
from tritune.trainer.data.sandbox_limits import Budget, limit, shown
from tritune.trainer.errors import InputError

TODAY = datetime(2024, 7, 26)  # what templates are told; Llama 3's own choice where there is no clock
RENDER_SECONDS = 5.0  # one rendering, or one compilation
SOURCE_CHARS = 1 << 20

# What a template is tried on: turns of every role, calls of tools, and texts that are long or look like marks.
_TURNS = [{"role": ("user", "assistant")[i % 2], "content": f"{i} <think> \n" * 200} for i in range(20)]
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TRIALS: list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = [
    (_TURNS[:1], None),
    ([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}], None),
    ([{"role": "system", "content": "Be brief."}, *_TURNS], None),
    (
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "content": "1", "name": "f"},
            {"role": "assistant", "content": "b", "reasoning_content": "c", "thinking": "c"},
        ],
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    ),
]

_LEFT_OUT = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
# Filters that never walk into the parts of a value, and tojson, which is measured by its indentation too.
_SHALLOW = {
    "abs", "attr", "batch", "count", "d", "default", "first", "float", "int", "items", "last", "length", "list", "map", "random",
    "reject", "rejectattr", "reverse", "safe", "select", "selectattr", "slice", "tojson",
}  # fmt: skip
_COMPARING = {
    "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le", "in",
}  # fmt: skip
_REFUSED_METHODS = {"encode", "translate", "maketrans", "to_bytes", "from_bytes"}  # nothing to do with chats
_REFUSED_NODES: Any = (
    nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.EvalContextModifier, nodes.ScopedEvalContextModifier,
)  # fmt: skip


class _Marked(str):
    """What a `{% generation %}` block wrote."""

    __slots__ = ()


class _Code(CodeGenerator):
    """Jinja's compiler, which also writes the calls that keep a template within its limits.

    It computes nothing: a template is compiled here, outside of those limits.
    """

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData | nodes.Const):
            raise nodes.Impossible  # which leaves it to the rendering
        return super()._output_child_to_const(node, frame, finalize)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        # The name of the attribute is written as it is: a call through Jinja's own nodes costs five times as much.
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("budget.tick()"), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(nodes.EnvironmentAttribute("budget.tick()"), node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            return super().visit_Getitem(node, frame)
        self.write("environment.budget.charge(")
        super().visit_Getitem(node, frame)
        self.write(")")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        if any(isinstance(n, nodes.Const) for n in (node.expr, *(op.expr for op in node.ops))):
            return super().visit_Compare(node, frame)
        self.write("(environment.finalize(")
        self.visit(node.expr, frame)
        self.write(")")
        for op in node.ops:
            self.visit(op, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        if isinstance(node.expr, nodes.Const):
            return super().visit_Operand(node, frame)
        self.write(f" {operators[node.op]} environment.finalize(")
        self.visit(node.expr, frame)
        self.write(")")


class _Generation(Extension):
    """`{% generation %}`: what it encloses is an answer."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> _Marked:
        self.environment.budget.marks += 1  # type: ignore[attr-defined]
        return _Marked(caller())


class _Namespace(Namespace):
    """Jinja's `namespace()`, without underscored names: they would reach Python's own attributes of it."""

    def __init__(*args: Any, **values: Any) -> None:  # `namespace(self=1)` is allowed
        self, first = args[0], args[1:]
        values = dict(*first, **values)
        for name in values:
            _require_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict(...)` in a template, which is no class there that leads elsewhere."""

    def __call__(self, *args: Any, **values: Any) -> dict:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self.budget = Budget()
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=shown, optimized=False
        )  # fmt: skip
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception, "strftime_now": _strftime_now, "dict": _Dict(), "namespace": _Namespace,
        }  # fmt: skip
        self.filters["tojson"] = _tojson
        self.filters = {n: self._guarded(n, f) for n, f in self.filters.items() if n not in _LEFT_OUT}
        self.tests = {n: self._guarded(n, f) if n in _COMPARING else f for n, f in self.tests.items()}

    # -- what the compiled template calls

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        texts = list(parts)
        limit(sum(map(len, texts)))
        return self.budget.charge("".join(texts))

    def joined(self, parts: tuple) -> str:
        return self.concat([part if type(part) is str else str(shown(part)) for part in parts])

    def call(self, context: Any, function: Any, /, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        self.budget.tick()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            if function.__name__ == "join" and args:
                args = (list(args[0]),)
            sandbox_limits.check_method(owner, function.__name__, [*args, *options.values()])
        return self.budget.charge(super().call(context, function, *args, **options))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator != "+":  # which makes no more than there was
            sandbox_limits.check_operator(operator, left, right)
        return self.budget.charge(self.binop_table[operator](left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _REFUSED_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        written = super().wrap_str_format(value)
        if written is None:
            return None

        def checked(*args: Any, **options: Any) -> str:
            sandbox_limits.check_braces(value.__self__, [args, options])
            return written(*args, **options)

        return checked

    def _guarded(self, name: str, function: Any) -> Callable[..., Any]:
        """A filter or test that is timed and measured."""
        given = int(hasattr(function, "jinja_pass_arg"))  # the environment or context, that Jinja puts first
        shallow = name in _SHALLOW

        @wraps(function)
        def guarded(*args: Any, **options: Any) -> Any:
            self.budget.tick()
            if not shallow:
                args = tuple(list(a) if isinstance(a, GeneratorType) else a for a in args)
                for value in (*args[given:], *options.values()):
                    shown(value)
            sandbox_limits.check_filter(name, args[given], [*args[given + 1 :], *options.values()])
            result = function(*args, **options)
            return self._timed(result) if isinstance(result, GeneratorType) else self.budget.charge(result)

        return guarded

    def _timed(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.budget.tick()
            yield value


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no name with an underscore in front, and {name!r} is one")


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(shown(message)))


def _strftime_now(form: str) -> str:
    """A day that never changes: tokens must not depend on when they were made, or no run would go on as it was."""
    return TODAY.strftime(form)


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """As transformers has it: Jinja's own writes `<` as an escape."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_ENVIRONMENT = _Environment()


@lru_cache(maxsize=32)
def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template, once, after it was tried in a process of its own.

    Raises:
        InputError: it is not valid Jinja, is longer than 1 Mi characters, or loads other templates; or its trial took more
            time or memory than `isolated` gives, or crashed.
    """
    ended = isolated.outcome_of(lambda: _try(source))
    if ended is not None:
        rule = f"the template was tried on a few short conversations and stopped: {ended}"
        raise InputError("model.chat_template", rule, "Give another: model.chat_template=<file> or chatml")
    return _compile(source)


def _try(source: str) -> None:
    template = _compile(source)
    for messages, tools in TRIALS:
        for prompt in (False, True):
            values = {"bos_token": "<s>", "eos_token": "</s>", "messages": messages, "tools": tools, "documents": None}
            try:
                run(template, {**values, "add_generation_prompt": prompt})
            except Exception as error:  # many a template refuses one of these conversations
                str(error)  # which is shown, and a value of the template's can be in it
                if isolated.ran_out(error):
                    raise


def _compile(source: str) -> jinja2.Template:
    if len(source) > SOURCE_CHARS:
        rule = f"it has {len(source):,} characters, and {SOURCE_CHARS:,} are allowed"
        raise InputError("model.chat_template", rule, "Shorten it")
    _ENVIRONMENT.budget.start(RENDER_SECONDS)
    try:
        refused: nodes.Node | None = _ENVIRONMENT.parse(source).find(_REFUSED_NODES)
        template = _ENVIRONMENT.from_string(source if refused is None else "")
    except Exception as error:  # noqa: BLE001  what is nested deep, a number of 5,000 digits: anything can come
        said = str(error) or type(error).__name__
        raise InputError("model.chat_template", f"it is not valid Jinja: {said}", "Mend the template") from None
    if refused is not None:
        rule = f"line {refused.lineno} has {type(refused).__name__.lower()}, and a chat template stands alone"
        raise InputError("model.chat_template", rule, "Write what it brings into the template")
    return template


def run(template: jinja2.Template, values: dict[str, Any]) -> tuple[str, list[tuple[int, int]] | None]:
    """Return the text, and where in it `{% generation %}` blocks stand: None where one of them was not written directly.

    Raises:
        Refused: a limit was passed.
        Exception: whatever the template raises.
    """
    isolated.rewind()
    environment: Any = template.environment
    environment.budget.start(RENDER_SECONDS)
    context = new_context(environment, None, template.blocks, {**environment.globals, **values}, shared=True)
    pieces, marks, seen, size = [], [], 0, 0
    for piece in template.root_render_func(context):
        pieces.append(piece)
        start, size = size, size + len(piece)
        if type(piece) is _Marked:
            seen += 1
            if piece:
                marks.append((start, size))
        limit(size)
    return "".join(pieces), marks if seen == environment.budget.marks else None
