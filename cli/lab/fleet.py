"""Many mobile nodes, all of them in the charon of one host: each has an outer address of its own there.

CXTP names a mobile node by that address, so those of different ones move at once.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from ikectx.errors import CharonError
from vici_bridge.vici.client import json_of

from .hosts import Lab
from .net import CHARONS, GATEWAYS, INNER, INNER_NET, OUTER

_FIRST = {"outer": ip_address("10.32.0.0"), "inner": ip_address("10.48.0.0")}
_PREFIX = 16
MOST = 20_000
"""Mobile nodes for which there are addresses, and memory on an ordinary machine."""
SEGMENTS = 16
"""Of the HA plugins of charons with many SAs: one that moves makes only those of its segment passive."""
_AT_ONCE = 16
"""Set-ups at a time: charon asks for cookies when more than 30 are half-open."""
_TOLD_AT_ONCE = 50
"""Changes of addresses that charon's netlink socket can hold; of a thousand at once it hears some 270."""
_PATIENCE = 60.0
"""Seconds in which the next few of them must be up or gone."""
_LONG = 1800.0
"""Seconds for a command about all of them."""

_EVERYWHERE = """charon-systemd {
  ikesa_table_size = 4096
  ikesa_table_segments = 16
  filelog { log { ike = 1
    knl = 1 } }
}
"""
"""charon's default is one list of all IKE_SAs. Its own level of the log: that of the lab's scenarios takes a
tenth of its time."""
_NO_ROUTES = """charon-systemd {
  install_routes = no
}
"""
"""As soon as charon installs routes, each look for a source address reads all addresses and routes, of which
there are some for each SA. ESP in user space needs them at the gateways."""
_MOBILE = """charon-systemd {
  plugins { kernel-netlink { roam_events = no } }
}
"""
"""Whenever an address comes, a roaming charon looks for a source address for each of its SAs."""


def prepare(lab: Lab, *mobiles: str, libipsec: bool = False) -> None:
    """Before a lab comes up: its charons are to have thousands of SAs, those of `mobiles` many addresses. The
    gateways' have what `examples/config/many-sas.conf` says."""
    for host in {*CHARONS, *mobiles}:
        folder = lab.work / host
        folder.mkdir(exist_ok=True)
        routeless = host in mobiles or (host in GATEWAYS and not libipsec)
        text = _EVERYWHERE + (_NO_ROUTES if routeless else "") + (_MOBILE if host in mobiles else "")
        (folder / "more-sas.conf").write_text(text)


