"""Agents that are killed, gateways that lose sight of each other, and a mobile node that does not answer."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from ikectx_cli.lab.net import GATEWAYS

from .world import World, spis, tasks, until

pytestmark = pytest.mark.live


def test_the_record_outlives_the_agent(world: World) -> None:
    # IKE_SA_INIT, IKE_AUTH, IKE rekey, child rekey under the first agent; the second moves the SA without
    # asking charon to tell all again (which would rekey the child: CREATE_CHILD_SA)
    world.up()
    world.rekey_ike("mn", "psg")
    world.rekey_child("mn", "psg")
    before = world.children("psg")
    world.recorded("psg")
    world.restart("psg", kill=True)
    assert world.children("psg") == before
    assert "cannot be moved" not in world.log("psg", "agent.out")
    world.move("psg", "nsg")
    world.settle("nsg")
    world.restart("nsg", kill=True)
    world.move("nsg", "psg")
    world.settle("psg")
    world.talks("psg")


def test_an_sa_from_before_the_agent_needs_a_resync(world: World) -> None:
    # IKE_SA_INIT, IKE_AUTH while no agent runs; then it is listed, but cannot be moved. After `ikectx resync`
    # psg -> MN CREATE_CHILD_SA N(REKEY_SA), and it can.
    world.reload(world.tunnel)  # nothing starts the agent while it is away
    with world.without_agent("psg"):
        world.up()
    until(lambda: "cannot be moved" in world.log("psg", "agent.out"), "the agent says so")
    (listed,) = world.ikectx("psg", "list", "--json").json
    assert (listed["known"], listed["movable"]) == (False, False)
    done = world.transfer("psg", "nsg")
    assert done.code == 6, done
    assert "agent must run before" in done.out
    world.serves("psg")
    before = world.children("mn")
    assert world.ikectx("psg", "resync", "--yes", "--json").code == 0
    until(lambda: world.children("mn") != before, "charon rekeys the child")
    world.agree("psg")
    (listed,) = world.ikectx("psg", "list", "--json").json
    assert (listed["known"], listed["movable"]) == (True, True)
    world.move("psg", "nsg")
    world.settle("nsg")


def test_an_sa_that_ended_while_the_agent_was_away(world: World) -> None:
    # the agent is away while the MN sends INFORMATIONAL D and sets up anew; it forgets the one and says that
    # it does not know the other
    old = world.up()
    with world.without_agent("psg", kill=True):
        world.lab.terminate("mn")
        world.lab.connect()
    items = world.ikectx("psg", "list", "--json").json
    assert [item["known"] for item in items] == [False]
    assert old["initiator-spi"] not in str(items)
    until(lambda: world.status("psg")["sas"] == 0, "the record has forgotten the old SA")


def test_the_mobile_node_is_silent(world: World) -> None:
    # nsg -> MN INFORMATIONAL N(UPDATE_SA_ADDRESSES), five times, all dropped; CTDR PEER_SILENT, psg goes on.
    # While it is undecided psg is mute: what the MN asks meanwhile it asks again.
    before = world.up()
    with world.blocked("nsg", "mn"):
        done = world.transfer("psg", "nsg", "--address", "move")
        assert done.code == 4, done
        report = done.report
        assert report["status"]["name"] == "PEER_SILENT"
        assert "--address relay" in report["hint"]
        assert "did not answer 5 requests" in world.log("nsg", "agent.out")
        assert spis(world.serves("psg")) == spis(before)
        for host in GATEWAYS:
            assert not world.muted(host)
        world.ping()
        world.talks("psg")
    # the SA has gone on to other message IDs and SPIs, and can still be moved
    world.move("psg", "nsg")
    world.settle("nsg")
    world.talks("nsg")


def test_the_answer_of_the_mobile_node_is_lost(world: World) -> None:
    # nsg -> MN INFORMATIONAL N(UPDATE_SA_ADDRESSES) arrives, MN -> nsg is dropped: the MN has moved, and
    # nsg must not give up on it when the way is free again (the same request is answered again)
    world.up()
    world.block("mn", "nsg")
    work = world.begin("psg", "transfer", "--to", "nsg", "--json")
    until(lambda: world.one("mn")["remote-host"] == "10.2.2.2", "the MN has moved")
    time.sleep(0.5)
    world.unblock()
    done = world.end(work)
    assert done.code == 0, done
    world.settle("nsg")
    world.talks("nsg")


def test_the_mobile_node_moved_and_is_never_heard(world: World) -> None:
    # nsg -> MN INFORMATIONAL N(UPDATE_SA_ADDRESSES) arrives, the answers never: nsg undoes it. The MN
    # believes nsg and has used up a message ID: psg -> MN INFORMATIONAL N(UPDATE_SA_ADDRESSES), with the same
    # ID (taken for a copy, and answered to nsg), then with the next one, brings it back.
    world.up()
    with world.blocked("mn", "nsg"):
        done = world.transfer("psg", "nsg", "--address", "move")
        assert done.code == 4, done
        assert done.report["status"]["name"] == "PEER_SILENT"
        assert world.lab.list_sas("nsg") == []
        assert world.one("psg")["state"] == "ESTABLISHED"
    # with ESP in user space the MN rekeys its child twice, for the way there and the way back
    world.settle("psg")
    world.talks("psg")
    world.ends("psg", "psg")


def test_a_rekey_that_the_mobile_node_begins_meanwhile(world: World) -> None:
    # MN -> psg CREATE_CHILD_SA while psg is mute for it; it is sent again, to the new address, and answered
    # by nsg as soon as that is active
    world.up()
    with world.blocked("nsg", "mn"):
        work = world.begin("psg", "transfer", "--to", "nsg", "--json")
        until(lambda: world.muted("psg"), "psg is mute")
        world.begin_rekey("mn")
        time.sleep(0.7)
    done = world.end(work)
    assert done.code == 0, done
    world.settle("nsg")
    world.talks("nsg")


def owners(world: World) -> list[str]:
    """Gateways whose charon has the SA, active."""
    return [
        host
        for host in GATEWAYS
        if [sa["state"] for sa in world.lab.list_sas(host)] in (["ESTABLISHED"], ["REKEYING"])
    ]


def decided(world: World) -> bool:
    """nsg has nothing open, or something that it does not own."""
    return all(entry["state"] == "prepared" for entry in world.status("nsg")["transfers"])


SERIES = random.Random(4067)
PHASES = {
    "psg": ("offered", "freezing", "released", "cleaning", "done"),
    "nsg": ("checking", "preparing", "prepared", "owning", "moving", "activating", "owned"),
}
KILLS = [
    (victim, phase, SERIES.uniform(0.0, 0.04), silent)
    for victim, phases in PHASES.items()
    for phase in phases
    for silent in ((False, True) if phase in ("released", "moving") else (False,))
]


@pytest.mark.parametrize(("victim", "phase", "after", "silent"), KILLS, ids=lambda value: str(value)[:5])
def test_an_agent_is_killed_in_a_transfer(
    world: World, victim: str, phase: str, after: float, silent: bool
) -> None:
    # whatever exchange it is in; `silent`: what nsg asks does not reach the MN until the agent is back. Then
    # exactly one gateway owns the SA, and CREATE_CHILD_SA from the MN works with it.
    world.up()
    if silent:
        world.block("nsg", "mn")
    with world.states(victim) as states:
        work = world.begin("psg", "transfer", "--to", "nsg", "--json")
        until(lambda: phase in states, phase, pause=0.001)
        time.sleep(after)
        world.restart(victim, kill=True)
    world.unblock()
    until(lambda: world.idle("psg") and decided(world), "nobody is in doubt", 30)
    world.end(work)
    until(lambda: len(owners(world)) == 1, "one gateway serves")
    (owner,) = owners(world)
    if not world.idle("nsg"):
        # offered, and then nobody came: nsg holds it ready for a minute, and takes it when it is offered anew
        assert owner == "psg"
        owner = "nsg"
        world.move("psg", "nsg")
    world.settle(owner)
    world.rekey_child("mn", owner)
    world.talks(owner)
    for host in GATEWAYS:
        assert not world.muted(host)
    # and it can be moved, on or back
    other = "nsg" if owner == "psg" else "psg"
    world.move(owner, other)
    world.settle(other)


def asked_in_vain(world: World, *, up: bool = True) -> subprocess.Popen[str]:
    """A transfer in which nsg owns the SA already, and asks the MN, which does not hear it. `up`: make the
    SA."""
    if up:
        world.up()
    world.block("nsg", "mn")
    with world.states("nsg") as states:
        work = world.begin("psg", "transfer", "--to", "nsg", "--address", "move", "--json")
        until(lambda: "moving" in states, "nsg owns it and asks the MN")
    return work


def test_both_agents_are_killed(world: World) -> None:
    # at one moment, with the MN not answering; both come back: one owner
    work = asked_in_vain(world)
    for host in GATEWAYS:
        world.lab.stop(host, "agent", kill=True)
    world.unblock()
    for host in GATEWAYS:
        world.restart(host)
    world.end(work)
    until(lambda: world.idle("psg") and world.idle("nsg"), "no transfer is open", 30)
    world.settle("nsg")
    world.talks("nsg")


def test_the_other_gateway_vanishes_after_it_was_given_the_sa(world: World) -> None:
    # CTD, then nsg's agent dies: psg has let go and serves no more (the report would say "in-doubt" after two
    # minutes), asks again and again; when nsg's agent is back it finishes, and answers CTDR
    work = asked_in_vain(world)
    world.lab.stop("nsg", "agent", kill=True)
    time.sleep(1.5)
    (entry,) = world.status("psg")["transfers"]
    assert entry["state"] == "released"
    assert world.muted("psg")  # mute until it is known who owns it
    world.unblock()
    world.restart("nsg")
    done = world.end(work)
    assert done.code == 0, done
    world.settle("nsg")
    world.talks("nsg")


def test_b4_a_gateway_that_lost_its_journal_denies_no_sa_of_its_charon(world: World) -> None:
    # CTD, then nsg's agent dies, and its state goes, as after a damaged disk; its charon keeps the SA. psg
    # sends the CTD again: CTDR with IN_DOUBT. nsg's operator ends the SA: UNKNOWN_TRANSFER, and psg serves.
    work = asked_in_vain(world)
    world.lab.stop("nsg", "agent", kill=True)
    shutil.rmtree(world.lab.work / "nsg" / "state")
    world.restart("nsg")
    world.unblock()
    done = world.end(work)
    assert done.code == 5, done
    assert (done.report["result"], done.report["status"]["name"]) == ("in-doubt", "IN_DOUBT")
    assert "nsg: the other gateway knows no such transfer" in done.report["text"]
    assert "charon has the IKE_SA" in done.report["text"]
    assert "ikectx resolve" in done.report["hint"]
    assert world.muted("psg")
    assert len(world.lab.list_sas("nsg")) == 1
    world.forget("nsg")
    until(lambda: world.idle("psg"), "psg has heard no, and has the SA back", 60)
    world.settle("psg")
    world.talks("psg")


def test_reclaim(world: World) -> None:
    # as before, but nsg never comes back, and the operator takes the SA back: psg serves again and talks to
    # the MN as if nothing had been
    work = asked_in_vain(world)
    world.lab.stop("nsg", "agent", kill=True)
    world.forget("nsg")
    until(lambda: world.status("psg")["transfers"], "psg has it open")
    (entry,) = world.status("psg")["transfers"]
    done = world.ikectx("psg", "reclaim", entry["transfer_id"], "--yes", "--json")
    assert done.code == 0, done
    world.end(work)
    world.unblock()
    world.serves("psg")
    world.talks("psg")
    world.restart("nsg")


def test_charon_restarts_under_its_agent(world: World) -> None:
    # psg's charon ends (INFORMATIONAL D to the MN) and comes back; a new SA is known and moves
    world.up()
    world.broken = True
    world.lab.stop("psg", "charon")
    until(lambda: not world.status("psg")["charon"]["reachable"], "the agent misses charon")
    world.forget("mn")
    world.lab.start_charon("psg")
    until(lambda: world.status("psg")["charon"]["reachable"], "the agent has found charon")
    world.lab.connect()
    world.recorded("psg")
    world.move("psg", "nsg")
    world.settle("nsg")


def test_stopping_the_agents_leaves_the_tunnel(world: World, tmp_path: Path) -> None:
    # both agents end (SIGTERM): the SA stays with its charon, DPD and rekeys work
    world.moved()
    for host in GATEWAYS:
        world.lab.stop(host, "agent")
        assert "Traceback" not in world.log(host, "agent.out")
    world.rekey_child("mn", "nsg")
    world.rekey_ike("nsg", "nsg")
    world.ping()
    assert not tasks(world.one("mn"))
    for host in GATEWAYS:
        world.restart(host)


@pytest.mark.parametrize(
    ("asks", "connection", "seen"), [("mn", "psg", "request"), ("psg", "mn", "response")]
)
def test_what_charon_says_while_no_agent_runs_is_not_lost(
    world: World, asks: str, connection: str, seen: str
) -> None:
    # INFORMATIONAL (DPD) while psg's agent is dead; the next one moves the SA on with message IDs that it
    # never heard of. MN -> nsg CREATE_CHILD_SA, INFORMATIONAL D, and back: nothing is ignored.
    world.up(overrides={asks: f"connections {{ {connection} {{ dpd_delay = 1s }} }}\n"})
    world.recorded("psg")
    with world.without_agent("psg", kill=True):
        before = world.log("psg", "charon.log").count(f"parsed INFORMATIONAL {seen}")
        until(
            lambda: world.log("psg", "charon.log").count(f"parsed INFORMATIONAL {seen}") > before + 2,
            f"{asks} has asked",
            20.0,
        )
        # charon would tell the next ID before the agent has looked at the kernel's notes: it says nothing new
        repeated = world.log(asks).count("retransmit 1 of request")
        world.block(asks, "psg" if asks == "mn" else "mn")
        until(
            lambda: world.log(asks).count("retransmit 1 of request") > repeated,
            f"{asks} waits for an answer",
            20.0,
        )
    until(lambda: "was not heard of" in world.log("psg", "agent.out"), "the agent finds out")
    world.unblock()
    until(lambda: not tasks(world.one(asks)), f"{asks} has its answer")
    world.move("psg", "nsg")
    world.settle("nsg")
    world.talks("nsg")


def test_an_sa_that_nobody_listened_to_is_not_moved(world: World) -> None:
    # psg's agent is dead, and somebody has flushed the rules that note message IDs; after an exchange each
    # way (CREATE_CHILD_SA, and INFORMATIONAL D) they are known again
    world.up()
    world.recorded("psg")
    with world.without_agent("psg", kill=True):
        world.must("psg", "nft", "flush", "ruleset")
    (listed,) = world.ikectx("psg", "list", "--json").json
    assert (listed["known"], listed["movable"]) == (False, False)
    done = world.transfer("psg", "nsg")
    assert done.code == 6, done
    assert "message IDs are not known" in done.out
    world.serves("psg")
    world.rekey_child("mn", "psg")
    world.rekey_child("psg", "psg")
    world.move("psg", "nsg")
    world.settle("nsg")
