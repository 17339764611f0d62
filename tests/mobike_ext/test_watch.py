"""unknown.py and watch.py: what leads to a question, the kernel's filter, and loopback (needs root)."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.errors import RefusedError
from ikectx.numbers import Exchange, Payload
from ikectx.sa.context import Endpoint
from ikectx.sa.name import SaName
from ikectx.wire.ikev2 import HEADER_LENGTH, IkeHeader, add_marker
from ikectx.wire.reader import Writer
from mobike_ext import unknown, watch
from mobike_ext.packet_io import udp_datagram
from mobike_ext.unknown import NotAsked, UnknownMessage, UnknownSas
from tests.bpf_machine import passes
from tests.hand_loop import StandingLoop, run_standing
from tests.netns import namespaces
from tests.worlds import until

US = Endpoint.of("10.9.9.1", 4500)
MN = Endpoint.of("198.51.100.7", 4500)
US6 = Endpoint.of("fd09::1", 4500)
MN6 = Endpoint.of("2001:db8::7", 4500)
NAME = SaName(b"initiatr", b"responde")


def header(
    name: tuple[bytes, bytes] = NAME, *, first: Payload = Payload.SK, body: int = 29, **more: Any
) -> bytes:
    """An IKE header; like an empty INFORMATIONAL of charon's unless said otherwise."""
    fields: dict[str, object] = {
        "exchange": Exchange.INFORMATIONAL,
        "message_id": 2,
        "initiator": True,
        "response": False,
        "next_payload": first,
        "length": HEADER_LENGTH + body,
    }
    return IkeHeader(*name, **(fields | more)).serialize()  # type: ignore[arg-type]


def probe(name: tuple[bytes, bytes] = NAME, **more: Any) -> bytes:
    return header(name, **more) + b"\0\0\0\x1d" + bytes(25)


def part(number: int, total: int, name: tuple[bytes, bytes] = NAME, size: int = 100, **more: Any) -> bytes:
    head = header(name, first=Payload.SKF, body=8 + size, **more)
    return head + Writer().u32(8 + size).u16(number).u16(total).octets(bytes([number]) * size).done()


def memory(**more: float) -> UnknownSas:
    """One that never rolls the dice against anybody."""
    return UnknownSas(lambda: 0.0, **more)  # type: ignore[arg-type]


def pair(number: int) -> tuple[bytes, bytes]:
    return number.to_bytes(8), b"responde"


# --- the core ----------------------------------------------------------------------------------------------


def test_a_probe_is_a_question() -> None:
    core = memory()
    assert core.receive(probe(), US, MN, 5.0) == UnknownMessage(NAME, (probe(),), US, MN)
    rekey = probe(pair(1), exchange=Exchange.CREATE_CHILD_SA, initiator=False)
    assert core.receive(rekey, US, MN, 5.0) == UnknownMessage(pair(1), (rekey,), US, MN)


def test_one_question_for_an_spi_pair_and_second() -> None:
    core = memory()
    asked = [n for n in range(300) if core.receive(probe(), US, MN, 100 + n / 100) is not None]
    assert asked == [0, 100, 200]
    assert core.dropped[NotAsked.ASKED] == 297
    # whoever else names the SPIs has no question of their own, whatever they send
    assert core.receive(probe(message_id=9), US, Endpoint.of("203.0.113.1", 4500), 102.99) is None


def test_an_sa_that_came_and_left_is_a_question_at_once() -> None:
    core = memory()
    assert core.receive(probe(), US, MN, 1.0)
    core.forget(NAME)
    assert core.receive(probe(), US, MN, 1.1)
    assert len(core) == 1


WRONG: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "short": lambda: probe()[:27],
    "cut": lambda: probe()[:-1],
    "a response": lambda: probe(response=True),
    "IKE_SA_INIT": lambda: probe(exchange=Exchange.IKE_SA_INIT),
    "IKE_AUTH": lambda: probe(exchange=Exchange.IKE_AUTH),
    "no initiator SPI": lambda: probe((bytes(8), NAME[1])),
    "no responder SPI": lambda: probe((NAME[0], bytes(8))),
    "IKEv1": lambda: probe(version=0x10),
    "in the clear": lambda: probe(first=Payload.NOTIFY),
    "no payload": lambda: header(body=0, first=Payload.NONE),
    "fragment 0": lambda: part(0, 2),
    "fragment 3 of 2": lambda: part(3, 2),
    "65 fragments": lambda: part(1, 65),
    "a fragment without numbers": lambda: header(first=Payload.SKF, body=4) + b"\0\0\0\4",
    "too large": lambda: header(body=20000) + bytes(20000),
}


