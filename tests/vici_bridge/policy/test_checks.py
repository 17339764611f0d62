"""Each reason not to take an SA in has its own refusal."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ikectx.numbers import Status
from ikectx.sa.context import (
    AuthRound,
    Endpoint,
    FinalChild,
    FinalState,
    PeerContext,
    ReplayState,
    Tags,
    TrafficSelector,
)
from ikectx.sa.relocate import relocate
from tests.vici_bridge.vici.test_views import VIEW, context, selector
from vici_bridge.ha.chain import import_messages
from vici_bridge.ha.messages import LONGEST
from vici_bridge.policy.checks import (
    check_address,
    check_covered,
    check_esp_spis,
    check_ike_spis,
    check_installed,
    check_names,
    check_numbers,
    check_selectors,
    check_sizes,
    check_unique,
    check_vips,
    still_here,
)
from vici_bridge.policy.new_names import Taken
from vici_bridge.policy.present import Present
from vici_bridge.vici import views as charon
from vici_bridge.vici.views import EXT_MOBIKE, SaView, sa_view

OTHER = sa_view(
    "other", {**VIEW, "initiator-spi": "aa", "responder-spi": "bb", "remote-vips": [], "child-sas": {}}
)
CONN = {"children": {"net": {}}, "remote-1": {"class": "pre-shared key"}}


def statuses(verdicts: object) -> list[Status]:
    return [verdict.status for verdict in verdicts]  # type: ignore[attr-defined]


def test_nothing_against_a_fitting_context() -> None:
    here = context()
    assert statuses(check_covered(here, 3)) == []
    assert statuses(check_names(here, {"mn": CONN})) == []
    assert statuses(check_ike_spis(here, Present([OTHER]).taken(), [OTHER])) == []
    assert statuses(check_esp_spis(here, Present([OTHER]).taken())) == []
    assert statuses(check_vips(here, [OTHER], {})) == []
    assert statuses(check_selectors(here, [OTHER])) == []


def test_an_mn_without_mobike_cannot_be_told_a_new_address() -> None:
    there = context()
    here = relocate(there, local=Endpoint.of("203.0.113.9", 4500))
    assert statuses(check_address(there, there, False)) == []
    assert statuses(check_address(here, there, False)) == [Status.NO_MOBIKE]
    assert statuses(check_address(here, replace(there, extensions=EXT_MOBIKE), False)) == []
    assert statuses(check_address(here, there, True)) == [Status.NO_ADDRESS]


def test_names() -> None:
    here = context()
    assert statuses(check_names(here, {})) == [Status.NO_CONNECTION]
    assert statuses(check_names(here, {"mn": {"children": {}}})) == [Status.NO_CHILD]


def test_the_peer_must_have_authenticated_as_the_connection_here_asks() -> None:
    here = replace(context(), peer=PeerContext("mn", remote_auth=(AuthRound("psk"),)))
    assert statuses(check_names(here, {"mn": CONN})) == []
    strict = {**CONN, "remote-1": {"class": "public key"}}
    assert statuses(check_names(here, {"mn": strict})) == [Status.AUTHENTICATION]


@pytest.mark.parametrize(
    ("unique", "changes", "refused"),
    [
        ("UNIQUE_NO", {}, False),
        ("UNIQUE_NEVER", {}, False),
        ("UNIQUE_REPLACE", {}, True),
        ("UNIQUE_REPLACE", {"state": "REKEYING"}, True),
        ("UNIQUE_REPLACE", {"state": "PASSIVE"}, False),
        ("UNIQUE_REPLACE", {"remote_id": "CN=another"}, False),
        ("UNIQUE_REPLACE", {"remote_eap_id": "alice"}, False),
        ("UNIQUE_REPLACE", {"local_id": "other.example"}, False),
        ("UNIQUE_REPLACE", {"name": "another"}, False),
        ("UNIQUE_REPLACE", {"remote": Endpoint.of("2001:db8::1", 4500)}, False),
        ("UNIQUE_KEEP", {}, True),
        ("UNIQUE_KEEP", {"remote": context().remote}, False),
    ],
)
def test_what_the_connection_s_unique_allows(unique: str, changes: dict[str, Any], refused: bool) -> None:
    here = context()
    other = replace(
        sa_view(here.connection, VIEW),
        spi_i=bytes(8),
        spi_r=bytes(range(8)),
        local_id=str(here.local_id),
        remote_id=str(here.remote_id),
        remote_eap_id="",
        remote=Endpoint.of("198.51.100.77", 4500),
    )
    connections = {here.connection: {"unique": unique}}
    found = list(check_unique(here, connections, Present([replace(other, **changes)])))
    assert statuses(found) == ([Status.NOT_ALLOWED] if refused else [])
    own = replace(other, spi_i=here.spis[0], spi_r=here.spis[1])
    assert not list(check_unique(here, connections, Present([own])))


def test_ike_spis_as_a_pair_and_alone() -> None:
    here = context()
    pair = replace(OTHER, spi_i=here.spis[0], spi_r=here.spis[1])
    alone = replace(OTHER, spi_r=here.spis[1])
    assert statuses(check_ike_spis(here, Present([pair]).taken(), [pair])) == [Status.IKE_SPI_IN_USE]
    assert statuses(check_ike_spis(here, Present([alone]).taken(), [alone])) == [Status.IKE_SPI_IN_USE]
    promised = Taken(ike=frozenset({here.spis[1]}))
    (verdict,) = check_ike_spis(here, promised)
    assert "promised" in verdict.detail


def test_esp_spis_in_both_directions() -> None:
    here = context()
    full = sa_view("other", VIEW)
    assert statuses(check_esp_spis(here, Present([full]).taken())) == [Status.ESP_SPI_IN_USE] * 2


def test_the_names_of_ah_are_others_than_those_of_esp() -> None:
    here = context()
    view = {**VIEW, "child-sas": {"net-1": {**VIEW["child-sas"]["net-1"], "protocol": "AH"}}}  # type: ignore[dict-item]
    assert statuses(check_esp_spis(here, Present([sa_view("other", view)]).taken())) == []


def test_sequence_numbers_must_be_left_for_the_jump() -> None:
    here = context()
    assert statuses(check_numbers(here, 65536)) == []
    worn = replace(here.children[0], outbound=ReplayState((1 << 32) - 65536))
    assert statuses(check_numbers(replace(here, children=(worn,)), 65536)) == [Status.NUMBERS_SPENT]


def test_virtual_ips_used_or_leased() -> None:
    here = context()
    user = replace(OTHER, remote_vips=(ip_address("10.4.0.10"),))
    assert statuses(check_vips(here, [user], {})) == [Status.VIP_IN_USE]
    [before] = check_vips(here, [replace(user, remote_id=str(here.remote_id))], {})
    assert f"IKE_SA #{user.unique_id} from before it connected anew" in before.detail
    lease = {"leases": {"0": {"address": "10.4.0.10", "identity": "somebody", "status": "online"}}}
    assert statuses(check_vips(here, [], {"pool": lease})) == [Status.VIP_IN_USE]
    own = {"leases": {"0": {"address": "10.4.0.10", "identity": "mn@example.org", "status": "online"}}}
    assert statuses(check_vips(here, [], {"pool": own})) == []


def test_selectors_are_read_once_however_many_sas_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def counted(text: str, strict: bool = True) -> object:
        reads.append(text)
        return ip_network(text, strict=strict)

    monkeypatch.setattr(charon, "ip_network", counted)
    here = context()
    many = [
        sa_view("other", {**VIEW, "child-sas": {"net-1": {**child, "remote-ts": [f"10.77.{number}.1/32"]}}})
        for number in range(200)
        for child in VIEW["child-sas"].values()
    ]
    assert statuses(check_selectors(here, many)) == []
    assert 200 <= len(reads) < 210
    reads.clear()
    assert statuses(check_selectors(here, many)) == []
    assert reads == []


def test_overlapping_selectors() -> None:
    assert statuses(check_selectors(context(), [sa_view("other", VIEW)])) == [Status.SELECTORS_OVERLAP]


def tagged(view: SaView, **tags: object) -> SaView:
    """The SA of `view` with marks or if_ids, and other SPIs."""
    children = tuple(replace(child, tags=Tags(**tags)) for child in view.children)  # type: ignore[arg-type]
    return replace(view, spi_i=b"other123", children=children)


def test_selectors_clash_only_within_one_mark_and_if_id() -> None:
    there = sa_view("other", VIEW)
    assert statuses(check_selectors(context(), [tagged(there, if_id_in=43, if_id_out=43)])) == []
    # only the inbound policies are told apart
    one_way = tagged(there, mark_in=(42, 0xFFFFFFFF))
    assert statuses(check_selectors(context(), [one_way])) == [Status.SELECTORS_OVERLAP]
    child = replace(context().children[0], tags=Tags(if_id_in=43, if_id_out=43))
    comes = replace(context(), children=(child,))
    assert statuses(check_selectors(comes, [there])) == []
    # equal numbers of another gateway mean nothing if they are unique to each SA
    same = tagged(there, if_id_in=43, if_id_out=43)
    assert statuses(check_selectors(comes, [same])) == []
    assert statuses(check_selectors(comes, [same], marked=True)) == [Status.SELECTORS_OVERLAP]


def test_an_installed_sa_is_compared_by_its_marks_and_if_ids_here() -> None:
    ours = replace(tagged(sa_view("mn", VIEW), if_id_in=1, if_id_out=1), spi_i=b"ours1234")
    there = sa_view("other", VIEW)
    assert statuses(check_installed(ours, [ours, there, tagged(there, if_id_in=2, if_id_out=2)])) == []
    (found,) = check_installed(ours, [tagged(there, if_id_in=1, if_id_out=2)])
    assert found.status is Status.SELECTORS_OVERLAP and "if_id_in=1 if_id_out=2" in found.detail


def test_b4_an_sa_that_another_gateway_let_go_is_found_under_any_of_its_names() -> None:
    spi_in = bytes.fromhex("c0000001")
    child = FinalChild(spi_in, ReplayState(), ReplayState())
    final = FinalState(b"\xa1" * 8, b"\xa2" * 8, 3, 4, 1, (child,))
    mn, elsewhere = OTHER.remote.address, ip_address("192.0.2.99")

    def listed(spi_i: bytes, spi_r: bytes, child: bytes) -> SaView:
        children = (replace(sa_view("mn", VIEW).children[0], spi_in=child),)
        return replace(OTHER, spi_i=spi_i, spi_r=spi_r, children=children)

    other = listed(b"other123", b"other456", b"othr")
    same = listed(final.spi_i, final.spi_r, b"othr")
    assert "under the same SPIs" in still_here(final, elsewhere, [same], [same.spis], [])
    # others, whose keys this agent has, or that have nothing of it
    assert still_here(final, elsewhere, [other], [], []) == ""
    assert still_here(final, mn, [other], [other.spis], []) == ""
    # renamed: an SPI has stayed, or at least the mobile node's address
    half = listed(final.spi_i, b"renamed.", b"othr")
    assert "under one of its SPIs" in still_here(final, elsewhere, [half], [], [])
    one = listed(b"renamed.", b"renamed.", spi_in)
    assert "under one of its SPIs" in still_here(final, elsewhere, [one], [], [spi_in])
    assert still_here(final, elsewhere, [one], [one.spis], [spi_in]) == ""
    assert f"a mobile node at {mn}" in still_here(final, mn, [other], [], [])
    assert f"a mobile node at {mn}" in still_here(final, mn, [other], [], [], str(other.remote_id))
    assert still_here(final, mn, [other], [], [], "another.example") == "", "both are behind one NAT"
    # charon has gone, the kernel goes on
    assert f"ESP SA {spi_in.hex()}" in still_here(final, elsewhere, [other], [], [spi_in])


def test_b31_a_selector_that_ends_before_it_begins_is_no_mistake_of_ours() -> None:
    here = context()
    upside_down = TrafficSelector(ip_address("10.1.0.9"), ip_address("10.1.0.1"))
    odd = replace(here, children=(replace(here.children[0], remote_ts=(upside_down,)),))
    assert charon.prefixes((upside_down,)) == []
    assert statuses(check_selectors(odd, [sa_view("mn", VIEW)])) == []  # `policy` refuses it


def test_messages_that_charon_here_would_not_read_are_known_beforehand() -> None:
    nets = tuple(selector(f"172.20.{number}.1") for number in range(146))
    wide = replace(context(), children=(replace(context().children[0], local_ts=nets),))
    few, many = ([one.serialize(LONGEST) for one in import_messages(each, 3)] for each in (context(), wide))
    assert statuses(check_sizes(few, 2048)) == []
    (found,) = check_sizes(many, 2048)
    assert found.status is Status.TOO_MUCH and "CHILD_ADD would have 24" in found.detail
    assert statuses(check_sizes(many, 4096)) == []
