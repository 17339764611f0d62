"""Transfers, commands, connections and mobile nodes that cross: what one does must not hold up another."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from ikectx.engine.inbox import OPEN
from ikectx.engine.journal import JournalEntry
from ikectx.engine.journaled import MobileConfig
from ikectx.errors import BusyError, LinkError, StoreError
from ikectx.net.links import WINDOW
from ikectx.numbers import Status
from ikectx.peer import PeerConfig
from ikectx.sa.context import Endpoint
from ikectx.timing import Timing
from ikectx.wire.cxtp import Ctar, Ctd, Pctd, compute_token
from ikectx.wire.full_ctd import final_of
from ikectx.wire.profile import TransferHeader, encode, encode_final
from ikectx.wire.tokens import Purpose, token_key
from ikectx.wire.whereabouts import What, Whereabouts
from tests.across import test_strangers
from tests.across.test_strangers import Stranger, first, strangers
from tests.hand_loop import run, wall
from tests.mobile_nodes import MobileNode, serve
from tests.peers import Network, a_context
from tests.worlds import World, quietly, world

REAL = Timing()
"""As in the product."""


# Mobile nodes with one address: RFC 4067 names them by no more than that.


def test_one_in_doubt_does_not_hold_up_the_other_behind_its_nat() -> None:
    async def scenario() -> None:
        async with world(names=("a", "b", "c"), timing=REAL) as w:
            one, two = w.a.daemon.serve(a_context(1)), w.a.daemon.serve(a_context(2))
            doubt = asyncio.create_task(w.a.agent.transfer(one, "b"))
            w.b.daemon.wait["take"] = asyncio.Event()
            await w.b.reaches("take")
            await w.b.kill()
            began = wall()
            assert (await w.a.agent.transfer(two, "b")).result == "kept"
            assert wall() - began < 60
            assert (await w.a.agent.transfer(two, "c")).result == "moved"
            mn = MobileNode(a_context(2), nsg="a", psg="c")
            assert mn.says(await w.a.agent.ctar(*mn.arrive())) is Status.OK
            assert (await doubt).result == "in-doubt"

    with quietly():
        run(scenario(), 1000)


def test_who_waits_for_its_turn_can_be_cancelled() -> None:
    async def scenario() -> None:
        async with world(timing=REAL) as w:
            one, two = w.a.daemon.serve(a_context(1)), w.a.daemon.serve(a_context(2))
            gate = w.a.daemon.wait["freeze"] = asyncio.Event()
            slow = asyncio.create_task(w.a.agent.transfer(one, "b"))
            await w.a.reaches("freeze")
            waiting = asyncio.create_task(w.a.agent.transfer(two, "b"))
            await asyncio.sleep(1)
            (ident,) = [r.transfer_id.hex() for r in w.a.engine.transfers.open.values() if r.sa == two]
            assert w.a.agent.cancel(ident)
            assert (await waiting).result == "kept"
            mn = MobileNode(a_context(2))
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is None
            gate.set()
            await slow

    run(scenario(), 1000)


@pytest.mark.parametrize("busy", [False, True])
def test_what_was_sent_ahead_for_two_behind_a_nat(busy: bool) -> None:
    """The end of the first's handover is a CTC, which the new gateway takes for both."""

    async def scenario() -> None:
        async with world(timing=REAL) as w:
            one = serve(w, a_context(1), sequence=1)
            two = serve(w, a_context(2), sequence=2, at=Endpoint.of("203.0.113.6", 4500))
            for mn in (one, two):
                assert mn.says(await w.a.agent.ctar(*mn.announce()), Purpose.ANNOUNCE) is Status.OK
            if busy:
                w.a.daemon.fail["freeze"] = [BusyError("an exchange is in flight")]
                await w.b.agent.ctar(*one.arrive())
            began = wall()
            assert two.says(await w.b.agent.ctar(*two.arrive())) is Status.OK
            assert wall() - began < 1
            await asyncio.sleep(100)
            assert w.owner(two.sa) == "b"

    with quietly():
        run(scenario(), 1000)


def test_a_ctc_ends_nothing_that_was_not_offered() -> None:
    async def scenario() -> None:
        async with world(timing=REAL) as w:
            names = [w.a.daemon.serve(a_context(number)) for number in (1, 2, 3)]
            gate = w.a.daemon.wait["freeze"] = asyncio.Event()
            moves = [asyncio.create_task(w.a.agent.transfer(names[0], "b"))]
            await w.a.reaches("freeze")
            moves += [asyncio.create_task(w.a.agent.transfer(name, "b")) for name in names[1:]]
            await asyncio.sleep(REAL.hold + 10)
            gate.set()
            assert [(await move).result for move in moves][1:] == ["moved", "moved"]
            await w.quiet()
            assert w.b.daemon.passive == {}

    with quietly():
        run(scenario(), 1000)


