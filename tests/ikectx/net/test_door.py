"""The door for connections from outside, on loopback: strangers, half-open connections, no descriptors."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from ikectx.errors import LinkError
from ikectx.net import door, neighbours
from ikectx.net.credentials import Credentials, TlsConfig
from ikectx.net.door import HANDSHAKES, HANDSHAKES_OF_ONE, Door, Handshakes
from ikectx.net.links import Stream
from ikectx.net.neighbours import Neighbours
from ikectx.net.tls import tls_dial, tls_listen
from ikectx.peer import PeerConfig
from ikectx.sa.context import Address
from ikectx.timing import Timing
from tests.certs import Authority
from tests.hand_loop import StandingLoop, comes, run_standing
from tests.hand_loop import run_bounded as run
from tests.worlds import until

TIMING = Timing(connect=5.0, keepalive=1.0)
PEER = PeerConfig("peer", "127.0.0.1")
ONE, OTHER = ip_address("192.0.2.1"), ip_address("2001:db8::1")


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


def everybody(address: Address) -> bool:
    return True


async def gone(sock: socket.socket) -> bool:
    """Has the other side closed, or refused to begin?"""
    try:
        return await asyncio.get_running_loop().sock_recv(sock, 1) == b""
    except ConnectionError:
        return True


async def turned_away(where: tuple[str, int], source: str = "127.0.0.1") -> bool:
    """Is a connection from there reset? On loopback that may come before `connect` has returned."""
    try:
        sock = await connect(where, source)
    except ConnectionError:
        return True
    with sock:
        return await gone(sock)


async def connect(where: tuple[str, int], source: str = "127.0.0.1") -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    sock.bind((source, 0))
    try:
        await asyncio.get_running_loop().sock_connect(sock, where)
    except ConnectionError:
        sock.close()
        raise
    return sock


@asynccontextmanager
async def tls_door(
    tls: TlsConfig, timing: Timing = TIMING, peers: tuple[PeerConfig, ...] = (PEER,)
) -> AsyncIterator[tuple[tuple[str, int], asyncio.Queue[Stream]]]:
    accepted: asyncio.Queue[Stream] = asyncio.Queue()
    (one,) = await tls_listen(Credentials(tls), timing, [("127.0.0.1", 0)], accepted.put, peers)
    await one.start_serving()
    try:
        yield one.address, accepted
    finally:
        one.close()
        while not accepted.empty():
            accepted.get_nowait().close()


# -- who, and how many -----------------------------------------------------------------------------------


def test_handshakes_are_few_in_all_and_from_one_source() -> None:
    handshakes = Handshakes(everybody)
    for second in range(HANDSHAKES_OF_ONE):
        assert handshakes.begin(ONE, second) == ""
    assert "from there" in handshakes.begin(ONE, 100.0)
    assert handshakes.begin(OTHER, 100.0) == ""
    handshakes.end(ONE)
    assert handshakes.begin(ONE, 100.0) == ""
    others = [ip_address(number) for number in range(1 << 24, (1 << 24) + HANDSHAKES)]
    said = [handshakes.begin(other, 200.0 + number) for number, other in enumerate(others)]
    assert said.count("") == HANDSHAKES - HANDSHAKES_OF_ONE - 1
    assert f"{HANDSHAKES} connections" in said[-1]


def test_handshakes_of_one_source_come_no_faster_than_it_may() -> None:
    handshakes = Handshakes(everybody)
    let_in = 0
    for tick in range(1000):
        if not handshakes.begin(ONE, tick / 100):
            handshakes.end(ONE)
            let_in += 1
    assert door.RATE_OF_ONE * 5 < let_in < door.RATE_OF_ONE * 13  # 10 s, and what was saved up before
    assert len(handshakes._open) == 0


def test_a_peer_is_known_by_its_address_its_networks_and_its_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"psg.example": [ip_address("192.0.2.7")]}

    async def resolve(host: str, port: int) -> list[Address]:
        if host not in names:
            raise LinkError("unknown")
        return names[host]

    monkeypatch.setattr(neighbours, "resolve", resolve)

    async def scenario() -> None:
        found = Neighbours(
            [
                PeerConfig("a", "192.0.2.1", addresses=(ip_address("192.0.2.2"),)),
                PeerConfig("b", "192.0.2.9", sources=(ip_network("198.51.100.0/30"),)),
                PeerConfig("c", "psg.example"),
                PeerConfig("d", "away.example"),
            ]
        )
        await found.look()
        assert "d: away.example: unknown" in caplog.text
        known = ("192.0.2.1", "192.0.2.2", "198.51.100.3", "192.0.2.7")
        assert all(found.knows(ip_address(text)) for text in known)
        assert not any(found.knows(ip_address(text)) for text in ("192.0.2.3", "198.51.100.4", "::1"))
        # a name that has moved: asked for anew in the background, not for every stranger
        names["psg.example"], names["away.example"] = [ip_address("192.0.2.8")], [ip_address("192.0.2.6")]
        assert not found.knows(ip_address("192.0.2.8"))
        monkeypatch.setattr(neighbours, "RESOLVE_AGAIN", 0.0)
        assert not found.knows(ip_address("192.0.2.8"))
        await until(lambda: found.knows(ip_address("192.0.2.8")) and found.knows(ip_address("192.0.2.6")))
        assert not found.knows(ip_address("192.0.2.7"))

    run(scenario())


# -- attacks ---------------------------------------------------------------------------------------------


def test_an_address_that_is_no_peer_s_is_closed_before_tls(
    ca: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with tls_door(ca.issue("b")) as (where, accepted):
            assert await turned_away(where, "127.0.0.9")
            tls = ca.issue("stranger")
            dial = tls_dial(Credentials(tls), TIMING, [("0.0.0.0", 1), ("127.0.0.9", 1)])
            with pytest.raises(LinkError, match=r"reset|broken|closed|EOF|failed") as caught:
                await dial(PeerConfig("b", *where))
            assert "turned this gateway's address away" in caught.value.hint
            assert accepted.empty()
            (await tls_dial(Credentials(tls), TIMING, [("127.0.0.1", 1)])(PeerConfig("b", *where))).close()
            (await accepted.get()).close()

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert "turned a connection from 127.0.0.9 away: no [[peer]] connects from there" in caplog.text


def test_half_open_connections_take_no_more_than_their_share(ca: Authority) -> None:
    """A peer's own address, no octet sent: the door lets in eight, and others of it when those are over."""
    timing = replace(TIMING, connect=0.5)

    async def scenario(loop: StandingLoop) -> None:
        async with tls_door(ca.issue("b"), timing) as (where, accepted):
            gc.collect()  # what other tests have left open is not to be closed meanwhile
            before = len(os.listdir("/proc/self/fd"))
            half_open = [asyncio.create_task(turned_away(where)) for _ in range(40)]
            await comes(lambda: sum(not task.done() for task in half_open) == HANDSHAKES_OF_ONE)
            # both ends are in this process; the last one may still wait to be accepted
            await comes(lambda: len(os.listdir("/proc/self/fd")) - before == 2 * HANDSHAKES_OF_ONE)
            with pytest.raises(LinkError):
                await tls_dial(Credentials(ca.issue("a")), timing)(PeerConfig("b", *where))
            assert sum(not task.done() for task in half_open) == HANDSHAKES_OF_ONE
            loop.now += timing.connect
            assert all(await asyncio.gather(*half_open))
            loop.now += 1.5  # what one source may open in a second comes back, too
            (await tls_dial(Credentials(ca.issue("a")), timing)(PeerConfig("b", *where))).close()
            (await accepted.get()).close()
            await comes(lambda: len(os.listdir("/proc/self/fd")) == before)

    run_standing(scenario)


