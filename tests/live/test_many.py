"""Several mobile nodes at once: they move together, and none disturbs another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ikectx_cli.lab.fleet import Fleet
from ikectx_cli.lab.net import OUTER

from .world import World, spis, until

pytestmark = pytest.mark.live

COUNT = 10


@pytest.fixture
def fleet(world: World) -> Iterator[Fleet]:
    with Fleet(world.lab, COUNT).connected() as fleet:
        yield fleet


def served(world: World, gateway: str, before: set[tuple[str, str]]) -> bool:
    """Only that gateway has them, all are up, and each has one child at both ends."""
    other = "nsg" if gateway == "psg" else "psg"
    there, mobile = world.lab.list_sas(gateway), world.lab.list_sas("mn")
    assert world.lab.list_sas(other) == []
    assert {spis(sa) for sa in there} == {spis(sa) for sa in mobile} == before
    assert {sa["state"] for sa in (*there, *mobile)} == {"ESTABLISHED"}
    assert {sa["remote-host"] for sa in mobile} == {OUTER[gateway][4]}
    children = [
        {
            frozenset((child["spi-in"], child["spi-out"]))
            for sa in sas
            for child in sa["child-sas"].values()
            if child["state"] == "INSTALLED"
        }
        for sas in (there, mobile)
    ]
    return children[0] == children[1] and len(children[0]) == COUNT


def test_all_at_once(world: World, fleet: Fleet) -> None:
    # for each of them, all at a time: PCTD, CTDR, CTD; nsg -> MN INFORMATIONAL N(UPDATE_SA_ADDRESSES); CTDR.
    # All the way back, too. Then an IKE rekey of each from both sides.
    before = {spis(sa) for sa in world.lab.list_sas("mn")}
    for source, to in (("psg", "nsg"), ("nsg", "psg")):
        fleet.move(source, to)
        until(lambda to=to: served(world, to, before), f"{to} serves all")
    for host in ("mn", "psg"):
        old = {spis(sa) for sa in world.lab.list_sas("mn")}
        for sa in world.lab.list_sas(host):
            world.lab.vici(host).rekey(ike_id=int(sa["uniqueid"]))
        until(
            lambda old=old: (
                not old & {spis(sa) for sa in world.lab.list_sas("mn")}
                and served(world, "psg", {spis(sa) for sa in world.lab.list_sas("mn")})
            ),
            f"all are rekeyed by {host}",
        )
    assert world.idle("psg") and world.idle("nsg")


def test_one_of_many(world: World, fleet: Fleet) -> None:
    # one moves by its identity; the others do not notice
    done = world.transfer("psg", "nsg", "--peer", "n3.example")
    assert done.code == 0, done
    assert done.report["mn"] == "n3.example"
    assert [sa["remote-id"] for sa in world.lab.list_sas("nsg")] == ["n3.example"]
    assert len(world.lab.list_sas("psg")) == COUNT - 1
    # without a name nobody guesses
    assert world.transfer("psg", "nsg").code == 6
    # by SPI, and the rest
    spi = world.lab.list_sas("psg")[0]["responder-spi"]
    assert world.transfer("psg", "nsg", "--spi", spi[:8]).code == 0
    assert world.transfer("psg", "nsg", "--all").code == 0
    before = {spis(sa) for sa in world.lab.list_sas("mn")}
    until(lambda: served(world, "nsg", before), "nsg serves all")


def test_one_mobile_node_is_slow(world: World, fleet: Fleet) -> None:
    # as above, but what nsg asks one of the MNs is dropped while all the others are moved and activated
    # (charon activates whole segments); then it gets through, and that one is moved like the others
    before = {spis(sa) for sa in world.lab.list_sas("mn")}
    slow = next(sa for sa in world.lab.list_sas("psg") if sa["remote-id"] == "n2.example")
    rule = "add table inet test; add chain inet test way { type filter hook forward priority 0; };"
    here, there = OUTER["nsg"][4], slow["remote-host"]
    world.must("core", "nft", f"{rule} add rule inet test way ip saddr {here} ip daddr {there} drop")

    def moved() -> list[str]:
        return [sa["remote-id"] for sa in world.lab.list_sas("mn") if sa["remote-host"] == here]

    def rekeyed() -> bool:
        # the others are active at nsg: their mobile nodes' rekeys are answered
        found = [sa for sa in world.lab.list_sas("nsg") if sa["state"] == "ESTABLISHED"]
        return len(found) >= COUNT - 1 and not any(sa.get("tasks-active") for sa in world.lab.list_sas("mn"))

    # asked for half a minute, however long it takes to move the others and to see that they are active
    with world.agent_with("nsg", "[transfer]\n", "[transfer]\nmn_tries = 7\n"):
        work = world.begin("psg", "transfer", "--to", "nsg", "--all", "--json")
        until(lambda: len(moved()) == COUNT - 1, "the others have moved")
        until(rekeyed, "the others are active", 8.0)  # the last question comes after 20 s
        world.unblock()
        done = world.end(work)
    assert done.code == 0, done
    until(lambda: served(world, "nsg", before), "nsg serves all")
    for sa in world.lab.list_sas("nsg"):
        world.lab.vici("nsg").rekey(ike_id=int(sa["uniqueid"]))
    until(lambda: not before & {spis(sa) for sa in world.lab.list_sas("mn")}, "all are rekeyed by nsg")
