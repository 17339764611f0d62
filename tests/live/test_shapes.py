"""SAs of every shape move: how they were set up, what was rekeyed before, which algorithms they use."""

from __future__ import annotations

from typing import Any

import pytest

from .world import World, spis

pytestmark = pytest.mark.live


@pytest.mark.parametrize("order", ["mn", "psg", "mn psg", "psg psg", "psg mn mn"])
def test_an_ike_sa_that_was_rekeyed(world: World, order: str) -> None:
    # before the move, by each host of `order`: CREATE_CHILD_SA SA, N, KE; INFORMATIONAL D(old IKE_SA).
    # The child's keys stem from the first IKE_SA's SK_d, so the context holds the whole chain.
    first = world.up()
    for host in order.split():
        world.rekey_ike(host, "psg")
    assert spis(world.one("psg")) != spis(first)
    world.lives_through_a_move()


@pytest.mark.parametrize("host", ["mn", "psg"])
def test_a_child_that_was_rekeyed(world: World, host: str) -> None:
    # before the move: CREATE_CHILD_SA N(REKEY_SA), SA, N, TS from `host`; the move follows at once, while
    # charon still lists the old child
    world.up()
    world.rekey_child(host, "psg")
    world.lives_through_a_move()


def test_a_child_rekeyed_between_two_ike_rekeys(world: World) -> None:
    # IKE rekey, child rekey (keys from the second SK_d), IKE rekey: the first generation may be forgotten,
    # the second not
    world.up()
    world.rekey_ike("mn", "psg")
    world.rekey_child("psg", "psg")
    world.rekey_ike("psg", "psg")
    world.lives_through_a_move()


@pytest.mark.parametrize("group", ["x25519", "modp2048", "ecp256"])
def test_a_child_with_its_own_key_exchange(world: World, group: str) -> None:
    # the first child has none; rekeyed by the MN it has: CREATE_CHILD_SA N(REKEY_SA), SA, N, KE, TS both
    # ways, whose secret goes into KEYMAT and into the context
    world.up(esp=f"aes128gcm16-{group}")
    world.rekey_child("mn", "psg")
    world.lives_through_a_move()


def test_two_children(world: World) -> None:
    # CREATE_CHILD_SA SA, N, TS for the second; both move by one exchange with the MN
    world.moved(children=2)
    for child in (1, 2):
        world.ping(child)
    world.rekey_child("nsg", "nsg", "net2")
    world.rekey_child("mn", "nsg", "net")
    for child in (1, 2):
        world.ping(child)
    world.move("nsg", "psg")
    world.settle("psg")
    world.ping(2)
    world.ends("psg", "psg")


def test_two_children_of_two_generations(world: World) -> None:
    # net from the first SK_d; IKE rekey; net2 by CREATE_CHILD_SA from the second SK_d
    world.up(children=1)
    world.rekey_ike("psg", "psg")
    world.tunnel = world.tunnel_with(children=2)
    world.reload(world.tunnel)
    world.lab.initiate("mn", "psg", "net2")
    world.ping(2)
    world.lives_through_a_move()


def test_a_second_child_after_the_move(world: World) -> None:
    # psg -> nsg with one child; then MN -> nsg CREATE_CHILD_SA SA, N, TS for net2
    world.moved(children=1)
    world.tunnel = world.tunnel_with(children=2)
    world.reload(world.tunnel)
    world.lab.initiate("mn", "psg", "net2")
    world.agree("nsg")
    world.ping(2)
    world.ends("nsg", "nsg")


@pytest.mark.parametrize(
    "tunnel",
    [
        pytest.param({"auth": "cert"}, id="certificates"),
        pytest.param({"auth": "eap"}, id="eap-mschapv2"),
        pytest.param({"family": 6}, id="outer-ipv6"),
        pytest.param({"family": 6, "inner": 6}, id="all-ipv6"),
        pytest.param({"inner": 6}, id="inner-ipv6"),
        pytest.param({"vip": False}, id="no-virtual-ip"),
        pytest.param({"initiator": "gateway", "vip": False}, id="gateway-began"),
        pytest.param({"initiator": "gateway", "vip": False, "auth": "cert"}, id="gateway-began-certificates"),
    ],
)
def test_ways_to_set_up(world: World, tunnel: dict[str, Any]) -> None:
    # IKE_SA_INIT and IKE_AUTH (with EAP: five rounds of it) before the move, never after
    sa = world.up(**tunnel)
    if tunnel.get("auth") == "eap":
        assert sa["remote-eap-id"] == "carol"
    assert sa.get("initiator", "no") == ("yes" if tunnel.get("initiator") == "gateway" else "no")
    world.lives_through_a_move()
    assert "IKE_AUTH" not in world.log("nsg")


@pytest.mark.parametrize(
    "ike",
    [
        "aes256-sha256-x25519",
        "aes128ctr-sha512-x25519",
        "aes256gcm16-prfsha384-ecp384",
        "aes128ccm12-prfaescmac-x25519",
        "aes256-sha1-prfaesxcbc-x25519",
        "aes128-aesxcbc-prfsha1-modp2048",
        "aes128-aescmac-prfaescmac-x25519",
        "chacha20poly1305-prfsha512-x25519",
    ],
)
def test_ciphers_of_the_ike_sa(world: World, ike: str) -> None:
    # the exchange with the MN is protected by the agent itself, with keys it derived; each rekey afterwards
    # derives from the SK_d that charon at nsg derived
    world.up(ike=ike)
    world.rekey_ike("mn", "psg")
    world.lives_through_a_move()


@pytest.mark.parametrize("esp", ["aes256-sha256", "aes256gcm16", "chacha20poly1305", "null-sha384"])
def test_ciphers_of_a_child(world: World, esp: str) -> None:
    # before the move: IKE_AUTH and CREATE_CHILD_SA; `move` compares the keys in the context with those that
    # charon derived at the MN and at nsg
    world.up(esp=esp)
    world.lives_through_a_move()
