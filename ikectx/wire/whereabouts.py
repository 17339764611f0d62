"""Notices about SAs that were handed on: where the SA is now, from the gateway that took it to the one that
gave it.

The giving gateway sends only one: that somebody ended the SA there while it was leaving.

A CTD whose MN address is 0.0.0.0, since it is about no transfer, with one block WHEREABOUTS and nothing else,
which holds for each SA

    what u8 | octets of the name u8 | SPIi 8 | SPIr 8 | epoch u64 | name

    what: 1 here, 2 moved, 3 ended, 4 end it, 5 renamed, 6 came, 7 ready

A zero octet, or the end, ends the list, because blocks are padded with zeros (RFC 4067, 2.4). The SPIs are
those that the SA had when it was handed on, and the epoch is the first of the gateway that took it; together
they identify the hand-over, whatever SPIs the SA has had since. The name is that of the gateway it moved to,
or its present SPIs (renamed, see `spis_in`), else it is empty. A CTDR with S = 1 acknowledges the notice; a
peer that does not know WHEREABOUTS answers with S = 0 and MALFORMED, as to any CTD that does not parse. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address

from ikectx.errors import WireError
from ikectx.numbers import Fpt, OpenEnum
from ikectx.sa.name import SaName

from .cxtp import MAX_BLOCK_DATA, ContextDataBlock, Ctd
from .reader import Reader, Writer

NOBODY = IPv4Address(0)
"""The MN address of such a CTD, and of its CTDR."""


class What(OpenEnum):
    """The news about an SA."""

    HERE = 1
    """The sender has the SA, although it was about to leave."""
    MOVED = 2
    """Another gateway has the SA."""
    ENDED = 3
    """No gateway has the SA any more."""
    END = 4
    """From the gateway that gave the SA: it was ended there while it left, and the gateway that has it must
    end it."""
    RENAMED = 5
    """The sender has the SA, with other SPIs: the gateway that gave it relays its mobile node."""
    CAME = 6
    """The mobile node sends to the sender's own address now: the gateway that gave the SA need not relay it
    any more."""
    READY = 7
    """The sender, which does not serve the SA yet, can send its ESP: packets for the mobile node may be
    sent on to it."""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """The news about one SA. `sa`: its SPIs when it was handed on. `to`: with MOVED, the gateway that has it;
    with RENAMED its present SPIs, see `spis_in`."""

    sa: SaName
    epoch: int
    what: What
    to: str = ""

    def __post_init__(self) -> None:
        if (len(self.sa[0]), len(self.sa[1])) != (8, 8):
            raise ValueError("an IKE_SA is named by two SPIs of 8 octets")
        if not 0 <= self.epoch < 1 << 64:
            raise ValueError(f"epoch {self.epoch} does not fit in 64 bits")
        if not 0 < self.what < 256:
            raise ValueError(f"{int(self.what)} says nothing of an SA")
        if (self.what in (What.MOVED, What.RENAMED)) != bool(self.to):
            raise ValueError("the gateway an SA is at is named where it has moved, and only there")
        if self.what == What.RENAMED:
            spis_in(self.to)
        if len(self.to.encode()) > 255 or not self.to.isprintable():
            raise ValueError("a gateway's name has 255 octets at most, all of them printable")

    def serialize(self) -> bytes:
        """Its octets in the block."""
        name = self.to.encode()
        out = Writer().u8(self.what).u8(len(name)).octets(self.sa[0] + self.sa[1])
        return out.u64(self.epoch).octets(name).done()


def spis_text(name: SaName, esp: Iterable[bytes]) -> str:
    """What RENAMED says: the IKE SPIs, and as many as fit of those under which the mobile node receives ESP
    that is not in UDP."""
    return (name.key + b"".join(esp).hex())[:_MOST_DIGITS]


def spis_in(text: str) -> tuple[SaName, tuple[bytes, ...]]:
    """Read that. Errors: ValueError."""
    name, esp = SaName.from_key(text[:_NAME_DIGITS]), bytes.fromhex(text[_NAME_DIGITS:])
    if len(text) != _NAME_DIGITS + 2 * len(esp) or len(esp) % 4:
        raise ValueError("SPIs of ESP have 4 octets each")
    return name, tuple(esp[at : at + 4] for at in range(0, len(esp), 4))


_NAME_DIGITS = 32
_MOST_DIGITS = _NAME_DIGITS + 27 * 8
"""Digits that fit into a name of 255 octets."""
_KNOWN = (What.HERE, What.MOVED, What.ENDED, What.END, What.RENAMED, What.CAME, What.READY)


def notice(all_news: Iterable[Whereabouts]) -> tuple[Ctd, list[Whereabouts]]:
    """A CTD with as many of these as fit, from the first on, and the list of those."""
    data, told = b"", []
    for news in all_news:
        octets = news.serialize()
        if len(data) + len(octets) > MAX_BLOCK_DATA:
            break
        data += octets
        told.append(news)
    return Ctd(NOBODY, (ContextDataBlock(Fpt.WHEREABOUTS, data),)), told


def is_notice(message: Ctd) -> bool:
    """True if it is a notice, and not part of a transfer."""
    return message.mn == NOBODY and any(block.fpt == Fpt.WHEREABOUTS for block in message.blocks)


def parse_notice(message: Ctd) -> tuple[Whereabouts, ...]:
    """The news in it; items that only a later version knows are left out. Errors: WireError."""
    found: list[Whereabouts] = []
    for block in message.blocks:
        if block.fpt != Fpt.WHEREABOUTS:
            continue
        reader = Reader(block.data, "WHEREABOUTS")
        while reader.left:
            what = What(reader.u8("what became of it"))
            if what == 0:
                if any(reader.octets(reader.left, "padding")):
                    raise reader.fail("something behind the end of the list")
                break
            size = reader.u8("octets of the name")
            sa = SaName(reader.octets(8, "SPIi"), reader.octets(8, "SPIr"))
            epoch, name = reader.u64("epoch"), reader.octets(size, "name")
            if what not in _KNOWN:
                continue
            try:
                found.append(Whereabouts(sa, epoch, what, name.decode()))
            except (UnicodeDecodeError, ValueError) as error:
                raise WireError(f"WHEREABOUTS: {error}") from None
    return tuple(found)
