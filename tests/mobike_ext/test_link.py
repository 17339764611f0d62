"""link.py: a raw socket beside an ordinary one that owns the port, over loopback (needs root)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest

from ikectx.errors import KernelError, LinkError, RefusedError
from ikectx.numbers import Notify, Protocol, Status
from ikectx.sa.context import Endpoint
from ikectx.wire.ikev2 import RetransmitPolicy
from ikectx.wire.payloads import DeletePayload, NotifyPayload
from mobike_ext import link
from mobike_ext.address_update import AddressNotice, AddressUpdate
from mobike_ext.naming import Renaming, ask, ask_peer
from mobike_ext.notify import Reason, UpdateSpi
from mobike_ext.packet_io import bpf_program, open_raw, udp_datagram
from mobike_ext.rekey import REKEY_OCTETS, ChildMade, ChildRekey, ChildRekeyed, IkeMade, IkeRekey, IkeRekeyed
from mobike_ext.requester import SaEnd
from mobike_ext.responder import Asked, ResponderRole, SpiResponder
from mobike_ext.spi_update import (
    FRESH_OCTETS,
    Renamed,
    RenameRefused,
    SpiUpdate,
    SpiUpdateState,
    Unsupported,
)
from tests.air import Names
from tests.air import Node as Agent
from tests.bpf_machine import passes
from tests.mobile_ike import COOKIE, SA, Node, asks_for
from tests.netns import JOINED, join, namespaces
from tests.rekey_peer import CHILD, IKE_SA
from tests.rekey_peer import Peer as RekeyPeer
from vici_bridge.kernel.mute import MARK, Mute

QUICK = RetransmitPolicy(initial=0.05, factor=1.5, tries=3)
"""Where nobody answers."""
PATIENT = RetransmitPolicy(initial=60.0)
ONCE_MORE = RetransmitPolicy(initial=0.05, factor=1000.0)
"""Where the answer comes to the first or the second request, however busy the machine is."""
SPIS = SA.spis
root = pytest.mark.usefixtures("as_root")


@contextmanager
def bound(at: Endpoint) -> Iterator[socket.socket]:
    """An ordinary UDP socket; port 0: any. charon's, or the mobile node's."""
    with socket.socket(
        socket.AF_INET6 if at.address.version == 6 else socket.AF_INET, socket.SOCK_DGRAM
    ) as udp:
        udp.bind((str(at.address), at.port))
        udp.settimeout(2)
        yield udp


def endpoint(udp: socket.socket) -> Endpoint:
    return Endpoint.of(*udp.getsockname()[:2])


def machine(gateway: Endpoint, node: Endpoint, policy: RetransmitPolicy = QUICK) -> AddressUpdate:
    return AddressUpdate(SaEnd(SA, 7, gateway, node, policy), AddressNotice(COOKIE), os.urandom(8))


@contextmanager
def in_thread(serve: Callable[[], None], stop: threading.Event | None = None) -> Iterator[None]:
    """`serve` runs beside the body, until `stop`. What it asserts counts."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(serve)
        try:
            yield
        finally:
            if stop is not None:
                stop.set()
    running.result()


@contextmanager
def mobile_node(
    udp: socket.socket, gateway: Endpoint, *, drop: int = 0, refuse: bool = False
) -> Iterator[None]:
    """Answers in a thread, after `drop` requests, with noise around each answer."""

    def serve() -> None:
        node = Node(me=endpoint(udp))
        for _ in range(drop + 1):
            datagram, source = udp.recvfrom(2000)
            assert source[:2] == (str(gateway.address), gateway.port)
        request = node.read(datagram, gateway)
        answer = node.accept(datagram, gateway)
        if refuse:
            answer = node.answer(request, [NotifyPayload(Notify.UNACCEPTABLE_ADDRESSES)], gateway)
        noise = [b"\xff", b"\xc0\0\0\1" + bytes(100), bytes(4) + b"anotherSApairof!" + answer[20:]]
        for octets in (*noise, answer[:-1] + bytes([answer[-1] ^ 1]), answer):
            udp.sendto(octets, (str(gateway.address), gateway.port))

    with in_thread(serve):
        yield


