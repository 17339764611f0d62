"""Who has what an SA had, when its script is called minutes after it came or left. I/O."""

from __future__ import annotations

from ikectx.sa.context import IkeContext
from vici_bridge.host import CharonHost
from vici_bridge.vici.views import SaView, prefixes


async def heir_of(host: CharonHost, context: IkeContext) -> SaView | None:
    """charon's SA for the same mobile node and one of the same addresses: this one, one that has taken its
    place by a rekey, or one of its own. None: the mobile node has no such SA here. Errors: CharonError,
    WireError."""
    spis = {child.spi_in for child in context.children}
    theirs = set(prefixes(ts for child in context.children for ts in child.remote_ts))
    return next(
        (
            view
            for view in await host.views()
            if view.remote_id == str(context.remote_id)
            and any(
                child.spi_in in spis or theirs & {ts.partition("[")[0] for ts in child.remote_ts}
                for child in view.children
            )
        ),
        None,
    )