def test_memory_of_handshakes_is_given_back_at_once(ca: Authority) -> None:
    """No cycle holds what is closed: without the garbage collector nothing grows."""
    timing = replace(TIMING, connect=0.05)

    async def round_(loop: StandingLoop, where: tuple[str, int]) -> None:
        half_open = [await connect(where) for _ in range(4)]
        half_open[0].send(b"GET / HTTP/1.1\r\n\r\n")
        for sock in half_open:
            assert await gone(sock)
            sock.close()
            loop.now += timing.connect  # the others were let in together with the first
        for _ in range(10):
            await asyncio.sleep(0)

    async def scenario(loop: StandingLoop) -> None:
        async with tls_door(ca.issue("b"), timing) as (where, _):
            await round_(loop, where)
            gc.collect()
            before = len(gc.get_objects())
            for _ in range(5):
                loop.now += 0.4
                await round_(loop, where)
            assert len(gc.get_objects()) - before < 300

    gc.disable()
    try:
        run_standing(scenario)
    finally:
        gc.enable()


def test_no_file_descriptors_left_does_not_keep_the_agent_busy(caplog: pytest.LogCaptureFixture) -> None:
    class Full(socket.socket):
        """Accepts nothing for some tries, as at the limit of open files."""

        refusals = 3

        def accept(self) -> tuple[socket.socket, object]:
            if self.refusals:
                self.refusals -= 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().accept()

    async def scenario(loop: StandingLoop) -> None:
        async def asked_no_more(left: int) -> None:
            """accept() is called until so many refusals are left, and then not before its pause is over."""
            await comes(lambda: listening.refusals == left)
            for _ in range(50):
                await asyncio.sleep(0)
            assert listening.refusals == left

        listening = Full()
        listening.setblocking(False)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        came: asyncio.Queue[socket.socket] = asyncio.Queue()

        async def prove(sock: socket.socket) -> None:
            came.put_nowait(sock)

        one = Door(listening, Handshakes(everybody), prove, nothing)
        await one.start_serving()
        with socket.create_connection(one.address):
            for left in (2, 1, 0):
                await asked_no_more(left)
                loop.now += door.PAUSE
            (await came.get()).close()
        assert caplog.text.count("cannot accept a connection: Too many open files") == 3
        listening.refusals = 1
        with socket.create_connection(one.address):
            await asked_no_more(0)
            one.close()
            loop.now += door.PAUSE
            await asked_no_more(0)  # nothing is left that would look at it again
        assert came.empty()

    run_standing(scenario)


