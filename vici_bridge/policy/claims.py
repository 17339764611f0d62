"""Checks that an SA that comes in is one that charon here would have negotiated itself. Pure.

charon takes any SA over the ha socket. So the rules that charon applies to a peer when it negotiates are
applied to a context here: RFC 4301, 4.4.3 (which identity may have which selectors) and RFC 7296, 2.9
(selectors within the policy). Only this gateway's own configuration counts; the context's own claims (its
peer entry, its authentication methods) do not. Properties that a context does not show are not checked: the
certificate, and so `cacerts` and `groups`, and the first of several authentication rounds.

Each check has a status of its own, and says its reason in words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from ikectx.numbers import Fpt, Status
from ikectx.sa.context import (
    Address,
    ChildContext,
    IkeContext,
    IkeGeneration,
    TrafficSelector,
)
from ikectx.sa.relocate import same_host
from ikectx.sa.verdict import Verdict
from ikectx.wire.identity import allows

from .allowed import AllowedChild, AllowedConnection, AllowedSelector, Range, Rules, Surroundings
from .proposals import ConfiguredProposal, below_floor

MAX_CHILDREN = 64
MAX_OF_ONE_CHILD = 16
"""CHILD_SAs, in all and of one name: a peer may make one several times, and a rekey replaces it."""
MAX_GENERATIONS = 16
"""IKE_SAs of a chain of rekeys; an ancestor is included only as long as a child has its keys from there."""
MAX_SELECTORS = 255
"""Traffic selectors of one side of a CHILD_SA: as many as a TS payload has (RFC 7296, 3.13). charon's
`ha.buflen` allows fewer."""
MID_END = (1 << 32) - (1 << 16)
"""From this message ID on an SA is not taken, because its IDs must not run out here (RFC 7296, 2.2)."""
RESERVED_ESP_SPIS = 255
"""RFC 4303, 2.1: 0 is for local use, 1 to 255 are IANA's."""
IKE_PORTS = (500, 4500)
FIRST_FREE_PORT = 1024
"""A NAT gives a port from here on to a mobile node whose own is 4500 (RFC 4787, REQ-3)."""
_CLOCKS = 2
"""Seconds by which a lifetime may be longer, because it is sent in whole seconds, and charon's clock
differs."""


def check_policy(
    context: IkeContext, allowed: AllowedConnection, rules: Rules, pools: Iterable[Range], place: Surroundings
) -> list[Verdict]:
    """All checks below. `context`: the SA as it would be here; `pools`: the addresses of all of charon's
    pools.

    Children whose names the connection does not have are passed over; `check_names` refuses them. If there is
    too much of something nothing else is looked at, because that takes as long as a peer likes.
    """
    if too_much := list(check_bounds(context)):
        return too_much
    return [
        *check_identities(context, allowed, rules),
        *check_outer(context, allowed, place),
        *check_virtual_ips(context, rules.virtual_ips or tuple(pools), place),
        *check_traffic(context, allowed, place),
        *check_modes(context, allowed),
        *check_algorithms(context, allowed, rules),
        *check_spis(context),
        *check_counters(context),
        *check_lifetimes(context, allowed),
    ]


# Who.


def check_identities(context: IkeContext, allowed: AllowedConnection, rules: Rules) -> Iterator[Verdict]:
    """The identities of both ends against the connection's last rounds, because an SA shows the identities of
    those.

    A round's identity is the one of its IDi (RFC 4739, 3), and charon keeps the last for the SA, as with EAP
    identities. If a round of EAP asks for none, the method may have brought one (eap-mschapv2 does).
    """
    wanted = allowed.remote[-1].id if allowed.remote else ""
    if not allows(wanted, context.remote_id):
        yield Verdict(
            Fpt.PAD,
            Status.IDENTITY,
            f"the mobile node's identity is {context.remote_id}, connection {allowed.name} asks for {wanted}",
        )
    eap = [each for each in allowed.remote[-1:] if each.eap]
    own = context.remote_eap_id or context.remote_id
    if eap and not allows(eap[-1].eap_id, own):
        yield Verdict(
            Fpt.PAD,
            Status.IDENTITY,
            f"the mobile node's EAP identity is {own}, connection {allowed.name} asks for {eap[-1].eap_id}",
        )
    if not eap and own != context.remote_id:
        yield Verdict(
            Fpt.PAD,
            Status.IDENTITY,
            f"the SA has an EAP identity ({own}), connection {allowed.name} has no EAP",
        )
    ours = (allowed.local[-1].id if allowed.local else "", *rules.local_ids)
    if not any(allows(each, context.local_id) for each in ours):
        yield Verdict(
            Fpt.PAD,
            Status.IDENTITY,
            f"the gateway's identity in the SA is {context.local_id}, here connection {allowed.name} has "
            f"{ours[0]}: name it in local_ids of [connections.{allowed.name}]",
        )


