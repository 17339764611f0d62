"""`MessageIds`: the kernel notes which IKE messages left this host, also while no agent runs. I/O.

charon reports each used message ID over HA once. A report is lost if no agent runs, or if the agent's socket
is full, and no interface of charon (strongSwan 5.9.8 to 6.0.6) reports the IDs again except a resync, which
rekeys all CHILD_SAs. But the header of every IKE message has its ID, and messages that leave this host were
made by charon, under the keys of the SA. Messages from outside are not noted, nor those that the agent itself
sends (`MARK`), because only the agent knows whether they were answered. The last request that left has the ID
before the next one; the last answer has the ID before the one that the mobile node's next request must have
(RFC 7296, 2.2; windows of 1, as charon has them).

The rules and the notes outlive the agent. A note is forgotten a week after the last message.

A note is used only after the rules were tried, because versions of nft do not agree on the octets of a map's
value (1.0.6 keeps a `meta mark` as the packet has it, 1.1 turns it into the host's order), and the table may
come from an earlier agent or nft. So messages with known IDs are sent over the loopback interface, and the
IDs that are read back decide whether the table stays.
"""

from __future__ import annotations

import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from ikectx.errors import KernelError, UsageError
from ikectx.sa.name import SaName
from ikectx.wire.ikev2 import IKE_PORT

from .mute import MARK
from .nftables import NftTable, run_nft

TABLE = "ikectx_ids"
_CHAIN = "output"
_MAPS = ("requests", "responses")
"""Maps of SPI pairs to the ID of the last message of that kind."""
_MARKER = bytes(4)
"""The non-ESP marker (RFC 3948, 2.2)."""
_SIZE = 1 << 20
_RESPONSE = 0x20
_TRIALS = ((0, 0x01020304), (_RESPONSE, 0x05060708))
"""Flags and message ID of the messages that are sent to try the rules."""
_PRIORITY = -310
"""Before charon's messages can be dropped by `Mute`, because charon has used their IDs all the same."""