async def nothing(stream: Stream) -> None:
    pass


def test_connections_leave_descriptors_for_what_is_under_way(
    ca: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(door, "PAUSE", 0.05)
        async with tls_door(ca.issue("b")) as (where, accepted):
            (await tls_dial(Credentials(ca.issue("a")), TIMING)(PeerConfig("b", *where))).close()
            (await accepted.get()).close()
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            used = len(os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used * 2, limits[1]))
            taken = [os.open(os.devnull, os.O_RDONLY)]
            try:
                while taken[-1] < door.descriptors():
                    taken.append(os.open(os.devnull, os.O_RDONLY))
                assert await turned_away(where)
                with open(tmp_path / "updown", "w") as pipe:
                    assert pipe.fileno() > 0
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                for number in taken:
                    os.close(number)
            await asyncio.sleep(0.2)
            (await tls_dial(Credentials(ca.issue("a")), TIMING)(PeerConfig("b", *where))).close()
            (await accepted.get()).close()

    run(scenario())
    assert "the rest is kept for transfers" in caplog.text


def test_a_door_that_closes_drops_what_has_not_proven_who_it_is(ca: Authority) -> None:
    async def scenario() -> None:
        async with tls_door(ca.issue("b")) as (where, _):
            half_open = await connect(where)
            await asyncio.sleep(0.05)
        assert await gone(half_open)
        half_open.close()
        await until(lambda: len(asyncio.all_tasks()) <= 2)  # this one and what bounds it

    run(scenario())


def test_a_peer_that_resets_its_connection_at_once_is_no_mistake_of_ours(
    ca: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async def accept(stream: Stream) -> None: ...

    async def scenario() -> None:
        (opened,) = await tls_listen(
            Credentials(ca.issue("server")), TIMING, [("127.0.0.1", 0)], accept, [PEER]
        )
        await opened.start_serving()
        sock = socket.create_connection(opened.address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()  # RST, before it was accepted
        await asyncio.sleep(0.3)
        opened.close()

    with caplog.at_level(logging.INFO):
        run(scenario())
    assert "mistake" not in caplog.text and "refused a connection" in caplog.text


def test_a_start_does_not_wait_for_a_silent_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    answer: asyncio.Event

    async def resolve(host: str, port: int) -> list[Address]:
        await answer.wait()
        return [ONE]

    async def scenario() -> None:
        nonlocal answer
        answer = asyncio.Event()
        known = Neighbours([PeerConfig("peer", "gateway.example")])
        await known.look_soon()
        assert not known.knows(ONE)
        answer.set()
        await asyncio.sleep(0.01)
        assert known.knows(ONE)

    monkeypatch.setattr(neighbours, "AT_START", 0.01)
    monkeypatch.setattr(neighbours, "resolve", resolve)
    run(scenario())
