"""A peer brings only what charon here would have negotiated itself: each attack, and what is right.

The attacks are those that a gateway took in on real charons: an identity of nobody, the inner server as the
mobile node's address, 3DES, reserved SPIs, a multicast address, message IDs at their end, and others.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings

from ikectx.numbers import UNTOUCHED, Encr, IdType, Integ, KeMethod, Mode, Prf, Status
from ikectx.sa.context import (
    AuthRound,
    ChildContext,
    Endpoint,
    Identity,
    IkeContext,
    Lifetime,
    PeerContext,
    TrafficSelector,
)
from ikectx.sa.verdict import Verdict
from tests.strategies import contexts
from vici_bridge.host_config import HostConfig
from vici_bridge.policy.admission import admit
from vici_bridge.policy.allowed import (
    AllowedConnection,
    Range,
    Rules,
    Surroundings,
    inside_of,
    pool_ranges,
)
from vici_bridge.policy.claims import (
    MID_END,
    check_algorithms,
    check_bounds,
    check_counters,
    check_identities,
    check_lifetimes,
    check_modes,
    check_outer,
    check_policy,
    check_spis,
    check_traffic,
    check_virtual_ips,
)
from vici_bridge.policy.proposals import ConfiguredProposal

# What charon 5.9.8 answered to list-conns for the connection of the attack, shortened.
CONNECTION: dict[str, Any] = {
    "local_addrs": ["192.0.2.9"],
    "remote_addrs": ["%any"],
    "version": "IKEv2",
    "reauth_time": "0",
    "rekey_time": "14400",
    "unique": "UNIQUE_NO",
    "local-1": {"class": "pre-shared key", "id": "gw.example", "groups": [], "certs": [], "cacerts": []},
    "remote-1": {"class": "pre-shared key", "id": "mn.example", "groups": [], "certs": [], "cacerts": []},
    "children": {
        "net": {
            "mode": "TUNNEL",
            "rekey_time": "3600",
            "rekey_bytes": "0",
            "rekey_packets": "0",
            "dpd_action": "none",
            "close_action": "none",
            "local-ts": ["10.3.0.0/24"],
            "remote-ts": ["dynamic"],
        }
    },
}
POOLS = {"mn": {"base": "10.4.0.10", "size": "8", "online": "0", "offline": "0"}}
SERVER = "10.3.0.10"
OWN, PEER = ip_address("192.0.2.9"), ip_address("203.0.113.1")


NUMBERS = {("tcp", ""): 6, ("udp", ""): 17, ("icmp", ""): 1, ("http", "tcp"): 80}


def numbered(name: str, protocol: str) -> int:
    """As `admission.numbered`, on every machine: a new Debian has no /etc/protocols and /etc/services."""
    if (name, protocol) not in NUMBERS:
        raise OSError(f"no such name: {name}")
    return NUMBERS[name, protocol]


def connection(**changes: Any) -> AllowedConnection:
    return AllowedConnection.read("mn", {**CONNECTION, **changes}, numbered)


def child_of(**changes: Any) -> AllowedConnection:
    """The connection with other settings of its child."""
    return connection(children={"net": {**CONNECTION["children"]["net"], **changes}})


PLACE = Surroundings(frozenset({OWN}), frozenset({PEER}), inside_of([connection()]))


def selector(text: str, protocol: int = 0, ports: tuple[int, int] = (0, 65535)) -> TrafficSelector:
    found = Range.parse(text)
    return TrafficSelector(found.start, found.end, protocol, *ports)


def fqdn(text: str | bytes) -> Identity:
    return Identity(IdType.FQDN, text if isinstance(text, bytes) else text.encode())


def context(**changes: Any) -> IkeContext:
    """What the mobile node's SA looks like at this gateway."""
    from tests.peers import a_context

    made = a_context()
    child = replace(
        made.children[0],
        name="net",
        local_ts=(selector("10.3.0.0/24"),),
        remote_ts=(selector("10.4.0.10"),),
    )
    made = replace(
        made,
        connection="mn",
        local_id=fqdn("gw.example"),
        remote_id=fqdn("mn.example"),
        local=Endpoint(OWN, 4500),
        children=(child,),
        remote_vips=(ip_address("10.4.0.10"),),
    )
    return replace(made, **changes)


