"""The networks of both sides of CHILD_SAs, from a context or from charon's listing. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import ip_network

from ikectx.sa.context import IkeContext
from vici_bridge.kernel.xfrm_parts import Network
from vici_bridge.vici.views import SaView, prefixes

Pair = tuple[Sequence[Network], Sequence[Network]]
"""The networks of this side and of the mobile node, of one CHILD_SA."""


def pairs_of(context: IkeContext) -> list[Pair]:
    """The networks of both sides, for each CHILD_SA."""
    return [
        (networks(prefixes(child.local_ts)), networks(prefixes(child.remote_ts)))
        for child in context.children
    ]


def pairs_in(view: SaView) -> list[Pair]:
    """The same, from charon's listing."""
    installed = [child for child in view.children if child.state == "INSTALLED"]
    return [(networks(child.local_ts), networks(child.remote_ts)) for child in installed]


def networks(texts: Iterable[str]) -> list[Network]:
    """Of prefixes, or of selectors as VICI writes them; ranges that are no prefix are left out."""
    found: list[Network] = []
    for text in texts:
        try:
            found.append(_network(text))
        except ValueError:
            continue
    return found


@lru_cache(maxsize=1 << 16)
def _network(text: str) -> Network:
    """Cached, because each SA has them several times. Errors: ValueError."""
    return ip_network(text.split("[", 1)[0].split("|", 1)[0])
