"""The context of an SA after a change of its outer addresses. Pure.

Selectors that consist of just one of the outer addresses change with it, as both ends' own address updates
(RFC 4555, 3.5) do, so that they stay the same at both ends.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

from .context import Address, Endpoint, IkeContext, TrafficSelector


def same_host(selector: TrafficSelector, address: Address) -> bool:
    """True if the selector is just this address."""
    return selector.start == selector.end == address


def relocate(
    context: IkeContext, *, local: Endpoint | None = None, remote: Endpoint | None = None
) -> IkeContext:
    """The context with other outer addresses; None: that one stays.

    If a new `remote` is of another family, a `local` that is None becomes 0.0.0.0 or ::, to be found later.
    Errors: ValueError if `local` and `remote` are of different families.
    """
    remote = remote or context.remote
    local = local or _of_family(context.local, remote.address.version)
    children = tuple(
        replace(
            child,
            local_ts=_follow(child.local_ts, context.local.address, local.address),
            remote_ts=_follow(child.remote_ts, context.remote.address, remote.address),
        )
        for child in context.children
    )
    return replace(context, local=local, remote=remote, children=children)


def _of_family(endpoint: Endpoint, version: int) -> Endpoint:
    if endpoint.address.version == version:
        return endpoint
    return Endpoint(IPv4Address(0) if version == 4 else IPv6Address(0), endpoint.port)


def _follow(
    selectors: tuple[TrafficSelector, ...], old: Address, new: Address
) -> tuple[TrafficSelector, ...]:
    return tuple(replace(each, start=new, end=new) if same_host(each, old) else each for each in selectors)