def with_child(here: IkeContext | None = None, **changes: Any) -> IkeContext:
    here = here or context()
    return replace(here, children=(replace(here.children[0], **changes),))


def without_vip(outer: str, remote_ts: str) -> IkeContext:
    """One that has its outer address inside, too."""
    return with_child(
        context(remote_vips=(), remote=Endpoint.of(outer, 4500)), remote_ts=(selector(remote_ts),)
    )


OF_CLAIMS = {
    *(Status.IDENTITY, Status.MN_ADDRESS, Status.VIP_NOT_ALLOWED, Status.SELECTORS, Status.MODE),
    *(Status.PROPOSAL, Status.SPIS, Status.NUMBERS_SPENT, Status.LIFETIME, Status.TOO_MUCH),
}
"""The statuses of the checks; all of them are told before anything of an SA is installed."""


def test_whoever_is_refused_by_a_claim_knows_that_nothing_was_sent() -> None:
    assert OF_CLAIMS <= UNTOUCHED


def reasons(verdicts: object) -> list[str]:
    found: list[Verdict] = list(verdicts)  # type: ignore[call-overload]
    assert {verdict.status for verdict in found} <= OF_CLAIMS | {Status.NOT_ALLOWED}
    return [verdict.detail for verdict in found]


def refused(verdicts: object, word: str) -> None:
    (reason,) = reasons(verdicts)
    assert word in reason


def pools() -> tuple[Range, ...]:
    return tuple(pool_ranges(POOLS).values())


def test_what_charon_here_would_have_negotiated_is_taken() -> None:
    assert check_policy(context(), connection(), Rules(), pools(), PLACE) == []


def test_what_a_context_says_of_itself_is_no_measure() -> None:
    """The peer entry names the connection's own identity; the SA's is another."""
    kind = PeerContext("mn", (), (AuthRound("psk", "mn.example"),), ("net",), ("aes128gcm16",))
    for peer in (None, kind):
        rogue = context(remote_id=fqdn("root.evil"), peer=peer)
        refused(check_policy(rogue, connection(), Rules(), pools(), PLACE), "root.evil")


def test_the_attack() -> None:
    """One PCTD that drew the traffic of another mobile node to its sender, as it was sent."""
    rogue = with_child(
        context(
            remote_id=fqdn("root.evil"), remote_vips=(), peer=None, remote=Endpoint.of("10.1.1.12", 4500)
        ),
        remote_ts=(selector(SERVER),),
        encr=Encr.DES3,
        encr_bits=0,
        integ=Integ.HMAC_SHA1_96,
        spi_in=bytes((0, 0, 0, 5)),
    )
    found = reasons(check_policy(rogue, connection(), Rules(), pools(), PLACE))
    for word in ("root.evil", SERVER, "DES3", "00000005"):
        assert any(word in reason for reason in found), word
    via_all = with_child(rogue, local_ts=(selector("0.0.0.0/0"),))
    assert any("0.0.0.0-255" in why for why in reasons(check_traffic(via_all, connection(), PLACE)))


# Who.


@pytest.mark.parametrize("told", ["mn.example", "*.example"])
def test_the_identity_is_the_connections(told: str) -> None:
    allowed = connection(**{"remote-1": {"class": "pre-shared key", "id": told}})
    assert reasons(check_identities(context(), allowed, Rules())) == []
    refused(check_identities(context(remote_id=fqdn("root.evil")), allowed, Rules()), "asks for")
    key_id = context(remote_id=Identity(IdType.RFC822_ADDR, b"mn.example"))
    refused(check_identities(key_id, allowed, Rules()), "asks for")


@pytest.mark.parametrize("entry", [{"class": "public key"}, {"class": "public key", "id": "%any"}])
def test_a_connection_for_anybody_takes_anybody(entry: dict[str, str]) -> None:
    anybody = connection(**{"remote-1": entry})
    assert reasons(check_identities(context(remote_id=fqdn("carol")), anybody, Rules())) == []


def test_the_last_round_is_that_of_the_identity() -> None:
    rounds = {f"remote-{n}": {"class": "public key", "id": f"mn{n}.example"} for n in range(1, 12)}
    assert (
        reasons(check_identities(context(remote_id=fqdn("mn11.example")), connection(**rounds), Rules()))
        == []
    )
    refused(check_identities(context(remote_id=fqdn("mn2.example")), connection(**rounds), Rules()), "mn11")


