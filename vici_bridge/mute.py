"""`Mute`: keep the IKE messages of one SA from the wire, below charon, by nftables. I/O.

charon can be made passive only by whole segments (strongSwan 5.9.8 to 6.0.6). One nftables table holds
two sets of IKE SPI pairs, for messages to and from charon; a message whose header names a pair of the
set is dropped and counted. A look-up costs the same for one muted SA and for thousands. The rules outlive
the agent on purpose: an SA that was let go must not talk again because a process died.

Header offsets: RFC 7296, 3.1; RFC 3948, 2.2 for the four zero octets on port 4500.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ikectx.errors import KernelError, UsageError

TABLE = "inet ikectx"
_SETS = {"in": "muted_in", "out": "muted_out"}
_PLAIN = "@th,64,64 . @th,128,64"
_MARKED = "@th,64,32 0 @th,96,64 . @th,160,64"
_TIMEOUT = 30.0
_ABSENT = "No such file or directory"

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

    Each call runs `nft`, some milliseconds: from asyncio use a thread. Calls are idempotent, and safe
    from several threads. Errors: KernelError.
    """

    def __init__(self, ports: Sequence[int] = (500, 4500)) -> None:
        if not ports or not all(0 < port < 65536 for port in ports):
            raise UsageError(f"IKE ports {ports!r}")
        self._ports = ", ".join(str(port) for port in ports)
        self._lock = threading.Lock()

    def mute_in(self, spis: Spis) -> None:
        """Nothing of the SA's peer reaches charon any more."""
        self._mute("in", spis)

    def mute_out(self, spis: Spis) -> None:
        """Nothing of charon reaches the SA's peer any more."""
        self._mute("out", spis)

    def counters(self, spis: Spis) -> tuple[int, int]:
        """Messages kept back so far, (to charon, from charon)."""
        kept = {entry.direction: entry.packets for entry in self.listing() if entry.spis == spis}
        return (kept.get("in", 0), kept.get("out", 0))

    def unmute(self, spis: Spis) -> None:
        """Let both directions flow. The table goes with its last entry."""
        with self._lock:
            elements = [f"element {TABLE} {name} {{ {_key(spis)} }}" for name in _SETS.values()]
            # Adding first makes deleting what is not there no error.
            script = "".join(f"add {element}\ndelete {element}\n" for element in elements)
            self._run(["-f", "-"], script, absent_ok=True)
            if not self._listing():
                self._run(["delete", "table", *TABLE.split()], absent_ok=True)

    def unmute_all(self) -> None:
        """Let everything flow."""
        with self._lock:
            self._run(["delete", "table", *TABLE.split()], absent_ok=True)

    def listing(self) -> list[Muted]:
        """All that is muted, also by an agent before this one."""
        with self._lock:
            return self._listing()

    def _mute(self, direction: str, spis: Spis) -> None:
        comment = f"{spis[0].hex()}_{spis[1].hex()}"
        element = f'add element {TABLE} {_SETS[direction]} {{ {_key(spis)} comment "{comment}" }}\n'
        # The whole table each time: a firewall that was reloaded since may have flushed it. One transaction.
        with self._lock:
            self._run(["-f", "-"], self._table() + element)

    def _table(self) -> str:
        lines = [f"add table {TABLE}"]
        for direction, hook, side in (("in", "input", "dport"), ("out", "output", "sport")):
            name = _SETS[direction]
            lines += [
                f"add set {TABLE} {name} {{ typeof {_PLAIN}; counter; }}",
                f"add chain {TABLE} {hook} {{ type filter hook {hook} priority raw; policy accept; }}",
                f"flush chain {TABLE} {hook}",
            ]
            lines += [
                f"add rule {TABLE} {hook} udp {side} {{ {self._ports} }} {match} @{name} drop"
                for match in (_PLAIN, _MARKED)
            ]
        return "\n".join(lines) + "\n"

    def _listing(self) -> list[Muted]:
        text = self._run(["-j", "list", "table", *TABLE.split()], absent_ok=True)
        if not text:
            return []
        try:
            objects = [entry["set"] for entry in json.loads(text)["nftables"] if "set" in entry]
            found = []
            for direction, name in _SETS.items():
                for item in (
                    item for entry in objects if entry["name"] == name for item in entry.get("elem", ())
                ):
                    initiator, _, responder = item["elem"]["comment"].partition("_")
                    spis = (bytes.fromhex(initiator), bytes.fromhex(responder))
                    found.append(Muted(spis, direction, int(item["elem"]["counter"]["packets"])))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise KernelError(
                f"nftables' table {TABLE} holds something that is not ours",
                hint=f"look at `nft list table {TABLE}`",
            ) from None
        return found

    @staticmethod
    def _run(arguments: list[str], script: str = "", *, absent_ok: bool = False) -> str:
        """Run nft once; `absent_ok`: a table that is not there is no error, and gives ""."""
        path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
        program = shutil.which("nft", path=path)
        if program is None:
            raise KernelError("the nft program is missing", hint="install the package nftables")
        try:
            done = subprocess.run(
                [program, *arguments],
                input=script,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                check=False,
                env={**os.environ, "LC_ALL": "C"},
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelError(f"nft did not run: {error}") from None
        if done.returncode == 0:
            return done.stdout
        if absent_ok and _ABSENT in done.stderr:
            return ""
        reason = next((line for line in done.stderr.splitlines() if "rror" in line), "no reason given")
        raise KernelError(
            f"nft refused: {reason.strip()}",
            hint="the agent needs CAP_NET_ADMIN, and the kernel nf_tables (modprobe nf_tables)",
        )


def _key(spis: Spis) -> str:
    if len(spis[0]) != 8 or len(spis[1]) != 8:
        raise UsageError("an IKE SPI has 8 octets")
    return f"0x{spis[0].hex()} . 0x{spis[1].hex()}"