@pytest.mark.parametrize("what", WRONG)
def test_anything_else_is_none(what: str) -> None:
    core = memory()
    assert core.receive(WRONG[what](), US, MN, 1.0) is None
    assert core.dropped == {NotAsked.NO_REQUEST: 1}
    assert len(core) == 0


def test_fragments_are_gathered() -> None:
    core = memory()
    parts = [part(n, 3, exchange=Exchange.CREATE_CHILD_SA) for n in (1, 2, 3)]
    assert core.receive(parts[1], US, MN, 1.0) is None
    assert core.receive(parts[1], US, MN, 1.0) is None
    assert core.receive(parts[2], US, MN, 1.0) is None
    assert core.held == len(parts[1]) + len(parts[2])
    assert core.receive(parts[0], US, MN, 1.0) == UnknownMessage(NAME, tuple(parts), US, MN)
    assert core.held == 0
    assert core.receive(parts[0], US, MN, 1.5) is None
    assert core.dropped == {NotAsked.PART: 3, NotAsked.ASKED: 1}


def test_one_fragment_may_be_all() -> None:
    assert memory().receive(part(1, 1), US, MN, 1.0) == UnknownMessage(NAME, (part(1, 1),), US, MN)


@pytest.mark.parametrize(
    "other",
    [
        lambda core: core.receive(part(2, 2, message_id=3), US, MN, 1.0),
        lambda core: core.receive(part(2, 3), US, MN, 1.0),
        lambda core: core.receive(part(2, 2, exchange=Exchange.CREATE_CHILD_SA), US, MN, 1.0),
        lambda core: core.receive(part(2, 2), US, Endpoint.of("203.0.113.1", 4500), 1.0),
        lambda core: core.receive(part(2, 2), Endpoint.of("10.9.9.2", 4500), MN, 1.0),
    ],
)
def test_fragments_of_different_messages_are_not_mixed(other: Callable[[UnknownSas], object]) -> None:
    core = memory()
    assert core.receive(part(1, 2), US, MN, 1.0) is None
    assert other(core) is None


def test_memory_is_bounded() -> None:
    core = memory(memory=10, rate=1e6)
    for number in range(1, 1001):
        assert core.receive(probe(pair(number)), US, MN, 1.0)
        core.receive(part(1, 2, pair(number + 5000)), US, MN, 1.0)
        assert len(core) <= 20
    # the last are remembered, the first would be asked about again
    assert core.receive(probe(pair(1000)), US, MN, 1.0) is None
    assert core.receive(probe(pair(1)), US, MN, 1.0)


def test_octets_of_fragments_are_bounded() -> None:
    core = memory(memory=100000)
    for number in range(1, 2000):
        core.receive(part(1, 64, pair(number), size=1300), US, MN, 1.0)
        core.receive(part(2, 64, pair(number), size=1300), US, MN, 1.0)
        assert core.held <= unknown.MAX_HELD
    assert core.held > unknown.MAX_HELD - 3000


def test_one_message_of_fragments_is_bounded() -> None:
    core = memory()
    for number in range(1, 65):
        assert core.receive(part(number, 64, size=1300), US, MN, 1.0) is None
    assert core.held <= 16384


def test_questions_are_bounded_in_all_and_for_a_source() -> None:
    core = memory(rate=10.0)
    sources = [Endpoint(ip_address(0xC6336400 + n), 4500) for n in range(200)]
    asked = sum(
        core.receive(probe(pair(1 + n)), US, sources[n % 200], n / 1000) is not None for n in range(10000)
    )
    assert 100 <= asked <= 130  # 10 s of them, and what the full bucket held
    assert core.dropped[NotAsked.RATE] == 10000 - asked
    core = memory(rate=10.0)
    asked = sum(core.receive(probe(pair(1 + n)), US, MN, n / 1000) is not None for n in range(10000))
    assert 50 <= asked <= 65


