"""A request without an answer, because the mobile node has left, holds no handover up.

psg's charon asks every second whether its mobile node is there (dpd_delay), or the mobile node asks psg.
The way is cut in one direction, so that the other end has had the request or has not; then the node goes:

    psg -> MN   INFORMATIONAL m    empty; MN -> psg  INFORMATIONAL m  empty, lost (had)
    psg -> .    INFORMATIONAL m    empty, lost (had not)

Afterwards both ends begin exchanges of their own: a message ID that is one too low or too high is ignored by
the other, and the rekeys do not end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from ikectx_cli.lab.net import ANNOUNCED, AWAY

from .test_by_packet import at_nsg, packets4
from .test_mobile import asks, lives, mobile, settled, status
from .world import World, spis, tasks, until

pytestmark = pytest.mark.live

__all__ = ["mobile", "packets4"]


@pytest.fixture(params=[False, True], ids=["had-not", "had"])
def had(request: pytest.FixtureRequest) -> bool:
    """Has the other end had the request, and only its answer is lost?"""
    assert isinstance(request.param, bool)
    return request.param


@pytest.fixture(scope="module", autouse=True)
def afterwards(session_world: World) -> Iterator[None]:
    yield
    session_world.broken = True


def up(world: World, **overrides: str) -> None:
    """The tunnel, when the mobile node's agent has seen it."""
    world.up(mobile=True, overrides=overrides)
    until(lambda: status(world)["watched"] == 1, "the agent has seen it")


def impatient(connection: str) -> str:
    return f"connections {{ {connection} {{ dpd_delay = 1s }} }}\n"


def waits(world: World, host: str) -> bool:
    """A liveness check is in flight; charon makes it one of MOBIKE's where it began the SA."""
    return bool(tasks(world.one(host))) and set(tasks(world.one(host))) <= {"IKE_DPD", "IKE_MOBIKE"}


def unanswered(world: World, host: str, lost: tuple[str, str]) -> None:
    """`host` sends a liveness check again and again; what goes that way is lost from now on."""
    mark = world.log(host).count("retransmit 1 of request")
    world.block(*lost)

    def again() -> bool:
        return waits(world, host) and world.log(host).count("retransmit 1 of request") > mark

    until(again, f"{host} has asked again", 40.0)


def asked_by_psg(world: World, had: bool) -> tuple[str, str]:
    """A tunnel in which psg's liveness checks are not answered; its SPIs."""
    world.reload(world.tunnel, {"psg": impatient("mn")})
    world.lab.terminate("mn")
    until(lambda: not world.lab.list_sas("psg"), "the first tunnel is down")
    world.lab.connect("psg")
    world.ping()
    unanswered(world, "psg", ("mn", "psg") if had else ("psg", "mn"))
    return spis(world.one("mn"))


def test_by_packet(packets4: World, had: bool) -> None:
    world = packets4
    before = asked_by_psg(world, had)
    world.lab.net.cut("away", "psg")
    began = time.monotonic()
    world.lab.net.relocate()
    until(lambda: at_nsg(world), "the SA is at nSG", 30.0)
    print(f"at nsg after {time.monotonic() - began:.1f} s")
    assert spis(world.one("mn")) == before
    assert world.one("nsg")["remote-host"] == AWAY[4]
    assert "as its answer shows" in world.log("nsg", "agent.out")
    world.ping()
    for host in ("nsg", "mn"):
        world.rekey_child(host, "nsg")
        world.rekey_ike(host, "nsg")
    world.ping()
    world.ends("mn", "nsg")


def test_by_packet_where_nsg_cannot_ask(packets4: World, had: bool) -> None:
    """nsg hears the mobile node, which does not hear nsg: psg goes on when the node can be reached again."""
    world = packets4
    before = asked_by_psg(world, had)
    deaf = f"add rule inet test way ip saddr {ANNOUNCED[4]} ip daddr {AWAY[4]} meta l4proto udp drop\n"
    world.must("core", "nft", deaf)
    world.lab.net.cut("away", "psg")
    with world.states("nsg") as states:
        world.lab.net.relocate()
        until(lambda: "aborted" in states, "nsg has given it back", 30.0)
    world.lab.net.mend()
    until(lambda: world.one("mn")["local-host"] in AWAY.values(), "the mobile node has told psg", 30.0)
    until(lambda: not world.lab.list_sas("nsg") and world.idle("psg"), "psg has it", 30.0)
    until(lambda: not waits(world, "psg"), "psg has its answer", 30.0)
    assert spis(world.one("psg")) == spis(world.one("mn")) == before
    for host in ("psg", "mn"):
        world.rekey_child(host, "psg")
        world.rekey_ike(host, "psg")
    world.ping()


def test_by_packet_with_a_request_about_addresses(packets4: World) -> None:
    """psg announces nsg's address in a request of its own as soon as the SA is up; nobody waits for it."""
    world = packets4
    world.lab.net.cut("away", "psg")
    world.lab.net.relocate()
    until(lambda: at_nsg(world), "the SA is at nSG", 30.0)
    for host in ("nsg", "mn"):
        world.rekey_child(host, "nsg")
        world.rekey_ike(host, "nsg")
    world.ping()


def test_reactive(mobile: World, had: bool) -> None:
    world = mobile
    up(world, psg=impatient("mn"))
    before = spis(world.one("mn"))
    unanswered(world, "psg", ("mn", "psg") if had else ("psg", "mn"))
    done = asks(world, "handover", "--to", "nsg", "--json")
    # and not because charon has given up: the SA would have ended with its request
    assert (done.code, done.json["result"]) == (0, "moved"), done
    assert spis(world.one("mn")) == before
    settled(world, "nsg")
    lives(world, "nsg")


def test_predictive(mobile: World, had: bool) -> None:
    world = mobile
    up(world, psg=impatient("mn"))
    done = asks(world, "handover", "--to", "nsg", "--predictive", "--json")
    assert (done.code, done.json["result"]) == (0, "announced"), done
    unanswered(world, "psg", ("mn", "psg") if had else ("psg", "mn"))
    done = asks(world, "handover", "--to", "nsg", "--json")
    assert (done.code, done.json["result"]) == (0, "moved"), done
    assert (done.json["announced"], done.json["mode"]) == (True, "predictive")
    settled(world, "nsg")
    lives(world, "nsg")


def test_the_mobile_node_has_asked(mobile: World, had: bool) -> None:
    """Its own request: nsg is asked what psg was, under the message ID that psg had not had yet."""
    world = mobile
    up(world, mn=impatient("psg"))
    before = spis(world.one("mn"))
    unanswered(world, "mn", ("psg", "mn") if had else ("mn", "psg"))
    done = asks(world, "handover", "--to", "nsg", "--json")
    assert (done.code, done.json["result"]) == (0, "moved"), done
    assert spis(world.one("mn")) == before
    settled(world, "nsg")
    lives(world, "nsg")


def test_both_have_asked(mobile: World) -> None:
    world = mobile
    up(world, mn=impatient("psg"), psg=impatient("mn"))
    # Both ways at first: a request of psg's that arrives shows charon at the mobile node that the peer is
    # alive, so it would never ask itself if psg happened to ask first.
    world.block("mn", "psg")
    world.block("psg", "mn")
    until(lambda: waits(world, "mn") and waits(world, "psg"), "both have asked", 20.0)
    world.unblock()
    with world.blocked("mn", "psg"):
        time.sleep(1.5)  # psg's request arrives, the answer does not
        done = asks(world, "handover", "--to", "nsg", "--json")
        assert (done.code, done.json["result"]) == (0, "moved"), done
        settled(world, "nsg")
        lives(world, "nsg")
