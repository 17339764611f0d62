"""Plain connections under a guard, on loopback; the guard is the test's word. With the kernel: test_guard."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from ikectx.disk.store import SqliteStore
from ikectx.driver import GatewayHooks
from ikectx.engine.journaled import TransferPolicy
from ikectx.errors import ConfigError, LinkError
from ikectx.gateway import Gateway
from ikectx.net import plain
from ikectx.net.five_tuple import Flow
from ikectx.net.links import Dial, Stream
from ikectx.net.plain import Hold, plain_dial, plain_listen
from ikectx.peer import PeerConfig
from ikectx.sa.context import Endpoint
from ikectx.timing import Timing
from tests.hand_loop import run_bounded as run
from tests.peers import Ether, MemoryGateway, a_context

TIMING = Timing(connect=0.5, offer=1.0, idle=0.05, keepalive=0.1, stop=0.3, backoff=0.01)
GONE = LinkError("no IPsec policy protects it", hint="write one")


@dataclass(eq=False)
class Holding:
    guard: SayGuard
    flow: Flow
    lost: Callable[[LinkError], None]
    questions: int = 0

    def verify(self) -> None:
        self.questions += 1
        if self.guard.error is not None:
            raise self.guard.error

    def release(self) -> None:
        if self in self.guard.held:
            self.guard.held.remove(self)


@dataclass
class SayGuard:
    """Protected unless `error` is set; `lose` tells, as an event would."""

    error: LinkError | None = None
    held: list[Holding] = field(default_factory=list)

    async def check(self, flow: Flow) -> None:
        if self.error is not None:
            raise self.error

    async def hold(self, flow: Flow, sock: socket.socket, lost: Callable[[LinkError], None]) -> Hold:
        await self.check(flow)
        held = Holding(self, flow, lost)
        self.held.append(held)
        return held

    def lose(self) -> None:
        self.error = GONE
        for held in list(self.held):
            held.lost(GONE)


PSG = PeerConfig("psg", "127.0.0.1", 1, certificate_name="Psg.example")


@dataclass
class Ends:
    near: SayGuard
    far: SayGuard
    port: int
    accepted: asyncio.Queue[Stream]
    dial: Dial
    peer: PeerConfig

    async def pair(self) -> tuple[Stream, Stream]:
        near = await self.dial(self.peer)
        return near, await self.accepted.get()


@asynccontextmanager
async def listening(host: str = "127.0.0.1", peers: tuple[PeerConfig, ...] = (PSG,)) -> AsyncIterator[Ends]:
    accepted: asyncio.Queue[Stream] = asyncio.Queue()
    near, far = SayGuard(), SayGuard()
    (server,) = await plain_listen(TIMING, "tcp", far, [(host, 0)], peers, accepted.put)
    await server.start_serving()
    address, port = server.address
    assert address == host
    try:
        dial = plain_dial(TIMING, "tcp", near, [("0.0.0.0", 5091), (host, 5091)])
        yield Ends(near, far, port, accepted, dial, PeerConfig("nsg", host, port))
    finally:
        server.close()
        server.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_names_come_from_addresses(host: str) -> None:
    async def scenario() -> None:
        async with listening(host, (replace(PSG, host=host), PeerConfig("other", "192.0.2.9"))) as ends:
            near, far = await ends.pair()
            assert near.names == {"nsg"}
            assert far.names == {"psg.example"}
            assert near.label == str(Endpoint.of(host, ends.port))
            here, there = ends.near.held[0].flow, ends.far.held[0].flow
            assert (here.local, here.remote) == (there.remote, there.local)
            await near.write(b"there")
            assert await far.read() == b"there"
            large = bytes(range(256)) * 1000
            sending = asyncio.create_task(far.write(large))
            received = b""
            while len(received) < len(large):
                received += await near.read()
            await sending
            assert received == large
            assert ends.far.held[0].questions > len(large) // plain.CHUNK
            far.close()
            assert await near.read() == b""
            near.close()
            near.close()
            assert ends.near.held == ends.far.held == []

    run(scenario())


def test_without_protection_nothing_is_sent() -> None:
    async def scenario() -> None:
        async with listening() as ends:
            ends.near.error = GONE
            with pytest.raises(LinkError, match=r"nsg at 127\.0\.0\.1:\d+: no IPsec policy") as caught:
                await ends.dial(ends.peer)
            assert caught.value.hint == GONE.hint
            await asyncio.sleep(0.02)
            assert ends.accepted.empty()
            assert ends.far.held == []

    run(scenario())


def test_what_arrives_unprotected_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with listening() as ends:
            ends.far.error = GONE
            with pytest.raises(LinkError, match=r"reset|refused|closed"):
                near = await ends.dial(ends.peer)
                assert await near.read() != b""
                raise LinkError("closed")
            assert ends.accepted.empty()
            assert "no IPsec policy protects it (write one)" in caplog.text

    with caplog.at_level(logging.WARNING):
        run(scenario())


@pytest.mark.parametrize(
    ("peers", "said"),
    [
        (
            (replace(PSG, host="127.0.0.2"),),
            "connection from 127.0.0.1 away: no [[peer]] connects from there",
        ),
        (
            (replace(PSG, host="no such host"),),
            "connection from 127.0.0.1 away: no [[peer]] connects from there",
        ),
        ((), "connection from 127.0.0.1 away: no [[peer]] connects from there"),
        ((PSG, PeerConfig("third", "127.0.0.1")), "address of several peers: psg, third"),
    ],
)
def test_an_address_must_be_one_peer_s(
    peers: tuple[PeerConfig, ...], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with listening(peers=peers) as ends:
            with pytest.raises(LinkError, match=r"reset|closed"):
                near = await ends.dial(ends.peer)
                if await near.read() == b"":
                    raise LinkError("closed")
            assert ends.accepted.empty()
            assert ends.far.held == []
            assert said in caplog.text

    with caplog.at_level(logging.WARNING):
        run(scenario())


def test_a_change_cuts_at_once() -> None:
    async def scenario() -> None:
        async with listening() as ends:
            near, far = await ends.pair()
            reading = asyncio.create_task(near.read())
            await asyncio.sleep(0.01)
            ends.near.lose()
            with pytest.raises(LinkError, match="no IPsec policy"):
                await reading
            for attempt in (near.read(), near.write(b"x")):
                with pytest.raises(LinkError, match="no IPsec policy"):
                    await attempt
            assert ends.near.held == []
            with pytest.raises(LinkError, match="reset"):  # not an orderly end: nothing is sent on
                await far.read()

    run(scenario())


def test_a_writer_that_waits_is_cut_too() -> None:
    async def scenario() -> None:
        async with listening() as ends:
            near, _ = await ends.pair()
            writing = asyncio.create_task(near.write(bytes(1 << 24)))
            await asyncio.sleep(0.05)
            assert not writing.done()
            ends.near.lose()
            with pytest.raises(LinkError, match="no IPsec policy"):
                await writing

    run(scenario())


def test_octets_that_came_after_are_not_handed_on() -> None:
    async def scenario() -> None:
        async with listening() as ends:
            near, far = await ends.pair()
            await near.write(b"too late")
            await asyncio.sleep(0.02)
            ends.far.error = GONE  # no event yet: it is asked
            with pytest.raises(LinkError, match="no IPsec policy"):
                await far.read()
            ends.near.error = GONE
            with pytest.raises(LinkError, match="no IPsec policy"):
                await near.write(b"x")

    run(scenario())


def test_a_peer_that_takes_nothing_is_not_waited_for() -> None:
    async def scenario() -> None:
        async with listening() as ends:
            near, _ = await ends.pair()
            with pytest.raises(LinkError, match="takes no more octets"):
                await near.write(bytes(1 << 24))
            near.close()
            with pytest.raises(LinkError, match="closed"):
                await near.read()

    run(scenario())


def test_closing_ends_a_read() -> None:
    async def scenario() -> None:
        async with listening() as ends:
            near, _ = await ends.pair()
            reading = asyncio.create_task(near.read())
            await asyncio.sleep(0.01)
            near.close()
            with pytest.raises(LinkError, match="is closed"):
                await reading

    run(scenario())


class _Negotiating(socket.socket):
    """A socket for which the kernel has no SA yet: Linux 7.2 answers EAGAIN to a connect under its policy."""

    attempts = 0

    def connect_ex(self, address: Any) -> int:
        self.attempts += 1
        return errno.EAGAIN if self.attempts < 4 else super().connect_ex(address)


def test_a_connection_waits_for_its_sa(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[_Negotiating] = []

    def opened(family: int, protocol: str) -> socket.socket:
        made.append(_Negotiating(family, socket.SOCK_STREAM))
        made[-1].setblocking(False)
        return made[-1]

    async def scenario() -> None:
        async with listening() as ends:
            monkeypatch.setattr(plain, "open_socket", opened)
            near, far = await ends.pair()
            await near.write(b"first octets")
            assert await far.read() == b"first octets"
            assert [sock.attempts for sock in made] == [4]
            near.close()
            far.close()

    monkeypatch.setattr(plain, "CONNECT_AGAIN", 0.001)
    run(scenario())


def test_a_connection_whose_sa_never_comes() -> None:
    class Never(_Negotiating):
        def connect_ex(self, address: Any) -> int:
            return errno.EAGAIN

    async def scenario() -> None:
        dial = plain_dial(replace(TIMING, connect=0.05), "tcp", SayGuard())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plain, "open_socket", lambda family, protocol: Never(family, socket.SOCK_STREAM))
            with pytest.raises(LinkError, match=r"did not answer within 0\.05 s") as told:
                await dial(PSG)
        assert "IPsec SA" in told.value.hint

    run(scenario())


def test_nobody_there() -> None:
    async def scenario() -> None:
        dial = plain_dial(replace(TIMING, connect=0.05), "tcp", SayGuard())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            with pytest.raises(LinkError, match=r"nsg at 127\.0\.0\.1:\d+: .*refused"):
                await dial(PeerConfig("nsg", "127.0.0.1", port))
            with pytest.raises(LinkError, match=r"cannot listen on 127\.0\.0\.1:\d+: .*in use"):
                await plain_listen(
                    TIMING,
                    "tcp",
                    SayGuard(),
                    [("127.0.0.1", 0), ("127.0.0.1", port)],
                    [],
                    asyncio.sleep,  # type: ignore[arg-type]
                )
        with pytest.raises(LinkError, match="nsg at no such host"):
            await dial(PeerConfig("nsg", "no such host", 1))

    run(scenario())


def test_without_sctp_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def none(family: int, kind: int, number: int = 0) -> socket.socket:
        if number == socket.IPPROTO_SCTP:
            raise OSError(93, "Protocol not supported")
        return real(family, kind, number)

    async def scenario() -> None:
        monkeypatch.setattr("ikectx.net.plain.socket.socket", none)
        with pytest.raises(LinkError, match="this kernel has no SCTP") as caught:
            await plain_dial(TIMING, "sctp", SayGuard())(PSG)
        assert "modprobe sctp" in caught.value.hint
        with pytest.raises(LinkError, match="this kernel has no SCTP"):
            await plain_listen(TIMING, "sctp", SayGuard(), [("127.0.0.1", 0)], [], asyncio.sleep)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"SCTP on 0\.0\.0\.0 would use every address"):
            await plain_listen(TIMING, "sctp", SayGuard(), [("0.0.0.0", 0)], [], asyncio.sleep)  # type: ignore[arg-type]

    run(scenario())


def test_a_transfer_over_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        ether = Ether()
        a, b = MemoryGateway("a", ether), MemoryGateway("b", ether)
        stores = [SqliteStore(tmp_path / f"{name}.db", bytes(32)) for name in "ab"]
        from_a = PeerConfig("a", "127.0.0.1", 1, certificate_name="a.example")
        policy = TransferPolicy(TIMING)
        there = Gateway(
            "b",
            b,
            b,
            stores[1],
            [from_a],
            policy=policy,
            hooks=GatewayHooks(dial=plain_dial(TIMING, "tcp", SayGuard())),
        )
        await there.start()
        (server,) = await plain_listen(TIMING, "tcp", SayGuard(), [("127.0.0.1", 0)], [from_a], there.accept)
        await server.start_serving()
        to_b = PeerConfig("b", "127.0.0.1", server.sockets[0].getsockname()[1])
        guard = SayGuard()
        here = Gateway(
            "a",
            a,
            a,
            stores[0],
            [to_b],
            policy=policy,
            hooks=GatewayHooks(dial=plain_dial(TIMING, "tcp", guard)),
        )
        await here.start()
        try:
            report = await here.transfer(a.serve(a_context(1)), "b")
            assert report.result == "moved"
            sa = a.serve(a_context(2))
            guard.lose()
            report = await here.transfer(sa, "b")
            assert report.result == "kept"
            assert "no IPsec policy" in report.text
            assert report.hint == GONE.hint
            assert sa in a.served
        finally:
            server.close()
            await here.stop()
            await there.stop()
            for store in stores:
                store.close()

    run(scenario())
