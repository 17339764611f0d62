"""`Departure`: one SA that left this gateway: which gateway has it, how its packets follow, what is blocked.

Pure. A departure is stored as one JSON object, so that a later agent, and a person, can read it. Its stage is
a row of `STAGES`; `away` carries out what a stage means for the kernel.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import ip_address, ip_network
from typing import Any

from ikectx.errors import StoreError, reading
from ikectx.numbers import Mode
from ikectx.sa.context import Address, IkeContext
from ikectx.sa.name import SaName
from vici_bridge.kernel.nat_rule import NatRule, rule_from_json, rule_to_json
from vici_bridge.kernel.routes import text_of
from vici_bridge.kernel.xfrm import ALLOW, KernelPolicy
from vici_bridge.kernel.xfrm_parts import NO_LIMITS, NO_USAGE, Network
from vici_bridge.vici.views import COND_NAT_THERE, prefixes

OURS = int.from_bytes(b"IKEX")
"""The `user` of our policies' selectors. Linux compares it (two policies that differ in nothing else stand
side by side) and matches no packet by it (net/xfrm/xfrm_policy.c: selector_cmp, xfrm_selector_match)."""
SENT = int.from_bytes(b"IKEA")
"""The same of policies that let packets leave: with one `user`, one of these would take the place of the
block for packets without a mark, which names a device as well."""
BLOCK_PRIORITY = 0xFFFFFFFF
"""The least important priority: any policy that charon installs for the same packets precedes it."""
ALLOW_PRIORITY = BLOCK_PRIORITY - 1
_SECURITY_LABEL = 8
"""XFRMA_SEC_CTX: the only attribute that limits a policy's packets and that we do not interpret."""
_VERSION = 1


class Stage(StrEnum):
    """The stage of a departure. See `SENT_ON` for those in which packets are sent on."""

    LEAVING = "leaving"
    """This gateway has let go of the SA, or is about to, and may take it back."""
    HANDED = "handed"
    """The same, at once and unprepared: the other gateway may send packets here until it says otherwise."""
    AWAY = "away"
    """Another gateway serves the SA."""
    COMING = "coming"
    """The SA is being taken in here again: the other gateway sends packets here as soon as it has let go."""
    WAITING = "waiting"
    """The SA was to come, and did not: only the gateway that has it can report that it sends no packets
    here."""
    ENDED = "ended"
    """No gateway serves the SA: packets for the mobile node that still arrive are dropped."""


SENT_ON = frozenset({Stage.LEAVING, Stage.AWAY})
"""Stages in which packets are sent on. In all others two gateways might send packets to each other."""


class News(StrEnum):
    """Events of a departure."""

    LEFT = "left"
    """The other gateway has confirmed that it serves the SA."""
    HERE = "here"
    """The gateway that the SA was given to has it."""
    READY = "ready"
    """The other gateway can send the SA's ESP, and sends no packets here."""
    MOVED = "moved"
    """A further gateway has the SA."""
    ENDS = "ends"
    """The SA is gone, or the operator wants no packets to be sent on."""
    COMES = "comes"
    """The SA is being taken in here."""
    STAYS = "stays"
    """The SA was being taken in here, and is not any more."""


