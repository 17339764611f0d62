"""What a relay means for the messages of a transfer, at the old gateway. Pure.

A relayed mobile node stays at the old gateway's address, and the new gateway finds it at an endpoint of the
old one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ikectx.errors import RefusedError
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from ikectx.wire.cxtp import ContextDataBlock, Ctdr, Pctd
from ikectx.wire.profile import TransferHeader, encode

from .journal import JournalEntry
from .offer_answer import relay_address
from .ports import RelayTo, Way
from .report import mn_label
from .tables import SourceState


class Offers:
    """The PCTDs of one transfer. The last one is kept, because the journal's entry and the message have the
    same context, and encoding it takes a millisecond."""

    def __init__(self) -> None:
        self._last: tuple[IkeContext, object, Pctd] | None = None

    def make(self, context: IkeContext, way: Way, header: TransferHeader, leaving: bool) -> Pctd:
        """The PCTD, with the endpoint at which the new gateway finds the mobile node.

        `leaving`: the mobile node leaves at once. Errors: WireError.
        """
        key = way.seen_at, header, leaving
        if self._last is None or self._last[0] is not context or self._last[1] != key:
            # not `relocate`: the mobile node stays where it is, and its selectors with it
            offered = context if way.seen_at is None else replace(context, remote=way.seen_at)
            more = (ContextDataBlock(Fpt.LEAVING, b""),) if leaving else ()
            offer = Pctd(context.remote.address, (*encode(offered, transfer=header), *more))
            self._last = context, key, offer
        return self._last[2]


def new_entry(
    context: IkeContext, offer: Pctd, transfer_id: bytes, peer: str, sa: SaName, now: float
) -> JournalEntry:
    """The journal's entry for a transfer that begins; `now`: seconds since 1970."""
    return JournalEntry(
        transfer_id=transfer_id,
        role="source",
        peer=peer,
        sa=sa,
        mn=mn_label(context),
        mn_address=str(context.remote.address),
        state=str(SourceState.NEW),
        epoch=context.epoch,
        started=now,
        updated=now,
        context=offer.serialize(),
    )


def onward(way: Way, answer: Ctdr, asked_for: Collection[Fpt], peer: str) -> RelayTo | None:
    """What is to be passed on, and where to; None: nothing. `asked_for`: wishes of the peer beside its yes.

    Errors: RefusedError.
    """
    if way.seen_at is None:
        return None
    to = relay_address(answer)
    if to is None or Fpt.GO_ON in asked_for:
        # ESP that goes on from here under other SPIs, and what is passed on, would look alike
        why = "does not say where packets are to be passed on to" if to is None else "has the MN's SPI in use"
        status = Status.FAILED if to is None else Status.ESP_SPI_IN_USE
        raise RefusedError(f"{peer} {why}", status=status)
    return RelayTo(way.seen_at, to)


def relayed_words(result: str, way: Way, context: IkeContext | None, here: str) -> str:
    """What to add to the report of an SA that moved; empty: nothing."""
    if way.seen_at is None or context is None or result != "moved":
        return ""
    home = way.seen_at == context.remote
    return f", and relays it no more: {way.why}" if home else f", relayed by {here}: {way.why}"
