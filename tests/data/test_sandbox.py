"""Hostile chat templates: each in a process of its own, which is killed at a deadline and has little memory."""

from __future__ import annotations

import multiprocessing
import re
import resource
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from tritune.trainer.data import isolated, sandbox, sandbox_limits
from tritune.trainer.data.spans import ChatTemplate
from tritune.trainer.data.templates import render
from tritune.trainer.errors import InputError
from tritune.trainer.model.tokenizer import byte_tokenizer

DEADLINE = 8.0  # seconds, for a limit that is set to a quarter of a second
SHORT = 0.25
MEMORY = 2 << 30  # bytes over what the process has when it starts
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]

TIME, SIZE, PARTS = r"more than 0\.25 s", r"more than (64|256) MiB|takes more than", r"nested value"
R = "range(99999)"
HOSTILE = {
    "nested loops": (f"{{% for a in {R} %}}{{% for b in {R} %}}{{% endfor %}}{{% endfor %}}", TIME),
    "a loop with a test": (f"{{% for a in {R} if {R}|map('string')|list and 0 %}}x{{% endfor %}}", TIME),
    "an endless loop over what it makes": ("{% for a in 'ab' recursive %}{{ loop('ab') }}{% endfor %}", "recursion"),
    "a bush": (
        "{% macro m(n) %}{% if n %}{% for i in 'ab' %}{{ m(n - 1) }}{% endfor %}{% endif %}{% endmacro %}{{ m(60) }}",
        TIME,
    ),
    "a bush without loops": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        TIME,
    ),
    "a recursive macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "a loop over a huge text": ("{% for c in 'x' * 60000000 %}{% endfor %}", TIME),
    "a huge list by filter": ("{{ ('x' * 60000000)|map('upper')|list|length }}", TIME),
    "a huge list by attribute": ("{{ ('x' * 60000000)|map(attribute='y')|list|length }}", TIME),
    "lazy filters in one another": (f"{{{{ {R}|map('map', 'upper')|map('list')|list }}}}", r"not iterable|0\.25 s"),
    "string times number": ("{{ 'x' * 10**9 }}", SIZE),
    "number times string": ("{{ 10**9 * 'x' }}", SIZE),
    "constants only": ("{{ 'x' * 1000000000 }}", SIZE),
    "list times number": ("{{ ([1] * 10**9)|length }}", SIZE),
    "power": ("{{ 9**(9**9) }}", "4096 bits"),
    "power in a condition": ("{% if 9**(9**9) %}{% endif %}", "4096 bits"),
    "squares": ("{% set x = 3 %}" + "{% set x = x * x %}" * 40 + "{{ x }}", "4096 bits"),
    "doubled by tilde": ("{% set x = 'x' %}" + "{% set x = x ~ x %}" * 40, SIZE),
    "doubled by plus": ("{% set x = 'x' %}" + "{% set x = x + x %}" * 40, SIZE),
    "doubled lists": ("{% set x = [1] %}" + "{% set x = x + x %}" * 40, SIZE),
    "doubled by blocks": ("{% set x = 'x' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40, SIZE),
    "doubled by a macro": (
        "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{{ " + "m(" * 40 + "'x'" + ")" * 40 + " }}",
        SIZE,
    ),
    "doubled by format": ("{% set x = 'x' %}" + "{% set x = '{0}{0}'.format(x) %}" * 40, SIZE),
    "doubled by percent": ("{% set x = 'x' %}" + "{% set x = '%s%s' % (x, x) %}" * 40, SIZE),
    "doubled by join": ("{% set x = 'x' %}" + "{% set x = ''.join([x, x]) %}" * 40, SIZE),
    "doubled by the filter join": ("{% set x = 'x' %}" + "{% set x = [x, x]|join %}" * 40, SIZE),
    "doubled by replace": ("{% set x = 'xx' %}" + "{% set x = x.replace('x', 'xx') %}" * 40, SIZE),
    "doubled by the filter replace": ("{% set x = 'xx' %}" + "{% set x = x|replace('x', 'xx') %}" * 40, SIZE),
    "a list of itself, written": ("{% set x = [1] %}" + "{% set x = [x, x] %}" * 40 + "{{ x }}", PARTS),
    "a list of itself, as JSON": (
        "{% set x = [1] %}" + "{% set x = {'a': x, 'b': x} %}" * 40 + "{{ x|tojson }}",
        PARTS,
    ),
    "a list of itself, its values": (
        "{% set x = [1] %}" + "{% set x = [x, x] %}" * 40 + "{{ {'a': x}.values()|string }}",
        PARTS,
    ),
    "lists compared": (
        "{% set x = [1] %}{% set y = [1] %}"
        + "{% set x = [x, x] %}{% set y = [y, y] %}" * 40
        + "{% if x == y %}{% endif %}",
        PARTS,
    ),
    "lists tested": (
        "{% set x = [1] %}{% set y = [1] %}"
        + "{% set x = [x, x] %}{% set y = [y, y] %}" * 40
        + "{{ [x]|select('eq', y)|list }}",
        PARTS,
    ),
    "namespaces of namespaces": (
        "{% set n = namespace(x=1) %}" + "{% set n = namespace(x=n, y=n) %}" * 40 + "{{ [n] }}",
        "namespace",
    ),
    "much output": (f"{{% for a in {R} %}}{{{{ 'x' * 10000 }}}}{{% endfor %}}", SIZE),
    "much output, pending": ("{% set x %}{% for a in range(9999) %}{{ 'x' * 10000 }}{% endfor %}{% endset %}", SIZE),
    "much kept": (
        "{% set n = namespace(x=[]) %}{% for a in range(9999) %}{% set n.x = n.x + [('x' * 60000000)[1:]] %}{% endfor %}",
        r"takes more than|0\.25 s",
    ),
    "center": ("{{ 'x'|center(10**10) }}", "more than (64 MiB|3 s)"),
    "a constant center": ("{{ 'x'|center(10000000000) }}", SIZE),
    "methods that pad": ("{{ 'x'.ljust(10**10) }}", SIZE),
    "tabs": ("{{ '\t'.expandtabs(10**9) }}", SIZE),
    "indent": ("{{ '1\n2\n3'|indent(10**10) }}", SIZE),
    "indented JSON": ("{{ [1, 2]|tojson(indent=10**10) }}", SIZE),
    "a wide percent": ("{{ '%9999999999d' % 1 }}", "pads a value"),
    "a computed width": ("{{ '%*d'|format(10**9, 1) }}", "pads a value"),
    "a wide brace": ("{{ '{:>9999999999}'.format(1) }}", "pads a value"),
    "a computed brace": ("{{ '{:{}}'.format(1, 10**9) }}", "pads a value"),
    "round": ("{{ 1.5|round(-10**9, 'floor') }}", "round"),
    "batch": ("{{ [1]|batch(10**10, 'x')|list }}", "batch"),
    "slice": ("{{ [1]|slice(10**10)|list }}", "slice"),
    "lists summed": ("{{ [[1]]|sum(start=[]) }}", "sum"),
    "lorem ipsum": ("{{ lipsum(n=10**9) }}", "undefined"),
}
FORBIDDEN = {
    "class of a text": "{{ ''.__class__.__mro__ }}",
    "class by subscript": "{{ ''['__class__']['__mro__'] }}",
    "class by filter": "{{ (''|attr('__class__')).__mro__ }}",
    "globals of a function": "{{ raise_exception.__globals__['sys'] }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "class by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "class by map": "{{ ['']|map(attribute='__class__.__mro__')|list|first|first }}",
    "the loop": "{% for a in 'x' %}{{ loop._iterator.x }}{% endfor %}",
    "the environment": "{{ cycler.__init__.__globals__ }}",
    "changing the messages": "{{ messages.append(1) }}",
    "changing a message": "{{ messages[0].update({'a': 1}) }}",
    "clearing": "{{ messages.clear() }}",
    "underscores in a namespace": "{% set n = namespace(__class__=1) %}",
    "underscores set later": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "bytes": "{{ 'x'.encode() }}",
    "big bytes": "{{ (5).to_bytes(10**10, 'big') }}",
    "translation": "{{ 'x'.translate({120: 'y'}) }}",
}
LOADING = {
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "from": "{% from 'os' import path %}",
    "extends": "{% extends 'base' %}",
    "in a branch": "{% if false %}{% include 'x' %}{% endif %}",
}


