"""A connection of each rank to the first one: its end tells of a death in every phase, also before the ranks have met.

    rank r -> rank 0   {"tritune": key, "rank": r, "host": ..., "pid": ...}, then nothing until {"end": why, or null}
    rank 0 -> rank r   the same greeting, then {"lost": text} when any rank is lost, or {"end": ...}

The operating system closes the connections of a process that ends, however it ends. One that is stopped, swaps, or holds the
interpreter's lock keeps them, and so does a job that is suspended as a whole: silence of a process says nothing here. A machine
that lost its power answers no probe of the kernel's.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from tritune.trainer.parallel.peer_line import Line, Peer, connect, listen, ports_of
from tritune.trainer.shown import bounded, shown

LOOK_SECONDS = 0.5  # between looks until all have met
IDLE_SECONDS = 60.0  # and after it, when only what comes matters
KNOCK_SECONDS = 1.0  # a rank waits so long at its start for the first one to listen, before it imports anything large
ANSWER_SECONDS = 15.0  # after which who took the connection is somebody else
EARLY_SECONDS = 3.0  # for a rank to end in good order after another is lost: before all have met, with nothing to write
FOLLOW_SECONDS = 5.0  # and later
CLOSE_SECONDS = 20.0  # for one that has written down its end, and waits for a tracker


class Peers:
    """The other ranks of this run. As it stands, of a run of one rank, which has nobody to lose."""

    def expect(self, join_seconds: float | None) -> None:
        """How long a rank may stay away from the start on, before all have met; None for ever."""

    def watch(self, closing: Callable[[], bool], end: Callable[[str], None]) -> None:
        """Say what is known from now on.

        Args:
            closing: whether this rank has written down how it ended.
            end: called on the thread with who was lost, where this rank did not end by itself; it is to end the process.
        """

    def joined(self) -> list[int]:
        """All have met: nobody can be absent any more. Returns the ranks whose death would not be seen here."""
        return []

    def lost(self, seconds: float) -> str | None:
        """Who was lost; word of it is waited for so long."""
        return None

    def close(self, why: str | None = None) -> None:
        """Part from the others; `why` where this rank failed, which they are told."""


def open_peers(environment: Mapping[str, str], end: Callable[[str], None]) -> Peers:
    """Connect this rank with the others, in its first moments: before it imports what takes seconds.

    Args:
        environment: torchrun's variables.
        end: until `watch` gives another.

    Raises:
        InputError: the first rank can listen nowhere.
    """
    size, rank = int(environment.get("WORLD_SIZE", "1")), int(environment.get("RANK", "0"))
    if size == 1 or not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        return Peers()
    key, ports = ports_of(environment)
    me = Peer(rank, socket.gethostname(), os.getpid())
    kind = _First if rank == 0 else _Other
    alone = environment.get("LOCAL_WORLD_SIZE", str(size)) == str(size)
    return kind(me, size, key, environment["MASTER_ADDR"], ports, alone, end)


class _Watched(Peers):
    """One thread beside the main one."""

    def __init__(
        self, me: Peer, size: int, key: str, address: str, ports: list[int], alone: bool, end: Callable[[str], None]
    ) -> None:
        self._alone = alone  # no rank is on another machine
        self._me, self._size, self._key, self._address, self._ports = me, size, key, address, ports
        self._end, self._closing = end, lambda: False
        self._limit: float | None = None
        self._text: str | None = None
        self._known, self._closed, self._met, self._absent = threading.Event(), threading.Event(), False, False
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        _open.add(self)
        self._begin()
        self._thread = threading.Thread(target=self._run, name="tritune-peers", daemon=True)
        self._thread.start()

    def expect(self, join_seconds: float | None) -> None:
        self._limit = join_seconds

    def watch(self, closing: Callable[[], bool], end: Callable[[str], None]) -> None:
        self._closing, self._end = closing, end

    def joined(self) -> list[int]:
        self._met = True
        return self._missing()

    def lost(self, seconds: float) -> str | None:
        self._known.wait(seconds)
        return self._text

    def close(self, why: str | None = None) -> None:
        self._closed.set()
        for line in self._lines():
            line.send({"end": None if why is None else shown(bounded(why))})
        with suppress(OSError):  # the thread has ended with a loss
            self._wake.send(b"\0")
        self._thread.join(KNOCK_SECONDS)

    def _run(self) -> None:
        waited, looked = 0.0, time.monotonic()
        while not self._closed.is_set() and self._text is None:
            ready = self._selector.select(IDLE_SECONDS if self._met else LOOK_SECONDS)
            now = time.monotonic()
            # Time in which the whole job was suspended is nobody's absence.
            waited, looked = waited + min(now - looked, 2 * LOOK_SECONDS), now
            self._look([key for key, _ in ready if key.fileobj is not self._woken])
            if self._text is None and self._limit is not None and waited > self._limit and not self._met:
                self._miss(self._limit)
        if self._text is not None and not self._closed.is_set():
            self._follow(self._text)
        for end in [*self._sockets(), self._woken, self._wake]:
            end.close()

    def _follow(self, text: str) -> None:
        """Most ranks meet the loss in a collective, and end by themselves, with what they have to say."""
        patience = (FOLLOW_SECONDS if self._met else EARLY_SECONDS) if not self._absent else 0.0
        if self._closed.wait(patience) or (self._closing() and self._closed.wait(CLOSE_SECONDS)):
            return
        self._end(text)

    def _lose(self, text: str) -> None:
        self._text = text
        self._known.set()

    def _miss(self, seconds: float) -> None:
        missing = self._missing()
        if missing:
            self._absent = True
            who = ", ".join(str(rank) for rank in missing[:8]) + (", ..." if len(missing) > 8 else "")
            self._lose(f"rank {who} did not come to {self._address}:{self._ports[0]} within {seconds:g} s: it died at once, or "
                       "its machine does not reach that port. Start again; backend.join_seconds=300 waits longer")  # fmt: skip

    def _begin(self) -> None:
        raise NotImplementedError

    def _look(self, ready: list[selectors.SelectorKey]) -> None:
        raise NotImplementedError

    def _missing(self) -> list[int]:
        raise NotImplementedError

    def _lines(self) -> list[Line]:
        raise NotImplementedError

    def _sockets(self) -> list[socket.socket]:
        return [line.socket for line in self._lines()]

    def forget_in_child(self) -> None:
        """A forked process that lives on must not keep this one's connections open."""
        for end in [*self._sockets(), self._woken, self._wake]:
            end.close()