@root
@pytest.mark.parametrize(("gateway_host", "node_host"), [("127.0.0.20", "127.0.0.7"), ("::1", "::1")])
@pytest.mark.parametrize("drop", [0, 1])
def test_beside_the_owner_of_the_port(gateway_host: str, node_host: str, drop: int) -> None:
    with bound(Endpoint.of(gateway_host, 0)) as charon, bound(Endpoint.of(node_host, 0)) as udp:
        gateway, node = endpoint(charon), endpoint(udp)
        asks = machine(gateway, node, ONCE_MORE if drop else PATIENT)
        with mobile_node(udp, gateway, drop=drop):
            report = asyncio.run(link.run_address_update(asks))
        assert (report.messages, report.requests, report.retransmissions) == (
            2 + drop,
            1,
            drop,
        )
        # the filter kept everything but the two datagrams of this SA away
        assert asks.ignored == 1
        # charon hears the same datagrams, which the filter does not touch
        assert charon.recv(2000) == b"\xff"


@root
def test_a_refusal_and_a_silence() -> None:
    with bound(Endpoint.of("127.0.0.20", 0)) as charon, bound(Endpoint.of("127.0.0.7", 0)) as udp:
        gateway, node = endpoint(charon), endpoint(udp)
        with mobile_node(udp, gateway, refuse=True), pytest.raises(RefusedError) as refused:
            asyncio.run(link.run_address_update(machine(gateway, node, PATIENT)))
        assert refused.value.status is Status.PEER_REFUSED
        silent = machine(gateway, node)
        with pytest.raises(LinkError) as caught:
            asyncio.run(link.run_address_update(silent))
        assert caught.value.status is Status.PEER_SILENT
        assert silent.report.requests == 1


@root
@pytest.mark.parametrize("version", [4, 6])
def test_beneath_a_firewall_that_mutes_charon(version: int) -> None:
    with namespaces(2) as (space, far), contextlib.ExitStack() as stack:
        join(space, far)
        here, there = JOINED[version]
        with far.entered():
            udp = stack.enter_context(bound(Endpoint.of(there, 0)))
        stack.enter_context(space.entered())
        with bound(Endpoint.of(here, 4500)) as charon:
            gateway, node = endpoint(charon), endpoint(udp)
            mute = Mute()
            mute.mute_in(SPIS)
            mute.mute_out(SPIS)
            with mobile_node(udp, gateway, drop=1):
                asks = machine(gateway, node, ONCE_MORE)
                report = asyncio.run(link.run_address_update(asks, mark=MARK))
            assert (report.requests, report.retransmissions) == (1, 1)
            # the muted charon heard the noise only: another SA's
            assert [charon.recv(2000)[:1] for _ in range(3)] == [b"\xff", b"\xc0", b"\0"]
            charon.settimeout(0.1)
            with pytest.raises(TimeoutError):
                charon.recv(2000)
            # and without the mark nothing gets out
            with pytest.raises(LinkError):
                asyncio.run(link.run_address_update(machine(gateway, node)))


@root
def test_b17_esp_that_arrives_is_no_answer() -> None:
    with bound(Endpoint.of("127.0.0.20", 0)) as charon, bound(Endpoint.of("127.0.0.7", 0)) as udp:
        asks = machine(endpoint(charon), endpoint(udp))
        with pytest.raises(LinkError) as caught:
            asyncio.run(link.run_address_update(asks, heard=lambda: True))
    assert caught.value.status is Status.PEER_SILENT
    assert asks.report.retransmissions == 2 * QUICK.tries - 1


@contextmanager
def served(ends: socket.socket, machine: object) -> Iterator[None]:
    """A peer of `air` (or a machine) at an ordinary socket, in a thread."""
    stop = threading.Event()

    def serve() -> None:
        ends.settimeout(0.02)
        while not stop.is_set():
            try:
                datagram, source = ends.recvfrom(4000)
                machine.receive(datagram, Endpoint.of(*source[:2]), time.monotonic())  # type: ignore[attr-defined]
            except TimeoutError:
                pass
            for octets, to in machine.to_send(time.monotonic()):  # type: ignore[attr-defined]
                ends.sendto(octets, (str(to.address), to.port))

    with in_thread(serve, stop):
        yield