def attempt(source: str, seconds: float, pipe) -> None:
    """In a process of its own: what came of rendering, how long it took."""
    sandbox.RENDER_SECONDS = seconds
    isolated.outcome_of = lambda _: None  # the limits that hold for every row are tested, without the trial before them
    sandbox_limits.ITEMS = 1 << 16  # counting to the real one takes half a second
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = source, "evil/model"
    start = time.monotonic()
    try:
        result = "rendered: " + render(tokenizer, MESSAGES, "rows.jsonl:7")[:80]
    except InputError as error:
        result = str(error)
    pipe.send((result, time.monotonic() - start))


def start(source: str, seconds: float):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=attempt, args=(source, seconds, theirs))
    process.start()
    theirs.close()
    return process, ours


def outcome(process, pipe, seconds: float) -> tuple[str, float]:
    try:
        assert pipe.poll(seconds + DEADLINE), "it is still running at the deadline"
        return pipe.recv()
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module", autouse=True)
def five_seconds():
    """A template that runs into the real limit while the other tests go on."""
    return start(HOSTILE["nested loops"][0], sandbox.RENDER_SECONDS)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_run_long_or_grow_large_is_refused(name):
    source, reason = HOSTILE[name]
    seconds = SHORT if "0\\.25 s" in reason else 10.0  # a busy machine takes its time to come to a limit of size
    said, took = outcome(*start(source, seconds), seconds)
    assert re.search(reason, said), said
    assert "rows.jsonl:7" in said
    if re.search("more than|takes", reason):
        assert "evil/model" in said, "which template it was"
    assert took < 12