def test_a_question_that_the_rate_forbade_is_asked_when_it_comes_again() -> None:
    core = memory(rate=1.0)
    while core.receive(probe(pair(1000 + len(core))), US, MN, 1.0) is not None:
        pass
    assert core.receive(probe(), US, MN, 1.0) is None
    assert core.receive(probe(), US, MN, 3.5)


# --- the kernel's filter -----------------------------------------------------------------------------------


def ip_packet(payload: bytes, local: Endpoint = US, remote: Endpoint = MN, *, options: int = 0) -> bytes:
    """UDP from `remote` to `local` in an IP packet."""
    udp = udp_datagram(remote, local, payload)
    if local.address.version == 6:
        return (
            struct.pack("!IHBB", 6 << 28, len(udp), 17, 64)
            + remote.address.packed
            + local.address.packed
            + udp
        )
    first = struct.pack("!BBHIBBH", 0x45 + options, 0, 20 + 4 * options + len(udp), 0, 64, 17, 0)
    return first + remote.address.packed + local.address.packed + bytes(4 * options) + udp


FOUR = watch.request_filter([ip_address("10.9.9.2"), US.address])
SIX = watch.request_filter([US6.address, ip_address("fd09::2")])
PORT_500 = (Endpoint(US.address, 500), Endpoint(MN.address, 500))


def both(packet: Callable[[Endpoint, Endpoint], bytes]) -> Iterator[bool]:
    yield passes(FOUR, packet(US, MN))
    yield passes(SIX, packet(US6, MN6))


def marked(datagram: bytes) -> Callable[[Endpoint, Endpoint], bytes]:
    return lambda us, mn: ip_packet(add_marker(datagram, us, mn), us, mn)


@pytest.mark.parametrize(
    "datagram", [probe(), probe(exchange=Exchange.CREATE_CHILD_SA), part(1, 2), probe(initiator=False)]
)
def test_the_filter_passes_requests(datagram: bytes) -> None:
    assert all(both(marked(datagram)))
    for us, mn in (PORT_500, (PORT_500[0], MN), (US, PORT_500[1])):
        assert passes(FOUR, ip_packet(datagram, us, mn))
        assert watch.parse_packet(ip_packet(datagram, us, mn)) == (datagram, us, mn)
    assert passes(FOUR, ip_packet(bytes(4) + datagram, options=3))
    for spis in ((b"\0\0\0\0\0\0\0\1", b"\1" + bytes(7)), (b"\0\0\0\1" + bytes(4), bytes(7) + b"\1")):
        assert all(both(marked(probe(spis))))


NEVER = (
    "too large",
    "short",
    "cut",
    "fragment 0",
    "fragment 3 of 2",
    "65 fragments",
    "a fragment without numbers",
)


@pytest.mark.parametrize("what", [what for what in WRONG if what not in NEVER])
def test_the_filter_drops_the_rest(what: str) -> None:
    assert not any(both(marked(WRONG[what]())))


def test_the_filter_drops_what_is_not_for_us() -> None:
    good = bytes(4) + probe()
    assert not any(both(lambda us, mn: ip_packet(b"\xc0\0\0\1" + bytes(60), us, mn)))
    assert not any(both(lambda us, mn: ip_packet(b"\xff", us, mn)))
    assert not any(both(lambda us, mn: ip_packet(good, Endpoint(us.address, 4501), mn)))
    assert not any(both(lambda us, mn: ip_packet(probe(), us, mn)))  # no marker
    assert not passes(FOUR, ip_packet(good, Endpoint.of("10.9.9.3", 4500)))
    assert not passes(SIX, ip_packet(good, Endpoint.of("fd09::3", 4500), MN6))
    for at, value in ((9, 6), (6, 0x20), (7, 1)):  # TCP; the first and the last IP fragment of several
        packet = bytearray(ip_packet(good))
        packet[at] = value
        assert not passes(FOUR, bytes(packet))


def test_the_filter_of_a_charon_with_other_ports() -> None:
    other = watch.request_filter([US.address], (1500, 14500))
    for port in (1500, 14500):
        there = Endpoint(US.address, port)
        assert passes(other, ip_packet(add_marker(probe(), there, MN), there, MN))
        assert not passes(other, ip_packet(probe(), there, MN))
        assert passes(other, ip_packet(probe(), there, PORT_500[1]))
    assert not passes(other, ip_packet(bytes(4) + probe()))


