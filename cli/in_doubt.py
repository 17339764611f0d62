"""`resolve`: what is in doubt at this gateway, what is known of both sides, and the operator's decision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ikectx.engine.report import TransferReport
from ikectx.errors import StateError, UsageError
from ikectx.gateway import Gateway
from ikectx.sa.name import SaName
from vici_bridge.effects.evidence import drop_orphan, evidence
from vici_bridge.host import CharonHost
from vici_bridge.orphans import ORPHAN
from vici_bridge.vici.control import client_user

DECISIONS = ("reclaim", "give-up")


def operator() -> str:
    """Who sent the request that is being answered, for the audit log."""
    return f"operator (uid {client_user()})"


class InDoubt:
    """Transfers that let an SA go and are not confirmed, and SAs that are frozen without a reason that is
    known."""

    def __init__(self, host: CharonHost, gateway: Gateway) -> None:
        self._host = host
        self._gateway = gateway

    async def resolve(self, name: str, decision: str) -> dict[str, object]:
        """What is in doubt (`name`: a transfer, or an SA as SPIi:SPIr; empty: all), and the report of a
        decision.

        Errors: UsageError, StateError if nothing of that name is in doubt, those of the decision.
        """
        if decision and (decision not in DECISIONS or not name):
            raise UsageError(f"a decision is one of {', '.join(DECISIONS)}, about one transfer or SA")
        reports = {report.transfer_id: report for report in self._gateway.in_doubt()}
        orphans = {str(sa): sa for sa in self._host.orphans.known}
        if name and name not in reports and name not in orphans:
            raise StateError(
                f"nothing in doubt here has the name {name}", hint="`ikectx resolve` shows what is"
            )
        names = [name] if name else [*reports, *orphans]
        shown = [
            await (self._transfer(reports[one]) if one in reports else self._orphan(orphans[one]))
            for one in names
        ]
        answer: dict[str, object] = {"in_doubt": shown}
        if decision and name in reports:
            report = await self._gateway.resolve(name, cast("Any", decision), operator())
            answer["report"] = report.to_json()
        elif decision == "give-up":
            await drop_orphan(self._host, orphans[name])
        elif decision:
            raise StateError(
                "the store does not know how to serve that SA again",
                hint="give it up here: if no gateway serves it, the mobile node connects anew by itself",
            )
        return answer

    async def _transfer(self, report: TransferReport) -> dict[str, object]:
        seen = await evidence(self._host, report.sa)
        heard = self._gateway.heard(report.to)
        return {
            **_name(report.transfer_id, report.sa, report.mn),
            "here": {
                "gateway": report.from_,
                "state": report.state_here,
                "epoch": max(0, report.epoch - 1),
                **seen,
            },
            "there": {
                "gateway": report.to,
                "state": report.state_there,
                "epoch": report.epoch,
                "connected": self._gateway.connected(report.to),
                "last_heard": heard,
                "said": report.text,
            },
            "advice": report.hint,
            "decisions": list(DECISIONS),
        }

    async def _orphan(self, sa: SaName) -> dict[str, object]:
        seen = await evidence(self._host, sa)
        return {
            **_name("", sa, ""),
            "here": {"gateway": self._gateway.name, "state": ORPHAN % str(sa), "epoch": None, **seen},
            "there": None,
            "advice": "look for the SA with `ikectx list` at the other gateways, then give it up here. If no "
            "gateway serves it, the mobile node connects anew by itself",
            "decisions": ["give-up"],
        }


def _name(transfer: str, sa: SaName, mn: str) -> Mapping[str, object]:
    return {"name": transfer or str(sa), "transfer": transfer, "sa": str(sa), "mn": mn}