def test_the_limit_is_two_seconds_of_the_processor_and_five_of_the_clock(five_seconds):
    said, took = outcome(*five_seconds, 5)
    limits = "(it ran for more than 5 s|it takes more than 2 s of the processor)"  # a busy machine comes to the first
    assert re.search(f"the chat template of evil/model was stopped on this row: {limits}", said), said
    assert 1.9 < took < 15


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_lies_outside_is_out_of_reach(name):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FORBIDDEN[name]
    with pytest.raises(InputError, match=r"rows\.jsonl:7: the chat template fails on this row") as error:
        render(tokenizer, MESSAGES, "rows.jsonl:7")
    said = str(error.value)
    assert re.search(r"unsafe|underscore|undefined|not safely callable|has no attribute", said), said


@pytest.mark.parametrize("name", LOADING)
def test_other_templates_are_not_loaded(name):
    with pytest.raises(InputError, match="a chat template stands alone"):
        sandbox.compile_template(LOADING[name])


def test_a_template_that_is_no_jinja_or_too_long_is_refused():
    for source, said in [("{% for %}", "not valid Jinja"), ("x" * (1 << 20) + "x", "1,048,577 characters")]:
        with pytest.raises(InputError, match=said):
            sandbox.compile_template(source)
    with pytest.raises(InputError, match="not valid Jinja"):
        sandbox.compile_template("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}")


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'x' | center(60000000) }}",
        "{{ 'x' * 60000000 }}",
        "{{ '%60000000d' | format(1) }}",
        "{% if 'x' | center(60000000) %}{% endif %}",
        "{% set a = 'x' | center(60000000) %}",
    ],
)
def test_constants_are_not_computed_before_the_template_runs(text):
    """It is compiled in this process, whose memory has no limit."""
    tracemalloc.start()
    try:
        sandbox.compile_template("{% if false %}" + text + "{% endif %}")
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


