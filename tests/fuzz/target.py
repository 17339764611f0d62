"""A decoder of foreign octets: what comes out is a value, or an error that its row names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address

from ikectx.errors import IkectxError, WireError
from ikectx.sa.context import Endpoint, Secret
from ikectx.sa.name import SaName

MN, NSG = ip_address("198.51.100.7"), ip_address("192.0.2.1")
ENDS = Endpoint(MN, 4500), Endpoint(NSG, 4500)
SPIS = SaName(b"initiato", b"responde")
KEY = Secret(bytes(range(32)))


@dataclass(frozen=True)
class Target:
    """`seeds`: octets that it reads. `errors`: what it may raise; none where it counts and goes on."""

    decode: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    errors: tuple[type[IkectxError], ...] = (WireError,)
