"""Processes that are killed, stopped or never come, as their peers see them: by their connections, without torch."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tritune.launch.processes import CONTEXT, _free_port
from tritune.trainer.errors import InputError
from tritune.trainer.parallel import peer_line, peers

LOST, OTHERS = 3, 4  # exit statuses: of a rank that lost a peer; of one that was told to end
SECONDS = 10.0  # a fork on a busy machine


def rank(number: int, variables: dict[str, str], orders: str, join_seconds: float | None, answer: float) -> None:
    """Follow the file of orders; end with LOST where a peer is lost, and leave word of it."""
    peers.EARLY_SECONDS = peers.FOLLOW_SECONDS = 0.2
    peers.ANSWER_SECONDS = answer
    place = Path(orders)

    def end(text: str) -> None:
        (place / f"lost-{number}").write_text(text)
        os._exit(LOST)

    mine = peers.open_peers({**variables, "RANK": str(number)}, end)
    mine.expect(join_seconds)
    mine.watch(lambda: False, end)
    (place / f"here-{number}").write_text(str(os.getpid()))
    done: set[str] = set()
    while True:
        for order in ("join", "fork", "fail", "leave"):
            if order in done or not (place / f"{order}-{number}").exists():
                continue
            done.add(order)
            if order == "join":
                (place / f"missing-{number}").write_text(json.dumps(mine.joined()))
            elif order == "fork" and os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            elif order in ("fail", "leave"):
                mine.close("it broke" if order == "fail" else None)
                os._exit(OTHERS)
        time.sleep(0.01)


@dataclass
class Ranks:
    place: Path
    variables: dict[str, str]
    processes: dict[int, BaseProcess]

    def start(self, *numbers: int, join_seconds: float | None = None, answer: float = peers.ANSWER_SECONDS) -> None:
        for number in numbers:
            arguments = (number, self.variables, str(self.place), join_seconds, answer)
            self.processes[number] = CONTEXT.Process(target=rank, args=arguments)
            self.processes[number].start()

    def order(self, word: str, *numbers: int) -> None:
        for number in numbers:
            (self.place / f"{word}-{number}").touch()

    def met(self) -> None:
        """All connections stand: the first rank has greeted everybody."""
        numbers = list(self.processes)
        wait_for(lambda: all((self.place / f"here-{n}").exists() for n in numbers))
        time.sleep(0.3)

    def meet(self) -> list[list[int]]:
        self.met()
        self.order("join", *self.processes)
        files = [self.place / f"missing-{n}" for n in self.processes]
        wait_for(lambda: all(f.exists() and f.read_text() for f in files))
        return [json.loads(f.read_text()) for f in files]

    def lost(self, number: int) -> str:
        """What a rank ended with."""
        self.processes[number].join(SECONDS)
        assert self.processes[number].exitcode == LOST
        return (self.place / f"lost-{number}").read_text()

    def name(self, number: int) -> str:
        return f"rank {number} on {socket.gethostname()} (pid {self.processes[number].pid})"

    def kill(self, number: int, how: int = signal.SIGKILL) -> None:
        pid = self.processes[number].pid
        assert pid is not None
        os.kill(pid, how)


def wait_for(what) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def ranks(tmp_path) -> Iterator[Ranks]:
    variables = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    found = Ranks(tmp_path, variables, {})
    yield found
    for number, process in found.processes.items():
        if process.is_alive():
            found.kill(number)
            found.kill(number, signal.SIGCONT)
        process.join()


@pytest.mark.parametrize("dead", [0, 2])
@pytest.mark.parametrize("together", [False, True], ids=["before they met", "after"])
def test_who_is_killed_is_named_by_all_the_others(ranks, dead, together):
    ranks.start(0, 1, 2)
    if together:
        assert ranks.meet() == [[], [], []]
    else:
        ranks.met()
    began = time.monotonic()
    ranks.kill(dead)
    for number in {0, 1, 2} - {dead}:
        assert ranks.lost(number) == f"{ranks.name(dead)} died"
    assert time.monotonic() - began < 3


def test_one_that_ends_in_order_is_no_loss_but_before_all_have_met(ranks):
    ranks.start(0, 1, 2)
    ranks.meet()
    ranks.order("leave", 1)
    ranks.processes[1].join(SECONDS)
    time.sleep(0.7)
    assert ranks.processes[0].is_alive()
    ranks.order("leave", 0)
    ranks.processes[0].join(SECONDS)
    time.sleep(0.7)
    assert ranks.processes[2].is_alive()
    assert not list(ranks.place.glob("lost-*"))


def test_one_that_ends_before_all_have_met_leaves_nobody_waiting(ranks):
    ranks.start(0, 1, 2)
    ranks.met()
    ranks.order("leave", 2)
    assert ranks.lost(0) == ranks.lost(1) == f"{ranks.name(2)} failed: it ended before all had met"


def test_one_that_fails_says_why(ranks):
    ranks.start(0, 1, 2)
    ranks.meet()
    ranks.order("fail", 1)
    assert ranks.lost(0) == ranks.lost(2) == f"{ranks.name(1)} failed: it broke"


def test_one_that_never_comes_is_named_where_ranks_start_together(ranks):
    ranks.start(0, 1, join_seconds=1.0)
    for number in (0, 1):
        assert re.match(
            r"rank 2 did not come to 127\.0\.0\.1:\d+ within 1 s: .* backend.join_seconds", ranks.lost(number)
        )


def test_the_first_one_that_never_comes_is_named_too(ranks):
    ranks.start(1, join_seconds=1.0)
    assert ranks.lost(1).startswith("rank 0 did not come to 127.0.0.1:")


def test_one_that_comes_late_is_waited_for_where_each_is_started_by_hand(ranks):
    ranks.start(1)
    time.sleep(peers.KNOCK_SECONDS + 0.5)
    ranks.start(0)
    ranks.met()
    ranks.start(2)
    assert ranks.meet() == [[], [], []]


def test_what_is_stopped_is_not_dead(ranks):
    """One of them, and then all, for longer than a rank may stay away."""
    ranks.start(0, 1, 2)
    ranks.meet()
    ranks.kill(1, signal.SIGSTOP)
    time.sleep(1.5)
    for number in (0, 2):
        ranks.kill(number, signal.SIGSTOP)
    time.sleep(0.5)
    for number in (0, 1, 2):
        ranks.kill(number, signal.SIGCONT)
    time.sleep(0.7)
    assert all(p.is_alive() for p in ranks.processes.values())


def test_a_job_that_is_suspended_while_it_starts_misses_nobody(ranks):
    ranks.start(0, 1, join_seconds=3.0)
    ranks.met()
    for number in (0, 1):
        ranks.kill(number, signal.SIGSTOP)
    time.sleep(4.0)
    for number in (0, 1):
        ranks.kill(number, signal.SIGCONT)
    ranks.start(2, join_seconds=3.0)
    assert ranks.meet() == [[], [], []]


def test_a_fork_that_lives_on_does_not_hide_a_death(ranks):
    ranks.start(0, 1, 2)
    ranks.meet()
    ranks.order("fork", 1)
    pid = ranks.processes[1].pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_for(lambda: children.read_text().strip())
    child = int(children.read_text())
    ranks.kill(1)
    assert ranks.lost(0) == ranks.lost(2) == f"{ranks.name(1)} died"
    os.kill(child, signal.SIGKILL)


def test_strangers_come_and_go(ranks):
    """Noise, a rank of another run, one that is none, one that is there already: none of them is missed."""
    ranks.start(0, 1, 2)
    ranks.meet()
    key, ports = peer_line.ports_of(ranks.variables)
    words = [
        b"",
        b"\xff\n",
        b"[1]\n",
        b"[" * 100_000 + b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"end": null}\n',
        b"x" * 200_000,
    ]
    for number, name in [(1, "0" * 64), (9, key), (0, key), (True, key), (1, key), ("1", key)]:
        words.append(json.dumps(peer_line.Peer(number, "h", 1).greeting(name)).encode() + b"\n")
    for word in words:
        with socket.create_connection(("127.0.0.1", ports[0])) as stranger:
            stranger.settimeout(SECONDS)
            try:
                stranger.sendall(word)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(1) == b""
            except OSError:
                pass
    time.sleep(0.5)
    assert all(p.is_alive() for p in ranks.processes.values())


def test_where_ports_are_taken_the_next_is_found(ranks):
    """The first by one that says nothing, the second by one that speaks something else."""
    _, ports = peer_line.ports_of(ranks.variables)
    with socket.create_server(("127.0.0.1", ports[0])), socket.create_server(("127.0.0.1", ports[1])) as loud:
        loud.settimeout(SECONDS)
        ranks.start(0, 1, 2, answer=0.5)
        for _ in range(2):
            taken = loud.accept()[0]
            taken.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            taken.close()
        time.sleep(1.0)
        assert ranks.meet() == [[], [], []]
        ranks.kill(2)
        assert ranks.lost(0) == ranks.lost(1) == f"{ranks.name(2)} died"


def test_no_free_port_is_said_with_a_way_out():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="another --master-port"):
        peer_line.listen("127.0.0.1", [taken.getsockname()[1]])


@pytest.mark.parametrize("given", ["127.0.0.1", "localhost"])
def test_a_run_of_one_machine_is_not_reached_from_elsewhere(given):
    port = _free_port()
    with peer_line.listen(given, [port]):
        assert peer_line.connect(given, port, 1.0) is not None
        assert peer_line.connect("127.0.0.2", port, 1.0) is None


def test_by_a_name_all_of_a_machine_s_addresses_are_reached():
    """One machine may have its own name on the loopback while the others reach it from outside."""
    port = _free_port()
    with peer_line.listen(socket.gethostname(), [port]):
        assert peer_line.connect("127.0.0.1", port, 1.0) is not None
        assert peer_line.connect("127.0.0.2", port, 1.0) is not None


def test_the_first_of_two_machines_is_reached_from_elsewhere_though_it_calls_itself_localhost():
    environment = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(_free_port()),
    }
    first = peers.open_peers(environment | {"RANK": "0"}, lambda text: None)
    other = peers.open_peers(environment | {"RANK": "1", "MASTER_ADDR": "127.0.0.2"}, lambda text: None)
    deadline = time.monotonic() + 5
    while first.joined() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first.joined() == []
    other.close()
    first.close()


def test_a_run_of_one_opens_nothing():
    assert type(peers.open_peers({}, lambda text: None)) is peers.Peers
    assert type(peers.open_peers({"WORLD_SIZE": "2"}, lambda text: None)) is peers.Peers  # met by a store of its own


def test_a_machine_that_is_gone_is_found_by_the_kernel_s_probes():
    """Nothing here can cut a machine's power: the probes are asked for, and what the kernel then says is understood."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = peer_line.connect("127.0.0.1", server.getsockname()[1], 1.0)
        assert line is not None
        probes = [line.socket.getsockopt(socket.IPPROTO_TCP, name)
                  for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)]  # fmt: skip
        assert line.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert probes[0] + probes[1] * probes[2] <= 60
        line.drop()

    class Gone:
        def recv(self, count: int) -> bytes:
            raise TimeoutError(110, "Connection timed out")

    line.socket = Gone()  # type: ignore[assignment]
    assert line.receive() == ([], "unreachable")
    assert "its machine or the network is gone" in peer_line.Peer(1, "h", 2).fate("unreachable")
