"""The report of a mobile node's handover."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ikectx.errors import IkectxError, LinkError, RefusedError, UnknownSaError
from ikectx.node.mobility import HandoverOutcome, MobileState
from ikectx.numbers import STATUS_TEXT, Status
from ikectx.sa.context import Address, Endpoint
from ikectx.sa.name import SaName

_OF_ONE_ADDRESS = frozenset(
    {Status.NO_ADDRESS, Status.ESP_SPI_IN_USE, Status.KERNEL, Status.UNREACHABLE, Status.PEER_SILENT}
)
"""Refusals whose cause may be the address from which the node asked."""


@dataclass(slots=True)
class MobileReport:
    """The report of a handover. `result`: moved, announced, already, refused, silent, cancelled, failed.

    `serves`: the gateway that serves the SA now, None if that is not known. `renamed`: SPIs that the new
    gateway could not keep. Octets are UDP payload.
    """

    result: str
    from_: str
    to: str
    connection: str
    spis: SaName
    mode: str
    old: tuple[Endpoint, Endpoint]
    new: tuple[Endpoint, Endpoint] | None = None
    serves: str | None = None
    children: tuple[str, ...] = ()
    vips: tuple[Address, ...] = ()
    exit_code: int = 0
    detail: str = ""
    hint: str = ""
    status: Status = Status.OK
    announced: bool = False
    messages: int = 0
    octets: int = 0
    retransmissions: int = 0
    renamed: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    @property
    def another_address_may_do(self) -> bool:
        """The old gateway serves the SA, because the new one cannot at the address that the node has now."""
        return self.result == "refused" and self.serves == self.from_ and self.status in _OF_ONE_ADDRESS

    def failed(self, outcome: HandoverOutcome, *, arrived: bool) -> None:
        """No gateway took the SA, as far as is known. `arrived`: the new gateway was asked; else the old
        one."""
        self.detail = outcome.text
        self.serves = None if outcome.in_doubt else self.from_
        self.result = {
            MobileState.REFUSED: "refused",
            MobileState.CANCELLED: "cancelled",
        }.get(outcome.state, "silent")
        refused = outcome.state is MobileState.REFUSED
        self.exit_code = RefusedError.exit_code if refused else LinkError.exit_code
        bad = [one.status for one in outcome.statuses if one.status is not Status.OK]
        self.status = bad[0] if bad else Status.UNREACHABLE
        asked = self.to if arrived else self.from_
        again = f"`ikectx mobile handover --to {self.to}`"
        if refused:
            why = STATUS_TEXT.get(self.status, "")
            self.detail = f"{asked}: {why or self.status.name}; {outcome.text}"
            self.hint = f"see the logs of the agents of {self.from_} and {self.to}"
        elif self.announced and not arrived:
            self.detail = f"nobody moved in time: {self.from_} serves the SA"
            self.hint = f"{again} asks without an announcement"
        elif outcome.state is MobileState.SILENT:
            self.hint = (
                f"is the agent of {asked} up, with [mobile] in its configuration, is its UDP port open, "
                "and are the clocks right? A request that cannot be verified gets no answer"
            )
        if outcome.in_doubt:
            self.hint += f". Ask again ({again}), or connect anew if nobody answers"

    def broken(self, error: IkectxError, *, in_doubt: bool) -> None:
        """The handover has ended with that error. `in_doubt`: the new gateway may have the SA."""
        self.result, self.exit_code = "failed", error.exit_code
        self.detail, self.hint = str(error), error.hint
        self.serves = None if in_doubt else self.serves

    def ended(self, told: str) -> None:
        """The SA was ended here during the handover. `told`: the gateway that has deleted it; empty: none."""
        self.result, self.serves, self.new = "failed", None, None
        self.exit_code, self.status = UnknownSaError.exit_code, Status.UNKNOWN_SA
        self.detail = "the IKE_SA was ended here during the handover"
        if told:
            self.detail += f"; {told} has deleted it, too"
            self.hint = "`swanctl --initiate` sets one up"
        else:
            self.detail += f"; neither {self.from_} nor {self.to} has answered a Delete so far"
            self.hint = (
                f"the Delete is repeated for half a minute; is it still listed at {self.to}, end it there"
            )

    def unusable(self, error: IkectxError) -> None:
        """The new gateway serves the SA, under SPIs that are invalid here: the SA is left alone, and in
        doubt."""
        self.result, self.serves, self.new = "failed", None, None
        self.exit_code, self.status = error.exit_code, Status.MALFORMED
        self.detail = f"{self.to} says that it serves the SA, and names new SPIs: {error}"
        self.hint = "connect anew; do both ends have the same version of ikectx?"

    def to_json(self) -> dict[str, Any]:
        """Addresses as text, times in ms."""
        ends = {
            "old": dict(zip(("local", "remote"), map(str, self.old), strict=True)),
            "new": dict(zip(("local", "remote"), map(str, self.new), strict=True)) if self.new else None,
        }
        return {
            "result": self.result,
            "exit_code": self.exit_code,
            "from": self.from_,
            "to": self.to,
            "serves": self.serves,
            "mode": self.mode,
            "announced": self.announced,
            "connection": self.connection,
            "spi_i": self.spis.spi_i.hex(),
            "spi_r": self.spis.spi_r.hex(),
            **ends,
            "children": list(self.children),
            "vips": [str(vip) for vip in self.vips],
            "status": {
                "code": int(self.status),
                "name": self.status.name,
                "text": STATUS_TEXT.get(self.status, ""),
            },
            "detail": self.detail,
            "hint": self.hint,
            "messages": self.messages,
            "octets": self.octets,
            "retransmissions": self.retransmissions,
            "renamed": self.renamed,
            "phases_ms": {name: round(ms, 1) for name, ms in self.phases.items()},
            "path": self._path(),
            "ms": round(sum(self.phases.values()), 1),
            "started": round(self.started, 3),
        }

    def _path(self) -> list[dict[str, Any]]:
        """The phases one after the other, in ms since the handover began here; `host`: who was waited for."""
        hosts = {"announced": self.from_, "asked": self.to}
        found: list[dict[str, Any]] = []
        at = 0.0
        for name, took in self.phases.items():
            times = {"start_ms": round(at, 1), "end_ms": round(at + took, 1)}
            found.append({"step": name, "host": hosts.get(name, "here"), **times})
            at += took
        return found
