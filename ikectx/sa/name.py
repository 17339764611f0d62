"""`SaName`: the two SPIs by which an IKE_SA is known, in memory, in the store and to people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ikectx.errors import UsageError

SPI_OCTETS = 8
"""Octets of an IKE SPI (RFC 7296, 3.1)."""


class SaName(NamedTuple):
    """The initiator's and the responder's SPI of an IKE_SA, `SPI_OCTETS` octets each.

    It is equal to the plain tuple of both, so that an integrator may go on using one.
    """

    spi_i: bytes
    spi_r: bytes

    @property
    def key(self) -> str:
        """The name under which the store keeps what belongs to this IKE_SA: 32 hexadecimal digits."""
        return self.spi_i.hex() + self.spi_r.hex()

    @property
    def octets(self) -> bytes:
        """Both SPIs as they stand in the IKE header, 16 octets. Errors: UsageError, where they are not."""
        if (len(self.spi_i), len(self.spi_r)) != (SPI_OCTETS, SPI_OCTETS):
            raise UsageError("an IKE SPI has 8 octets")
        return self.spi_i + self.spi_r

    def renamed(self, new: Mapping[bytes, bytes]) -> SaName:
        """The name after a change of SPIs, old to new; an SPI that `new` does not have stays."""
        return SaName(new.get(self.spi_i, self.spi_i), new.get(self.spi_r, self.spi_r))

    @classmethod
    def from_key(cls, key: str) -> SaName:
        """The name from its `key`. Errors: ValueError, if the text is not 32 hexadecimal digits."""
        octets = bytes.fromhex(key)
        if len(key) != 4 * SPI_OCTETS or len(octets) != 2 * SPI_OCTETS:
            raise ValueError(f"{len(key)} characters are not the name of an IKE_SA")
        return cls(octets[:SPI_OCTETS], octets[SPI_OCTETS:])

    @property
    def pair(self) -> list[str]:
        """Both SPIs in hexadecimal, as JSON has them."""
        return [self.spi_i.hex(), self.spi_r.hex()]

    @classmethod
    def from_pair(cls, pair: Sequence[str]) -> SaName:
        """The name from its `pair`. Errors: ValueError, TypeError."""
        spi_i, spi_r = pair
        return cls(bytes.fromhex(spi_i), bytes.fromhex(spi_r))

    @classmethod
    def from_text(cls, text: str) -> SaName:
        """The name from its text (`str`). Errors: ValueError."""
        spi_i, colon, spi_r = text.partition(":")
        if not colon or len(spi_i) != 2 * SPI_OCTETS:
            raise ValueError("not two IKE SPIs with a colon between them")
        return cls.from_key(spi_i + spi_r)

    def __str__(self) -> str:
        """As people see it and type it: both SPIs in hexadecimal, with a colon between them."""
        return f"{self.spi_i.hex()}:{self.spi_r.hex()}"
