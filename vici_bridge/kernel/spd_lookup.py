"""Whether the kernel's SPD protects a connection with ESP, in both directions. Sans-IO.

A policy is found as net/xfrm/xfrm_policy.c (Linux 5.0 and later) finds it: of those that match the packet the
one of the smallest priority value; of equals the one installed first. That order cannot be read (the index is
given anew, and kept on replacement), so all equals must protect. A policy that may or may not apply (it has a
mark, a device or a security label) must protect as well, because it may apply, and the policies behind it
must protect, because it may not. Policies with an if_id are only for packets of XFRM interfaces; policies of
single sockets do not concern us.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from ikectx.errors import LinkError
from ikectx.net.five_tuple import Flow
from ikectx.sa.context import Address, Secret

from . import xfrm_wire as wire
from .netlink_parts import DUMP, HEADER, REQUEST
from .xfrm import ALLOW, KernelPolicy, KernelSa
from .xfrm_parts import (
    BEET,
    ESP,
    INET,
    TUNNEL,
    Selector,
    Template,
    XfrmRequest,
    family_of,
    network_of,
    packed,
    template_octets,
)

PROTOCOLS = {"tcp": 6, "sctp": 132}
_IPTFS = 5
_SECURITY_CONTEXT = 8
"""XFRMA_SEC_CTX: the policy is for one security label."""
_ADDRESS_FILTER, _PROTO = 26, 25

_EVENTS = (wire.NEWPOLICY, wire.UPDPOLICY, wire.DELPOLICY, wire.POLEXPIRE, wire.MIGRATE)
_SELECTOR = struct.Struct("=16s16s8xHBB")
"""The front of struct xfrm_selector: destination, source, family, prefix lengths of both."""
_AUTHENTICATES_ONLY = ("cipher_null", "rfc4543")


@dataclass(frozen=True, slots=True)
class FlowDirection:
    """One direction of a connection: the properties of its packets."""

    direction: str
    source: Address
    source_port: int
    destination: Address
    destination_port: int
    protocol: int

    def __str__(self) -> str:
        ends = f"{self.source}[{self.source_port}] -> {self.destination}[{self.destination_port}]"
        return f"{self.direction} {ends}"


def ways(flow: Flow) -> tuple[FlowDirection, FlowDirection]:
    """The outbound and the inbound direction."""
    here, there, protocol = flow.local, flow.remote, PROTOCOLS[flow.protocol]
    return (
        FlowDirection("out", here.address, here.port, there.address, there.port, protocol),
        FlowDirection("in", there.address, there.port, here.address, here.port, protocol),
    )


@dataclass(frozen=True, slots=True)
class Protection:
    """The templates that a flow's packets must pass; None if more than one policy may apply."""

    outbound: tuple[Template, ...] | None
    inbound: tuple[Template, ...] | None


def protection(policies: Sequence[KernelPolicy], flow: Flow) -> Protection:
    """The protection of `flow`. Errors: LinkError if a packet of it could pass unprotected, or none can
    pass."""
    out, back = (_of_way(policies, way, flow) for way in ways(flow))
    return Protection(out, back)


def _of_way(policies: Sequence[KernelPolicy], way: FlowDirection, flow: Flow) -> tuple[Template, ...] | None:
    found = [policy for policy in policies if _may_match(policy, way)]
    asked = []
    for kind in sorted({0, *(policy.kind for policy in found)}):
        # a sub policy (kind 1) is consulted first, and the main one as well
        same = [policy for policy in found if policy.kind == kind]
        certain = [policy.priority for policy in same if _certain(policy)]
        if not certain and kind == 0:
            raise LinkError(f"no IPsec policy protects {flow} ({way})", hint=_advice(flow))
        asked += [policy for policy in same if not certain or policy.priority <= min(certain)]
    for policy in sorted(asked, key=lambda item: item.priority):
        wrong = _weakness(policy)
        if wrong:
            raise LinkError(f"{flow} is not protected: {policy} {wrong}", hint=_advice(flow))
    templates = {policy.templates for policy in asked}
    return templates.pop() if len(templates) == 1 else None


def _advice(flow: Flow) -> str:
    local, remote = flow.local.address, flow.remote.address
    return (
        "at both gateways, in swanctl.conf: a child for this pair alone, "
        f"local_ts = {local}[{flow.protocol}], remote_ts = {remote}[{flow.protocol}], "
        "mode = transport, start_action = trap, and no bypass policy before it"
    )


