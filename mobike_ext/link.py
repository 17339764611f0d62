"""I/O: IKE datagrams from a raw socket beside a running charon, which owns the UDP ports.

A raw UDP socket may send from any source port of its address and gets a copy of each datagram that arrives
there, ESP in UDP included; a classic BPF filter passes only IKE of the one SA from the one peer. charon gets
its copy too and ignores it while the SA is PASSIVE. Like charon's own sockets this one has bypass policies,
so that neither a tunnel's policy nor the kernel's inbound check catches IKE.

Where a firewall keeps the SA's IKE from a charon that is not PASSIVE, it lets a `mark` out, and what comes in
is heard by a packet socket, below the firewall.

Needs CAP_NET_RAW and CAP_NET_ADMIN. Source: Linux raw(7), packet(7), socket(7), packet filter of
linux/filter.h, linux/xfrm.h.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_address

from ikectx.bypass import bypass
from ikectx.context import Endpoint
from ikectx.errors import LinkError, RefusedError
from ikectx.ikev2 import has_marker
from ikectx.numbers import Status
from ikectx.ports import Clock, MoveReport

from .exchange import AddressUpdate, Event, Moved, PeerNatChanged, Refused, Silent

log = logging.getLogger(__name__)

_SO_ATTACH_FILTER = 26
_IPV6_CHECKSUM = 7
_UDP_CHECKSUM_AT = 6
_UDP_HEADER = 8
_IP6_HEADER = 40
_ETHERTYPE = {4: 0x0800, 6: 0x86DD}
_MAX_DATAGRAM = 65535
_PROOF_INTERVAL = 0.25
"""Seconds between two looks at whether the MN's ESP has arrived."""


class MonotonicClock:
    """`time.monotonic`."""

    def now(self) -> float:
        return time.monotonic()


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """How an address update that succeeded went. `nat`: NATs differ from before."""

    move: MoveReport
    nat: PeerNatChanged | None = None
    peer_requests: int = 0
    ignored: int = 0


async def run_address_update(
    machine: AddressUpdate,
    *,
    clock: Clock | None = None,
    proven: Callable[[], Awaitable[bool]] | None = None,
    mark: int = 0,
) -> UpdateReport:
    """Run `machine` to its end from a raw socket at `machine.local`.

    proven: asked now and then whether ESP of the MN has arrived here, which is as good as the answer.
    mark: see `open_raw`.
    Errors: LinkError with PEER_SILENT (no answer; `machine.report` says what was sent) or UNREACHABLE (the
    socket cannot be had), RefusedError with PEER_REFUSED.
    """
    clock = clock or MonotonicClock()
    with open_raw(machine.local, machine.remote, machine.spis, mark=mark) as raw:
        trouble = ""
        while not machine.done:
            for datagram, _ in machine.to_send(clock.now()):
                try:
                    raw.send(datagram)
                except OSError as error:  # as good as lost on the way: the next try may get through
                    trouble = f"; last error: {error.strerror}"
            due = machine.next_timer()
            wait = max(0.0, due - clock.now()) if due is not None else 0.0
            received = await raw.receive(min(wait, _PROOF_INTERVAL) if proven else wait)
            if received is not None:
                machine.receive(*received, clock.now())
            machine.handle_timer(clock.now())
            if proven is not None and not machine.done and await proven():
                machine.traffic_seen()
    events: list[Event] = []
    while (event := machine.next_event()) is not None:
        events.append(event)
    return _outcome(machine, events, trouble)


def _outcome(machine: AddressUpdate, events: list[Event], trouble: str) -> UpdateReport:
    for event in events:
        if isinstance(event, Refused):
            raise RefusedError(
                f"the MN refused the new address: {event.notify.name}", status=Status.PEER_REFUSED
            )
        if isinstance(event, Silent):
            where = f"the MN at {machine.remote} did not answer {event.sent} requests from {machine.local}"
            raise LinkError(
                where + trouble,
                hint="is the way from this gateway to the MN open for UDP (routes, firewall, the MN's NAT)?",
                status=Status.PEER_SILENT,
            )
    nat = next((e for e in events if isinstance(e, PeerNatChanged)), None)
    if nat is not None:
        log.warning("NAT on the new path differs: here %s, at the MN %s", nat.nat_here, nat.nat_there)
    assert any(isinstance(e, Moved) for e in events)
    return UpdateReport(machine.report, nat, machine.peer_requests, machine.ignored)


class RawLink:
    """One raw UDP socket for one IKE_SA; see `open_raw`. `ear`: what is listened to in its stead."""

    def __init__(
        self, raw: socket.socket, local: Endpoint, remote: Endpoint, ear: socket.socket | None = None
    ) -> None:
        self._raw = raw
        self._ear = ear
        self._local = local
        self._remote = remote

    def __enter__(self) -> RawLink:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()
        if self._ear is not None:
            self._ear.close()

    def send(self, payload: bytes) -> None:
        """One UDP datagram to the peer. Errors: OSError."""
        self._raw.sendto(udp_datagram(self._local, self._remote, payload), (str(self._remote.address), 0))

    async def receive(self, within: float) -> tuple[bytes, Endpoint] | None:
        """The next UDP payload from the peer and where it came from; None after `within` s."""
        try:
            async with asyncio.timeout(within):
                packet, sender = await asyncio.get_running_loop().sock_recvfrom(
                    self._ear or self._raw, _MAX_DATAGRAM
                )
        except (TimeoutError, OSError):
            # An OSError here is an ICMP error somebody sent: unauthenticated, so it decides nothing.
            return None
        header = 0
        if self._local.address.version == 4:
            header = (packet[0] & 0x0F) * 4 if packet else 0
        elif self._ear is not None:
            header = _IP6_HEADER
        udp = packet[header:]
        if len(udp) < _UDP_HEADER:
            return None
        if self._ear is None:
            address = ip_address(sender[0].partition("%")[0])
        else:
            at = 12 if self._local.address.version == 4 else 8
            address = ip_address(packet[at : at + len(self._remote.address.packed)])
        if address != self._remote.address:
            return None
        # what follows the datagram is padding of the link's
        return udp[_UDP_HEADER : int.from_bytes(udp[4:6])], Endpoint(address, int.from_bytes(udp[:2]))


