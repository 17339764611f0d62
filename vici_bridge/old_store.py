"""What a gateway does once when its store was lost, or is an older copy (I/O).

charon and the kernel have gone on meanwhile. The store may lack offers of SAs, which other gateways had
prepared: these may have sent under the SAs' keys. And its ledger may have steps of SAs that are long over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import replace

from ikectx.disk.store import SqliteStore
from ikectx.engine.tables import OSEQ_JUMP
from ikectx.engine.transfers import LET_GO
from ikectx.errors import CharonError, KernelError, WireError
from ikectx.sa.name import SaName

from .host import ESP, CharonHost
from .kernel.kernel import Kernel
from .vici.views import SaView

log = logging.getLogger(__name__)

PAUSES = (0.1, 0.5, 0.0)
"""Seconds after each time that charon could not be asked, because an error may pass in a moment."""


async def look_at_store(host: CharonHost, store: SqliteStore) -> None:
    """When an agent starts, before it goes on with what the store has. Errors: KernelError, StoreError."""
    if store.has != "whole":
        host.away.keep_blocks()
    if store.has == "old":
        await mistrust(host, {one.sa for one in store.open_transfers() if one.state in LET_GO})
        store.believed()


async def mistrust(host: CharonHost, let_go: Collection[SaName]) -> None:
    """Go past the numbers that other gateways may have used, and forget steps that may be over.

    `let_go`: SAs of which the store says that they were let go, and that no gateway has confirmed. Errors:
    KernelError, StoreError.
    """
    views: list[SaView] | None = None
    for pause in PAUSES:
        try:
            views = await host.views()
            break
        except (CharonError, WireError) as error:
            log.warning("charon cannot say which SAs it serves: %s", error)
            await asyncio.sleep(pause)
    muted = {one.spis for one in host.mute.listing()}
    served = [view for view in views or () if view.state == "ESTABLISHED" and view.spis not in muted]
    ours = {child.spi_out for view in served for child in view.children} if views is not None else None
    raised = 0 if host.kernel is None else _raise_numbers(host.kernel, ours)
    log.warning("the store was lost, or is an older copy: %d outbound SAs go on at higher numbers", raised)
    for row in host.leaving.all():
        if row.sa not in let_go:
            host.leaving.drop(row.sa)
    for view in served:
        host.coming.drop(view.spis)
    if views:
        await host.orphans.sweep({view.spis for view in views})


def _raise_numbers(kernel: Kernel, ours: Collection[bytes] | None) -> int:
    """Raise the numbers of these outbound ESP SAs by two jumps, because the agent cannot know which of them
    moved; how many there are. Not those of SAs that are only prepared here: the gateway that takes one back
    counts on no more than one jump. None: all, because charon could not say. Errors: KernelError."""
    raised = 0
    for sa in kernel.dump_sas():
        if sa.proto != ESP or (ours is not None and sa.spi not in ours) or not kernel.is_outbound(sa):
            continue
        top = (1 << (64 if sa.esn else 32)) - 1
        try:
            state, _ = kernel.get_replay(sa, outbound=True)
            kernel.set_replay(sa, replace(state, seq=min(state.seq + 2 * OSEQ_JUMP, top)), outbound=True)
        except (KernelError, WireError) as error:
            log.warning("%s goes on at its number: %s", sa, error)
        else:
            raised += 1
    return raised
