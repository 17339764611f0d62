"""By packet: a stock mobile node's own IKE requests bring its SA to nSG, and what a stranger gets by them.

Both gateways have [by_packet] and ask each other; pSG tells its mobile node an address of nSG's beside its
own (`ANNOUNCED`). The exchanges, where the mobile node lost pSG and has another address:

    MN -> pSG, nSG   INFORMATIONAL n           empty: charon looks for a path (to every address it was told)
    nSG -> pSG       CT-Req with it, CTD, CTDR
    nSG -> MN        INFORMATIONAL n           charon at nSG, which was given the request again
    MN -> nSG        INFORMATIONAL n+1         N(UPDATE_SA_ADDRESSES), N(NAT_DETECTION_*), N(COOKIE2)
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest

from ikectx.sa.context import Endpoint
from ikectx.wire.ikev2 import IkeHeader
from ikectx_cli.lab.config import Tunnel
from ikectx_cli.lab.net import ANNOUNCED, AWAY, OUTER
from mobike_ext import watch
from mobike_ext.packet_hold import deliver
from mobike_ext.unknown import UnknownMessage
from tests.netns import of_name

from .world import World, spis, until

pytestmark = pytest.mark.live


@pytest.fixture(params=[4, 6], ids=["v4", "v6"])
def packets(world: World, request: pytest.FixtureRequest) -> Iterator[World]:
    """The mobile node is at pSG; agents ask by packet."""
    yield from _packets(world, request.param)


@pytest.fixture
def packets4(world: World) -> Iterator[World]:
    yield from _packets(world, 4)


def _packets(world: World, family: int) -> Iterator[World]:
    world.anew(Tunnel(libipsec=True, by_packet=True, family=family))
    try:
        world.up("psg", by_packet=True, family=family)
        yield world
    finally:
        world.lab.net.mend()
        if world.must("mn", "ip", "-o", "addr", "show", "dev", "eth1", "scope", "global"):
            world.lab.net.relocate()
        world.broken = True  # the next test begins with other agents


def at_nsg(world: World) -> bool:
    """nSG has the SA alone, and the mobile node talks to it there."""
    announced = ANNOUNCED[world.tunnel.family]
    mobile = world.one("mn")
    return (
        world.lab.list_sas("psg") == []
        and spis(world.one("nsg")) == spis(mobile)
        and (world.one("nsg")["local-host"], mobile["remote-host"]) == (announced, announced)
    )


def moves(world: World, host: str) -> list[str]:
    """The transfers that this gateway's agent tells to have moved an SA."""
    lines = world.must(host, "ikectx", "history", "--json")
    return [line for line in lines.splitlines() if '"moved"' in line]


def hear(world: World, host: str, act: Callable[[], object], addresses: list[str]) -> UnknownMessage:
    """The first IKE request that comes to `host` for one of the addresses after `act`."""
    with of_name(world.lab.net.namespace(host)).entered():
        receiver = watch.open_receiver([ip_address(address) for address in addresses])
    with receiver:
        act()
        limit = time.monotonic() + 10
        while time.monotonic() < limit:
            try:
                packet, sender = receiver.recvfrom(65535)
            except BlockingIOError:
                time.sleep(0.01)
                continue
            found = watch.parse_packet(packet)
            if found is not None and sender[2] in (socket.PACKET_HOST, socket.PACKET_OUTGOING):
                datagram, local, remote = found
                return UnknownMessage((datagram[:8], datagram[8:16]), (datagram,), local, remote)
    raise AssertionError(f"{host} heard no request")


def replay(
    world: World, host: str, heard: UnknownMessage, *, at: str, source: Endpoint | None = None
) -> None:
    """A stranger sends the same request to `host`."""
    to = Endpoint(ip_address(at), heard.local.port)
    with of_name(world.lab.net.namespace(host)).entered():
        deliver(heard.datagrams, to, source or heard.remote)