# Where.


def check_outer(context: IkeContext, allowed: AllowedConnection, place: Surroundings) -> Iterator[Verdict]:
    """The mobile node's outer address and port: those that a mobile node can have."""
    address, port = context.remote.address, context.remote.port
    reserved = address.version == 4 and address.is_reserved  # with the broadcast address
    unfit = (
        (address.is_multicast, "a multicast address"),
        (address.is_unspecified or (address.version == 4 and address.packed[0] == 0), "no address"),
        (address.is_loopback, "a loopback address"),
        (reserved, "a reserved address"),
        (address.version == 6 and address.is_link_local, "a link-local address"),
        (address.version == 6 and address.ipv4_mapped is not None, "an IPv4 address written as IPv6"),
        (address in place.own, "an address of this gateway"),
        (address in place.peers, "an address of a peer gateway"),
    )
    for holds, what in unfit:
        if holds:
            yield Verdict(
                Fpt.IKEV2_SA, Status.MN_ADDRESS, f"the mobile node's outer address {address} is {what}"
            )
            break
    if port < FIRST_FREE_PORT and port not in (*IKE_PORTS, allowed.remote_port):
        yield Verdict(
            Fpt.IKEV2_SA, Status.MN_ADDRESS, f"the mobile node's port {port} is none that IKE or a NAT uses"
        )


def check_virtual_ips(context: IkeContext, ranges: Iterable[Range], place: Surroundings) -> Iterator[Verdict]:
    """Virtual IPs: they must be ones that can be assigned here, and no gateway's."""
    given = tuple(ranges)
    for vip in context.remote_vips:
        if vip in place.own | place.peers:
            yield Verdict(
                Fpt.IKEV2_SA, Status.VIP_NOT_ALLOWED, f"virtual IP {vip} is an address of a gateway"
            )
        elif not any(vip in each for each in given):
            yield Verdict(
                Fpt.IKEV2_SA,
                Status.VIP_NOT_ALLOWED,
                f"virtual IP {vip} is in no pool here ({_listed(given)}): name what mobile nodes may have in "
                f"virtual_ips of [connections.{context.connection}]",
            )


def check_traffic(context: IkeContext, allowed: AllowedConnection, place: Surroundings) -> Iterator[Verdict]:
    """Each traffic selector must be within one of the child here; "dynamic" means the host's addresses.

    Those are its virtual IPs, else its outer address. Addresses of the gateway, and behind it, are refused
    for the mobile node, unless `remote_ts` has them, or a pool assigns the address.
    """
    for child in context.children:
        mine = allowed.children.get(child.name)
        if mine is None:
            continue
        far = context.remote_vips or (context.remote.address,)
        for selector in child.local_ts:
            if not _inside(selector, mine.local_ts, (context.local.address,)):
                yield _outside(child, mine, selector, "local")
        for selector in child.remote_ts:
            if not _inside(selector, mine.remote_ts, far):
                yield _outside(child, mine, selector, "remote")
                continue
            why = _reaches_inside(selector, context, mine, place)
            if why:
                yield Verdict(
                    Fpt.SPD, Status.SELECTORS, f"{child.name}: the mobile node's {_shown(selector)} {why}"
                )


def _reaches_inside(
    selector: TrafficSelector, context: IkeContext, mine: AllowedChild, place: Surroundings
) -> str:
    """Why packets of others would go to the mobile node; empty: they would not, or `remote_ts` permits it."""
    whole = Range(selector.start, selector.end)
    if _named(selector, mine):
        return ""
    hit = next((each for each in (*place.own, *place.peers) if each in whole), None)
    if hit is not None:
        return f"has an address of a gateway, {hit}"
    if _virtual_ip(selector, context):
        return ""
    near = next((each for each in place.inside if each.overlaps(whole)), None)
    return "" if near is None else f"has addresses of a network behind this gateway, {near}"


