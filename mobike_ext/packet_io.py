"""I/O: IKE datagrams from a raw socket beside a running charon, which owns the UDP ports.

A raw UDP socket may send from any source port of its address and gets a copy of each datagram that arrives
there, ESP in UDP included; a classic BPF filter passes only IKE of the one SA, and only from its peer if that
is known. charon gets its copy too and ignores it while the SA is PASSIVE. Like charon's own sockets this one
has bypass policies, so that neither a tunnel's policy nor the kernel's inbound check affects IKE.

If a firewall keeps the SA's IKE from a charon that is not PASSIVE, it lets packets with a `mark` out, and
incoming packets are received by a packet socket, below the firewall.

Needs CAP_NET_RAW and CAP_NET_ADMIN. Source: Linux raw(7), packet(7), socket(7).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Iterator
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from ikectx.errors import KernelError, LinkError, UsageError
from ikectx.net.bypass import bypass
from ikectx.sa.context import Address, Endpoint
from ikectx.wire.ikev2 import IKE_PORT, has_marker

from . import bpf

_LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_IPV6_CHECKSUM = 7
_UDP_CHECKSUM_AT = 6
_ETHERTYPE = {4: 0x0800, 6: 0x86DD}
IP4_HEADER, IP6_HEADER, UDP_HEADER = 20, 40, 8
"""Octets; options and extension headers come on top."""
FRAGMENT = 0x3FFF
"""More fragments, and the offset: zero in a whole IPv4 packet."""
_IDLE = 2.0
"""Seconds after which a packet socket that nobody uses is closed."""
_DRAINED = 1024
"""Reads at most, because a socket that is being flooded is never empty."""
_IN_A_ROW = 16
"""Datagrams that are read one after the other before other tasks have their turn."""
MAX_DATAGRAM = 65535
"""Octets of an IP packet."""


class RawLink:
    """One raw UDP socket for one IKE_SA; see `open_raw`. `receiver`: the packet socket that receives in its
    stead."""

    def __init__(
        self,
        raw: socket.socket,
        local: Endpoint,
        remote: Endpoint | None,
        receiver: socket.socket | None = None,
    ) -> None:
        self._raw = raw
        self._receiver = receiver
        self._local = local
        self._remote = remote
        self._in_a_row = 0

    def __enter__(self) -> RawLink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Receive no more; idempotent."""
        self._raw.close()
        if self._receiver is not None:
            _idle.keep(self._local.address.version, self._receiver)
            self._receiver = None

    def send(self, payload: bytes, to: Endpoint | None = None) -> None:
        """Send one UDP datagram, to the peer unless `to` is given. Errors: OSError."""
        to = to or self._remote
        if to is None:
            raise UsageError("nobody to send to: the peer's address is not known")
        self._raw.sendto(udp_datagram(self._local, to, payload), (str(to.address), 0))

    async def receive(self, within: float) -> tuple[bytes, Endpoint] | None:
        """The next UDP payload for us and where it came from; None after `within` s, or for one of others.

        A datagram is read only when it is taken. asyncio's `sock_recvfrom` under a timeout loses it if both
        have come when the process gets a CPU again: the datagram is read, and then the reading is cancelled.
        """
        heard = self._receiver or self._raw
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW:  # whoever knows the SPIs may send faster than they are read
            self._in_a_row = 0
            await asyncio.sleep(0)
        try:
            return self._read(*heard.recvfrom(MAX_DATAGRAM))
        except BlockingIOError:
            self._in_a_row = 0
            await _readable(heard, within)
        except OSError:
            # This is an ICMP error somebody sent: unauthenticated, so it decides nothing.
            return None
        try:
            return self._read(*heard.recvfrom(MAX_DATAGRAM))
        except OSError:
            return None

    def drain(self) -> Iterator[tuple[bytes, Endpoint]]:
        """The datagrams that have arrived by now, as `receive` returns them."""
        for _ in range(_DRAINED):
            try:
                found = self._read(*(self._receiver or self._raw).recvfrom(MAX_DATAGRAM))
            except BlockingIOError:
                return
            except OSError:
                continue
            if found is not None:
                yield found

    def _read(self, packet: bytes, sender: Any) -> tuple[bytes, Endpoint] | None:
        if self._receiver is None and self._local.address.version == 6:  # the kernel keeps the IP header
            # one for another port has come before the filter was there
            if len(packet) < UDP_HEADER or int.from_bytes(packet[2:4]) != self._local.port:
                return None
            source = Endpoint(ip_address(sender[0].partition("%")[0]), int.from_bytes(packet[:2]))
            payload = packet[UDP_HEADER : int.from_bytes(packet[4:6])]
        else:
            found = udp_in(packet)
            if found is None or found[1] != self._local:
                return None
            payload, _, source = found
        if self._remote is not None and source.address != self._remote.address:
            return None
        return payload, source


