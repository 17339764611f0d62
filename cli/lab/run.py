"""Runs a scenario on a lab: verbs, commands, checks; gives a `ScenarioReport`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ikectx.errors import CharonError, IkectxError
from vici_bridge.vici.client import json_of

from .boot import virtual_time
from .config import outer
from .daemons import KINDS as DAEMONS
from .daemons import Daemon
from .hosts import Lab
from .measure import Reports, Traffic, air, dark
from .net import AWAY, GATEWAYS, HOST_BITS, INNER, MOBILES, OUTER, SHARED
from .proof import Proof
from .qemu import emulated
from .report import ScenarioReport
from .scenario import Command, Scenario
from .trace import Tracing
from .traffic import Clear, Probe, TrafficWatch, link_paths
from .twin import FRESH_OCTETS, TwinNames, lines, twin
from .usage import Used, clock_stands_still, cpu, spent_ms

SETTLE = 30.0
"""Seconds in which a rekey, a move or a deletion must have come to its end at both ends."""

SET_UP = (34, 35)
"""IKE_SA_INIT and IKE_AUTH."""

BASELINES = {"psk": "PSK", "cert": "certificates", "eap": "EAP-MSCHAPv2, gateway certificate"}
"""How a mobile node that connects anew proves who it is (`Tunnel.auth`), and what that is called."""

FINER = 2
"""How many times as often as others the probe sends that measures the link alone: nothing else runs then."""

ROAMED = {4: "10.1.0.11", 6: "fd01::11"}

Say = Callable[[str], None]


class StepError(IkectxError):
    """A step did not do what it should."""


class ScenarioRunner:
    """One scenario on one lab that is up. `run` never raises for what the scenario does."""

    def __init__(self, lab: Lab, scenario: Scenario, say: Say) -> None:
        self._lab = lab
        self._scenario = scenario
        self._say = say
        self._serves: dict[str, str] = {}
        self._connected = "psg"
        self._watch: TrafficWatch | None = None
        self._used: list[Used] = []
        self._clear: Clear | None = None
        self._began_ns = 0
        self._link_ns = 0
        self._proof = Proof(lab, kept=scenario.names == "kept", new=scenario.names == "new")
        self._children: set[str] = set()
        self._away = False
        self._cut = False
        self._tracing = Tracing(lab, scenario.name)
        self._arriving: list[subprocess.Popen[str]] = []
        self.report = ScenarioReport(
            scenario.name, scenario.description, "libipsec" if lab.tunnel.libipsec else "kernel"
        )

    @property
    def _owner(self) -> str:
        """The gateway that serves mn."""
        return self._serves.get("mn", "psg")

    def run(self) -> ScenarioReport:
        """All steps, up to the first that fails; then all checks."""
        report, began = self.report, time.monotonic()
        try:
            report.strongswan = self._lab.strongswan()
            report.gateways_round_trip_ms = self._lab.net.gateways_round_trip_ms
            for step in self._scenario.steps:
                self._say(
                    step.name or f"{step.host}: {step.run}" if isinstance(step, Command) else " ".join(step)
                )
                if isinstance(step, Command):
                    self._settled()
                    self._do_command(step)
                else:
                    if step[0] not in ("wait", "traffic"):
                        self._settled()
                    getattr(self, f"_do_{step[0]}")(*step[1:])
                    self._tracing.over(" ".join(step))
            self._settled()
            self.report.add_clear(self._unwatch())
            for check in self._scenario.checks:
                report.checks.append({"name": check.name or check.run, **self._try(check)})
        except (IkectxError, OSError) as error:
            hint = error.hint if isinstance(error, IkectxError) else ""
            report.error = str(error) + (f" ({hint})" if hint else "")
        finally:
            self._abandon()
        report.seconds = round(time.monotonic() - began, 1)
        report.judge(self._scenario, stolen=not virtual_time())
        return report

    def _abandon(self) -> None:
        """Ends what a failed step left running."""
        for arriving in self._arriving:
            arriving.communicate()
        lost = contextlib.suppress(IkectxError, OSError, KeyError, ValueError)
        if self._tracing.running:
            self._tracing.over("failed")
            with lost:
                self._end_traffic()
            with lost:
                self._tracing.end()
        if self._watch is not None:
            self._watch.abandon()
        with lost:
            self.report.add_clear(self._unwatch())
        if self._cut:
            self._lab.net.mend()

    def _unwatch(self) -> dict[str, list[dict[str, Any]]]:
        """What has left the gateways in the clear; from now on nobody watches."""
        clear, self._clear = self._clear, None
        return clear.stop() if clear else {}

    # -- commands ---------------------------------------------------------------------------

    def _host(self, name: str) -> str:
        other = next(gateway for gateway in GATEWAYS if gateway != self._owner)
        return {"owner": self._owner, "other": other}.get(name, name)

    def _try(self, command: Command) -> dict[str, Any]:
        limit = time.monotonic() + command.within
        while True:
            done = self._lab.command(self._host(command.host), ["sh", "-c", command.run])
            output = done.stdout + done.stderr
            wrong = command.verdict(done.returncode, output)
            if not wrong or time.monotonic() > limit:
                break
            time.sleep(0.2)
        result: dict[str, Any] = {"host": command.host, "ok": not wrong}
        if wrong:
            result["why"] = wrong
            result["output"] = output.strip()[-600:]
        return result

    def _do_command(self, command: Command) -> None:
        result = self._try(command)
        if not result["ok"]:
            raise StepError(f"{command.host}: {command.run}: {result['why']}: {result['output']}")

    # -- verbs ------------------------------------------------------------------------------

    def _do_connect(self, gateway: str = "psg", mobile: str = "mn") -> None:
        self._lab.connect(gateway, mobile)
        self._connected = gateway
        self._serves[mobile] = gateway
        if self._clear is None:
            self._clear = Clear(self._lab)
            self._clear.start()

    def _other(self, host: str) -> Daemon | None:
        """The host's daemon if that is no charon."""
        kind = self._lab.tunnel.others.get(host)
        return None if kind is None else DAEMONS[kind]

    def _sas(self, host: str, mobile: str) -> list[dict[str, Any]]:
        """The IKE_SAs of one mobile node: a gateway has a connection of its name for it."""
        return self._lab.list_sas(host, mobile if host in GATEWAYS else None)

    def _do_terminate(self, host: str = "mn", mobile: str = "") -> None:
        host = self._host(host)
        mobile = mobile or (host if host in MOBILES else "mn")
        if (daemon := self._other(host)) is not None:
            self._lab.tell(host, daemon.down(self._lab.work / host, self._connected))
        for sa in [] if daemon else self._sas(host, mobile):
            # one that was rekeyed is listed for a while, and may have gone; what counts is that none is left
            with contextlib.suppress(CharonError):
                self._lab.vici(host).terminate(ike_id=int(sa["uniqueid"]), timeout_ms=20000)
        for end in (mobile, self._serves[mobile]):
            self._until(partial(self._gone, end, mobile), f"{end} still has the IKE_SA of {mobile}")

    def _gone(self, host: str, mobile: str) -> bool:
        return not self._sas(host, mobile)

    def _do_wait(self, seconds: str) -> None:
        time.sleep(float(seconds))

    def _do_traffic(self, what: str) -> None:
        if what == "start":
            self._tracing.start()
            self._start_traffic()
            return
        traffic, notes = self._end_traffic()
        self.report.add_traffic(traffic.pop("mn"), air(notes, self._began_ns), self._began_ns, self._link_ns)
        self.report.others = {mobile: one.as_json(self._began_ns) for mobile, one in traffic.items()}

    @property
    def _interval_ms(self) -> float:
        """Of the probe's datagrams on this machine."""
        return (emulated() and self._scenario.slow_interval_ms) or self._scenario.interval_ms

    def _start_traffic(self) -> None:
        self._watch = TrafficWatch(self._lab)
        mobiles = [name for name in self._lab.tunnel.mobiles if name in self._serves]
        self._watch.start(mobiles, self._interval_ms)
        self._began_ns = time.time_ns()
        time.sleep(0.5)

    def _stop_traffic(self) -> tuple[dict[str, Traffic], list[dict[str, Any]]]:
        if self._watch is None:
            raise StepError("traffic stop without traffic start")
        watch, self._watch = self._watch, None
        return watch.stop()

    def _end_traffic(self) -> tuple[dict[str, Traffic], list[dict[str, Any]]]:
        """`_stop_traffic`, and the time lines of the handovers under that traffic."""
        traffic, notes = self._stop_traffic()
        self.report.trace += self._tracing.stop(notes, traffic["mn"].interval_ms)
        return traffic, notes

    def _do_transfer(self, source: str, target: str, *options: str) -> None:
        source, target = self._host(source), self._host(target)
        self._note(source)
        self._begin()
        # beside other mobile nodes' SAs mn's has to be named, by the connection that is called so
        named = ["--ike", "mn"] if self._lab.tunnel.second and not options else []
        done = self._lab.command(source, ["ikectx", "transfer", "--to", target, "--json", *named, *options])
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            raise StepError(
                f"transfer: exit {done.returncode}: {(done.stdout + done.stderr).strip()[-600:]}"
            ) from None
        self._moved(self._good(answer, f"transfer to {target}: exit {done.returncode}"), target)

    def _begin(self) -> None:
        """A transfer begins now."""
        if not self.report.transfers:
            self._began_ns = time.time_ns()
        self._used = [cpu(self._lab, daemon) for daemon in ("agent", "charon")]

    def _end(self) -> None:
        """It has ended at all hosts that have told so; what an agent does until the next call counts then."""
        now, still = [cpu(self._lab, daemon) for daemon in ("agent", "charon")], clock_stands_still()
        agents, charons = map(partial(spent_ms, clock_stands_still=still), self._used, now)
        self.report.add_cpu(agents, charons)
        self._used = now

    def _moved(self, reports: Sequence[dict[str, Any]], target: str) -> None:
        self._end()
        self.report.add_transfer(reports)
        self._serves["mn"] = target
        if self._lab.tunnel.libipsec and not self._lab.tunnel.shared:
            # no charon changes the addresses of user-space ESP: the mobile node rekeys, and asks again after
            # four seconds where nsg was not yet active when it asked first
            self._until(partial(self._renewed, "mn", "child", self._children), "mn: no rekeyed child SA")

    def _do_move(self, source: str, target: str, *options: str) -> None:
        """Like `transfer`, by the agent's control socket: no program has to start, which is long in a VM."""
        source, target = self._host(source), self._host(target)
        self._note(source)
        query = {"to": target, "address": "keep" if "keep" in options else "update"}
        self._begin()
        with self._lab.agent(source, 300.0) as agent:
            answer = json_of(agent.stream("transfer", "transfer-progress", query))
        self._moved(self._good(answer, f"move to {target}"), target)

    @staticmethod
    def _good(answer: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
        """The reports in an agent's answer. Raises StepError where one tells of a failure."""
        reports: list[dict[str, Any]] = answer.get("reports", [])
        if not reports or any(int(one.get("exit_code", 1)) for one in reports):
            words = [f"{one.get('status')}: {one.get('text')}" for one in reports] or [str(answer)]
            raise StepError(f"{what}: {'; '.join(words)}")
        return reports

    def _do_pull(self, target: str, source: str) -> None:
        """nsg asks psg for the SA, and counts what it took. By the control socket, as `move`."""
        with self._watching(source, target) as reports:
            query = {"from": source, "mn": next(sa["remote-host"] for sa in self._sas(source, "mn"))}
            with self._lab.agent(target, 300.0) as agent:
                answer = json_of(agent.stream("pull", "pull-progress", query))
            reports[:] = self._good(answer, f"pull from {source}")

    def _do_follow(self, target: str) -> None:
        """mn is somewhere else; its charon looks for its gateway and finds another one."""
        with self._watching(self._owner, target):
            self._do_relocate()

    def _do_handover(self, target: str, mode: str) -> None:
        """mn asks for it. What it announced before it relocates completes at its new address by itself."""
        with self._watching(self._owner, target):
            if mode != "reactive":
                self._ask_mobile("announce", target, leaving="yes" if mode == "leaving" else None)
            self._do_relocate()
            if mode == "reactive":
                self._ask_mobile("arrive", target)
        self._until(self._mobile_told, "mn's agent tells of no handover that ended")
        self._end()

    def _mobile_told(self) -> bool:
        """Takes what the mobile node's agent tells of its last handover, once that is the one under way."""
        with self._lab.agent("mn") as agent:
            told = json_of(agent.request("status"))["last"]
        if told is None or told["result"] != "moved" or float(told["started"]) < self._began_ns / 1e9 - 1:
            return False
        kept = ("mode", "ms", "phases_ms", "messages", "octets", "retransmissions")
        self.report.mobile = {key: told[key] for key in kept}
        return True

    def _ask_mobile(self, what: str, target: str, **more: str | None) -> None:
        with self._lab.agent("mn", 120.0) as agent:
            query = {"to": target, "what": what, **more}
            told = json_of(agent.stream("handover", "handover-progress", query))
        if told["exit_code"]:
            raise StepError(f"{what} at {target}: {told['result']}: {told['detail']}")

    @contextlib.contextmanager
    def _watching(self, source: str, target: str) -> Iterator[list[dict[str, Any]]]:
        """Around a transfer away from `source`: both ends are to know it.

        Its reports are those put into the list, else what `source` tells.
        """
        given: list[dict[str, Any]] = []
        reports = Reports(self._lab, source)
        reports.start()
        try:
            self._note(source)
            self._begin()
            yield given
            addresses = outer(target, self._lab.tunnel)
            self._until(
                lambda: (
                    any(sa["state"] == "ESTABLISHED" for sa in self._sas(target, "mn"))
                    and any(sa["remote-host"] in addresses for sa in self._sas("mn", "mn"))
                ),
                f"{target} does not serve mn",
            )
            self._until(
                lambda: any(one["result"] == "moved" for one in reports.found),
                f"{source} tells of no transfer but {[one['text'] for one in reports.found]}",
            )
        finally:
            reports.stop()
        self._moved(given or [one for one in reports.found if one["result"] == "moved"], target)

    def _note(self, source: str) -> None:
        """Keeps what must be the same after a transfer."""
        self._proof.note(source)
        self._children = self._names("mn", "child")
        self._tracing.asked()

    def _settled(self) -> None:
        """Compares SPIs and keys after a transfer with those before, once traffic does not mind the work."""
        if self._proof.noted:
            self.report.add_proof(*self._proof.compare(self._owner))

    def _do_ping(self, mobile: str = "mn") -> None:
        tunnel, version = self._lab.tunnel, self._lab.tunnel.inner
        source, far = INNER[mobile][version], INNER["srv"][version]
        if tunnel.mode == "transport":
            version = tunnel.family
            source, far = OUTER[mobile][version], (SHARED if tunnel.shared else OUTER[self._owner])[version]
        words = ["ping", "-n", "-q", "-c", "3", "-i", "0.2", "-W", "3", "-I", source]
        for _ in range(2):  # the first packets through a gateway may meet neighbours it has to look for
            done = self._lab.command(mobile, [*words, far])
            if " 0% packet loss" in done.stdout:
                return
        raise StepError(f"ping from {mobile} to {far}: {(done.stdout + done.stderr).strip()[-200:]}")

    def _do_rekey(self, host: str, what: str, mobile: str = "mn") -> None:
        host = self._host(host)
        both = (mobile, self._serves[mobile])
        ends = [end for end in both if what == "child" or self._other(end) is None]
        before = {end: self._names(end, what, mobile) for end in ends}
        if (daemon := self._other(host)) is not None:
            self._lab.tell(host, daemon.rekey(self._lab.work / host, self._connected, what))
        for sa in [] if daemon else self._sas(host, mobile):
            if what == "ike":
                self._lab.vici(host).rekey(ike_id=int(sa["uniqueid"]))
                continue
            for child in sa["child-sas"].values():
                if child["state"] == "INSTALLED":
                    self._lab.vici(host).rekey(child_id=int(child["uniqueid"]))
        for end in ends:
            self._until(
                partial(self._renewed, end, what, before[end], mobile), f"{end}: no rekeyed {what} SA"
            )

    def _names(self, host: str, what: str, mobile: str = "mn") -> set[str]:
        """SPIs of the IKE_SAs that are up, or of the children."""
        sas = [sa for sa in self._sas(host, mobile) if sa["state"] == "ESTABLISHED"]
        if what == "ike":
            return {sa["initiator-spi"] + sa["responder-spi"] for sa in sas}
        children = [child for sa in sas for child in sa["child-sas"].values()]
        return {child["spi-in"] for child in children if child["state"] == "INSTALLED"}

    def _renewed(self, host: str, what: str, before: set[str], mobile: str = "mn") -> bool:
        now = self._names(host, what, mobile)
        return len(now) >= len(before) and not now & before

    def _do_twin(self, kind: str) -> None:
        """mn2 has an SA with nsg that has names of mn's SA at psg; nothing of it was on the air."""
        lab = self._lab
        (sa,) = self._sas("psg", "mn")
        (child,) = sa["child-sas"].values()
        taken = TwinNames(sa["initiator-spi"], sa["responder-spi"], child["spi-in"], child["spi-out"])
        version = lab.tunnel.inner
        inner = f"{INNER['mn2'][version]}/{HOST_BITS[version]}"
        lab.command("mn2", ["ip", "addr", "replace", inner, "dev", "lo"])
        for host, context in twin(lab.tunnel, kind, taken, os.urandom(FRESH_OCTETS)).items():
            lab.inject(host, lines(context, str(lab.vici(host).version()["version"])))
        # charon tells its updown script nothing of an SA it has not set up
        script = f"PLUTO_VERB=up-client PLUTO_PEER_CLIENT={inner} $LAB/nsg/updown"
        lab.command("nsg", ["sh", "-c", script])
        self._serves["mn2"] = "nsg"
        for host in ("nsg", "mn2"):
            self._until(partial(self._up, host, "mn2"), f"{host} has no SA of mn2's")
        # charon reports no SA that it was told of, and the agent may have listed its SAs a moment ago
        lab.stop("nsg", "agent")
        lab.start_agent("nsg")

    def _up(self, host: str, mobile: str) -> bool:
        sas = self._sas(host, mobile)
        children = [child["state"] for sa in sas for child in sa["child-sas"].values()]
        return [sa["state"] for sa in sas] == ["ESTABLISHED"] and children == ["INSTALLED"]

    def _do_relocate(self) -> None:
        with self._tracing.change("mn changes its access network"):
            arriving = self._lab.net.relocate(
                dark_ms=self._scenario.dark_ms, late_ms=self._scenario.late_address_ms
            )
        self._link_ns = time.time_ns()
        if arriving is not None:
            self._arriving.append(arriving)
        self._away = not self._away

    def _do_dark(self) -> None:
        """Measures the change of the access network alone, without a tunnel, by a probe in clear.

        It has a relocation of its own, because its datagrams make the new link's neighbours known: beside a
        handover they would do a part of its work.
        """
        if any(self._sas(host, "mn") for host in ("mn", self._owner)):
            self._do_terminate()
        if self._away:
            self._do_relocate()
        self._lab.net.unplug()
        probe = Probe(self._lab, link_paths(self._lab), "link", self._interval_ms / FINER)
        with self._lab.net.mute_router():
            probe.launch()
            probe.begin()
            time.sleep(0.5)
            self._do_relocate()
            time.sleep(1.5)
            self.report.dark_ms = dark(probe.stop())
        if self.report.dark_ms is None:
            raise StepError(
                "dark: between mn's new address and nsg nothing comes through, outside of the tunnel"
            )

    def _do_stays(self) -> None:
        """A stock mobile node changes its access network, and its gateway stays the one it has (MOBIKE)."""
        self._start_over("psk")
        self._do_relocate()
        addresses = set(AWAY.values())
        self._until(
            lambda: any(sa["remote-host"] in addresses for sa in self._sas("psg", "mn")),
            "psg has not heard of mn's new address",
        )
        time.sleep(1.0)
        traffic, _notes = self._stop_traffic()
        self.report.add_clear(self._unwatch())
        self.report.stays = traffic["mn"].as_json()
        self._do_terminate()

    def _start_over(self, auth: str, *, relocates: bool = True) -> None:
        """The mobile node has a tunnel with psg as of today, at its first place, under traffic."""
        if any(self._sas(host, "mn") for host in ("mn", self._owner)):
            self._do_terminate()
        if relocates and self._away:
            self._do_relocate()
            self._lab.net.mend()
        self.report.add_clear(self._unwatch())
        self._lab.reload(self._lab.tunnel.of_today(auth), self._scenario.overrides)
        self._do_connect("psg")
        self._do_ping()
        self._start_traffic()
        time.sleep(0.5)

    def _do_cut(self, one: str, other: str) -> None:
        self._lab.net.cut(one, other)
        self._cut = True

    def _do_mend(self) -> None:
        self._lab.net.mend()

    def _do_roam(self) -> None:
        version = self._lab.tunnel.family
        old, new = OUTER["mn"][version], ROAMED[version]
        bits, nodad = (24, "") if version == 4 else (64, " nodad")
        script = f"ip addr add {new}/{bits} dev eth0{nodad} && ip addr del {old}/{bits} dev eth0"
        owner = self._owner
        before = seen_at(self._sas(owner, "mn"))
        done = self._lab.command("mn", ["sh", "-c", script])
        if done.returncode != 0:
            raise StepError(f"roam: {done.stderr.strip()}")
        self._until(lambda: seen_at(self._sas(owner, "mn")) - before, f"{owner} still sees {before}")

    def _do_agent(self, host: str, what: str) -> None:
        host = self._host(host)
        if what == "start":
            self._lab.start_agent(host)
        else:
            self._lab.stop(host, "agent", kill=what == "kill")

    def _do_charon(self, host: str, what: str) -> None:
        host = self._host(host)
        if what == "start":
            self._lab.start_charon(host)
        else:
            self._lab.stop(host, "charon", kill=what == "kill")

    def _do_baseline(self, kind: str, where: str = "") -> None:
        """The way of today: the mobile node deletes its tunnel with psg and sets one up with nsg.

        No gateway sends packets on then, so that the inside has to follow by itself. It does so at once, by
        an announcement of nsg's updown script that takes no time, and the mobile node keeps its inner
        address.
        Both flatter the way of today: a real network's routing takes longer, and nsg would give the mobile
        node an address from a pool of its own, which ends every connection that it has.

        With `relocate` it has changed its access network, psg cannot be reached from there, and it forgets
        the old tunnel without a word.
        """
        lab = self._lab
        self._start_over(kind, relocates=bool(where))
        began = time.time_ns()
        if where:
            self._do_cut("away", "psg")
            self._do_relocate()
            lab.forget("mn")
            began = time.time_ns()
        else:
            lab.terminate("mn")
        lab.initiate("mn", "nsg", "net")
        done_ms = (time.time_ns() - began) / 1e6
        time.sleep(1.0)
        traffic, notes = self._stop_traffic()
        left = self._unwatch()
        self._serves["mn"] = "nsg"
        # what an agent tells its new gateway afterwards is no part of the way of today
        there = air([note for note in notes if not where or note.get("exchange") in SET_UP], began)
        self.report.add_baseline(
            kind, BASELINES[kind], traffic["mn"], there, done_ms, left, relocated=bool(where)
        )
        self._do_terminate()
        if where:
            lab.net.mend()
            lab.forget("psg")

    def _until(self, true: Callable[[], object], otherwise: str) -> None:
        limit = time.monotonic() + SETTLE
        while not true():
            if time.monotonic() > limit:
                raise StepError(f"{otherwise} after {SETTLE:.0f} s")
            time.sleep(0.1)


def seen_at(sas: Iterable[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """Where a gateway sees its mobile node. That changes when the node roams: to another address, perhaps of
    its other address family, whichever path answers first; behind a relay to another port of the relay."""
    return {(str(sa["remote-host"]), str(sa["remote-port"])) for sa in sas}
