"""What a fault of `kill_cases.FAULTS` does to a lab, and how it ends."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from pathlib import Path

from ikectx.errors import IkectxError

from . import store_cut
from .kill_cases import ANY, FAULTS, Case
from .kill_lab import KillLab, Stop
from .net import GATEWAYS, LINKS, MOBILES

_LINKS = {**LINKS, "all": tuple(link for host in GATEWAYS for link in LINKS[host])}
FILLED = "fill"
"""The file that takes the rest of a disk."""
AGAIN = 2
"""How often an agent is killed while it recovers."""
RECOVERY, RECOVERED = 24, 15.0
"""Points of a recovery, before one of which an agent is killed; and seconds in which it must come there."""


class FaultyLab:
    """A lab in which one fault happens, lasts and ends. `down`: the daemons that do not run meanwhile."""

    def __init__(self, lab: KillLab, case: Case) -> None:
        self._lab, self._case = lab, case
        self._fault = FAULTS[case.fault]
        self._scripts: dict[Path, str] = {}

    @property
    def down(self) -> set[tuple[str, str]]:
        """Daemons that a fault of this kind ends, by host and name."""
        names = {"agent": ("agent",), "loop": ("agent",), "charon": ("charon",), "power": ("agent", "charon")}
        return {(host, name) for host in self._fault.hosts for name in names.get(self._fault.kind, ())}

    def strike(self) -> None:
        """It happens now. Raises KernelError."""
        getattr(self, f"_strike_{self._fault.kind}")()

    def end(self) -> None:
        """It is over: what was killed starts anew. Raises IkectxError where something does not start."""
        getattr(self, f"_end_{self._fault.kind}")()

    def _kill(self) -> None:
        for host, name in self.down:
            self._lab.stop(host, name, kill=True)
            if name == "charon":
                self._lab.forget_vici(host)

    def _start(self) -> None:
        order = sorted(
            self.down, key=lambda one: (one[1], GATEWAYS.index(one[0]) if one[0] in GATEWAYS else 2)
        )
        for host, name in reversed(order) if self._case.reverse else order:
            if name == "agent":
                self._lab.start_agent(host)
            else:
                self._lab.start_charon(host)

    def _strike_agent(self) -> None:
        self._kill()

    _strike_charon = _strike_loop = _strike_agent

    def _end_agent(self) -> None:
        self._start()

    _end_charon = _end_agent

    def _end_loop(self) -> None:
        """The agent is killed at some point of its recovery, twice, if it comes to so many points."""
        (host,) = self._fault.hosts
        draw = random.Random(self._case.name)  # noqa: S311  no secret
        for _ in range(AGAIN):
            stop = Stop(self._lab, host, ANY, draw.randrange(RECOVERY))
            stop.arm()
            try:
                self._lab.start_agent(host, wait=False)
                if not stop.wait(RECOVERED):
                    self._lab.wait_agent(host)
                    return
                self._lab.stop(host, "agent", kill=True)
            finally:
                stop.go_on()
        self._lab.start_agent(host)

    def _strike_power(self) -> None:
        (host,) = self._fault.hosts
        self._lab.net.silence(host)
        self._kill()
        self._lab.flush(host)
        state, stops = self._lab.work / host / "state", self._lab.work / host / "stops"
        for memory in (state / "state.db-shm", self._lab.work / host / "ikectx.mark"):
            memory.unlink(missing_ok=True)
        synced = ("", 0)
        with contextlib.suppress(FileNotFoundError, ValueError):
            salt, _, end = (stops / "synced").read_text().partition(" ")
            synced = (salt, int(end))
        draw = random.Random(self._case.name)  # noqa: S311  no secret
        store_cut.cut(state / "state.db-wal", synced, draw)

    def _end_power(self) -> None:
        (host,) = self._fault.hosts
        self._start()
        self._lab.net.hear(host)

    def _strike_cut(self) -> None:
        one, other, ways = self._fault.hosts
        self._lab.net.drop(_LINKS[one], _LINKS[other], both=ways == "both")

    def _end_cut(self) -> None:
        self._lab.net.let_pass()

    def _strike_disk(self) -> None:
        (host,) = self._fault.hosts
        with contextlib.suppress(OSError), (self._lab.work / host / "state" / FILLED).open("wb", 0) as file:
            while True:
                file.write(bytes(4096))

    def _end_disk(self) -> None:
        (host,) = self._fault.hosts
        (self._lab.work / host / "state" / FILLED).unlink()

    def _strike_script(self) -> None:
        (host,) = self._fault.hosts
        path = self._lab.work / host / "updown"
        self._scripts[path] = path.read_text()
        _replace(path, "#!/bin/sh\nexec sleep 600\n")

    def _end_script(self) -> None:
        for path, text in self._scripts.items():
            _replace(path, text)

    def _strike_hang(self) -> None:
        self._signal(signal.SIGSTOP)

    def _end_hang(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for host in self._fault.hosts:
            os.kill(self._lab.started[host, "charon"].pid, number)

    def abandon(self) -> None:
        """Ends what may still last, for a case that has failed. Never raises."""
        with contextlib.suppress(IkectxError, OSError, KeyError):
            for host in GATEWAYS:
                self._lab.net.hear(host)
                (self._lab.work / host / "state" / FILLED).unlink(missing_ok=True)
        with contextlib.suppress(IkectxError, OSError, KeyError):
            self._lab.net.let_pass()
        with contextlib.suppress(IkectxError, OSError, KeyError):
            self._end_script()
        for host in (*GATEWAYS, *MOBILES):
            with contextlib.suppress(OSError, KeyError):
                os.kill(self._lab.started[host, "charon"].pid, signal.SIGCONT)


def _replace(path: Path, text: str) -> None:
    """At once, since a script may be running."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.chmod(0o755)
    fresh.rename(path)
