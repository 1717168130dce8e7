"""The beginnings of a conversation as its template renders them: what a model reads and writes turn by turn."""

from __future__ import annotations

from typing import Any

from tritune.trainer.data.templates import Program
from tritune.trainer.errors import InputError

PROBE = "tritune-probe-9f3c"


KEPT = 4  # each is as long as the conversation, which may have hundreds of answers


class Beginnings:
    """A conversation's beginnings, the last few of them kept."""

    def __init__(self, program: Program, messages: list[dict], place: str, tools: list | None) -> None:
        self.program, self.messages, self.place, self.tools = program, messages, place, tools
        self._texts: dict[int, tuple[str, list[tuple[int, int]] | None] | InputError] = {}
        self._prompts: dict[int, str | None] = {}

    def text(self, count: int) -> str:
        """Of the first `count` messages.

        Raises:
            InputError: the template fails on them.
        """
        return self._made(count)[0]

    def marks(self, count: int) -> list[tuple[int, int]]:
        marks = self._made(count)[1]
        if marks is None:
            rule = (
                "the template's {% generation %} marks stand in a macro or a stored block, so their place is not known"
            )
            raise InputError(self.place, rule, "Give model.chat_template=<file> with the marks outside, or without any")
        return marks

    def can(self, count: int) -> bool:
        """Whether the template takes the first `count` messages."""
        try:
            self._made(count)
        except InputError:
            return False
        return True

    def prompt(self, count: int) -> str | None:
        """What the model reads before it answers the first `count` messages; None where the template refuses them."""
        if count not in self._prompts:
            try:
                text = self.program.run(self.messages[:count], self.place, self.tools, add_generation_prompt=True)[0]
            except InputError:
                text = None
            _keep(self._prompts, count, text)
        return self._prompts[count]

    def probed(self, turn: int, upto: int) -> str | None:
        """The text of the first `upto` messages with `PROBE` for the content of one; None where the template refuses."""
        probe = {**self.messages[turn], "content": PROBE}
        try:
            return self.program.run(
                [*self.messages[:turn], probe, *self.messages[turn + 1 : upto]], self.place, self.tools
            )[0]
        except InputError:
            return None

    def _made(self, count: int) -> tuple[str, list[tuple[int, int]] | None]:
        if count in self._texts:
            made = self._texts.pop(count)
        else:
            try:
                made = self.program.run(self.messages[:count], self.place, self.tools)
            except InputError as error:
                made = error
        _keep(self._texts, count, made)
        if isinstance(made, InputError):
            raise made
        return made


def _keep(kept: dict[int, Any], count: int, value: Any) -> None:
    """As the newest; the oldest goes."""
    kept[count] = value
    if len(kept) > KEPT:
        del kept[next(iter(kept))]
