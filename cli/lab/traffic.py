"""Traffic in a lab: datagrams through a mobile node's tunnel and beside it, IKE and CXTP on its links.

`probe`, `capture` and `clear` are the programs that this runs on the hosts; `measure` has the
arithmetic.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ikectx.errors import CharonError, IkectxError

from . import capture as lab_capture
from . import clear as lab_clear
from . import probe as lab_probe
from .daemons import realtime_works
from .hosts import Lab
from .measure import INTERVAL_MS, Traffic, direction, drop_counters, moved
from .net import AWAY, GATEWAYS, INNER, LAN_MAC, OUTER

PROBE_PORT = {"mn": 7007, "mn2": 7008, "link": 7009}
"""Of the probe with that mobile node, at both ends; `link`: of the one outside of the tunnel."""

COARSE_MS = 50.0
"""Milliseconds between datagrams of a mobile node that stays where it is: it needs no fine measure."""

Paths = Mapping[str, Sequence[tuple[str, str]]]
"""By host: the pairs of addresses (here, there) between which it sends."""


def inner_paths(lab: Lab, mobile: str) -> Paths:
    """Through the tunnel, between a mobile node's inner address and the server."""
    near, far = INNER[mobile][lab.tunnel.inner], INNER["srv"][lab.tunnel.inner]
    return {mobile: [(near, far)], "srv": [(far, near)]}


def link_paths(lab: Lab) -> Paths:
    """Outside of the tunnel, between the mobile node's outer addresses in both access networks and nsg.

    No policy of the tunnel covers outer addresses, so that this is the link alone, in clear.
    """
    version = lab.tunnel.family
    far, places = OUTER["nsg"][version], (OUTER["mn"][version], AWAY[version])
    return {"mn": [(place, far) for place in places], "nsg": [(far, place) for place in places]}


class Probe:
    """Numbered UDP datagrams in both directions between a mobile node and a host, from `start` to `stop`.

    `paths`: the mobile node's, then the other host's. `counters`: note drop counters, too.
    """

    def __init__(
        self, lab: Lab, paths: Paths, name: str, interval_ms: float = INTERVAL_MS, *, counters: bool = False
    ) -> None:
        self._lab = lab
        self._paths = paths
        self._mobile, self._far = paths
        self._port = PROBE_PORT[name]
        self.interval_ms = interval_ms
        self._name = f"probe-{name}"
        self._counters = counters
        self._before: dict[str, dict[str, int]] = {}

    def launch(self) -> None:
        """Prepares both ends; they wait for `begin`."""
        lab = self._lab
        self._before = drop_counters(lab) if self._counters else {}
        # punctual also on a busy CPU: a late sender would send a burst, and lose or save it whole
        first = ["chrt", "-f", "2"] if realtime_works() else []
        for host, paths in self._paths.items():
            ways = ",".join(f"{here}>{there}" for here, there in paths)
            words = [str(self._port), str(self.interval_ms), ways, str(self._file(host))]
            _ask(lab, host, self._name, [*first, sys.executable, "-I", "-S", lab_probe.__file__], words)

    def begin(self) -> None:
        """Returns when both ends send. Raises CharonError when one does not come up."""
        for host in self._paths:
            _await(self._lab, host, self._name, Path(f"{self._file(host)}.ready"))
        for host in self._paths:
            self._lab.started[host, self._name].send_signal(signal.SIGUSR1)
        for host in self._paths:
            _await(self._lab, host, self._name, Path(f"{self._file(host)}.ready"), there=False)

    def stop(self) -> Traffic:
        """Ends sending at both ends, lets the last ones arrive, and compares."""
        for host in self._paths:
            self._lab.started[host, self._name].terminate()
        ends = {}
        for host in self._paths:
            _await(self._lab, host, self._name, self._file(host))
            ends[host] = json.loads(self._file(host).read_text())
        near, far = ends[self._mobile], ends[self._far]
        up = direction(near["sent"], far["received"], self.interval_ms, far["ended"])
        down = direction(far["sent"], near["received"], self.interval_ms, near["ended"])
        counters = moved(self._before, drop_counters(self._lab)) if self._before else {}
        return Traffic(up, down, self.interval_ms, counters, self._mobile)

    def _file(self, host: str) -> Path:
        return self._lab.work / host / f"{self._name}.json"


