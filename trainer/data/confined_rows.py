"""The rows of conversations, rendered where the system's limits end what hangs, hoards or crashes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tritune.trainer.data import isolated
from tritune.trainer.data.confined import Confined
from tritune.trainer.data.rendering import answers, served
from tritune.trainer.data.spans import ChatTemplate, Rendered
from tritune.trainer.errors import InputError

Conversation = tuple[list[dict], str, list | None]  # messages, place, tools


class ConfinedRows:
    """`template.rows` for many conversations at a time. The template knows nothing of this: no cycle keeps the process."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._process = Confined(partial(served, partial(_plain_rows, template)))

    def __call__(self, conversations: Sequence[Conversation]) -> list[list[Rendered] | InputError]:
        """Render them one by one, in another process unless this is one that can be ended; in the place of a conversation that
        fails its fault.

        Raises:
            InputError: conversations ended that process: the template is refused, whatever becomes of bad rows.
        """
        if isolated.can_be_limited():
            with isolated.limited():
                return [_rows(self._template, *one) for one in conversations]
        found = answers(self._process, conversations, self._template.program.name, [c[1] for c in conversations])
        return [one if isinstance(one, InputError) else [Rendered(*row) for row in one] for one in found]


def _rows(template: ChatTemplate, messages: list[dict], place: str, tools: list | None) -> list[Rendered] | InputError:
    try:
        return template.rows(messages, place, tools)
    except InputError as error:
        return error


def _plain_rows(template: ChatTemplate, messages: list[dict], place: str, tools: list | None) -> list[tuple]:
    return [(row.text, row.spans, row.turns, row.upto) for row in template.rows(messages, place, tools)]
