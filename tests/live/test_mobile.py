"""A mobile node that asks for its handover itself: its agent beside a stock charon with the ha plugin."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ikectx_cli.lab.config import Tunnel
from ikectx_cli.lab.net import OUTER
from vici_bridge.effects.loud import LOUD
from vici_bridge.effects.readdress import READDRESS
from vici_bridge.vici.client import ControlClient, json_of

from .world import Done, World, spis, tasks, until

pytestmark = pytest.mark.live

NEW = "10.1.0.11"
"""A second address in the mobile node's access network."""


@pytest.fixture(scope="module", autouse=True)
def afterwards(session_world: World) -> Iterator[None]:
    """The tests after these find the mobile node without an agent, as they are used to."""
    yield
    session_world.broken = True


@pytest.fixture
def mobile(world: World) -> Iterator[World]:
    """The mobile node's charon tells its agent of its SAs, and gateways answer CTARs; no SA is up."""
    lab = world.lab
    if not lab.tunnel.mobile or ("mn", "agent") not in lab.started:
        world.anew(Tunnel(libipsec=True, mobile=True))
    yield world
    lab.net.mend()
    if not world.lab.command("mn", ["ip", "-o", "addr", "show", "dev", "eth1", "scope", "global"]).stdout:
        lab.command("mn", ["ip", "addr", "del", f"{NEW}/24", "dev", "eth0"])
    else:
        lab.net.relocate()


def up(world: World, **tunnel: Any) -> dict[str, Any]:
    return world.up(mobile=True, **tunnel)


def asks(world: World, *words: str) -> Done:
    """`ikectx mobile ...` at the mobile node."""
    config = str(world.lab.work / "mn" / "mobile.toml")
    return world.ikectx("mn", "mobile", "--config", config, *words)


def hands_over(world: World, to: str, *words: str) -> dict[str, Any]:
    """A handover that must succeed; its report."""
    before = world.one("mn")
    done = asks(world, "handover", "--to", to, "--json", *words)
    assert done.code == 0, done
    report = done.json
    assert isinstance(report, dict)
    if report["result"] != "announced":
        assert report["result"] == "moved", report
        assert report["serves"] == to
        assert spis(world.one("mn")) == spis(before)
        settled(world, to)
    return report


def settled(world: World, gateway: str) -> None:
    """That gateway has the SA, both ends agree, packets flow."""
    other = "nsg" if gateway == "psg" else "psg"
    until(lambda: world.lab.list_sas(other) == [], f"{other} has let go")
    world.agree(gateway)
    world.ping()
    here, node = world.one(gateway), world.one("mn")
    assert spis(here) == spis(node)
    assert (here["state"], node["state"]) == ("ESTABLISHED", "ESTABLISHED")
    assert node["remote-host"] in OUTER[gateway].values()
    assert here["remote-host"] == node["local-host"]


def lives(world: World, gateway: str) -> None:
    """Every exchange works from both sides, and the child stems from the IKE_SA as it is then."""
    for host in ("mn", gateway):
        world.rekey_ike(host, gateway)
        world.rekey_child(host, gateway)
    settled(world, gateway)


def status(world: World) -> Any:
    with ControlClient(f"{world.lab.work}/mn/ikectx.vici", timeout=10.0) as agent:
        return json_of(agent.request("status"))


# The SA's own side, by hand.


class Hand:
    """`hand.py`: the mobile node's agent, a step at a time."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.begin()

    def begin(self) -> None:
        lab = self._world.lab
        root = str(Path(__file__).parent.parent.parent)
        script = Path(__file__).with_name("hand.py")
        self._process = subprocess.Popen(
            [*lab.net.enter("mn"), sys.executable, str(script), str(lab.work / "mn" / "mobile.toml")],
            env={**lab.environment("mn"), "PYTHONPATH": root},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.read()

    def read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def __call__(self, *words: str) -> Any:
        """One command's answer; None: the process ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        answer = self.read()
        if answer is None:
            self._process.wait(timeout=10)
            return None
        return answer.get("value") if answer["ok"] else answer["error"]

    def end(self) -> None:
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait(timeout=10)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def hand(mobile: World) -> Iterator[Hand]:
    """In place of the agent; the SA is up at psg."""
    up(mobile)
    mobile.lab.stop("mn", "agent")
    hand = Hand(mobile)
    try:
        yield hand
    finally:
        hand.end()
        mobile.lab.start_agent("mn")