async def _readable(heard: socket.socket, within: float) -> None:
    """Until there may be something to read, or for `within` s."""
    loop, number = asyncio.get_running_loop(), heard.fileno()
    over: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        if not over.done():
            over.set_result(None)

    loop.add_reader(number, end)
    timer = loop.call_later(within, end)
    try:
        await over
    finally:
        timer.cancel()
        loop.remove_reader(number)


def open_raw(
    local: Endpoint, remote: Endpoint | None, spis: tuple[bytes, bytes], *, mark: int = 0
) -> RawLink:
    """A raw socket at `local` that receives only IKE of `spis` from `remote`, None: from anywhere.

    `mark` (SO_MARK): sent with every datagram; and datagrams are received before any firewall sees them.
    Errors: LinkError if it is not available, KernelError if descriptors or memory for it are lacking.
    """
    six = local.address.version == 6
    raw: socket.socket | None = None
    receiver: socket.socket | None = None
    try:
        raw = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        raw.setblocking(False)
        # with a mark another socket receives
        bpf.attach(raw, [(bpf.RET, 0, 0, 0)] if mark else bpf_program(local, remote, spis))
        if six:
            # the kernel computes and checks the checksum; without it datagrams would leave with none
            raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, _UDP_CHECKSUM_AT)
        bypass(raw)
        if mark:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            receiver = _idle.take(local.address.version, bpf_program(local, remote, spis, below=True))
        raw.bind((str(local.address), 0))
    except OSError as error:
        for each in (raw, receiver):
            if each is not None:
                each.close()
        text = f"no raw socket at {local.address}: {error.strerror}"
        if error.errno in _LACKING:  # which has nothing to do with the peer or the way to it
            hint = "LimitNOFILE of the service bounds its descriptors; `ls /proc/PID/fd` shows them"
            raise KernelError(text, errno=error.errno, hint=hint) from error
        hint = "the agent must run as root or with CAP_NET_RAW and CAP_NET_ADMIN" if denied(error) else ""
        raise LinkError(text, hint=hint) from error
    return RawLink(raw, local, remote, receiver)


def udp_in(packet: bytes) -> tuple[bytes, Endpoint, Endpoint] | None:
    """(payload, receiver, sender) of an IP packet with UDP; None for all else.

    None, too, for IP fragments and what follows IPv6 extension headers. Checksums are not looked at.
    """
    source: Address
    target: Address
    match packet[0] >> 4 if packet else 0:
        case 4 if len(packet) >= IP4_HEADER:
            header, protocol = (packet[0] & 0x0F) * 4, packet[9]
            fragment = int.from_bytes(packet[6:8]) & FRAGMENT
            source, target = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
        case 6 if len(packet) >= IP6_HEADER:
            header, protocol, fragment = IP6_HEADER, packet[6], 0
            source, target = IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
        case _:
            return None
    udp = packet[header:]
    length = int.from_bytes(udp[4:6])
    if header < IP4_HEADER or protocol != socket.IPPROTO_UDP or fragment:
        return None
    if not UDP_HEADER <= length <= len(udp):
        return None
    receiver = Endpoint(target, int.from_bytes(udp[2:4]))
    # octets after the datagram are padding of the link layer
    return udp[UDP_HEADER:length], receiver, Endpoint(source, int.from_bytes(udp[:2]))


def udp_datagram(local: Endpoint, remote: Endpoint, payload: bytes) -> bytes:
    """UDP header, checksum included (RFC 768; RFC 8200, 8.1), and payload."""
    length = UDP_HEADER + len(payload)
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
    # A sum of zero is sent as all ones, because zero means "no checksum".
    checksum = (~total & 0xFFFF) or 0xFFFF
    return header + checksum.to_bytes(2) + payload


