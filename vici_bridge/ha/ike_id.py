"""`IkeId`: charon's name of an IKE_SA in messages of its `ha` socket. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ikectx.sa.context import IkeGeneration
from ikectx.sa.name import SaName

HIDDEN = 32
"""An IKE version that no packet can have: the header's field has 4 bits. charon finds an IKE_SA by version,
SPIs and role (`ike_sa_id_t.equals`, strongSwan 5.9.8 to 6.0.6)."""


@dataclass(frozen=True, slots=True)
class IkeId:
    """charon's name of an IKE_SA: SPIs of 8 octets as in the IKE header.

    `initiator`: the charon that sends or receives the message is its original initiator.
    """

    spi_i: bytes
    spi_r: bytes
    initiator: bool
    version: int = 2

    def __post_init__(self) -> None:
        if len(self.spi_i) != 8 or len(self.spi_r) != 8:
            raise ValueError("an IKE SPI has 8 octets")

    @classmethod
    def of(cls, generation: IkeGeneration) -> IkeId:
        return cls(generation.spi_i, generation.spi_r, generation.initiator)

    @property
    def spis(self) -> SaName:
        """(initiator SPI, responder SPI)."""
        return SaName(self.spi_i, self.spi_r)

    def hidden(self) -> IkeId:
        """The same SPIs under a name that no packet can have."""
        return replace(self, version=HIDDEN)

    def __str__(self) -> str:
        return f"{self.spi_i.hex()}_i{self.spi_r.hex()}_r"