def test_eap_identities() -> None:
    def eap(eap_id: str) -> AllowedConnection:
        entry = {"class": "EAP", "eap-type": "MSCHAPV2", "id": "mn.example", "eap_id": eap_id}
        return connection(**{"remote-1": {key: value for key, value in entry.items() if value}})

    carol = context(remote_eap_id=fqdn("carol"))
    assert reasons(check_identities(carol, eap("%any"), Rules())) == []
    assert reasons(check_identities(carol, eap("carol"), Rules())) == []
    refused(check_identities(carol, eap("dave"), Rules()), "asks for dave")
    refused(check_identities(context(), eap("dave"), Rules()), "asks for dave")
    assert reasons(check_identities(carol, eap(""), Rules())) == []  # the user name of MSCHAPv2
    refused(check_identities(carol, connection(), Rules()), "has no EAP")
    assert reasons(check_identities(context(), eap(""), Rules())) == []
    first = {"class": "EAP", "id": "mn.example", "eap_id": "dave"}
    rounds = connection(**{"remote-1": first, "remote-2": {"class": "public key", "id": "mn.example"}})
    assert reasons(check_identities(context(), rounds, Rules())) == []  # the SA shows the last round's only


def test_the_gateways_identity_is_ours_or_one_that_the_operator_names() -> None:
    other = context(local_id=fqdn("psg.example"))
    refused(check_identities(other, connection(), Rules()), "local_ids")
    assert reasons(check_identities(other, connection(), Rules(local_ids=("psg.example",)))) == []
    assert reasons(check_identities(other, connection(**{"local-1": {"class": "public key"}}), Rules())) == []


@pytest.mark.parametrize("which", ["remote_id", "local_id", "remote_eap_id"])
def test_an_identity_of_any_octets_is_taken_and_no_environment_has_a_nul_octet(which: str) -> None:
    """A KEY_ID may be a number with zero octets; programs are given identities as charon prints them."""
    entry = {"class": "EAP", "id": "%any", "eap_id": "%any"}
    allowed = connection(**{"remote-1": entry, "local-1": {"class": "EAP"}})
    identity = Identity(IdType.KEY_ID, b'\1\2\xff,"\0x')
    odd = context(**{which: identity})
    assert "NUL" not in " ".join(reasons(check_identities(odd, allowed, Rules())))
    assert str(identity) == "01:02:ff:2c:22:00:78"


# Where.


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("224.0.0.5", "multicast"),
        ("ff02::1", "multicast"),
        ("255.255.255.255", "reserved"),
        ("240.0.0.1", "reserved"),
        ("0.0.0.0", "no address"),
        ("0.0.0.7", "no address"),
        ("::", "no address"),
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("fe80::1", "link-local"),
        ("::ffff:10.2.0.2", "an IPv4 address written as IPv6"),
        (str(OWN), "this gateway"),
        (str(PEER), "peer gateway"),
    ],
)
def test_outer_addresses_that_no_mobile_node_has(address: str, word: str) -> None:
    local = Endpoint.of("2001:db8::9" if ":" in address else "192.0.2.9", 4500)
    refused(check_outer(context(local=local, remote=Endpoint.of(address, 4500)), connection(), PLACE), word)


@pytest.mark.parametrize("port", [0, 1, 22, 1023])
def test_ports_that_no_mobile_node_has(port: int) -> None:
    refused(check_outer(context(remote=Endpoint.of("198.51.100.7", port)), connection(), PLACE), "port")


@pytest.mark.parametrize("port", [500, 4500, 1024, 41000, 65535])
def test_ports_of_mobile_nodes_and_of_nats(port: int) -> None:
    assert reasons(check_outer(context(remote=Endpoint.of("198.51.100.7", port)), connection(), PLACE)) == []


def test_the_connections_own_port() -> None:
    allowed = connection(remote_port="700")  # strongSwan 6.0.3 tells it
    assert reasons(check_outer(context(remote=Endpoint.of("198.51.100.7", 700)), allowed, PLACE)) == []


