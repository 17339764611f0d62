"""A lab whose agents can tell what their CPU time goes into (`sampled`)."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from .config import PROGRAM, SAMPLES
from .hosts import Lab
from .net import GATEWAYS

PROFILE = "profile"
"""The word by which a program of the lab is asked for one."""


class ProfiledLab(Lab):
    """See the module."""

    def agent_program(self, host: str) -> list[str]:
        return ["env", f"{PROGRAM}={__package__}.sampled", f"{SAMPLES}={self._file(host)}"]

    def begin(self) -> None:
        """The gateways' agents are sampled from now on."""
        for host in GATEWAYS:
            self.started[host, "agent"].send_signal(signal.SIGUSR1)

    def end(self, count: int) -> dict[str, dict[str, float]]:
        """ms of CPU time for one of `count` SAs or moves, by host and part. Raises CharonError."""
        for host in GATEWAYS:
            self.started[host, "agent"].send_signal(signal.SIGUSR2)
        found = {}
        for host in GATEWAYS:
            self._wait_file(host, "agent", self._file(host))
            spent = json.loads(self._file(host).read_text())
            found[host] = {part: round(ms / count, 3) for part, ms in spent.items()}
        return found

    def _file(self, host: str) -> Path:
        return self.work / host / "samples.json"
