"""Many mobile nodes, all of them in the one charon of host `mn`: each has an outer address of its own there.

CXTP names a mobile node by that address, so those of different ones move at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address

from ikectx_cli.lab_net import INNER, INNER_NET, OUTER

from .world import World, until

_FIRST = {"outer": ip_address("10.32.0.0"), "inner": ip_address("10.48.0.0")}
_PREFIX = 16
_AT_ONCE = 16
"""Set-ups at a time: charon asks for cookies when more than 30 are half-open."""
_TOLD_AT_ONCE = 50
"""Changes of addresses that charon's netlink socket can hold; of a thousand at once it hears some 270."""
_PATIENCE = 1800.0
"""Seconds for a command about all of them."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """`size` mobile nodes, named by their numbers."""

    world: World
    size: int

    @staticmethod
    def outer(number: int) -> str:
        return str(_FIRST["outer"] + number + 1)

    @staticmethod
    def inner(number: int) -> str:
        """The virtual IP."""
        return str(_FIRST["inner"] + number + 1)

    @staticmethod
    def identity(number: int) -> str:
        return f"n{number}.example"

    @contextmanager
    def at_psg(self) -> Iterator[Fleet]:
        """Their addresses are there, and each has an IKE_SA with a CHILD_SA at psg; in the end nothing is."""
        net, way = f"{_FIRST['outer']}/{_PREFIX}", OUTER["mn"][4]
        self.world.must("core", "ip", "route", "add", net, "via", way)
        self._addresses("add")
        try:
            self._connect()
            yield self
        finally:
            self.world.forget("mn")
            self._addresses("del")
            self.world.must("core", "ip", "route", "del", net, "via", way)

    def _addresses(self, verb: str) -> None:
        batch = self.world.lab.work / "mn" / "fleet.batch"
        for first in range(0, self.size, _TOLD_AT_ONCE):
            numbers = range(first, min(first + _TOLD_AT_ONCE, self.size))
            batch.write_text("".join(f"address {verb} {self.outer(one)}/32 dev eth0\n" for one in numbers))
            self.world.must("mn", "ip", "-batch", str(batch))
            word = {"add": "appeared on", "del": "disappeared from"}[verb]
            last = f"{self.outer(numbers[-1])} {word} eth0"
            until(lambda last=last: last in self.world.log("mn"), f"mn's charon has heard: {last}")

    def _connect(self) -> None:
        world = self.world
        gateway = f"pools {{ inner {{ addrs = {_FIRST['inner']}/{_PREFIX} }} }}\n"
        gateway += "connections { mn { pools = inner\n remote { id = %any } } }\n"
        sections = "\n".join(map(self._connection, range(self.size)))
        mobile = "connections {\n" + sections + "\n}\n"
        world.lab.reload(world.tunnel, {"mn": mobile, "psg": gateway, "nsg": gateway})
        charon = world.lab.vici("mn")
        for first in range(0, self.size, _AT_ONCE):
            last = min(first + _AT_ONCE, self.size)
            for number in range(first, last):
                # not waited for: each that waits has one of charon's sixteen threads
                charon.request("initiate", {"ike": f"n{number}", "child": "net", "timeout": "-1"})
            until(lambda last=last: self._up() == last, f"{last} are up", 60)

    def _connection(self, number: int) -> str:
        return f"""  n{number} {{
    version = 2
    proposals = aes128gcm16-prfsha256-x25519
    remote_addrs = {OUTER["psg"][4]}
    local_addrs = {self.outer(number)}
    vips = {self.inner(number)}
    local {{ auth = psk
      id = {self.identity(number)} }}
    remote {{ auth = psk
      id = psg.example }}
    children {{ net {{ remote_ts = {INNER_NET[4]}
      esp_proposals = aes128gcm16 }} }}
  }}"""

    def _up(self) -> int:
        told = self.world.lab.vici("psg").stats()["ikesas"]
        return int(told["total"]) - int(told["half-open"])

    def move(self, source: str, to: str) -> None:
        """`ikectx transfer --all`: every SA must move."""
        words = ["ikectx", "transfer", "--to", to, "--all", "--json"]
        done = self.world.lab.command(source, words, timeout=_PATIENCE)
        assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
        reports = json.loads(done.stdout)["reports"]
        assert [report["result"] for report in reports] == ["moved"] * self.size

    def ping(self) -> None:
        """The server answers each of them."""
        inner = "\\n".join(map(self.inner, range(self.size)))
        ping = f"ping -q -c 1 -W 2 -I @ {INNER['srv'][4]}"
        self.world.must("mn", "sh", "-c", f"printf '{inner}\\n' | xargs -P {_AT_ONCE} -I @ {ping}")