def children(world: World) -> list[dict[str, Any]]:
    return list(world.one("mn")["child-sas"].values())


def ends(world: World) -> tuple[str, str]:
    node = world.one("mn")
    return node["local-host"], node["remote-host"]


def test_a_passive_sa_is_silent_and_comes_back(mobile: World, hand: Hand) -> None:
    # no message; a new address that charon would have told psg of (INFORMATIONAL) passes unnoticed
    assert hand("quiet") is None
    assert mobile.one("mn")["state"] == "PASSIVE"
    mobile.must("mn", "ip", "addr", "add", f"{NEW}/24", "dev", "eth0")
    time.sleep(0.4)
    assert not tasks(mobile.one("mn"))
    assert hand("quiet") is None
    assert hand("loud") is None
    assert mobile.one("mn")["state"] == "ESTABLISHED"
    lives(mobile, "psg")


def test_the_children_get_the_new_addresses_and_nothing_else(mobile: World, hand: Hand) -> None:
    # no message
    before = hand("export")
    assert before["initiator"] is True
    assert before["vips"] == ["10.4.0.10"]
    routes = mobile.must("mn", "ip", "route", "show", "table", "220")
    mobile.must("mn", "ip", "addr", "add", f"{NEW}/24", "dev", "eth0")
    hand("quiet")
    (old,) = children(mobile)
    assert hand("move", NEW, OUTER["nsg"][4]) == {"local": f"{NEW}:4500", "remote": f"{OUTER['nsg'][4]}:4500"}
    assert ends(mobile) == (NEW, OUTER["nsg"][4])
    (new,) = children(mobile)
    assert (new["spi-in"], new["spi-out"]) == (old["spi-in"], old["spi-out"])
    assert new["uniqueid"] != old["uniqueid"]
    assert mobile.must("mn", "ip", "route", "show", "table", "220") == routes
    assert mobile.one("mn")["local-vips"] == ["10.4.0.10"]
    assert hand("export")["children"] == before["children"]


STEPS = [effect.name for effect in (*READDRESS.effects, *LOUD.effects[:2])]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("local", [NEW, OUTER["mn"][4]])
def test_an_agent_that_dies_in_between(mobile: World, hand: Hand, step: str, local: str) -> None:
    # no message until the next agent has ended the step; then MN -> nsg CREATE_CHILD_SA, which nobody answers
    mobile.must("mn", "ip", "addr", "add", f"{NEW}/24", "dev", "eth0")
    hand("quiet")
    hand("fail", step)
    if hand("move", local, OUTER["nsg"][4]) is not None:
        assert hand("loud") is None
    hand.begin()
    assert mobile.one("mn")["state"] == "PASSIVE"
    assert hand("resume") is None
    assert mobile.one("mn")["state"] == "ESTABLISHED"
    assert ends(mobile) == (local, OUTER["nsg"][4])
    assert len(children(mobile)) == 1


def test_an_agent_that_dies_while_it_waits(mobile: World, hand: Hand) -> None:
    # no message; then everything at psg as before
    hand("quiet")
    assert hand("die") is None
    hand.begin()
    assert hand("resume") is None
    lives(mobile, "psg")


# The whole handover.


def roams(world: World) -> None:
    """charon follows changes of addresses by itself, as it does when nobody tells it not to."""
    conf = world.lab.work / "mn" / "strongswan.conf"
    conf.write_text(conf.read_text().replace("roam_events = no", "roam_events = yes"))
    world.lab.stop("mn", "charon")
    world.forget("psg")
    world.lab.start_charon("mn")
    world.lab.connect()
    world.ping()