def test_virtual_ips_are_from_a_pool() -> None:
    assert reasons(check_virtual_ips(context(), pools(), PLACE)) == []
    for address in ("10.4.0.9", "10.4.0.18", SERVER, "fd04::10"):
        rogue = context(remote_vips=(ip_address(address),))
        refused(check_virtual_ips(rogue, pools(), PLACE), "virtual_ips")
    refused(check_virtual_ips(context(), (), PLACE), "(none)")
    refused(check_virtual_ips(context(remote_vips=(OWN,)), [Range(OWN, OWN)], PLACE), "a gateway")


def test_the_operators_virtual_ips_count_instead_of_the_pools() -> None:
    """Pools of two gateways do not overlap, so what comes has an address of the other's."""
    rules = Rules(virtual_ips=(Range.parse("10.5.0.0/16"),))
    there = with_child(context(remote_vips=(ip_address("10.5.0.7"),)), remote_ts=(selector("10.5.0.7"),))
    assert check_policy(there, connection(), rules, pools(), PLACE) == []
    refused(check_policy(context(), connection(), rules, pools(), PLACE), "virtual IP")


@pytest.mark.parametrize(
    "changes",
    [
        {"remote_ts": (selector(SERVER),)},
        {"remote_ts": (selector("0.0.0.0/0"),)},
        {"remote_ts": (selector("10.4.0.10"), selector(SERVER))},
        {"remote_ts": (selector("198.51.100.7"),)},  # it has a virtual IP, so that is what it has
        {"local_ts": (selector("0.0.0.0/0"),)},
        {"local_ts": (selector("10.3.1.0/24"),)},
        {"local_ts": (selector("10.3.0.0-10.3.1.0"),)},
        {
            "local_ts": (
                replace(selector("10.3.0.0/24"), start=ip_address("10.3.0.9"), end=ip_address("10.3.0.1")),
            )
        },
        {"local_ts": (selector("fd03::/64"),)},
    ],
)
def test_selectors_outside_the_childs(changes: dict[str, Any]) -> None:
    refused(check_traffic(with_child(**changes), connection(), PLACE), "_ts here")


def test_selectors_inside_the_childs() -> None:
    narrow = with_child(local_ts=(selector("10.3.0.7"), selector("10.3.0.8", 6, (80, 80))))
    assert reasons(check_traffic(narrow, connection(), PLACE)) == []
    v6 = with_child(context(remote_vips=(ip_address("fd04::10"),)), remote_ts=(selector("fd04::10"),))
    assert reasons(check_traffic(v6, connection(), PLACE)) == []


@pytest.mark.parametrize(
    ("told", "protocol", "ports", "fits"),
    [
        ("10.3.0.0/24[tcp/http]", 6, (80, 80), True),
        ("10.3.0.0/24[tcp/http]", 6, (81, 81), False),
        ("10.3.0.0/24[tcp/http]", 0, (0, 65535), False),
        ("10.3.0.0/24[tcp/http]", 17, (80, 80), False),
        ("10.3.0.0/24[tcp/1000-2000]", 6, (1500, 2000), True),
        ("10.3.0.0/24[tcp/1000-2000]", 6, (1500, 2001), False),
        ("10.3.0.0/24[tcp/1000-2000]", 6, (2000, 1500), False),
        ("10.3.0.0/24[udp]", 17, (0, 65535), True),
        ("10.3.0.0/24[udp]", 0, (0, 65535), False),
        ("10.3.0.0/24[132]", 132, (7, 7), True),
        ("10.3.0.0/24[icmp/8]", 1, (0x800, 0x800), True),
        ("10.3.0.0/24[icmp/8]", 1, (0, 65535), False),
        ("10.3.0.0/24[icmp/3(1)-3(2)]", 1, (0x301, 0x302), True),
        ("10.3.0.0/24[tcp/OPAQUE]", 6, (65535, 0), True),
        ("10.3.0.0..10.3.0.255[0/53-60]", 17, (53, 53), True),
    ],
)
def test_protocols_and_ports(told: str, protocol: int, ports: tuple[int, int], fits: bool) -> None:
    here = with_child(local_ts=(selector("10.3.0.0/24", protocol, ports),))
    assert (reasons(check_traffic(here, child_of(**{"local-ts": [told]}), PLACE)) == []) is fits


def test_dynamic_is_the_outer_address_where_there_is_no_virtual_ip() -> None:
    outer = without_vip("198.51.100.7", "198.51.100.7")
    assert reasons(check_traffic(outer, connection(), PLACE)) == []
    # behind a NAT charon counts with the address that it sees, not with the one the node has there
    refused(check_traffic(without_vip("198.51.100.7", "192.168.1.5"), connection(), PLACE), "dynamic")