NODE_SA = replace(SA, initiator=True)
OURS, NEW = b"\xc1\0\0\1", b"\xc9\0\0\1"


def spi_update(
    gateway: Endpoint,
    node: Endpoint,
    limit: int | None = None,
    policy: RetransmitPolicy = PATIENT,
    **options: object,
) -> SpiUpdate:
    given = {"iv": os.urandom(64), "fresh": os.urandom(FRESH_OCTETS), "address": AddressNotice(COOKIE)}
    end = SaEnd(SA, 7, gateway, node, policy, limit)
    return asks_for(end, [ask(Protocol.ESP, OURS, NEW)], **(given | options))  # type: ignore[arg-type]


def node_update(gateway: Endpoint, node: Endpoint, rename: UpdateSpi) -> SpiUpdate:
    """The mobile node's agent asks."""
    fresh = os.urandom(FRESH_OCTETS)
    return SpiUpdate(SaEnd(NODE_SA, 3, node, gateway), [rename], iv=os.urandom(8), fresh=fresh)


def mobile_agent(node: Endpoint, **options: object) -> Agent:
    names = Names({(Protocol.ESP, False, OURS)})
    return Agent(SpiResponder(NODE_SA, 7, node, names, **options), names)  # type: ignore[arg-type]


PAIR = Renaming(Protocol.ESP, True, OURS, NEW)


@root
@pytest.mark.parametrize(("gateway_host", "node_host"), [("127.0.0.20", "127.0.0.7"), ("::1", "::1")])
@pytest.mark.parametrize("limit", [None, 120])
def test_new_names(gateway_host: str, node_host: str, limit: int | None) -> None:
    with bound(Endpoint.of(gateway_host, 0)) as charon, bound(Endpoint.of(node_host, 0)) as udp:
        gateway, node = endpoint(charon), endpoint(udp)
        with served(udp, mobile_agent(node, limit=limit)):
            report = asyncio.run(link.run_spi_update(spi_update(gateway, node, limit=limit)))
        assert report.outcome == Renamed((PAIR,))
        assert (report.move.requests, report.move.messages > 2) == (1, limit is not None)


@root
def test_new_names_refused_unknown_or_unanswered() -> None:
    with bound(Endpoint.of("127.0.0.20", 0)) as charon, bound(Endpoint.of("127.0.0.7", 0)) as udp:
        gateway, node = endpoint(charon), endpoint(udp)
        refusing = mobile_agent(node)
        refusing.names.objections[OURS] = Reason.NOT_ALLOWED
        with served(udp, refusing):
            report = asyncio.run(link.run_spi_update(spi_update(gateway, node)))
        assert report.outcome == RenameRefused((Reason.NOT_ALLOWED,))
        with mobile_node(udp, gateway):
            report = asyncio.run(link.run_spi_update(spi_update(gateway, node)))
        assert report.outcome == Unsupported()
        with mobile_node(udp, gateway, refuse=True), pytest.raises(RefusedError):
            asyncio.run(link.run_spi_update(spi_update(gateway, node)))
        with pytest.raises(LinkError) as caught:
            asyncio.run(link.run_spi_update(spi_update(gateway, node, policy=QUICK)))
        assert caught.value.status is Status.PEER_SILENT


