"""Another gateway as it is configured here: where it is, what it may do, what it may bring. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from ikectx.sa.context import Address, IkeContext
from ikectx.wire.cxtp import PORT
from ikectx.wire.identity import allows


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """Another gateway.

    `rights`: what it may do to us: "push" (move SAs here), "pull" (have them moved there), "packet" (the
    same, where it shows a packet of the MN). What the MN itself asks for needs none. `certificate_name`: the
    name its certificate holds, empty for `name`. `addresses`: those it serves MNs on, by which a CTAR with
    the RFC's token names it; `host` counts as well. `sources`: networks that it connects from, beside those.
    `connections`, `identities`: what SAs it may bring, by
    the connection's name and by the MN's identity (patterns as `identity.allows` has them); empty: any.
    """

    name: str
    host: str
    port: int = PORT
    rights: frozenset[str] = frozenset({"push"})
    certificate_name: str = ""
    addresses: tuple[Address, ...] = ()
    sources: tuple[IPv4Network | IPv6Network, ...] = ()
    connections: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()

    @property
    def certified(self) -> str:
        """The certificate name, in lower case."""
        return (self.certificate_name or self.name).lower()

    def may_not_bring(self, context: IkeContext) -> str:
        """Why it may not bring this SA here, whoever asked for it; empty: it may.

        If the mobile node has an EAP identity, that one counts, because nothing proves its IKE identity then.
        """
        if self.connections and context.connection not in self.connections:
            return f"{self.name} may not bring SAs of connection {context.connection} here"
        identity = context.remote_eap_id or context.remote_id
        if self.identities and not any(allows(pattern, identity) for pattern in self.identities):
            return f"{self.name} may not bring SAs of {identity} here"
        return ""
