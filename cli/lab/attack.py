"""Attacks a lab's gateways, and measures what the attack costs them and the mobile node.

    python -m ikectx_cli.lab.attack RESULT KIND RATE SECONDS ESP

is one such run on this machine, which a guest does for `ikectx lab bench --attack`; its JSON goes to RESULT.

In one run: transfers and the mobile node's own handovers beside no attack; the same beside it, until its time
is over; a while in which what it took can be given back; and transfers and handovers again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ikectx.errors import CharonError, IkectxError
from vici_bridge.vici.client import json_of

from . import attacker as lab_attacker
from . import guest as lab_guest
from .boot import code
from .config import Tunnel
from .damage import HOSTS, KINDS, Sample, report
from .hosts import Lab, idle
from .net import OUTER, PREFIX
from .usage import circumstances, cpu, resident_kib

ROUNDS = 3
"""Transfers, and handovers, before the attack and again after it; beside it at least as many."""
GIVEN_BACK = 45.0
"""Seconds after the attack in which what it took is to be given back."""
EVERY = 0.2
"""Seconds between two looks at the agents."""
SETTLED = 60.0
"""Seconds in which the mobile node and the new gateway must agree about all SAs."""
PATIENCE = 120.0
"""Seconds for one transfer or handover."""
MEMORY_MIB = 2048

Say = Callable[[str], None]


def run(kind: str, rate: float, seconds: float, guest: str, *, libipsec: bool, say: Say) -> dict[str, Any]:
    """`siege` in a guest of `lab_guest.WAYS` (or auto), and on what machine that was. Raises IkectxError.

    ESP in user space needs no other kernel than this machine's.
    """
    words = [kind, str(rate), str(seconds), "libipsec" if libipsec else "kernel"]
    found = lab_guest.result(
        __spec__.name, words, guest, "real", libipsec=libipsec, memory_mib=MEMORY_MIB, say=say
    )
    return {**found, "code": code()}


def siege(kind: str, rate: float, seconds: float, *, libipsec: bool, say: Say) -> dict[str, Any]:
    """One attack on a lab of this machine. Raises IkectxError when the lab does not come up."""
    lab = Lab.new()
    try:
        say("network and daemons")
        lab.up(Tunnel(libipsec=libipsec, mobile=True, rogue=True))
        for address in lab_attacker.sources()[1:]:
            lab.command("mn2", ["ip", "addr", "add", f"{address}/{PREFIX[4]}", "dev", "eth0"])
        lab.connect()
        return Siege(lab, say).run(kind, rate, seconds)
    finally:
        lab.down()


class Siege:
    """One run on a lab whose tunnel is up at psg."""

    def __init__(self, lab: Lab, say: Say) -> None:
        self._lab = lab
        self._say = say
        self._owner = "psg"
        empty = {name: {"ms": list[float](), "failed": list[str]()} for name in ("none", "beside")}
        self.moves: dict[str, dict[str, dict[str, list[Any]]]] = {
            name: {which: {"ms": [], "failed": []} for which in empty} for name in ("transfer", "handover")
        }

    def run(self, kind: str, rate: float, seconds: float) -> dict[str, Any]:
        lab = self._lab
        self._settle("psg", set())
        self._say("beside no attack")
        self._rounds("none")
        with AttackWatch(lab) as watch:
            order = lab_attacker.Order(kind, rate, seconds, str(lab.work), self._spis(), KINDS[kind].most)
            self._say(f"attack: {KINDS[kind].what}, {rate:g} a second for {seconds:g} s")
            with self._attacking(order) as attacker:
                watch.ask(beside=True)
                end = time.monotonic() + seconds
                self._rounds("beside")
                while time.monotonic() < end - 1 and attacker.poll() is None:
                    self._round("beside")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    attacker.wait(max(0.0, end + 5 - time.monotonic()))
            sent = self._told()
            watch.ask(beside=False)
            self._say("after it")
            time.sleep(GIVEN_BACK)
            samples = watch.samples
        self._rounds("none")
        asked = {"rate": rate, "seconds": seconds}
        return report(kind, asked, sent, self.moves, samples, watch.answers_ms, circumstances(lab))

    def _spis(self) -> tuple[str, str]:
        (sa,) = self._lab.list_sas("mn")
        return str(sa["initiator-spi"]), str(sa["responder-spi"])

    @contextlib.contextmanager
    def _attacking(self, order: lab_attacker.Order) -> Iterator[subprocess.Popen[bytes]]:
        process = self._lab.spawn("mn2", "attacker", lab_attacker.words(order))
        try:
            time.sleep(2)
            yield process
        finally:
            self._lab.stop("mn2", "attacker")

    def _told(self) -> dict[str, Any]:
        text = (self._lab.work / "mn2" / "attacker.out").read_text(errors="replace").strip()
        try:
            told: dict[str, Any] = json.loads(text.splitlines()[-1])
        except (ValueError, IndexError):
            raise CharonError(f"the attacker: {text[-600:] or 'it said nothing'}") from None
        return told

    # -- moves ------------------------------------------------------------------------------------------

    def _rounds(self, which: str) -> None:
        for _ in range(ROUNDS):
            self._round(which)

    def _round(self, which: str) -> None:
        """A transfer, and a handover back."""
        self._move("transfer", which, self._transfer)
        self._move("handover", which, self._handover)

    def _move(self, name: str, which: str, move: Callable[[str, str], str]) -> None:
        source, target = self._owner, "nsg" if self._owner == "psg" else "psg"
        before, began = self._children(), time.monotonic()
        try:
            wrong = move(source, target)
        except IkectxError as error:
            wrong = str(error)
        took = (time.monotonic() - began) * 1000
        found = self.moves[name][which]
        if wrong:
            found["failed"].append(f"after {took / 1000:.1f} s: {' '.join(wrong.split())}")
            self._say(f"{name} to {target} {which}: {wrong}")
        else:
            found["ms"].append(round(took, 1))
        self._settle("" if wrong else target, before)

    def _transfer(self, source: str, target: str) -> str:
        """Asked of the agent as by `ikectx transfer`; the reason where it failed."""
        with self._lab.agent(source, PATIENCE) as agent:
            answer = json_of(agent.stream("transfer", "transfer-progress", {"to": target}))
        reports = answer.get("reports", [])
        failed = [one for one in reports if int(one.get("exit_code", 1))]
        wrong = [f"{one['status']['name']}: {one['text']}" for one in failed]
        return "; ".join(wrong) if reports else str(answer)

    def _handover(self, _source: str, target: str) -> str:
        """The mobile node is elsewhere, and asks the other gateway for its SA; the reason where it failed."""
        self._lab.net.relocate()
        with self._lab.agent("mn", PATIENCE) as agent:
            query = {"to": target, "what": "arrive"}
            told = json_of(agent.stream("handover", "handover-progress", query))
        return f"{told['result']}: {told['detail']}" if told["exit_code"] else ""

    def _children(self) -> set[str]:
        sas = self._lab.list_sas("mn")
        return {child["spi-in"] for sa in sas for child in sa["child-sas"].values()}

    def _settle(self, target: str, before: set[str]) -> None:
        """Until the two ends of the SA agree; where they do not any more, the mobile node connects anew."""
        limit = time.monotonic() + SETTLED
        while time.monotonic() < limit:
            for owner in [target] if target else HOSTS:
                if self._agree(owner, before if target else set()):
                    self._owner = owner
                    return
            time.sleep(0.05)
        self._say("the ends of the SA do not agree: the mobile node connects anew")
        for one in ("mn", *HOSTS):
            self._lab.forget(one)
        self._lab.connect()
        self._owner = "psg"

    def _agree(self, owner: str, before: set[str]) -> bool:
        """Only that gateway and the mobile node have the SA, with the same children, and nothing under way.

        `before`: the mobile node's children before it moved, which user-space ESP makes it rekey.
        """
        other = "nsg" if owner == "psg" else "psg"
        here, mobile = self._lab.list_sas(owner), self._lab.list_sas("mn")
        if len(here) != 1 or len(mobile) != 1 or self._lab.list_sas(other):
            return False
        if not all(map(idle, (*here, *mobile))):
            return False
        ends = [
            {(child[one], child[two]) for sa in sas for child in sa["child-sas"].values()}
            for sas, one, two in ((here, "spi-in", "spi-out"), (mobile, "spi-out", "spi-in"))
        ]
        now = self._children()
        renewed = not self._lab.tunnel.libipsec or not now & before
        return (
            ends[0] == ends[1] and len(now) == 1 and renewed and mobile[0]["remote-host"] == OUTER[owner][4]
        )


class AttackWatch:
    """Looks at the gateways' agents all the time, and asks them for their status once a second."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._ended = threading.Event()
        self._beside = False
        self._threads = [threading.Thread(target=self._look, daemon=True)]
        self._threads += [threading.Thread(target=self._ask, args=(host,), daemon=True) for host in HOSTS]
        self.samples: dict[str, list[Sample]] = {host: [] for host in HOSTS}
        self.answers_ms: list[float] = []

    def __enter__(self) -> AttackWatch:
        for thread in self._threads:
            thread.start()
        time.sleep(2 * EVERY)
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def ask(self, *, beside: bool) -> None:
        """From now on status is asked for `beside` the attack, or not at all."""
        self._beside = beside

    def _look(self) -> None:
        while not self._ended.is_set():
            for host in HOSTS:
                if (found := sample(self._lab, host)) is not None:
                    self.samples[host].append(found)
            self._ended.wait(EVERY)

    def _ask(self, host: str) -> None:
        while not self._ended.wait(1.0):
            if not self._beside:
                continue
            began = time.monotonic()
            try:
                with self._lab.agent(host, 30.0) as agent:
                    agent.request("status")
            except IkectxError:
                self.answers_ms.append(math.inf)
            else:
                self.answers_ms.append((time.monotonic() - began) * 1000)


def sample(lab: Lab, host: str) -> Sample | None:
    """The agent of a host now; None where it does not run."""
    used = cpu(lab).get(host)
    if used is None:
        return None
    pid, spent = used
    proc, folder = Path(f"/proc/{pid}"), lab.work / host
    try:
        memory = resident_kib((proc / "status").read_text()) << 10
        descriptors = len(os.listdir(proc / "fd"))
        log = (folder / "agent.out").stat().st_size
    except OSError:
        return None
    return Sample(memory, descriptors, log, size(folder / "state"), spent / 1e9)


def size(folder: Path) -> int:
    """Octets of all files of a folder; files come and go meanwhile."""
    found = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            found += path.lstat().st_size
    return found


def main(kind: str, rate: str, seconds: str, esp: str) -> dict[str, Any]:
    """`siege`, from the words of a command line."""
    libipsec = esp == "libipsec"
    return siege(
        kind, float(rate), float(seconds), libipsec=libipsec, say=lambda line: print(line, flush=True)
    )


if __name__ == "__main__":
    sys.exit(lab_guest.program(main))