def depends_on_inside(context: IkeContext, allowed: AllowedConnection) -> bool:
    """Whether it matters which networks are behind this gateway: the mobile node has a selector that
    `remote_ts` does not name, and that is none of its virtual IPs."""
    children = ((child, allowed.children.get(child.name)) for child in context.children)
    return any(
        not _named(selector, mine) and not _virtual_ip(selector, context)
        for child, mine in children
        if mine is not None
        for selector in child.remote_ts
    )


def _named(selector: TrafficSelector, mine: AllowedChild) -> bool:
    """Whether `remote_ts` has these addresses, and not only as a part of all addresses."""
    whole = Range(selector.start, selector.end)
    ranges = (each.range for each in mine.remote_ts)
    literal = (each for each in ranges if each is not None and each.covers(selector))
    return any(each == whole or not each.everything for each in literal)


def _virtual_ip(selector: TrafficSelector, context: IkeContext) -> bool:
    return any(same_host(selector, vip) for vip in context.remote_vips)


def _outside(child: ChildContext, mine: AllowedChild, selector: TrafficSelector, side: str) -> Verdict:
    ours = _listed(each.text for each in (mine.local_ts if side == "local" else mine.remote_ts))
    return Verdict(
        Fpt.SPD, Status.SELECTORS, f"{child.name}: {_shown(selector)} is not in its {side}_ts here ({ours})"
    )


def _inside(selector: TrafficSelector, ours: Iterable[AllowedSelector], hosts: Iterable[Address]) -> bool:
    if selector.start > selector.end:  # type: ignore[operator]  # one family, see TrafficSelector
        return False
    return any(
        each.limits(selector)
        and (
            any(same_host(selector, host) for host in hosts)
            if each.range is None
            else each.range.covers(selector)
        )
        for each in ours
    )


def _shown(selector: TrafficSelector) -> str:
    ports = f"{selector.start_port}-{selector.end_port}"
    limits = (
        f" (protocol {selector.protocol}, ports {ports})" if selector.protocol or ports != "0-65535" else ""
    )
    return f"{Range(selector.start, selector.end)}{limits}"


def _listed(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items) or "none"


# How.


def check_modes(context: IkeContext, allowed: AllowedConnection) -> Iterator[Verdict]:
    """The mode of each CHILD_SA: the child's, or tunnel mode, to which charon falls back."""
    for child in context.children:
        mine = allowed.children.get(child.name)
        if mine is not None and child.mode not in mine.modes:
            wanted = _listed(sorted(mode.name for mode in mine.modes))
            yield Verdict(
                Fpt.SAD, Status.MODE, f"{child.name} is in mode {child.mode.name}, allowed here: {wanted}"
            )


def check_algorithms(context: IkeContext, allowed: AllowedConnection, rules: Rules) -> Iterator[Verdict]:
    """The operator's proposals if there are some, else charon's, else the floor; ancestors of the IKE_SA,
    too."""
    where = f"[connections.{context.connection}]"
    ike = rules.ike or allowed.ike
    for one in context.generations:
        why = _unproposed(ike) if ike else below_floor(one.encr, one.integ, one.prf)
        if why and not any(each.has_ike(one) for each in ike):
            has = f"{_cipher(one)}, {one.integ.name}, {one.prf.name}, {one.ke.name}"
            yield Verdict(
                Fpt.IKEV2_SA, Status.PROPOSAL, f"the IKE_SA has {has}: {why} (ike_proposals of {where})"
            )
    for child in context.children:
        mine = allowed.children.get(child.name)
        esp = rules.esp or (() if mine is None else mine.esp)
        why = _unproposed(esp) if esp else below_floor(child.encr, child.integ)
        if why and not any(each.has_esp(child) for each in esp):
            has = f"{_cipher(child)}, {child.integ.name}, {child.ke.name}{', ESN' if child.esn else ''}"
            yield Verdict(
                Fpt.SAD, Status.PROPOSAL, f"{child.name} has {has}: {why} (esp_proposals of {where})"
            )


def _cipher(sa: IkeGeneration | ChildContext) -> str:
    return f"{sa.encr.name}/{sa.encr_bits}" if sa.encr_bits else sa.encr.name


def _unproposed(proposals: Iterable[ConfiguredProposal]) -> str:
    return f"not among {_listed(proposals)}"