class Capture:
    """The IKE and CXTP messages on a host's links, both directions; by default the mobile node's access.

    `kind` neighbours: instead who asks there for whose link address (ARP, neighbour discovery).
    """

    def __init__(
        self, lab: Lab, host: str = "mn", interfaces: str = "eth0,eth1", kind: str = "messages"
    ) -> None:
        self._lab = lab
        self._host = host
        self._name = "capture" if kind == "messages" else f"capture-{kind}"
        self._words = [kind, interfaces, str(lab.work / host / f"{self._name}.json")]
        self._output = Path(self._words[-1])

    def start(self) -> None:
        argv = [sys.executable, "-I", "-S", lab_capture.__file__]
        _ask(self._lab, self._host, self._name, argv, self._words)
        _await(self._lab, self._host, self._name, Path(f"{self._output}.ready"))

    def stop(self) -> list[dict[str, Any]]:
        """Everything noted since `start`."""
        self._lab.started[self._host, self._name].terminate()
        _await(self._lab, self._host, self._name, self._output)
        notes: list[dict[str, Any]] = json.loads(self._output.read_text())
        return notes


class Clear:
    """Packets for the mobile nodes' inner addresses that leave the gateways in the clear, see `lab_clear`."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def start(self) -> None:
        """Returns when both gateways are watched. Raises CharonError when one cannot be."""
        argv = [sys.executable, "-I", "-S", lab_clear.__file__]
        for host, other in (GATEWAYS, GATEWAYS[::-1]):
            words = [LAN_MAC[other], self._lab.tunnel.mode, str(self._file(host))]
            _ask(self._lab, host, "clear", argv, words)
        for host in GATEWAYS:
            _await(self._lab, host, "clear", Path(f"{self._file(host)}.ready"))

    def stop(self) -> dict[str, list[dict[str, Any]]]:
        """What left each gateway since `start`, as `lab_clear.told`."""
        for host in GATEWAYS:
            self._lab.started[host, "clear"].terminate()
        for host in GATEWAYS:
            _await(self._lab, host, "clear", self._file(host))
        return {host: json.loads(self._file(host).read_text()) for host in GATEWAYS}

    def _file(self, host: str) -> Path:
        return self._lab.work / host / "clear.json"


class TrafficWatch:
    """Everything that is measured of traffic at one time, from `start` to `stop`."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._probes: dict[str, Probe] = {}
        self._capture = Capture(lab)

    def start(self, mobiles: Iterable[str], interval_ms: float) -> None:
        """Returns when there is traffic of these mobile nodes. Raises CharonError when none comes up."""
        for name in mobiles:
            interval, paths = interval_ms, inner_paths(self._lab, name)
            if name != "mn":
                interval = max(interval, COARSE_MS)
            self._probes[name] = Probe(self._lab, paths, name, interval, counters=name == "mn")
        for probe in self._probes.values():
            probe.launch()
        self._capture.start()
        for probe in self._probes.values():
            probe.begin()

    def stop(self) -> tuple[dict[str, Traffic], list[dict[str, Any]]]:
        """What became of each mobile node's traffic, and what the capture noted."""
        traffic = {name: probe.stop() for name, probe in self._probes.items()}
        return traffic, self._capture.stop()

    def abandon(self) -> None:
        """Ends what runs, as far as it does, for a scenario that has failed. Never raises."""
        every: list[Probe | Capture] = [*self._probes.values(), self._capture]
        for one in every:
            try:
                one.stop()
            except (IkectxError, OSError, KeyError, ValueError):
                continue


def _ask(lab: Lab, host: str, name: str, argv: Sequence[str], words: Sequence[str]) -> None:
    """Has a tool on a host begin a run: the one that is there or a new one. The last word is its output."""
    for old in (Path(words[-1]), Path(f"{words[-1]}.ready")):
        old.unlink(missing_ok=True)
    process = lab.started.get((host, name))
    if process is None or process.poll() is not None:
        process = lab.spawn(host, name, argv, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(" ".join(words).encode() + b"\n")
    process.stdin.flush()


def _await(lab: Lab, host: str, name: str, path: Path, *, there: bool = True) -> None:
    """Waits until a tool has made the file, or taken it away. Raises CharonError."""
    limit = time.monotonic() + 60
    while path.exists() is not there:
        if lab.started[host, name].poll() is not None or time.monotonic() > limit:
            log = (lab.work / host / f"{name}.out").read_text(errors="replace").strip()[-300:]
            way = "to" if there else "beyond"
            raise CharonError(
                f"{host}: the {name} did not come {way} {path.name}: {log or 'it said nothing'}"
            )
        time.sleep(0.02)
