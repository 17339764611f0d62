"""Stores that are lost, or restored from a backup, while an SA moves: never two owners, and a way out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ikectx_cli.lab.net import GATEWAYS

from .test_crashes import asked_in_vain
from .world import World, until

pytestmark = pytest.mark.live


def state(world: World, host: str) -> Path:
    return world.lab.work / host / "state"


def unconfirmed(world: World, *, up: bool = True) -> None:
    """psg has let the SA go and died; nsg serves it and could not tell anybody."""
    work = asked_in_vain(world, up=up)
    world.lab.stop("psg", "agent", kill=True)
    world.unblock()
    until(lambda: world.one("nsg")["state"] == "ESTABLISHED" and not world.muted("nsg"), "nsg serves it")
    world.end(work)


@pytest.mark.parametrize("store", ["lost", "old"])
def test_the_new_gateway_lost_its_store_after_the_move(world: World, tmp_path: Path, store: str) -> None:
    # CTD, INFORMATIONAL N(UPDATE_SA_ADDRESSES), but no CTDR; then nsg has a new store, or that of before.
    # The CTD comes again, and charon serves the SA: CTDR with yes, and psg drops its part.
    backup = tmp_path / "backup"
    with world.without_agent("nsg"):
        shutil.copytree(state(world, "nsg"), backup)
    unconfirmed(world)
    world.lab.stop("nsg", "agent", kill=True)
    shutil.rmtree(state(world, "nsg"))
    if store == "old":
        shutil.copytree(backup, state(world, "nsg"))
    for host in GATEWAYS:
        world.restart(host)
    until(lambda: world.idle("psg") and world.idle("nsg"), "no transfer is open", 30)
    world.agree("nsg")
    assert world.lab.list_sas("psg") == []
    entry, *_ = world.ikectx("nsg", "history", "--json").json
    assert (entry["result"], entry["epoch"]) == ("moved", 1)
    assert "charon has the IKE_SA" in entry["detail"]
    for host in GATEWAYS:
        assert world.ikectx(host, "history", "--verify", "--json").json["ok"]
        assert world.ikectx(host, "resolve", "--json").json == {"in_doubt": []}
    world.ping()


def test_the_old_gateway_has_a_store_from_before_the_move(world: World, tmp_path: Path) -> None:
    # psg's store says that it serves the SA, and knows its keys; charon there still has it, muted. It is
    # not served, and cannot be moved, until the operator has dropped it: charon's Delete does not leave psg.
    world.up()
    world.recorded("psg")
    backup = tmp_path / "backup"
    with world.without_agent("psg"):
        shutil.copytree(state(world, "psg"), backup)
    unconfirmed(world, up=False)
    shutil.rmtree(state(world, "psg"))
    shutil.copytree(backup, state(world, "psg"))
    world.restart("psg")
    until(lambda: world.ikectx("psg", "resolve", "--json").json["in_doubt"], "psg finds what is mute")
    (doubt,) = world.ikectx("psg", "resolve", "--json").json["in_doubt"]
    assert doubt["decisions"] == ["give-up"] and "IKE is dropped" in doubt["here"]["kernel"]
    assert "the store does not know why" in doubt["here"]["state"]
    (listed,) = world.ikectx("psg", "list", "--json").json
    assert listed["movable"] is False
    done = world.transfer("psg", "nsg")
    assert done.code == 4, done
    assert world.muted("psg")
    shown = world.ikectx("psg", "resolve", doubt["name"], "--give-up")
    assert shown.code == 0 and "nothing was changed" in shown.out
    assert world.ikectx("psg", "resolve", doubt["name"], "--reclaim", "--yes", "--json").code == 8
    assert len(world.lab.list_sas("psg")) == 1
    done = world.ikectx("psg", "resolve", doubt["name"], "--give-up", "--yes", "--json")
    assert done.code == 0, done
    assert world.lab.list_sas("psg") == [] and not world.muted("psg")
    assert world.ikectx("psg", "resolve", "--json").json == {"in_doubt": []}
    # the detour was in the store, so packets that reach psg go nowhere
    world.agree("nsg")
    world.rekey_child("mn", "nsg")


def test_the_operator_gives_up_what_the_other_gateway_serves(world: World) -> None:
    # psg has let go, and nsg's agent is gone: `resolve` shows both sides, and drops psg's part
    unconfirmed(world)
    world.lab.stop("nsg", "agent", kill=True)
    world.restart("psg")
    until(lambda: world.ikectx("psg", "resolve", "--json").json["in_doubt"], "psg asks in vain")
    (doubt,) = world.ikectx("psg", "resolve", "--json").json["in_doubt"]
    assert (doubt["here"]["epoch"], doubt["there"]["epoch"], doubt["there"]["connected"]) == (0, 1, False)
    assert doubt["there"]["last_heard"] is None
    done = world.ikectx("psg", "resolve", doubt["transfer"], "--give-up", "--yes", "--json")
    assert done.code == 0, done
    assert world.lab.list_sas("psg") == [] and not world.muted("psg")
    (line, *_) = world.ikectx("psg", "history", "--audit", "--json").json
    assert "given up here by the operator (uid 0)" in line["reason"]
    world.restart("nsg")
    world.settle("nsg")
    world.talks("nsg")
