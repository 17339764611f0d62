"""What an MN asks while its SA is mute reaches charon afterwards: the recorder, and nSG's side of it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from ikectx.errors import LinkError
from ikectx.numbers import Protocol
from ikectx.sa.context import Endpoint, IkeContext
from mobike_ext.naming import ask, asks_for_names
from mobike_ext.packet_hold import MOST, Held, deliver
from mobike_ext.requester import SaEnd
from mobike_ext.spi_update import FRESH_OCTETS, SpiUpdate
from tests.gateway_world import Place
from tests.mobike_ext.test_watch import (
    ENDS,
    MN,
    MN6,
    NAME,
    US,
    US6,
    header,
    host,
    pair,
    part,
    probe,
    root,
    udp,
)
from tests.vici_bridge.effects.test_sink import a_context, final_of, move, place, run
from vici_bridge.effects.sink import CharonSink
from vici_bridge.kernel.message_ids import MessageIds
from vici_bridge.kernel.mute import MARK, Mute


def hears(us: Endpoint, mn: Endpoint, sent: list[bytes], **more: Any) -> list[bytes]:
    """What charon at `us` gets of what `mn` sent it: while it is mute, then after `deliver`."""
    got: list[bytes] = []

    async def scenario() -> int:
        held = Held(NAME, us, mn, mark=MARK, **more)
        for payload in sent:
            node.sendto(payload, (str(us.address), us.port))
        with pytest.raises(TimeoutError):
            charon.recv(2000)
        silence.unmute(NAME)
        return await held.deliver()

    with host(), udp(us) as charon, udp(mn) as node:
        charon.settimeout(0.2)
        node.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)  # the MN is no host of its own here
        silence = Mute()
        noted = MessageIds()
        noted.prepare()
        silence.mute_in(NAME)
        count = asyncio.run(scenario())
        while True:
            try:
                got.append(charon.recv(2000))
            except TimeoutError:
                break
        assert len(got) == count
        assert noted.after(NAME) == (0, 0), "what the MN asked is noted as if charon had"
        noted.close()
    return got


@root
@pytest.mark.parametrize(("us", "mn"), ENDS, ids=str)
def test_a_request_is_given_to_charon_later(us: Endpoint, mn: Endpoint) -> None:
    marker = b"" if {us.port, mn.port} == {500} else bytes(4)
    assert hears(us, mn, [marker + probe()]) == [marker + probe()]


@root
def test_fragments_come_in_order_and_repetitions_once() -> None:
    us, mn = ENDS[0]
    parts = [bytes(4) + part(number, 2) for number in (1, 2)]
    assert hears(us, mn, [*parts, *parts]) == parts


@root
def test_what_is_no_request_of_this_sa_is_not_given() -> None:
    us, mn = ENDS[0]
    others = [
        bytes(4) + probe(response=True),
        b"\xc0\xff\xee\x01" + probe(),  # ESP in UDP
        bytes(4) + probe(pair(7)),
        bytes(4) + header()[:20],
    ]
    with host(), udp(us), udp(mn) as node:

        async def scenario() -> int:
            held = Held(NAME, us, mn, mark=MARK)
            for payload in others:
                node.sendto(payload, (str(us.address), us.port))
            return await held.deliver()

        assert asyncio.run(scenario()) == 0


@root
def test_a_request_that_came_before_is_given_first_and_once() -> None:
    us, mn = ENDS[0]
    parts = [part(number, 2) for number in (1, 2)]
    later = bytes(4) + probe(message_id=3)
    sent = [bytes(4) + parts[1], later]
    assert hears(us, mn, sent, request=parts) == [*(bytes(4) + one for one in parts), later]


@root
def test_what_is_not_charons_to_answer_is_left_out() -> None:
    us, mn = ENDS[0]
    sent = [bytes(4) + probe(message_id=number) for number in (2, 3)]
    assert hears(us, mn, sent, skip=lambda datagram: datagram[20:24] == (2).to_bytes(4)) == sent[1:]


def test_the_agents_request_is_told_from_charons() -> None:
    node, gateway = a_context(1).current, replace(a_context(1).current, initiator=False)
    node = replace(node, initiator=True)
    ends = Endpoint.of("198.51.100.7", 500), Endpoint.of("192.0.2.2", 500)
    for asks, told in (((ask(Protocol.ESP, b"\xc1\0\0\0", b"\xc1\0\0\1"),), True), ((), False)):
        machine = SpiUpdate(SaEnd(node, 2, *ends), asks, iv=bytes(64), fresh=bytes(FRESH_OCTETS))
        ((datagram, _),) = machine.to_send(0.0)
        assert asks_for_names(gateway, datagram) is told
        assert not asks_for_names(node, datagram)
        assert not asks_for_names(gateway, datagram[:-1] + b"?")
    assert not asks_for_names(gateway, b"")


@root
@pytest.mark.parametrize(("us", "mn"), [(US, MN), (US6, MN6)], ids=str)
def test_the_mns_address_need_not_be_ours_to_send_from(us: Endpoint, mn: Endpoint) -> None:
    with host(), udp(us) as charon:
        deliver([probe()], us, mn)
        data, source = charon.recvfrom(2000)
        assert (data, source[:2]) == (bytes(4) + probe(), (str(mn.address), mn.port))


@root
def test_a_flood_is_bounded() -> None:
    us, mn = ENDS[0]
    flood = [bytes(4) + probe(message_id=number) for number in range(100)]
    assert len(hears(us, mn, flood)) == MOST


@root
def test_closed_it_gives_nothing() -> None:
    us, mn = ENDS[0]
    with host(), udp(us):
        held = Held(NAME, us, mn, mark=MARK)
        held.close()
        held.close()
        with pytest.raises(LinkError):
            Held(NAME, Endpoint.of("192.0.2.77", 4500), mn, mark=MARK)


# --- nSG's side ----------------------------------------------------------------------------------------


class Recorder:
    def __init__(self, calls: list[str], place: Place, request: tuple[bytes, ...]) -> None:
        self.calls = calls
        self.place = place
        calls.append("hears" if not request else f"hears {b''.join(request).decode()}")

    async def deliver(self) -> int:
        assert self.place.mute.muted == set(), "charon would not hear it"
        assert all(sa.state == "ESTABLISHED" for sa in self.place.charon.sas.values())
        self.calls.append("delivers")
        return 1

    def close(self) -> None:
        self.calls.append("closes")


def listening(calls: list[str]) -> Place:
    here = place()
    here.sink = CharonSink(
        here.host,
        here.mobiles.move,
        here.mobiles.rename,
        listen=lambda context, request: Recorder(calls, here, request),
    )
    return here


Work = Callable[[Place, IkeContext, list[str]], Awaitable[None]]


def with_recorders(work: Work) -> None:
    async def scenario() -> None:
        calls: list[str] = []
        here = listening(calls)
        context = a_context(1)
        here.mobiles.add(context)
        await work(here, context, calls)

    run(scenario())


def test_it_is_delivered_when_charon_serves_the_sa() -> None:
    async def work(here: Place, context: IkeContext, calls: list[str]) -> None:
        await move(here, context)
        assert calls == ["hears", "delivers"]

    with_recorders(work)


def test_it_is_forgotten_with_what_is_undone() -> None:
    async def work(here: Place, context: IkeContext, calls: list[str]) -> None:
        await here.sink.prepare(context, False)
        await here.sink.take(context, final_of(context))
        await here.sink.move_peer(context, final_of(context))
        await here.sink.undo(context)
        assert calls == ["hears", "closes"]

    with_recorders(work)


def test_a_request_that_brought_the_sa_is_delivered_with_it() -> None:
    async def work(here: Place, context: IkeContext, calls: list[str]) -> None:
        here.sink.shown(context, ())
        assert calls == []
        here.sink.shown(context, (b"a", b"b"))
        await move(here, context)
        assert calls == ["hears ab", "delivers"]

    with_recorders(work)


def test_a_request_that_brings_nothing_is_forgotten() -> None:
    async def work(here: Place, context: IkeContext, calls: list[str]) -> None:
        here.sink.shown(context, (b"a",))
        await here.sink.undo(context)
        assert calls == ["hears a", "closes"]

    with_recorders(work)


def test_a_second_try_goes_on_listening() -> None:
    async def work(here: Place, context: IkeContext, calls: list[str]) -> None:
        final = final_of(context)
        await here.sink.prepare(context, False)
        await here.sink.take(context, final)
        await here.sink.move_peer(context, final)
        report = await here.sink.move_peer(context, final)
        await here.sink.activate(context, final, report)
        assert calls == ["hears", "delivers"]

    with_recorders(work)


def test_without_a_socket_the_mn_asks_again() -> None:
    async def work(here: Place, context: IkeContext, calls: list[str]) -> None:
        def deaf(context: IkeContext, request: tuple[bytes, ...]) -> Recorder:
            raise LinkError("no packet socket")

        here.sink = CharonSink(here.host, here.mobiles.move, here.mobiles.rename, listen=deaf)
        await move(here, context)
        here.sound()

    with_recorders(work)
