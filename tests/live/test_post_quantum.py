"""SAs with additional key exchanges (RFC 9370): ML-KEM after X25519. Needs charons of strongSwan 6.

The installed charon has no ML-KEM on Debian 12 (5.9.8) and 13 (6.0.1); `tests/run.sh post-quantum` runs these
with that of Debian sid.
"""

from __future__ import annotations

import pytest

from ikectx_cli.lab.net import CHARONS

from .world import World, spis, until

pytestmark = pytest.mark.live

IKE = "aes256gcm16-prfsha256-x25519-ke1_mlkem768"
TWICE = "aes256-sha256-prfsha384-x25519-ke1_mlkem768-ke2_mlkem1024"
ESP = "aes256gcm16-x25519-ke1_mlkem768"


def has_ml_kem(world: World, *hosts: str) -> bool:
    return all("ML_KEM_768" in str(world.lab.vici(host).request("get-algorithms")) for host in hosts)


@pytest.fixture
def capable(world: World) -> World:
    if not has_ml_kem(world, *CHARONS):
        pytest.skip(
            f"needs charons that offer ML-KEM (RFC 9370), which strongSwan {world.lab.strongswan()} as it is "
            "installed here does not; `tests/run.sh post-quantum` runs it with that of Debian sid"
        )
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
    capable.lives_through_a_move("nsg")


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


def test_a_resync_tells_of_additional_key_exchanges(capable: World) -> None:
    # IKE_SA_INIT, IKE_INTERMEDIATE, IKE_AUTH while no agent runs; RESYNC replays both IKE_ADDs of the SA and
    # has its child rekeyed, with IKE_FOLLOWUP_KE
    capable.reload(capable.tunnel_with(ike=IKE, esp=ESP))  # nothing starts the agent while it is away
    with capable.without_agent("psg"):
        capable.up(ike=IKE, esp=ESP)
    assert capable.ikectx("psg", "resync", "--yes", "--json").code == 0
    until(lambda: capable.transfer("psg", "nsg").code == 0, "the SA can be moved")
    capable.settle("nsg")
    capable.talks("nsg")
    capable.ends("mn", "nsg")


def test_a_gateway_with_an_older_charon_refuses(world: World) -> None:
    # PCTD -> CTDR with KEY_EXCHANGES: nsg's charon has no way to be told of ADD_KES
    if not has_ml_kem(world, "mn", "psg") or has_ml_kem(world, "nsg"):
        pytest.skip(
            "needs charons that offer ML-KEM at mn and psg, and one that does not at nsg; here is strongSwan "
            f"{world.lab.strongswan()}; `tests/run.sh post-quantum` runs it"
        )
    older = {"nsg": "connections { mn { proposals = aes256gcm16-prfsha256-x25519 } }\n"}
    world.up(ike=IKE, overrides=older)
    done = world.transfer("psg", "nsg")
    assert done.code != 0
    assert done.report["result"] == "refused", done.out
    assert done.report["status"]["name"] == "KEY_EXCHANGES"
    assert "too old for the SA's additional key exchanges" in world.log("nsg", "agent.out")
    world.serves("psg")
    world.talks("psg")
    world.ends("mn", "psg")
