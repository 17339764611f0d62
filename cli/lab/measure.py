"""What a lab measures: traffic, IKE on the air, SAs and their keys, what gateways' agents tell of transfers.

Of traffic and IKE this is the arithmetic; `traffic` runs the programs whose files it is about.
Directions are those of the mobile node: `up` is MN to server, `down` server to MN.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import math
import socket
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vici

from vici_bridge.vici.client import as_text, json_of

from . import capture as lab_capture
from . import probe as lab_probe
from .hosts import Lab
from .net import GATEWAYS

INTERVAL_MS = 5.0
LATE_MS = 10.0
"""A packet that took so much longer than the fastest is late: a detour takes less, a queue more."""
ON_ITS_WAY = lab_probe.DRAIN / 2
"""Seconds that a datagram of the probe may take. Each end stops sending `DRAIN` before it stops listening, so
that everything counts where both stop at the same time."""


@dataclass(frozen=True, slots=True)
class Direction:
    """One direction of the probe. Times in ms.

    `refused` counts, by errno name, what the sender's kernel did not take; `in_flight` went out and never
    came. `longest_gap_ms` is the longest time between two arrivals that a punctual sender would have caused:
    the measured gap, less what the sender itself was late. `transit_ms`: the shortest time that one was under
    way; `late`: how many took `LATE_MS` more. `lost_at`: numbers and sending times (ns).
    """

    sent: int
    refused: Mapping[str, int]
    in_flight: int
    duplicates: int
    longest_gap_ms: float
    recovered: bool
    lost_at: Sequence[tuple[int, int]] = ()
    transit_ms: float = 0.0
    late: int = 0

    @property
    def lost(self) -> int:
        return sum(self.refused.values()) + self.in_flight


def direction(
    sent: Iterable[Sequence[int]],
    received: Iterable[Sequence[int]],
    interval_ms: float = INTERVAL_MS,
    ended_ns: int | None = None,
) -> Direction:
    """Compares what one end sent ([number, ns, errno]) with what the other received ([number, ns]).

    `ended_ns`: when the other heard nothing more. What was sent later than `ON_ITS_WAY` before that does not
    count: on a busy machine one end stops long after the other.
    """
    last = math.inf if ended_ns is None else ended_ns - ON_ITS_WAY * 1e9
    sends = {number: (stamp, error) for number, stamp, error in sent if stamp <= last}
    arrivals: dict[int, int] = {}
    duplicates = 0
    for number, stamp in received:
        if number in arrivals:
            duplicates += 1
        else:
            arrivals[number] = stamp
    refused = Counter(errno.errorcode.get(error, str(error)) for _stamp, error in sends.values() if error)
    lost_at = [(number, stamp) for number, (stamp, _error) in sorted(sends.items()) if number not in arrivals]
    in_order = sorted((number for number in arrivals if number in sends), key=lambda number: arrivals[number])
    longest = 0.0
    for one, two in itertools.pairwise(in_order):
        transit = [(arrivals[number] - sends[number][0]) / 1e6 for number in (one, two)]
        longest = max(longest, (two - one) * interval_ms + transit[1] - transit[0])
    tail = sorted(sends)[-1] if sends else -1
    # the last tenth of a second may still be under way when the receiver stops
    recovered = bool(arrivals) and max(arrivals) >= tail - 100 / interval_ms
    flying = len(lost_at) - sum(refused.values())
    ways = [arrivals[number] - sends[number][0] for number in in_order]
    shortest = min(ways, default=0)
    return Direction(
        len(sends),
        dict(sorted(refused.items())),
        max(0, flying),
        duplicates,
        round(longest, 1),
        recovered,
        lost_at,
        shortest / 1e6,
        sum(way > shortest + LATE_MS * 1e6 for way in ways),
    )


@dataclass(frozen=True, slots=True)
class Traffic:
    """Both directions of a probe run, and the kernel's own drop counters that moved meanwhile."""

    up: Direction
    down: Direction
    interval_ms: float = INTERVAL_MS
    counters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    mobile: str = "mn"

    @property
    def lost(self) -> int:
        return self.up.lost + self.down.lost

    @property
    def longest_gap_ms(self) -> float:
        return max(self.up.longest_gap_ms, self.down.longest_gap_ms)

    @property
    def recovered(self) -> bool:
        return self.up.recovered and self.down.recovered

    @property
    def gap_ms(self) -> dict[str, float]:
        """The longest gap in each direction."""
        return {"up": self.up.longest_gap_ms, "down": self.down.longest_gap_ms}

    @property
    def round_trip_ms(self) -> float:
        """The shortest way through the tunnel in one direction and in the other, together."""
        return round(self.up.transit_ms + self.down.transit_ms, 1)

    def as_json(self, since_ns: int = 0, link_ns: int = 0) -> dict[str, Any]:
        """The JSON of a report. With `since_ns`, each loss has its time in ms after that moment.

        `link_ns`: when the mobile node had its new link: losses of what was sent after that are counted.
        """
        both = {"up": self.up, "down": self.down}
        causes: Counter[str] = Counter()
        for name, one in both.items():
            for reason, count in one.refused.items():
                causes[f"{name}: {reason} at {self.mobile if name == 'up' else 'srv'}"] += count
            unknown = one.in_flight
            # the mobile node's own counters know why packets towards it ended there
            for counter, count in self.counters.get(self.mobile, {}).items() if name == "down" else ():
                if counter.startswith(("XfrmIn", "IpInAddr", "Ip6InAddr")) and unknown:
                    causes[f"down: {counter} at {self.mobile}"] = min(count, unknown)
                    unknown -= min(count, unknown)
            if unknown:
                causes[f"{name}: in flight"] += unknown
        result: dict[str, Any] = {
            "interval_ms": self.interval_ms,
            "sent": self.up.sent + self.down.sent,
            "lost": self.lost,
            "longest_gap_ms": self.longest_gap_ms,
            "gap_ms": self.gap_ms,
            "round_trip_ms": self.round_trip_ms,
            "recovered": self.recovered,
            "causes": dict(causes),
            "counters": {host: dict(moved) for host, moved in self.counters.items()},
        }
        for name, one in both.items():
            result[name] = {
                "sent": one.sent,
                "lost": one.lost,
                "not_sent": dict(one.refused),
                "lost_in_flight": one.in_flight,
                "duplicates": one.duplicates,
                "late": one.late,
                "longest_gap_ms": one.longest_gap_ms,
            }
            if link_ns:
                after = [stamp for _number, stamp in one.lost_at if stamp >= link_ns]
                result[name]["lost_after_link"] = len(after)
            if since_ns:
                shown = one.lost_at[:50]
                result[name]["lost_at_ms"] = [round((stamp - since_ns) / 1e6, 1) for _number, stamp in shown]
        return result


