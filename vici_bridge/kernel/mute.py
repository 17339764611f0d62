"""`Mute`: keep the IKE messages of one SA from the wire, below charon, by nftables. I/O.

charon can be made passive only by whole segments (strongSwan 5.9.8 to 6.0.6). One nftables table has two sets
of IKE SPI pairs, for messages to and from charon; a message whose header has a pair of the set is dropped and
counted. Two more sets are for answers to charon and for its requests alone. A look-up costs the same for one
muted SA and for thousands. The rules outlive the agent on purpose, because an SA that was let go must not
send again when a process ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ikectx.errors import KernelError
from ikectx.sa.name import SaName

from .nftables import MARKED, PLAIN, NftTable, run_nft

TABLE = "ikectx"
MARK = 0x494B45
"""Packet mark of IKE messages that the agent itself sends for a muted SA."""
_RULES = 4
"""Rules in each chain: for each of its two sets, for IKE messages with and without the four zero octets."""
_SIDES = {"in": ("muted_in", "input"), "out": ("muted_out", "output")}
"""Direction: its set, its chain and hook."""
_HALVES = {"in": ("answers_in", "input"), "out": ("requests_out", "output")}
"""The same, for answers to charon, and for charon's requests."""
_RESPONSE = 0x20
"""Flag of the IKE header (RFC 7296, 3.1)."""


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
        self._muted: dict[str, set[SaName]] = {
            name: set() for name, _ in (*_SIDES.values(), *_HALVES.values())
        }
        """SAs that are in each set now, in case somebody empties the table."""

    @property
    def port(self) -> int:
        """See `NftTable.port`."""
        return self._table.port

    def prepare(self) -> bool:
        """Make the table now, so that no freeze waits for it, and check whether nftables works at all.

        Called again after somebody may have removed it, or elements of it. Returns whether all was there.
        """
        with self._lock:
            stood = self._stands(chain for _, chain in _SIDES.values())
            if not stood:
                self._build()
            for name, muted in self._muted.items():
                held = self._found(name).keys()
                for spis in muted - held:
                    stood = False
                    self._table.put([(name, spis.octets, b"")])
                muted.update(held)
            return stood

    def close(self) -> None:
        """Stop. Muted SAs stay muted; a table without any is deleted."""
        with self._lock:
            try:
                if not any(map(self._found, self._muted)):
                    self._table.drop()
            finally:
                self._table.close()

    def mute_in(self, spis: SaName) -> None:
        """Drop all messages of the SA's peer to charon."""
        with self._lock:
            self._add([(_SIDES["in"], spis)])

    def mute_out(self, spis: SaName) -> None:
        """Drop all messages of charon to the SA's peer, except those with the mark `MARK`."""
        with self._lock:
            self._add([(_SIDES["out"], spis)])

    def dropped(self, spis: SaName) -> int:
        """Messages of charon to the SA's peer that were dropped so far."""
        with self._lock:
            held = self._table.elements(_SIDES["out"][0], spis.octets)
            return sum(element.packets for element in held if element.key == spis.octets)

    def mute(self, spis: SaName) -> None:
        """Both, in one transaction."""
        with self._lock:
            self._add([(side, spis) for side in _SIDES.values()])

    def only_answer(self, spis: SaName) -> None:
        """Let the peer's requests pass, and charon's answers, and nothing else, because nobody knows which
        message ID the peer expects: it would ignore charon's request, and charon deletes an SA whose answer
        it cannot assign (5.9.8 to 6.0.6)."""
        with self._lock:
            self._add([(half, spis) for half in _HALVES.values()])
            self._remove([name for name, _ in _SIDES.values()], [spis])

    def unmute(self, *spis: SaName) -> None:
        """Let both directions pass."""
        with self._lock:
            self._remove([name for name, _ in _SIDES.values()], spis)
            if halves := [
                each for each in spis if any(each in self._muted[name] for name, _ in _HALVES.values())
            ]:
                self._remove([name for name, _ in _HALVES.values()], halves)

    def _remove(self, names: Sequence[str], spis: Sequence[SaName]) -> None:
        # to remove what is not there takes the kernel some fifty milliseconds, to look for it a tenth of one
        there = [
            each.octets
            for each in spis
            if all(each in self._muted[name] for name in names) or any(self._table.held(names, each.octets))
        ]
        if there:
            self._table.remove(names, there)
        for name in names:  # not before: who tries again after an error must find it
            self._muted[name].difference_update(spis)

    def listing(self) -> list[Muted]:
        """All muted SAs, also those of an agent before this one; without those that only answer."""
        with self._lock:
            return [
                Muted(spis, direction, packets)
                for direction, (name, _) in _SIDES.items()
                for spis, packets in self._found(name).items()
            ]

    def half_muted(self) -> set[SaName]:
        """All SAs that only answer, also those of an agent before this one."""
        with self._lock:
            return {spis for name, _ in _HALVES.values() for spis in self._found(name)}

    def _add(self, pairs: Sequence[tuple[tuple[str, str], SaName]]) -> None:
        # Checked each time, because a reloaded firewall may have flushed table or rules, and a freeze that
        # does not freeze is worse than none.
        if not self._stands({chain for (_, chain), _ in pairs}):
            self._build()
        self._table.put([(name, spis.octets, b"") for (name, _), spis in pairs])
        for (name, _), spis in pairs:
            self._muted[name].add(spis)

    def _found(self, name: str) -> dict[SaName, int]:
        """The SAs in a set, with the messages dropped. Errors: KernelError."""
        found = self._table.elements(name)
        if any(len(element.key) != 16 for element in found):
            raise KernelError(
                f"nftables' set {name} of table inet {TABLE} holds something that is not ours",
                hint=f"look at `nft list table inet {TABLE}`",
            )
        return {SaName(each.key[:8], each.key[8:]): each.packets for each in found}

    def _stands(self, chains: Iterable[str]) -> bool:
        """Whether these chains are there with their rules."""
        return all(count == _RULES for count in self._table.rules(*chains))

    def _build(self) -> None:
        """Make table, sets, chains and rules, in one transaction; muted SAs stay muted."""
        table = f"inet {TABLE}"
        lines = [f"add table {table}"]
        for direction, (name, chain) in _SIDES.items():
            half, _ = _HALVES[direction]
            lines += [f"add set {table} {each} {{ typeof {PLAIN}; counter; }}" for each in (name, half)]
            lines += [
                f"add chain {table} {chain} {{ type filter hook {chain} priority raw; policy accept; }}",
                f"flush chain {table} {chain}",
            ]
            own = f"meta mark != {MARK:#x} " if chain == "output" else ""
            flag = _RESPONSE if direction == "in" else 0
            for match, flags in ((PLAIN, 216), (MARKED, 248)):
                that = f"@th,{flags},8 & {_RESPONSE:#x} == {flag:#x} "
                lines += [
                    f"add rule {table} {chain} {own}meta l4proto udp {test}{match} @{each} drop"
                    for each, test in ((name, ""), (half, that))
                ]
        run_nft("\n".join(lines) + "\n")
