"""`IkeQueue`: IKE requests that come from another place than the SA's gateway wait for this agent. I/O.

nftables has the kernel queue such a packet (NFQUEUE) before charon's sockets get it, until the agent lets it
pass. Only INFORMATIONAL requests of SAs that are watched are queued, from other addresses than
the gateway's present one: what an SA's gateway sends never waits here. Without a program that listens the
rule does nothing ("bypass"), so the table may outlive the agent: the kernel drops what waits when its socket
closes, the sender repeats it (RFC 7296, 2.1), and charon gets the repetition. More packets than `RATE`, and
more than the queue holds, pass as if there were no rule.

Netlink: linux/netfilter/nfnetlink_queue.h (uapi). Errors: KernelError.
"""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ikectx.errors import KernelError
from ikectx.numbers import Exchange
from ikectx.sa.context import Address
from ikectx.sa.name import SaName

from .netlink import NETFILTER, deaf, event_socket
from .netlink_parts import ACK, HEADER, REQUEST, attribute, attributes
from .nftables import NftTable, run_nft

TABLE = "ikectx_push"
NUMBER = 0x494B
"""Of the kernel's queue, in this network namespace."""
RATE = 100
"""Packets per second that wait here; the others pass."""
LENGTH = 256
"""Packets that may wait at once."""
_SUBSYSTEM = 3
_PACKET, _VERDICT, _CONFIG = 0, 1, 2
_BIND, _COPY_PACKET, _FAIL_OPEN = 1, 2, 1
_ACCEPT = 1
_LONGEST = 0xFFFF
_BUFFER = 1 << 17
_READS = 64
"""Packets at most that one call reads, so that a flood does not keep the event loop."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A packet that waits for `IkeQueue.let_pass`, from the IP header on. `number`: the kernel's of it."""

    number: int
    packet: bytes


class IkeQueue:
    """In the network namespace in which `open` was called. Not thread-safe."""

    def __init__(self) -> None:
        self._table = NftTable(TABLE)
        self._elements: set[tuple[str, bytes]] = set()
        self._socket = event_socket(NETFILTER, (), "IKE requests from elsewhere")

    def fileno(self) -> int:
        """Readable when a packet waits."""
        return self._socket.fileno()

    def open(self) -> None:
        """Make the table by `nft`, some 20 ms, then listen. Errors: KernelError, also if another program has
        the queue."""
        run_nft(_script())
        try:
            self._socket.bind((0, 0))
            self._configure(attribute(1, struct.pack("!BBH", _BIND, 0, 0)))
            self._configure(
                attribute(2, struct.pack("!IB", _LONGEST, _COPY_PACKET))
                + attribute(3, LENGTH.to_bytes(4))
                + attribute(4, _FAIL_OPEN.to_bytes(4))
                + attribute(5, _FAIL_OPEN.to_bytes(4))
            )
        except OSError as error:
            raise deaf("IKE requests from elsewhere", error) from None

    def close(self) -> None:
        """Nothing waits any more; packets that do are lost. The table is removed, if that is possible."""
        self._socket.close()
        try:
            self._table.drop()
        finally:
            self._table.close()

    def watch(self, gateways: Mapping[SaName, Address]) -> None:
        """Requests of these SAs, and of no others, wait if they come from another place than these."""
        wanted = {element for sa, address in gateways.items() for element in _elements(sa, address)}
        gone, come = self._elements - wanted, wanted - self._elements
        for name, key in gone:
            self._table.remove([name], [key])
        try:
            self._put(come)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            run_nft(_script())  # somebody has flushed the firewall
            self._put(wanted)
        self._elements = wanted

    def _put(self, elements: Iterable[tuple[str, bytes]]) -> None:
        if parts := [(name, key, b"") for name, key in elements]:
            self._table.put(parts)

    def read(self) -> Iterator[Waiting]:
        """Packets that wait and were not read yet."""
        for _ in range(_READS):
            try:
                message = self._socket.recv(_BUFFER)
            except OSError:  # none; or the kernel has had no memory for one, which it let pass
                return
            if (waiting := waiting_of(message)) is not None:
                yield waiting

    def let_pass(self, waiting: Waiting) -> None:
        """Let charon have it; once for each. Raises nothing: the kernel may have let it go."""
        verdict = attribute(2, struct.pack("!II", _ACCEPT, waiting.number))
        with contextlib.suppress(OSError):
            self._socket.send(_message(_VERDICT, REQUEST, verdict))

    def _configure(self, body: bytes) -> None:
        """Errors: OSError."""
        self._socket.send(_message(_CONFIG, REQUEST | ACK, body))
        answer = self._socket.recv(_BUFFER)
        (code,) = struct.unpack_from("=i", answer, HEADER.size)
        if code:
            raise OSError(-code, errno.errorcode.get(-code, str(-code)))


def waiting_of(message: bytes) -> Waiting | None:
    """The packet that the kernel's message is about; None: it is another message, or damaged."""
    try:
        _, kind, *_ = HEADER.unpack_from(message)
        parts = dict(attributes(message, HEADER.size + 4))
    except (struct.error, ValueError):
        return None
    if kind != _SUBSYSTEM << 8 | _PACKET or len(parts.get(1, b"")) < 4:
        return None
    return Waiting(int.from_bytes(parts[1][:4]), parts.get(10, b""))


def _message(number: int, flags: int, body: bytes) -> bytes:
    kind = _SUBSYSTEM << 8 | number
    return HEADER.pack(20 + len(body), kind, flags, 0, 0) + struct.pack("!BBH", 0, 0, NUMBER) + body


def _elements(sa: SaName, gateway: Address) -> Iterator[tuple[str, bytes]]:
    """(set, key) of each element."""
    yield "watched", sa.octets
    yield f"gateways{gateway.version}", gateway.packed + sa.octets


def _script() -> str:
    """The table anew, with nothing in its sets. The header of IKE is behind that of UDP, and behind four zero
    octets where the ports are other than 500 (RFC 7296, 3.1; RFC 3948, 2.2)."""
    rules = []
    for marker, at in (("", 64), ("@th,64,32 0 ", 96)):
        spis = f"@th,{at},64 . @th,{at + 64},64"
        asked = f"@th,{at + 144},8 {Exchange.INFORMATIONAL:d} @th,{at + 152},8 & 0x20 == 0"
        for version, head in ((4, "ip"), (6, "ip6")):
            elsewhere = f"{head} saddr . {spis} != @gateways{version}"
            rules.append(
                f"meta l4proto udp {marker}{asked} {spis} @watched {elsewhere} "
                f"limit rate {RATE}/second burst {RATE} packets queue num {NUMBER} bypass"
            )
    spis = "@th,64,64 . @th,128,64"
    lines = [
        f"set watched {{ typeof {spis}; }}",
        f"set gateways4 {{ typeof ip saddr . {spis}; }}",
        f"set gateways6 {{ typeof ip6 saddr . {spis}; }}",
        "chain input { type filter hook input priority raw; policy accept;",
        *rules,
        "}",
    ]
    body = "\n".join(lines)
    return f"add table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{body}\n}}\n"
