"""A decoder of foreign octets: what comes out is a value, or an error that its row names."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from types import MappingProxyType
from typing import Any

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


class Copies:
    """Makes copies of an object, which take less time than to make it anew with its keys.

    Secrets, functions, empty tables and what is not Python's are shared by all copies.
    """

    def __init__(self, original: object) -> None:
        self._shared: list[object] = []
        octets = io.BytesIO()
        shared = self._shared

        class Pickler(pickle.Pickler):
            def persistent_id(self, one: object) -> int | None:
                foreign = type(one).__module__.partition(".")[0] in ("cryptography", "builtins")
                if isinstance(one, Secret | MappingProxyType) or (
                    callable(one) and not isinstance(one, type) and foreign
                ):
                    shared.append(one)
                    return len(shared) - 1
                return None

        Pickler(octets, 5).dump(original)
        self._octets = octets.getvalue()

    def copy(self) -> Any:
        unpickler = pickle.Unpickler(io.BytesIO(self._octets))
        unpickler.persistent_load = self._shared.__getitem__  # type: ignore[method-assign]
        return unpickler.load()
