"""Another gateway as it is configured here: where it is, what it may do, what it may bring. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from ikectx.errors import RefusedError
from ikectx.numbers import Status
from ikectx.sa.context import Address, IkeContext
from ikectx.wire.cxtp import PORT
from ikectx.wire.identity import allows


@dataclass(frozen=True, slots=True)
class HostPort:
    """An endpoint of CXTP: an IP address, or for a peer a DNS name, and a port."""

    host: str
    port: int = PORT

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """Another gateway.

    `rights`: what it may do to us: "push" (move SAs here), "pull" (have them moved there), "packet" (the
    same, where it shows a packet of the MN). What the MN itself asks for needs none. `certificate_name`:
    the name its certificate holds, empty for `name`. `addresses`: those it serves MNs on, by which a CTAR
    with the RFC's token names it; `host` counts as well. `sources`: networks that it connects from, beside
    those. `connections`, `identities`: what SAs it may bring, by the connection's name and by the MN's
    identity (patterns as `identity.allows` has them); `to_connections`, `to_identities`: what SAs may go to
    it; empty: any."""

    name: str
    host: str
    port: int = PORT
    rights: frozenset[str] = frozenset({"push"})
    certificate_name: str = ""
    addresses: tuple[Address, ...] = ()
    sources: tuple[IPv4Network | IPv6Network, ...] = ()
    connections: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()
    to_connections: tuple[str, ...] = ()
    to_identities: tuple[str, ...] = ()

    @property
    def certified(self) -> str:
        """The certificate name, in lower case."""
        return (self.certificate_name or self.name).lower()

    def may_not_bring(self, context: IkeContext) -> str:
        """Why it may not bring this SA here, whoever asked for it; empty: it may."""
        found = _outside(context, self.connections, self.identities)
        return f"{self.name} may not bring SAs of {found} here" if found else ""

    def may_get(self, context: IkeContext) -> IkeContext:
        """The SA, if it may go to this gateway, whoever asked for it. Errors: RefusedError."""
        found = _outside(context, self.to_connections, self.to_identities)
        if found:
            why = f"SAs of {found} may not go to {self.name}"
            hint = "to_connections and to_identities of that [[peer]] at the gateway that serves the SA"
            raise RefusedError(why, status=Status.NOT_ALLOWED, hint=hint)
        return context


def _outside(context: IkeContext, connections: Sequence[str], identities: Sequence[str]) -> str:
    """What of the SA is not among these, in words; empty: nothing.

    If the mobile node has an EAP identity, that one counts, because nothing proves its IKE identity then.
    """
    if connections and context.connection not in connections:
        return f"connection {context.connection}"
    identity = context.remote_eap_id or context.remote_id
    if identities and not any(allows(pattern, identity) for pattern in identities):
        return str(identity)
    return ""
