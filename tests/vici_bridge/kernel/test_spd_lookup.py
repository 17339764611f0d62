"""Is a connection protected: policies as a table of cases, events, what a socket is held to."""

from __future__ import annotations

import struct
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import LinkError
from ikectx.net.five_tuple import Flow
from ikectx.sa.context import Endpoint, Secret
from vici_bridge.kernel import spd_lookup as protect
from vici_bridge.kernel import xfrm_wire as wire
from vici_bridge.kernel.spd_lookup import (
    Protection,
    check_sas,
    find_sas,
    may_concern,
    protection,
    socket_policies,
)
from vici_bridge.kernel.xfrm import BLOCK, KernelPolicy, KernelSa, Mark, Selector, Template
from vici_bridge.kernel.xfrm_parts import INET6, TRANSPORT, TUNNEL, templates_of

HERE, THERE = ip_address("192.0.2.1"), ip_address("198.51.100.1")
FLOW = Flow(Endpoint(HERE, 49152), Endpoint(THERE, 5091))
HERE6, THERE6 = ip_address("2001:db8:1::1"), ip_address("2001:db8:2::1")
FLOW6 = Flow(Endpoint(HERE6, 49152), Endpoint(THERE6, 5091))

ANY = ip_address("0.0.0.0")
ESP = Template(ANY, ANY, reqid=7, mode=TRANSPORT)
TUNNELLED = Template(HERE, THERE, reqid=7, mode=TUNNEL)
AH = replace(ESP, proto=51)
IPCOMP = replace(ESP, proto=108)
OPTIONAL = replace(ESP, optional=1)


def policy(direction: str = "out", source: str = "", destination: str = "", **more: object) -> KernelPolicy:
    """For this pair of gateways, unless told otherwise, with ESP."""
    ends = (f"{HERE}/32", f"{THERE}/32") if direction == "out" else (f"{THERE}/32", f"{HERE}/32")
    selector = Selector.between(ip_network(source or ends[0]), ip_network(destination or ends[1]))
    parts = {key: more.pop(key) for key in list(more) if key in Selector.__slots__}
    values = {"priority": 1000, "templates": (ESP,), **more}
    return KernelPolicy(direction, replace(selector, **parts), **values)  # type: ignore[arg-type]


IN = policy("in")
CASES: dict[str, tuple[list[KernelPolicy], str]] = {
    "a host pair": ([policy()], ""),
    "tunnel": ([policy(templates=(TUNNELLED,))], ""),
    "nothing": ([], "no IPsec policy protects tcp between"),
    "only the other direction": ([policy("fwd"), policy("in")], "no IPsec policy"),
    "networks": ([policy(source="192.0.2.0/24", destination="198.51.100.0/22")], ""),
    "wildcards": ([policy(source="0.0.0.0/0", destination="0.0.0.0/0")], ""),
    "another network": ([policy(destination="198.51.101.0/24")], "no IPsec policy"),
    "another source": ([policy(source="192.0.2.2/32")], "no IPsec policy"),
    "another family": ([policy(source="::/0", destination="::/0")], "no IPsec policy"),
    "tcp": ([policy(protocol=6)], ""),
    "udp": ([policy(protocol=17)], "no IPsec policy"),
    "to its port": ([policy(protocol=6, destination_port=5091, destination_mask=0xFFFF)], ""),
    "to another port": (
        [policy(protocol=6, destination_port=5092, destination_mask=0xFFFF)],
        "no IPsec policy",
    ),
    "a range of ports": ([policy(protocol=6, source_port=0xC000, source_mask=0xC000)], ""),
    "a lower range of ports": (
        [policy(protocol=6, source_port=0x8000, source_mask=0xC000)],
        "no IPsec policy",
    ),
    "shadowed by a bypass": ([policy(), policy(priority=999, templates=())], "lets packets pass as they are"),
    "shadowed by a wide bypass": (
        [policy(), policy(source="0.0.0.0/0", destination="0.0.0.0/0", priority=1, templates=())],
        "lets packets pass as they are",
    ),
    "shadowed by a drop": (
        [policy(), policy(priority=5, action=BLOCK, templates=())],
        "drops everything",
    ),
    "a drop with templates": ([policy(action=BLOCK)], "drops everything"),
    "a bypass behind it": ([policy(), policy(priority=1001, templates=())], ""),
    "a bypass of another port": (
        [
            policy(),
            policy(priority=1, protocol=6, destination_port=22, destination_mask=0xFFFF, templates=()),
        ],
        "",
    ),
    "an equal bypass": ([policy(), policy(protocol=6, templates=())], "lets packets pass as they are"),
    "an equal bypass first": ([policy(protocol=6, templates=()), policy()], "lets packets pass as they are"),
    "an equal that protects": ([policy(), policy(protocol=6, templates=(TUNNELLED,))], ""),
    "optional": ([policy(templates=(OPTIONAL,))], "takes ESP as optional"),
    "optional and required": ([policy(templates=(OPTIONAL, ESP))], ""),
    "AH": ([policy(templates=(AH,))], "asks for no ESP"),
    "IPComp": ([policy(templates=(IPCOMP,))], "asks for no ESP"),
    "IPComp and ESP": ([policy(templates=(replace(IPCOMP, optional=1), ESP))], ""),
    "a mark": ([policy(mark=Mark(5, 0xFF))], "no IPsec policy"),
    "a mark of 0": ([policy(mark=Mark(0, 0xFF))], "no IPsec policy"),
    "any mark": ([policy(mark=Mark(0, 0))], ""),
    "a marked bypass before it": (
        [policy(), policy(priority=1, mark=Mark(0, 1), templates=())],
        "lets packets pass as they are",
    ),
    "a mark that cannot be": ([policy(), policy(priority=1, mark=Mark(2, 1), templates=())], ""),
    "a marked one with ESP before it": ([policy(), policy(priority=1, mark=Mark(9, 9))], ""),
    "an interface's": ([policy(if_id=4)], "no IPsec policy"),
    "an interface's bypass": ([policy(), policy(priority=1, if_id=4, templates=())], ""),
    "a device": ([policy(ifindex=2)], "no IPsec policy"),
    "a device's bypass before it": (
        [policy(), policy(priority=1, ifindex=2, templates=())],
        "lets packets pass as they are",
    ),
    "a label": ([policy(extra=((8, b"label"),))], "no IPsec policy"),
    "a sub policy alone": ([policy(kind=1)], "no IPsec policy"),
    "a sub policy that lets pass": (
        [policy(), policy(kind=1, templates=())],
        "lets packets pass as they are",
    ),
    "a sub policy with ESP": ([policy(), policy(kind=1)], ""),
    "a socket's": ([replace(policy(), direction="socket out")], "no IPsec policy"),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str) -> None:
    policies, wrong = CASES[case]
    for found in ([*policies, IN], [IN, *reversed(policies)]):
        if not wrong:
            protection(found, FLOW)
            continue
        with pytest.raises(LinkError, match=wrong) as caught:
            protection(found, FLOW)
        assert f"remote_ts = {THERE}[tcp]" in caught.value.hint
    # the mirror image, inbound
    turned = [_turned(item) for item in policies]
    if not wrong:
        protection([*turned, policy()], FLOW)
    else:
        with pytest.raises(LinkError, match=wrong):
            protection([*turned, policy()], FLOW)


