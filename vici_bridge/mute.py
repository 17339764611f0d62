"""`Mute`: keep the IKE messages of one SA from the wire, below charon, by nftables. I/O.

charon can be made passive only by whole segments (strongSwan 5.9.8 to 6.0.6). One nftables table holds
two sets of IKE SPI pairs, for messages to and from charon; a message whose header names a pair of the
set is dropped and counted. A look-up costs the same for one muted SA and for thousands. The rules outlive
the agent on purpose: an SA that was let go must not talk again because a process died.

The `nft` program makes the table, once. Pairs go in and out, and are counted, over netlink: they
are changed while an SA stands still, and a process takes some hundred times as long as a message.

Header offsets: RFC 7296, 3.1; RFC 3948, 2.2 for the four zero octets on port 4500.
Netlink: linux/netfilter/nf_tables.h, nfnetlink.h (uapi).
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ikectx.context import Secret
from ikectx.errors import KernelError, UsageError

from .netlink import NETFILTER, Netlink, Outcome, failure
from .xfrm_parts import Request

TABLE = "ikectx"
MARK = 0x494B45
"""Packet mark of IKE that the agent itself sends for a muted SA."""
_INET = 1
_RULES = 2
"""In each chain: IKE messages with and without the four zero octets."""
_SIDES = {"in": ("muted_in", "input", "dport"), "out": ("muted_out", "output", "sport")}
"""Direction: its set, its chain and hook, charon's port in the UDP header."""
_PLAIN = "@th,64,64 . @th,128,64"
_MARKED = "@th,64,32 0 @th,96,64 . @th,160,64"
_TIMEOUT = 30.0

_SUBSYSTEM = 10
_DELTABLE, _GETCHAIN, _NEWSETELEM, _GETSETELEM, _DELSETELEM = 2, 4, 12, 13, 14
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_REQUEST, _ACK, _DUMP, _CREATE = 0x1, 0x4, 0x300, 0x400
_NESTED = 0x8000

Spis = tuple[bytes, bytes]
"""(initiator SPI, responder SPI), 8 octets each, as in the IKE header."""


@dataclass(frozen=True, slots=True)
class Muted:
    """One muted direction of an IKE_SA and the messages it kept back."""

    spis: Spis
    direction: str
    packets: int


