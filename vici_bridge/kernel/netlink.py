"""A plain netlink socket: requests in one datagram, answers matched by number, errnos as `KernelError`. I/O.

pyroute2's own sockets bring an event loop of their own; a request to XFRM or the routing tables takes some
100 us, so blocking is right even inside asyncio. A socket belongs to the network namespace it was made in.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ikectx import trace
from ikectx.errors import KernelError

from .netlink_parts import ACK, DUMP, attributes
from .xfrm_parts import XfrmRequest

ROUTE = 0
XFRM = 6
NETFILTER = 12

_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_CAP_ACK = 10
_EXT_ACK = 11
_GET_STRICT_CHK = 12
_ERROR, _DONE, _OVERRUN = 2, 3, 4
_F_DUMP_INTR = 0x10
_F_CAPPED = 0x100
_F_ACK_TLVS = 0x200
_BUFFER = 1 << 18
_SOCKET_BUFFER = 1 << 22
_LONGEST = 1 << 26
"""Octets of a request: a transaction of nftables' has several hundred for each mobile node."""
_TIMEOUT = 5
_BATCH = 128
"""Messages in one datagram: their answers must fit the receive buffer, or the kernel drops them."""

_HINTS = {
    errno.EPERM: "the agent needs CAP_NET_ADMIN in this network namespace",
    errno.EPROTONOSUPPORT: "the kernel lacks ESP or XFRM: modprobe esp4 esp6 xfrm_user",
}


@dataclass(slots=True)
class NetlinkOutcome:
    """The result of one request: errno 0 or the kernel's, the kernel's text, the messages that it
    answered."""

    errno: int = -1
    text: str = ""
    answers: list[bytes] = field(default_factory=list)
    torn: bool = False
    """The kernel's list changed while it was read."""
    single: bool = False
    """Its one answer ends it, because no acknowledgement was asked for."""


def failure(request: XfrmRequest, outcome: NetlinkOutcome) -> KernelError:
    """The error for a request that was refused; it never holds the request itself."""
    words = f" ({outcome.text})" if outcome.text else ""
    return KernelError(
        f"the kernel refused to {request.what}: {os.strerror(outcome.errno)}{words}",
        errno=outcome.errno,
        hint=_HINTS.get(outcome.errno, ""),
    )