def test_the_limits_hold_in_every_thread_and_leave_the_others_alone(monkeypatch):
    monkeypatch.setattr(sandbox, "RENDER_SECONDS", SHORT)
    monkeypatch.setattr(isolated, "outcome_of", lambda _: None)
    endless, honest = byte_tokenizer(), byte_tokenizer()
    endless.chat_template = HOSTILE["nested loops"][0]
    results: dict[str, object] = {}

    def stopped(name: str) -> None:
        try:
            render(endless, MESSAGES, "here")
        except InputError as error:
            results[name] = error

    def works() -> None:
        template = ChatTemplate(honest)
        results["honest"] = {template.rows(MESSAGES, "here")[0].text for _ in range(300)}

    threads = [threading.Thread(target=stopped, args=(str(i),), daemon=True) for i in range(2)]
    threads.append(threading.Thread(target=works, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert all("more than 0.25 s" in str(results[n]) for n in ("0", "1"))
    assert results["honest"] == {honest.apply_chat_template(MESSAGES, tokenize=False)}


# What C code does with these is not measured beforehand: hashes of doubled tuples, chains, wide numbers.
DOUBLED = "{% set n = namespace(a=(1,)) %}{% for i in range(60) %}{% set n.a = (n.a, n.a) %}{% endfor %}"
UNMEASURED = {
    "a chain": (
        "{% set n = namespace(a=[1]) %}{% for i in range(30000) %}{% set n.a = n.a | select %}{% endfor %}{{ n.a | first }}",
        r"by signal 11 \(SIGSEGV\)|more than 1 s",  # on a slow machine
    ),
    "a width": ("{{ '%(a)2000000000d' % {'a': 1} }}", "more than 512 MiB of memory|width"),
    "text kept": (
        "{% set n = namespace(t='x' * 30000000, l=[]) %}{% for i in range(99) %}{% set n.l = n.l + [n.t ~ i] %}{% endfor %}",
        "more than 512 MiB of memory",
    ),
    "only when the model is asked": (
        "{% if add_generation_prompt and tools %}" + DOUBLED + "{{ {n.a: 1} | length }}{% endif %}",
        "more than 1 s of the processor",
    ),
}


@pytest.mark.parametrize("name", UNMEASURED)
def test_the_trial_stops_what_is_not_measured(monkeypatch, name):
    monkeypatch.setattr(isolated, "CPU_SECONDS", 1)
    source, said = UNMEASURED[name]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    with pytest.raises(InputError, match=rf"^model\.chat_template: .*tried on .*({said}).*Give another"):
        ChatTemplate(tokenizer) if name != "a width" else render(tokenizer, MESSAGES, "rows.jsonl:7")


def test_large_conversations_are_no_attack():
    """400 turns and 0.6 MB, by a template that collects its text in a variable and dumps tools at every turn."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% set n = namespace(text='') %}{% for m in messages %}{% set n.text = n.text + m.role + ': ' + m.content ~ '\\n' %}"
        "{% set n.text = n.text ~ (tools|tojson)[:2] %}{% endfor %}{{ n.text }}"
    )
    tools = [{"name": f"tool{i}", "parameters": {"type": "object", "properties": {}}} for i in range(20)]
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " * 400} for i in range(400)]
    text = render(tokenizer, messages, "here", tools=tools)
    assert text == tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert len(text) > 600_000


def test_the_size_that_is_refused(monkeypatch):
    """The bound itself, made small: one character more is refused."""
    monkeypatch.setattr(sandbox_limits, "OUTPUT_CHARS", 1000)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{{ messages[0].content }}"
    assert len(render(tokenizer, [{"role": "user", "content": "x" * 500}], "here")) == 1000
    with pytest.raises(InputError, match="was stopped on this row"):
        render(tokenizer, [{"role": "user", "content": "x" * 501}], "here")