class Mute:
    """Freezes of IKE by SPI pair. `ports`: those charon listens on (charon.port, charon.port_nat_t).

    Belongs to the network namespace it is first used in. Calls are idempotent and take some 100 us, but the
    first to mute (or `prepare`) runs `nft`, some 20 ms. Threads may share it. Errors: KernelError.
    """

    def __init__(self, ports: Sequence[int] = (500, 4500)) -> None:
        if not ports or not all(0 < port < 65536 for port in ports):
            raise UsageError(f"IKE ports {ports!r}")
        self._ports = ", ".join(str(port) for port in ports)
        self._lock = threading.Lock()
        self._socket: Netlink | None = None

    def prepare(self) -> None:
        """Make the table now, so that no freeze waits for it, and see whether nftables works at all."""
        with self._lock:
            if not all(self._stands(direction) for direction in _SIDES):
                self._build()

    def close(self) -> None:
        """Leave. Muted SAs stay muted; a table without any goes."""
        with self._lock:
            try:
                if not self._listing():
                    self._drop_table()
            finally:
                if self._socket is not None:
                    self._socket.close()
                    self._socket = None

    def mute_in(self, spis: Spis) -> None:
        """Nothing of the SA's peer reaches charon any more."""
        self._mute("in", spis)

    def mute_out(self, spis: Spis) -> None:
        """Nothing of charon reaches the SA's peer any more. What has the mark `MARK` does."""
        self._mute("out", spis)

    def counters(self, spis: Spis) -> tuple[int, int]:
        """Messages kept back so far, (to charon, from charon)."""
        with self._lock:
            return (self._count("in", spis), self._count("out", spis))

    def unmute(self, spis: Spis) -> None:
        """Let both directions flow."""
        both = b"".join(
            _element_message(_DELSETELEM, side, spis, acknowledged=side == "out") for side in _SIDES
        )
        each = [_element_message(_DELSETELEM, side, spis) for side in _SIDES]
        what = f"delete IKE SPIs {spis[0].hex()} {spis[1].hex()}"
        with self._lock:
            # A deletion waits some milliseconds in the kernel: one for both, unless one of them is absent.
            for messages in (both, *each):
                done = self._outcome(Request(Secret(_batch(messages)), what))
                if done.errno not in (0, errno.ENOENT):
                    raise failure(Request(Secret(), what), done)
                if messages is both and done.errno == 0:
                    break

    def unmute_all(self) -> None:
        """Let everything flow."""
        with self._lock:
            self._drop_table()

    def listing(self) -> list[Muted]:
        """All that is muted, also by an agent before this one."""
        with self._lock:
            return self._listing()

    def _mute(self, direction: str, spis: Spis) -> None:
        request = _element(_NEWSETELEM, direction, spis)
        with self._lock:
            # Looked at each time: a firewall that was reloaded may have flushed table or rules, and a freeze
            # that does not freeze is worse than none.
            if not self._stands(direction):
                self._build()
            self._transact(request)

    def _count(self, direction: str, spis: Spis) -> int:
        found = self._elements(_element(_GETSETELEM, direction, spis), direction)
        return sum(entry.packets for entry in found if entry.spis == spis)

    def _listing(self) -> list[Muted]:
        return [entry for side in _SIDES for entry in self._elements(_element(_GETSETELEM, side, None), side)]

    def _elements(self, request: Request, direction: str) -> list[Muted]:
        try:
            return [
                Muted(spis, direction, packets)
                for answer in self._transact(request, absent_ok=True)
                for spis, packets in _read_elements(answer)
            ]
        except (struct.error, IndexError):
            raise KernelError(
                f"nftables' table inet {TABLE} holds something that is not ours",
                hint=f"look at `nft list table inet {TABLE}`",
            ) from None

    def _stands(self, direction: str) -> bool:
        """Whether the chain of a direction is there with its rules."""
        _, chain, _ = _SIDES[direction]
        body = _text(1, TABLE) + _text(3, chain)
        request = Request(Secret(_message(_GETCHAIN, _REQUEST | _ACK, body)), f"look for chain {chain}")
        for answer in self._transact(request, absent_ok=True, any_refusal_ok=True):
            use = dict(_attributes(answer[20:])).get(6, b"")
            return int.from_bytes(use) == _RULES
        return False

    def _drop_table(self) -> None:
        body = _text(1, TABLE)
        request = Request(Secret(_batch(_message(_DELTABLE, _REQUEST | _ACK, body))), f"delete table {TABLE}")
        self._transact(request, absent_ok=True)

    def _transact(
        self, request: Request, *, absent_ok: bool = False, any_refusal_ok: bool = False
    ) -> list[bytes]:
        outcome = self._outcome(request)
        if outcome.errno and not any_refusal_ok and not (absent_ok and outcome.errno == errno.ENOENT):
            raise failure(request, outcome)
        return outcome.answers

    def _outcome(self, request: Request) -> Outcome:
        if self._socket is None:
            self._socket = Netlink(NETFILTER, "nftables")
        return self._socket.transact([request])[0]

    def _build(self) -> None:
        """Make table, sets, chains and rules, in one transaction; what is muted stays so."""
        table = f"inet {TABLE}"
        lines = [f"add table {table}"]
        for name, chain, port in _SIDES.values():
            lines += [
                f"add set {table} {name} {{ typeof {_PLAIN}; counter; }}",
                f"add chain {table} {chain} {{ type filter hook {chain} priority raw; policy accept; }}",
                f"flush chain {table} {chain}",
            ]
            own = f"meta mark != {MARK:#x} " if chain == "output" else ""
            lines += [
                f"add rule {table} {chain} {own}udp {port} {{ {self._ports} }} {match} @{name} drop"
                for match in (_PLAIN, _MARKED)
            ]
        run_nft("\n".join(lines) + "\n")


