"""Runs a case of `kill_cases` on a lab: a fault at a point of a move, and what must be true afterwards."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ikectx.errors import IkectxError
from vici_bridge.vici.client import json_of

from . import twice
from .config import Tunnel
from .faults import FaultyLab
from .hosts import Lab, idle
from .kill_cases import FAULTS, case
from .kill_fleet import KilledFleet
from .kill_lab import KillLab, Stop
from .leftovers import left
from .net import GATEWAYS, INNER, LINKS, OUTER
from .run import Say, ScenarioRunner, StepError
from .scenario import Command, Scenario, Step

REACHED = 90.0
"""Seconds in which a point must be reached."""
SHOWN = (
    "swanctl --list-sas; ip address; ip route show table all; ip xfrm policy; ip xfrm state list nokeys;"
    " nft list ruleset"
)
"""What is kept of each host, beside the logs, of a case that has failed."""
FLUSHED = "ip xfrm state flush; ip xfrm policy flush; ip route flush table 220; ip -6 route flush table 220"
"""Takes away what a charon that was killed has left."""
OVER = 400.0
"""Seconds in which a move must have come to an end at both gateways, as soon as nothing is amiss any more."""
NAMED = re.compile(r"`ikectx ([a-z]+ [0-9a-f:]+)`")
"""The command that an agent names to the operator."""

NAMED_BY_NODE = re.compile(r"`ikectx (mobile handover --to [a-z]+)`")
HEARD = 30.0
"""Seconds until a mobile node's agent must have ended what it was at, before its operator looks."""
QUIET = 200.0
"""Seconds until charons have ended, or given up, the exchanges that were under way."""
LATER = 450.0
"""Seconds in which what was left for later has been done, or given up."""

PROOF = (
    ("ping",),
    ("rekey", "mn", "child"),
    ("rekey", "owner", "child"),
    ("ping",),
    ("rekey", "mn", "ike"),
    ("rekey", "owner", "ike"),
    ("ping",),
    ("terminate", "mn"),
    ("left",),
)
"""What an SA must be able to do afterwards, and that nothing of it is left in the end."""

_NAT = Command(
    "core",
    "nft 'add table ip n; add chain ip n post { type nat hook postrouting priority srcnat; };"
    " add rule ip n post ip saddr 10.1.0.10 snat to 10.9.0.1;"
    " add table ip f; add chain ip f in { type filter hook input priority 0; };"
    " add rule ip f in ip daddr 10.9.0.1 drop'; ip addr add 10.9.0.1/32 dev lo",
    name="a NAT",
)
FIRST: Mapping[str, tuple[Step, ...]] = {"invited": (_NAT,), "unheard": (_NAT,)}
"""Steps by mode before the mobile node connects."""

DEAF = {
    mode: "nft 'add table inet deaf; add chain inet deaf f { type filter hook forward priority 0; };"
    f" add rule inet deaf f ip saddr {gateway} ip daddr 10.1.0.10 drop'"
    for mode, gateway in (("silent", "10.2.2.2"), ("unheard", "10.2.1.2"))
}
"""By mode: the mobile node does not hear the gateway that is to say something to it."""


def scenario(name: str) -> Scenario:
    """The scenario of a case. Errors: UsageError."""
    one = case(name)
    mode, fault = one.point.mode, FAULTS[one.fault]
    asks = mode in ("predictive", "leaving", "reactive", "invited", "unheard")
    more = [("fleet",)] if mode == "drain" else []
    return Scenario(
        name,
        f"{mode}: {fault.what} at {one.point.name} of {one.point.host}",
        (*FIRST.get(mode, ()), ("connect",), ("ping",), *more, ("wait", "1"), ("kill", name), *PROOF),
        tunnel=Tunnel(mobile=asks, by_packet=mode == "packet", second=mode == "drain"),
    )