@dataclass(frozen=True, slots=True)
class Fleet:
    """`size` mobile nodes, named by their numbers, in the charon of `host`, served by `gateway`.

    `first`: where their addresses begin. Methods raise CharonError when something does not come.
    """

    lab: Lab
    size: int
    host: str = "mn"
    gateway: str = "psg"
    first: int = 0

    def outer(self, number: int) -> str:
        return str(_FIRST["outer"] + self.first + number + 1)

    def inner(self, number: int) -> str:
        """The virtual IP."""
        return str(_FIRST["inner"] + self.first + number + 1)

    def identity(self, number: int) -> str:
        return f"n{self.first + number}.example"

    @contextmanager
    def connected(self) -> Iterator[Fleet]:
        """Their addresses are there, and each has an IKE_SA with a CHILD_SA; in the end nothing is."""
        routes = [
            ("core", f"{_FIRST['outer']}/{_PREFIX}", OUTER[self.host][4]),
            ("srv", f"{_FIRST['inner']}/{_PREFIX}", INNER[self.gateway][4]),
        ]
        for host, net, way in routes:
            self._must(host, "ip", "route", "replace", net, "via", way)
        self._addresses("add")
        try:
            self._connect()
            yield self
        finally:
            self._forget()
            self._addresses("del")
            for host, net, way in routes:
                self.lab.command(host, ["ip", "route", "del", net, "via", way])

    def _must(self, host: str, *argv: str) -> None:
        done = self.lab.command(host, argv)
        if done.returncode != 0:
            raise CharonError(f"{host}: {' '.join(argv)}: {(done.stdout + done.stderr).strip()[-600:]}")

    def _until(self, true: Callable[[], object], what: str) -> None:
        limit = time.monotonic() + _PATIENCE
        while not true():
            if time.monotonic() > limit:
                raise CharonError(f"not within {_PATIENCE:.0f} s: {what}")
            time.sleep(0.05)

    def _addresses(self, verb: str) -> None:
        folder = self.lab.work / self.host
        batch, log = folder / "fleet.batch", folder / "charon.log"
        word = {"add": "appeared on", "del": "disappeared from"}[verb]
        for first in range(0, self.size, _TOLD_AT_ONCE):
            numbers = range(first, min(first + _TOLD_AT_ONCE, self.size))
            batch.write_text("".join(f"address {verb} {self.outer(one)}/32 dev eth0\n" for one in numbers))
            seen = log.stat().st_size
            self._must(self.host, "ip", "-batch", str(batch))
            last = f"{self.outer(numbers[-1])} {word} eth0".encode()

            def heard(last: bytes = last, seen: int = seen) -> bool:
                with log.open("rb") as file:
                    file.seek(seen)
                    return last in file.read()

            self._until(heard, f"{self.host}'s charon has heard: {last.decode()}")

    def _connect(self) -> None:
        gateway = f"pools {{ inner {{ addrs = {_FIRST['inner']}/{_PREFIX} }} }}\n"
        gateway += f"connections {{ {self.host} {{ pools = inner\n remote {{ id = %any }} }} }}\n"
        sections = "\n".join(map(self._connection, range(self.size)))
        mobile = "connections {\n" + sections + "\n}\n"
        self.lab.reload(self.lab.tunnel, {self.host: mobile, "psg": gateway, "nsg": gateway})
        charon, before = self.lab.vici(self.host), self._up()
        for first in range(0, self.size, _AT_ONCE):
            last = min(first + _AT_ONCE, self.size)
            for number in range(first, last):
                # not waited for: each that waits has one of charon's sixteen threads
                charon.request(
                    "initiate", {"ike": f"n{self.first + number}", "child": "net", "timeout": "-1"}
                )
            self._until(lambda last=last: self._up() == before + last, f"{last} are up")  # type: ignore[misc]
        if self.gateway in self.lab.agent_hosts:
            # it hears of them when charon has them up
            self._until(lambda: self._known() == before + self.size, f"the agent knows {self.size}")

    def _connection(self, number: int) -> str:
        return f"""  n{self.first + number} {{
    version = 2
    proposals = aes128gcm16-prfsha256-x25519
    remote_addrs = {OUTER[self.gateway][4]}
    local_addrs = {self.outer(number)}
    vips = {self.inner(number)}
    local {{ auth = psk
      id = {self.identity(number)} }}
    remote {{ auth = psk
      id = {self.gateway}.example }}
    children {{ net {{ remote_ts = {INNER_NET[4]}
      esp_proposals = aes128gcm16 }} }}
  }}"""

    def _up(self) -> int:
        told = self.lab.vici(self.gateway).stats()["ikesas"]
        return int(told["total"]) - int(told["half-open"])

    def _known(self) -> int:
        with self.lab.agent(self.gateway, _PATIENCE) as agent:
            return int(json_of(agent.request("status"))["sas"])

    def _forget(self) -> None:
        """The host's charon drops them at once, whatever the other side answers."""
        charon = self.lab.vici(self.host)
        for sa in self.lab.list_sas(self.host):
            with contextlib.suppress(CharonError):
                charon.request("terminate", {"ike-id": sa["uniqueid"], "force": "yes", "timeout": "-1"})
        self._until(lambda: not self.lab.list_sas(self.host), f"{self.host} has no SA")

    def move(self, source: str, to: str) -> list[dict[str, Any]]:
        """`ikectx transfer --all`, and its reports: every SA must move."""
        words = ["ikectx", "transfer", "--to", to, "--all", "--json"]
        done = self.lab.command(source, words, timeout=_LONG)
        try:
            reports: list[dict[str, Any]] = json.loads(done.stdout)["reports"]
        except (ValueError, KeyError):
            reports = []
        stayed = [report for report in reports if report["result"] != "moved"]
        if done.returncode or stayed or len(reports) != self.size:
            told = stayed[0].get("text", "") if stayed else (done.stdout + done.stderr).strip()[-600:]
            moved = len(reports) - len(stayed)
            raise CharonError(f"{moved} of {self.size} moved, transfer ended with {done.returncode}: {told}")
        return reports

    def ping(self) -> None:
        """The server answers each of them."""
        inner = "\\n".join(map(self.inner, range(self.size)))
        ping = f"ping -q -c 1 -W 2 -I @ {INNER['srv'][4]}"
        self._must(self.host, "sh", "-c", f"printf '{inner}\\n' | xargs -P {_AT_ONCE} -I @ {ping}")


@contextmanager
def crowd(lab: Lab, size: int, overrides: Mapping[str, str], *, first: int = 0) -> Iterator[None]:
    """`size` SAs at each gateway, of mobile nodes nothing else is asked of. The lab's tunnel has `second`.

    They are in the charon of mn2, where `first` others are already; `overrides`: the scenario's, in force
    again when this begins.
    """
    if not size:
        yield
        return
    served = Fleet(lab, size, "mn2", "psg", first)
    with served.connected(), Fleet(lab, size, "mn2", "nsg", first + size).connected():
        lab.reload(lab.tunnel, overrides)
        yield