@root
def test_a_child_and_an_ike_sa_are_rekeyed() -> None:
    with bound(Endpoint.of("127.0.0.20", 0)) as charon, bound(Endpoint.of("127.0.0.7", 0)) as udp:
        gateway, node = endpoint(charon), endpoint(udp)

        def child() -> ChildRekey:
            fresh = os.urandom(REKEY_OCTETS)
            return ChildRekey(SaEnd(IKE_SA, 7, gateway, node, PATIENT), 0, CHILD, new_spi=NEW, fresh=fresh)

        def rekeyed(machine: ChildRekey | IkeRekey, trouble: str = "") -> tuple[object, object]:
            made = asyncio.run(link.ask_rekey(machine))
            if trouble and isinstance(machine, ChildRekey):
                machine.abandon(trouble)
            else:
                machine.installed()
            return made, asyncio.run(link.end_rekey(machine))

        machine = child()
        with served(udp, RekeyPeer()):
            made, result = rekeyed(machine)
        assert isinstance(result, ChildRekeyed) and made == ChildMade(result.child)
        assert (result.child.spi_in, machine.report.requests, machine.report.messages) == (NEW, 2, 4)
        ike = IkeRekey(
            SaEnd(IKE_SA, 7, gateway, node, PATIENT), new_spi=b"new-ours", fresh=os.urandom(REKEY_OCTETS)
        )
        with served(udp, RekeyPeer()):
            made, result = rekeyed(ike)
        assert isinstance(result, IkeRekeyed) and made == IkeMade(result.generation)
        peer = RekeyPeer()
        with served(udp, peer):
            assert rekeyed(child(), "no memory")[1] is None
        assert peer.requests[1].payloads == (DeletePayload(Protocol.ESP, (NEW,)),)
        errors = (NotifyPayload(Notify.NO_ADDITIONAL_SAS),)
        with (
            served(udp, RekeyPeer(errors=errors)),
            pytest.raises(RefusedError, match="NO_ADDITIONAL_SAS") as caught,
        ):
            rekeyed(child())
        assert caught.value.status is Status.PEER_REFUSED


@root
@pytest.mark.parametrize(("gateway_host", "node_host"), [("127.0.0.20", "127.0.0.7"), ("::1", "::1")])
@pytest.mark.parametrize("mark", [0, MARK])
def test_an_agent_answers_beside_its_charon(gateway_host: str, node_host: str, mark: int) -> None:
    # the gateway is an ordinary socket at an address that the mobile node does not know of
    heard: list[Asked] = []
    with bound(Endpoint.of(gateway_host, 0)) as udp, bound(Endpoint.of(node_host, 0)) as charon:
        gateway, node = endpoint(udp), endpoint(charon)
        agent = mobile_agent(node).machine
        machine = spi_update(gateway, node)

        async def serve() -> None:
            with link.serving(agent, mark=mark) as requests, served(udp, machine):
                event = await requests.next()
                assert event is not None
                heard.append(event)
                requests.answer()
                while not machine.done:
                    await asyncio.sleep(0.02)

        asyncio.run(serve())
        assert [event.source for event in heard] == [gateway]
        assert (machine.state.value, agent.report.answered) == ("renamed", 1)
        assert charon.recv(2000)[:4] == bytes(4)  # it has the request as well


@root
def test_an_agent_may_be_busy_and_a_watcher_says_nothing() -> None:
    with bound(Endpoint.of("127.0.0.20", 0)) as udp, bound(Endpoint.of("127.0.0.7", 0)) as charon:
        gateway, node = endpoint(udp), endpoint(charon)
        for role in (ResponderRole.ALL, ResponderRole.WATCH):
            agent = mobile_agent(node, role=role).machine
            machine = spi_update(gateway, node)
            heard: list[Asked] = []

            async def serve(agent: SpiResponder = agent, machine: SpiUpdate = machine) -> None:
                with link.serving(agent) as requests, served(udp, machine):
                    event = await requests.next()
                    assert event is not None
                    heard.append(event)  # noqa: B023
                    if agent.answering:
                        requests.answer(Reason.BUSY)
                    while machine.state is SpiUpdateState.WAITING and agent.answering:
                        await asyncio.sleep(0.01)

            asyncio.run(serve())
            assert len(heard) == 1
            assert machine.state.value == ("paused" if role is ResponderRole.ALL else "waiting")


