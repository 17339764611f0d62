"""I/O: watches for IKE requests of SAs that are not here, and asks other gateways about them.

A packet socket receives them below the firewall and beside charon, which owns the UDP ports and drops them
silently (strongSwan 5.9.8: an alert inside, no notify on the wire). A filter in the kernel passes
INFORMATIONAL and CREATE_CHILD_SA requests to our addresses only, so ESP, responses and other traffic never
wake the agent. The packets that it passes are limited here: so many datagrams are read in a tenth of a
second, the rest of a flood stays in the kernel, which drops packets when its buffer is full. `UnknownSas`
decides about questions.

If another gateway gave the SA, charon has it, but not the request that the mobile node waits for an answer
to, because charon dropped it: `packet_hold` gives it that request when it serves the SA.

Needs CAP_NET_RAW. Source: Linux packet(7), raw(7), the packet filter of linux/filter.h.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Sequence

from ikectx import trace
from ikectx.errors import IkectxError, LinkError, WireError
from ikectx.mistakes import log_mistake
from ikectx.numbers import Exchange, Payload
from ikectx.sa.context import Address, Endpoint
from ikectx.sa.name import SaName
from ikectx.wire.ikev2 import IKE_PORT, NATT_PORT, strip_marker

from . import bpf
from .packet_io import (
    FRAGMENT,
    IP6_HEADER,
    MAX_DATAGRAM,
    UDP_HEADER,
    denied,
    packet_socket,
    udp_in,
)
from .unknown import UnknownMessage, UnknownSas

log = logging.getLogger(__name__)

GRACE = 0.001
"""Seconds before a question is asked. A mobile node that probes several gateways at once is answered by the
one that has the SA; then its request is no longer the next one there, and the SA stays. By so much, and by
the way between the gateways, its ways to them may differ; if they differ more, the SA moves without need.
Each move begins so much later."""
BURST = 200
WINDOW = 0.1
"""At most `BURST` datagrams are read in `WINDOW` seconds."""
_BUFFER = 1 << 18
"""Octets of datagrams that may wait in the kernel."""
IKE_PORTS = (IKE_PORT, NATT_PORT)

Known = Callable[[SaName], bool]
"""Whether charon here has that IKE_SA, or is being given it."""
Ask = Callable[[tuple[bytes, ...], Endpoint, Endpoint], Awaitable[bool]]
"""Ask the other gateways about the SA of these datagrams (one message), sent to the first endpoint, ours,
from the second, the mobile node's. True: the SA is here now, and charon serves it. Errors: IkectxError."""