def run_nft(script: str) -> None:
    """Run one transaction. Errors: KernelError."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    program = shutil.which("nft", path=path)
    if program is None:
        raise KernelError("the nft program is missing", hint="install the package nftables")
    try:
        done = subprocess.run(
            [program, "-f", "-"],
            input=script,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"nft did not run: {error}") from None
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "rror" in line), "no reason given")
        raise KernelError(
            f"nft refused: {reason.strip()}",
            hint="the agent needs CAP_NET_ADMIN, and the kernel nf_tables (modprobe nf_tables)",
        )


# nftables' netlink messages, as few as are needed.


def _attribute(number: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)


def _text(number: int, text: str) -> bytes:
    return _attribute(number, text.encode() + b"\0")


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        length, number = struct.unpack_from("=HH", data, at)
        if length < 4 or at + length > len(data):
            raise IndexError(length)
        yield number & 0x3FFF, data[at + 4 : at + length]
        at += (length + 3) & ~3


def _message(number: int, flags: int, body: bytes, *, batch_mark: bool = False) -> bytes:
    kind = number if batch_mark else _SUBSYSTEM << 8 | number
    family, resource = (0, _SUBSYSTEM) if batch_mark else (_INET, 0)
    head = struct.pack("=IHHII", 20 + len(body), kind, flags, 0, 0)
    return head + bytes((family, 0)) + resource.to_bytes(2) + body


def _batch(message: bytes) -> bytes:
    """A change is a transaction of its own."""
    begin = _message(_BATCH_BEGIN, _REQUEST, b"", batch_mark=True)
    end = _message(_BATCH_END, _REQUEST, b"", batch_mark=True)
    return begin + message + end


def _element_message(number: int, direction: str, spis: Spis | None, *, acknowledged: bool = True) -> bytes:
    """Add, delete or get one pair of a direction's set; None: get all. A refusal is always told."""
    body = _text(1, TABLE) + _text(2, _SIDES[direction][0])
    if spis is None:
        return _message(number, _REQUEST | _DUMP, body)
    if len(spis[0]) != 8 or len(spis[1]) != 8:
        raise UsageError("an IKE SPI has 8 octets")
    key = _attribute(1 | _NESTED, _attribute(1, spis[0] + spis[1]))
    body += _attribute(3 | _NESTED, _attribute(1 | _NESTED, key))
    flags = _REQUEST | (_ACK if acknowledged else 0) | (_CREATE if number == _NEWSETELEM else 0)
    return _message(number, flags, body)


def _element(number: int, direction: str, spis: Spis | None) -> Request:
    message = _element_message(number, direction, spis)
    verb = "put" if number == _NEWSETELEM else "look for"
    name = "all IKE SPIs" if spis is None else f"IKE SPIs {spis[0].hex()} {spis[1].hex()}"
    what = f"{verb} {name} in set {_SIDES[direction][0]}"
    return Request(Secret(_batch(message) if number == _NEWSETELEM else message), what)


def _read_elements(answer: bytes) -> Iterator[tuple[Spis, int]]:
    """(pair, packets) of each element in an answer. Errors: struct.error, IndexError."""
    for number, elements in _attributes(answer[20:]):
        if number != 3:
            continue
        for _, element in _attributes(elements):
            parts = dict(_attributes(element))
            key = dict(_attributes(parts[1]))[1] if 1 in parts else b""
            if len(key) != 16:
                raise IndexError(len(key))
            # one counter: the element's expression, or the only one of a list
            counter = parts.get(7) or dict(_attributes(parts.get(11, b""))).get(1, b"")
            data = dict(_attributes(dict(_attributes(counter)).get(2, b"")))
            yield (key[:8], key[8:]), int.from_bytes(data.get(2, b""))
