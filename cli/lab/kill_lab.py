"""`KillLab`: a lab whose agents stop at points (`stops`), and whose stores have small disks of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .config import PROGRAM, STOPS, Tunnel
from .hosts import Lab
from .kill_cases import ANY
from .net import HOSTS, run

DISK = "16m"
"""The size of a gateway's disk for its agent's store (tmpfs)."""
ROAMS = "charon-systemd { plugins { kernel-netlink { roam_events = yes } } }\n"
"""A mobile node that no new gateway takes goes on with its old one by itself (MOBIKE), as by default."""


@dataclass(slots=True)
class KillLab(Lab):
    """See the module."""

    def _write(self, tunnel: Tunnel, overrides: Mapping[str, str]) -> None:
        super(KillLab, self)._write(tunnel, overrides)
        (self.work / "mn" / "more.conf").write_text(ROAMS)

    def _prepare(self, host: str) -> None:
        """The files by which the agent of a host stops, and the disk of its store, where they are not yet."""
        folder = self.work / host / "stops"
        folder.mkdir(exist_ok=True)
        for name in ("stopped", "go"):
            with contextlib.suppress(FileExistsError):
                os.mkfifo(folder / name)
        state = self.work / host / "state"
        if not state.is_mount():
            state.mkdir(mode=0o700, exist_ok=True)
            run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=700", "lab", str(state)])

    def start_agent(self, host: str, *, wait: bool = True) -> None:
        self._prepare(host)
        (self.work / host / "ikectx.vici").unlink(missing_ok=True)  # of one that was killed
        super(KillLab, self).start_agent(host, wait=wait)

    def agent_program(self, host: str) -> list[str]:
        return ["env", f"{PROGRAM}={__package__}.stops", f"{STOPS}={self.work / host / 'stops'}"]

    def stop_daemons(self, hosts: Collection[str] = HOSTS) -> None:
        for host in hosts:
            for name in ("charon", "agent"):  # an agent that stands at a point hears nothing
                if (host, name) in self.started:
                    self.stop(host, name, kill=name == "agent")
                    self.flush(host)
            if (state := self.work / host / "state").is_mount():
                run(["umount", "-l", str(state)])
            shutil.rmtree(self.work / host / "stops", ignore_errors=True)
        super(KillLab, self).stop_daemons(hosts)
        for host in hosts:
            self.clean(host)

    def down(self) -> None:
        for host in HOSTS:
            if (state := self.work / host / "state").is_mount():
                run(["umount", "-l", str(state)], check=False)
        super(KillLab, self).down()

    def forget_vici(self, host: str) -> None:
        """The charon of that host is gone, and with it the connection to it."""
        if (client := self._vici.pop(host, None)) is not None:
            client.close()


class Stop:
    """One agent is to stop at a point, after it passed there so many times. `reached`: whether it did."""

    def __init__(self, lab: KillLab, host: str, point: str, passes: int = 0) -> None:
        self._folder = lab.work / host / "stops"
        self._point, self._passes = point, passes
        self._told = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self.reached = False

    def arm(self) -> None:
        """From now on it stops there."""
        self._thread.start()
        want = self._folder / "want.new"
        want.write_text(f"{self._point} {self._passes}")
        want.rename(self._folder / "want")

    def _listen(self) -> None:
        said = (self._folder / "stopped").read_text()
        self.reached = bool(said) and self._point in (said, ANY)
        self._told.set()

    def wait(self, seconds: float) -> bool:
        """Whether it stands there, after so many seconds at most."""
        self._told.wait(seconds)
        return self.reached

    def go_on(self) -> None:
        """An agent that stands there, and lives, goes on. If nobody stands there: nobody will."""
        try:
            (self._folder / "want").unlink()
        except FileNotFoundError:  # the agent has taken it, and says so at once if it lives
            self._told.wait(5)
        with contextlib.suppress(OSError):  # nobody waits for that
            os.close(os.open(self._folder / "go", os.O_WRONLY | os.O_NONBLOCK))
        if not self._told.is_set():
            with contextlib.suppress(OSError):
                os.close(os.open(self._folder / "stopped", os.O_WRONLY | os.O_NONBLOCK))
        self._thread.join(5)
