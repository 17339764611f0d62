"""The notes of a mobile node's agent about an SA whose outer addresses it changes. Pure.

`MobileMove` is the note of an open step in the store: with it an agent that starts anew completes the step of
the one before it. `guards_of` makes the policies that hold outbound packets meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any

from ikectx.errors import UsageError, reading
from ikectx.sa.context import ChildContext, Endpoint, IkeContext, ReplayState
from ikectx.sa.name import SaName
from ikectx.sa.relocate import relocate
from vici_bridge.kernel.xfrm import KernelPolicy, KernelSa
from vici_bridge.kernel.xfrm_parts import Mark
from vici_bridge.vici.views import ChildView, SaView

LIVING = ("INSTALLED", "REKEYING")
"""States of charon's children that carry packets and are not being deleted."""
_MARK_BITS = 0xFFFFFFFF
GUARD = int.from_bytes(b"IKEG")
"""The `user` of the selector of a guard of a policy that looks at all of these bits."""


@dataclass(frozen=True, slots=True)
class ChildMove:
    """One CHILD_SA on the move. SPIs of 4 octets, as the mobile node sees them; `unique_id`: charon's old
    one.

    `sent`, `received`: the old pair's numbers when they were noted, None: not noted yet.
    """

    old_in: bytes
    old_out: bytes
    new_in: bytes
    new_out: bytes
    unique_id: int
    sent: int | None = None
    received: ReplayState | None = None

    def old_in_view(self, view: SaView) -> bool:
        """Whether charon lists the old pair."""
        return any(child.unique_id == self.unique_id for child in view.children)

    def new_in_view(self, view: SaView) -> bool:
        """Whether charon lists the new pair."""
        return any(
            child.unique_id != self.unique_id and (child.spi_in, child.spi_out) == (self.new_in, self.new_out)
            for child in view.children
        )


@dataclass(frozen=True, slots=True)
class MobileMove:
    """An IKE_SA on the move from `old_local`, `old_remote` to `local`, `remote`.

    `peers`: addresses where charon may find the new gateway later on (MOBIKE); none: `remote`. `guards`:
    policies that hold its outbound packets meanwhile, as octets (`KernelPolicy.raw`). `ike`: SPIs
    (initiator's, responder's) that the IKE_SA gets last of all; None: it keeps its own. `done`: all steps
    were seen done.
    """

    old_local: Endpoint
    old_remote: Endpoint
    local: Endpoint
    remote: Endpoint
    children: tuple[ChildMove, ...]
    peers: tuple[Endpoint, ...] = ()
    guards: tuple[bytes, ...] = ()
    ike: SaName | None = None
    done: bool = False

    def beside(self, child: ChildMove) -> bool:
        """Whether the new pair can exist beside the old one: no name of it is one of the old pair's.

        The kernel tells SAs apart by (destination, SPI), and charon's clean-up of an SA that it could not add
        deletes the one that was there (strongSwan 5.9.8, 6.0.6).
        """
        return (self.local.address, child.new_in) != (self.old_local.address, child.old_in) and (
            self.remote.address,
            child.new_out,
        ) != (self.old_remote.address, child.old_out)

    @property
    def nothing(self) -> bool:
        """Whether old and new are the same."""
        return (
            (self.old_local, self.old_remote) == (self.local, self.remote)
            and self.ike is None
            and all((child.old_in, child.old_out) == (child.new_in, child.new_out) for child in self.children)
        )

    def child(self, spi_in: bytes) -> ChildMove | None:
        """The child with that inbound SPI, its old or its new one."""
        found = [child for child in self.children if spi_in == child.old_in]
        found += [child for child in self.children if spi_in == child.new_in]
        return found[0] if found else None

    def with_child(self, changed: ChildMove) -> MobileMove:
        """The same move with one child's note changed."""
        children = tuple(changed if one.old_in == changed.old_in else one for one in self.children)
        return replace(self, children=children)

    def after(self, context: IkeContext) -> IkeContext:
        """The context after the move; it may have been made already."""
        here = relocate(context, local=self.local, remote=self.remote)
        return replace(here, children=tuple(self.renamed(child) for child in here.children))

    def with_new_name(self, context: IkeContext) -> IkeContext:
        """The context under the IKE_SA's new SPIs: its keys are derived anew, those of its children are not.

        Message IDs begin at 0 again, as after a rekey.
        """
        if self.ike is None or context.spis == self.ike:
            return context
        generation = replace(context.current, spi_i=self.ike[0], spi_r=self.ike[1])
        generations = (*context.generations, generation)
        return replace(context, generations=generations, mid_initiator=0, mid_responder=0)

    def renamed(self, child: ChildContext) -> ChildContext:
        """The child under its new SPIs."""
        found = self.child(child.spi_in)
        return child if found is None else replace(child, spi_in=found.new_in, spi_out=found.new_out)

    def dumps(self) -> bytes:
        """The stored form."""
        return json.dumps(
            {
                "ends": [_end(end) for end in (self.old_local, self.old_remote, self.local, self.remote)],
                "children": [
                    [
                        [spi.hex() for spi in (one.old_in, one.old_out, one.new_in, one.new_out)],
                        one.unique_id,
                        one.sent,
                        None if one.received is None else _window(one.received),
                    ]
                    for one in self.children
                ],
                "peers": [_end(end) for end in self.peers],
                "ike": None if self.ike is None else [spi.hex() for spi in self.ike],
                "guards": [raw.hex() for raw in self.guards],
                "done": self.done,
            }
        ).encode()

    @classmethod
    def loads(cls, data: bytes) -> MobileMove:
        """Errors: StoreError."""
        with reading("the note of a mobile node's move"):
            value: Any = json.loads(data)
            ends, peers = (
                [Endpoint(ip_address(address), int(port)) for address, port in value[key]]
                for key in ("ends", "peers")
            )
            children = tuple(
                ChildMove(
                    bytes.fromhex(old_in),
                    bytes.fromhex(old_out),
                    bytes.fromhex(new_in),
                    bytes.fromhex(new_out),
                    int(number),
                    sent,
                    None if received is None else ReplayState(*received),
                )
                for (old_in, old_out, new_in, new_out), number, sent, received in value["children"]
            )
            guards = tuple(bytes.fromhex(raw) for raw in value["guards"])
            ike = None if value["ike"] is None else SaName.from_key("".join(value["ike"]))
            old_local, old_remote, local, remote = ends
            return cls(
                old_local,
                old_remote,
                local,
                remote,
                children,
                peers=tuple(peers),
                guards=guards,
                ike=ike,
                done=value["done"] is True,
            )


