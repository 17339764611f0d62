"""SAs that left this gateway, by the names that commands use; and whether packets of an SA could be sent
on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from ikectx.errors import UnknownSaError, UsageError
from ikectx.sa.name import SaName
from vici_bridge.away.departures import Departure
from vici_bridge.away.pairs import networks
from vici_bridge.kernel.xfrm_parts import Network
from vici_bridge.vici.views import SaView

from .config import ConnectionConfig


def need_ways(
    views: Iterable[SaView],
    to: str,
    stranded: Callable[[Collection[Network], str], Collection[Network]],
    connections: Mapping[str, ConnectionConfig],
) -> None:
    """Refuse, before anything is done, to move SAs whose packets would be dropped here afterwards.

    `stranded`: those of some networks whose packets have no way to a peer. If the connection `announces`, the
    network sends them there by itself. The mobile node's outer address, as in transport mode, and 0.0.0.0/0
    are never sent on. Errors: UsageError.
    """
    wanted = [
        (view, network)
        for view in views
        if not _announces(connections, view.name)
        for network in _inner(view)
    ]
    without = stranded({network for _, network in wanted}, to)
    stuck = [(view, network) for view, network in wanted if network in without]
    if not stuck:
        return
    view, network = stuck[0]
    more = len({one.spis for one, _ in stuck}) - 1
    others = f", and for {more} other{'s' if more > 1 else ''}" if more else ""
    raise UsageError(
        f"there is no way from here to {to} for packets of {view.remote_id} ({network}){others}: those that "
        "still arrive here after the move would be dropped; nothing was moved",
        hint=f"set forward_via for [[peer]] {to} to its inner address, on a network of this gateway; or set "
        f"announces = true for [connections.{view.name}], if its updown script has the network send them to "
        f"{to}; or say --no-detour, if the network does so by other means",
    )


def names(departure: Departure, text: str) -> bool:
    """Whether the text names the departure: SPIi:SPIr, or its mobile node's identity."""
    return text in (departure.mn, str(departure.sa))


def find(departures: Iterable[Departure], text: str) -> SaName:
    """The departed SA of that name: SPIi:SPIr, or its mobile node's identity.

    Errors: UnknownSaError.
    """
    found = [one for one in departures if names(one, text)]
    if len(found) != 1:
        raise UnknownSaError(
            f"{len(found) or 'no'} SA{'' if len(found) == 0 else 's'} of that name left this gateway: {text}",
            hint="`ikectx detours` lists those that did; name one as SPIi:SPIr",
        )
    return found[0].sa


def _announces(connections: Mapping[str, ConnectionConfig], name: str) -> bool:
    found = connections.get(name)
    return found is not None and found.announces


def _inner(view: SaView) -> list[Network]:
    """Networks of the SA's mobile node that could be sent on. A range is none: it is sent on as several
    prefixes, and refused as one of them would be."""
    found = networks(text for child in view.children for text in child.remote_ts)
    return [network for network in found if network.prefixlen and view.remote.address not in network]