class _First(_Watched):
    """Rank 0: all the others come to it, and it hands on who is lost."""

    def _begin(self) -> None:
        self._met_lines: dict[int, Line] = {}
        self._strangers: set[Line] = set()
        # The first of several machines may be told `localhost` where the others are told its name.
        self._server = listen(self._address if self._alone else "", self._ports)
        self._selector.register(self._server, selectors.EVENT_READ)

    def _missing(self) -> list[int]:
        return [rank for rank in range(1, self._size) if rank not in self._met_lines]

    def _lines(self) -> list[Line]:
        return [*list(self._met_lines.values()), *list(self._strangers)]

    def _sockets(self) -> list[socket.socket]:
        return [*super()._sockets(), self._server]

    def _look(self, ready: list[selectors.SelectorKey]) -> None:
        died: list[str] = []
        failed: list[str] = []
        for key in ready:
            if key.data is None:
                self._accept()
            else:
                self._hear(key.data, died, failed)
        for text in [*died, *failed][:1]:  # who died goes before those that failed of it
            self._lose(text)

    def _lose(self, text: str) -> None:
        for line in self._lines():
            line.send({"lost": text})
        super()._lose(text)

    def _accept(self) -> None:
        try:
            line = Line(self._server.accept()[0])
        except OSError:  # who came is gone; or there are as many open files as a process may have, and more wait
            time.sleep(LOOK_SECONDS)
            return
        self._strangers.add(line)
        self._selector.register(line.socket, selectors.EVENT_READ, line)

    def _hear(self, line: Line, died: list[str], failed: list[str]) -> None:
        messages, end = line.receive()
        for message in messages:
            if line.peer is None:
                self._greet(line, message)
            elif "withdrawn" in message:
                self._drop(line)
            elif "end" in message:
                line.ended = True
                if message["end"] is not None or not self._met:
                    failed.append(f"{line.peer} failed: {message['end'] or 'it ended before all had met'}")
        if end is not None and not line.dropped:
            if line.peer is not None and not line.ended:
                died.append(line.peer.fate(end))
            self._drop(line)

    def _greet(self, line: Line, message: dict[str, Any]) -> None:
        peer = Peer.read(message, self._key)
        if peer is None or not 0 < peer.rank < self._size or peer.rank in self._met_lines:
            self._drop(line)
            return
        line.peer = peer
        self._strangers.discard(line)
        self._met_lines[peer.rank] = line
        line.send(self._me.greeting(self._key))

    def _drop(self, line: Line) -> None:
        if line.dropped:
            return
        self._selector.unregister(line.socket)
        line.drop()
        self._strangers.discard(line)
        if line.peer is not None and not line.ended:
            self._met_lines.pop(line.peer.rank, None)