# Connections.


async def cut(w: World) -> None:
    for link in list(w.b.agent._driver._open.values()):
        link.close(LinkError("cut"))
    await asyncio.sleep(0.01)


@pytest.mark.parametrize("step", ["export", "freeze", "thaw"])
@pytest.mark.parametrize("how", ["token", "pull"])
def test_who_asks_again_over_another_connection_is_answered_over_that(how: str, step: str) -> None:
    async def scenario() -> None:
        async with world(timing=REAL, rights=frozenset({"push", "pull"})) as w:
            mn = serve(w, a_context(1))
            before = "freeze" if step == "thaw" else step
            gate = w.a.daemon.wait[before] = asyncio.Event()
            asking = asyncio.create_task(
                w.b.agent.ctar(*mn.arrive()) if how == "token" else w.b.agent.pull("a", mn.home)  # type: ignore[arg-type]
            )
            await w.a.reaches(before)
            thaw = w.a.daemon.wait["thaw"] = asyncio.Event()
            began = wall()
            await cut(w)
            if step == "thaw":
                gate.set()
            await asyncio.sleep(3)
            gate.set()
            thaw.set()
            await asking
            assert wall() - began < 5
            await w.quiet()
            assert w.owner(mn.sa) == "b"

    with quietly():
        run(scenario(), 1000)


async def floods(network: Network, offers: list[Pctd], links: int) -> None:
    """As many messages as are read, over many connections, each closed before the next."""
    left = iter(offers)
    for _ in range(links):
        rogue = Stranger(await network.dial_from("a")(PeerConfig("b", "b")))
        for _ in range(WINDOW + 10):
            await rogue.send(next(left))
        await asyncio.sleep(0.01)
        rogue._stream.close()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("nodes", [1, 5000])
def test_a_peer_that_dials_again_and_again_keeps_no_more_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    made: list[Network] = []

    class Known(Network):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    def offer(number: int) -> Pctd:
        node = number % nodes
        context = a_context(1 + node, mn=f"198.51.{node >> 8}.{node & 255}")
        header = TransferHeader(number.to_bytes(8), "check", "update")
        return Pctd(context.remote.address, encode(context, transfer=header))

    async def scenario() -> None:
        async with strangers(tmp_path, "a") as (daemon, gateway, _):
            gate = daemon.wait["check"] = asyncio.Event()
            await floods(made[0], [offer(number) for number in range(20 * (WINDOW + 10))], 20)
            boxes = gateway._driver.engine._inboxes._open
            assert daemon.calls.count("check") == min(nodes, OPEN) == len(boxes)
            assert sum(len(box.items) for box in boxes.values()) <= 2 * WINDOW
            gate.set()

    monkeypatch.setattr(test_strangers, "Network", Known)
    with quietly():
        run(scenario(), 1000)


# Disks.