class MessageIds:
    """Notes by SPI pair. `ports`: charon.port and charon.port_nat_t.

    Belongs to the network namespace it is first used in. Threads may share it. Errors: KernelError.
    """

    def __init__(self, ports: Sequence[int] = (500, 4500)) -> None:
        if len(ports) != 2 or not all(0 < port < 65536 for port in ports):
            raise UsageError(f"IKE ports {ports!r}")
        self._plain, self._marked = ports
        self._forms = [(self._plain, b""), (self._marked, _MARKER)]
        if self._plain != IKE_PORT:  # charon leaves the marker out only if one of both ports is 500
            self._forms.append((self._plain, _MARKER))
        self._lock = threading.Lock()
        self._table = NftTable(TABLE)

    def prepare(self) -> bool:
        """Begin to note. False: messages that left before are not known, because they were not noted, or
        wrongly.

        Errors: KernelError also if a new table does not note messages that leave; then there is no table.
        """
        with self._lock:
            if self._right():
                return True
            self._build()
            try:
                if self._right():
                    return False
            except BaseException:
                self._table.drop()
                raise
            self._table.drop()
            raise KernelError(
                "the message ID that nftables notes of a message is not what it reads back as",
                hint="please report the versions of `nft --version` and of the kernel",
            )

    @property
    def port(self) -> int:
        """See `NftTable.port`."""
        return self._table.port

    def right(self) -> bool | None:
        """Whether the present rules note messages that leave, tried now; None: there are no rules."""
        with self._lock:
            return self._right() if self._table.rules(_CHAIN) != [0] else None

    def close(self) -> None:
        """Stop; the kernel goes on noting."""
        with self._lock:
            self._table.close()

    def after(self, spis: SaName) -> tuple[int, int]:
        """Message IDs after those of the last request and of the last answer that left; 0: none was noted."""
        with self._lock:
            return self._after(spis)

    def _after(self, spis: SaName) -> tuple[int, int]:
        key, after = spis.octets, []
        for name, elements in zip(_MAPS, self._table.held(_MAPS, key), strict=True):
            noted = [each.data for each in elements if each.key == key]
            if any(len(data) != 4 for data in noted):
                raise KernelError(
                    f"nftables' map {name} of table inet {TABLE} holds something that is not ours",
                    hint=f"look at `nft list table inet {TABLE}`",
                )
            after.append(max((int.from_bytes(data) + 1 for data in noted), default=0))
        return after[0], after[1]

    def _right(self) -> bool:
        """Send a request and an answer from each port, with IDs whose octets all differ, and look."""
        if self._table.rules(_CHAIN) != [2 * len(self._forms)]:
            return False
        for port, before in self._forms:
            spis = SaName(secrets.token_bytes(8), secrets.token_bytes(8))
            _send_to_itself(port, [before + _message(spis, *trial) for trial in _TRIALS])
            try:
                noted = self._after(spis)
            finally:
                self._table.remove(_MAPS, [spis.octets])
            if noted != tuple(number + 1 for _, number in _TRIALS):
                return False
        return True

    def _build(self) -> None:
        """Make a new table. The notes of an older one are useless, because newer messages may be missing."""
        table = f"inet {TABLE}"
        lines = [f"add table {table}", f"delete table {table}", f"add table {table}"]
        for name in _MAPS:
            lines.append(
                f"add map {table} {name} {{ typeof @th,64,64 . @th,128,64 : @th,224,32;"
                f" flags dynamic,timeout; size {_SIZE}; timeout 7d; }}"
            )
        lines.append(
            f"add chain {table} {_CHAIN} {{ type filter hook output priority {_PRIORITY}; policy accept; }}"
        )
        for port, before in self._forms:
            test, at = ("@th,64,32 0 ", 96) if before else ("", 64)
            key = f"@th,{at},64 . @th,{at + 64},64"
            # IKEv2, IKE_AUTH to INFORMATIONAL: IKE_SA_INIT is left out, because strangers can cause any
            # number
            head = (
                f"meta mark != {MARK:#x} udp sport {port} {test}@th,{at + 136},8 0x20 @th,{at + 144},8 35-37"
            )
            note = f"{{ {key} : @th,{at + 160},32 }}"
            for name, flag in zip(_MAPS, (0, _RESPONSE), strict=True):
                # an update would leave the ID unchanged, so delete the element and add it again
                lines.append(
                    f"add rule {table} {_CHAIN} {head} @th,{at + 152},8 & {_RESPONSE:#x} == {flag:#x}"
                    f" delete @{name} {note} add @{name} {note}"
                )
        run_nft("\n".join(lines) + "\n")


def _message(spis: SaName, flags: int, number: int) -> bytes:
    """An INFORMATIONAL message without payloads, of an SA that nobody has (RFC 7296, 3.1)."""
    return spis.octets + bytes((0, 0x20, 37, flags)) + struct.pack("!II", number, 28)


def _send_to_itself(port: int, datagrams: Sequence[bytes]) -> None:
    """Send from that UDP port, which charon may hold, to a socket of our own on the loopback interface.

    Errors: KernelError.
    """
    try:
        with ExitStack() as stack:
            # a socket receives the messages, because charon would be told of an unreachable port
            sink = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sink.bind(("127.0.0.1", 0))
            raw = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP))
            raw.bind(("127.0.0.1", 0))
            for datagram in datagrams:
                # RFC 768: source port, destination port, length, no checksum
                head = struct.pack("!HHHH", port, sink.getsockname()[1], 8 + len(datagram), 0)
                with suppress(PermissionError):  # a firewall dropped it, after the rules had seen it
                    raw.sendto(head + datagram, ("127.0.0.1", 0))
    except OSError as error:
        raise KernelError(
            f"the notes of message IDs cannot be tried over the loopback interface: {error.strerror}",
            errno=error.errno or 0,
            hint="the agent needs CAP_NET_RAW, and the interface lo must be up",
        ) from None