def _may_match(policy: KernelPolicy, way: FlowDirection) -> bool:
    selector = policy.selector
    return (
        policy.direction == way.direction
        and not policy.if_id
        and (policy.mark is None or not policy.mark.value & ~policy.mark.mask)
        and selector.family == family_of(way.source)
        and way.source in network_of(selector.source, selector.source_prefix)
        and way.destination in network_of(selector.destination, selector.destination_prefix)
        and not (way.source_port ^ selector.source_port) & selector.source_mask
        and not (way.destination_port ^ selector.destination_port) & selector.destination_mask
        and selector.protocol in (0, way.protocol)
    )


def _certain(policy: KernelPolicy) -> bool:
    """Whether it applies regardless of a packet's mark, device or label."""
    return (
        (policy.mark is None or not policy.mark.mask)
        and not policy.selector.ifindex
        and all(number != _SECURITY_CONTEXT for number, _ in policy.extra)
    )


def _weakness(policy: KernelPolicy) -> str:
    """Why it does not protect; empty if it does."""
    if policy.action != ALLOW:
        return "drops everything"
    if not policy.templates:
        return "lets packets pass as they are"
    esp = [template for template in policy.templates if template.proto == ESP]
    if not esp:
        return "asks for no ESP"
    if all(template.optional for template in esp):
        return "takes ESP as optional"
    return ""


def may_concern(message: bytes, flow: Flow) -> bool:
    """Whether an event, or a policy of a dump (a netlink message), can matter to `flow`.

    Only addresses are compared, because a gateway's events for its mobile nodes must cost little here.
    """
    if len(message) < HEADER.size:
        return True
    (kind,) = struct.unpack_from("=H", message, 4)
    if kind == wire.FLUSHPOLICY:
        return True
    if kind not in _EVENTS:
        return False
    if len(message) < HEADER.size + _SELECTOR.size:
        return True
    destination, source, family, prefix_d, prefix_s = _SELECTOR.unpack_from(message, HEADER.size)
    if family != family_of(flow.local.address):
        return not family  # deleted by its index: the selector is not in the message
    here, there = packed(flow.local.address), packed(flow.remote.address)
    return (_covers(source, prefix_s, here) and _covers(destination, prefix_d, there)) or (
        _covers(source, prefix_s, there) and _covers(destination, prefix_d, here)
    )


def _covers(network: bytes, prefix: int, address: bytes) -> bool:
    octets, bits = divmod(prefix, 8)
    if network[:octets] != address[:octets]:
        return False
    return not bits or octets >= len(network) or not (network[octets] ^ address[octets]) >> (8 - bits)


def socket_policies(flow: Flow, found: Protection) -> list[bytes]:
    """Values of IP(V6)_XFRM_POLICY, with which a socket's packets must pass these templates or are
    dropped."""
    family = family_of(flow.local.address)
    nowhere = ip_address("0.0.0.0" if family == INET else "::")  # noqa: S104 - any address, not one to listen on
    every = Selector(nowhere, 0, nowhere, 0, family=family)
    values = []
    for direction, templates in (("out", found.outbound), ("in", found.inbound)):
        if templates is not None:
            head = KernelPolicy(direction, every).raw[HEADER.size :]
            values.append(head + b"".join(template_octets(template) for template in templates))
    return values


def find_sas(flow: Flow, template: Template, direction: str) -> XfrmRequest:
    """XFRM_MSG_GETSA for the ESP SAs between the ends of a template of that direction."""
    source, destination = flow.local.address, flow.remote.address
    if direction == "in":
        source, destination = destination, source
    if template.mode in (TUNNEL, BEET, _IPTFS):
        source, destination = template.source, template.destination
    lengths = [0 if int(address) == 0 else address.max_prefixlen for address in (source, destination)]
    value = packed(source) + packed(destination) + struct.pack("=HBB", family_of(destination), *lengths)
    flags = REQUEST | DUMP
    extra = [(_ADDRESS_FILTER, value), (_PROTO, bytes([ESP]))]
    data = wire.build(wire.usersa_id, wire.GETSA, flags, {}, extra=extra)
    return XfrmRequest(Secret(data), "list the SAs between the gateways")


def check_sas(sas: Iterable[KernelSa], template: Template, flow: Flow) -> None:
    """Refuse an SA of the template that does not encrypt, or not authenticate, because contexts have keys.

    Errors: LinkError.
    """
    for sa in sas:
        larval = not sa.encr_name
        if larval or sa.mode != template.mode or (template.reqid and sa.reqid != template.reqid):
            continue
        if template.spi not in (bytes(4), sa.spi):
            continue
        weak = ""
        if any(name in sa.encr_name for name in _AUTHENTICATES_ONLY):
            weak = "does not encrypt"
        elif not sa.is_aead and sa.auth_name in ("", "digest_null"):
            weak = "does not authenticate"
        if weak:
            raise LinkError(
                f"{flow} is not protected: {sa} {weak} ({sa.encr_name})",
                hint="let esp_proposals of that child name a cipher, as aes128gcm16",
            )