class Watcher:
    """Listens from `start` to `close`.

    addresses: those of this gateway that mobile nodes know.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        known: Known,
        ask: Ask,
        *,
        memory: int = 1024,
        rate: float = 10.0,
        grace: float = GRACE,
        ports: Sequence[int] = IKE_PORTS,
    ) -> None:
        """`ports`: charon.port and charon.port_nat_t."""
        self.unknown = UnknownSas(random.SystemRandom().random, memory=memory, rate=rate)
        self._addresses = addresses
        self._known = known
        self._ask = ask
        self._grace = grace
        self._ports = ports
        self._receivers: list[socket.socket] = []
        self._asking: dict[SaName, asyncio.Task[None]] = {}
        self._read = 0
        self._since = 0.0
        self._resume: asyncio.TimerHandle | None = None

    @property
    def asking(self) -> int:
        """The number of open questions."""
        return len(self._asking)

    def start(self) -> None:
        """Open the sockets. Errors: LinkError."""
        for version in (4, 6):
            mine = [address for address in self._addresses if address.version == version]
            if mine:
                self._receivers.append(open_receiver(mine, self._ports))
        self._listen()

    async def close(self) -> None:
        """Stop listening; open questions are given up."""
        self._deaf()
        if self._resume is not None:
            self._resume.cancel()
        for receiver in self._receivers:
            receiver.close()
        self._receivers.clear()
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        for receiver in self._receivers:
            loop.add_reader(receiver, self._readable, receiver)

    def _deaf(self) -> None:
        loop = asyncio.get_running_loop()
        for receiver in self._receivers:
            loop.remove_reader(receiver)

    def _readable(self, receiver: socket.socket) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._since >= WINDOW:
            self._since, self._read = now, 0
        while self._read < BURST:
            try:
                packet, sender = receiver.recvfrom(MAX_DATAGRAM)
            except OSError:  # nothing more to read; or a device went down, which does not matter here
                return
            self._read += 1
            if sender[2] == socket.PACKET_HOST:
                self._hear(packet, now)
        self._deaf()
        self._resume = asyncio.get_running_loop().call_later(WINDOW, self._listen)

    def _hear(self, packet: bytes, now: float) -> None:
        found = parse_packet(packet)
        if found is None:
            return
        datagram, local, remote = found
        name = SaName(datagram[:8], datagram[8:16])
        if local.address not in self._addresses or name in self._asking or self._known(name):
            return
        question = self.unknown.receive(datagram, local, remote, now)
        if question is not None:
            task = asyncio.get_running_loop().create_task(self._inquire(question))
            self._asking[name] = task
            task.add_done_callback(lambda _: self._asking.pop(name, None))

    async def _inquire(self, question: UnknownMessage) -> None:
        what = f"{question.spis} from {question.remote}"
        with trace.span("others may answer", "part"):
            await asyncio.sleep(self._grace)
        if self._known(question.spis):
            return
        try:
            here = await self._ask(question.datagrams, question.local, question.remote)
        except IkectxError as error:
            log.info("an IKE request for unknown SPIs %s: %s", what, error)
            return
        except Exception as error:
            log_mistake(log, f"asking about unknown SPIs {what}", error)
            return
        if here:
            self.unknown.forget(question.spis)


def parse_packet(packet: bytes) -> tuple[bytes, Endpoint, Endpoint] | None:
    """(IKE message without marker, our end, the other end) of a packet that `udp_in` accepts; None for
    others."""
    found = udp_in(packet)
    if found is None:
        return None
    payload, local, remote = found
    try:
        return strip_marker(payload, local, remote), local, remote
    except WireError:
        return None


# --- the socket ----------------------------------------------------------------------------------------


def open_receiver(addresses: Sequence[Address], ports: Sequence[int] = IKE_PORTS) -> socket.socket:
    """A packet socket for IKE requests to `addresses`, all of one family, and charon's `ports`. LinkError if
    it is not available."""
    try:
        receiver = packet_socket(addresses[0].version, request_filter(addresses, ports))
    except OSError as error:
        hint = "the agent must run as root or with CAP_NET_RAW" if denied(error) else ""
        raise LinkError(f"no packet socket: {error.strerror}", hint=hint) from error
    # the kernel silently uses its maximum (net.core.rmem_max) if this is more
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    return receiver


_MAX_FILTERED = 16
"""Addresses that the filter compares, because a jump reaches 255 instructions. Further ones are compared
here."""


def request_filter(addresses: Sequence[Address], ports: Sequence[int] = IKE_PORTS) -> list[bpf.Instruction]:
    """Passes IP packets (from the IP header on) that `UnknownSas` may need; all others are dropped.

    They are UDP in one IP fragment to one of the addresses and ports, with a non-ESP marker unless they come
    from or go to port 500; IKEv2, both SPIs not zero, SK or SKF first, INFORMATIONAL or
    CREATE_CHILD_SA, not a response. IPv6 extension headers are not followed.
    """
    four = addresses[0].version == 4
    lines: list[bpf.Line] = [(bpf.LDB, 9 if four else 6), (bpf.JEQ, socket.IPPROTO_UDP, "", "drop")]
    if four:
        lines += [(bpf.LDH, 6), (bpf.JSET, FRAGMENT, "drop", "")]
    for number, address in enumerate(addresses if len(addresses) <= _MAX_FILTERED else ()):
        words = [address.packed[n : n + 4] for n in range(0, len(address.packed), 4)]
        for n, word in enumerate(words):
            last = n == len(words) - 1
            lines += [(bpf.LD, (16 if four else 24) + 4 * n)]
            lines += [(bpf.JEQ, int.from_bytes(word), "ours" if last else "", f"not {number}")]
        lines.append(f"not {number}")
    if len(addresses) <= _MAX_FILTERED:
        lines += [(bpf.RET, 0), "ours"]
    # X: offset of the UDP header; from "plain" on, 4 octets further if there is a marker
    lines.append((bpf.LDX_MSH, 0) if four else (bpf.LDX, IP6_HEADER))
    lines += [(bpf.LDH_X, 2)]
    lines += [(bpf.JEQ, port, "plain" if port == IKE_PORT else "marked", "") for port in ports]
    lines += [(bpf.RET, 0), "marked", (bpf.LDH_X, 0), (bpf.JEQ, IKE_PORT, "plain", "")]
    lines += [
        (bpf.LD_X, UDP_HEADER),
        (bpf.JEQ, 0, "", "drop"),
        (bpf.TXA, 0),
        (bpf.ADD, 4),
        (bpf.TAX, 0),
        "plain",
    ]
    at = UDP_HEADER
    for spi in ("SPIi", "SPIr"):
        lines += [(bpf.LD_X, at), (bpf.JEQ, 0, "", spi), (bpf.LD_X, at + 4), (bpf.JEQ, 0, "drop", ""), spi]
        at += 8
    lines += [
        (bpf.LDB_X, at),
        (bpf.JEQ, Payload.SK, "sealed", ""),
        (bpf.JEQ, Payload.SKF, "", "drop"),
        "sealed",
    ]
    lines += [(bpf.LDB_X, at + 1), (bpf.AND, 0xF0), (bpf.JEQ, 0x20, "", "drop")]
    lines += [(bpf.LDB_X, at + 2), (bpf.JEQ, Exchange.INFORMATIONAL, "flags", "")]
    lines += [(bpf.JEQ, Exchange.CREATE_CHILD_SA, "", "drop"), "flags"]
    lines += [
        (bpf.LDB_X, at + 3),
        (bpf.JSET, 0x20, "drop", ""),
        (bpf.RET, MAX_DATAGRAM),
        "drop",
        (bpf.RET, 0),
    ]
    return bpf.assemble(lines)
