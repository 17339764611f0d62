"""How a mobile node gets to another gateway: told its address, relayed, or not at all. Pure.

A mobile node behind a NAT is reached by nobody to whom it has not sent before, as far as a gateway can know
(RFC 4787, 5: most NATs filter by address and port). charon tells whether there is a NAT; a mobile node that
has UDP encapsulation forced upon it looks the same.
"""

from __future__ import annotations

from collections.abc import Iterable

from ikectx.engine.ports import Address
from ikectx.errors import RefusedError
from ikectx.numbers import Mode, Status
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from ikectx.sa.relocate import same_host
from ikectx.wire.ikev2 import NATT_PORT
from ikectx.wire.profile import Told
from vici_bridge.vici.views import COND_NAT_THERE, EXT_MOBIKE, SaView

SPIS = (bytes.fromhex("c0000000"), bytes.fromhex("cfffffff"))
"""The SPIs that strongSwan gives to its inbound CHILD_SAs (charon.spi_min, charon.spi_max)."""
LARGEST = 4096
"""Packets in the largest replay window of Linux (XFRMA_REPLAY_ESN_MAX)."""
INSTEAD = "`--address keep` if the gateway's address moves along; else let the MN connect anew"


def wanted(context: IkeContext, to: str, wish: Address, relayed_by: str, *, kernel_esp: bool) -> Told:
    """The way to the gateway `to` that the operator wants, or the one that works. Errors: RefusedError.

    `relayed_by`: the gateway at whose address the mobile node stays. `kernel_esp`: charon has not forced UDP
    encapsulation itself; where it has, a NAT cannot be told from that, and with ESP in user space at both
    ends (kernel-libipsec, 5.9.8) SPIs are from no range.
    """
    if relayed_by and wish == "update":
        raise RefusedError(
            f"the MN is at {relayed_by}'s address, which relays it, so {to} cannot reach it itself",
            hint=f"`--address relay`, or move it back to {relayed_by}",
            status=Status.NOT_COVERED,
        )
    if wish != "auto":
        return "mn" if wish == "invite" else wish
    tells = kernel_esp and (behind_nat(context) or forgetful(context))
    if relayed_by or tells or not context.extensions & EXT_MOBIKE:
        return "relay"
    return "update"


def reason(context: IkeContext, to: str, relayed_by: str) -> str:
    """Why the mobile node is relayed, for the operator."""
    if relayed_by and relayed_by == to:
        return f"{to} relays it, and goes on by itself"
    if relayed_by:
        return f"{relayed_by} relays it"
    if behind_nat(context):
        told = "it is behind a NAT, which lets in answers only"
        maybe = " (if it only forces UDP encapsulation, `--address move` works)"
        return told + maybe if context.remote.port == NATT_PORT else told
    if not context.extensions & EXT_MOBIKE:
        return "it does not speak MOBIKE"
    if forgetful(context):
        return "its IKE_SA was rekeyed, after which libreswan does not go to a new address"
    return "as asked for"


def caution(context: IkeContext, way: Told) -> str:
    """What may go wrong at the mobile node when it is told another address, for the operator."""
    if way == "update" and any(child.inbound.window >= LARGEST for child in context.children):
        return (
            f"the replay window here has {LARGEST} packets: a mobile node that has so large a one, too, and "
            "strongSwan up to 5.9.11 does not survive a change of addresses (`--address relay` changes none)"
        )
    return ""


def behind_nat(context: IkeContext) -> bool:
    """Whether charon found a NAT before the mobile node."""
    return bool(context.conditions & COND_NAT_THERE)


def forgetful(context: IkeContext) -> bool:
    """Whether the mobile node may have forgotten that it speaks MOBIKE: its IKE_SA was rekeyed, and its SPIs
    are not from strongSwan's range.

    libreswan (4.10) forgets it, and answers the old gateway's address whatever it is told. charon reports no
    vendor ID. Another implementation that is taken for it is relayed, which works with any.
    """
    rekeyed = context.current.old_skd is not None
    return rekeyed and not any(SPIS[0] <= child.spi_out <= SPIS[1] for child in context.children)


def check_relay(context: IkeContext, views: Iterable[SaView], *, forwards: bool, able: bool) -> None:
    """Check that this gateway can relay the mobile node. Errors: RefusedError.

    `views`: charon's SAs. `forwards`: this host forwards packets of that IP version.
    """
    why, hint = _unfit(context, views, forwards=forwards, able=able)
    if why:
        raise RefusedError(f"the MN cannot be relayed: {why}", hint=hint, status=Status.NOT_COVERED)


def _unfit(context: IkeContext, views: Iterable[SaView], *, forwards: bool, able: bool) -> tuple[str, str]:
    if not able:
        return "this gateway cannot pass packets on", INSTEAD
    if not forwards:
        version = context.remote.address.version
        name = "net.ipv4.ip_forward" if version == 4 else "net.ipv6.conf.all.forwarding"
        return f"this host does not forward IPv{version}", f"sysctl -w {name}=1"
    for child in context.children:
        ends = [*child.local_ts, *child.remote_ts]
        outer = (context.local.address, context.remote.address)
        if child.mode is not Mode.TUNNEL or any(same_host(ts, end) for ts in ends for end in outer):
            return f"CHILD_SA {child.name} ends at this gateway's own address", INSTEAD
    other = _other(context, views)
    if other is not None:
        return (
            f"its other IKE_SA {other.name} #{other.unique_id} comes from the same address and port",
            "move that one by `--address keep`, or end it",
        )
    return "", ""


def _other(context: IkeContext, views: Iterable[SaView]) -> SaView | None:
    """Another SA of the same mobile node, whose packets look like those of this one."""
    name: SaName = context.spis
    return next((view for view in views if view.remote == context.remote and view.spis != name), None)
