"""The files of examples/bird with the lab's addresses: what the lab runs is what an operator copies."""

from __future__ import annotations

import re
from pathlib import Path

from .net import INNER, INNER_NET, POOL

FOLDER = Path(__file__).resolve().parent.parent.parent / "examples" / "bird"

BIRD = "/usr/sbin/bird"
"""BIRD 2, from Debian's package bird2."""

HOSTS = ("srv", "psg", "nsg")
"""The hosts with a BIRD: the server, which stands for the inside router, and the gateways."""

TABLE = 4242
"""The kernel's routing table by which updown scripts tell BIRD whom a gateway serves."""

NSG_POOL = {4: "10.4.1.0/24", 6: "fd04:1::/64"}
"""nsg's own pool, from which no mobile node of the lab has an address."""

_AS = "65000"


def config(host: str) -> str:
    """The bird.conf of a host. Raises OSError where the examples are not beside this package.

    Raises ValueError where the example has other definitions than the lab gives.
    """
    own, router = INNER[host], INNER["srv"]
    values = {"SELF4": own[4], "SELF6": own[6], "AS": _AS}
    if host == "srv":
        name = "router.conf"
        values |= {"GATEWAYS4": INNER_NET[4], "GATEWAYS6": INNER_NET[6]}
    else:
        name, pool = "gateway.conf", POOL if host == "psg" else NSG_POOL
        values |= {"ROUTER4": router[4], "ROUTER6": router[6], "POOL4": pool[4], "POOL6": pool[6]}
    text = (FOLDER / name).read_text()
    found = set(re.findall(r"(?m)^define (\w+) =", text))
    if found != set(values):
        raise ValueError(f"{name} defines {sorted(found)}, the lab {sorted(values)}")
    for key, value in values.items():
        text = re.sub(rf"(?m)^define {key} = [^;]*;", f"define {key} = {value};", text)
    return text.replace("log syslog all;", "log stderr all;")