@pytest.mark.parametrize("words", [("--reactive",), ("--predictive", "--now")])
def test_there_and_back(mobile: World, words: tuple[str, ...]) -> None:
    # predictive: MN -> psg CTAR, psg -> nsg PCTD, CTDR, psg -> MN CTAA; then, and that is all of reactive,
    # MN -> nsg CTAR, nsg -> psg CT-Req, psg -> nsg CTD, nsg -> psg CTDR, nsg -> MN CTAA. No IKE message but,
    # with ESP in user space, the MN's CREATE_CHILD_SA afterwards.
    before = up(mobile)
    report = hands_over(mobile, "nsg", *words)
    assert (report["from"], report["to"]) == ("psg", "nsg")
    assert report["announced"] is ("--predictive" in words)
    assert report["messages"] == (4 if report["announced"] else 2)
    assert 80 < report["octets"] < 500
    assert report["old"]["remote"] == f"{OUTER['psg'][4]}:4500"
    assert report["new"]["remote"] == f"{OUTER['nsg'][4]}:4500"
    assert (report["children"], report["vips"]) == (["net"], ["10.4.0.10"])
    text = mobile.log("mn")
    assert "UPD_SA_ADDR" not in text
    assert text.count("generating IKE_AUTH request") == 1
    hands_over(mobile, "psg", *words)
    assert spis(mobile.one("psg")) == spis(before)
    lives(mobile, "psg")
    mobile.ends("mn", "psg")


def test_ten_handovers_with_rekeys_between(mobile: World) -> None:
    # as above, reactive; after each an IKE rekey by one side, so that children are older than their IKE_SA
    up(mobile, children=2)
    for number in range(10):
        to = ("nsg", "psg")[number % 2]
        hands_over(mobile, to)
        mobile.rekey_ike(("mn", to)[number // 2 % 2], to)
        mobile.rekey_child("mn", to)
        mobile.rekey_child("mn", to, "net2")
    lives(mobile, "psg")


def test_in_another_network(mobile: World) -> None:
    # the MN has lost its address for another one; then the reactive handover from there
    up(mobile)
    mobile.lab.net.relocate()
    report = hands_over(mobile, "nsg")
    assert report["new"]["local"] != report["old"]["local"] or "IKE_MOBIKE" in mobile.log("mn")
    lives(mobile, "nsg")


def test_an_announced_move_completes_at_the_new_address(mobile: World) -> None:
    # MN -> psg CTAR, CTAA; the MN changes its network; its agent sends the CTAR to nsg by itself
    up(mobile)
    assert hands_over(mobile, "nsg", "--predictive")["result"] == "announced"
    assert status(mobile)["announced"]["to"] == "nsg"
    mobile.serves("psg")
    mobile.ping()
    mobile.lab.net.relocate()
    until(lambda: status(mobile)["announced"] is None, "the handover goes on")
    settled(mobile, "nsg")
    last = status(mobile)["last"]
    assert (last["result"], last["mode"], last["announced"]) == ("moved", "predictive", True)
    lives(mobile, "nsg")


def test_an_announced_move_that_is_called_off(mobile: World) -> None:
    # MN -> psg CTAR, CTAA; nothing else: psg goes on serving
    up(mobile)
    hands_over(mobile, "nsg", "--predictive")
    assert asks(mobile, "cancel").code == 0
    assert status(mobile)["announced"] is None
    lives(mobile, "psg")


def test_psg_out_of_reach(mobile: World) -> None:
    # charon looks for psg in vain (INFORMATIONAL, MOBIKE's path probing); nsg answers what psg did not
    up(mobile)
    roams(mobile)
    mobile.lab.net.cut("mn", "psg")
    mobile.lab.net.relocate()
    until(lambda: "IKE_MOBIKE" in tasks(mobile.one("mn")), "charon looks for its gateway")
    hands_over(mobile, "nsg")
    until(lambda: not tasks(mobile.one("mn")), "the request was answered")
    lives(mobile, "nsg")


# What goes wrong.


def fails(world: World, to: str, code: int, *words: str) -> dict[str, Any]:
    """A handover that must fail with the SA as it was; its report."""
    before = world.one("mn")
    done = asks(world, "handover", "--to", to, "--json", *words)
    assert done.code == code, done
    after = world.one("mn")
    assert after["state"] == "ESTABLISHED"
    assert (spis(after), after["remote-host"]) == (spis(before), before["remote-host"])
    report = done.json
    assert isinstance(report, dict)
    return report


def test_nsg_does_not_answer(mobile: World) -> None:
    # MN -> nsg CTAR, dropped, and again; psg goes on serving
    up(mobile)
    with mobile.agent_with("mn", "[charon]\n", "[mobile]\nretry = 0.2\ngive_up = 1.5\n\n[charon]\n"):
        mobile.lab.net.cut("mn", "nsg")
        report = fails(mobile, "nsg", 5)
        assert report["result"] == "silent"
        assert report["serves"] is None
        assert report["retransmissions"] >= 2
        assert "clocks" in report["hint"]
        assert status(mobile)["in_question"][0]["to"] == "nsg"
        mobile.lab.net.mend()
        lives(mobile, "psg")
        hands_over(mobile, "nsg")
        assert status(mobile)["in_question"] == []


def test_a_gateway_says_no(mobile: World) -> None:
    # MN -> nsg CTAR, CT-Req, CTD; nsg's charon has no such connection: CTDR and CTAA say so
    up(mobile)
    mobile.edit("nsg", "  mn {", "  somebody {")
    report = fails(mobile, "nsg", 4)
    assert (report["result"], report["serves"]) == ("refused", "psg")
    assert report["status"]["name"] == "NO_CONNECTION"
    lives(mobile, "psg")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--to", "nowhere"), 2, "no [[gateway]] named"),
        (("--to", "nsg", "--ike", "nobody"), 6, "answer to nobody"),
        (("--to", "nsg", "--address", "nonsense"), 2, "not an IP address"),
        (("--to", "nsg", "--now"), 2, "--now goes with"),
        (("--to", "nsg", "--predictive", "--address", NEW), 2, "--address is for"),
    ],
)
def test_what_cannot_be_meant(mobile: World, words: tuple[str, ...], code: int, said: str) -> None:
    # no message
    up(mobile)
    done = asks(mobile, "handover", *words)
    assert done.code == code, done
    assert said in done.err
    mobile.serves("psg")