def test_a_filter_of_many_addresses_leaves_them_to_us() -> None:
    for base in ("10.9.0.1", "fd09::1"):
        many = [ip_address(base) + n for n in range(40)]
        assert len(watch.request_filter(many)) < 60
    sixteen = watch.request_filter([ip_address("fd09::1") + n for n in range(16)])
    assert max(max(line[1:3]) for line in sixteen) <= 255
    assert passes(sixteen, ip_packet(bytes(4) + probe(), Endpoint.of("fd09::10", 4500), MN6))
    assert not passes(sixteen, ip_packet(bytes(4) + probe(), Endpoint.of("fd09::11", 4500), MN6))


@pytest.mark.parametrize(
    "packet", [b"", b"\x45", b"\x60" * 30, b"\x41" + bytes(40), b"\x4f" + bytes(30), bytes(60)]
)
def test_what_is_no_packet(packet: bytes) -> None:
    assert watch.parse_packet(packet) is None


@pytest.mark.parametrize(
    ("at", "value"), [(9, 6), (6, 0x20), (7, 1)], ids=["TCP", "first fragment", "last fragment"]
)
def test_what_is_no_datagram(at: int, value: int) -> None:
    """It may have come before the filter was there."""
    packet = bytearray(ip_packet(bytes(4) + probe()))
    packet[at] = value
    assert watch.parse_packet(bytes(packet)) is None


def test_what_is_no_datagram_of_ipv6() -> None:
    packet = bytearray(ip_packet(bytes(4) + probe(), US6, MN6))
    assert watch.parse_packet(bytes(packet)) is not None
    packet[6] = 44  # a fragment header
    assert watch.parse_packet(bytes(packet)) is None


def test_the_links_padding_is_cut_off() -> None:
    assert watch.parse_packet(ip_packet(bytes(4) + probe()) + bytes(20)) == (probe(), US, MN)


# --- loopback ----------------------------------------------------------------------------------------------

root = pytest.mark.usefixtures("as_root")


@contextmanager
def host() -> Iterator[None]:
    """A host of our own with both ends' addresses."""
    with namespaces(1) as (space,):
        space.ip("addr add 10.9.9.1/32 dev lo", "addr add fd09::1/128 dev lo nodad")
        space.ip("addr add 10.9.9.9/32 dev lo", "addr add fd09::9/128 dev lo nodad")
        space.switch_on("ipv4/conf/all/rp_filter", "ipv4/conf/lo/rp_filter")
        with space.entered():
            yield


@contextmanager
def udp(at: Endpoint) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if at.address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as bound:
        bound.bind((str(at.address), at.port))
        bound.settimeout(2)
        yield bound