def check_spis(context: IkeContext) -> Iterator[Verdict]:
    """Reserved SPIs, and one SPI for two SAs of a direction."""
    for one in context.generations:
        if not any(one.spi_i) or not any(one.spi_r):
            yield Verdict(Fpt.IKEV2_SA, Status.SPIS, "an IKE SPI is 0, which is that of no IKE_SA")
    for child in context.children:
        for way, spi in (("inbound", child.spi_in), ("outbound", child.spi_out)):
            if int.from_bytes(spi) <= RESERVED_ESP_SPIS:
                yield Verdict(
                    Fpt.SAD,
                    Status.SPIS,
                    f"{child.name}: {way} SPI {spi.hex()} is reserved (0 to {RESERVED_ESP_SPIS})",
                )
    for way, spis in (
        ("inbound", Counter(child.spi_in for child in context.children)),
        ("outbound", Counter(child.spi_out for child in context.children)),
    ):
        for spi, count in spis.items():
            if count > 1:
                yield Verdict(Fpt.SAD, Status.SPIS, f"{count} CHILD_SAs have the {way} SPI {spi.hex()}")
    names = Counter((one.spi_i, one.spi_r) for one in context.generations)
    if any(count > 1 for count in names.values()):
        yield Verdict(Fpt.IKEV2_SA, Status.SPIS, "an IKE_SA has the SPIs of the one that it was rekeyed from")


# How much.


def check_counters(context: IkeContext) -> Iterator[Verdict]:
    """Message IDs that are nearly used up."""
    for whose, number in (("our", context.mid_initiator), ("the MN's", context.mid_responder)):
        if number >= MID_END:
            yield Verdict(
                Fpt.IKEV2_SA,
                Status.NUMBERS_SPENT,
                f"message ID {number} of {whose} next request is at the end: rekey the IKE_SA",
            )


def check_lifetimes(context: IkeContext, allowed: AllowedConnection) -> Iterator[Verdict]:
    """Time left until a rekey: not negative, and no more than the connection gives."""
    for what, left, most in (
        ("rekeying", context.lifetime.rekey, allowed.rekey),
        ("reauthentication", context.lifetime.reauth, allowed.reauth),
        ("its end", context.lifetime.hard, 0),
    ):
        if why := _beyond(left, most):
            yield Verdict(Fpt.IKEV2_SA, Status.LIFETIME, f"the IKE_SA has {left} s until {what}, {why}")
    for child in context.children:
        mine = allowed.children.get(child.name)
        limits = child.lifetime
        for what, left, most in (
            ("rekeying", limits.rekey, 0 if mine is None else mine.rekey),
            ("its end", limits.hard, 0),
        ):
            if why := _beyond(left, most):
                yield Verdict(Fpt.SAD, Status.LIFETIME, f"{child.name} has {left} s until {what}, {why}")
        counts = (limits.bytes_limit, limits.packets_limit, limits.bytes_used, limits.packets_used)
        if any(count is not None and count < 0 for count in counts):
            yield Verdict(
                Fpt.SAD, Status.LIFETIME, f"{child.name} has a negative limit or count of packets or octets"
            )


def _beyond(left: int | None, most: int) -> str:
    """`most` 0: there is no limit here."""
    if left is None:
        return ""
    if left < 0:
        return "which cannot be"
    return f"the connection here gives {most} s" if most and left > most + _CLOCKS else ""


def check_bounds(context: IkeContext) -> Iterator[Verdict]:
    """How many IKE_SAs of a chain, CHILD_SAs and selectors there are."""
    if len(context.generations) > MAX_GENERATIONS:
        yield Verdict(
            Fpt.IKEV2_SA,
            Status.TOO_MUCH,
            f"{len(context.generations)} IKE_SAs in a chain are more than {MAX_GENERATIONS}",
        )
    if len(context.children) > MAX_CHILDREN:
        yield Verdict(
            Fpt.SAD, Status.TOO_MUCH, f"{len(context.children)} CHILD_SAs are more than {MAX_CHILDREN}"
        )
    for name, count in Counter(child.name for child in context.children).items():
        if count > MAX_OF_ONE_CHILD:
            yield Verdict(
                Fpt.SAD, Status.TOO_MUCH, f"{count} CHILD_SAs named {name} are more than {MAX_OF_ONE_CHILD}"
            )
    most = max((max(len(child.local_ts), len(child.remote_ts)) for child in context.children), default=0)
    if most > MAX_SELECTORS:
        yield Verdict(
            Fpt.SPD, Status.TOO_MUCH, f"{most} traffic selectors on one side are more than {MAX_SELECTORS}"
        )
