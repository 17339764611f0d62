"""`hushing`: policies that drop packets for a mobile node while charon installs its SA. Pure.

charon's new outbound ESP SA begins at sequence number 1, under a key with which another gateway has sent as
many and more. Packets may reach this gateway already: by the network's routes, or sent on by that gateway.
So they are dropped until the numbers are written. These policies precede charon's, which neither finds nor
replaces them because of the `user` of their selectors. They stay if the agent dies before that: the next one
removes them when charon has dropped the SA.

Without a mark or an if_id there is none for a network that has the mobile node's outer address in it, or
every address, because it would cut off others.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

from ikectx.sa.context import NO_TAGS, IkeContext, TrafficSelector
from vici_bridge.kernel.xfrm import BLOCK, KernelPolicy
from vici_bridge.kernel.xfrm_parts import NO_LIMITS, KernelLimits, Mark, Network, Selector

HUSH = int.from_bytes(b"IKEH")
"""The `user` of the selectors of those that `prepare` installs."""


def hushing(here: IkeContext, user: int, limits: KernelLimits = NO_LIMITS) -> list[KernelPolicy]:
    """The policies for all children of the SA, as it is here. Marks and if_ids are those of the gateway that
    gives it, because those of this one are not known before charon has installed it."""
    outer = (here.local.address, here.remote.address)
    found: dict[bytes, KernelPolicy] = {}
    for child in here.children:
        mark, if_id = child.tags.outbound
        for ours in map(_enclosing, child.local_ts):
            for theirs in map(_enclosing, child.remote_ts):
                narrow = theirs.prefixlen and not any(address in theirs for address in outer)
                if ours.version == theirs.version and (narrow or child.tags.outbound != NO_TAGS.outbound):
                    policy = KernelPolicy(
                        "out",
                        replace(Selector.between(ours, theirs), user=user),
                        action=BLOCK,
                        mark=Mark(*mark) if mark != NO_TAGS.mark_out else None,
                        if_id=if_id,
                        limits=limits,
                    )
                    found[policy.raw] = policy
    return list(found.values())


def _enclosing(selector: TrafficSelector) -> Network:
    """The network that charon makes of a range of addresses."""
    first, last = int(selector.start), int(selector.end)
    size = selector.start.max_prefixlen
    return ip_network((selector.start, size - (first ^ last).bit_length()), strict=False)
