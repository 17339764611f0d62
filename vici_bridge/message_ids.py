"""`MessageIds`: the kernel notes which IKE messages left this host, so that no agent has to be awake. I/O.

charon tells over HA when a message ID was used, once; what it says while no agent runs, or faster than the
agent's socket holds, is lost, and no interface of it (strongSwan 5.9.8 to 6.0.6) tells the IDs again short
of a resync, which rekeys all CHILD_SAs. But the header of every IKE message shows its ID, and what leaves
this host was made by charon, under the keys of the SA: nothing that comes from outside is noted, nor what
the agent itself sends (`MARK`), of which it alone knows what came of it. The last request that left has
the ID before the next one; the last answer the ID before the one that the MN's next request must have
(RFC 7296, 2.2; windows of 1, as charon has them).

The rules and the notes outlive the agent. A note is forgotten a week after the last message.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ikectx.errors import KernelError, UsageError

from .mute import MARK, Spis, key_of
from .nftables import Table, run_nft

TABLE = "ikectx_ids"
_CHAIN = "output"
_MAPS = ("requests", "responses")
"""Maps of SPI pairs to the ID of the last message of that kind."""
_RULES = 4
_SIZE = 1 << 20
_RESPONSE = 0x20
_PRIORITY = -310
"""Before charon's messages can be kept back (`Mute`): it has used their IDs all the same."""


class MessageIds:
    """Notes by SPI pair. `ports`: charon.port and charon.port_nat_t.

    Belongs to the network namespace it is first used in. Threads may share it. Errors: KernelError.
    """

    def __init__(self, ports: Sequence[int] = (500, 4500)) -> None:
        if len(ports) != 2 or not all(0 < port < 65536 for port in ports):
            raise UsageError(f"IKE ports {ports!r}")
        self._plain, self._marked = ports
        self._lock = threading.Lock()
        self._table = Table(TABLE)

    def prepare(self) -> bool:
        """Begin to note. False: nothing was noted until now, so what left before is not known."""
        with self._lock:
            stood = self._table.rules(_CHAIN) == _RULES
            if not stood:
                self._build()
            return stood

    def close(self) -> None:
        """Leave; the kernel goes on noting."""
        with self._lock:
            self._table.close()

    def after(self, spis: Spis) -> tuple[int, int]:
        """Message IDs after those of the last request and of the last answer that left; 0: none was noted."""
        with self._lock:
            return self._after("requests", spis), self._after("responses", spis)

    def _after(self, name: str, spis: Spis) -> int:
        key = key_of(spis)
        noted = [each.data for each in self._table.elements(name, key) if each.key == key]
        if any(len(data) != 4 for data in noted):
            raise KernelError(
                f"nftables' map {name} of table inet {TABLE} holds something that is not ours",
                hint=f"look at `nft list table inet {TABLE}`",
            )
        return max((int.from_bytes(data) + 1 for data in noted), default=0)

    def _build(self) -> None:
        table = f"inet {TABLE}"
        lines = [f"add table {table}"]
        for name in _MAPS:
            # a mark has the 32 bits of a message ID
            lines.append(
                f"add map {table} {name} {{ typeof @th,64,64 . @th,128,64 : meta mark;"
                f" flags dynamic,timeout; size {_SIZE}; timeout 7d; }}"
            )
        lines += [
            f"add chain {table} {_CHAIN} {{ type filter hook output priority {_PRIORITY}; policy accept; }}",
            f"flush chain {table} {_CHAIN}",
        ]
        for port, test, at in ((self._plain, "", 64), (self._marked, "@th,64,32 0 ", 96)):
            key = f"@th,{at},64 . @th,{at + 64},64"
            # IKEv2, IKE_AUTH to INFORMATIONAL: an IKE_SA_INIT costs a stranger nothing, and is noted nowhere
            head = (
                f"meta mark != {MARK:#x} udp sport {port} {test}@th,{at + 136},8 0x20 @th,{at + 144},8 35-37"
            )
            note = f"{{ {key} : @th,{at + 160},32 }}"
            for name, flag in zip(_MAPS, (0, _RESPONSE), strict=True):
                # an update would leave the ID as it was: out, and in again
                lines.append(
                    f"add rule {table} {_CHAIN} {head} @th,{at + 152},8 & {_RESPONSE:#x} == {flag:#x}"
                    f" delete @{name} {note} add @{name} {note}"
                )
        run_nft("\n".join(lines) + "\n")