def test_already_there(mobile: World) -> None:
    # no message
    up(mobile)
    report = asks(mobile, "handover", "--to", "psg", "--json").json
    assert (report["result"], report["exit_code"]) == ("already", 0)
    mobile.serves("psg")


def when_asked(world: World) -> Callable[[], bool]:
    return lambda: bool(status(world)["in_question"])


def test_an_agent_that_is_killed_in_a_handover(mobile: World) -> None:
    # MN -> nsg CTAR, dropped; the agent dies; the next one makes the SA active, and asks again: CTAR, CTAA
    up(mobile)
    mobile.lab.net.cut("mn", "nsg")
    config = str(mobile.lab.work / "mn" / "mobile.toml")
    work = mobile.begin("mn", "mobile", "--config", config, "handover", "--to", "nsg", "--json")
    until(when_asked(mobile), "nsg was asked")
    until(lambda: mobile.one("mn")["state"] == "PASSIVE", "the SA is passive")
    mobile.restart("mn", kill=True)
    assert mobile.end(work).code == 5
    until(lambda: "asking again" in mobile.log("mn", "agent.out"), "nsg is asked again")
    assert "goes on now" in mobile.log("mn", "agent.out")
    assert status(mobile)["in_question"][0]["to"] == "nsg"
    mobile.lab.net.mend()
    until(lambda: status(mobile)["in_question"] == [], "nsg has answered")
    settled(mobile, "nsg")
    lives(mobile, "nsg")


def test_an_agent_that_is_killed_when_nsg_has_the_sa(mobile: World) -> None:
    # MN -> nsg CTAR, CT-Req, CTD, and the CTAA is dropped; the next agent's CTAR gets a CTAA from nsg alone
    up(mobile)
    rules = "add table inet one; add chain inet one f { type filter hook forward priority 0; };"
    mobile.must("core", "nft", rules + " add rule inet one f udp sport 5091 drop")
    config = str(mobile.lab.work / "mn" / "mobile.toml")
    work = mobile.begin("mn", "mobile", "--config", config, "handover", "--to", "nsg", "--json")
    try:
        until(lambda: mobile.lab.list_sas("psg") == [], "psg has let go")
        mobile.restart("mn", kill=True)
        assert mobile.end(work).code == 5
    finally:
        mobile.must("core", "nft", "delete table inet one")
    until(lambda: status(mobile)["in_question"] == [], "nsg has answered")
    settled(mobile, "nsg")
    lives(mobile, "nsg")


def test_the_report_is_for_people_too(mobile: World) -> None:
    # a reactive handover
    up(mobile)
    done = asks(mobile, "handover", "--to", "nsg")
    assert done.code == 0, done
    assert "moved from psg to nsg" in done.out
    assert f"{OUTER['mn'][4]}:4500 - {OUTER['psg'][4]}:4500  ->" in done.out
    assert "2 messages" in done.out
    assert "asking nsg" in done.err
    settled(mobile, "nsg")
    assert "nsg" in asks(mobile, "status").out
