"""One time line over all hosts of a lab: what agents noted, what was on the air, when probe packets came.

All hosts run on one kernel, so CLOCK_REALTIME is one clock for them; in virtual time it is exact. A
`TimeLine` is one handover. Its times are milliseconds since the scenario began it (a command, a pull, a
change of the access network). The reading of files is at the end; what stands above it is arithmetic.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from . import capture as lab_capture
from .hosts import TRACE, Lab
from .net import ANNOUNCED, AWAY, GATEWAYS, INNER, LINKS, NAT, OUTER, run
from .traffic import Capture

HOSTS = ("mn", "nsg", "psg")
"""The lanes of a time line. What is between pSG and the mobile node is rare, so nSG stands between them."""

IKE, CXTP, TLS = "IKE", "CXTP", "CXTP in TLS"
"""What a message goes over: IKE and CXTP/UDP on the air, CXTP between gateways (TLS, or TCP in ESP)."""

UNEVEN = 2.5
"""Intervals of the probe between two arrivals from which on they count as a gap: less is the sender's
unpunctuality."""

_CALLED = {"CtReq": "CT-Req"}
"""CXTP messages (RFC 4067 section 2.5) whose class's name in capitals is not their own."""


@dataclass(frozen=True, slots=True)
class Span:
    """Work on a host: see `ikectx.trace`. `of`: the transfer's id; `failed`: an exception's name."""

    host: str
    step: str
    kind: str
    begin: float
    end: float
    of: str = ""
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Arrow:
    """A message from host to host; `received` is None where it was lost. `octets` are those of its IP packet,
    and with `TLS` those of the message alone."""

    source: str
    target: str
    message: str
    over: str
    sent: float
    received: float | None
    octets: int


@dataclass(frozen=True, slots=True)
class LinkChange:
    """The scenario changed a link of the mobile node's: when it began to, and when it had."""

    what: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class ProbeFlow:
    """One direction of the tunnel's probe: when its packets arrived, when those were sent that did not.

    `last` and `first`: the arrivals before and after the longest gap, None where there is no gap. `transit`:
    how long the first packet behind it was under way.
    """

    arrived: tuple[float, ...] = ()
    lost: tuple[float, ...] = ()
    last: float | None = None
    first: float | None = None
    transit: float | None = None

    @property
    def gap(self) -> float | None:
        """Milliseconds."""
        return None if self.last is None or self.first is None else self.first - self.last