def test_an_outer_address_is_no_network_behind_this_gateway() -> None:
    """A rogue peer that says its mobile node is at the inner server draws that server's packets to itself."""
    refused(check_traffic(without_vip(SERVER, SERVER), connection(), PLACE), "behind this gateway")


def test_transport_mode_is_between_the_outer_addresses() -> None:
    allowed = child_of(**{"mode": "TRANSPORT", "local-ts": ["dynamic"], "remote-ts": ["dynamic"]})
    here = with_child(
        without_vip("198.51.100.7", "198.51.100.7"), local_ts=(selector(str(OWN)),), mode=Mode.TRANSPORT
    )
    place = replace(PLACE, inside=inside_of([allowed]))
    assert check_policy(here, allowed, Rules(), (), place) == []
    refused(check_traffic(with_child(here, local_ts=(selector(SERVER),)), allowed, place), "dynamic")


def test_a_fixed_inner_address() -> None:
    allowed = child_of(**{"remote-ts": ["10.4.0.10/32"]})
    assert reasons(check_traffic(without_vip("198.51.100.7", "10.4.0.10"), allowed, PLACE)) == []
    refused(check_traffic(without_vip("198.51.100.7", "10.4.0.11"), allowed, PLACE), "10.4.0.10/32")


def test_a_child_for_any_address_gives_none_of_ours() -> None:
    anything = child_of(**{"remote-ts": ["0.0.0.0/0"]})
    assert reasons(check_traffic(with_child(remote_ts=(selector("10.9.0.0/16"),)), anything, PLACE)) == []
    for text, word in (
        (str(OWN), "a gateway"),
        (str(PEER), "a gateway"),
        (SERVER, "behind"),
        ("10.0.0.0/8", "behind"),
    ):
        refused(check_traffic(with_child(remote_ts=(selector(text),)), anything, PLACE), word)
    # all of it is what the connection says, word for word; and a network that it names is the operator's wish
    assert reasons(check_traffic(with_child(remote_ts=(selector("0.0.0.0/0"),)), anything, PLACE)) == []
    named = child_of(**{"remote-ts": ["10.3.0.0/24"]})
    assert reasons(check_traffic(with_child(remote_ts=(selector(SERVER),)), named, PLACE)) == []


# How.


@pytest.mark.parametrize(
    ("told", "mode", "fits"),
    [
        ("TUNNEL", Mode.TUNNEL, True),
        ("TUNNEL", Mode.TRANSPORT, False),
        ("TRANSPORT", Mode.TRANSPORT, True),
        ("TRANSPORT", Mode.TUNNEL, True),
        ("TRANSPORT", Mode.BEET, False),
        ("BEET", Mode.BEET, True),
        ("DROP", Mode.TUNNEL, False),
    ],
)
def test_modes(told: str, mode: Mode, fits: bool) -> None:
    assert (reasons(check_modes(with_child(mode=mode), child_of(mode=told))) == []) is fits


@pytest.mark.parametrize(
    ("encr", "integ"),
    [
        (Encr.NULL, Integ.HMAC_SHA2_256_128),
        (Encr.NULL_AES_GMAC, Integ.NONE),
        (Encr.DES3, Integ.HMAC_SHA1_96),
        (Encr(2), Integ.HMAC_SHA1_96),
        (Encr.AES_CBC, Integ.HMAC_MD5_96),
        (Encr.AES_CBC, Integ.NONE),
        (Encr(1000), Integ.HMAC_SHA2_256_128),
    ],
)
def test_the_floor(encr: Encr, integ: Integ) -> None:
    weak = with_child(encr=encr, encr_bits=0, integ=integ)
    refused(check_algorithms(weak, connection(), Rules()), encr.name)
    ike = replace(context().current, encr=encr, encr_bits=0, integ=integ)
    refused(check_algorithms(context(generations=(ike,)), connection(), Rules()), encr.name)


def test_the_floor_of_the_prf_and_of_ancestors() -> None:
    now = context().current
    old = replace(now, prf=Prf.HMAC_MD5, spi_i=bytes(range(8)))
    refused(check_algorithms(context(generations=(old, now)), connection(), Rules()), "HMAC_MD5")


