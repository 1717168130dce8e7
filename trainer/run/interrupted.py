"""Signals outside of a run: before there is one that could be stopped, and after its end was written down."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from tritune.trainer.errors import EXIT_STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def to_the_end(main: Callable[[], int]) -> int:
    """Call what a process is for; an interruption within its imports is one line, and its status is what it returned.

    Python gives signals their default action back while it shuts down, but leaves ignored ones ignored: one that comes after
    the end would else make a run that is done one that was killed.
    """
    try:
        return main()
    except KeyboardInterrupt:
        print("tritune: interrupted; the same command begins again, or goes on with its run", file=sys.stderr)
        return EXIT_STOPPED
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
