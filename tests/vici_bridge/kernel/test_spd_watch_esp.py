"""Plain connections between two network namespaces under the kernel's ESP, and what is on the wire."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network

import pytest

from ikectx.errors import LinkError
from ikectx.net.five_tuple import Transport
from ikectx.net.links import Stream
from ikectx.net.plain import open_socket, plain_dial, plain_listen
from ikectx.peer import PeerConfig
from ikectx.sa.context import Secret
from ikectx.timing import Timing
from tests.netns import Namespace, namespaces
from vici_bridge.kernel.algorithms import KernelReplay
from vici_bridge.kernel.kernel import Kernel
from vici_bridge.kernel.spd_watch import SpdGuard
from vici_bridge.kernel.xfrm import KernelPolicy, KernelSa, Selector, Template
from vici_bridge.kernel.xfrm_parts import TRANSPORT, TUNNEL

pytestmark = pytest.mark.kernel_esp

PAIRS = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}
TIMING = Timing(connect=10, keepalive=3)
PORT = 5091
ESP, SCTP = 50, 132
ABORT = 6
LARGE = bytes(range(256)) * 256


@dataclass
class Site:
    """One gateway: a namespace with its end of a cable, SAs and policies."""

    space: Namespace
    kernel: Kernel
    here: str
    there: str
    policies: list[KernelPolicy]
    sas: list[KernelSa]

    def protect(self) -> None:
        adding = [sa.add() for sa in self.sas] + [policy.add() for policy in self.policies]
        self.kernel.batch(adding)

    def expose(self) -> None:
        for policy in self.policies:
            self.kernel.delete_policy(policy)


@contextlib.contextmanager
def sites(version: int, mode: int) -> Iterator[tuple[Site, Site]]:
    ends = PAIRS[version]
    made = []
    with namespaces(2) as spaces, contextlib.ExitStack() as stack:
        spaces[0].ip("link add outer type veth peer name far")
        spaces[0].give("far", spaces[1])
        spaces[1].ip("link set far name outer")
        for number, space in enumerate(spaces):
            bits = "24" if version == 4 else "64 nodad"
            space.ip(f"addr add {ends[number]}/{bits} dev outer", "link set outer up")
            with space.entered():
                kernel = stack.enter_context(Kernel())
            made.append(Site(space, kernel, ends[number], ends[1 - number], *tables(ends, number, mode)))
        for site in made:
            site.protect()
        yield made[0], made[1]


def tables(ends: tuple[str, str], number: int, mode: int) -> tuple[list[KernelPolicy], list[KernelSa]]:
    here, there = (ip_address(ends[which]) for which in (number, 1 - number))
    policies, sas = [], []
    for direction, source, destination in (("out", here, there), ("in", there, here)):
        spi = b"\xc0\xff\xee" + bytes([1 + (source == ip_address(ends[0]))])
        sas.append(
            KernelSa(
                source,
                destination,
                spi,
                reqid=7,
                mode=mode,
                encr_name="rfc4106(gcm(aes))",
                encr_key=Secret(spi * 5),
                icv_bits=128,
                is_aead=True,
                replay=KernelReplay(window=32),
            )
        )
        nowhere = type(here)(0)
        outer = (source, destination) if mode == TUNNEL else (nowhere, nowhere)
        template = Template(*outer, reqid=7, mode=mode)
        selector = Selector.between(ip_network(source), ip_network(destination))
        policies.append(KernelPolicy(direction, selector, priority=1000, templates=(template,)))
    return policies, sas


@dataclass
class Echo:
    """A gateway in a thread of its own (a namespace is a thread's): sends back what it reads."""

    site: Site
    protocol: Transport
    ends: list[str] = field(default_factory=list)
    _stop: Callable[[], object] | None = None

    def __enter__(self) -> Echo:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        if self._stop is not None:
            self._stop()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with self.site.space.entered():
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._stop = lambda: loop.call_soon_threadsafe(stop.set)
        peer = PeerConfig("near", self.site.there, PORT)
        with SpdGuard() as guard:
            where = [(self.site.here, PORT)]
            (server,) = await plain_listen(TIMING, self.protocol, guard, where, [peer], self._echo)
            await server.start_serving()
            self._ready.set()
            await stop.wait()
            server.close()

    async def _echo(self, stream: Stream) -> None:
        try:
            while data := await stream.read():
                await stream.write(data)
            self.ends.append("")
        except LinkError as error:
            self.ends.append(str(error))
        finally:
            stream.close()


class Sniffer:
    """The protocols of the IP packets that both sites put on the cable.

    What a site gets is not looked at: of tunnelled packets the kernel shows the inside there, too.
    """

    def __init__(self, *sites: Site) -> None:
        self._sockets = []
        for site in sites:
            with site.space.entered():
                sniffing = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
                sniffing.bind(("outer", 0))
            sniffing.setblocking(False)
            sniffing.setsockopt(socket.SOL_SOCKET, 33, 1 << 23)  # SO_RCVBUFFORCE
            self._sockets.append(sniffing)

    def seen(self) -> set[int]:
        """Since the last question. Left out: ARP, neighbour discovery (ICMPv6), SCTP's ABORT, TCP's RST.

        These hold nothing. They are what the cut of an association sends, after its protection has gone, and
        what a kernel answers to a late acknowledgement when the socket is closed.
        """
        found = set()
        for sniffing in self._sockets:
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet, (_, ethertype, kind, *_) = sniffing.recvfrom(100)
                    if kind != socket.PACKET_OUTGOING:
                        continue
                    if ethertype == 0x0800:
                        protocol, above, whole = packet[9], 20, int.from_bytes(packet[2:4])
                    elif ethertype == 0x86DD and packet[6] not in (0, 58):
                        protocol, above, whole = packet[6], 40, 40 + int.from_bytes(packet[4:6])
                    else:
                        continue
                    if not _holds_nothing(protocol, packet[above:], whole - above):
                        found.add(protocol)
        return found

    def close(self) -> None:
        for sniffing in self._sockets:
            sniffing.close()


def _holds_nothing(protocol: int, octets: bytes, length: int) -> bool:
    """Whether what IP carries, of that length, is SCTP's ABORT or TCP's RST, without data."""
    if protocol == SCTP:
        return octets[12] == ABORT
    return protocol == socket.IPPROTO_TCP and bool(octets[13] & 0x04) and length == (octets[12] >> 4) * 4


def run(site: Site, scenario: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await scenario

    with site.space.entered():
        asyncio.run(bounded())


async def echoed(stream: Stream, data: bytes) -> bool:
    sending = asyncio.create_task(stream.write(data))
    received = b""
    while len(received) < len(data):
        received += await stream.read()
    await sending
    return received == data


CASES = [
    ("tcp", 4, TRANSPORT),
    ("tcp", 6, TRANSPORT),
    ("tcp", 4, TUNNEL),
    ("tcp", 6, TUNNEL),
    ("sctp", 4, TRANSPORT),
    ("sctp", 6, TUNNEL),
]


@pytest.mark.parametrize(("protocol", "version", "mode"), CASES)
def test_only_esp_is_on_the_wire(protocol: Transport, version: int, mode: int) -> None:
    with sites(version, mode) as (near, far), Echo(far, protocol) as echo:
        sniffer = Sniffer(near, far)
        peer = PeerConfig("far", far.here, PORT)

        async def scenario() -> None:
            with SpdGuard() as guard:
                dial = plain_dial(TIMING, protocol, guard, [(near.here, PORT)])
                stream = await dial(peer)
                assert stream.names == {"far"}
                assert await echoed(stream, LARGE)
                stream.close()
                while not echo.ends:
                    await asyncio.sleep(0.05)
                assert echo.ends == [""]

                stream = await dial(peer)
                assert await echoed(stream, b"again")
                reading = asyncio.create_task(stream.read())
                near.expose()  # here: nothing more leaves, whatever is under way
                with pytest.raises(LinkError, match="no IPsec policy"):
                    await stream.write(LARGE)
                with pytest.raises(LinkError, match="no IPsec policy"):
                    await reading
                with pytest.raises(LinkError, match="no IPsec policy"):
                    await dial(peer)
                await asyncio.sleep(1)
                assert sniffer.seen() == {ESP}
                near.kernel.batch([policy.add() for policy in near.policies])

                stream = await dial(peer)
                assert await echoed(stream, b"and again")
                far.expose()  # there: it closes, without a word in the clear
                with contextlib.suppress(LinkError):
                    async with asyncio.timeout(30):
                        while await stream.read():
                            pass
                async with asyncio.timeout(10):
                    while not any("no IPsec policy" in end for end in echo.ends):
                        await asyncio.sleep(0.05)
                await asyncio.sleep(0.5)
                assert sniffer.seen() == {ESP}
                stream.close()

        run(near, scenario())
        sniffer.close()


@pytest.mark.parametrize("protocol", ["tcp", "sctp"])
def test_an_sa_that_does_not_encrypt(protocol: Transport) -> None:
    with sites(4, TRANSPORT) as (near, far), Echo(far, protocol):
        for site in (near, far):
            for sa in site.sas:
                site.kernel.delete_sa(sa)
                site.kernel.batch(
                    [
                        replace(
                            sa,
                            encr_name="ecb(cipher_null)",
                            encr_key=Secret(b""),
                            icv_bits=0,
                            is_aead=False,
                            auth_name="hmac(sha256)",
                            auth_key=Secret(bytes(32)),
                            auth_trunc_bits=128,
                        ).add()
                    ]
                )

        async def scenario() -> None:
            with SpdGuard() as guard:
                dial = plain_dial(TIMING, protocol, guard, [(near.here, PORT)])
                with pytest.raises(LinkError, match="does not encrypt"):
                    await dial(PeerConfig("far", far.here, PORT))

        run(near, scenario())


def test_what_comes_in_the_clear_does_not_come_in(caplog: pytest.LogCaptureFixture) -> None:
    """One side without policies: the other side's kernel drops its packets, and nothing is accepted."""
    with sites(4, TRANSPORT) as (near, far), Echo(far, "tcp") as echo:
        near.expose()
        with near.space.entered(), socket.socket() as plain:
            plain.settimeout(1.5)
            with pytest.raises(OSError):
                plain.connect((far.here, PORT))
        # and where it is the far side that does not protect: a connection comes about, and is closed unread
        far.expose()
        with near.space.entered(), socket.socket() as plain:
            plain.settimeout(10)
            with contextlib.suppress(ConnectionError):
                # on a busy machine the far side's reset comes before connect() has returned
                plain.connect((far.here, PORT))
                plain.sendall(b"secret")
                assert plain.recv(10) == b""
        assert echo.ends == []


def test_sctp_on_several_addresses_is_refused() -> None:
    with sites(4, TRANSPORT) as (near, far):
        far.space.ip("addr add 203.0.113.9/32 dev outer")
        with far.space.entered():
            listening = open_socket(socket.AF_INET, "sctp")
        listening.bind(("0.0.0.0", PORT))
        listening.listen()

        async def scenario() -> None:
            with SpdGuard() as guard:
                dial = plain_dial(TIMING, "sctp", guard, [(near.here, PORT)])
                with pytest.raises(LinkError, match=r"the other end of an SCTP association has \d addresses"):
                    await dial(PeerConfig("far", far.here, PORT))

        run(near, scenario())
        listening.close()


@pytest.mark.parametrize("protocol", ["tcp", "sctp"])
def test_a_peer_that_vanishes_is_noticed(protocol: Transport) -> None:
    """TCP's probes and SCTP's heartbeats, under ESP."""
    with sites(4, TRANSPORT) as (near, far), Echo(far, protocol):

        async def scenario() -> None:
            with SpdGuard() as guard:
                timing = replace(TIMING, keepalive=1)
                dial = plain_dial(timing, protocol, guard, [(near.here, PORT)])
                stream = await dial(PeerConfig("far", far.here, PORT))
                assert await echoed(stream, b"hello")
                far.space.ip("link set outer down")
                began = time.monotonic()
                with contextlib.suppress(LinkError):
                    while await stream.read():
                        pass
                assert time.monotonic() - began < 30
                stream.close()

        run(near, scenario())


def test_the_option_s_layout() -> None:
    """struct sctp_paddrparams is packed to 156 octets (linux/sctp.h)."""
    assert struct.calcsize("=i128xIHIIIIBx") == 156