@dataclass(frozen=True, slots=True)
class TimeLine:
    """One handover over all hosts; everything sorted by its beginning."""

    name: str
    began_ns: int
    """Nanoseconds since 1970 at 0 ms."""
    end: float
    """When the last step, message or gap of the handover had ended."""
    spans: tuple[Span, ...] = ()
    arrows: tuple[Arrow, ...] = ()
    changes: tuple[LinkChange, ...] = ()
    up: ProbeFlow = field(default_factory=ProbeFlow)
    down: ProbeFlow = field(default_factory=ProbeFlow)

    def as_json(self) -> dict[str, Any]:
        """Plain data; milliseconds with three decimals."""
        flows = {"up": self.up, "down": self.down}
        return {
            "name": self.name,
            "began_ns": self.began_ns,
            "end": round(self.end, 3),
            "spans": [_rounded(asdict(one)) for one in self.spans],
            "arrows": [_rounded(asdict(one)) for one in self.arrows],
            "changes": [_rounded(asdict(one)) for one in self.changes],
            **{name: _rounded({**asdict(flow), "gap": flow.gap}) for name, flow in flows.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TimeLine:
        """What `as_json` made."""

        def flow(one: Mapping[str, Any]) -> ProbeFlow:
            edges = (one["last"], one["first"], one["transit"])
            return ProbeFlow(tuple(one["arrived"]), tuple(one["lost"]), *edges)

        return cls(
            data["name"],
            data["began_ns"],
            data["end"],
            tuple(Span(**one) for one in data["spans"]),
            tuple(Arrow(**one) for one in data["arrows"]),
            tuple(LinkChange(**one) for one in data["changes"]),
            flow(data["up"]),
            flow(data["down"]),
        )


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 3)
        return [short(one) for one in value] if isinstance(value, tuple) else value

    return {name: short(value) for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class Window:
    """When a handover was asked for, and when the scenario saw that it was done (ns); what it is called."""

    name: str
    begin: int
    end: int

    def ms(self, stamp: int) -> float:
        return (stamp - self.begin) / 1e6


Notes = Sequence[Mapping[str, Any]]

SEQUEL = 100_000_000
"""Nanoseconds in which a step or message follows another that belongs to the same handover."""


def with_sequel(
    window: Window, until: int, notes: Mapping[str, Notes], captures: Mapping[str, Notes]
) -> Window:
    """The window, prolonged by what follows closely, up to a moment (ns).

    The scenario waits until the SA has moved; the mobile node's last steps come after that.
    """
    lines = [line for host in notes.values() for line in host]
    parts = [(one["begin"], one["end"]) for one in lines if one.get("kind") == "step"]
    parts += [(one["at"], one["at"]) for one in lines if "message" in one]
    parts += [(one["time"], one["time"]) for host in captures.values() for one in host]
    end = window.end
    for begin, stop in sorted(parts):
        if end < begin and (begin - end > SEQUEL or begin >= until):
            break
        end = max(end, min(stop, until))
    return replace(window, end=end)


def spans(notes: Mapping[str, Notes], window: Window) -> tuple[Span, ...]:
    """The agents' spans (lines of `ikectx.trace` by host) that began in the window."""
    found = [
        Span(
            host,
            note["step"],
            note["kind"],
            window.ms(note["begin"]),
            window.ms(note["end"]),
            note["of"],
            note.get("failed", ""),
        )
        for host, lines in notes.items()
        for note in lines
        if "step" in note and window.begin <= note["begin"] <= window.end
    ]
    return tuple(sorted(found, key=lambda span: (span.begin, -span.end)))


def between_gateways(notes: Mapping[str, Notes], window: Window) -> tuple[Arrow, ...]:
    """CXTP messages that agents sent to and received from each other: of one kind they keep their order."""
    arrived: dict[tuple[str, str, str], deque[int]] = defaultdict(deque)
    for host, lines in notes.items():
        for note in lines:
            if note.get("way") == "received":
                arrived[note["peer"], host, note["message"]].append(note["at"])
    found = []
    for host, lines in notes.items():
        for note in lines:
            if note.get("way") != "sent":
                continue
            waiting = arrived[host, note["peer"], note["message"]]
            while waiting and waiting[0] < note["at"]:
                waiting.popleft()
            received = waiting.popleft() if waiting else None
            if window.begin <= note["at"] <= window.end:
                name = _CALLED.get(note["message"], note["message"].upper())
                at = None if received is None else window.ms(received)
                found.append(
                    Arrow(host, note["peer"], name, TLS, window.ms(note["at"]), at, note.get("octets", 0))
                )
    return tuple(sorted(found, key=lambda arrow: arrow.sent))


def on_the_air(captures: Mapping[str, Notes], window: Window) -> tuple[Arrow, ...]:
    """IKE and CXTP/UDP that left one host's interface, with its arrival at another's.

    A packet is known again by the checksum of its payload. Where copies of it were sent and all arrived, they
    came in that order; where some did not, what arrived is taken for the last that was sent before.
    """
    sent: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    came: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for host, notes in captures.items():
        for note in notes:
            if note["sent"]:
                sent[host, note["sum"]].append(note)
            else:
                came[note["sum"]].append((note["time"], host))
    found = []
    for (source, total), copies in sent.items():
        name, over = _air_name(copies[0])
        arrivals = sorted((stamp, host) for stamp, host in came[total] if host != source)
        for note, arrival in _paired(sorted(copies, key=lambda note: note["time"]), arrivals):
            stamp, target = arrival or (None, _host_at(note["far"]))
            if window.begin <= note["time"] <= window.end and target != source:
                at = None if stamp is None else window.ms(stamp)
                found.append(Arrow(source, target, name, over, window.ms(note["time"]), at, note["octets"]))
    return tuple(sorted(found, key=lambda arrow: arrow.sent))


def _paired(
    copies: Notes, arrivals: Sequence[tuple[int, str]]
) -> list[tuple[Mapping[str, Any], tuple[int, str] | None]]:
    """Each copy of a packet with its arrival, both sorted by time."""
    times = [note["time"] for note in copies]
    if len(copies) == len(arrivals) and all(
        sent <= came for sent, (came, _host) in zip(times, arrivals, strict=True)
    ):
        return list(zip(copies, arrivals, strict=True))
    found: dict[int, tuple[int, str]] = {}
    for arrival in arrivals:
        before = [place for place, sent in enumerate(times) if sent <= arrival[0] and place not in found]
        if before:
            found[before[-1]] = arrival
    return [(note, found.get(place)) for place, note in enumerate(copies)]


def _air_name(note: Mapping[str, Any]) -> tuple[str, str]:
    if "cxtp" in note:
        return lab_capture.CXTP.get(note["cxtp"], "CXTP ?"), CXTP
    kind = lab_capture.EXCHANGES.get(note["exchange"], str(note["exchange"]))
    return f"{kind} {note['message_id']} {'response' if note['response'] else 'request'}", IKE


def neighbours(notes: Notes, window: Window, whose: str = "") -> tuple[Span, ...]:
    """How long the mobile node took to learn link addresses, or its router: until then what is sent waits.

    `notes`: at the one that asks; `whose` is a word before the name.
    """
    found = []
    asked: dict[str, int] = {}
    for note in sorted(notes, key=lambda note: note["time"]):
        if note["asks"] and note["sent"]:
            asked.setdefault(note["neighbour"], note["time"])
        elif not note["asks"] and not note["sent"] and note["neighbour"] in asked:
            began = asked.pop(note["neighbour"])
            if window.begin <= began <= window.end:
                name = "neighbour discovery" if ":" in note["neighbour"] else "ARP"
                found.append(Span("mn", whose + name, "part", window.ms(began), window.ms(note["time"])))
    return tuple(found)


def as_handed_over(notes: Notes, held: Mapping[str, int]) -> Notes:
    """The notes of a capture with the times at which packets were given to their interfaces.

    A packet socket sees what is sent when it leaves the queueing discipline, and netem holds it for as long
    as the link is to take. `held`: those nanoseconds by interface.
    """
    return [
        {**note, "time": note["time"] - held.get(note["interface"], 0)} if note["sent"] else note
        for note in notes
    ]


def _host_at(address: str) -> str:
    """The host that has an outer address; empty where it is nobody's."""
    places = {host: (*found.values(), *INNER[host].values()) for host, found in OUTER.items()}
    places["nsg"] += tuple(ANNOUNCED.values())
    places["mn"] += (*AWAY.values(), NAT)
    return next((host for host, addresses in places.items() if address in addresses), "")


def flow(
    sent: Sequence[Sequence[int]], received: Iterable[Sequence[int]], window: Window, interval_ms: float
) -> ProbeFlow:
    """One direction of the probe in the window and a little around it.

    `sent`: [number, ns, errno] at one end; `received`: [number, ns] at the other.
    """
    arrivals: dict[int, int] = {}
    for number, stamp in received:
        arrivals.setdefault(number, stamp)
    margin = (window.end - window.begin) // 20
    first_ns, last_ns = window.begin - margin, window.end + margin
    stamps = sorted(stamp for stamp in arrivals.values() if first_ns <= stamp <= last_ns)
    # a number may have been sent several ways
    missing = {number: window.ms(stamp) for number, stamp, _error in sent if number not in arrivals}
    lost = [ms for ms in missing.values() if window.ms(first_ns) <= ms <= window.ms(last_ns)]
    last = first = transit = None
    # a gap may have begun before the window, or go on after it
    every = sorted(arrivals.values())
    pairs = [pair for pair in itertools.pairwise(every) if pair[1] > window.begin and pair[0] < window.end]
    if pairs:
        before, after = max(pairs, key=lambda pair: pair[1] - pair[0])
        if (after - before) / 1e6 >= UNEVEN * interval_ms:
            last, first = window.ms(before), window.ms(after)
            stamps_sent = {number: stamp for number, stamp, _error in sent}
            number = next(number for number, stamp in arrivals.items() if stamp == after)
            transit = (after - stamps_sent[number]) / 1e6 if number in stamps_sent else None
    return ProbeFlow(tuple(window.ms(stamp) for stamp in stamps), tuple(lost), last, first, transit)


def time_line(
    window: Window,
    notes: Mapping[str, Notes],
    captures: Mapping[str, Notes],
    solicits: Mapping[str, Notes],
    changes: Iterable[tuple[str, int, int]],
    ends: Mapping[str, Mapping[str, Any]],
    interval_ms: float,
) -> TimeLine:
    """Everything of one handover.

    `notes`: of the agents; `captures`: IKE and CXTP; `solicits`: see `neighbours`; `changes`: see
    `LinkChange`; `ends`: what the probe noted at `mn` and `srv`.
    """
    asked = neighbours(solicits.get("mn", ()), window) + neighbours(
        solicits.get("core", ()), window, "router's "
    )
    steps = tuple(sorted((*spans(notes, window), *asked), key=lambda span: span.begin))
    arrows = tuple(
        sorted(
            (*between_gateways(notes, window), *on_the_air(captures, window)), key=lambda arrow: arrow.sent
        )
    )
    moved = tuple(
        LinkChange(what, window.ms(begin), window.ms(end))
        for what, begin, end in changes
        if window.begin <= begin <= window.end
    )
    up = flow(ends["mn"]["sent"], ends["srv"]["received"], window, interval_ms)
    down = flow(ends["srv"]["sent"], ends["mn"]["received"], window, interval_ms)
    stops = [0.0, *(span.end for span in steps if span.kind == "step")]
    stops += [arrow.received or arrow.sent for arrow in arrows] + [change.end for change in moved]
    stops += [one.first for one in (up, down) if one.first is not None]
    return TimeLine(window.name, window.begin, max(stops), steps, arrows, moved, up, down)


class Tracing:
    """What a lab that is `traced` notes beside its probe and its capture at the mobile node; else nothing.

    Between `start` and `stop` each handover is told by `asked` and `over`, and changes of links by `change`.
    """

    def __init__(self, lab: Lab, scenario: str) -> None:
        self._lab = lab
        self._scenario = scenario
        self._captures: dict[tuple[str, str], Capture] = {}
        self._held: dict[str, int] = {}
        self._started = self._asked = 0
        self._windows: list[Window] = []
        self._changes: list[tuple[str, int, int]] = []

    @property
    def running(self) -> bool:
        return bool(self._captures)

    def start(self) -> None:
        """Begins where the lab is traced. Raises CharonError where a capture does not begin."""
        if not self._lab.traced:
            return
        links = {"mn": ("eth0", "eth1"), "core": LINKS["mn"]}
        self._held = {name: self._delay(host, name) for host, names in links.items() for name in names}
        self._captures = {(host, "messages"): Capture(self._lab, host, "eth0") for host in GATEWAYS}
        for host, names in links.items():
            self._captures[host, "neighbours"] = Capture(self._lab, host, ",".join(names), "neighbours")
        for capture in self._captures.values():
            capture.start()
        self._started = time.time_ns()

    def _delay(self, host: str, interface: str) -> int:
        """Nanoseconds for which an interface holds a packet; 0 without netem."""
        words = ["tc", "-n", self._lab.net.namespace(host), "-j", "qdisc", "show", "dev", interface, "root"]
        found = json.loads(run(words).stdout or "[]")
        delays = [float(one["options"]["delay"]["delay"]) for one in found if one["kind"] == "netem"]
        return round(sum(delays) * 1e9)

    def asked(self) -> None:
        """A handover begins now."""
        self._asked = time.time_ns()

    def over(self, step: str) -> None:
        """A step of the scenario has ended: where it was a handover, that has ended, too."""
        began, self._asked = self._asked, 0
        if self.running and began:
            self._windows.append(Window(f"{self._scenario}: {step}", began, time.time_ns()))

    @contextlib.contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Around what changes a link of the mobile node's."""
        began = time.time_ns()
        yield
        self._changes.append((what, began, time.time_ns()))

    def stop(self, at_mobile: Notes, interval_ms: float) -> list[dict[str, Any]]:
        """A time line, as JSON, for each handover; without one, for all that was since `start`.

        The probe has been stopped. `at_mobile`: the capture there.
        """
        if not self.running:
            return []
        found = self.end()
        captures = {host: found[host, "messages"] for host in GATEWAYS}
        captures["mn"] = as_handed_over(at_mobile, self._held)
        solicits = {host: as_handed_over(found[host, "neighbours"], self._held) for host in ("mn", "core")}
        notes = {host: self._notes(host) for host in HOSTS}
        ends = {
            host: json.loads((self._lab.work / host / "probe-mn.json").read_text()) for host in ("mn", "srv")
        }
        now = time.time_ns()
        windows = self._windows or [Window(f"{self._scenario}: all of the traffic", self._started, now)]
        self._windows = []
        limits = [*(window.begin for window in windows[1:]), now]
        windows = [
            with_sequel(window, limit, notes, captures) for window, limit in zip(windows, limits, strict=True)
        ]
        return [
            time_line(window, notes, captures, solicits, self._changes, ends, interval_ms).as_json()
            for window in windows
        ]

    def end(self) -> dict[tuple[str, str], Notes]:
        """Ends all captures; what they noted. Raises what one of them raised, when all have ended."""
        found: dict[tuple[str, str], Notes] = {}

        def stop(what: tuple[str, str], capture: Capture) -> None:
            found[what] = capture.stop()

        captures, self._captures = self._captures, {}
        with contextlib.ExitStack() as stack:
            for what, capture in captures.items():
                stack.callback(stop, what, capture)
        return found

    def _notes(self, host: str) -> Notes:
        """An agent's lines. The last one may be half written where the agent was killed."""
        path = self._lab.work / host / TRACE
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]