@lru_cache(maxsize=16)
def bpf_program(
    local: Endpoint, remote: Endpoint | None, spis: tuple[bytes, bytes], *, below: bool = False
) -> list[bpf.Instruction]:
    """The filter: the UDP ports, the non-ESP marker if there is one, the IKE SPIs.

    An IPv4 raw socket sees packets from the IP header on, so offsets are relative to X, that header's length;
    an IPv6 one sees them from the UDP header on. A packet socket (`below`) sees IP packets of all protocols.
    Kept, because an SA that comes has two sockets with the same filter.
    """
    four = local.address.version == 4
    word, half = (bpf.LD_X, bpf.LDH_X) if four else (bpf.LD, bpf.LDH)
    start = IP6_HEADER if below and not four else 0
    checks = [(bpf.LDB, 9 if four else 6, socket.IPPROTO_UDP)] if below else []
    if remote is not None:
        checks.append((half, start, remote.port))
    checks.append((half, start + 2, local.port))
    at = start + UDP_HEADER
    if local.port != IKE_PORT and (remote is None or has_marker(local, remote)):
        checks.append((word, at, 0))
        at += 4
    both = spis[0] + spis[1]
    checks += [(word, at + n, int.from_bytes(both[n : n + 4])) for n in range(0, 16, 4)]
    lines: list[bpf.Line] = [(bpf.LDX_MSH, 0)] if four else []
    for load, offset, value in checks:
        lines += [(load, offset), (bpf.JEQ, value, "", "drop")]
    return bpf.assemble([*lines, (bpf.RET, MAX_DATAGRAM), "drop", (bpf.RET, 0)])


class _Idle:
    """Packet sockets that nobody uses now, for those who want one next.

    To close one keeps its thread waiting until no CPU may still use it (`synchronize_net`), which takes ten
    milliseconds: the event loop would stand still for that, twice for each SA. So the next SA gets it with
    another filter, and one that nobody has wanted for a while is closed by a thread.
    """

    def __init__(self) -> None:
        self._sockets: dict[tuple[int, str], list[socket.socket]] = {}
        """By IP version and network namespace, to which a socket belongs for ever."""

    def take(self, version: int, program: list[bpf.Instruction]) -> socket.socket:
        """One that receives by that filter. Errors: OSError."""
        idle = self._sockets.get(_place(version))
        if not idle:
            return packet_socket(version, program)
        receiver = idle.pop()
        bpf.attach(receiver, program)
        return receiver

    def keep(self, version: int, receiver: socket.socket) -> None:
        """Nobody uses it any more."""
        try:
            loop = asyncio.get_running_loop()
            bpf.attach(receiver, [(bpf.RET, 0, 0, 0)])
            for _ in range(_DRAINED):
                receiver.recv(1)
        except BlockingIOError:
            place = _place(version)
            self._sockets.setdefault(place, []).append(receiver)
            loop.call_later(_IDLE, self._end, place, receiver)
        except (OSError, RuntimeError):  # it cannot be used again, or there is no loop to keep it for
            receiver.close()
        else:
            receiver.close()

    def _end(self, place: tuple[int, str], receiver: socket.socket) -> None:
        idle = self._sockets[place]
        if receiver in idle:
            idle.remove(receiver)
            asyncio.get_running_loop().run_in_executor(None, receiver.close)


_idle = _Idle()


def _place(version: int) -> tuple[int, str]:
    return version, os.readlink("/proc/thread-self/ns/net")


def packet_socket(version: int, program: list[bpf.Instruction]) -> socket.socket:
    """A socket that receives IP packets of one version from the IP header on, below any firewall. Errors:
    OSError."""
    receiver = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETHERTYPE[version]))
    try:
        receiver.setblocking(False)
        bpf.attach(receiver, program)  # packets from before are checked like the rest
    except OSError:
        receiver.close()
        raise
    return receiver


def denied(error: OSError) -> bool:
    """Whether the agent lacks rights."""
    return error.errno in (errno.EPERM, errno.EACCES)
