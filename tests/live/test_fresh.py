"""`rekey_after`: once an SA has come to nsg, nobody but nsg and its mobile node knows its keys."""

from __future__ import annotations

import pytest

from .world import World, spis, until

pytestmark = pytest.mark.live


def test_an_sa_that_came_gets_fresh_keys(world: World) -> None:
    # psg -> nsg moves; then nsg, asked by its agent:
    # CREATE_CHILD_SA  SA, N, KE            the IKE_SA; its children go over to the new one
    # CREATE_CHILD_SA  N(REKEY_SA) ...      each child, with the new SK_d
    before = world.up()
    with world.agent_with("nsg", "[transfer]\n", "[transfer]\nrekey_after = true\n"):
        children = set(world.children("mn").values())
        known = world.keys("psg")
        # `World.move` looks for the same SPIs: they may be others already
        done = world.transfer("psg", "nsg")
        assert done.code == 0 and done.report["result"] == "moved", done

        def fresh() -> bool:
            now = world.lab.list_sas("nsg")
            return (
                len(now) == 1
                and spis(world.one("nsg")) != spis(before)
                and not children & set(world.children("nsg").values())
                and world.children("nsg") != {}
            )

        until(fresh, "nsg has rekeyed the IKE_SA and its child")
        world.settle("nsg")
        world.talks("nsg")
        assert known and not set(known) & set(world.keys("nsg"))
        world.ends("mn", "nsg")
