"""What a mobile node and its new gateway have agreed to by a CTAR and its CTAA. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ikectx.errors import WireError
from ikectx.numbers import Fpt
from ikectx.sa.context import Address, Endpoint, IkeContext
from ikectx.sa.name import SaName
from ikectx.wire.cxtp import ContextDataBlock
from ikectx.wire.spis import ESP, IKE, parse_new_spis

from .mobility import HandoverOutcome


@dataclass(frozen=True, slots=True)
class Agreement:
    """The new gateway serves the SA. `local`, `remote`: the mobile node's end, and the gateway's.

    renames: SPIs to replace, old to new, ESP's of 4 octets and IKE's of 8. peers: all endpoints of the new
    gateway, for MOBIKE later on. expected: message ID of the mobile node's next request there, None: not
    said."""

    local: Endpoint
    remote: Endpoint
    renames: Mapping[bytes, bytes]
    peers: tuple[Endpoint, ...] = ()
    expected: int | None = None


def agreed(
    outcome: HandoverOutcome,
    context: IkeContext,
    local: Endpoint,
    remote: Endpoint,
    gateway: Sequence[Address],
) -> tuple[Agreement, SaName]:
    """From an outcome that is ACTIVATED, of an SA that was `context`: the agreement, and the SA's name by it.

    `gateway`: all addresses of the new gateway. Errors: WireError for new SPIs that the SA cannot have.
    """
    renames = renames_of(outcome.blocks, context)
    name = context.spis.renamed(renames)
    # under new SPIs of the IKE_SA both ends begin at 0
    expected = outcome.expected if name == context.spis else None
    peers = tuple(Endpoint(address, remote.port) for address in gateway)
    return Agreement(local, remote, renames, peers, expected), name


def renames_of(blocks: Iterable[ContextDataBlock], context: IkeContext) -> dict[bytes, bytes]:
    """Old to new SPIs on which the other end receives, from its answer (CTAA); empty: the old ones stay.

    Errors: WireError for a list that is malformed, or names SPIs that the SA here does not have.
    """
    current = context.current
    ours = {
        ESP: {child.spi_out for child in context.children},
        IKE: {current.spi_r if current.initiator else current.spi_i},
    }
    found: dict[bytes, bytes] = {}
    for block in blocks:
        if block.fpt is not Fpt.NEW_SPIS:
            continue
        for one in parse_new_spis(block.data):
            if one.old not in ours.get(one.protocol, ()):
                raise WireError(f"NEW_SPIS: the SA has no SPI {one.old.hex()} of protocol {one.protocol}")
            if found.setdefault(one.old, one.new) != one.new:
                raise WireError(f"NEW_SPIS: two new names for {one.old.hex()}")
    if len(set(found.values())) < len(found):
        raise WireError("NEW_SPIS: one new name for two SPIs")
    return found