class Neighbours:
    """What is asked, and what is answered. After the answer True the SA is here, as `watch.Ask` says."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.asked: list[tuple[tuple[bytes, ...], Endpoint, Endpoint]] = []
        self.answers = list(answers)
        self.known: set[tuple[bytes, bytes]] = set()

    async def __call__(self, datagrams: tuple[bytes, ...], local: Endpoint, remote: Endpoint) -> bool:
        self.asked.append((datagrams, local, remote))
        await asyncio.sleep(0.01)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if answer:
            self.known.add((datagrams[0][:8], datagrams[0][8:16]))
        return answer


def run(
    neighbours: Neighbours, act: Callable[[], object], *, asked: int = 0, rate: float = 100.0
) -> watch.Watcher:
    """`act` while a watcher listens, until so many questions were asked and answered (0: for 0.1 s)."""

    async def inner() -> watch.Watcher:
        watcher = watch.Watcher(
            [US.address, US6.address], neighbours.known.__contains__, neighbours, rate=rate, grace=0.01
        )
        watcher.start()
        try:
            await asyncio.to_thread(act)
            while len(neighbours.asked) < asked or watcher.asking:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.0 if asked else 0.1)
        finally:
            await watcher.close()
        return watcher

    return asyncio.run(inner())


ENDS = [
    (US, Endpoint.of("10.9.9.9", 4500)),
    (US6, Endpoint.of("fd09::9", 4500)),
    (Endpoint.of("10.9.9.1", 500), Endpoint.of("10.9.9.9", 500)),
    (US, Endpoint.of("10.9.9.9", 12345)),
]


@root
@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_a_request_of_an_unknown_sa_is_asked_about_once(ends: tuple[Endpoint, Endpoint]) -> None:
    us, mn = ends
    neighbours = Neighbours(True)

    def act() -> None:
        octets = add_marker(probe(), us, mn)
        for _ in range(2):  # the second may be read before the answer or after it
            node.sendto(octets, (str(us.address), us.port))
        while not neighbours.known:
            time.sleep(0.01)
        node.sendto(octets, (str(us.address), us.port))

    with host(), udp(us), udp(mn) as node:
        run(neighbours, act, asked=1)
        assert neighbours.asked == [((probe(),), us, mn)]


@root
@pytest.mark.parametrize(
    "answer", [True, False, RefusedError("no"), ZeroDivisionError("a mistake")], ids=repr
)
def test_no_answer_tells_charon_anything(answer: bool | Exception) -> None:
    neighbours = Neighbours(answer)
    us, mn = ENDS[0]
    with host(), udp(us) as charon, udp(mn) as node:
        run(neighbours, lambda: node.sendto(bytes(4) + probe(), (str(us.address), us.port)), asked=1)
        assert len(neighbours.asked) == 1
        charon.recv(2000)
        charon.settimeout(0.05)
        with pytest.raises(TimeoutError):
            charon.recv(2000)


@root
def test_fragments_are_asked_about_together() -> None:
    us, mn = ENDS[0]
    neighbours = Neighbours(True)
    parts = [part(n, 3) for n in (1, 2, 3)]
    with host(), udp(us), udp(mn) as node:
        run(
            neighbours,
            lambda: [node.sendto(bytes(4) + p, (str(us.address), us.port)) for p in parts],
            asked=1,
        )
        assert neighbours.asked == [(tuple(parts), us, mn)]


@root
def test_a_known_sa_and_other_addresses_are_no_question() -> None:
    us, mn = ENDS[0]
    neighbours = Neighbours()
    neighbours.known.add(NAME)

    def act() -> None:
        node.sendto(bytes(4) + probe(), (str(us.address), us.port))
        node.sendto(bytes(4) + probe(pair(1)), ("10.9.9.9", 4500))
        node.sendto(bytes(4) + probe(pair(1), response=True), (str(us.address), us.port))

    with host(), udp(us), udp(mn) as node:
        watcher = run(neighbours, act)
    assert neighbours.asked == []
    assert not watcher.unknown.dropped


@root
def test_an_sa_that_came_meanwhile_is_no_question() -> None:
    us, mn = ENDS[0]
    neighbours = Neighbours()

    looked: list[bool] = []

    def known(name: tuple[bytes, bytes]) -> bool:
        looked.append(name in neighbours.known)
        neighbours.known.add(name)  # before the second look
        return looked[-1]

    async def inner() -> None:
        watcher = watch.Watcher([us.address], known, neighbours, grace=0.01)
        watcher.start()
        node.sendto(bytes(4) + probe(), (str(us.address), us.port))
        await until(lambda: len(looked) == 2)
        await watcher.close()

    with host(), udp(us), udp(mn) as node:
        asyncio.run(inner())
    assert neighbours.asked == []


@root
def test_a_flood_is_not_read() -> None:
    us, mn = ENDS[0]
    neighbours = Neighbours(*[False] * 100)

    async def scenario(loop: StandingLoop) -> None:
        watcher = watch.Watcher([us.address], neighbours.known.__contains__, neighbours, rate=20.0)
        watcher.start()
        for number in range(1, 3001):
            node.sendto(bytes(4) + probe(pair(number)), (str(us.address), us.port))
        for windows in range(1, 4):
            for _ in range(50):
                await asyncio.sleep(0)
            assert 0 < watcher.unknown.dropped.total() < windows * watch.BURST
            loop.now += watch.WINDOW
        assert 0 < len(neighbours.asked) <= 40 + 20 * 3 * watch.WINDOW
        await watcher.close()

    with host(), udp(us), udp(mn) as node:
        run_standing(scenario)


def test_close_without_start() -> None:
    asyncio.run(watch.Watcher([US.address], lambda _: False, Neighbours()).close())