def test_the_operators_proposals_are_the_measure_in_both_directions() -> None:
    weak = with_child(encr=Encr.DES3, encr_bits=0, integ=Integ.HMAC_SHA1_96)
    assert (
        reasons(check_algorithms(weak, connection(), Rules(esp=(ConfiguredProposal.parse("3des-sha1"),))))
        == []
    )
    only = Rules(
        ike=(ConfiguredProposal.parse("aes256-sha256-x25519"),),
        esp=(ConfiguredProposal.parse("aes256gcm16"),),
    )
    found = reasons(check_algorithms(context(), connection(), only))
    assert ["aes256-sha256-x25519" in found[0], "aes256gcm16" in found[1]] == [True, True]


@pytest.mark.parametrize(
    ("text", "changes", "fits"),
    [
        ("aes128gcm16", {}, True),
        ("aes128gcm16-x25519", {}, True),  # IKE_AUTH makes the first without a key exchange
        ("aes128gcm16-x25519", {"ke": KeMethod.CURVE_25519}, True),
        ("aes128gcm16", {"ke": KeMethod.CURVE_25519}, False),
        ("aes128gcm16-esn", {}, False),
        ("aes128gcm16-esn-noesn", {"esn": True}, True),
        ("aes128gcm16", {"esn": True}, False),
        ("aes128gcm8", {}, False),
        ("aes256gcm16", {}, False),
        ("aes128-sha256", {"encr": Encr.AES_CBC, "integ": Integ.HMAC_SHA2_256_128}, True),
        ("aes128-sha512", {"encr": Encr.AES_CBC, "integ": Integ.HMAC_SHA2_256_128}, False),
        ("chacha20poly1305", {"encr": Encr.CHACHA20_POLY1305, "encr_bits": 256}, True),
    ],
)
def test_proposals_of_children(text: str, changes: dict[str, Any], fits: bool) -> None:
    assert ConfiguredProposal.parse(text).has_esp(with_child(**changes).children[0]) is fits


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("aes128gcm16-prfsha256-x25519", True),
        ("aes128gcm16-prfsha256-x25519-ke1_mlkem768", True),
        ("aes128gcm16-prfsha384-x25519", False),
        ("aes128gcm16-prfsha256-ecp256", False),
        ("aes128-sha256-x25519", False),
    ],
)
def test_proposals_of_the_ike_sa(text: str, fits: bool) -> None:
    assert ConfiguredProposal.parse(text).has_ike(context().current) is fits


def test_the_prf_is_that_of_the_integrity_algorithm() -> None:
    assert ConfiguredProposal.parse("aes128-sha384-modp3072").prf == {Prf.HMAC_SHA2_384}


# The reported form is constructed after proposal_printf_hook and test_proposal.c of strongSwan 6.0.6,
# because no charon that reports proposals was at hand.


@pytest.mark.parametrize(
    ("text", "changes", "fits"),
    [
        ("ESP:AES_GCM_16_128/NO_EXT_SEQ", {}, True),
        ("ESP:AES_GCM_16_128/CURVE_25519/NO_EXT_SEQ", {"ke": KeMethod.CURVE_25519}, True),
        ("ESP:AES_GCM_16_128/NO_EXT_SEQ", {"ke": KeMethod.CURVE_25519}, False),
        ("ESP:AES_GCM_16_256/NO_EXT_SEQ", {}, False),
        ("ESP:AES_GCM_16_128/EXT_SEQ", {}, False),
        ("ESP:AES_GCM_16_128/EXT_SEQ/NO_EXT_SEQ", {"esn": True}, True),
        ("ESP:CHACHA20_POLY1305_256/NO_EXT_SEQ", {"encr": Encr.CHACHA20_POLY1305, "encr_bits": 256}, True),
        (
            "ESP:AES_CBC_128/HMAC_SHA2_256_128/NO_EXT_SEQ",
            {"encr": Encr.AES_CBC, "integ": Integ.HMAC_SHA2_256_128},
            True,
        ),
        (
            "ESP:3DES_CBC/HMAC_SHA1_96/NO_EXT_SEQ",
            {"encr": Encr.DES3, "encr_bits": 0, "integ": Integ.HMAC_SHA1_96},
            True,
        ),
        ("ESP:SERPENT_CBC_128/AES_CBC_128/HMAC_SHA2_512_256/NO_EXT_SEQ", {}, False),
    ],
)
def test_proposals_of_children_that_charon_reports(text: str, changes: dict[str, Any], fits: bool) -> None:
    found = reasons(check_algorithms(with_child(**changes), child_of(esp_proposals=[text]), Rules()))
    assert [text in one for one in found] == ([] if fits else [True])
    # an operator's own list is the measure, whatever charon has
    assert not reasons(
        check_algorithms(
            context(), child_of(esp_proposals=[text]), Rules(esp=(ConfiguredProposal.parse("aes128gcm16"),))
        )
    )


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("IKE:AES_GCM_16_128/PRF_HMAC_SHA2_256/CURVE_25519", True),
        (
            "IKE:AES_GCM_16_128/AES_GCM_16_256/PRF_HMAC_SHA2_256/PRF_HMAC_SHA2_384/ECP_256/CURVE_25519/KE1_ML_KEM_768",
            True,
        ),
        ("IKE:AES_GCM_16_128/PRF_HMAC_SHA2_384/CURVE_25519", False),
        ("IKE:AES_GCM_16_128/PRF_HMAC_SHA2_256/ECP_256_BP", False),
    ],
)
def test_proposals_of_the_ike_sa_that_charon_reports(text: str, fits: bool) -> None:
    assert (not reasons(check_algorithms(context(), connection(proposals=[text]), Rules()))) is fits