def dark(link: Traffic) -> dict[str, float] | None:
    """How long a mobile node's link carried nothing, by direction in ms, as a probe beside the tunnel found.

    That is its longest gap less its own interval, which is there on every link. None: it did not come back.
    """
    if not link.recovered:
        return None
    return {name: round(max(0.0, gap - link.interval_ms), 1) for name, gap in link.gap_ms.items()}


def air(notes: Iterable[Mapping[str, Any]], since_ns: int = 0) -> dict[str, Any]:
    """IKE and CXTP on the MN's links since a moment: datagrams, octets of their IP packets, count by kind."""
    seen = [note for note in notes if note["time"] >= since_ns]
    exchanges = Counter(
        lab_capture.CXTP.get(note["cxtp"], "CXTP ?")
        if "cxtp" in note
        else lab_capture.EXCHANGES.get(note["exchange"], str(note["exchange"]))
        for note in seen
    )
    return {
        "messages": len(seen),
        "octets": sum(note["octets"] for note in seen),
        "by_exchange": dict(sorted(exchanges.items())),
    }


_NO_SPI = "0x00000000"
"""Of what the kernel keeps while it asks for an SA that a policy wants, and that is not there."""


@dataclass(frozen=True, slots=True)
class MeasuredSa:
    """One ESP SA as `ip xfrm state` shows it; of its keys only a digest."""

    src: str
    dst: str
    spi: str
    mode: str
    keys: str


def kernel_sas(text: str, salt: bytes) -> list[MeasuredSa]:
    """Parses `ip xfrm state`. Keys are hashed at once, with a salt of the run, and kept nowhere."""
    found: list[MeasuredSa] = []
    src = dst = spi = mode = ""
    digest = hashlib.sha256(salt)
    for line in [*text.splitlines(), "src - dst -"]:
        words = line.split()
        if words[:1] == ["src"] and words[2:3] == ["dst"] and not line[:1].isspace():
            if spi and mode:
                found.append(MeasuredSa(src, dst, spi, mode, digest.hexdigest()[:16]))
            src, dst, spi, mode = words[1], words[3], "", ""
            digest = hashlib.sha256(salt)
        elif words[:1] == ["proto"]:
            spi = words[words.index("spi") + 1] if "spi" in words and words[1] == "esp" else ""
            spi = "" if spi == _NO_SPI else spi
            mode = words[words.index("mode") + 1] if "mode" in words else ""
        elif words[:1] and words[0] in ("aead", "enc", "auth", "auth-trunc"):
            digest.update(" ".join([words[0].removesuffix("-trunc"), *words[1:3]]).encode())
    return found


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The tunnel as one host sees it: SPIs of the IKE_SAs and of ESP, and a digest of each ESP SA's keys."""

    ike: frozenset[tuple[str, str]]
    esp: frozenset[str]
    keys: frozenset[tuple[str, str]]


