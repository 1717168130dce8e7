"""One connection between two ranks: lines of JSON, a last word, and how it ended."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from tritune.trainer.errors import InputError

MOST_BYTES = 1 << 16  # of messages that were not read: no rank says so much
# Where systems take their passing ports from: no service has one of these for its own.
FIRST_PORT, PORTS, TRIES = 32768, 28000, 4
BACKLOG = 1024  # ranks that come while the first one has no time for them
# A machine that is gone answers none of so many probes, the first after so many seconds and each as long after the last: a
# minute, which a switch may take that starts anew.
PROBE_SECONDS, PROBES = 5, 11


@dataclass(frozen=True)
class Peer:
    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    def greeting(self, key: str) -> dict[str, Any]:
        return {"tritune": key, "rank": self.rank, "host": self.host, "pid": self.pid}

    @staticmethod
    def read(message: dict[str, Any], key: str) -> Peer | None:
        """Who greets; None for somebody who is no rank of this run."""
        rank, host, pid = (message.get(name) for name in ("rank", "host", "pid"))
        if message.get("tritune") != key or type(rank) is not int or type(host) is not str or type(pid) is not int:
            return None
        return Peer(rank, host, pid)

    def fate(self, end: str) -> str:
        """What became of it, from how its connection ended."""
        gone = "died" if end == "closed" else "cannot be reached any more: its machine or the network is gone"
        return f"{self} {gone}"


class Line:
    """A connection that never blocks.

    Attributes:
        peer: who is at the other end, once it greeted.
        ended: it has said its last word: its end is no death.
    """

    def __init__(self, end: socket.socket) -> None:
        self.socket, self.ended, self.dropped = end, False, False
        self.peer: Peer | None = None
        self._unread = b""
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", PROBE_SECONDS), ("TCP_KEEPINTVL", PROBE_SECONDS), ("TCP_KEEPCNT", PROBES)):
            if hasattr(socket, name):  # macOS has other names
                end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # that nobody is there is seen where one reads
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> tuple[list[dict[str, Any]], str | None]:
        """What has come, and how the connection ended: `closed`, `unreachable`, or None while it goes on."""
        end = None
        while end is None and len(self._unread) < MOST_BYTES:
            try:
                data = self.socket.recv(4096)
                self._unread += data
                end = None if data else "closed"
            except BlockingIOError:
                break
            except ConnectionError:  # reset: the process ended with something unread
                end = "closed"
            except OSError:  # no probe was answered, or there is no way to the machine
                end = "unreachable"
        *lines, self._unread = self._unread.split(b"\n")
        if len(self._unread) >= MOST_BYTES:
            end = "closed"
        return [_message(line) for line in lines], end

    def drop(self) -> None:
        self.dropped = True
        self.socket.close()


def _message(line: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        message = json.loads(line)
        if isinstance(message, dict):
            return message
    return {}


def ports_of(environment: Mapping[str, str]) -> tuple[str, list[int]]:
    """What names a run among those on its machines, and the ports where its first rank may listen, in order.

    torchrun's variables hold both: nothing has to be agreed on, and ranks find one another before a store is up.
    """
    parts = (environment["MASTER_PORT"], environment.get("TORCHELASTIC_RUN_ID", ""), environment["WORLD_SIZE"])
    digest = hashlib.sha256("\n".join(parts).encode())
    numbers = digest.digest()
    ports = [FIRST_PORT + int.from_bytes(numbers[2 * i : 2 * i + 2], "big") % PORTS for i in range(TRIES)]
    return digest.hexdigest(), ports


def listen(address: str, ports: list[int]) -> socket.socket:
    """The first of `ports` that is free; on the loopback alone where the others come by it.

    Raises:
        InputError: none is.
    """
    for port in ports:
        with suppress(OSError):
            server = _server(address, port)
            server.setblocking(False)
            return server
    rule = f"its ranks tell one another who died at one of the ports {', '.join(map(str, ports))}, and none is free"
    raise InputError("MASTER_PORT", rule, "Start with another --master-port, which makes other ports")


def _server(address: str, port: int) -> socket.socket:
    inside = _loopback(address)
    if inside is not None:
        family = socket.AF_INET6 if ":" in inside else socket.AF_INET
        return socket.create_server((inside, port), family=family, backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # it may be there and switched off
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=BACKLOG)


def _loopback(address: str) -> str | None:
    """The address of this machine's inside that is given; None for a name, which another machine may read otherwise."""
    with suppress(OSError, ValueError):
        if address == "localhost":
            address = str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
        return address if ip_address(address).is_loopback else None
    return None


def connect(address: str, port: int, seconds: float) -> Line | None:
    """None where nobody listens."""
    with suppress(OSError):
        end = socket.create_connection((address, port), timeout=seconds)
        if end.getsockname() != end.getpeername():
            return Line(end)
        end.close()  # a passing port that met itself, as it may where nobody listens
    return None
