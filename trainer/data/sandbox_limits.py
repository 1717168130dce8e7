"""How much a chat template may make: sizes of values before they are made, and the clock.

Python's own C code cannot be stopped half-way (`9**9**9`, `'x' * 10**9`, a list of itself forty times over), so what can run long
or grow large there is measured first, here. All of it is a bound from above, and real templates stay far below.
"""

from __future__ import annotations

import re
import threading
from resource import RUSAGE_SELF, getrusage
from sys import getsizeof
from time import monotonic
from typing import Any

from jinja2.utils import Namespace

OUTPUT_CHARS = 64 << 20  # of a rendering, and of any text inside it
VALUE_BYTES = 4 * OUTPUT_CHARS
MEMORY_BYTES = 4 << 30  # by which the process may grow in one rendering
MEMORY_STEP = (
    1 << 30
)  # made between two looks at it; a template that grows its text piece by piece makes much and keeps little
ITEMS = 1 << 20  # parts of a nested value, counted as often as they would be written
INT_BITS = 4096
SMALL = 4096  # bytes; smaller values are not counted: the loops that make many of them are timed

CONTAINERS: tuple[type, ...] = (list, tuple, dict, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
_WIDE_PERCENT = re.compile(r"%[^%a-zA-Z]*(?:\*|\d{5})")  # '%99999d' % 1, '%*d' % (99999, 1)
_WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(?:\{|\d{5})")  # '{:99999}'.format(1), '{:{}}'.format(1, 99999)


class Refused(Exception):
    """A template passed a limit; the message is which."""


class Budget(threading.local):
    """What the rendering that goes on in this thread may still take."""

    seconds = deadline = float("inf")
    made = 0  # bytes since memory was last looked at
    peak = 0  # bytes the process had taken when it was first looked at
    marks = 0  # `{% generation %}` blocks that ran

    def start(self, seconds: float) -> None:
        self.seconds, self.deadline = seconds, monotonic() + seconds
        self.made = self.peak = self.marks = 0

    def tick(self) -> bool:
        if monotonic() > self.deadline:
            raise Refused(f"it ran for more than {self.seconds:g} s")
        return True

    def charge(self, value: Any) -> Any:
        """Count what was made; return it."""
        size = getsizeof(value)
        if size > SMALL:
            self.tick()
            if size > VALUE_BYTES:
                raise Refused(f"it makes a value of more than {VALUE_BYTES >> 20} MiB")
            self.made += size
            if self.made > MEMORY_STEP:
                self._look_at_memory()
        return value

    def _look_at_memory(self) -> None:
        self.made, peak = 0, getrusage(RUSAGE_SELF).ru_maxrss * 1024
        self.peak = self.peak or peak
        if peak > self.peak + MEMORY_BYTES:
            raise Refused(f"it takes more than {MEMORY_BYTES >> 30} GiB of memory")


def limit(chars: int) -> None:
    if chars > OUTPUT_CHARS:
        raise Refused(f"it makes a text of more than {OUTPUT_CHARS >> 20} MiB")


def weigh(value: Any, per_level: int = 0) -> int:
    """Return about how long the text of a value is (`per_level`: of an indentation), without writing it."""
    if isinstance(value, str):
        return len(value)
    chars, count, stack = 0, 1, [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, str):
            chars += len(item)
        elif isinstance(item, CONTAINERS):
            parts: Any = [*item, *item.values()] if isinstance(item, dict) else item
            count += len(parts)
            if count > ITEMS:
                raise Refused(f"it uses a nested value of more than {ITEMS:,} parts")
            chars += per_level * depth * len(parts)
            for part in parts:
                if type(part) is str:
                    chars += len(part)
                else:
                    stack.append((part, depth + 1))
        elif isinstance(item, Namespace):
            raise Refused("it writes out a namespace, whose size is unknown")
        limit(chars)
    return chars + count


def shown(value: Any) -> Any:
    """Return a value that is about to be written or compared, measured."""
    if type(value) is not str:
        weigh(value)
    return value


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Measure `left operator right`."""
    if operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(times, int) and hasattr(many, "__len__"):
                limit(len(many) * times * (1 if isinstance(many, str) else OUTPUT_CHARS // ITEMS))
        if isinstance(left, int) and isinstance(right, int):
            _limit_bits(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _limit_bits(left.bit_length() * right)
    elif operator == "%" and isinstance(left, str):
        _check_format(left, _WIDE_PERCENT, left.count("%"), right)


def check_braces(text: str, values: Any) -> None:
    """Measure `text.format(...)`."""
    _check_format(text, _WIDE_BRACES, text.count("{"), values)


def check_method(text: str, name: str, args: list[Any]) -> None:
    """Measure a call of a string's method."""
    number = max((a for a in args if isinstance(a, int)), default=0)
    if name in ("center", "ljust", "rjust", "zfill"):
        limit(number)
    elif name == "expandtabs":
        limit(len(text) + text.count("\t") * max(number, 8))
    elif name == "replace" and len(args) > 1:
        _check_replace(text, args[0], args[1])
    elif name == "join" and args:
        limit(weigh(args[0]) + len(text) * len(args[0]))


def check_filter(name: str, value: Any, args: list[Any]) -> None:
    """Measure `value | name(args)`."""
    number = max((abs(a) for a in args if isinstance(a, int)), default=0)
    texts = sum(len(a) for a in args if isinstance(a, str))
    if name == "center":
        limit(number)
    elif name == "indent":
        limit(weigh(value) + (len(str(value).splitlines()) + 1) * max(number, texts, 4))
    elif name == "replace" and len(args) > 1:
        _check_replace(value, args[0], args[1])
    elif name == "join":
        limit(weigh(value) + (len(value) * texts if hasattr(value, "__len__") else 0))
    elif name == "format":
        _check_format(str(value), _WIDE_PERCENT, str(value).count("%"), args)
    elif name == "tojson":
        limit(weigh(value, per_level=number + texts + weigh(args)))
    elif (name in ("batch", "slice") and number > ITEMS) or (name == "round" and number > 300):
        raise Refused(f"its filter {name} is given the number {number}")
    elif name == "sum" and any(isinstance(a, CONTAINERS) for a in args):
        raise Refused("its filter sum adds up lists")


def _limit_bits(bits: int) -> None:
    if bits > INT_BITS:
        raise Refused(f"it computes a number of more than {INT_BITS} bits")


def _check_format(text: str, wide: re.Pattern[str], count: int, values: Any) -> None:
    if wide.search(text):
        raise Refused("it pads a value to a width of five digits or one that it computes")
    limit(len(text) + count * (weigh(values) if count else 0))


def _check_replace(text: Any, old: Any, new: Any) -> None:
    limit(weigh(text) + str(text).count(str(old)) * weigh(new))
