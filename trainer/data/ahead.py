"""What is asked for next is made by another thread while the main one computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key")
Made = TypeVar("Made")


class Ahead(Generic[Key, Made]):
    """Makes one thing ahead.

    Args:
        make: a function of the key alone; the other thread calls it.
    """

    def __init__(self, make: Callable[[Key], Made]) -> None:
        self._make = make
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._begun: tuple[Key, Future[Made]] | None = None
        self._seconds = 0.0

    def begin(self, key: Key) -> None:
        """Make it from now on; whatever was made for another key is forgotten."""
        if self._begun is None or self._begun[0] != key:
            self._begun = key, self._worker.submit(self._make, key)

    def get(self, key: Key) -> Made:
        """Wait until it is made. What `make` raised is raised here, each time."""
        began = time.perf_counter()
        self.begin(key)
        assert self._begun is not None
        try:
            return self._begun[1].result()
        finally:
            self._seconds += time.perf_counter() - began

    def waited(self) -> float:
        """Seconds that `get` took since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Wait for what is being made, and end the thread."""
        self._worker.shutdown(cancel_futures=True)