@root
def test_repetitions_of_an_answered_request() -> None:
    with bound(Endpoint.of("127.0.0.20", 0)) as charon, bound(Endpoint.of("127.0.0.7", 0)) as udp:
        gateway, node = endpoint(charon), endpoint(udp)
        machine = spi_update(gateway, node, expected_id=3, address=None)
        theirs = node_update(gateway, node, ask_peer(Protocol.ESP, OURS))
        machine.to_send(0)
        [(request, _)] = theirs.to_send(0)
        machine.receive(request, node, 0)
        machine.to_send(0)  # this answer is lost

        async def answers() -> None:
            answering = asyncio.create_task(link.keep_answering(machine, 60.0))
            while theirs.state.value != "renamed":
                await asyncio.sleep(0.05)
                udp.sendto(request, (str(gateway.address), gateway.port))
            answering.cancel()

        with served(udp, theirs):
            asyncio.run(answers())


@root
def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(LinkError) as caught:
        asyncio.run(
            link.run_address_update(machine(Endpoint.of("192.0.2.20", 4500), Endpoint.of("192.0.2.7", 4500)))
        )
    assert caught.value.status is Status.UNREACHABLE


def test_udp_datagram() -> None:
    # one's complement sum over pseudo header and datagram must be all ones
    for local, remote in (
        (Endpoint.of("192.0.2.20", 4500), Endpoint.of("198.51.100.7", 40001)),
        (Endpoint.of("2001:db8::20", 4500), Endpoint.of("2001:db8::7", 4500)),
    ):
        for payload in (b"", b"odd", b"even", bytes(range(256))):
            octets = udp_datagram(local, remote, payload)
            assert octets[:6] == b"".join(n.to_bytes(2) for n in (local.port, remote.port, 8 + len(payload)))
            assert octets[8:] == payload
            covered = (
                local.address.packed
                + remote.address.packed
                + len(octets).to_bytes(4)
                + b"\0\0\0\x11"
                + octets
            )
            covered += bytes(len(covered) % 2)
            total = sum(int.from_bytes(covered[n : n + 2]) for n in range(0, len(covered), 2))
            assert total % 0xFFFF == 0
            assert octets[6:8] != b"\0\0"


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("port", [500, 4500])
@pytest.mark.parametrize("below", [False, True])
def test_the_packet_filter(version: int, port: int, below: bool) -> None:
    host = {4: ("192.0.2.20", "192.0.2.7"), 6: ("2001:db8::20", "2001:db8::7")}[version]
    gateway, node = Endpoint.of(host[0], port), Endpoint.of(host[1], port)
    program = bpf_program(gateway, node, SPIS, below=below)

    def hears(
        payload: bytes,
        *,
        source: Endpoint = node,
        destination: Endpoint = gateway,
        options: int = 0,
        protocol: int = 17,
    ) -> bool:
        four = bytes([0x45 + options]) + bytes(8) + bytes([protocol]) + bytes(10 + 4 * options)
        six = b"\x60" + bytes(5) + bytes([protocol]) + bytes(33) if below else b""
        ip = four if version == 4 else six
        return passes(program, ip + udp_datagram(source, destination, payload))

    ike = SA.spi_i + SA.spi_r + bytes(12)
    marker = b"" if port == 500 else bytes(4)
    assert hears(marker + ike)
    assert hears(marker + ike, protocol=6) is not below
    if version == 4:
        assert hears(marker + ike, options=2)
    assert not hears(marker + ike, source=replace(node, port=4501))
    assert not hears(marker + ike, destination=replace(gateway, port=4501))
    assert not hears(marker + SA.spi_r + SA.spi_i + bytes(12))
    for place in range(16):
        other = ike[:place] + bytes([ike[place] ^ 1]) + ike[place + 1 :]
        assert not hears(marker + other)
    assert not hears(b"\xff")
    assert not hears(b"\xc0\0\0\1" + ike)
    assert not hears(marker + ike[:15])


@pytest.mark.parametrize(("error", "kind"), [(errno.EMFILE, KernelError), (errno.EPERM, LinkError)])
def test_a_socket_that_cannot_be_had_is_not_the_mn_s_silence(
    error: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without descriptors nobody was asked: the other gateway was told that the MN did not answer."""

    def none(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("mobike_ext.packet_io.socket.socket", none)
    with pytest.raises(kind, match=r"no raw socket at 192\.0\.2\.1") as caught:
        open_raw(Endpoint.of("192.0.2.1"), None, (bytes(8), bytes(8)))
    assert caught.value.hint
