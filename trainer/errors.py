"""The errors a user can meet. Each carries the value, the rule it broke and what to do about it.

Exit status: `InputError` is 2 (wrong input, one message, no traceback); everything else is 1.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from tritune.trainer.shown import TAIL, bounded

NAMES = 30  # that a message lists


class InputError(Exception):
    """Something the user gave is wrong: a config value, a file, a row. Exit status 2, no traceback.

    Of a long value the beginning is kept, of a long rule or remedy the end as well, with how much was left out.
    """

    def __init__(self, value: str, rule: str, remedy: str) -> None:
        self.value, self.rule, self.remedy = bounded(value), bounded(rule, tail=TAIL), bounded(remedy, tail=TAIL)
        value, rule, remedy = self.value, self.rule, self.remedy
        super().__init__(f"{value}: {rule}. {remedy}")

    def __reduce__(self):
        return (type(self), (self.value, self.rule, self.remedy))


class ConfigFaults(Exception):
    """Every fault found in a config, reported together. Exit status 2, no traceback."""

    def __init__(self, faults: list[str]) -> None:
        faults = [bounded(fault, tail=TAIL) for fault in faults]
        self.faults = faults
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__(f"the configuration has {count}:\n" + "\n".join(f"  - {f}" for f in faults))

    def __reduce__(self):
        return (type(self), (self.faults,))


class UnreachableError(InputError):
    """A hub dataset cannot be asked for now; what is known of it from before may do."""


class DamagedRows(InputError):
    """Tokenized rows changed on the disk after they were written. Exit status 1, no traceback: another start reads them anew."""


class LostConnectionError(Exception):
    """A hub dataset ended early while it was read. Exit status 1: another start may find it whole."""


class CheckpointError(Exception):
    """A checkpoint could not be written or read. Exit status 1; what was saved before is untouched."""


class ExportError(Exception):
    """An export does not compute what was trained. Exit status 1; nothing is left of it, the checkpoints are untouched.

    Attributes:
        asked_wrongly: what was asked for is impossible, and trying again would be too: exit status 2.
    """

    asked_wrongly = False


class NonFiniteError(Exception):
    """Too many steps in a row had a NaN or infinite gradient. Exit status 1; none of them was applied."""


class StopRequested(Exception):
    """A request to stop was followed outside of the steps, where there is nothing to save. Exit status 75."""


class PeerError(Exception):
    """Another rank failed; this one stops with it. The message is the other rank's."""


# What a file system answers, its remedy, and no fault of ours that a traceback would help to find.
_SURROUNDINGS = {
    errno.ENOSPC: "Make room there",
    errno.EDQUOT: "Make room there, or have the quota raised",
    errno.EROFS: "Mount it so that it can be written, or give another folder",
    errno.EACCES: "Let the user who runs this write there, or give another folder",
    errno.EPERM: "Let the user who runs this write there, or give another folder",
    errno.EIO: "Look at the disk, or give a folder on another",
    errno.ENOTDIR: "Give a path of which only the last part is a file",
    errno.EEXIST: "Move it away, or give another folder",
    errno.EISDIR: "Give the name of a file",
    errno.ESTALE: "Look at the mount of that file system",
}


def of_surroundings(error: BaseException) -> str | None:
    """A full or read-only disk and the like in one sentence with its remedy; None where the error is another."""
    if not isinstance(error, OSError) or error.errno not in _SURROUNDINGS:
        return None
    where = error.filename or "a file"
    return f"{where}: it could not be written or read ({error.strerror}). {_SURROUNDINGS[error.errno]}"


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust panicked: what it raises then is no `Exception`, and passes by all that catch those."""
    return type(error).__name__ == "PanicException"


def of_panic(error: BaseException) -> InputError:
    """The panic as the fault of a file, or what it was as it was.

    Raises:
        BaseException: it is no panic.
    """
    if not is_panic(error):
        raise error
    rule = f"a library panicked on what it read ({reason(error)})"
    return InputError("model.tokenizer", rule, "Give another tokenizer, or download the model anew")


def reason(error: BaseException) -> str:
    """What another library's exception says, in one line, for a message of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines[:2])}".rstrip(".")


def some_names(names: Iterable[str]) -> str:
    """Names, as of columns, for a message: all where they are few."""
    given = list(names)
    return ", ".join(given[:NAMES]) + (f" and {len(given) - NAMES:,} more" if len(given) > NAMES else "")


INPUT_ERRORS = (InputError, ConfigFaults)
EXIT_DONE, EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED = 0, 1, 2, 75