def _turned(item: KernelPolicy) -> KernelPolicy:
    now = item.selector
    selector = replace(
        now,
        source=now.destination,
        source_prefix=now.destination_prefix,
        source_port=now.destination_port,
        source_mask=now.destination_mask,
        destination=now.source,
        destination_prefix=now.source_prefix,
        destination_port=now.source_port,
        destination_mask=now.source_mask,
    )
    directions = {"out": "in", "in": "out", "socket out": "socket in"}
    return replace(item, direction=directions.get(item.direction, item.direction), selector=selector)


def test_sctp_and_ipv6() -> None:
    both = [policy(protocol=132), policy("in", protocol=132)]
    protection(both, replace(FLOW, protocol="sctp"))
    with pytest.raises(LinkError, match="no IPsec policy protects tcp"):
        protection(both, FLOW)
    pair = (f"{HERE6}/128", "2001:db8:2::/48")
    six = [policy("out", *pair), policy("in", *reversed(pair))]
    assert six[0].selector.family == INET6
    protection(six, FLOW6)
    with pytest.raises(LinkError, match=r"out 192\.0\.2\.1\[49152\]"):
        protection(six, FLOW)


def test_what_a_socket_is_held_to() -> None:
    tunnel = policy("in", templates=(replace(TUNNELLED, source=THERE, destination=HERE),))
    found = protection([policy(), tunnel], FLOW)
    assert found == Protection((ESP,), tunnel.templates)
    out, back = socket_policies(FLOW, found)
    size = 168  # struct xfrm_userpolicy_info
    assert (out[160:163], back[160:163]) == (b"\x01\x00\x00", b"\x00\x00\x00")  # direction, action, flags
    assert templates_of(out[size:]) == (ESP,)
    assert templates_of(back[size:]) == tunnel.templates
    # which of two equals the kernel takes is not known: no wrong one is forced on the socket
    unsure = protection([policy(), policy(protocol=6, templates=(TUNNELLED,)), tunnel], FLOW)
    assert unsure == Protection(None, tunnel.templates)
    assert socket_policies(FLOW, unsure) == [back]
    assert socket_policies(FLOW6, found)[0][40:42] == struct.pack("=H", INET6)


NETWORKS = st.sampled_from(
    ["0.0.0.0/0", "192.0.2.0/24", "192.0.2.1/32", "198.51.100.0/24", "198.51.100.1/32", "203.0.113.0/24"]
)
POLICIES = st.builds(
    policy,
    st.sampled_from(["in", "out", "fwd"]),
    NETWORKS,
    NETWORKS,
    priority=st.integers(0, 3),
    protocol=st.sampled_from([0, 6, 17]),
    templates=st.sampled_from([(ESP,), (), (OPTIONAL,), (AH, ESP), (IPCOMP,)]),
    action=st.sampled_from([0, 0, 0, BLOCK]),
    ifindex=st.sampled_from([0, 0, 0, 2]),
    if_id=st.sampled_from([0, 0, 0, 2]),
    mark=st.sampled_from([None, None, Mark(0, 0), Mark(1, 1), Mark(0, 1)]),
    destination_port=st.sampled_from([0, 5091]),
    destination_mask=st.sampled_from([0, 0xFFFF]),
)