STAGES: Mapping[tuple[Stage, News], Stage] = {
    (Stage.LEAVING, News.LEFT): Stage.AWAY,
    (Stage.LEAVING, News.READY): Stage.LEAVING,
    (Stage.LEAVING, News.HERE): Stage.LEAVING,
    (Stage.LEAVING, News.MOVED): Stage.LEAVING,
    (Stage.LEAVING, News.ENDS): Stage.ENDED,
    (Stage.LEAVING, News.COMES): Stage.COMING,
    (Stage.LEAVING, News.STAYS): Stage.LEAVING,
    (Stage.HANDED, News.LEFT): Stage.AWAY,
    (Stage.HANDED, News.READY): Stage.LEAVING,
    (Stage.HANDED, News.HERE): Stage.HANDED,
    (Stage.HANDED, News.MOVED): Stage.HANDED,
    (Stage.HANDED, News.ENDS): Stage.ENDED,
    (Stage.HANDED, News.COMES): Stage.COMING,
    (Stage.HANDED, News.STAYS): Stage.HANDED,
    (Stage.AWAY, News.LEFT): Stage.AWAY,
    (Stage.AWAY, News.READY): Stage.AWAY,
    (Stage.AWAY, News.HERE): Stage.AWAY,
    (Stage.AWAY, News.MOVED): Stage.AWAY,
    (Stage.AWAY, News.ENDS): Stage.ENDED,
    (Stage.AWAY, News.COMES): Stage.COMING,
    (Stage.AWAY, News.STAYS): Stage.AWAY,
    # this event belongs to the time before the SA began to come
    (Stage.COMING, News.LEFT): Stage.COMING,
    (Stage.COMING, News.READY): Stage.COMING,
    (Stage.COMING, News.HERE): Stage.COMING,
    (Stage.COMING, News.MOVED): Stage.COMING,
    (Stage.COMING, News.ENDS): Stage.ENDED,
    (Stage.COMING, News.COMES): Stage.COMING,
    (Stage.COMING, News.STAYS): Stage.WAITING,
    (Stage.WAITING, News.LEFT): Stage.WAITING,
    (Stage.WAITING, News.READY): Stage.WAITING,
    (Stage.WAITING, News.HERE): Stage.AWAY,
    (Stage.WAITING, News.MOVED): Stage.AWAY,
    (Stage.WAITING, News.ENDS): Stage.ENDED,
    (Stage.WAITING, News.COMES): Stage.COMING,
    (Stage.WAITING, News.STAYS): Stage.WAITING,
    # a mobile node may return to the gateway that it left without any notice
    (Stage.ENDED, News.LEFT): Stage.ENDED,
    (Stage.ENDED, News.READY): Stage.ENDED,
    (Stage.ENDED, News.HERE): Stage.AWAY,
    (Stage.ENDED, News.MOVED): Stage.AWAY,
    (Stage.ENDED, News.ENDS): Stage.ENDED,
    (Stage.ENDED, News.COMES): Stage.COMING,
    (Stage.ENDED, News.STAYS): Stage.ENDED,
}