def open_raw(local: Endpoint, remote: Endpoint, spis: tuple[bytes, bytes], *, mark: int = 0) -> RawLink:
    """A raw socket at `local` that hears only IKE of `spis` from `remote`. LinkError if it cannot be had.

    `mark` (SO_MARK): sent with every datagram; and datagrams are heard before any firewall sees them.
    """
    six = local.address.version == 6
    raw: socket.socket | None = None
    ear: socket.socket | None = None
    try:
        raw = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        raw.setblocking(False)
        _attach(raw, bpf_program(local, remote, spis))
        if six:
            # the kernel computes and checks the checksum; without it datagrams would leave with none
            raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, _UDP_CHECKSUM_AT)
        bypass(raw)
        if mark:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            kind = socket.htons(_ETHERTYPE[local.address.version])
            ear = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, kind)
            ear.setblocking(False)
            _attach(ear, bpf_program(local, remote, spis, below=True))
            _attach(raw, [(_RET, 0, 0, 0)])
        raw.bind((str(local.address), 0))
    except OSError as error:
        for each in (raw, ear):
            if each is not None:
                each.close()
        hint = "the agent must run as root or with CAP_NET_RAW and CAP_NET_ADMIN" if _denied(error) else ""
        raise LinkError(f"no raw socket at {local.address}: {error.strerror}", hint=hint) from error
    return RawLink(raw, local, remote, ear)


def _denied(error: OSError) -> bool:
    return error.errno in (errno.EPERM, errno.EACCES)


def udp_datagram(local: Endpoint, remote: Endpoint, payload: bytes) -> bytes:
    """UDP header, checksum included (RFC 768; RFC 8200, 8.1), and payload."""
    length = _UDP_HEADER + len(payload)
    ports = local.port.to_bytes(2) + remote.port.to_bytes(2)
    pseudo = local.address.packed + remote.address.packed
    if local.address.version == 6:
        pseudo += length.to_bytes(4) + socket.IPPROTO_UDP.to_bytes(4)
    else:
        pseudo += socket.IPPROTO_UDP.to_bytes(2) + length.to_bytes(2)
    header = ports + length.to_bytes(2)
    covered = pseudo + header + bytes(2) + payload + bytes(length % 2)
    total = sum(struct.unpack(f"!{len(covered) // 2}H", covered))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    # A sum of zero is sent as all ones: zero means "no checksum".
    checksum = (~total & 0xFFFF) or 0xFFFF
    return header + checksum.to_bytes(2) + payload


# --- packet filter -------------------------------------------------------------------------------------

_LD_W_ABS, _LD_H_ABS, _LD_B_ABS, _LD_W_IND, _LD_H_IND, _LDX_MSH = 0x20, 0x28, 0x30, 0x40, 0x48, 0xB1
_JEQ, _RET = 0x15, 0x06

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand (struct sock_filter)."""


def bpf_program(
    local: Endpoint, remote: Endpoint, spis: tuple[bytes, bytes], *, below: bool = False
) -> list[Instruction]:
    """The filter: the UDP ports, the non-ESP marker where there is one, the IKE SPIs.

    An IPv4 raw socket sees packets from the IP header on, so offsets are relative to X, that header's length;
    an IPv6 one sees them from the UDP header on. A packet socket (`below`) sees IP packets of all protocols.
    """
    four = local.address.version == 4
    word, half = (_LD_W_IND, _LD_H_IND) if four else (_LD_W_ABS, _LD_H_ABS)
    start = _IP6_HEADER if below and not four else 0
    checks = [(_LD_B_ABS, 9 if four else 6, socket.IPPROTO_UDP)] if below else []
    checks += [(half, start, remote.port), (half, start + 2, local.port)]
    at = start + _UDP_HEADER
    if has_marker(local, remote):
        checks.append((word, at, 0))
        at += 4
    both = spis[0] + spis[1]
    checks += [(word, at + n, int.from_bytes(both[n : n + 4])) for n in range(0, 16, 4)]
    program: list[Instruction] = [(_LDX_MSH, 0, 0, 0)] if four else []
    for number, (load, offset, value) in enumerate(checks):
        to_drop = 2 * (len(checks) - number - 1) + 1
        program += [(load, 0, 0, offset), (_JEQ, 0, to_drop, value)]
    return [*program, (_RET, 0, 0, _MAX_DATAGRAM), (_RET, 0, 0, 0)]


def _attach(raw: socket.socket, program: list[Instruction]) -> None:
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    raw.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