class _Other(_Watched):
    """A rank that comes to the first one."""

    def _begin(self) -> None:
        self._line: Line | None = None
        self._since, self._next, self._over = 0.0, 0, False
        deadline = time.monotonic() + KNOCK_SECONDS
        while self._line is None and time.monotonic() < deadline:
            self._knock()
            time.sleep(0.0 if self._line else 0.02)

    def _missing(self) -> list[int]:
        return [] if self._over or (self._line is not None and self._line.peer is not None) else [0]

    def _lines(self) -> list[Line]:
        return [] if self._line is None else [self._line]

    def _knock(self) -> None:
        """At each port in turn, until one of them takes its time to refuse."""
        began = time.monotonic()
        for _ in self._ports:
            line = connect(self._address, self._ports[self._next % len(self._ports)], KNOCK_SECONDS)
            self._next += 1
            if line is not None:
                self._line, self._since = line, time.monotonic()
                line.send(self._me.greeting(self._key))
                self._selector.register(line.socket, selectors.EVENT_READ, line)
            if line is not None or time.monotonic() - began > LOOK_SECONDS:
                return

    def _look(self, ready: list[selectors.SelectorKey]) -> None:
        line = self._line
        if line is None:
            if not self._over:
                self._knock()
        elif ready:
            self._hear(line)
        elif line.peer is None and time.monotonic() - self._since > ANSWER_SECONDS:
            line.send({"withdrawn": True})
            self._drop(line)

    def _hear(self, line: Line) -> None:
        messages, end = line.receive()
        for message in messages:
            if line.peer is None:
                line.peer = Peer.read(message, self._key)
                if line.peer is None:
                    self._drop(line)
                    return
            elif "lost" in message:
                self._lose(str(message["lost"]))
                return
            elif "end" in message:
                line.ended = self._over = True
                if message["end"] is not None or not self._met:
                    self._lose(f"{line.peer} failed: {message['end'] or 'it ended before all had met'}")
                    return
        if end is not None:
            if line.peer is not None and not line.ended:
                self._lose(line.peer.fate(end))
            self._drop(line)

    def _drop(self, line: Line) -> None:
        self._selector.unregister(line.socket)
        line.drop()
        self._line = None


def _forget_in_child() -> None:
    for peers in list(_open):
        peers.forget_in_child()


_open: weakref.WeakSet[_Watched] = weakref.WeakSet()
os.register_at_fork(after_in_child=_forget_in_child)
