"""Policies that stand beside charon's for a while: packets that they match wait, or go by another SA.

They have the selector of charon's policy but for its `user`, which Linux compares and does not match packets
by, so they are others for charon, as blocks are (`vici_bridge.away.departures`).
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path

from ikectx.errors import KernelError
from vici_bridge.kernel.kernel import Kernel
from vici_bridge.kernel.xfrm import KernelPolicy, KernelSa
from vici_bridge.kernel.xfrm_parts import KernelLimits

log = logging.getLogger(__name__)

WANTED = 0x494B0000
"""The reqid that no SA has: packets of a policy that asks for it wait, up to 100 (net.core.xfrm_larval_drop).
Those that follow, up to `WANTED` | 0xFFFF, are of early pairs; charon counts from 1."""
LARVAL_DROP = Path("/proc/sys/net/core/xfrm_larval_drop")
"""Of the network namespace: 1 drops packets of a policy whose SA is not there yet, 0 keeps up to 100."""
_DECOY_SPI = bytes.fromhex("000000fe")
"""Reserved by IANA and never negotiated (RFC 4303, 2.1)."""


def keep_packets() -> None:
    """Have the kernel keep packets of a policy whose SA is not there yet, instead of dropping them."""
    try:
        if LARVAL_DROP.read_text().strip() != "0":  # a unit may have set it, and forbid the agent to
            LARVAL_DROP.write_text("0\n")
    except OSError as error:
        log.warning("packets of SAs on the move are dropped, not held: %s: %s", LARVAL_DROP, error.strerror)


def beside(policy: KernelPolicy, user: int, reqid: int, limits: KernelLimits, priority: int) -> KernelPolicy:
    """The policy under another name, for SAs of that reqid."""
    return replace(
        policy,
        selector=replace(policy.selector, user=user),
        templates=tuple(replace(template, reqid=reqid) for template in policy.templates),
        priority=min(priority, 0xFFFFFFFF),
        limits=limits,
        index=0,
    )


def held_back(policy: KernelPolicy) -> KernelPolicy:
    """The policy while its packets wait."""
    return replace(
        policy, templates=tuple(replace(one, reqid=WANTED, spi=bytes(4)) for one in policy.templates)
    )


def led_to(policy: KernelPolicy, sa: KernelSa) -> KernelPolicy:
    """The policy with templates for that SA. Packets that waited go first."""
    return replace(
        policy,
        templates=tuple(
            replace(one, reqid=sa.reqid, source=sa.source, destination=sa.destination)
            for one in policy.templates
        ),
    )


def forget_wanted(kernel: Kernel, policy: KernelPolicy, outbound: KernelSa) -> None:
    """Remove the kernel's note of an SA that packets held back by `policy` want. It goes when an SA comes
    that fits."""
    template = policy.templates[0]
    decoy = replace(
        outbound,
        spi=_DECOY_SPI,
        source=template.source,
        destination=template.destination,
        reqid=WANTED,
        replay=replace(outbound.replay, oseq=0),
    )
    with contextlib.suppress(KernelError):
        kernel.batch([decoy.add(), decoy.delete()])
