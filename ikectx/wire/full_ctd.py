"""A CTD with the whole context, which the old gateway sends if the new gateway asked for an SA it knows
nothing of.

Its blocks are those of a PCTD (`profile.encode`), with the last counters and message IDs in their places,
because the SA is frozen by then. Key 1 of its IKEV2_SA profile tells it from a CTD that only lets go: 8
octets, the transfer id, instead of 24. The epoch in it is the old gateway's; the new gateway owns the SA in
the next one, as after any CTD.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ikectx.errors import WireError
from ikectx.sa.context import FinalChild, FinalState, IkeContext

from .cxtp import ContextDataBlock
from .profile import TransferHeader, decode, decode_final, encode


def merge(context: IkeContext, final: FinalState) -> IkeContext:
    """The context with the counters and message IDs of `final`; its epoch stays.

    Errors: WireError if `final` is not of this SA and its children.
    """
    last = {child.spi_in: child for child in final.children}
    if (final.spi_i, final.spi_r) != context.spis or set(last) != {c.spi_in for c in context.children}:
        raise WireError("the final state is not of this SA")
    children = tuple(
        replace(child, inbound=last[child.spi_in].inbound, outbound=last[child.spi_in].outbound)
        for child in context.children
    )
    return replace(
        context,
        children=children,
        mid_initiator=final.mid_initiator,
        mid_responder=final.mid_responder,
        unsure=final.unsure,
    )


def final_of(context: IkeContext) -> FinalState:
    """The final state that a whole context holds."""
    children = tuple(FinalChild(c.spi_in, c.inbound, c.outbound) for c in context.children)
    return FinalState(
        *context.spis,
        context.mid_initiator,
        context.mid_responder,
        context.epoch + 1,
        children,
        context.unsure,
    )


def encode_whole(
    context: IkeContext, final: FinalState, *, transfer: TransferHeader
) -> tuple[ContextDataBlock, ...]:
    """The blocks of the CTD. Errors: WireError, as of `encode` and `merge`."""
    return encode(merge(context, final), transfer=transfer)


def decode_last(
    blocks: Iterable[ContextDataBlock],
) -> tuple[IkeContext, TransferHeader] | tuple[FinalState, bytes]:
    """The content of a CTD: a whole context with its header, or a final state with its transfer id.

    Errors: WireError, that of the final state if it is neither.
    """
    blocks = tuple(blocks)
    try:
        return decode_final(blocks)
    except WireError as error:
        try:
            return decode(blocks)
        except WireError:
            raise error from None
