"""Compares an SA that comes in with this gateway's configuration: that of charon, and ikectx.toml.

The names of protocols and ports in charon's traffic selectors are looked up in this host's /etc/protocols and
/etc/services, because charon took them from there (I/O).
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Protocol

from ikectx.errors import WireError
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import Address, IkeContext
from ikectx.sa.verdict import Verdict
from vici_bridge.vici.answers import View

from .allowed import AllowedConnection, Range, Rules, Surroundings, inside_of, pool_ranges
from .claims import check_policy, depends_on_inside


class AdmissionConfig(Protocol):
    """The part of a gateway's configuration that is needed here (`host_config.HostConfig`)."""

    @property
    def addresses(self) -> tuple[Address, ...]: ...

    @property
    def rules(self) -> Mapping[str, Rules]:
        """By the connection's name."""

    @property
    def peers(self) -> Mapping[str, frozenset[Address]]:
        """Addresses of other gateways, by name."""

    @property
    def forward_via(self) -> Mapping[str, Sequence[Address]]: ...


def numbered(name: str, protocol: str) -> int:
    """Number of a protocol (`protocol` empty), or of a port of that protocol. Errors: OSError."""
    return socket.getservbyname(name, protocol) if protocol else socket.getprotobyname(name)


_Known = tuple[Mapping[str, AllowedConnection], tuple[Range, ...]]
_last: list[tuple[Mapping[str, View], _Known]] = []
"""charon's connections as they were read last: many SAs that come have the same one."""


def _read(connections: Mapping[str, View]) -> _Known:
    """The connections, and the networks that they protect. The same mapping is not read twice, because
    charon's answer is the same object until it changes. Errors: WireError."""
    if not _last or _last[0][0] is not connections:
        known = {name: AllowedConnection.read(name, view, numbered) for name, view in connections.items()}
        _last[:] = [(connections, (known, inside_of(known.values())))]
    return _last[0][1]


def depends_on_others(context: IkeContext, connections: Mapping[str, View]) -> bool:
    """Whether it matters for the SA what connections there are beside its own, because they tell which
    networks are behind this gateway. An answer of charon that cannot be read is for `admit`."""
    try:
        known, _ = _read(connections)
    except WireError:
        return False
    return any(depends_on_inside(context, allowed) for allowed in known.values())


def admit(
    here: IkeContext,
    connections: Mapping[str, View],
    pools: Mapping[str, View],
    config: AdmissionConfig,
    relayed_by: str = "",
) -> list[Verdict]:
    """The refusals by its connection here; none if it has no connection here, see `check_names`.

    `connections`: its own, and all others as well if the SA `depends_on_others`.
    `relayed_by`: a mobile node of that peer may have an address of it.
    """
    if here.connection not in connections:
        return []
    try:
        known, inside = _read(connections)
        ranges = pool_ranges(pools).values()
    except WireError as error:
        why = f"what this gateway allows cannot be told: {error}"
        return [Verdict(Fpt.PAD, Status.NOT_ALLOWED, why)]
    inner = {address for addresses in config.forward_via.values() for address in addresses}
    outer = {address for name, theirs in config.peers.items() if name != relayed_by for address in theirs}
    place = Surroundings(frozenset(config.addresses), frozenset(outer | inner), inside)
    rules = config.rules.get(here.connection, Rules())
    return check_policy(here, known[here.connection], rules, ranges, place)
