"""What a scenario found: JSON with the same keys for every scenario, and a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .critical import counts, more
from .trace import TimeLine

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .measure import Traffic
    from .scenario import Scenario


@dataclass(slots=True)
class ScenarioReport:
    """One scenario's outcome. None stands for what the scenario does not measure."""

    scenario: str
    description: str = ""
    esp: str = ""
    ok: bool = False
    skipped_because: str = ""
    strongswan: str = ""
    same_spis: bool | None = None
    same_keys: bool | None = None
    traffic: dict[str, Any] | None = None
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    air: dict[str, Any] | None = None
    gateways: dict[str, int] | None = None
    cpu_ms: dict[str, float | None] | None = None
    charon_ms: dict[str, float | None] | None = None
    phases_ms: dict[str, float] | None = None
    mobile: dict[str, Any] | None = None
    clear: dict[str, int] | None = None
    baseline: list[dict[str, Any]] = field(default_factory=list)
    ratio: float | None = None
    ratio_beyond_dark: float | None = None
    dark_ms: dict[str, float] | None = None
    """How long mn's link is dark when it changes its access network. None: that was not measured."""
    stays: dict[str, Any] | None = None
    """The gaps when a stock mn relocates and its gateway stays the same: what its own charon takes."""
    transfers: list[dict[str, Any]] = field(default_factory=list)
    crowd: int = 0
    """Other SAs at each gateway."""
    gateways_round_trip_ms: float = 0.0
    """Between the gateways, as far as the lab has it take time."""
    trace: list[dict[str, Any]] = field(default_factory=list)
    """A time line of each handover (`lab_trace.TimeLine.as_json`), where that was asked for."""
    checks: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @classmethod
    def skipped(cls, scenario: Scenario, why: str) -> ScenarioReport:
        return cls(scenario.name, scenario.description, ok=True, skipped_because=why)

    @classmethod
    def failed(cls, scenario: Scenario, why: str) -> ScenarioReport:
        return cls(scenario.name, scenario.description, error=why)

    # -- filling ----------------------------------------------------------------------------

    def add_traffic(self, traffic: Traffic, air: dict[str, Any], since_ns: int, link_ns: int = 0) -> None:
        self.traffic = traffic.as_json(since_ns, link_ns)
        self.air = air

    def add_cpu(self, agents_ms: Mapping[str, float | None], charons_ms: Mapping[str, float | None]) -> None:
        """Takes the CPU time that each host's agent and charon used in one transfer; of several it adds
        up."""
        self.cpu_ms = _added(self.cpu_ms, agents_ms)
        self.charon_ms = _added(self.charon_ms, charons_ms)

    def add_transfer(self, reports: Iterable[Mapping[str, Any]]) -> None:
        """Takes the reports of one `ikectx transfer --json`. Messages and octets add up; phases: the last."""
        gateways = self.gateways or {"messages": 0, "octets": 0}
        for one in reports:
            gateways["messages"] += int(one.get("cxtp_messages", 0))
            gateways["octets"] += int(one.get("cxtp_octets", 0))
            self.phases_ms = {str(name): float(ms) for name, ms in one.get("phases_ms", {}).items()}
            kept = (
                "from",
                "to",
                "result",
                "status",
                "phases_ms",
                "cxtp_messages",
                "cxtp_octets",
                "attempts",
                "epoch",
            )
            self.transfers.append({key: one[key] for key in kept if key in one})
        self.gateways = gateways

    def add_clear(self, left: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Takes what left each gateway in the clear while somebody watched, as `lab_clear` tells it."""
        counts = self.clear or {}
        for host, kinds in left.items():
            counts[host] = counts.get(host, 0) + _packets(kinds)
            for one in kinds:
                words = "{packets} packets from {from} to {to} (protocol {protocol}) by {interface}"
                self.warnings.append(f"{host}: in the clear: {words.format_map(one)}")
        self.clear = counts or None

    def add_proof(self, same_spis: bool, same_keys: bool | None) -> None:
        """The comparison after one transfer; over several, one that fails decides.

        With user-space ESP the peer has rekeyed its children: only the SPIs of the IKE_SA are compared.
        """
        self.same_spis = same_spis and self.same_spis is not False
        if same_keys is not None:
            self.same_keys = same_keys and self.same_keys is not False

    def add_baseline(
        self,
        name: str,
        title: str,
        traffic: Traffic,
        air: Mapping[str, Any],
        done_ms: float,
        clear: Mapping[str, Sequence[Mapping[str, Any]]],
        *,
        relocated: bool = False,
    ) -> None:
        """The way of today; `relocated`: the mobile node changed its access network in between.

        What left the gateways in the clear meanwhile is told and no fault: nothing was moved.
        """
        self.baseline.append(
            {
                "name": name,
                "title": title,
                "interruption_ms": traffic.longest_gap_ms,
                "gap_ms": traffic.gap_ms,
                "round_trip_ms": traffic.round_trip_ms,
                "lost": traffic.lost,
                "sent": traffic.up.sent + traffic.down.sent,
                "messages": air["messages"],
                "octets": air["octets"],
                "by_exchange": air["by_exchange"],
                "signalling_ms": round(done_ms, 1),
                "recovered": traffic.recovered,
                "clear": {host: _packets(kinds) for host, kinds in clear.items()},
                "relocated": relocated,
            }
        )

    def judge(self, scenario: Scenario, *, stolen: bool = False) -> None:
        """Sets `ok`, what of the gaps was not the link's, and the ratios when everything is in.

        `stolen`: other programs may have had the CPU meanwhile, as in any time but a virtual one. How long a
        mobile node's own charon takes to change its SAs' addresses is then the machine's doing: what its own
        kernel refused or dropped counts towards no limit, unless an agent of this project's runs there.
        """
        if self.traffic:
            self._split(self.traffic, moved=scenario.relocates)
        for one in self.baseline:
            self._split(one, moved=one["relocated"])
        if self.stays:
            self._split(self.stays, moved=True)
        if self.baseline and self.traffic:
            gaps = [one["interruption_ms"] for one in self.baseline]
            self.ratio = _ratio(gaps, self.traffic["longest_gap_ms"])
            beyond = [longer(one["beyond_dark_ms"]) for one in self.baseline]
            self.ratio_beyond_dark = _ratio(beyond, longer(self.traffic["beyond_dark_ms"]))
        if stolen and scenario.exact:
            scenario = replace(scenario, lost=None)
        complaints = list(self._complaints(scenario, stolen and not scenario.tunnel.mobile))
        if scenario.path is not None and not stolen and self.trace:
            complaints += more(counts(TimeLine.from_json(self.trace[0])), scenario.path)
        self.ok = not self.error and not complaints
        self.error = self.error or "; ".join(complaints)

    def _split(self, way: dict[str, Any], *, moved: bool) -> None:
        """What of the gaps of a way to nsg was not the link's, which is the same all along where mn stays."""
        dark = self.dark_ms if moved else dict.fromkeys(way["gap_ms"], 0.0)
        way["dark_ms"] = dark
        way["beyond_dark_ms"] = dark and {
            name: round(gap - dark[name], 1) for name, gap in way["gap_ms"].items()
        }

    def _complaints(self, scenario: Scenario, stolen: bool) -> Iterable[str]:
        if self.transfers:
            if not self.same_spis:
                yield (
                    "the SPIs are not the same as before"
                    if scenario.names == "kept"
                    else "the ends do not have the same SAs"
                )
            if not self.same_keys and self.esp == "kernel":
                yield "the keys are not the same as before"
        if self.traffic and not self.traffic["recovered"]:
            yield "the traffic did not come back"
        for mobile, one in self.others.items():
            if not one["recovered"]:
                yield f"the traffic of {mobile} did not come back"
        for host, count in (self.clear or {}).items():
            if count:
                yield f"{count} packets of a mobile node's traffic left {host} in the clear"
        yield from self._too_much(scenario, stolen)
        for one in self.baseline:
            if not one["recovered"]:
                yield f"baseline {one['name']}: the traffic did not come back"
        for check in self.checks:
            if not check["ok"]:
                yield f"check {check['name']}: {check['why']}"

    def _too_much(self, scenario: Scenario, stolen: bool) -> Iterable[str]:
        if self.esp != "kernel":
            return
        if self.traffic and scenario.lost is not None:
            causes = self.traffic["causes"].items() if stolen else ()
            lost = self.traffic["lost"] - sum(count for cause, count in causes if cause.endswith(" at mn"))
            if lost > scenario.lost:
                yield f"{lost} packets lost, allowed are {scenario.lost}"
        if self.traffic and scenario.lost_down is not None:
            lost = self.traffic["down"]["lost"]
            if lost > scenario.lost_down:
                yield f"{lost} packets to mn lost, allowed are {scenario.lost_down}"
        if self.traffic and scenario.late is not None:
            late = self.traffic["up"]["late"] + self.traffic["down"]["late"]
            if late > scenario.late:
                yield f"{late} packets came late, allowed are {scenario.late}"
        for mobile, one in self.others.items():
            if scenario.other_lost is not None and one["lost"] > scenario.other_lost:
                yield f"{one['lost']} packets of {mobile} lost, allowed are {scenario.other_lost}"
        if self.traffic and scenario.gap_ms is not None and self.traffic["longest_gap_ms"] > scenario.gap_ms:
            yield f"a gap of {self.traffic['longest_gap_ms']} ms, allowed are {scenario.gap_ms}"
        if self.air and scenario.messages is not None and self.air["messages"] != scenario.messages:
            yield f"{self.air['messages']} messages on the air, not {scenario.messages}"
        most = max((int(one.get("cxtp_octets", 0)) for one in self.transfers), default=0)
        if scenario.gateway_octets is not None and most > scenario.gateway_octets:
            yield f"{most} octets between the gateways, allowed are {scenario.gateway_octets}"

    def why(self) -> str:
        """Why it failed, in one line."""
        return " ".join(self.error.split())

    # -- showing ----------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """The report as plain data; keys that say nothing here are left out, but for the main ones."""
        main = {
            "scenario": self.scenario,
            "description": self.description,
            "ok": self.ok,
            "esp": self.esp,
            "strongswan": self.strongswan,
            "same_spis": self.same_spis,
            "same_keys": self.same_keys,
            "traffic": self.traffic,
            "air": self.air,
            "gateways": self.gateways,
            "phases_ms": self.phases_ms,
            "clear": self.clear,
            "cpu_ms": self.cpu_ms,
            "charon_ms": self.charon_ms,
            "baseline": self.baseline,
            "ratio": self.ratio,
            "ratio_beyond_dark": self.ratio_beyond_dark,
            "seconds": self.seconds,
        }
        extra = {
            "skipped": self.skipped_because,
            "others": self.others,
            "mobile": self.mobile,
            "stays": self.stays,
            "crowd": self.crowd,
            "gateways_round_trip_ms": self.gateways_round_trip_ms,
            "transfers": self.transfers if len(self.transfers) > 1 else [],
            "checks": self.checks,
            "trace": self.trace,
            "warnings": self.warnings,
            "error": self.error,
        }
        return {**main, **{key: value for key, value in extra.items() if value}}


def _added(
    had: Mapping[str, float | None] | None, more: Mapping[str, float | None]
) -> dict[str, float | None]:
    return {
        host: None if used is None else round(used + ((had or {}).get(host) or 0.0), 1)
        for host, used in more.items()
    }


def _packets(kinds: Iterable[Mapping[str, Any]]) -> int:
    return sum(int(one["packets"]) for one in kinds)


def longer(directions: Mapping[str, float] | None) -> float | None:
    """Of figures for up and down, the larger one; a way is as long as its slower direction."""
    return max(directions.values()) if directions else None


def _ratio(theirs: Sequence[float | None], ours: float | None) -> float | None:
    """How many times as long the shortest of the ways of today is. None where one of both is not known."""
    known = [one for one in theirs if one is not None]
    return round(min(known) / ours, 1) if known and ours is not None and ours > 0 else None


def both(directions: Mapping[str, float] | None, unit: float = 1.0, digits: int = 0) -> str:
    """Figures of both directions, up first, in units of `unit`."""
    if directions is None or not unit:
        return "?"
    return " / ".join(f"{directions[name] / unit:.{digits}f}" for name in ("up", "down"))


def ways(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What a report (its JSON form) found of each way to nsg: ours first, then those of today."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    if report.get("traffic"):
        name = "ikectx" if report["gateways"] else "traffic"
        found.append((name, {**report["traffic"], **report["air"], "ours": report["gateways"]}))
    for one in report["baseline"]:
        how = "relocate, connect" if one.get("relocated") else "terminate, connect"
        found.append((f"{how}: {one['title']}", one))
    return found


def _traffic_table(title: str, found: Sequence[tuple[str, Mapping[str, Any]]]) -> RenderableType:
    """Losses and gaps of each way; where the mobile node moved, the link's part in them, too."""
    from rich.table import Table

    moves = any(one["dark_ms"] is None or any(one["dark_ms"].values()) for _name, one in found)
    columns = ["", "lost", "longest gap\nup / down, ms"]
    if moves:
        columns += ["link dark\nup / down, ms", "beyond that\nup / down, ms"]
    table = Table(*columns, "in round trips\nup / down", title=title)
    for name, one in found:
        cells = [f"{one['lost']} of {one['sent']}", both(one["gap_ms"])]
        if moves:
            cells += [both(one["dark_ms"]), both(one["beyond_dark_ms"])]
        table.add_row(name, *cells, both(one["beyond_dark_ms"], one["round_trip_ms"], 1))
    return table


def _signalling_table(found: Sequence[tuple[str, Mapping[str, Any]]]) -> RenderableType:
    """Messages and octets of each way."""
    from rich.table import Table

    table = Table("", "messages on the air", "octets", "between gateways")
    for name, one in found:
        by_exchange = ", ".join(f"{count} {kind}" for kind, count in one["by_exchange"].items())
        gateways = one.get("ours")
        between = f"{gateways['messages']} messages, {gateways['octets']} octets" if gateways else ""
        table.add_row(name, f"{one['messages']} ({by_exchange})", str(one["octets"]), between)
    return table


def label(report: Mapping[str, Any]) -> str:
    """The name of a run: its scenario's, with its number where that ran several times."""
    return f"{report['scenario']}-{report['run']}" if report.get("run") else str(report["scenario"])


def repeated(reports: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of scenarios that ran several times, a line for each that failed: how often, and in which runs."""
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        if report.get("run"):
            runs.setdefault(report["scenario"], []).append(report)
    lines = []
    for name, ran in runs.items():
        if failed := [str(one["run"]) for one in ran if not one["ok"]]:
            lines.append(f"{name}: {len(failed)} of {len(ran)} runs failed ({', '.join(failed)})")
    return lines


def tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """The tables of one report (its JSON form), for a terminal."""
    from rich.text import Text

    shown: list[RenderableType] = []
    if found := ways(report):
        shown.append(_traffic_table(f"{label(report)}: {report['description']}", found))
        shown.append(_signalling_table(found))
    lines = []
    if report.get("phases_ms"):
        lines.append(
            "phases: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in report["phases_ms"].items())
        )
    if report.get("mobile"):
        phases = report["mobile"]["phases_ms"].items()
        lines.append("mobile node's phases: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in phases))
    if any((report.get("cpu_ms") or {}).values()):
        used = [(host, ms) for host, ms in report["cpu_ms"].items() if ms is not None]
        lines.append("CPU time of the agents: " + ", ".join(f"{host} {ms:.0f} ms" for host, ms in used))
    if report.get("traffic"):
        lines.append(f"a round trip through the tunnel: {report['traffic']['round_trip_ms']:.1f} ms")
    if report.get("traffic") and report["traffic"]["causes"]:
        causes = report["traffic"]["causes"].items()
        lines.append("lost: " + ", ".join(f"{count} {cause}" for cause, count in causes))
    for mobile, one in report.get("others", {}).items():
        lines.append(
            f"{mobile}: {one['lost']} of {one['sent']} lost, longest gap {one['longest_gap_ms']:.0f} ms"
        )
    if report.get("same_spis") is not None:
        words = {True: "the same", False: "NOT the same", None: "not visible"}
        spis, keys = words[report["same_spis"]], words[report["same_keys"]]
        lines.append(f"SPIs {spis}, keys {keys} (at the MN and at both gateways)")

    if report.get("clear"):
        counts = ", ".join(f"{count} by {host}" for host, count in report["clear"].items())
        lines.append(f"left in the clear: {counts}")
    if report.get("ratio"):
        lines.append(f"interruption: 1 to {report['ratio']} against the fastest of the ways of today")
    if report.get("ratio_beyond_dark") and any(report["traffic"]["dark_ms"].values()):
        lines.append(f"beyond what the link itself was dark: 1 to {report['ratio_beyond_dark']}")
    where = f"strongSwan {report['strongswan']}, ESP: {report['esp']}, {report['seconds']} s"
    if report.get("guest"):
        where += f", guest {report['guest']}, {report['clock']} time"
    lines.append(("ok" if report["ok"] else f"FAILED: {report.get('error', '')}") + f" ({where})")
    lines += [f"note: {warning}" for warning in report.get("warnings", [])]
    shown.append(Text("\n".join(lines)))
    return shown


def summary(reports: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line a scenario."""
    from rich.table import Table

    table = Table()
    for column in ("scenario", "result", "lost", "longest gap", "air", "gateways", "seconds"):
        table.add_column(column, no_wrap=column != "result")
    for one in reports:
        traffic, air, gateways = one.get("traffic"), one.get("air"), one.get("gateways")
        result = "ok" if one["ok"] else f"FAILED: {' '.join(str(one.get('error', '')).split())[:160]}"
        table.add_row(
            label(one),
            f"skipped: {one['skipped']}" if one.get("skipped") else result,
            f"{traffic['lost']} of {traffic['sent']}" if traffic else "",
            f"{traffic['longest_gap_ms']:.0f} ms" if traffic else "",
            f"{air['messages']} / {air['octets']}" if air else "",
            f"{gateways['messages']} / {gateways['octets']}" if gateways else "",
            str(one["seconds"]),
        )
    return table
