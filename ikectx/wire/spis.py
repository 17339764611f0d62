"""New SPIs in an answer: the data of a Context Data Block `Fpt.NEW_SPIS` of a CTAA.

    protocol u8 (1 IKE, 2 AH, 3 ESP) | octets of an SPI u8 (8, 4, 4) | old SPI | new SPI, for each SPI

Old and new are SPIs on which the *sender* of the answer (nSG) receives, as in an UPDATE_SPI without its flag.
A zero octet, or the end, ends the list: blocks are padded with zeros (RFC 4067, 2.4). Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ikectx.errors import WireError

from .reader import Reader, Writer

IKE, AH, ESP = 1, 2, 3
_SIZES = {IKE: 8, AH: 4, ESP: 4}
MOST = 64


@dataclass(frozen=True, slots=True)
class NewSpi:
    """One SPI that has changed. `protocol`: `IKE`, `AH` or `ESP` (IANA's IKEv2 protocol identifiers)."""

    protocol: int
    old: bytes
    new: bytes

    def __post_init__(self) -> None:
        size = _SIZES.get(self.protocol)
        if size is None or len(self.old) != size or len(self.new) != size:
            raise ValueError(
                f"an SPI of protocol {self.protocol} with {len(self.old)}/{len(self.new)} octets"
            )
        if not any(self.new) or (size == 4 and int.from_bytes(self.new) < 256):
            raise ValueError("a reserved SPI")


def parse_new_spis(data: bytes) -> tuple[NewSpi, ...]:
    """The list in a block's data. Errors: WireError."""
    reader = Reader(data, "NEW_SPIS")
    found: list[NewSpi] = []
    while reader.left:
        protocol = reader.u8("protocol")
        if protocol == 0:
            if any(reader.octets(reader.left, "padding")):
                raise reader.fail("something behind the end of the list")
            break
        size = reader.u8("octets of an SPI")
        if size != _SIZES.get(protocol):
            raise reader.fail(f"protocol {protocol} with SPIs of {size} octets")
        old, new = reader.octets(size, "old SPI"), reader.octets(size, "new SPI")
        try:
            found.append(NewSpi(protocol, old, new))
        except ValueError as error:
            raise WireError(f"NEW_SPIS: {error}") from None
        if len(found) > MOST:
            raise reader.fail(f"more than {MOST} SPIs")
    return tuple(found)


def serialize_new_spis(spis: Sequence[NewSpi]) -> bytes:
    """See `parse_new_spis`."""
    writer = Writer()
    for spi in spis:
        writer.u8(spi.protocol).u8(len(spi.old)).octets(spi.old).octets(spi.new)
    return writer.done()