def test_a_stock_mn_that_lost_psg_meets_nsg(packets: World) -> None:
    world, family = packets, packets.tunnel.family
    keys = world.keys("psg")
    before = spis(world.one("mn"))
    world.lab.net.cut("away", "psg")
    world.lab.net.relocate()
    until(lambda: at_nsg(world), "the SA is at nSG")
    assert spis(world.one("mn")) == before
    assert world.one("nsg")["remote-host"] == AWAY[family]
    # the MN's request, which charon was given again, must not pass for one of charon's
    assert "elements" not in world.must("nsg", "nft", "list", "map", "inet", "ikectx_ids", "requests")
    until(lambda: moves(world, "psg"), "psg tells of it")
    world.ping()
    # the first probe was answered: nobody waited for another
    assert "path probing attempt" not in world.log("mn")
    assert not [
        key for _, key in keys if key in world.log("nsg", "agent.out") + world.log("psg", "agent.out")
    ]
    for host in ("mn", "nsg"):
        world.rekey_child(host, "nsg")
        world.rekey_ike(host, "nsg")
    world.ping()
    world.ends("mn", "nsg")


def test_where_psg_still_answers_the_sa_stays(packets: World) -> None:
    world = packets
    world.lab.net.relocate()
    # of the paths it tries the first that is answered is taken, of either family
    until(lambda: world.one("mn")["local-host"] in AWAY.values(), "the mobile node has told pSG")
    time.sleep(1.0)
    world.ping()
    assert world.lab.list_sas("nsg") == []
    assert world.one("mn")["remote-host"] in OUTER["psg"].values()
    assert moves(world, "psg") == []


def test_a_recorded_request_moves_nothing(packets4: World) -> None:
    world = packets4
    heard = hear(world, "psg", lambda: world.rekey_child("mn", "psg"), [OUTER["psg"][4]])
    replay(world, "nsg", heard, at=ANNOUNCED[4])
    until(lambda: "replay" in world.log("psg", "agent.out"), "pSG has looked at it")
    stranger = Endpoint.of("10.5.0.66", 4500)
    time.sleep(1.1)
    replay(world, "nsg", heard, at=OUTER["nsg"][4], source=stranger)
    until(lambda: world.log("psg", "agent.out").count("replay") >= 2, "pSG has looked at it again")
    world.talks("psg")
    assert moves(world, "psg") == []


def test_a_forged_request_moves_nothing(packets4: World) -> None:
    world = packets4
    heard = hear(world, "psg", lambda: world.rekey_child("mn", "psg"), [OUTER["psg"][4]])
    (datagram,) = heard.datagrams
    header = IkeHeader.parse(datagram)
    context = world.context("psg")
    for mid in range(header.message_id, header.message_id + 4):
        forged = datagram[:20] + mid.to_bytes(4) + datagram[24:]
        replay(
            world, "nsg", UnknownMessage(heard.spis, (forged,), heard.local, heard.remote), at=ANNOUNCED[4]
        )
        time.sleep(1.1)
    until(lambda: "does not open" in world.log("psg", "agent.out"), "pSG has tried to open it")
    assert world.context("psg")["generations"] == context["generations"]
    world.talks("psg")
    assert moves(world, "psg") == []


def test_what_an_interceptor_moved_comes_back_with_the_next_request(packets4: World) -> None:
    """Whoever stops a request on its way to pSG can bring it to nSG; the MN's next one undoes it."""
    world = packets4
    with world.blocked("mn", "psg"):
        stopped = hear(world, "core", lambda: world.begin_rekey("mn"), [OUTER["psg"][4]])
        replay(world, "nsg", stopped, at=ANNOUNCED[4])
        until(lambda: world.lab.list_sas("nsg") and not world.lab.list_sas("psg"), "the SA is at nSG")
    # answered by nSG, the MN goes on with pSG, which has it no more and asks
    until(lambda: world.lab.list_sas("psg") and not world.lab.list_sas("nsg"), "the SA is back", 30.0)
    until(lambda: not world.one("mn").get("tasks-active"), "the mobile node has its answers", 30.0)
    world.agree("psg")
    world.ping()
    world.talks("psg")