@dataclass(frozen=True, slots=True)
class Departure:
    """One SA that left.

    `sa`: its name when it left. `mn`: the mobile node's identity. `peer`: the gateway that it was given to,
    the only one whose notices about it count; empty if an older agent did not store it. `at`: the gateway
    that has it, as far as known. `epoch`: the first in which it was not ours. `since`: seconds since 1970.
    `prefixes`: the mobile node's addresses that may be sent on; `led`: those to which there is a way now,
    `via` these addresses. `blocks`: policies that drop the packets that the SA protected; `allows`: those
    before them, for packets that are sent on. `closed`: prefixes with an unreachable route, because policies
    have no effect: ESP is in user space, or the way to the other gateway leads through the device by which
    packets leave anyway. `relay`: the mobile node stays at this gateway's address, and its packets are passed
    on; `guests`: other places from which it has sent since, and `known_as`: its name at the other gateway, if
    that is another one. `policies`: those that led packets to the SA here, and went with it: the
    operator's own (`policies = no`) are put back when the SA is here again.
    """

    sa: SaName
    mn: str
    peer: str
    at: str
    epoch: int
    since: float
    stage: Stage = Stage.AWAY
    prefixes: tuple[str, ...] = ()
    led: tuple[str, ...] = ()
    via: tuple[Address, ...] = ()
    blocks: tuple[KernelPolicy, ...] = ()
    allows: tuple[KernelPolicy, ...] = ()
    closed: tuple[str, ...] = ()
    relay: NatRule | None = None
    guests: tuple[NatRule, ...] = ()
    known_as: SaName | None = None
    policies: tuple[KernelPolicy, ...] = ()

    @property
    def key(self) -> str:
        """Its key in the store."""
        return self.sa.key

    @property
    def inside(self) -> set[Network]:
        """The networks from which packets to the mobile node were protected."""
        return {block.source for block in self.blocks}

    @property
    def outer(self) -> Address | None:
        """The mobile node's outer address when it left; None: no policy names it."""
        ends = (template.destination for policy in self.policies for template in policy.templates)
        return next((end for end in ends if not end.is_unspecified), None)

    @property
    def names(self) -> frozenset[str]:
        """The names by which it is looked up: its mobile node, and the mobile node's prefixes."""
        blocked = (str(policy.destination) for policy in self.blocks)
        return frozenset((self.mn, *self.prefixes, *self.closed, *blocked))

    @property
    def sent_on(self) -> tuple[str, ...]:
        """The prefixes that are sent on now."""
        if self.stage not in SENT_ON:
            return ()
        return self.led if self.peer else self.prefixes

    @property
    def passed_on(self) -> NatRule | None:
        """The relay now. ESP is passed on once the other gateway serves the SA, because it is decrypted here
        until then; IKE from the moment that charon here is mute."""
        if self.relay is None or self.stage in (Stage.HANDED, Stage.ENDED):
            return None
        return replace(self.relay, esp=self.stage is not Stage.LEAVING)

    @property
    def rules(self) -> dict[str, NatRule]:
        """What is passed on now, by a key for each."""
        now = self.passed_on
        return {} if now is None else self.places | {self.key: now}

    @property
    def places(self) -> dict[str, NatRule]:
        """From where the mobile node's packets are passed on while they are, by the same keys."""
        if self.relay is None:
            return {}
        return {self.key: self.relay} | {f"{self.key} {guest.port}": guest for guest in self.guests}

    def told(self, news: News) -> Departure:
        """The departure after this event, see `STAGES`."""
        return replace(self, stage=STAGES[self.stage, news])

    def without(self, who: str, used: Iterable[tuple[Sequence[Network], Sequence[Network]]]) -> Departure:
        """The rest of it when the mobile node `who` has CHILD_SAs here with these selectors.

        `used`: (our networks, the mobile node's) of each. An address may have been given to another mobile
        node: then the selector is the same. A wider selector counts only if it is the same node's, because
        each connection to a gateway of a route-based VPN has 0.0.0.0/0.
        """
        children = list(used)
        theirs = [network for _, remote in children for network in remote]
        same = who == self.mn
        left = replace(
            self,
            prefixes=tuple(p for p in self.prefixes if not _used(ip_network(p), theirs, same)),
            led=tuple(p for p in self.led if not _used(ip_network(p), theirs, same)),
            closed=tuple(p for p in self.closed if not _used(ip_network(p), theirs, same)),
            blocks=tuple(p for p in self.blocks if not _covered(p, children, same)),
            allows=tuple(p for p in self.allows if not _covered(p, children, same)),
        )
        return replace(left, relay=None, guests=()) if same and left != self else left

    @property
    def empty(self) -> bool:
        """Nothing is sent on or blocked, so there is no reason to keep it."""
        return not (self.prefixes or self.blocks or self.closed or self.relay)

    def dumps(self) -> bytes:
        """The stored form."""
        return json.dumps(
            {
                "version": _VERSION,
                "sa": self.sa.pair,
                "mn": self.mn,
                "peer": self.peer,
                "at": self.at,
                "epoch": self.epoch,
                "since": self.since,
                "stage": str(self.stage),
                "prefixes": self.prefixes,
                "led": self.led,
                "via": [text_of(address) for address in self.via],
                "blocks": [policy.raw.hex() for policy in self.blocks],
                "allows": [policy.raw.hex() for policy in self.allows],
                "closed": self.closed,
                "relay": None if self.relay is None else rule_to_json(self.relay),
                "guests": [rule_to_json(guest) for guest in self.guests],
                "known_as": None if self.known_as is None else self.known_as.key,
                "policies": [policy.raw.hex() for policy in self.policies],
            }
        ).encode()

    @classmethod
    def loads(cls, key: str, raw: bytes) -> Departure:
        """Read what `dumps` wrote, or the list of prefixes that agents before this format stored under `key`.

        Errors: StoreError.
        """
        with reading(f"the departure {key}"):
            found: Any = json.loads(raw)
            if isinstance(found, list):
                sa = SaName.from_key(key)
                return cls(sa, "", "", "", 0, 0.0, prefixes=tuple(map(str, found)))
            if found["version"] != _VERSION:
                raise StoreError(
                    f"the departure {key} is of version {found['version']}, this agent knows {_VERSION}",
                    hint="it was stored by a newer ikectx; run that one",
                )
            return cls(
                sa=SaName.from_pair(found["sa"]),
                mn=found["mn"],
                peer=found["peer"],
                at=found["at"],
                epoch=found["epoch"],
                since=found["since"],
                stage=Stage(found["stage"]),
                prefixes=tuple(found["prefixes"]),
                led=tuple(found["led"]),
                via=tuple(ip_address(text) for text in found["via"]),
                blocks=tuple(KernelPolicy.parse(bytes.fromhex(text)) for text in found["blocks"]),
                allows=tuple(KernelPolicy.parse(bytes.fromhex(text)) for text in found["allows"]),
                closed=tuple(found["closed"]),
                relay=rule_from_json(found["relay"]) if found.get("relay") else None,
                guests=tuple(rule_from_json(one) for one in found.get("guests", ())),
                known_as=SaName.from_key(found["known_as"]) if found.get("known_as") else None,
                policies=tuple(KernelPolicy.parse(bytes.fromhex(text)) for text in found.get("policies", ())),
            )

    def to_json(self) -> dict[str, object]:
        """For operators, as plain JSON values."""
        return {
            "sa": self.sa.pair,
            "mn": self.mn,
            "stage": str(self.stage),
            "at": self.at,
            "given_to": self.peer,
            "epoch": self.epoch,
            "since": self.since,
            "prefixes": list(self.sent_on),
            "via": [str(address) for address in self.via] if self.sent_on else [],
            "relayed": None if self.passed_on is None else str(self.passed_on.mn),
            "blocked": [f"{p.source} -> {p.destination}" for p in self.blocks] + list(self.closed),
        }


