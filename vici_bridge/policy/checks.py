"""Checks of an SA that is to be taken in: pure functions over views, each with its own refusal.

charon itself checks nothing: an IKE_ADD for SPIs that exist makes a second SA that shadows the first, and the
clean-up of a CHILD_ADD whose SPI is taken deletes the kernel SA that was there (5.9.8, 6.0.6).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address

from ikectx.numbers import STATUS_TEXT, Fpt, Status
from ikectx.sa.context import NO_TAGS, Address, FinalState, IkeContext, Mark, Tags
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict
from vici_bridge.ha.messages import HaType
from vici_bridge.ha.record import uncovered
from vici_bridge.vici.answers import View
from vici_bridge.vici.views import (
    EXT_MOBIKE,
    ChildView,
    SaView,
    missing_algorithms,
    overlap,
    peer_context,
    prefixes,
)

from .new_names import Taken, clash, own_spi
from .present import Present

NONE = NO_TAGS.inbound
"""No mark and no if_id."""


def check_covered(context: IkeContext, version: int) -> Iterator[Verdict]:
    """Features that the ha plugin (of that wire version) cannot move."""
    reason = uncovered(context, version)
    if reason is not Status.OK:
        yield Verdict(Fpt.IKEV2_SA, reason, STATUS_TEXT[reason])


def check_sizes(messages: Sequence[bytes], buflen: int) -> Iterator[Verdict]:
    """HA messages for charon here that it would drop unread, because they are longer than its buffer."""
    longest = max(messages, key=len, default=b"")
    if len(longest) > buflen:
        kind = HaType(longest[1])
        yield Verdict(
            Fpt.SPD if kind is HaType.CHILD_ADD else Fpt.IKEV2_SA,
            Status.TOO_MUCH,
            f"charon's HA message {kind.name} would have {len(longest)} octets, and charon here reads "
            f"{buflen} (charon.plugins.ha.buflen)",
        )


def check_address(here: IkeContext, context: IkeContext, keep_address: bool) -> Iterator[Verdict]:
    """The address that the SA gets here, and whether the mobile node can be told it (`context`: the old
    gateway's)."""
    if here.local.address == context.local.address:
        return
    if keep_address:
        yield Verdict(
            Fpt.IKEV2_SA,
            Status.NO_ADDRESS,
            f"{context.local.address} is to move along, but is not among gateway.addresses here",
        )
    elif not context.extensions & EXT_MOBIKE:
        yield Verdict(Fpt.IKEV2_SA, Status.NO_MOBIKE, STATUS_TEXT[Status.NO_MOBIKE])


def check_names(context: IkeContext, connections: Mapping[str, View]) -> Iterator[Verdict]:
    """Connection and child names, and the authentication of the mobile node by both connections.

    The authentication is compared with the other gateway's own claim, so this check finds configurations that
    differ and protects nothing. `policy` compares a peer's SAs with this gateway's configuration.
    """
    conn = connections.get(context.connection)
    if conn is None:
        yield Verdict(Fpt.PAD, Status.NO_CONNECTION, f"no connection {context.connection!r} is loaded")
        return
    have = conn.get("children", {})
    for name in dict.fromkeys(child.name for child in context.children):
        if name not in have:
            yield Verdict(
                Fpt.SAD, Status.NO_CHILD, f"connection {context.connection!r} has no child {name!r}"
            )
    if context.peer is not None:
        theirs = {auth.method for auth in context.peer.remote_auth}
        ours = {auth.method for auth in peer_context(context.connection, conn).remote_auth}
        if theirs and ours and theirs != ours and "any" not in ours:
            yield Verdict(
                Fpt.PAD,
                Status.AUTHENTICATION,
                f"the MN authenticated by {'+'.join(sorted(theirs))}, "
                f"the connection here asks for {'+'.join(sorted(ours))}",
            )


_UNIQUE = {"UNIQUE_REPLACE": "replace", "UNIQUE_KEEP": "keep"}


def check_unique(here: IkeContext, connections: Mapping[str, View], present: Present) -> Iterator[Verdict]:
    """The connection's `unique`, which charon enforces when a mobile node authenticates, but not over HA.

    Which of two SAs is the mobile node's last one cannot be told, so the one that comes is refused with
    "replace", too. Source: check_uniqueness in ike_sa_manager.c, 6.0.6."""
    policy = _UNIQUE.get(str(connections.get(here.connection, {}).get("unique", "")))
    for view in present.same_identity(here) if policy else ():
        host = view.remote.address
        if view.state not in ("ESTABLISHED", "REKEYING") or host.version != here.remote.address.version:
            continue
        if policy == "keep" and host == here.remote.address:  # charon takes it for a reauthentication
            continue
        yield Verdict(
            Fpt.PAD,
            Status.NOT_ALLOWED,
            f"{here.remote_eap_id or here.remote_id} has the IKE_SA {view.name} #{view.unique_id} here, and "
            f"that connection has unique = {policy}",
        )


def still_here(
    final: FinalState,
    mn: Address,
    views: Iterable[SaView],
    known: Collection[SaName],
    esp: Collection[bytes],
    who: str = "",
) -> str:
    """The parts of an SA that are here although another gateway let go of it, in words; empty: none.

    `known`: SAs whose keys this agent has, which are other SAs. `esp`: inbound SPIs of `final` that the
    kernel has. An SA that came here may have been given other SPIs; then it is recognized by an SPI that
    stayed, or by the mobile node's outer address `mn` with its identity `who`. If `who` is empty the address
    alone counts, which other mobile nodes may have as well (NAT).
    """
    theirs = {child.spi_in for child in final.children}
    others: set[bytes] = set()
    for view in views:
        name = f"charon has the IKE_SA {view.name} #{view.unique_id} ({view.state})"
        if view.spis == (final.spi_i, final.spi_r):
            return f"{name} under the same SPIs"
        inbound = {child.spi_in for child in view.children}
        if view.spis in known:
            others |= inbound
        elif view.spi_i == final.spi_i or view.spi_r == final.spi_r or inbound & theirs:
            return f"{name} under one of its SPIs, and this agent does not know that SA"
        elif view.remote.address == mn and who in ("", view.remote_id):
            return f"{name} with a mobile node at {mn}, and this agent does not know that SA"
    for spi in esp:
        if spi not in others:
            return f"the kernel has its inbound ESP SA {spi.hex()}"
    return ""


def check_ike_spis(context: IkeContext, taken: Taken, views: Iterable[SaView] = ()) -> Iterator[Verdict]:
    """The SPIs, and our own SPI alone, because charon finds an SA by it. `views`: to name the SA that has
    it."""
    if not clash(context, taken).ike:
        return
    ours = own_spi(context.current)
    whose = "promised to another SA"
    for view in views:
        if view.spis == context.spis or ours == (view.spi_i if view.initiator else view.spi_r):
            whose = f"that of {view.name} #{view.unique_id} ({view.state})"
    yield Verdict(Fpt.IKEV2_SA, Status.IKE_SPI_IN_USE, f"IKE SPI {ours.hex()} is {whose}")


def check_esp_spis(context: IkeContext, taken: Taken) -> Iterator[Verdict]:
    """Inbound (our address, SPI) and outbound (MN's address, SPI). `context` has our address."""
    found = clash(context, taken)
    local, remote = context.local.address, context.remote.address
    for place, child in enumerate(context.children):
        if place in found.inbound:
            yield Verdict(
                Fpt.SAD, Status.ESP_SPI_IN_USE, f"inbound SPI {child.spi_in.hex()} is taken on {local}"
            )
        if place in found.outbound:
            yield Verdict(
                Fpt.SAD, Status.ESP_SPI_IN_USE, f"outbound SPI {child.spi_out.hex()} to {remote} is taken"
            )


def check_numbers(context: IkeContext, jump: int) -> Iterator[Verdict]:
    """Sequence numbers left for the jumps of a move and of its undoing (without ESN there are 2^32)."""
    for child in context.children:
        if not child.esn and child.outbound.seq + 4 * jump >= 1 << 32:
            yield Verdict(
                Fpt.SAD,
                Status.NUMBERS_SPENT,
                f"CHILD_SA {child.name} has used up its sequence numbers",
            )


def check_vips(context: IkeContext, views: Iterable[SaView], pools: Mapping[str, View]) -> Iterator[Verdict]:
    """Virtual IPs of the MN: not used by an SA, not leased to somebody else by a pool."""
    used = {vip: view for view in views for vip in view.remote_vips}
    own = {str(context.remote_id), str(context.remote_eap_id or "")}
    for vip in context.remote_vips:
        view = used.get(vip)
        if view is not None:
            text = f"virtual IP {vip} is used by {view.remote_id}"
            if view.remote_id in own:
                text += (
                    f", in its IKE_SA #{view.unique_id} from before it connected anew: dead peer detection "
                    "(dpd_delay) ends that, or `swanctl --terminate --ike-id`"
                )
            yield Verdict(Fpt.IKEV2_SA, Status.VIP_IN_USE, text)
    wanted = {str(vip) for vip in context.remote_vips}
    for name, pool in pools.items():
        for lease in _leases(pool):
            text = str(lease.get("address", ""))
            if text not in wanted and ":" not in text:
                continue  # to parse thousands takes long; only IPv6 has several spellings
            try:
                address = ip_address(text)
            except ValueError:
                continue
            online = lease.get("status") == "online"
            if address in context.remote_vips and online and lease.get("identity") not in own:
                yield Verdict(
                    Fpt.IKEV2_SA,
                    Status.VIP_IN_USE,
                    f"virtual IP {address} is leased to {lease.get('identity')} by pool {name}",
                )


def _leases(pool: View) -> Iterable[View]:
    leases = pool.get("leases", {})
    return leases.values() if isinstance(leases, Mapping) else ()


def check_selectors(
    context: IkeContext, views: Iterable[SaView], *, marked: bool = False
) -> Iterator[Verdict]:
    """Another SA whose selectors on both sides overlap would share or steal the policies, if the kernel does
    not tell them apart by marks or if_ids.

    The context has the marks and if_ids of another gateway. Here they may be unique to each SA (`%unique`).
    So only those of SAs without any are certain; `marked`: those that are equal and may be others here.
    """
    ours = [(child, prefixes(child.remote_ts), prefixes(child.local_ts)) for child in context.children]
    for view in views:
        for other in view.children:
            for child, remote, local in ours:
                shared = _shared(child.tags, other.tags)
                if not shared or (NONE in shared) == marked:
                    continue
                if overlap(remote, other.remote_ts) and overlap(local, other.local_ts):
                    yield _overlap(child.name, other, view)


def check_installed(view: SaView, others: Iterable[SaView]) -> Iterator[Verdict]:
    """The SA that was just installed, whose marks and if_ids are known now, against all others."""
    tagged = [child for child in view.children if child.tags != NO_TAGS]
    for other in others if tagged else ():
        for theirs in other.children if other.spis != view.spis else ():
            for child in tagged:
                if (
                    _shared(child.tags, theirs.tags)
                    and overlap(child.remote_ts, theirs.remote_ts)
                    and overlap(child.local_ts, theirs.local_ts)
                ):
                    yield _overlap(child.name, theirs, other)


def _shared(one: Tags, two: Tags) -> set[tuple[Mark, int]]:
    """The (mark, if_id) under which both have policies of one direction."""
    pairs = ((one.inbound, two.inbound), (one.outbound, two.outbound))
    return {ours for ours, theirs in pairs if ours == theirs}


def _overlap(name: str, other: ChildView, view: SaView) -> Verdict:
    tags = other.tags
    same = "" if tags == NO_TAGS else f", with the same marks and if_ids ({tags})"
    who = f"{other.name} of {view.remote_id} #{view.unique_id}"
    return Verdict(Fpt.SPD, Status.SELECTORS_OVERLAP, f"{name} overlaps {who}{same}")


def check_ike_algorithms(context: IkeContext, algorithms: Mapping[str, View]) -> Iterator[Verdict]:
    """Transforms of the IKE_SA that charon here has not loaded."""
    lacking = missing_algorithms(context, algorithms)
    if lacking:
        yield Verdict(Fpt.IKEV2_SA, Status.ALGORITHM, f"charon has not loaded {', '.join(lacking)}")