def _end(end: Endpoint) -> list[object]:
    return [str(end.address), end.port]


def _window(state: ReplayState) -> list[object]:
    return [state.seq, state.window, state.bitmap, state.esn]


def plan_move(
    context: IkeContext,
    listed: Sequence[ChildView],
    local: Endpoint,
    remote: Endpoint,
    renames: Mapping[bytes, bytes],
    peers: Sequence[Endpoint] = (),
) -> MobileMove:
    """The move of `context` to other addresses, with SPIs replaced as `renames` says (old to new).

    SPIs of 4 octets are children's, those of 8 the IKE_SA's. `listed`: charon's children. `peers`: as
    `MobileMove` has them. Errors: UsageError for SPIs that are none of this SA's, or change their size.
    """
    spis = {spi for child in context.children for spi in (child.spi_in, child.spi_out)} | {*context.spis}
    for old, new in renames.items():
        if old not in spis or len(new) != len(old):
            raise UsageError(f"SPI {old.hex()} cannot become {new.hex()}: it is none of this SA's")
    name = context.spis.renamed(renames)
    ike = None if name == context.spis else name
    numbers = {child.spi_in: child.unique_id for child in listed if child.state in LIVING}
    stays = (context.local, context.remote) == (local, remote)
    # a child's rekey may have been interrupted, so it begins anew as a child that nobody is rekeying
    rekeying = {child.spi_in for child in listed if child.state == "REKEYING"}
    children = tuple(
        ChildMove(
            child.spi_in,
            child.spi_out,
            renames.get(child.spi_in, child.spi_in),
            renames.get(child.spi_out, child.spi_out),
            numbers.get(child.spi_in, 0),
        )
        for child in context.children
        if not stays or child.spi_in in rekeying or child.spi_in in renames or child.spi_out in renames
    )
    return MobileMove(context.local, context.remote, local, remote, children, tuple(peers), ike=ike)


def leads(sa: KernelSa | None, source: Endpoint, destination: Endpoint) -> bool:
    """Whether the kernel's SA leads from one end to the other, by these ports if it is in UDP."""
    if sa is None or (sa.source, sa.destination) != (source.address, destination.address):
        return False
    return sa.encap is None or (sa.encap.source_port, sa.encap.destination_port) == (
        source.port,
        destination.port,
    )


def guards_of(policy: KernelPolicy, *, block: bool) -> tuple[KernelPolicy, ...]:
    """Policies that together match the packets of `policy`, and precede it.

    The kernel identifies a policy by selector, direction and mark, and charon by selector and direction. With
    one more bit in the mark's mask, once clear and once set, these are different policies for both. `block`:
    they drop. A policy that has every bit in its mask already, as `mark_out = 42` gives it, has one guard,
    which is another policy by the `user` of its selector (see `beside`).
    """
    mark = policy.mark or Mark(0, 0)
    free = ~mark.mask & _MARK_BITS
    base = policy.blocking() if block else policy
    base = replace(base, priority=max(policy.priority - 1, 0), index=0)
    if not free:
        return (replace(base, selector=replace(base.selector, user=GUARD)),)
    bit = 1 << (free.bit_length() - 1)
    return (
        replace(base, mark=Mark(mark.value & ~bit, mark.mask | bit)),
        replace(base, mark=Mark(mark.value | bit, mark.mask | bit)),
    )