def snapshot(lab: Lab, host: str, salt: bytes, mobile: str = "mn") -> Snapshot:
    """A host's SAs: IKE from its charon, ESP from its kernel (with libipsec from charon, without keys).

    Another daemon than charon tells nobody the SPIs of its IKE_SA.
    Where two mobile nodes take part, only those of the one are looked at.
    """
    sas = lab.list_sas(host, mobile if lab.tunnel.second and host in GATEWAYS else None)
    # just after a rekey the old IKE_SA is still listed
    ike = frozenset(
        (str(sa["initiator-spi"]), str(sa["responder-spi"]))
        for sa in sas
        if sa["state"] == "ESTABLISHED" and host not in lab.tunnel.others
    )
    children = [child for sa in sas for child in sa["child-sas"].values()]
    spis = frozenset(str(child[name]) for child in children for name in ("spi-in", "spi-out"))
    if lab.tunnel.libipsec:
        return Snapshot(ike, spis, frozenset())
    states = kernel_sas(lab.command(host, ["ip", "xfrm", "state"]).stdout, salt)
    if lab.tunnel.second:
        states = [sa for sa in states if sa.spi.removeprefix("0x") in spis]
    return Snapshot(ike, frozenset(sa.spi for sa in states), frozenset((sa.spi, sa.keys) for sa in states))


def drop_counters(lab: Lab) -> dict[str, dict[str, int]]:
    """Each charon's host: XFRM's drop counters, and packets for an address that was not there just then.

    Read through the process of the host's charon: programs take long to start on an emulated CPU.
    """
    return {host: parse_counters(_net_files(lab, host)) for host in lab.tunnel.hosts}


def _net_files(lab: Lab, host: str) -> str:
    process = lab.started.get((host, lab.tunnel.others.get(host, "charon")))
    if process is None:
        return ""
    paths = [Path(f"/proc/{process.pid}/net/{name}") for name in ("xfrm_stat", "snmp", "snmp6")]
    try:
        return "".join(path.read_text() for path in paths if path.exists())
    except OSError:
        return ""


def parse_counters(text: str) -> dict[str, int]:
    """`NAME VALUE` lines of xfrm_stat and snmp6, and snmp's pairs of lines; only what tells of drops."""
    found: dict[str, int] = {}
    head: list[str] = []
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["Ip:"]:
            if head:
                pairs = zip(head[1:], words[1:], strict=False)
                found.update((f"Ip{name}", int(value)) for name, value in pairs if name == "InAddrErrors")
            head = words
        elif len(words) == 2 and (words[0].startswith("Xfrm") or words[0] == "Ip6InAddrErrors"):
            found[words[0]] = int(words[1])
    return found


def moved(
    before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """The counters that grew, by host."""
    result = {}
    for host, counters in after.items():
        grown = {
            n: v - before.get(host, {}).get(n, 0)
            for n, v in counters.items()
            if v > before.get(host, {}).get(n, 0)
        }
        if grown:
            result[host] = grown
    return result


class Reports:
    """What a gateway's agent tells of transfers that end there, from `start` to `stop`."""

    def __init__(self, lab: Lab, host: str) -> None:
        self._path = str(lab.work / host / "ikectx.vici")
        self._ready, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self.found: list[dict[str, Any]] = []
        self.states: list[str] = []
        """Each state that a transfer had there."""

    def start(self) -> None:
        self._thread.start()
        self._ready.wait(10)

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _listen(self) -> None:
        # an agent that is killed ends it
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self._path)
            for kind, message in vici.Session(sock).listen(["transfer-state"], timeout=0.2):
                self._ready.set()
                if self._stopping.is_set():
                    return
                told = json_of(as_text(message)) if kind is not None else {}
                if told.get("phase"):
                    self.states.append(told["phase"])
                if told.get("report"):
                    self.found.append(told["report"])
