"""New SPIs at a mobile node: whether a request for some can be granted."""

from __future__ import annotations

import logging
import secrets

from ikectx.errors import IkectxError, KernelError, WireError
from ikectx.numbers import Protocol
from ikectx.sa.context import Address, IkeContext
from ikectx.sa.name import SaName
from vici_bridge.host import CharonHost
from vici_bridge.policy.new_names import SPI_MAX, SPI_MIN

log = logging.getLogger(__name__)

_DRAWS = 200


class OwnNames:
    """`mobike_ext.naming.Names` of one SA at a mobile node."""

    def __init__(self, host: CharonHost, sa: SaName) -> None:
        self._host = host
        self._sa = sa
        self._reserved: dict[bytes, bytes] = {}

    def _context(self) -> IkeContext | None:
        try:
            return self._host.record.context(self._sa)
        except IkectxError:
            return None

    def known(self, protocol: Protocol, spi: bytes, inbound: bool) -> bool:
        context = self._context()
        if context is None:
            return False
        if protocol is Protocol.IKE:
            return spi == self._sa[0 if inbound == context.current.initiator else 1]
        return any(
            (child.protocol, child.spi_in if inbound else child.spi_out) == (protocol, spi)
            for child in context.children
        )

    def usable(self, protocol: Protocol, old: bytes, new: bytes) -> bool:
        context = self._context()
        if context is None:
            return False
        if protocol is Protocol.IKE:
            return new not in self._sa
        others = {child.spi_out for one in self._every() for child in one.children}
        return new not in others and self._free(context.remote.address, new)

    def reserve(self, protocol: Protocol, old: bytes) -> bytes | None:
        if old not in self._reserved:
            drawn = self._ike_spi() if protocol is Protocol.IKE else self._esp_spi()
            if drawn is None:
                return None
            self._reserved[old] = drawn
        return self._reserved[old]

    def objection(self, protocol: Protocol, spi: bytes, inbound: bool) -> None:
        """None, never: a rekey under way is charon's, and begins anew."""

    def _every(self) -> list[IkeContext]:
        found: list[IkeContext] = []
        for name in self._host.record.names():
            try:
                found.append(self._host.record.context(name))
            except IkectxError:
                continue
        return found

    def _ike_spi(self) -> bytes:
        used = {spi for name in self._host.record.names() for spi in name}
        while (drawn := secrets.token_bytes(8)) in used or drawn == bytes(8):
            pass
        return drawn

    def _esp_spi(self) -> bytes | None:
        """One of charon's own range that no SA here has; charon draws at random, too, so a collision has
        2^-28."""
        context = self._context()
        if context is None:
            return None
        used = {child.spi_in for one in self._every() for child in one.children} | {*self._reserved.values()}
        for _ in range(_DRAWS):
            drawn = (SPI_MIN + secrets.randbelow(SPI_MAX - SPI_MIN + 1)).to_bytes(4)
            if drawn not in used and self._free(context.local.address, drawn):
                return drawn
        return None

    def _free(self, destination: Address, spi: bytes) -> bool:
        """Whether the kernel has no SA of that name; False if it does not tell."""
        kernel = self._host.kernel
        try:
            return kernel is None or kernel.get_sa(destination, spi) is None
        except (KernelError, WireError) as error:
            log.warning("no SPI can be granted: %s", error)
            return False
