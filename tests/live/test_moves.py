"""An SA that has moved goes on as if nothing had been, and moves again."""

from __future__ import annotations

from typing import Any

import pytest

from .world import PATIENCE, TUNING, World, spis, until

pytestmark = pytest.mark.live

NEVER_AGAIN = TUNING.replace("timeout = 0.4", "timeout = 60").replace("limit = 1", "limit = 60")
"""A request that is not answered is lost."""


def test_there_and_back(world: World) -> None:
    # psg <-> nsg  CXTP PCTD, CTDR, CTD; then over the raw socket at nsg
    # nsg -> MN    INFORMATIONAL  N(UPDATE_SA_ADDRESSES), N(NAT_DETECTION_*), N(COOKIE2)
    # MN -> nsg    INFORMATIONAL  N(NAT_DETECTION_*), N(COOKIE2);  nsg -> psg  CTDR
    # and the same the other way round
    before = world.moved()
    world.move("nsg", "psg")
    world.settle("psg")
    assert spis(world.one("psg")) == spis(before)
    world.talks("psg")
    world.ends("mn", "psg")


def test_the_ike_sa_is_the_same_and_nobody_authenticates_again(world: World) -> None:
    # as above; in the whole test one IKE_SA_INIT and one IKE_AUTH
    world.moved()
    text = world.log("mn")
    assert text.count("generating IKE_SA_INIT request") == 1
    assert text.count("generating IKE_AUTH request") == 1
    assert text.count("UPD_SA_ADDR") == 1
    assert "IKE_AUTH" not in world.log("nsg")


def test_ten_moves_in_a_row(world: World) -> None:
    # the exchanges of the first test, ten times with one IKE_SA; each gateway uses the message IDs on
    # where the other left off
    before = world.up()
    here, there = "psg", "nsg"
    for number in range(10):
        report = world.move(here, there)
        assert report["epoch"] == number + 1
        world.settle(there)
        here, there = there, here
    assert spis(world.one(here)) == spis(before)
    world.talks(here)
    world.ends(here, here)


@pytest.mark.parametrize("host", ["mn", "nsg"])
def test_rekeys_after_a_move(world: World, host: str) -> None:
    # psg -> nsg moves; then `host` begins
    # CREATE_CHILD_SA  SA, N, KE        the IKE_SA is rekeyed, its children go over to the new one
    # CREATE_CHILD_SA  N(REKEY_SA) ...  a child is rekeyed with the new SK_d
    world.moved()
    world.rekey_ike(host, "nsg")
    world.rekey_child(host, "nsg")
    world.ping()
    world.ends("mn", "nsg")


@pytest.mark.parametrize("host", ["mn", "nsg"])
def test_terminate_after_a_move(world: World, host: str) -> None:
    # psg -> nsg moves; then `host` sends INFORMATIONAL D, the other answers it
    world.moved()
    world.ends(host, "nsg")


@pytest.mark.parametrize("host", ["mn", "nsg"])
def test_dead_peer_detection_after_a_move(world: World, host: str) -> None:
    # psg -> nsg moves; then `host` sends an empty INFORMATIONAL whenever a second was silent, the other
    # answers it with an empty one
    connection = "psg" if host == "mn" else "mn"
    world.moved(overrides={host: f"connections {{ {connection} {{ dpd_delay = 1s }} }}\n"})
    before = world.log(host).count("sending DPD request")

    def answered() -> int:
        asked = world.log(host).split("sending DPD request")[before + 1 :]
        return sum("parsed INFORMATIONAL response" in said for said in asked)

    until(lambda: answered() >= 2, "two DPD requests are answered")
    world.serves("nsg")


def test_a_moved_sa_is_rekeyed_and_moves_back(world: World) -> None:
    # psg -> nsg; IKE rekey by the MN, IKE rekey by nsg (so that nsg is the initiator of the IKE_SA now);
    # nsg -> psg: psg knows nothing of these exchanges but what the context says
    world.moved()
    world.rekey_ike("mn", "nsg")
    world.rekey_ike("nsg", "nsg")
    world.move("nsg", "psg")
    world.settle("psg")
    world.talks("psg")
    world.ends("psg", "psg")


def test_the_lease_of_a_moved_sa(world: World) -> None:
    # psg -> nsg: psg's pool gets the virtual IP back, so that the same MN may connect there anew later
    # (IKE_SA_INIT, IKE_AUTH) when nsg has let it go
    def leased(host: str) -> list[Any]:
        pools = world.lab.vici(host).get_pools(True)
        return [lease for lease in pools["mn"].get("leases", {}).values() if lease["status"] == "online"]

    world.up()
    assert len(leased("psg")) == 1
    world.move("psg", "nsg")
    until(lambda: not leased("psg"), "psg's pool has its address back", PATIENCE)
    world.settle("nsg")
    world.ends("mn", "nsg")
    world.up()


def test_what_the_mobile_node_asks_at_once_is_answered_at_once(world: World) -> None:
    # user-space ESP cannot take another address: mn rekeys (CREATE_CHILD_SA) before it even answers nsg,
    # whose charon is still mute. Without the recorder mn would send it again 4 s later (here: later than
    # anybody waits).
    world.tune(("mn",), NEVER_AGAIN)
    try:
        world.up()
        for source, to in (("psg", "nsg"), ("nsg", "psg")):
            world.move(source, to)
            world.settle(to)
    finally:
        world.tune(("mn",))
    assert "queueing CHILD_REKEY task" in world.log("mn", "charon.log")
