"""The notifies of UPDATE_SPI, and that of an invitation: octets to values and back.

    notify                 number  protocol                SPI field          data
    UPDATE_SPI_SUPPORTED   41960   0                       none               version u8 = 1
    UPDATE_SPI             41961   3 ESP, 2 AH, 1 IKE      the old SPI        flags u8 . 0 u8 x 3 . new SPI
    UPDATE_SPI_REFUSED     41962   as in the request       as in the request  reason u8
    INVITATION             41963   0                       none               version u8 = 1 . UTF-8: gateway

An SPI has 4 octets, an IKE SPI 8. ESP and AH SPIs of 0 to 255 are reserved (RFC 4303, 2.1), an IKE SPI of 0
means "none yet" (RFC 7296, 2.6). The SPI field names the SA by the SPI on which *the sender of the request*
receives; with flag R (1, `choose`) by the one on which it sends, and then the new SPI is absent from the
request: the other side, which owns that SPI, puts it into its answer. All are status notifies of the
private range, inside SK of an established IKE_SA only.

Errors: `WireError` for foreign octets, `UsageError` for wrong values of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from ikectx.errors import UsageError, WireError
from ikectx.numbers import Notify, OpenEnum, Protocol
from ikectx.wire.payloads import NotifyPayload
from ikectx.wire.reader import Reader, Writer

VERSION = 1
FLAG_CHOOSE = 0x01
"""R: the sender of the request sends on the SPI, its receiver chooses the new one."""
SPI_SIZES = {Protocol.ESP: 4, Protocol.AH: 4, Protocol.IKE: 8}
"""Octets of an SPI."""
_OCTET = 0xFF
LOWEST_SPI = 256
"""Lowest SPI of ESP and AH: those below are reserved (RFC 4303, 2.1; RFC 4302, 2.4)."""


class Reason(OpenEnum):
    """Why a change of an SPI is refused."""

    UNKNOWN_SA = 1
    UNUSABLE = 2
    NOT_ALLOWED = 3
    BUSY = 4


def _spi_error(protocol: Protocol, spi: bytes) -> str:
    """What is wrong with an SPI; empty: nothing."""
    if protocol not in SPI_SIZES:
        return f"protocol {protocol.name} has no SPI to update"
    if len(spi) != SPI_SIZES[protocol]:
        return f"an SPI of {protocol.name} has {SPI_SIZES[protocol]} octets, not {len(spi)}"
    number = int.from_bytes(spi)
    if number == 0 or (protocol is not Protocol.IKE and number < LOWEST_SPI):
        return f"SPI {number} of {protocol.name} is reserved"
    return ""


def usable_spi(protocol: Protocol, spi: bytes) -> bool:
    """Whether the octets can be an SPI of that protocol."""
    return not _spi_error(protocol, spi)


def _expect(notify: NotifyPayload, kind: Notify) -> Reader:
    if notify.notify != kind:
        raise WireError(f"{notify.notify.name} where {kind.name} belongs")
    return Reader(notify.data, kind.name)


def _named(reader: Reader, notify: NotifyPayload) -> None:
    wrong = _spi_error(notify.protocol, notify.spi)
    if wrong:
        raise reader.fail(wrong)


@dataclass(frozen=True, slots=True)
class UpdateSpiSupported:
    """N(UPDATE_SPI_SUPPORTED): the sender knows UPDATE_SPI. A later version includes the earlier ones."""

    version: int = VERSION

    def __post_init__(self) -> None:
        if not VERSION <= self.version <= _OCTET:
            raise UsageError(f"there is no version {self.version} of UPDATE_SPI")

    @classmethod
    def parse(cls, notify: NotifyPayload) -> UpdateSpiSupported:
        reader = _expect(notify, Notify.UPDATE_SPI_SUPPORTED)
        if notify.protocol is not Protocol.NONE or notify.spi:
            raise reader.fail("it names an SA")
        version = reader.u8("version")
        if version < VERSION:
            raise reader.fail(f"version {version}")
        if version == VERSION:
            reader.end()
        return cls(version)

    def serialize(self) -> NotifyPayload:
        return NotifyPayload(Notify.UPDATE_SPI_SUPPORTED, Writer().u8(self.version, "version").done())


@dataclass(frozen=True, slots=True)
class UpdateSpi:
    """N(UPDATE_SPI). `choose` is flag R; then `new` is empty in a request and there in an answer."""

    protocol: Protocol
    old: bytes
    new: bytes = b""
    choose: bool = False

    def __post_init__(self) -> None:
        wrong = _spi_error(self.protocol, self.old)
        if not wrong and (self.new or not self.choose):
            wrong = _spi_error(self.protocol, self.new)
        if not wrong and self.new == self.old:
            wrong = "the new SPI is the old one"
        if wrong:
            raise UsageError(wrong)

    @classmethod
    def parse(cls, notify: NotifyPayload, *, answer: bool = False) -> UpdateSpi:
        """The notify of a request, or of an `answer`."""
        reader = _expect(notify, Notify.UPDATE_SPI)
        _named(reader, notify)
        flags = reader.u8("flags")
        if flags & ~FLAG_CHOOSE:
            raise reader.fail(f"flags {flags:#04x} are not known")
        if any(reader.octets(3, "reserved")):
            raise reader.fail("reserved octets are not zero")
        choose, new = bool(flags & FLAG_CHOOSE), reader.rest()
        if choose and not answer:
            if new:
                raise reader.fail("a new SPI where the other side chooses it")
        elif wrong := _spi_error(notify.protocol, new):
            raise reader.fail(wrong)
        if new == notify.spi:
            raise reader.fail("the new SPI is the old one")
        return cls(notify.protocol, notify.spi, new, choose)

    def serialize(self) -> NotifyPayload:
        data = Writer().u8(FLAG_CHOOSE * self.choose).octets(bytes(3)).octets(self.new).done()
        return NotifyPayload(Notify.UPDATE_SPI, data, self.protocol, self.old)


@dataclass(frozen=True, slots=True)
class UpdateSpiRefused:
    """N(UPDATE_SPI_REFUSED). A reason of a later version keeps its number."""

    protocol: Protocol
    old: bytes
    reason: Reason

    def __post_init__(self) -> None:
        wrong = _spi_error(self.protocol, self.old)
        if not wrong and not 0 < self.reason <= _OCTET:
            wrong = f"there is no reason {int(self.reason)}"
        if wrong:
            raise UsageError(wrong)

    @classmethod
    def parse(cls, notify: NotifyPayload) -> UpdateSpiRefused:
        reader = _expect(notify, Notify.UPDATE_SPI_REFUSED)
        _named(reader, notify)
        reason = Reason(reader.u8("reason"))
        if reason == 0:
            raise reader.fail("reason 0")
        reader.end()
        return cls(notify.protocol, notify.spi, reason)

    def serialize(self) -> NotifyPayload:
        data = Writer().u8(self.reason, "reason").done()
        return NotifyPayload(Notify.UPDATE_SPI_REFUSED, data, self.protocol, self.old)


@dataclass(frozen=True, slots=True)
class Invitation:
    """N(INVITATION): the mobile node's agent is to ask that gateway for its SA, by a CTAR."""

    gateway: str

    def __post_init__(self) -> None:
        if not 0 < len(self.gateway.encode()) <= _OCTET:
            raise UsageError(f"a gateway's name has 1 to {_OCTET} octets")

    @classmethod
    def parse(cls, notify: NotifyPayload) -> Invitation:
        reader = _expect(notify, Notify.INVITATION)
        if notify.protocol is not Protocol.NONE or notify.spi:
            raise reader.fail("it names an SA")
        version, name = reader.u8("version"), reader.rest()
        if version != VERSION or not 0 < len(name) <= _OCTET:
            raise reader.fail(f"version {version} with {len(name)} octets")
        try:
            return cls(name.decode())
        except UnicodeDecodeError:
            raise reader.fail("a name that is no UTF-8") from None

    def serialize(self) -> NotifyPayload:
        data = Writer().u8(VERSION).octets(self.gateway.encode()).done()
        return NotifyPayload(Notify.INVITATION, data)
