"""CTARs and CTAAs over real UDP sockets on the loopback interface, without privileges."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.errors import LinkError, UsageError, WireError
from ikectx.net import bypass as bypass_room
from ikectx.net import mn_udp
from ikectx.net.bypass import bypass
from ikectx.net.mn_udp import MAX_AT_WORK, MnServer, run_handover
from ikectx.node.mobility import (
    Handover,
    HandoverEvent,
    HandoverMode,
    Limits,
    MobileState,
    Retry,
    Route,
    Router,
)
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import Address, Endpoint
from ikectx.wire import cookies
from ikectx.wire.cxtp import Ctaa, Ctar, Ctc, StatusBlock
from ikectx.wire.tokens import Purpose, find, seal_ctaa, token_key
from tests.peers import HandClock, a_context
from tests.worlds import until

GENERATION = a_context().current
SEQUENCE = 7
KEY = token_key(GENERATION, SEQUENCE)
QUICK = Retry(0.05, 0.1, 0.6)
HERE = {4: ip_address("127.0.0.1"), 6: ip_address("::1")}


def no_protection(sock: socket.socket) -> None:
    """A bypass needs privileges."""


Handle = Callable[[Ctar, Endpoint], Awaitable[bytes | None]]


async def accept(ctar: Ctar, source: Endpoint) -> bytes | None:
    token = find(ctar.blocks)
    assert token is not None
    return seal_ctaa(KEY, ctar.mn, ctar.sequence, purpose=token.purpose).serialize()


@asynccontextmanager
async def serving(
    handler: Handle = accept, *, at: Endpoint | None = None, rate: float = 1000, source_rate: float = 1000
) -> AsyncIterator[tuple[MnServer, Endpoint]]:
    server = MnServer(
        [at or Endpoint(HERE[4], 0)],
        handler,
        rate,
        source_rate,
        clock=HandClock(),
        draw=lambda: 0.5,
        protect=no_protection,
    )
    await server.start()
    try:
        yield server, server.endpoints[0]
    finally:
        await server.close()
        await server.close()


def handover(psg: Endpoint, nsg: Endpoint, mode: HandoverMode, care_of: Endpoint | None = None) -> Handover:
    mn: Address = ip_address("198.51.100.7" if psg.address.version == 4 else "2001:db8::7")
    return Handover(
        GENERATION,
        mode,
        Route(mn, Router("psg", psg.address, psg), Router("nsg", nsg.address, nsg)),
        sequence=SEQUENCE,
        unix=1_790_000_000,
        care_of=care_of,
        limits=Limits(QUICK),
    )


def a_ctar() -> bytes:
    machine = handover(Endpoint(HERE[4], 1), Endpoint(HERE[4], 2), HandoverMode.REACTIVE)
    return machine.to_send(0)[0][0]


class Client:
    """A bare UDP socket."""

    def __init__(self, to: Endpoint) -> None:
        family = socket.AF_INET if to.address.version == 4 else socket.AF_INET6
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.to = (str(to.address), to.port)

    def send(self, octets: bytes) -> None:
        self.sock.sendto(octets, self.to)

    async def receive(self, within: float = 2.0) -> tuple[bytes, str] | None:
        try:
            async with asyncio.timeout(within):
                data, sender = await asyncio.get_running_loop().sock_recvfrom(self.sock, 2000)
        except TimeoutError:
            return None
        return data, sender[0]


@pytest.mark.parametrize("version", [4, 6])
def test_predictive_over_udp(version: int) -> None:
    async def run() -> None:
        here = Endpoint(HERE[version], 0)
        seen: list[tuple[str, Purpose]] = []

        def at(name: str) -> Handle:
            async def handle(ctar: Ctar, source: Endpoint) -> bytes | None:
                token = find(ctar.blocks)
                assert token is not None
                seen.append((name, token.purpose))
                return await accept(ctar, source)

            return handle

        told: list[tuple[MobileState, HandoverEvent | None]] = []
        move: asyncio.Future[Endpoint | None] = asyncio.get_running_loop().create_future()

        def progress(state: MobileState, event: HandoverEvent | None) -> None:
            told.append((state, event))
            if state is MobileState.PREPARED:
                move.set_result(Endpoint(HERE[version], 4500))

        async with serving(at("psg"), at=here) as (_, psg), serving(at("nsg"), at=here) as (_, nsg):
            outcome = await run_handover(
                handover(psg, nsg, HandoverMode.PREDICTIVE),
                HERE[version],
                moves=move,
                progress=progress,
                protect=no_protection,
            )
        assert outcome.state is MobileState.ACTIVATED
        assert seen == [("psg", Purpose.ANNOUNCE), ("nsg", Purpose.ARRIVE)]
        assert [state.value for state, _ in told] == ["announcing", "prepared", "arriving", "activated"]
        assert [event is None for _, event in told] == [True, False, True, False]

    asyncio.run(run())


def test_lost_answers_are_asked_for_again() -> None:
    async def run() -> None:
        asked: list[Ctar] = []

        async def deaf(ctar: Ctar, source: Endpoint) -> bytes | None:
            asked.append(ctar)
            return await accept(ctar, source) if len(asked) == 3 else None

        async with serving(deaf) as (server, nsg):
            # the care-of address is behind a NAT: not one of this machine's
            care_of = Endpoint.of("203.0.113.1", 4500)
            machine = handover(Endpoint(HERE[4], 1), nsg, HandoverMode.REACTIVE, care_of)
            outcome = await run_handover(machine, protect=no_protection)
            assert (outcome.state, outcome.retransmissions) == (MobileState.ACTIVATED, 2)
            assert len(set(map(repr, asked))) == 1
            await until(lambda: server.counters.answered == 1)
            assert (server.counters.received, server.counters.unanswered) == (3, 2)

    asyncio.run(run())


def test_a_route_that_comes_late_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Blocked(socket.socket):
        tries = 0

        def sendto(self, *args: Any) -> int:
            Blocked.tries += 1
            if Blocked.tries <= 3:
                raise OSError(errno.ENETUNREACH, "Network is unreachable")
            return super().sendto(*args)

    opened = mn_udp._open
    monkeypatch.setattr(mn_udp, "_open", lambda *args: Blocked(fileno=opened(*args).detach()))

    async def run() -> None:
        async with serving() as (_, nsg):
            retry = Retry(60.0, 60.0, 120.0)  # a try takes this long
            machine = handover(Endpoint(HERE[4], 1), nsg, HandoverMode.REACTIVE, Endpoint(HERE[4], 4500))
            machine._retry = retry
            async with asyncio.timeout(30):
                outcome = await run_handover(machine, protect=no_protection)
        assert (outcome.state, outcome.messages, outcome.retransmissions) == (MobileState.ACTIVATED, 2, 0)

    with caplog.at_level(logging.INFO, logger="ikectx.mnlink"):
        asyncio.run(run())
    assert Blocked.tries == 4
    assert caplog.text.count("Network is unreachable") == 1


def test_nobody_there_leaves_doubt() -> None:
    async def run() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
            closed.bind(("127.0.0.1", 0))
            nobody = Endpoint(HERE[4], closed.getsockname()[1])
        machine = handover(nobody, nobody, HandoverMode.REACTIVE, Endpoint(HERE[4], 4500))
        outcome = await run_handover(machine, protect=no_protection)
        assert (outcome.state, outcome.in_doubt) == (MobileState.SILENT, True)

    asyncio.run(run())


def test_auto_moves_on_without_preparation() -> None:
    async def run() -> None:
        async def refuse(ctar: Ctar, source: Endpoint) -> bytes | None:
            busy = (StatusBlock(Fpt.IKEV2_SA, Status.BUSY),)
            return seal_ctaa(KEY, ctar.mn, ctar.sequence, busy, purpose=Purpose.ANNOUNCE).serialize()

        async def move() -> Endpoint:
            await asyncio.sleep(0.1)
            return Endpoint(HERE[4], 4500)

        async with serving(refuse) as (_, psg), serving() as (_, nsg):
            machine = handover(psg, nsg, HandoverMode.AUTO)
            outcome = await run_handover(machine, moves=move(), protect=no_protection)
        assert (outcome.state, outcome.announced) == (MobileState.ACTIVATED, False)

    asyncio.run(run())


def test_cancelling_the_task_cancels_the_handover() -> None:
    async def run() -> None:
        async def deaf(ctar: Ctar, source: Endpoint) -> bytes | None:
            return None

        async with serving(deaf) as (server, nsg):
            machine = handover(Endpoint(HERE[4], 1), nsg, HandoverMode.REACTIVE, Endpoint(HERE[4], 4500))
            task = asyncio.create_task(run_handover(machine, protect=no_protection))
            await until(lambda: server.counters.received > 0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert machine.outcome.in_doubt

    asyncio.run(run())


def test_trouble_of_the_move_ends_it() -> None:
    async def run() -> None:
        async def move() -> Endpoint:
            raise LinkError("the new network has no address")

        async with serving() as (_, psg):
            machine = handover(psg, psg, HandoverMode.AUTO)
            with pytest.raises(LinkError, match="no address"):
                await run_handover(machine, moves=move(), protect=no_protection)
            assert machine.outcome.state is MobileState.CANCELLED
            with pytest.raises(UsageError):
                await run_handover(handover(psg, psg, HandoverMode.AUTO), protect=no_protection)

    asyncio.run(run())


def test_foreign_octets_and_failures_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    text = "a bug"

    async def run() -> None:
        async def fail(ctar: Ctar, source: Endpoint) -> bytes | None:
            raise [WireError("not like this"), ValueError(text)][server.counters.failed]

        async with serving(fail) as (server, at):
            client = Client(at)
            others = Ctc(ip_address("192.0.2.1")).serialize()
            for octets in (b"", b"\x11", bytes(2000), others, a_ctar()[:-1], a_ctar() + b"\0"):
                client.send(octets)
            await until(lambda: server.counters.malformed == 6)
            for count in (1, 2):
                client.send(a_ctar())
                await until(lambda count=count: server.counters.failed == count)  # type: ignore[misc]
            assert server.counters.received == 8
            assert "ValueError, a mistake in the program" in caplog.text
            assert text not in caplog.text  # who knows what is in it
            assert await client.receive(0.05) is None

    asyncio.run(run())


def test_rate() -> None:
    async def run() -> None:
        async with serving(rate=10, source_rate=2) as (server, at):
            client = Client(at)
            for _ in range(20):
                client.send(a_ctar())
            # four tokens; below half of them are left chance (0.5 here) decides
            await until(lambda: server.counters.received == 20)
            await until(lambda: server.counters.answered == 3)
            assert (server.counters.asked, server.counters.limited) == (17, 0)

    asyncio.run(run())


def test_an_mn_gets_through_beside_a_flood_from_forged_addresses() -> None:
    """They hear no answer, and so show no cookie: this many would have kept it out for minutes."""

    async def run() -> None:
        async with serving(rate=10, source_rate=2) as (server, at):
            forgers = [Client(at) for _ in range(250)]
            for number, forger in enumerate(forgers):
                forger.sock.bind((f"127.0.{number // 100 + 1}.{number % 100 + 1}", 0))

            async def flood(rounds: int) -> None:
                for _ in range(rounds):
                    for forger in forgers:
                        forger.send(a_ctar())
                        await asyncio.sleep(0)

            await flood(1)
            assert server.counters.asked > 200
            storm = asyncio.create_task(flood(1000))
            machine = handover(Endpoint(HERE[4], 1), at, HandoverMode.REACTIVE, Endpoint(HERE[4], 4500))
            outcome = await run_handover(machine, protect=no_protection)
            storm.cancel()
            # the CTAR, the question, the CTAR with the cookie, the CTAA: a part of it again where this
            # process stood still for as long as the mobile node waits
            assert outcome.state is MobileState.ACTIVATED
            assert outcome.messages >= 4 and outcome.retransmissions <= 1
            for forger in forgers:
                forger.sock.close()

    asyncio.run(run())


def test_many_datagrams_wait_while_the_agent_does_something_else() -> None:
    async def run() -> None:
        async with serving(rate=1, source_rate=1) as (server, at):
            forger = Client(at)
            for _ in range(500):
                forger.send(a_ctar())
            await until(lambda: server.counters.received == 500)

    asyncio.run(run())


def test_cookies_of_others_and_of_long_ago_are_worth_nothing() -> None:
    async def run() -> None:
        async with serving(rate=1, source_rate=1) as (server, at):
            one, other = Client(at), Client(at)
            other.sock.bind(("127.0.0.77", 0))
            for _ in range(5):
                one.send(a_ctar())
            asked = []
            while (got := await one.receive(0.2)) is not None:
                block = cookies.asked(Ctaa.parse(got[0]))
                asked += [] if block is None else [block]
            assert asked
            shown = cookies.with_cookie(Ctar.parse(a_ctar()), asked[0]).serialize()
            before = server.counters.answered
            for sender in (other, one):
                sender.send(shown)
                await asyncio.sleep(0.05)
            await until(lambda: server.counters.answered == before + 1)
            assert (await one.receive()) is not None
            # it had another question, and no answer
            got = await other.receive()
            assert got is not None
            assert cookies.asked(Ctaa.parse(got[0])) is not None
            assert await other.receive(0.05) is None

    asyncio.run(run())


def test_only_so_many_at_work() -> None:
    async def run() -> None:
        release = asyncio.Event()

        async def slow(ctar: Ctar, source: Endpoint) -> bytes | None:
            await release.wait()
            return None

        async with serving(slow) as (server, at):
            client = Client(at)
            for _ in range(MAX_AT_WORK + 5):
                client.send(a_ctar())
                await asyncio.sleep(0)
            await until(lambda: server.counters.busy == 5)
            release.set()
            await until(lambda: server.counters.unanswered == MAX_AT_WORK)

    asyncio.run(run())


@pytest.mark.parametrize(("anywhere", "to"), [("0.0.0.0", "127.0.0.5"), ("::", "::1")])
def test_answers_leave_from_the_address_asked(anywhere: str, to: str) -> None:
    async def run() -> None:
        async with serving(at=Endpoint.of(anywhere, 0)) as (_, at):
            client = Client(Endpoint.of(to, at.port))
            client.send(a_ctar())
            got = await client.receive()
            assert got is not None
            assert got[1] == to
            assert Ctaa.parse(got[0]).mn == ip_address("198.51.100.7")

    asyncio.run(run())


def test_addresses_that_cannot_be_listened_at() -> None:
    async def run() -> None:
        async with serving() as (_, at):
            for wrong, hint in ((at, "second agent"), (Endpoint.of("192.0.2.1", 0), "does not have")):
                server = MnServer([Endpoint(HERE[4], 0), wrong], accept, protect=no_protection)
                with pytest.raises(LinkError) as error:
                    await server.start()
                assert hint in error.value.hint
                assert server.endpoints == []

    asyncio.run(run())


def test_without_privileges_the_error_says_so() -> None:
    def denied(sock: socket.socket) -> None:
        raise PermissionError(1, "Operation not permitted")

    async def run() -> None:
        server = MnServer([Endpoint(HERE[4], 0)], accept, protect=denied)
        with pytest.raises(LinkError) as error:
            await server.start()
        assert "CAP_NET_ADMIN" in error.value.hint
        machine = handover(Endpoint(HERE[4], 1), Endpoint(HERE[4], 2), HandoverMode.REACTIVE)
        with pytest.raises(LinkError) as error:
            await run_handover(machine, protect=denied)
        assert "CAP_NET_ADMIN" in error.value.hint
        assert machine.done

    asyncio.run(run())


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_bypass_sets_a_policy_for_both_directions(family: socket.AddressFamily) -> None:
    """struct xfrm_userpolicy_info: 168 octets, the family in the selector (40), direction (160), action 0."""

    class Fake:
        def __init__(self) -> None:
            self.family = family
            self.set: list[tuple[int, int, bytes]] = []
            self.error: OSError | None = None

        def setsockopt(self, level: int, option: int, value: bytes) -> None:
            self.set.append((level, option, value))
            if self.error is not None:
                raise self.error

    fake = Fake()
    bypass(fake)  # type: ignore[arg-type]
    at = (socket.IPPROTO_IP, 17) if family == socket.AF_INET else (socket.IPPROTO_IPV6, 35)
    assert [(level, option, len(value), value[160], value[161]) for level, option, value in fake.set] == [
        (*at, 168, direction, 0) for direction in (0, 1)
    ]
    assert all(int.from_bytes(value[40:42], sys.byteorder) == family for _, _, value in fake.set)
    # a kernel without IPsec has nothing to bypass; a refusal is one
    fake.error = OSError(next(iter(bypass_room._NO_XFRM)), "no such option")
    bypass(fake)  # type: ignore[arg-type]
    fake.error = PermissionError(1, "Operation not permitted")
    with pytest.raises(PermissionError):
        bypass(fake)  # type: ignore[arg-type]