def test_a_peer_s_offers_are_bounded_while_nothing_can_be_written(tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise StoreError("the disk is full")

    async def scenario() -> None:
        async with strangers(tmp_path, "a") as (_, gateway, (a,)):
            gateway._store._flush = full  # type: ignore[attr-defined]
            for number in range(1, 2 * OPEN):
                context = a_context(1 + number % 5, mn=f"198.51.100.{1 + number % 5}")
                header = TransferHeader(number.to_bytes(8), "prepare", "update")
                said = first(await a.ask(Pctd(context.remote.address, encode(context, transfer=header))))
                assert said is (Status.FAILED if number <= OPEN else Status.BUSY)
            assert len(gateway._driver.engine._scheduler.processes) <= OPEN + 1

    with quietly():
        run(scenario(), 1000)


def test_an_old_journal_that_cannot_be_written_is_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ident, context = b"old00001", a_context(1)
    gateway_of = test_strangers.Gateway

    def full(*_: object) -> None:
        raise StoreError("the disk is full")

    def made(
        name: str, source: object, sink: object, store: object, *more: object, **options: object
    ) -> object:
        sink.serve(context)  # type: ignore[attr-defined]
        address = str(context.remote.address)
        header = TransferHeader(ident, "prepare", "update")
        offered = Pctd(context.remote.address, encode(context, transfer=header)).serialize()
        entry = JournalEntry(ident, "target", "a", context.spis, "mn", address, "prepared", 0, 1.0, 1.0)
        store.write(replace(entry, context=offered))  # type: ignore[attr-defined]
        store._flush = full  # type: ignore[attr-defined]
        return gateway_of(name, source, sink, store, *more, **options)  # type: ignore[arg-type]

    async def scenario() -> None:
        async with strangers(tmp_path, "a", has="old") as (daemon, _, (a,)):
            await asyncio.sleep(0.1)
            before = len(daemon.calls)
            final = Ctd(context.remote.address, encode_final(replace(final_of(context), epoch=1), ident))
            assert first(await a.ask(final)) is Status.OK
            assert len(daemon.calls) - before <= 1

    monkeypatch.setattr(test_strangers, "Gateway", made)
    with quietly():
        run(scenario(), 1000)


@pytest.mark.parametrize("read", [False, True])
def test_a_notice_that_the_store_did_not_give_once_is_told_all_the_same(
    monkeypatch: pytest.MonkeyPatch, read: bool
) -> None:
    async def scenario() -> None:
        async with world() as w:
            failing, times = ("items" if read else "delete"), [1]
            real = getattr(w.a.store, failing)

            def fails(*args: object, **options: object) -> object:
                if times and args[0] == "notice":
                    times.pop()
                    raise StoreError("the disk is full")
                return real(*args, **options)

            monkeypatch.setattr(w.a.store, failing, fails)
            await w.a.agent._driver.ask(_tell(a_context(1)))
            await w.a.agent._driver.ask(_tell(a_context(2)))
            await asyncio.sleep(500)
            assert not times and w.a.store.items("notice") == []

    with quietly():
        run(scenario(), 1000)


def _tell(context: object) -> object:
    from ikectx.engine.core import Tell

    return Tell("b", Whereabouts(context.spis, 1, What.ENDED))  # type: ignore[attr-defined]


# Rogues.


@pytest.mark.parametrize("later", [10, 400, 86400])
def test_a_token_of_the_rfc_is_used_once(later: int) -> None:
    """It has no end of its own. A recorded one, sent from elsewhere when its mobile node is at home again."""

    async def scenario() -> None:
        async with world() as w:
            w.mobile = MobileConfig(rfc_token=True)
            w.addresses = {"a": "192.0.2.1", "b": "192.0.2.2"}
            for side in (w.a, w.b):
                await side.restart()
            context = a_context(1)
            sa, home = w.a.daemon.serve(context), context.remote.address
            token = compute_token(token_key(context.current, 77).reveal(), home, 77, ())
            recorded = Ctar(home, ip_address("192.0.2.1"), 77, token, (), True)
            await w.b.agent.ctar(recorded, Endpoint.of("203.0.113.5", 5091))
            await w.quiet()
            assert w.owner(sa) == "b"
            assert (await w.b.agent.transfer(sa, "a")).result == "moved"
            w.a.daemon.served[sa] = replace(w.a.daemon.served[sa], remote=context.remote)
            w.wall += later
            for side in (w.a, w.b):
                await side.restart()
            await asyncio.sleep(1)
            expiry = round(wall() + w.wall + 60)
            other = serve(w, a_context(2, mn="198.51.100.8"), sequence=99, more={"expiry": expiry})
            await w.b.agent.ctar(*other.arrive())  # the notes of used tokens are looked through
            await w.quiet()
            await w.b.agent.ctar(recorded, Endpoint.of("192.0.2.66", 5091))
            await w.quiet()
            assert w.owner(sa) == "a"

    with quietly():
        run(scenario(), 1000)


@pytest.mark.parametrize("how", ["offer", "let go"])
@pytest.mark.parametrize("epoch", [1 << 32, (1 << 32) - 1, 1 << 31])
def test_a_peer_that_never_had_an_sa_cannot_pin_it(how: str, epoch: int) -> None:
    """Its IKE SPIs can be read on the wire."""

    async def scenario() -> None:
        async with world(names=("a", "b", "c"), brings={}) as w:
            context = a_context(1)
            sa = w.a.daemon.serve(context)
            rogue = Stranger(await w.network.dial_from("c")(PeerConfig("a", "a")))
            header = TransferHeader(b"evil0001")
            if how == "offer":
                blocks = encode(replace(context, epoch=epoch), transfer=header)
                said = first(await rogue.ask(Pctd(context.remote.address, blocks)))
            else:
                blocks = encode_final(replace(final_of(context), epoch=epoch), b"evil0001")
                said = first(await rogue.ask(Ctd(context.remote.address, blocks)))
                assert said is Status.IN_DOUBT
            assert said is not Status.OK and w.a.agent.audit() == []
            for source, target in (("a", "b"), ("b", "a"), ("a", "b")):
                assert (await w.sides[source].agent.transfer(sa, target)).result == "moved"
                await w.quiet()

    with quietly():
        run(scenario(), 1000)