@pytest.mark.parametrize("told", ["aes128-sha256", [], ["AH:HMAC_SHA2_256_128/NO_EXT_SEQ"], ["ESP:"], [""]])
def test_the_floor_holds_where_reported_proposals_cannot_be_read(told: Any) -> None:
    weak = with_child(encr=Encr.DES3, encr_bits=0, integ=Integ.HMAC_SHA1_96)
    refused(check_algorithms(weak, child_of(esp_proposals=told), Rules()), "too weak")
    assert not reasons(check_algorithms(context(), child_of(esp_proposals=told), Rules()))


@pytest.mark.parametrize("text", ["default", "aes128-sha3", "sha256-x25519", "", "aes128gcm16-ke1_rot13"])
def test_no_proposal(text: str) -> None:
    with pytest.raises(ValueError, match="is no proposal"):
        ConfiguredProposal.parse(text)


@pytest.mark.parametrize("number", [0, 1, 5, 255])
def test_reserved_spis(number: int) -> None:
    spi = number.to_bytes(4)
    refused(check_spis(with_child(spi_in=spi)), "reserved")
    refused(check_spis(with_child(spi_out=spi)), "reserved")
    assert reasons(check_spis(with_child(spi_in=bytes((0, 0, 1, 0))))) == []


@pytest.mark.parametrize("which", ["spi_i", "spi_r"])
def test_an_ike_spi_of_nobody(which: str) -> None:
    one = replace(context().current, **{which: bytes(8)})
    refused(check_spis(context(generations=(one,))), "IKE SPI is 0")


def test_one_spi_for_two() -> None:
    def twice(**changes: Any) -> IkeContext:
        first = context().children[0]
        return context(children=(first, replace(first, **changes)))

    refused(check_spis(twice(spi_out=b"\xc9abc")), "inbound")
    refused(check_spis(twice(spi_in=b"\xc9abc")), "outbound")
    assert reasons(check_spis(twice(spi_in=b"\xc9abc", spi_out=b"\xc9xyz"))) == []
    now = context().current
    refused(check_spis(context(generations=(now, now))), "rekeyed from")


# How much.


@pytest.mark.parametrize("which", ["mid_initiator", "mid_responder"])
def test_message_ids_at_their_end(which: str) -> None:
    for number in (MID_END, (1 << 32) - 1):
        refused(check_counters(context(**{which: number})), str(number))
    assert reasons(check_counters(context(**{which: MID_END - 1}))) == []


@pytest.mark.parametrize(
    "lifetime", [Lifetime(rekey=-1), Lifetime(reauth=-5), Lifetime(hard=-1), Lifetime(rekey=14403)]
)
def test_lifetimes_of_the_ike_sa(lifetime: Lifetime) -> None:
    refused(check_lifetimes(context(lifetime=lifetime), connection()), " s")


