"""SAs with additional key exchanges (RFC 9370): ML-KEM after X25519. Needs charons of strongSwan 6.

The installed charon is older on some systems; IKECTX_LAB_CHARON names another one.
"""

from __future__ import annotations

import pytest

from ikectx_cli.lab_net import CHARONS

from .world import World, spis

pytestmark = pytest.mark.live

IKE = "aes256gcm16-prfsha256-x25519-ke1_mlkem768"
TWICE = "aes256-sha256-prfsha384-x25519-ke1_mlkem768-ke2_mlkem1024"
ESP = "aes256gcm16-x25519-ke1_mlkem768"


@pytest.fixture
def capable(world: World) -> World:
    for host in CHARONS:
        if "ML_KEM_768" not in str(world.lab.vici(host).request("get-algorithms")):
            pytest.skip(f"{host}'s charon has no ML-KEM")
    return world


@pytest.mark.parametrize("ike", [IKE, TWICE], ids=["one", "two"])
def test_an_ike_sa_with_additional_key_exchanges(capable: World, ike: str) -> None:
    # IKE_SA_INIT SA, KE, N; IKE_INTERMEDIATE KE(1) [; IKE_INTERMEDIATE KE(2)]; IKE_AUTH: charon mirrors the
    # keys of each round. Later rekeys: CREATE_CHILD_SA SA, N, KE; IKE_FOLLOWUP_KE KE(1) [KE(2)]
    before = capable.up(ike=ike)
    capable.move("psg", "nsg")
    capable.settle("nsg")
    capable.talks("nsg")
    capable.move("nsg", "psg")
    capable.settle("psg")
    assert spis(capable.one("psg")) != spis(before)
    capable.ends("mn", "psg")


@pytest.mark.parametrize("order", ["mn", "psg", "psg mn"])
def test_an_ike_sa_rekeyed_with_additional_key_exchanges(capable: World, order: str) -> None:
    # before the move: CREATE_CHILD_SA SA, N, KE; IKE_FOLLOWUP_KE KE(1). The child's keys stem from the
    # SK_d that IKE_INTERMEDIATE made, so the context holds the chain
    capable.up(ike=TWICE)
    for host in order.split():
        capable.rekey_ike(host, "psg")
    capable.agree("psg")
    capable.move("psg", "nsg")
    capable.settle("nsg")
    capable.talks("nsg")
    capable.ends("nsg", "nsg")


@pytest.mark.parametrize("host", ["mn", "psg"])
def test_a_child_with_additional_key_exchanges(capable: World, host: str) -> None:
    # before the move, by `host`: CREATE_CHILD_SA N(REKEY_SA), SA, N, KE, TS; IKE_FOLLOWUP_KE KE(1); so
    # CHILD_ADD has two secrets
    capable.up(ike=IKE, esp=ESP)
    capable.rekey_child(host, "psg")
    capable.agree("psg")
    capable.move("psg", "nsg")
    capable.settle("nsg")
    capable.talks("nsg")
    capable.move("nsg", "psg")
    capable.settle("psg")
    capable.ends("psg", "psg")
