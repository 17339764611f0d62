"""New SPIs at a mobile node: what an answer names, and what a gateway asks for after a push."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ikectx.engine.ports import MoveReport
from ikectx.errors import CharonError, KernelError, LinkError, StoreError
from ikectx.numbers import Protocol
from ikectx.sa.context import Endpoint
from ikectx_cli.mobile.config import parse
from mobike_ext.address_update import AddressNotice
from mobike_ext.link import SpiReport
from mobike_ext.mirror import Mirror
from mobike_ext.naming import Names, Renaming, ask, ask_peer, mirrored
from mobike_ext.notify import Reason, UpdateSpi
from mobike_ext.requester import SaEnd
from mobike_ext.responder import Asked
from mobike_ext.spi_update import FRESH_OCTETS, Renamed, RenameRefused, SpiUpdate
from tests.asking_node import CONFIG
from tests.mobile_world import NEW, NSG, OLD, PSG, Crash, Node, a_node_context, do, quick
from vici_bridge.effects import mobile as effects_mobile
from vici_bridge.ha.messages import HaType
from vici_bridge.kernel.mute import MARK
from vici_bridge.mobile import spis as mobile_spis
from vici_bridge.mobile.spis import SpiWatch
from vici_bridge.own_names import OwnNames

__all__ = ["quick"]

CONTEXT = a_node_context(children=2)
FIRST, SECOND = CONTEXT.children
OWN, PEER = CONTEXT.spis


# Names that a gateway asks for.


def names(node: Node) -> Names:
    return OwnNames(node.host, node.sa)


@pytest.mark.parametrize("kernel", [True, False])
def test_what_a_mobile_node_grants(kernel: bool) -> None:
    node = Node(CONTEXT, kernel=kernel)
    here = names(node)
    for inbound, spi in ((True, FIRST.spi_in), (False, SECOND.spi_out)):
        assert here.known(Protocol.ESP, spi, inbound)
        assert not here.known(Protocol.ESP, spi, not inbound)
        assert not here.known(Protocol.AH, spi, inbound)
    assert here.known(Protocol.IKE, OWN, True) and here.known(Protocol.IKE, PEER, False)
    assert not here.known(Protocol.IKE, PEER, True)
    assert here.usable(Protocol.ESP, FIRST.spi_out, b"\xc9\0\0\1")
    assert not here.usable(Protocol.ESP, FIRST.spi_out, SECOND.spi_out)
    assert here.usable(Protocol.IKE, PEER, b"newnewne")
    assert not here.usable(Protocol.IKE, PEER, OWN)
    drawn = here.reserve(Protocol.ESP, FIRST.spi_in)
    assert drawn is not None and 0xC0 <= drawn[0] <= 0xCF
    assert here.reserve(Protocol.ESP, FIRST.spi_in) == drawn
    assert here.reserve(Protocol.ESP, SECOND.spi_in) not in (None, drawn)
    ike = here.reserve(Protocol.IKE, OWN)
    assert ike is not None and len(ike) == 8 and ike not in CONTEXT.spis
    assert here.objection(Protocol.ESP, FIRST.spi_in, True) is None
    node.host.record.forget(node.sa)
    assert not here.known(Protocol.ESP, FIRST.spi_in, True)
    assert not here.usable(Protocol.ESP, FIRST.spi_out, b"\xc9\0\0\1")
    assert names(node).reserve(Protocol.ESP, FIRST.spi_in) is None


def test_a_note_of_what_is_asked_comes_back_as_it_was() -> None:
    asks = (ask(Protocol.ESP, FIRST.spi_in, b"\xc9\0\0\1"), ask_peer(Protocol.IKE, PEER))
    note = Mirror(7, OLD, NSG, asks, b"i" * 64, b"f" * 512)
    assert Mirror.loads(note.dumps()) == note
    # the same octets, whoever sends them
    sent = [machine.to_send(0.0) for machine in (note.machine(CONTEXT), note.machine(CONTEXT))]
    assert sent[0] == sent[1] != []
    for raw in (b"", b"{}", b"[]", note.dumps()[:-1], note.dumps().replace(b'"c90', b'"000')):
        with pytest.raises(StoreError):
            Mirror.loads(raw)


PAIRS = (
    Renaming(Protocol.ESP, True, FIRST.spi_in, b"\xc9\0\0\1"),
    Renaming(Protocol.ESP, False, FIRST.spi_out, b"\xc9\0\0\2"),
)


class Watched:
    """`SpiWatch` on a modelled charon; the exchange is a stand-in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pairs: tuple[Renaming, ...] = PAIRS) -> None:
        self.node = Node(replace(CONTEXT, remote=NSG))
        self.outcome: Renamed | RenameRefused | None = Renamed(pairs)
        self.pairs = pairs
        self.said: list[tuple[tuple[UpdateSpi, ...], list[Any]]] = []
        self.dies = False
        monkeypatch.setattr(mobile_spis, "run_spi_update", self._run)
        monkeypatch.setattr(effects_mobile, "run_spi_update", self._run)
        monkeypatch.setattr(mobile_spis, "IN_TIME", 0.05)
        self.begin()
        # charon has gone to nSG's address, and answered its request 4
        self._count(initiator=9, responder=5)

    def begin(self) -> None:
        node = self.node
        node.begin()
        self.lock = asyncio.Lock()
        self.watch = SpiWatch(node.host, node.mobile, self.lock)
        node.host.on_change = self.watch.changed

    def _count(self, *, initiator: int, responder: int) -> None:
        from vici_bridge.ha import messages as ha
        from vici_bridge.ha.ike_id import IkeId

        ike = IkeId.of(CONTEXT.current)
        for ours, mid in ((True, initiator), (False, responder)):
            self.node.host.record.feed(ha.ike_mid(3, ike, initiator=ours, mid=mid))
        self.node.host.save()

    async def _run(self, machine: SpiUpdate, *, mark: int) -> SpiReport:
        assert mark == MARK
        assert self.node.charon.state == "PASSIVE"
        if self.node.kernel is not None:
            # the answer may be followed by packets at once
            wanted = {one.new for one in machine.asked if one.protocol is Protocol.ESP and not one.choose}
            assert wanted <= {*self.node.kernel.heard}
        assert self.node.host.own.of(self.node.sa).facts.mirror
        self.said.append((machine.asked, machine.to_send(0.0)))
        if self.dies:
            raise asyncio.CancelledError
        if self.outcome is None:
            raise LinkError("no answer")
        return SpiReport(MoveReport(requests=1), self.outcome)

    async def asked(self, source: Endpoint = NSG, message_id: int = 4) -> None:
        event = Asked(source, True, self.pairs, message_id=message_id)
        self.watch._asked(self.node.sa, event)
        await asyncio.gather(*self.watch._work, return_exceptions=True)

    @property
    def next_id(self) -> int:
        return self.node.host.record.context(self.node.sa).mid_initiator

    def settled(self, *children: tuple[bytes, bytes]) -> None:
        charon = self.node.charon
        assert charon.state == "ESTABLISHED"
        assert [(one.context.spi_in, one.context.spi_out) for one in charon.children] == list(children)
        assert not self.node.store.rows("mobile")
        assert not self.lock.locked()


