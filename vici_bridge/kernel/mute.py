"""`Mute`: keep the IKE messages of one SA from the wire, below charon, by nftables. I/O.

charon can be made passive only by whole segments (strongSwan 5.9.8 to 6.0.6). One nftables table has two sets
of IKE SPI pairs, for messages to and from charon; a message whose header has a pair of the set is dropped and
counted. A look-up costs the same for one muted SA and for thousands. The rules outlive the agent on purpose,
because an SA that was let go must not send again when a process ends.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ikectx.errors import KernelError
from ikectx.sa.name import SaName

from .nftables import MARKED, PLAIN, NftTable, run_nft

TABLE = "ikectx"
MARK = 0x494B45
"""Packet mark of IKE messages that the agent itself sends for a muted SA."""
_RULES = 2
"""Rules in each chain: for IKE messages with and without the four zero octets."""
_SIDES = {"in": ("muted_in", "input"), "out": ("muted_out", "output")}
"""Direction: its set, its chain and hook."""


@dataclass(frozen=True, slots=True)
class Muted:
    """One muted direction of an IKE_SA and the number of dropped messages."""

    spis: SaName
    direction: str
    packets: int


class Mute:
    """Mutes IKE by SPI pair, whatever the UDP ports: charon may listen on others than 500 and 4500.

    It belongs to the network namespace that it is first used in. Calls are idempotent and take some 100 us,
    but the first to mute (or `prepare`) runs `nft`, some 20 ms. Threads may share it. Errors: KernelError.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._table = NftTable(TABLE)
        self._muted: dict[str, set[SaName]] = {direction: set() for direction in _SIDES}
        """SAs that are muted now, in case somebody empties the table."""

    @property
    def port(self) -> int:
        """See `NftTable.port`."""
        return self._table.port

    def prepare(self) -> bool:
        """Make the table now, so that no freeze waits for it, and check whether nftables works at all.

        Called again after somebody may have removed it, or elements of it. Returns whether all was there.
        """
        with self._lock:
            stood = all(self._stands(direction) for direction in _SIDES)
            if not stood:
                self._build()
            there = self._listing()
            for direction, muted in self._muted.items():
                held = {one.spis for one in there if one.direction == direction}
                for spis in muted - held:
                    stood = False
                    self._table.add(_SIDES[direction][0], spis.octets)
                muted.update(held)
            return stood

    def close(self) -> None:
        """Stop. Muted SAs stay muted; a table without any is deleted."""
        with self._lock:
            try:
                if not self._listing():
                    self._table.drop()
            finally:
                self._table.close()

    def mute_in(self, spis: SaName) -> None:
        """Drop all messages of the SA's peer to charon."""
        self._mute("in", spis)

    def mute_out(self, spis: SaName) -> None:
        """Drop all messages of charon to the SA's peer, except those with the mark `MARK`."""
        self._mute("out", spis)

    def counters(self, spis: SaName) -> tuple[int, int]:
        """Messages dropped so far, (to charon, from charon)."""
        with self._lock:
            return (self._count("in", spis), self._count("out", spis))

    def unmute(self, spis: SaName) -> None:
        """Let both directions pass."""
        with self._lock:
            for muted in self._muted.values():
                muted.discard(spis)
            self._table.remove([name for name, _ in _SIDES.values()], spis.octets)

    def listing(self) -> list[Muted]:
        """All muted SAs, also those of an agent before this one."""
        with self._lock:
            return self._listing()

    def _mute(self, direction: str, spis: SaName) -> None:
        name, _ = _SIDES[direction]
        key = spis.octets
        with self._lock:
            # Checked each time, because a reloaded firewall may have flushed table or rules, and a freeze
            # that does not freeze is worse than none.
            if not self._stands(direction):
                self._build()
            self._table.add(name, key)
            self._muted[direction].add(spis)

    def _count(self, direction: str, spis: SaName) -> int:
        return sum(entry.packets for entry in self._elements(direction, spis) if entry.spis == spis)

    def _listing(self) -> list[Muted]:
        return [entry for direction in _SIDES for entry in self._elements(direction)]

    def _elements(self, direction: str, spis: SaName | None = None) -> list[Muted]:
        name, _ = _SIDES[direction]
        found = self._table.elements(name, None if spis is None else spis.octets)
        if any(len(element.key) != 16 for element in found):
            raise KernelError(
                f"nftables' set {name} of table inet {TABLE} holds something that is not ours",
                hint=f"look at `nft list table inet {TABLE}`",
            )
        return [Muted(SaName(each.key[:8], each.key[8:]), direction, each.packets) for each in found]

    def _stands(self, direction: str) -> bool:
        """Whether the chain of a direction is there with its rules."""
        _, chain = _SIDES[direction]
        return self._table.rules(chain) == _RULES

    def _build(self) -> None:
        """Make table, sets, chains and rules, in one transaction; muted SAs stay muted."""
        table = f"inet {TABLE}"
        lines = [f"add table {table}"]
        for name, chain in _SIDES.values():
            lines += [
                f"add set {table} {name} {{ typeof {PLAIN}; counter; }}",
                f"add chain {table} {chain} {{ type filter hook {chain} priority raw; policy accept; }}",
                f"flush chain {table} {chain}",
            ]
            own = f"meta mark != {MARK:#x} " if chain == "output" else ""
            lines += [
                f"add rule {table} {chain} {own}meta l4proto udp {match} @{name} drop"
                for match in (PLAIN, MARKED)
            ]
        run_nft("\n".join(lines) + "\n")