class Netlink:
    """One socket of a netlink protocol. Threads may share it."""

    def __init__(self, protocol: int, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._number = 0
        self._buffer = bytearray(_BUFFER)
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        except OSError as error:
            raise KernelError(
                f"no netlink socket for {name}: {error.strerror}",
                errno=error.errno or 0,
                hint=_HINTS.get(error.errno or 0, ""),
            ) from None
        # The kernel's own limit of time: with Python's each send and each receive costs a poll as well.
        seconds = struct.pack("@ll", _TIMEOUT, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        self._socket.bind((0, 0))
        # Short acknowledgements, because the kernel otherwise sends a refused request back, with its keys.
        for option in (_CAP_ACK, _EXT_ACK, _GET_STRICT_CHK):
            try:
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            except OSError:
                continue  # an older kernel; only convenience is lost
        for forced, option, octets in (
            (_SO_RCVBUFFORCE, socket.SO_RCVBUF, _SOCKET_BUFFER),
            (_SO_SNDBUFFORCE, socket.SO_SNDBUF, _LONGEST),
        ):
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, forced, octets)
            except OSError:
                self._socket.setsockopt(socket.SOL_SOCKET, option, octets)

    def close(self) -> None:
        self._socket.close()

    @property
    def port(self) -> int:
        """Netlink's number of this socket, which notifications of its changes carry."""
        return int(self._socket.getsockname()[0])

    def ask(self, request: XfrmRequest) -> list[bytes]:
        """The answers to one request, without the acknowledgement. Errors: KernelError."""
        for _ in range(4):
            outcome = self.transact([request])[0]
            if outcome.errno:
                raise failure(request, outcome)
            if not outcome.torn:
                break
        return outcome.answers

    def attempt(self, requests: Sequence[XfrmRequest], but: int) -> list[NetlinkOutcome]:
        """`transact`, with KernelError for the first that was refused for another reason than `but`."""
        outcomes = self.transact(requests)
        for request, outcome in zip(requests, outcomes, strict=True):
            if outcome.errno not in (0, but):
                raise failure(request, outcome)
        return outcomes

    def transact(self, requests: Sequence[XfrmRequest]) -> list[NetlinkOutcome]:
        """Send all in one datagram and collect their results; the kernel goes on after a refusal.

        Errors: KernelError if the kernel cannot be asked at all.
        """
        outcomes: list[NetlinkOutcome] = []
        for start in range(0, len(requests), _BATCH):
            with self._lock, trace.span(f"netlink {self._name}", "call"):
                outcomes += self._exchange(requests[start : start + _BATCH])
        return outcomes

    def _exchange(self, requests: Sequence[XfrmRequest]) -> list[NetlinkOutcome]:
        waiting: dict[int, NetlinkOutcome] = {}
        datagram = bytearray()
        for request in requests:
            self._number = (self._number + 1) & 0xFFFFFFFF or 1
            message = _numbered(request.message.reveal(), self._number)
            datagram += message
            (asked,) = struct.unpack_from("=H", message, 6)
            waiting[self._number] = NetlinkOutcome(single=not asked & ACK and asked & DUMP != DUMP)
        outcomes = list(waiting.values())
        try:
            self._socket.send(datagram)
            while waiting:
                size = self._socket.recv_into(self._buffer, 0, socket.MSG_TRUNC)  # its whole length
                if size > _BUFFER:
                    raise KernelError(
                        f"{self._name}: an answer of the kernel is longer than {_BUFFER} octets"
                    )
                self._sort(bytes(self._buffer[:size]), waiting)
        except BlockingIOError:
            raise KernelError(
                f"the kernel did not answer a request to {requests[0].what}", errno=errno.ETIMEDOUT
            ) from None
        except OSError as error:
            raise KernelError(
                f"netlink failed for a request to {requests[0].what}: {error.strerror}",
                errno=error.errno or 0,
                hint=_HINTS.get(error.errno or 0, ""),
            ) from None
        return outcomes

    @staticmethod
    def _sort(data: bytes, waiting: dict[int, NetlinkOutcome]) -> None:
        """Assign each message of a datagram to the request it answers; others are left over from a
        timeout."""
        at = 0
        while at + 16 <= len(data):
            length, kind, flags, number = struct.unpack_from("=IHHI", data, at)
            if length < 16 or at + length > len(data):
                return
            message = data[at : at + length]
            at += (length + 3) & ~3
            outcome = waiting.get(number)
            if outcome is None:
                continue
            outcome.torn |= bool(flags & _F_DUMP_INTR)
            if kind == _ERROR:
                if length < 20:
                    raise KernelError("an answer of the kernel's netlink is cut short")
                outcome.errno = -int(struct.unpack_from("=i", message, 16)[0])
                outcome.text = _words(message, flags)
                del waiting[number]
            elif kind == _DONE:
                outcome.errno = -int(struct.unpack_from("=i", message, 16)[0]) if length >= 20 else 0
                del waiting[number]
            elif kind > _OVERRUN:
                outcome.answers.append(message)
                if outcome.single:
                    outcome.errno = 0
                    del waiting[number]


def _numbered(messages: bytes, number: int) -> bytes:
    """A request with its number. One of several messages (nftables' transactions) gets one answer."""
    out = bytearray(messages + bytes(-len(messages) % 4))
    at = 0
    while at < len(out):
        struct.pack_into("=I", out, at + 8, number)
        at += (struct.unpack_from("=I", out, at)[0] + 3) & ~3
    return bytes(out)


def _words(message: bytes, flags: int) -> str:
    """The kernel's own explanation (NLMSGERR_ATTR_MSG), if it gave one."""
    if not flags & _F_ACK_TLVS or len(message) < 24:
        return ""
    (length,) = struct.unpack_from("=I", message, 20)
    at = 20 + (16 if flags & _F_CAPPED else (length + 3) & ~3)
    with suppress(ValueError):
        for number, value in attributes(message, at):
            if number == 1:
                return value.split(b"\0", 1)[0].decode("ascii", "replace")
    return ""


def event_socket(protocol: int, groups: Collection[int], what: str, buffer: int = 0) -> socket.socket:
    """A socket for the kernel's events of these groups; it never blocks. `buffer`: octets for those that
    wait. `what`: the subject of an error's text. Errors: KernelError."""
    try:
        events = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol
        )
    except OSError as error:
        raise deaf(what, error) from None
    if groups:
        listen(events, groups, what, buffer)
    return events


def listen(events: socket.socket, groups: Collection[int], what: str, buffer: int = 0) -> None:
    """Have such a socket hear these groups, too; it is closed after an error. Errors: KernelError."""
    try:
        events.bind((0, 0))
        for group in groups:
            events.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        if buffer:
            with suppress(OSError):
                events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer)
    except OSError as error:
        events.close()
        raise deaf(what, error) from None


def deaf(what: str, error: OSError) -> KernelError:
    """The error for events that cannot be heard."""
    return KernelError(f"{what} cannot be watched: {error.strerror}", errno=error.errno or 0)