SAME = ((FIRST.spi_in, FIRST.spi_out), (SECOND.spi_in, SECOND.spi_out))
OTHERS = (b"\xc9\0\0\1", b"\xc9\0\0\2")


def test_the_agent_asks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        w = Watched(monkeypatch)
        await w.asked()
        ((asks, _),) = w.said
        assert asks == mirrored(PAIRS)
        assert w.watch.renamed == 1
        assert sorted((c.context.spi_in, c.context.spi_out) for c in w.node.charon.children) == sorted(
            (OTHERS, SAME[1])
        )
        assert w.node.kernel is not None and w.node.kernel.lost == 0
        assert (w.next_id, w.node.charon.state) == (10, "ESTABLISHED")
        assert w.node.charon.rekeyed == []
        assert not w.node.host.own.of(w.node.sa).facts.mirror

    do(scenario())


def test_an_exchange_of_charons_in_flight_gives_its_message_id(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        w = Watched(monkeypatch)
        w.node.charon.tasks = ["CHILD_REKEY"]
        w.node.charon.children[0].state = "REKEYING"
        await w.asked()
        ((_, sent),) = w.said
        assert w.watch.renamed == 1
        assert sent[0][0][4:][20:24] == (8).to_bytes(4)  # behind the marker: SPIs, four octets, ID
        assert w.next_id == 9
        assert w.node.socket.heard.index(HaType.IKE_MID_INITIATOR) < w.node.socket.heard.index(
            HaType.CHILD_ADD
        )

    do(scenario())


@pytest.mark.parametrize("calls", [1, 3, 6])
def test_what_was_agreed_while_charon_does_not_answer(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """The gateway has the new SPIs, so this node must not go on with the old ones."""

    async def scenario() -> None:
        w = Watched(monkeypatch)
        view, run, left = w.node.host.view, w._run, [0]

        async def away(sa: Any) -> Any:
            if left[0] > 0:
                left[0] -= 1
                raise CharonError("charon did not answer in time")
            return await view(sa)

        async def agreed(machine: SpiUpdate, *, mark: int) -> SpiReport:
            if not w.said:
                left[0] = calls
            return await run(machine, mark=mark)

        monkeypatch.setattr(w.node.host, "view", away)
        monkeypatch.setattr(mobile_spis, "run_spi_update", agreed)
        await w.asked()
        assert len({str(sent) for _, sent in w.said}) == 1, "the same request, octet for octet"
        w.settled(SAME[1], OTHERS)

    do(scenario())


@pytest.mark.parametrize("outcome", [None, RenameRefused((Reason.BUSY,))])
def test_a_gateway_that_does_not_agree(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> None:
    async def scenario() -> None:
        w = Watched(monkeypatch)
        w.outcome = outcome
        await w.asked()
        assert len(w.said) == 1
        assert w.watch.renamed == 0
        assert w.next_id == (9 if outcome is None else 10)
        w.settled(*SAME)

    do(scenario())


def test_charon_must_have_answered_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        for message_id, source in ((5, NSG), (4, NEW)):
            w = Watched(monkeypatch)
            await w.asked(source, message_id)
            assert w.said == []
            w.settled(*SAME)

    do(scenario())


def test_a_gateway_that_does_not_wait_any_more_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has rekeyed the SA: charon has answered a further request of its."""

    async def scenario() -> None:
        w = Watched(monkeypatch)
        w._count(initiator=9, responder=6)
        await w.asked()
        assert w.said == []
        w.settled(*SAME)

    do(scenario())


def test_an_agent_without_a_cpu_asks_back_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        w = Watched(monkeypatch)
        monkeypatch.setattr(mobile_spis, "IN_TIME", 6.0)
        event = Asked(NSG, True, PAIRS, message_id=4)
        await w.watch._ask_back(w.node.sa, event, asyncio.get_running_loop().time() - 5.0)
        assert w.watch.renamed == 1

    do(scenario())


def test_an_sa_that_cannot_be_passive(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        w = Watched(monkeypatch)
        w.node.charon.state = "REKEYING"
        await w.asked()
        assert w.said == []
        w.node.charon.state = "ESTABLISHED"
        w.settled(*SAME)

    do(scenario())


def test_the_ike_sa_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        w = Watched(monkeypatch, (*PAIRS, Renaming(Protocol.IKE, False, PEER, b"newnewne")))
        await w.asked()
        assert w.watch.renamed == 1
        assert w.node.charon.context.spis == (OWN, b"newnewne")
        assert w.node.charon.state == "ESTABLISHED"
        context = w.node.host.record.context((OWN, b"newnewne"))
        assert (context.mid_initiator, context.mid_responder) == (0, 0)

    do(scenario())


def test_a_child_whose_rekey_ends_with_the_ike_sas_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        w = Watched(monkeypatch, (Renaming(Protocol.IKE, False, PEER, b"newnewne"),))
        w.node.charon.tasks = ["CHILD_REKEY"]
        w.node.charon.children[0].state = "REKEYING"
        await w.asked()
        assert w.watch.renamed == 1
        assert [child.state for child in w.node.charon.children] == ["INSTALLED", "INSTALLED"]
        assert sorted((c.context.spi_in, c.context.spi_out) for c in w.node.charon.children) == sorted(SAME)

    do(scenario())


def test_an_agent_that_dies_while_it_asks_says_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        w = Watched(monkeypatch)
        w.dies = True
        loud = w.node.mobile.loud

        async def dead(sa: Any) -> None:
            raise asyncio.CancelledError

        monkeypatch.setattr(w.node.mobile, "loud", dead)
        await w.asked()
        assert w.node.charon.state == "PASSIVE"
        del loud
        w.begin()
        w.dies = False
        await w.watch.resume()
        await w.node.mobile.resume()
        assert w.said[0] == w.said[1]
        assert w.watch.renamed == 1
        assert w.node.charon.state == "ESTABLISHED"
        assert {(c.context.spi_in, c.context.spi_out) for c in w.node.charon.children} == {OTHERS, SAME[1]}
        assert not w.node.host.own.of(w.node.sa).facts.mirror

    do(scenario())


@pytest.mark.parametrize("ike", [False, True])
@pytest.mark.parametrize("in_flight", [False, True])
def test_a_crash_at_any_step(monkeypatch: pytest.MonkeyPatch, ike: bool, in_flight: bool) -> None:
    """What nSG has agreed to is what this node has, whenever its agent dies; else nothing has changed."""
    pairs = (*PAIRS, *([Renaming(Protocol.IKE, False, PEER, b"newnewne")] if ike else []))

    async def crashed(step: int) -> bool:
        w = Watched(monkeypatch, pairs)
        node = w.node
        if in_flight:
            node.charon.tasks = ["CHILD_REKEY"]
            node.charon.children[1].state = "REKEYING"
        node.fuse.at = node.fuse.count + step
        event = Asked(NSG, True, pairs, message_id=4)
        try:
            await w.watch._ask_back(node.sa, event, asyncio.get_running_loop().time())
            ended = True
        except (Crash, asyncio.CancelledError):
            ended = False
        node.charon.tasks = []
        w.begin()
        await w.watch.resume()
        await node.mobile.resume()
        assert all(sent == w.said[0] for sent in w.said)
        agreed = bool(w.said)
        assert {(c.context.spi_in, c.context.spi_out) for c in node.charon.children} == {
            OTHERS if agreed else SAME[0],
            SAME[1],
        }
        assert len(node.charon.children) == 2
        name = (OWN, b"newnewne") if ike and agreed else node.sa
        assert (node.charon.context.spis, node.charon.state) == (name, "ESTABLISHED")
        node.host.record.retain({name})  # as when charon's list is compared
        assert node.host.record.names() == (name,)
        used = 8 if in_flight else 9
        mid = 0 if ike and agreed else used + 1 if agreed else 9
        assert node.host.record.context(name).mid_initiator == mid
        assert not node.store.rows("mobile")
        return ended

    async def every() -> int:
        step = 1
        while not await crashed(step):
            step += 1
        return step

    assert do(every()) > 15


def test_a_note_that_is_of_no_use_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        w = Watched(monkeypatch)
        note = Mirror(3, OLD, NSG, mirrored(PAIRS), b"i" * 64, b"f" * 512)
        w.node.host.own.note(w.node.sa, mirror=note.dumps())
        await w.watch.resume()  # active: what was asked has come to its end
        w.settled(*SAME)
        w.node.host.own.note(w.node.sa, mirror=b"?")
        await w.node.mobile.quiet(w.node.sa)
        await w.watch.resume()
        await w.node.mobile.loud(w.node.sa)
        w.settled(*SAME)
        assert w.said == []

    do(scenario())


@pytest.mark.parametrize("answers", [True, False])
def test_a_message_id_is_used_up(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    async def scenario() -> None:
        w = Watched(monkeypatch, ())
        w.outcome = Renamed(()) if answers else None
        await w.node.mobile.quiet(w.node.sa)
        assert await w.node.mobile.use_up(w.node.sa, 8, NEW, PSG) == (9 if answers else 8)
        ((asks, sent),) = w.said
        assert (asks, sent[0][1]) == ((), PSG)
        assert w.next_id == 9
        await w.node.mobile.loud(w.node.sa)
        w.settled(*SAME)

    do(scenario())


# In charon's stead, while a handover keeps it passive.


def gateways_request(
    asks: tuple[UpdateSpi, ...], message_id: int = 5, addresses: bool = True
) -> tuple[SpiUpdate, bytes]:
    (current,) = CONTEXT.generations
    machine = SpiUpdate(
        SaEnd(replace(current, initiator=False), message_id, NSG, NEW),
        asks,
        iv=bytes(64),
        fresh=bytes(FRESH_OCTETS),
        address=AddressNotice(bytes(16)) if addresses else None,
    )
    ((datagram, _),) = machine.to_send(0.0)
    return machine, datagram


@pytest.mark.parametrize("ike", [False, True])
def test_the_new_gateway_asks_by_ike_during_a_handover(monkeypatch: pytest.MonkeyPatch, ike: bool) -> None:
    asks = (
        ask(Protocol.ESP, FIRST.spi_out, OTHERS[1]),
        ask_peer(Protocol.ESP, FIRST.spi_in),
        *([ask(Protocol.IKE, PEER, b"newnewne")] if ike else []),
    )

    async def scenario() -> None:
        w = Watched(monkeypatch)
        machines: list[Any] = []

        class Gateway(Requests):
            """Asks once, and once more."""

            async def next(self) -> Any:
                machine = self.machine
                if not machines:
                    machines.append(machine)
                    self.update, datagram = gateways_request(asks)
                    machine.receive(datagram, PSG, 0.0)
                    assert machine.next_event() is None  # another gateway's
                    machine.receive(datagram, NSG, 0.0)
                    return machine.next_event()
                if not ike and len(machines) == 1:
                    machines.append(machine)
                    _, datagram = gateways_request((ask(Protocol.ESP, OTHERS[1], b"\xc9\0\0\7"),), 6)
                    machine.receive(datagram, NSG, 5.0)
                    return machine.next_event()
                return await super().next()

            def answer(self, refusal: Reason | None = None) -> None:
                if len(machines) == 2:
                    assert refusal is Reason.BUSY
                    return
                machine = self.machine
                machine.answer(bytes(256), 0.0, refusal)
                for answer, to in machine.to_send(0.0):
                    assert to == NSG
                    self.update.receive(answer, NEW, 0.0)
                events = [self.update.next_event(), self.update.next_event()]
                (renamed,) = (event for event in events if isinstance(event, Renamed))
                assert len(renamed.pairs) == len(asks)

        monkeypatch.setattr(mobile_spis, "serving", served(Gateway))
        await w.node.mobile.quiet(w.node.sa)
        async with w.watch.answering(w.node.sa, NEW, [NSG.address]) as moved:
            after = await moved
        assert (after.local, after.remote) == (NEW, NSG)
        assert after.spis == ((OWN, b"newnewne") if ike else w.node.sa)
        await w.node.mobile.loud(w.node.sa)
        assert (w.node.charon.state, w.node.charon.remote) == ("ESTABLISHED", NSG)
        assert {c.context.spi_out for c in w.node.charon.children} == {OTHERS[1], SECOND.spi_out}
        assert FIRST.spi_in not in {c.context.spi_in for c in w.node.charon.children}
        now = w.node.host.record.context(after.spis)
        assert now.mid_responder == (0 if ike else 6)
        assert w.watch.renamed == 1
        # under its old SPIs it goes on to answer that request
        assert bool(w.watch._work) is ike
        await w.watch.close()

    do(scenario())


# What is listened to.


class Requests:
    """None come."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine

    async def next(self) -> Any:
        await asyncio.Event().wait()


def served(requests: type[Requests]) -> Any:
    """`link.serving` without a network."""

    @contextmanager
    def serving(machine: Any, *, mark: int) -> Iterator[Requests]:
        yield requests(machine)

    return serving


@pytest.mark.parametrize("moves", [True, False])
def test_a_change_that_fails_is_not_answered_as_if_it_were_done(
    monkeypatch: pytest.MonkeyPatch, moves: bool
) -> None:
    """One of SPIs alone is refused as busy; of the gateway's address, charon answers the next copy."""

    async def scenario() -> None:
        w = Watched(monkeypatch)
        answered: list[Reason | None] = []
        asked: list[Asked] = []

        class Gateway(Requests):
            async def next(self) -> Any:
                if asked:
                    await super().next()
                asked.append(Asked(NSG, moves, PAIRS))
                return asked[0]

            def answer(self, refusal: Reason | None = None) -> None:
                answered.append(refusal)

        async def readdress(*_: Any) -> None:
            raise CharonError("no such SA")

        monkeypatch.setattr(mobile_spis, "serving", served(Gateway))
        monkeypatch.setattr(w.node.mobile, "readdress", readdress)
        async with w.watch.answering(w.node.sa, NEW, [NSG.address]) as moved:
            await asyncio.sleep(1.0)
            assert answered == ([] if moves else [Reason.BUSY])
            assert not moved.done()

    do(scenario())


def test_no_spi_is_granted_while_the_kernel_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        w = Watched(monkeypatch)
        names = OwnNames(w.node.host, w.node.sa)
        assert names.usable(Protocol.ESP, FIRST.spi_out, OTHERS[1])
        assert names.reserve(Protocol.ESP, FIRST.spi_in)

        def get_sa(*_: Any) -> None:
            raise KernelError("no buffer space")

        monkeypatch.setattr(w.node.kernel, "get_sa", get_sa)
        assert not names.usable(Protocol.ESP, FIRST.spi_out, OTHERS[1])
        assert names.reserve(Protocol.ESP, SECOND.spi_in) is None

    do(scenario())


def test_it_listens_to_each_sa_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        w = Watched(monkeypatch)
        heard: list[tuple[Any, Endpoint, int]] = []
        ended: list[Endpoint] = []

        class Gateway(Requests):
            told = False

            async def next(self) -> Any:
                if self.told:
                    try:
                        await super().next()
                    finally:
                        ended.append(self.machine.local)
                self.told = True
                heard.append((self.machine.spis, self.machine.local, self.machine.expected_id))
                assert not self.machine.answering
                return Asked(NSG, True, (), (Reason.BUSY,))

        monkeypatch.setattr(mobile_spis, "serving", served(Gateway))
        monkeypatch.setattr(mobile_spis, "SETTLE", 0.001)
        listed = w.node.charon.list_sas

        def away() -> Any:
            w.node.charon.list_sas = listed  # type: ignore[method-assign]
            raise CharonError("not yet")

        w.node.charon.list_sas = away  # type: ignore[method-assign]
        monkeypatch.setattr(mobile_spis, "AGAIN", 0.001)
        w.watch.start()
        await asyncio.sleep(1)
        assert w.watch.watched == 1
        for _ in range(2):
            w.watch.changed()
            await asyncio.sleep(1)
        assert heard == [(w.node.sa, OLD, 5)]
        w.node.charon.local = NEW
        w.watch.changed()
        await asyncio.sleep(1)
        assert [local for _, local, _ in heard] == [OLD, NEW]
        assert ended == [OLD]
        w.node.charon.gone = True
        w.watch.changed()
        await asyncio.sleep(1)
        assert ended == [OLD, NEW]
        await w.watch.close()
        w.node.charon.gone = False
        w.watch.changed()
        await asyncio.sleep(1)
        assert w.watch.watched == 0

    do(scenario())


def test_an_sa_that_nobody_moves_is_never_passive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever terminates a passive SA destroys it without a Delete, and its gateway keeps a ghost."""

    async def scenario() -> None:
        w = Watched(monkeypatch)

        async def quiet(*_: Any, **__: Any) -> None:
            raise AssertionError("made passive")

        monkeypatch.setattr(mobile_spis, "serving", served(Requests))
        monkeypatch.setattr(mobile_spis, "SETTLE", 0.001)
        monkeypatch.setattr(w.node.mobile, "quiet", quiet)
        w.watch.start()
        for _ in range(3):
            w.watch.changed()  # as after a rekey
            await asyncio.sleep(3)
        assert w.said == []
        assert w.watch.watched == 1
        await w.watch.close()

    do(scenario())


def test_names_that_are_asked_for_before_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway asks from its own address, where charon does not see it yet: it is asked back there."""

    async def scenario() -> None:
        w = Watched(monkeypatch)
        w.node = Node(replace(CONTEXT, remote=PSG))
        w.begin()
        w._count(initiator=9, responder=5)
        event = Asked(NSG, False, PAIRS, message_id=4)
        w.watch._asked(w.node.sa, event)
        await asyncio.gather(*w.watch._work, return_exceptions=True)
        ((asks, sent),) = w.said
        assert asks == mirrored(PAIRS)
        assert sent[0][1] == NSG
        assert (w.watch.renamed, w.node.charon.remote) == (1, NSG)
        assert w.node.charon.state == "ESTABLISHED"

    do(scenario())


def test_no_spi_is_changed_if_that_is_not_allowed_but_an_invitation_is_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert parse(CONFIG, Path("mobile.toml")).node.settings.update_spi
    off = parse(CONFIG.replace("[mobile]\n", "[mobile]\nupdate_spi = false\n"), Path("mobile.toml"))
    assert not off.node.settings.update_spi

    async def scenario() -> None:
        w, went = Watched(monkeypatch), list[Any]()

        async def invited(*where: Any) -> None:
            went.append(where)

        w.watch = SpiWatch(w.node.host, w.node.mobile, w.lock, allowed=False)
        w.watch.invited = invited
        await w.asked()
        assert w.said == []
        w.watch._asked(w.node.sa, Asked(NSG, True, (), message_id=4, invitation="nsg"))
        await asyncio.gather(*w.watch._work)
        assert went == [("nsg", w.node.sa)]
        monkeypatch.setattr(mobile_spis, "serving", served(Requests))
        w.watch.start()
        await asyncio.sleep(1)
        assert w.watch.watched == 1
        await w.watch.close()

    do(scenario())


def test_what_comes_during_a_handover_is_heard_when_it_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        w = Watched(monkeypatch)
        event = Asked(NSG, True, PAIRS, message_id=4)

        class Gateway(Requests):
            times = 0

            async def next(self) -> Any:
                self.times += 1
                if self.times == 1:
                    await w.lock.acquire()
                elif self.times == 2:
                    assert self.machine.expected_id == 4
                    w.lock.release()
                else:
                    assert self.machine.expected_id == 5
                    return None
                self.machine.expected_id = 5
                return event

        monkeypatch.setattr(mobile_spis, "serving", served(Gateway))
        await w.watch._listen(w.node.sa, OLD)
        await asyncio.gather(*w.watch._work)
        assert len(w.said) == 1
        assert w.watch.renamed == 1

    do(scenario())