@pytest.mark.parametrize(
    "lifetime", [Lifetime(rekey=-1), Lifetime(hard=-1), Lifetime(rekey=3603), Lifetime(bytes_limit=-1)]
)
def test_lifetimes_of_children(lifetime: Lifetime) -> None:
    refused(check_lifetimes(with_child(lifetime=lifetime), connection()), "net has")


def test_lifetimes_that_the_connection_gives() -> None:
    here = with_child(context(lifetime=Lifetime(rekey=14400)), lifetime=Lifetime(rekey=3600, hard=3960))
    assert reasons(check_lifetimes(here, connection())) == []
    for_ever = replace(child_of(rekey_time="0"), rekey=0)
    here = with_child(context(lifetime=Lifetime(rekey=1 << 30)), lifetime=Lifetime(rekey=1 << 30))
    assert reasons(check_lifetimes(here, for_ever)) == []


def test_bounds() -> None:
    def children(count: int, names: int) -> tuple[ChildContext, ...]:
        return tuple(replace(context().children[0], name=f"net{n % names}") for n in range(count))

    assert reasons(check_bounds(context(children=children(16, 1)))) == []
    refused(check_bounds(context(children=children(17, 1))), "named net0")
    refused(check_bounds(context(children=children(65, 65))), "65 CHILD_SAs")
    # and then nothing else is looked at: it would take as long as a peer likes
    many = context(children=children(65, 65), mid_initiator=1 << 40)
    found = check_policy(many, connection(), Rules(), pools(), PLACE)
    assert [verdict.status for verdict in found] == [Status.TOO_MUCH]
    refused(check_bounds(context(generations=(context().current,) * 17)), "17 IKE_SAs")
    refused(check_bounds(with_child(remote_ts=(selector("10.4.0.10"),) * 256)), "256 traffic selectors")


# What charon tells.


def config(**changes: Any) -> HostConfig:
    return HostConfig((OWN,), peers={"psg": frozenset({PEER})}, **changes)


def test_admission_joins_what_charon_tells_with_the_configuration() -> None:
    known = {"mn": CONNECTION}
    assert admit(context(), known, POOLS, config()) == []
    assert admit(context(connection="other"), known, POOLS, config()) == []  # `check_names` refuses it
    inner = {"psg": (ip_address("10.4.0.10"),)}
    assert len(reasons(admit(context(), known, POOLS, config(forward_via=inner)))) == 2
    rules = {"mn": Rules(esp=(ConfiguredProposal.parse("aes256gcm16"),))}
    refused(admit(context(), known, POOLS, config(rules=rules)), "aes256gcm16")


@pytest.mark.parametrize(
    "broken",
    [
        {"mn": {**CONNECTION, "rekey_time": "soon"}},
        {"mn": CONNECTION, "other": {"children": {"x": {"local-ts": ["10.0.0.0/33"]}}}},
        {"mn": CONNECTION, "other": {"children": {"x": {"local-ts": ["10.0.0.0/8[nosuchprotocol]"]}}}},
        {"mn": CONNECTION, "other": {"children": {"x": {"local-ts": ["10.0.0.0/8[tcp/nosuchport]"]}}}},
    ],
)
def test_what_cannot_be_read_allows_nothing(broken: dict[str, Any]) -> None:
    refused(admit(context(), broken, POOLS, config()), "cannot be told")


def test_a_pool_without_addresses_allows_nothing() -> None:
    refused(admit(context(), {"mn": CONNECTION}, {"mn": {"base": "", "size": "1"}}, config()), "base address")
    refused(
        admit(context(), {"mn": CONNECTION}, {"mn": {"base": "10.4.0.10", "size": "0"}}, config()), "pool"
    )


@pytest.mark.parametrize("text", ["10.4.0.9-10.4.0.1", "10.4.0.1-fd04::1", "10.4.0.1-", "mn"])
def test_no_range(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Range.parse(text)


@given(contexts())
@settings(max_examples=150, deadline=None)
def test_whatever_a_peer_sends_gets_reasons_and_raises_nothing(rogue: IkeContext) -> None:
    net = CONNECTION["children"]["net"]
    named = {**CONNECTION, "children": {each.name: net for each in rogue.children}}
    verdicts = admit(rogue, {"other": CONNECTION, rogue.connection: named}, POOLS, config())
    assert verdicts, "nothing that is made up at random is what the connection allows"
    for verdict in verdicts:
        assert verdict.status in OF_CLAIMS and verdict.detail
