"""`KilledFleet`: the other mobile nodes of a case in which a gateway is drained, and what each must have."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from typing import Any

from ikectx.errors import CharonError

from .fleet import Fleet
from .hosts import Lab, idle
from .net import GATEWAYS
from .run import StepError

SIZE = 8
"""Mobile nodes beside `mn`: fewer than a drain has under way at a time, so all of them are moving."""
HOST = "mn2"
"""Whose charon has them."""


class KilledFleet:
    """`SIZE` stock mobile nodes in the charon of mn2, each with an SA of its own at psg."""

    def __init__(self, lab: Lab) -> None:
        self._lab, self._fleet = lab, Fleet(lab, SIZE, HOST)
        self._stack = contextlib.ExitStack()
        self._streams: list[subprocess.Popen[str]] = []

    def connect(self, beside: Callable[[str, str], subprocess.Popen[str]]) -> None:
        """They connect to psg, and the server pings each of them until it has ended. Raises CharonError."""
        self._stack.enter_context(self._fleet.connected())
        for number in range(SIZE):
            self._streams.append(beside("srv", f"exec ping -n -q -i 0.2 {self._fleet.inner(number)}"))

    def _silence(self) -> None:
        """What is for an SA that has ended leaves a gateway in the clear, as everywhere."""
        for stream in self._streams:
            stream.terminate()
            stream.communicate()
        self._streams.clear()

    def check(self, within: Callable[[Callable[[], bool]], bool], *, may_be_lost: bool) -> int:
        """Each has one SA, which one gateway serves, with traffic and rekeys. Returns how many were lost with
        a charon, if some may be. `within`: waits until a condition is true. Raises StepError."""
        if not within(lambda: not self._amiss()):
            amiss = self._amiss()
            twice = [one for one in amiss.values() if " and " in one]
            if twice or not may_be_lost:
                raise StepError("; ".join(f"{name}: {what}" for name, what in amiss.items()))
        self._silence()
        lost = self._amiss()
        for host in (HOST, *GATEWAYS):
            for sa in self._sas(host):
                if self._name(host, sa) in lost:
                    self._end(host, sa, force=True)
        self._ping()
        charon = self._lab.vici(HOST)
        for sa in self._sas(HOST):
            for child in sa["child-sas"].values():
                charon.rekey(child_id=int(child["uniqueid"]))
        if not within(lambda: set(self._amiss()) == set(lost)):
            raise StepError(f"after a rekey of each child: {self._amiss()}")
        self._ping()
        return len(lost)

    def end(self) -> None:
        """They terminate their SAs, and are gone. Raises CharonError."""
        self._silence()
        for sa in self._sas(HOST):
            self._end(HOST, sa, force=False)
        self._stack.close()

    def _end(self, host: str, sa: dict[str, Any], *, force: bool) -> None:
        with contextlib.suppress(CharonError):
            self._lab.vici(host).terminate(
                ike_id=int(sa["uniqueid"]), force=force, timeout_ms=100 if force else 20000
            )

    def _ping(self) -> None:
        for sa in self._sas(HOST):
            (inner,) = sa["local-vips"]  # in the order in which they came to the gateway
            words = ["ping", "-n", "-q", "-c", "3", "-i", "0.2", "-W", "3", inner]
            for _ in range(2):
                done = self._lab.command("srv", words)
                if " 0% packet loss" in done.stdout:
                    break
            else:
                raise StepError(f"ping to {self._name(HOST, sa)}: {done.stdout[-200:]}")

    def _sas(self, host: str) -> list[dict[str, Any]]:
        return [sa for sa in self._lab.list_sas(host) if self._name(host, sa) in self._names]

    @property
    def _names(self) -> set[str]:
        return {self._fleet.identity(number) for number in range(SIZE)}

    @staticmethod
    def _name(host: str, sa: dict[str, Any]) -> str:
        return str(sa.get("local-id" if host == HOST else "remote-id", ""))

    def _amiss(self) -> dict[str, str]:
        """What is wrong, by mobile node."""
        there: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in sorted(self._names)}
        for host in (HOST, *GATEWAYS):
            for sa in self._sas(host):
                there[self._name(host, sa)].setdefault(host, []).append(sa)
        return {name: what for name, sas in there.items() if (what := self._wrong(sas))}

    def _wrong(self, sas: dict[str, list[dict[str, Any]]]) -> str:
        up = {
            host: [sa for sa in sas.get(host, ()) if sa["state"] in ("ESTABLISHED", "REKEYING")]
            for host in (HOST, *GATEWAYS)
        }
        owners = [host for host in GATEWAYS if up[host]]
        if len(owners) != 1:
            return f"served by {' and '.join(owners) or 'nobody'}"
        both = [*up[HOST], *up[owners[0]]]
        if len({(sa["initiator-spi"], sa["responder-spi"]) for sa in both}) != 1 or len(both) != 2:
            return f"{HOST} has another SA than {owners[0]}"
        if not all(map(idle, both)):
            return "an exchange is under way"
        if any(len(sa["child-sas"]) != 1 for sa in both):
            return "another number of CHILD_SAs than one"
        return ""
