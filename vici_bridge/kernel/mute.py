"""`Mute`: keep the IKE messages of one SA from the wire, below charon, by nftables. I/O.

charon can be made passive only by whole segments (strongSwan 5.9.8 to 6.0.6). One nftables table has two sets
of IKE SPI pairs, for messages to and from charon; a message whose header has a pair of the set is dropped and
counted. A look-up costs the same for one muted SA and for thousands. The rules outlive the agent on purpose,
because an SA that was let go must not send again when a process ends.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ikectx.errors import KernelError
from ikectx.sa.name import SaName
from ikectx.together import Together

from .nftables import MARKED, PLAIN, Element, NftTable, run_nft

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
        self._unmuting = Together(self._unmute_all)
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
                    self._table.put([(_SIDES[direction][0], spis.octets, b"")])
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
        with self._lock:
            self._add([("in", spis)])

    def mute_out(self, spis: SaName) -> None:
        """Drop all messages of charon to the SA's peer, except those with the mark `MARK`."""
        with self._lock:
            self._add([("out", spis)])

    def counters(self, spis: SaName) -> tuple[int, int]:
        """Messages dropped so far, (to charon, from charon)."""
        with self._lock:
            held = self._table.held([name for name, _ in _SIDES.values()], spis.octets)
            counted = [
                sum(entry.packets for entry in _muted(direction, elements) if entry.spis == spis)
                for direction, elements in zip(_SIDES, held, strict=True)
            ]
            return counted[0], counted[1]

    def mute(self, spis: SaName) -> None:
        """Both, in one transaction."""
        with self._lock:
            self._add([(direction, spis) for direction in _SIDES])

    def unmute(self, *spis: SaName) -> None:
        """Let both directions pass."""
        with self._lock:
            for muted in self._muted.values():
                muted.difference_update(spis)
            self._table.remove([name for name, _ in _SIDES.values()], [each.octets for each in spis])

    async def unmute_soon(self, spis: SaName) -> None:
        """The same in a thread, for all that want it now: a deletion takes some milliseconds in the
        kernel."""
        await self._unmuting.join(spis)

    async def _unmute_all(self, spis: Sequence[SaName]) -> Sequence[None]:
        await asyncio.to_thread(self.unmute, *spis)
        return [None] * len(spis)

    def listing(self) -> list[Muted]:
        """All muted SAs, also those of an agent before this one."""
        with self._lock:
            return self._listing()

    def _add(self, pairs: Sequence[tuple[str, SaName]]) -> None:
        # Checked each time, because a reloaded firewall may have flushed table or rules, and a freeze that
        # does not freeze is worse than none.
        if not all(self._stands(direction) for direction in {direction for direction, _ in pairs}):
            self._build()
        self._table.put([(_SIDES[direction][0], spis.octets, b"") for direction, spis in pairs])
        for direction, spis in pairs:
            self._muted[direction].add(spis)

    def _listing(self) -> list[Muted]:
        return [
            entry
            for direction, (name, _) in _SIDES.items()
            for entry in _muted(direction, self._table.elements(name))
        ]

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


def _muted(direction: str, found: Sequence[Element]) -> list[Muted]:
    """The elements of the direction's set. Errors: KernelError."""
    if any(len(element.key) != 16 for element in found):
        raise KernelError(
            f"nftables' set {_SIDES[direction][0]} of table inet {TABLE} holds something that is not ours",
            hint=f"look at `nft list table inet {TABLE}`",
        )
    return [Muted(SaName(each.key[:8], each.key[8:]), direction, each.packets) for each in found]