@given(
    st.lists(POLICIES, max_size=8), st.randoms(use_true_random=False), st.integers(0, 3), st.integers(1, 3)
)
@settings(max_examples=300, deadline=None)
def test_whatever_the_kernel_takes_protects(
    policies: list[KernelPolicy], chance: object, mark: int, device: int
) -> None:
    """Whatever mark and device a packet has, and the order of policies: the one taken demands ESP."""
    if_sure = [policy(priority=2), policy("in", priority=2)]
    try:
        protection([*policies, *if_sure], FLOW)
    except LinkError:
        return
    order = [*policies, *if_sure]
    chance.shuffle(order)  # type: ignore[attr-defined]
    protection(order, FLOW)
    for way in protect.ways(FLOW):
        matching = [
            item
            for item in order
            if item.direction == way.direction
            and not item.if_id
            and way.source in item.source
            and way.destination in item.destination
            and item.selector.protocol in (0, 6)
            and not (item.selector.destination_port ^ way.destination_port) & item.selector.destination_mask
            and item.selector.ifindex in (0, device)
            and (item.mark is None or mark & item.mark.mask == item.mark.value)
        ]
        taken = min(matching, key=lambda item: item.priority)
        assert taken.action == 0
        assert any(template.proto == 50 and not template.optional for template in taken.templates)


def event(kind: int, item: KernelPolicy) -> bytes:
    data = bytearray(item.raw)
    struct.pack_into("=H", data, 4, kind)
    return bytes(data)


@given(st.lists(POLICIES, max_size=6), POLICIES)
@settings(max_examples=200, deadline=None)
def test_what_concerns_nobody_changes_nothing(policies: list[KernelPolicy], change: KernelPolicy) -> None:
    def verdict(found: list[KernelPolicy]) -> object:
        try:
            return protection(found, FLOW)
        except LinkError as error:
            return str(error)

    if not may_concern(event(wire.NEWPOLICY, change), FLOW):
        assert verdict(policies) == verdict([*policies, change])


def test_events() -> None:
    ours, other = policy(), policy(destination="203.0.113.0/24")
    wide = policy(source="192.0.0.0/12", destination="198.51.100.0/25")
    for kind in (
        wire.NEWPOLICY,
        wire.UPDPOLICY,
        wire.DELPOLICY,
        wire.POLEXPIRE,
        wire.MIGRATE,
    ):
        for item, concerns in ((ours, True), (IN, True), (wide, True), (other, False)):
            assert may_concern(event(kind, item), FLOW) is concerns
            assert not may_concern(event(kind, item), FLOW6)
    nobody = struct.pack("=IHHII", 16, wire.FLUSHPOLICY, 0, 0, 0)
    assert may_concern(nobody, FLOW)
    assert not may_concern(event(0x18, ours), FLOW), "an SA that expires"
    by_index = wire.build(wire.userpolicy_id, wire.DELPOLICY, 0, {"index": 9, "dir": 1})
    assert may_concern(by_index, FLOW)
    assert may_concern(by_index, FLOW6)
    for torn in (b"", b"\0" * 7, event(wire.NEWPOLICY, other)[:30]):
        assert may_concern(torn, FLOW)


SA = KernelSa(
    HERE, THERE, b"\1\2\3\4", reqid=7, mode=TRANSPORT, encr_name="cbc(aes)", auth_name="hmac(sha256)"
)


@pytest.mark.parametrize(
    ("sa", "wrong"),
    [
        (SA, ""),
        (replace(SA, encr_name="rfc4106(gcm(aes))", is_aead=True, auth_name=""), ""),
        (replace(SA, encr_name="ecb(cipher_null)"), "does not encrypt"),
        (replace(SA, encr_name="rfc4543(gcm(aes))", is_aead=True, auth_name=""), "does not encrypt"),
        (replace(SA, auth_name=""), "does not authenticate"),
        (replace(SA, auth_name="digest_null"), "does not authenticate"),
        (replace(SA, encr_name="ecb(cipher_null)", reqid=8), ""),
        (replace(SA, encr_name="ecb(cipher_null)", mode=TUNNEL), ""),
        (replace(SA, encr_name="", auth_name=""), ""),  # larval
    ],
)
def test_sas_without_encryption(sa: KernelSa, wrong: str) -> None:
    if not wrong:
        check_sas([sa], ESP, FLOW)
        return
    with pytest.raises(LinkError, match=wrong):
        check_sas([SA, sa], ESP, FLOW)
    check_sas([sa], replace(ESP, spi=b"none"), FLOW)
    assert isinstance(find_sas(FLOW, TUNNELLED, "out").message, Secret)