class KillRunner(ScenarioRunner):
    """A `ScenarioRunner` with the verbs `kill CASE` and `left`."""

    def __init__(self, lab: Lab, scenario: Scenario, say: Say) -> None:
        super().__init__(lab, scenario, say)
        assert isinstance(lab, KillLab)
        self._kills = lab
        self._anew = False
        """Whether the SA was lost with a charon, and the mobile node has connected anew."""
        self._fault = FAULTS["agents"]
        self._fleet: KilledFleet | None = None

    def _abandon(self) -> None:
        if self.report.error:
            for host in ("mn", *GATEWAYS):
                done = self._lab.command(host, ["sh", "-c", SHOWN])
                (self._lab.work / host / "state.log").write_text(done.stdout + done.stderr)
        if self._fleet is not None:
            with contextlib.suppress(IkectxError, OSError):
                self._fleet.end()
        super()._abandon()

    # -- the fault --------------------------------------------------------------------------

    def _do_kill(self, name: str) -> None:
        one = case(name)
        self._fault = FAULTS[one.fault]
        for host in self._kills.agent_hosts:
            for file in ("points.log", "move.out"):  # of an earlier case
                (self._lab.work / host / file).unlink(missing_ok=True)
        fault = FaultyLab(self._kills, one)
        stop = Stop(self._kills, one.point.host, one.point.name, one.passes)
        inner = INNER["mn"][4]
        stream = self._beside("srv", f"exec ping -n -q -i 0.2 {inner}")
        self._watch_numbers()
        self._before(one.point.mode)
        stop.arm()
        move = self._move_of(one.point.mode)
        try:
            there = stop.wait(REACHED)
            if there:
                self._say(f"{self._fault.what} for {one.seconds:g} s")
                fault.strike()
            stop.go_on()
            if not there:
                raise StepError(f"{one.point.host} never came to {one.point.name}: {self._move_said()}")
            time.sleep(one.seconds)
            fault.end()
            self._say("it is over")
            self._after(one.point.mode)
            # a gateway that was asked for the SA asks the other one again as soon as it is there
            self._within(OVER, lambda: all(process.poll() is not None for process in move))
            self._decided()
            if self._fleet is not None:
                self._check_fleet(self._fleet)
            self._find_owner()
        finally:
            stop.go_on()
            fault.abandon()
            self._after(one.point.mode)
            if sys.exc_info()[0] is not None:
                self._lab.stop("core", "twice")
            for process in (stream, *move):
                process.terminate()
                process.communicate()

    def _do_fleet(self) -> None:
        """Others connect, whose SAs move at the same time."""
        self._fleet = KilledFleet(self._lab)
        self._fleet.connect(self._beside)

    def _check_fleet(self, fleet: KilledFleet) -> None:
        lost = fleet.check(partial(self._within, QUIET), may_be_lost=self._fault.kind in ("charon", "power"))
        if lost:
            self._say(f"{lost} others were lost with a charon")
        fleet.end()
        self._fleet = None

    def _watch_numbers(self) -> None:
        """From now to `left`: is a sequence number or a message ID used twice?"""
        output = self._lab.work / "core" / "twice.json"
        for path in (output, output.with_suffix(".json.ready")):
            path.unlink(missing_ok=True)
        words = [sys.executable, "-I", "-S", twice.__file__, str(output), *LINKS["mn"], *LINKS["mn2"]]
        self._lab.spawn("core", "twice", words)
        self._until(output.with_suffix(".json.ready").exists, "core: nobody looks for numbers used twice")

    def _used_twice(self) -> list[str]:
        output = self._lab.work / "core" / "twice.json"
        self._lab.stop("core", "twice")
        found: list[str] = json.loads(output.read_text())
        return [f"used twice: {one}" for one in found]

    def _beside(self, host: str, line: str) -> subprocess.Popen[str]:
        """Runs a line of the shell on a host, beside what else happens."""
        return subprocess.Popen(
            [*self._lab.net.enter(host), "sh", "-c", line],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self._lab.environment(host),
        )

    def _before(self, mode: str) -> None:
        """What a mode needs to be true."""
        if mode in DEAF:
            self._must("core", DEAF[mode])
        if mode == "packet":
            self._do_cut("away", "psg")

    def _after(self, mode: str) -> None:
        """Nothing of the network is in the way any more."""
        if mode in DEAF:
            self._lab.command("core", ["nft", "delete table inet deaf"])
        if mode == "packet":
            self._do_mend()

    def _must(self, host: str, line: str) -> None:
        done = self._lab.command(host, ["sh", "-c", line])
        if done.returncode:
            raise StepError(f"{host}: {line}: {done.stderr.strip()[-300:]}")

    def _move_of(self, mode: str) -> list[subprocess.Popen[str]]:
        """Begins the move, whatever becomes of it."""
        commands: Mapping[str, tuple[str, str]] = {
            "push": ("psg", "ikectx transfer --to nsg --json"),
            "drain": ("psg", "ikectx transfer --to nsg --all --json"),
            "silent": ("psg", "ikectx transfer --to nsg --address move --json"),
            "relay": ("psg", "ikectx transfer --to nsg --address relay --json"),
            "invited": ("psg", "ikectx transfer --to nsg --json"),
            "unheard": ("psg", "ikectx transfer --to nsg --address invite --json"),
            "pull": ("nsg", f"ikectx pull --from psg --mn {OUTER['mn'][4]} --json"),
            "predictive": ("mn", "ikectx mobile handover --to nsg --predictive --json"),
            "leaving": ("mn", "ikectx mobile handover --to nsg --predictive --leaving --json"),
            "reactive": ("mn", "ikectx mobile handover --to nsg --json"),
        }
        moves = []
        if mode in ("reactive", "packet"):
            self._do_relocate()
        if mode in commands:
            host, line = commands[mode]
            moves.append(self._beside(host, f"{line} > $LAB/{host}/move.out 2>&1"))
        if mode in ("predictive", "leaving"):
            time.sleep(1.0)
            self._do_relocate()
        return moves

    def _move_said(self) -> str:
        """The end of what the command printed that began the move."""
        files = [self._lab.work / host / "move.out" for host in ("mn", *GATEWAYS)]
        said = [file.read_text(errors="replace").strip() for file in files if file.exists()]
        return " ".join(said)[-1500:] or "nothing has begun it, or it goes on"

    # -- the end of it ----------------------------------------------------------------------

    def _open(self) -> list[tuple[str, dict[str, Any]]]:
        """Transfers that are open, by gateway."""
        found = []
        for host in GATEWAYS:
            with self._lab.agent(host) as agent:
                found += [(host, entry) for entry in json_of(agent.request("status"))["transfers"]]
        return found

    def _decided(self) -> None:
        """Every transfer has ended, by itself or after the one command that status names."""
        if not self._within(OVER, lambda: not self._open()):
            for host, entry in self._open():
                if named := NAMED.search(json.dumps(entry)):
                    self._say(f"{host}: ikectx {named[1]}")
                    self.report.warnings.append(f"{host}: `ikectx {named[1]}` was needed")
                    self._must(host, f"ikectx {named[1]} --yes")
            if not self._within(OVER, lambda: not self._open()):
                states = [
                    f"{host}: {entry['state']} {entry.get('detail', '')}" for host, entry in self._open()
                ]
                raise StepError(f"transfers never end: {'; '.join(states)}")

    def _within(self, seconds: float, true: Callable[[], bool]) -> bool:
        limit = time.monotonic() + seconds
        while not true():
            if time.monotonic() > limit:
                return False
            time.sleep(min(5.0, 1.0 + (seconds - (limit - time.monotonic())) / 10))
        return True

    def _find_owner(self) -> None:
        """Exactly one gateway serves the mobile node. Raises StepError."""
        found = self._within(HEARD, self._reached)
        if not found and self._lab.tunnel.mobile and (named := self._named_by_node()):
            self._say(f"mn: ikectx {named}")
            self.report.warnings.append(f"mn: `ikectx {named}` was needed")
            self._lab.command("mn", ["sh", "-c", f"ikectx {named}"])
        if found or self._within(QUIET, self._served):
            (owner,) = self._owners()
            # a mobile node is still called back, or invited to the other gateway
            self._within(LATER, lambda: not self._under_way(owner))
            if self._owners() != [owner]:
                self._find_owner()
                return
            self._serves["mn"] = owner
            self._say(f"{owner} serves")
            return
        owners = self._owners()
        # charon gives an SA up that no gateway answers for after a change of its address (MOBIKE)
        may = self._fault.kind in ("charon", "power") or (self._away and not self._sas("mn", "mn"))
        if not may or (len(owners) > 1 and self._agreed()):
            raise StepError(f"served by {' and '.join(owners) or 'nobody'}: {self._listed()}")
        self._say("charon lost the SA with its life: the mobile node connects anew")
        self._anew = True
        self.report.add_clear(self._unwatch())  # the policies go with the SA, as without an agent
        for host in ("mn", *GATEWAYS):
            self._lab.forget(host)
        self._lab.connect("psg")
        self._serves["mn"] = "psg"

    def _unwatch(self) -> dict[str, list[dict[str, Any]]]:
        """A gateway that has lost its power with its SAs has nothing any more that holds packets back."""
        found = super()._unwatch()
        if self._anew and self._fault.kind == "power":
            found = {host: kinds for host, kinds in found.items() if host not in self._fault.hosts}
        return found

    def _served(self) -> bool:
        return len(self._owners()) == 1 and self._agreed()

    def _reached(self) -> bool:
        """The same; and the mobile node sends to where it is served, or its agent names no command."""
        owners = self._owners()
        if len(owners) != 1 or not self._agreed():
            return False
        (owner,), other = owners, {"psg": "nsg", "nsg": "psg"}
        sent = {str(sa["remote-host"]) for sa in self._sas("mn", "mn")}
        relayed = {str(sa["remote-host"]) for sa in self._sas(owner, "mn")} & {*OUTER[other[owner]].values()}
        there = bool(relayed) or sent <= {*OUTER[owner].values()}
        return there or not (self._lab.tunnel.mobile and self._named_by_node())

    def _under_way(self, gateway: str) -> bool:
        """Whether the gateway has something to do yet for an SA that it took back."""
        return any(row.startswith("source row") for row in left(self._lab.work / gateway / "state"))

    def _named_by_node(self) -> str:
        """The command that the mobile node's agent names since its last handover; empty: none."""
        with self._lab.agent("mn") as agent:
            named = NAMED_BY_NODE.search(json.dumps(json_of(agent.request("status"))["last"]))
        return named[1] if named else ""

    def _owners(self) -> list[str]:
        """Gateways whose charon has an SA that is up."""
        return [
            host
            for host in GATEWAYS
            if any(sa["state"] in ("ESTABLISHED", "REKEYING") for sa in self._sas(host, "mn"))
        ]

    def _agreed(self) -> bool:
        """The mobile node and the only owner have the same SA, and no exchange is under way."""
        owners = self._owners()
        there = {
            (sa["initiator-spi"], sa["responder-spi"]) for host in owners for sa in self._sas(host, "mn")
        }
        mobile = self._sas("mn", "mn")
        here = {(sa["initiator-spi"], sa["responder-spi"]) for sa in mobile}
        every = [*mobile, *(sa for host in owners for sa in self._sas(host, "mn"))]
        return bool(here) and here == there and all(map(idle, every))

    def _listed(self) -> str:
        return "; ".join(
            f"{host}: {sa['state']} {sa['initiator-spi'][:6]}:{sa['responder-spi'][:6]} {sa['remote-host']}"
            for host in ("mn", *GATEWAYS)
            for sa in self._sas(host, "mn")
        )

    # -- what is left -----------------------------------------------------------------------

    def _do_left(self) -> None:
        """Nothing of the SA is left: SAs, policies, rules, routes, rows of the ledger, notes."""
        lab = self._kills
        if self._fault.kind == "charon":  # what it left in the kernel is nobody's any more
            for host in ("mn", *GATEWAYS) if self._anew else self._fault.hosts:
                lab.command(host, ["sh", "-c", FLUSHED])
        stays = self._used_twice()
        self._within(LATER, lambda: not any(map(self._under_way, GATEWAYS)))
        stays += [uncleared] if (uncleared := lab.clear()) else []
        self._within(LATER, lambda: not any(left(self._lab.work / host / "state") for host in GATEWAYS))
        stays += [f"{host}: {row}" for host in GATEWAYS for row in left(lab.work / host / "state")]
        for host in lab.agent_hosts:
            log = (lab.work / host / "agent.out").read_text(errors="replace")
            if "Traceback" in log:
                stays.append(f"{host}: a Traceback in its log: {log[log.index('Traceback') :][-400:]}")
        if stays:
            raise StepError("; ".join(stays))