def block_of(policy: KernelPolicy) -> KernelPolicy:
    """The policy that drops the packets that `policy` protected, once no policy of charon's matches them any
    more.

    charon neither finds nor replaces it, because the selector's `user` makes it another policy. It outlives
    the SA, and its priority lets any policy that charon installs for the same packets precede it.
    """
    return replace(
        policy.blocking(),
        selector=replace(policy.selector, user=OURS),
        priority=BLOCK_PRIORITY,
        index=0,
        limits=NO_LIMITS,
        usage=NO_USAGE,
        extra=tuple(pair for pair in policy.extra if pair[0] == _SECURITY_LABEL),
    )


def bare_blocks(block: KernelPolicy, context: IkeContext, device: int) -> list[KernelPolicy]:
    """Policies that drop the same packets where they have no mark or if_id, for a block with one.

    The device that gives it to them (VTI, XFRM interface) may go with the SA, by an updown script. Then they
    would leave by the device towards the mobile node, that of index `device`, in the clear. The mobile node's
    own addresses only, because the selectors of such an SA may be everything.
    """
    if not device or (block.mark is None and not block.if_id):
        return []
    own = [ip_network(text) for text in (*detourable(context), *map(str, context.remote_vips))]
    return [
        replace(
            block,
            selector=replace(
                block.selector,
                ifindex=device,
                destination=network.network_address,
                destination_prefix=network.prefixlen,
            ),
            mark=None,
            if_id=0,
        )
        for network in dict.fromkeys(own)
        if network.prefixlen and within(network, block.destination)
    ]


def allow_of(block: KernelPolicy, device: int) -> KernelPolicy:
    """The policy that lets packets that `block` drops leave by the device of that index."""
    selector = replace(block.selector, ifindex=device, user=SENT)
    return replace(block, selector=selector, action=ALLOW, priority=ALLOW_PRIORITY)


def detourable(context: IkeContext) -> list[str]:
    """Prefixes of the mobile node that may be sent on to the other gateway.

    The mobile node's own outer address is left out if it carries more than this SA: in transport mode the
    tunnel ends at this gateway itself, and behind a NAT other mobile nodes have the same address.
    """
    shared = bool(context.conditions & COND_NAT_THERE)
    return [
        prefix
        for child in context.children
        for prefix in prefixes(child.remote_ts)
        if context.remote.address not in ip_network(prefix)
        or (child.mode is not Mode.TRANSPORT and not shared)
    ]


def _used(prefix: Network, used: Iterable[Network], same: bool) -> bool:
    return any(
        (prefix == network and prefix.prefixlen > 0) or (same and within(prefix, network)) for network in used
    )


def _covered(
    policy: KernelPolicy, children: Iterable[tuple[Sequence[Network], Sequence[Network]]], same: bool
) -> bool:
    return any(
        _used(policy.destination, remote, same) and any(within(policy.source, ours) for ours in local)
        for local, remote in children
    )


def within(inner: Network, outer: Network) -> bool:
    """Whether one network is part of the other; those of different IP versions never are."""
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]
