"""`doctor` for `transport = "ipsec"`: whether the kernel protects connections with each peer, and the peer
answers."""

from __future__ import annotations

from collections.abc import Iterator

from ikectx.errors import IkectxError, KernelError, LinkError

from .findings import Outcome
from .world import World


def protection(world: World) -> Iterator[Outcome]:
    """The present SPD, for connections in both directions; nothing if TLS protects them."""
    transfer = world.config.transfer
    if transfer.transport != "ipsec":
        return
    seen: dict[str, str] = {}
    for peer in world.config.peers:
        who = f"{peer.name} ({peer.host})"
        try:
            addresses = world.addresses(peer.host)
            if not addresses:
                yield "fail", f"{who}: the name has no address", "correct the address of that [[peer]]"
            for address in addresses:
                if address in seen:
                    yield (
                        "fail",
                        f"{address} is the address of {seen[address]} and of {peer.name}",
                        'with transport = "ipsec" a peer is known by its address: give each its own',
                    )
                seen[address] = peer.name
                for flow in world.flows(address, peer.port):
                    world.check_protection(flow)
                yield "ok", f"{who}: ESP protects {transfer.protocol} to and from {address}"
        except LinkError as error:
            yield "fail", f"{who}: {error}", error.hint
        except KernelError as error:
            yield "note", f"{who}: not checked: {error}", error.hint
        except IkectxError as error:
            yield "fail", f"{who}: {error}", error.hint


def reach(world: World) -> Iterator[Outcome]:
    """Whether each peer accepts a connection from here; nothing is sent on it."""
    for peer in world.config.peers:
        who = f"{peer.name} ({peer.address})"
        try:
            answer = world.connect_plainly(peer)
        except IkectxError:
            yield "note", f"{who} was not tried, because its connection is not protected"
            continue
        if answer.failed:
            yield (
                "fail",
                f"{who}: {answer.failed}",
                "is its agent running? does the IPsec SA with it come up (swanctl --list-sas)? a firewall?",
            )
        elif answer.refused:
            yield (
                "fail",
                f"{who} does not accept us",
                "see its log: it wants our address in exactly one [[peer]], and its own SPD to protect it",
            )
        else:
            yield "ok", f"{who} is reached"
