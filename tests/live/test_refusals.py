"""What is refused leaves pSG serving the mobile node, and nSG as it was."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ikectx.timing import Timing

from .test_collisions import other_at_nsg
from .world import Done, World, spis, until

pytestmark = pytest.mark.live


@contextlib.contextmanager
def untouched(world: World, other: int = 0) -> Iterator[None]:
    """Neither charon's SAs nor rules nor routes change, and pSG serves; nSG has `other` IKE_SAs."""

    def seen() -> list[Any]:
        views: list[Any] = []
        for host in ("psg", "nsg", "mn"):
            for sa in world.lab.list_sas(host):
                children = sorted(
                    (child["name"], child["state"], child["spi-in"], child["spi-out"])
                    for child in sa["child-sas"].values()
                )
                views.append((host, sa["uniqueid"], sa["state"], spis(sa), sa["remote-host"], children))
            for words in (
                "nft list table inet ikectx",
                "ip rule",
                "ip route show table all",
                "ip xfrm policy",
            ):
                if host != "mn":
                    views.append((host, words, world.must(host, *words.split())))
        return views

    before = seen()
    yield
    assert seen() == before
    assert len(world.lab.list_sas("nsg")) == other
    assert world.idle("psg")
    until(lambda: world.idle("nsg"), "nsg's agent has nothing open")
    world.ping()
    if not other:
        world.rekey_child("mn", "psg")
        world.serves("psg")


def refused(done: Done, code: int, status: str) -> dict[str, Any]:
    """The report of a transfer that did not happen: exit code, status, and words for the operator."""
    assert done.code == code, done
    report = done.report
    assert report["status"]["name"] == status, report
    assert report["result"] in ("kept", "refused")
    assert report["text"] and report["hint"]
    assert "serves the MN" in report["state_here"]
    return report


def against(report: dict[str, Any]) -> set[tuple[str, str]]:
    """(context, status) of all verdicts that are not OK: a CTDR has one for each context."""
    verdicts = [(verdict["context"], verdict["status"]["name"]) for verdict in report["verdicts"]]
    return {verdict for verdict in verdicts if verdict[1] != "OK"}


# Each exchange of a refusal is CXTP's only: psg -> nsg PCTD, nsg -> psg CTDR with the reason, or nothing at
# all. The MN hears of none.


@pytest.mark.parametrize(
    "name", [("--ike", "nobody"), ("--ike-id", "4711"), ("--spi", "deadbeef"), ("--peer", "nobody.example")]
)
def test_unknown_sa(world: World, name: tuple[str, str]) -> None:
    # no exchange: psg's agent does not find it
    world.up()
    with untouched(world):
        done = world.transfer("psg", "nsg", *name)
        assert done.code == 6, done
        assert done.json["status"] == "UNKNOWN_SA"
        assert name[1] in done.json["error"]
        assert done.json["hint"]


def test_unknown_peer(world: World) -> None:
    # no exchange: psg's agent knows no such gateway, and says which it knows
    world.up()
    with untouched(world):
        done = world.transfer("psg", "elsewhere")
        assert done.code == 2, done
        assert "elsewhere" in done.json["error"]
        assert "nsg" in done.json["hint"]


def test_nothing_to_transfer(world: World) -> None:
    # no exchange: there is no SA
    done = world.transfer("psg", "nsg", "--all")
    assert (done.code, done.json["reports"]) == (0, [])


def test_the_other_agent_is_down(world: World) -> None:
    # psg -> nsg TCP SYN, RST
    world.up()
    with world.without_agent("nsg"):
        refused(world.transfer("psg", "nsg"), 5, "UNREACHABLE")
        world.ping()
        world.rekey_child("mn", "psg")
        world.serves("psg")
    # and when it is there again
    world.move("psg", "nsg")
    world.settle("nsg")


def test_the_other_gateway_is_away(world: World) -> None:
    # psg -> nsg TCP SYN, dropped on the way: given up after Timing.connect
    world.up()
    rule = "add table inet test; add chain inet test way { type filter hook forward priority 0; };"
    with world.without_agent("nsg"):  # no connection is left, and neither makes another
        world.must("core", "nft", rule + " add rule inet test way tcp dport 5091 drop")
    with untouched(world):
        began = time.monotonic()
        refused(world.transfer("psg", "nsg"), 5, "UNREACHABLE")
        assert time.monotonic() - began >= Timing().connect


@pytest.mark.parametrize(
    ("old", "new", "status", "said"),
    [
        pytest.param("  mn {", "  guests {", "NO_CONNECTION", "no connection 'mn'", id="connection"),
        pytest.param("      net {", "      web {", "NO_CHILD", "no child 'net'", id="child"),
    ],
)
def test_nothing_of_that_name_there(world: World, old: str, new: str, status: str, said: str) -> None:
    # PCTD; CTDR with the status
    world.up()
    world.edit("nsg", old, new)
    with untouched(world):
        refused(world.transfer("psg", "nsg"), 4, status)
        assert said in world.log("nsg", "agent.out")


def test_only_one_of_two_children_is_there(world: World) -> None:
    # PCTD with both; CTDR NO_CHILD: nothing half done
    world.up(children=2)
    world.edit("nsg", "      net2 {", "      web {")
    with untouched(world):
        refused(world.transfer("psg", "nsg"), 4, "NO_CHILD")
        assert "no child 'net2'" in world.log("nsg", "agent.out")


def test_the_connection_there_asks_for_another_way_to_authenticate(world: World) -> None:
    # PCTD; CTDR AUTHENTICATION: the MN came by its shared key, nsg wants a certificate of it
    world.up()
    world.edit("nsg", "remote {\n      auth = psk", "remote {\n      auth = pubkey")
    with untouched(world):
        refused(world.transfer("psg", "nsg"), 4, "AUTHENTICATION")


def test_the_virtual_ip_is_in_use_there(world: World) -> None:
    # the MN sets up a second IKE_SA, with nsg (IKE_SA_INIT, IKE_AUTH), whose pool gives it the same address
    world.up()
    world.lab.initiate("mn", "nsg", "net")
    assert len(world.lab.list_sas("nsg")) == 1
    with untouched(world, other=1):
        report = refused(world.transfer("psg", "nsg"), 4, "VIP_IN_USE")
        assert against(report) == {("IKEV2_SA", "VIP_IN_USE"), ("SPD", "SELECTORS_OVERLAP")}


def test_selectors_overlap_there(world: World) -> None:
    # as before, without virtual IP: PCTD; CTDR SELECTORS_OVERLAP
    world.up(vip=False)
    world.lab.initiate("mn", "nsg", "net")
    with untouched(world, other=1):
        refused(world.transfer("psg", "nsg"), 4, "SELECTORS_OVERLAP")


def test_the_ike_spi_is_in_use_there(world: World, tmp_path: Path) -> None:
    # nsg's charon already has an IKE_SA with the same pair of SPIs, and nsg is told to refuse such SAs: PCTD;
    # CTDR IKE_SPI_IN_USE. charon itself would take the second, which then shadows the first.
    spi_i, spi_r = spis(world.up())
    other_at_nsg(world, tmp_path, spi_i=spi_i, spi_r=spi_r)
    with (
        world.agent_with("nsg", "[transfer]\n", '[transfer]\ncollision = "refuse"\n'),
        untouched(world, other=1),
    ):
        refused(world.transfer("psg", "nsg"), 4, "IKE_SPI_IN_USE")


def test_the_other_charon_lacks_an_algorithm(world: World) -> None:
    # nsg's charon runs without AES-XCBC: PCTD; CTDR ALGORITHM
    world.up(ike="aes256-sha1-prfaesxcbc-x25519")
    conf = world.lab.work / "nsg" / "strongswan.conf"
    conf.write_text(conf.read_text().replace(" xcbc ", " "))
    world.broken = True
    world.lab.stop("nsg", "charon")
    until(lambda: not world.status("nsg")["charon"]["reachable"], "nsg's agent misses charon")
    world.lab.start_charon("nsg")
    until(lambda: world.status("nsg")["charon"]["reachable"], "nsg's agent has found charon")
    with untouched(world):
        refused(world.transfer("psg", "nsg"), 4, "ALGORITHM")
        assert "XCBC" in world.log("nsg", "agent.out")


def test_the_other_charon_is_down(world: World) -> None:
    # PCTD; CTDR CHARON
    world.up()
    world.broken = True
    world.lab.stop("nsg", "charon")
    done = world.transfer("psg", "nsg")
    refused(done, 4, "CHARON")
    world.ping()
    world.rekey_child("mn", "psg")


def test_charon_here_is_down(world: World) -> None:
    # no exchange; CharonError's exit code
    world.broken = True
    world.lab.stop("psg", "charon")
    done = world.transfer("psg", "nsg", "--ike", "mn")
    assert (done.code, done.json["status"]) == (10, "CHARON")


def test_the_agent_here_is_down(world: World) -> None:
    # no exchange; the command line says where it looked
    world.up()
    with world.without_agent("psg"):
        done = world.transfer("psg", "nsg")
        assert done.code == 5, done
        assert "ikectx.vici" in done.json["error"]


def test_an_exchange_is_in_flight(world: World) -> None:
    # psg -> MN CREATE_CHILD_SA N(REKEY_SA), which the core drops: BUSY, tried five times, and given up
    world.up()
    before = world.children("mn")["net"]
    world.block("psg", "mn")
    world.begin_rekey("psg")
    report = refused(world.transfer("psg", "nsg"), 7, "BUSY")
    assert report["attempts"] == 5
    assert not world.muted("psg")
    until(lambda: not world.lab.list_sas("nsg"), "nsg has undone what it prepared")
    world.unblock()
    until(lambda: world.children("mn").get("net", before) != before, "the rekey gets through")
    world.agree("psg")
    world.ping()
    world.move("psg", "nsg")
    world.settle("nsg")


def test_a_busy_sa_is_waited_for(world: World) -> None:
    # psg -> MN CREATE_CHILD_SA, dropped until the transfer has failed once; it is tried again and succeeds
    world.up()
    world.block("psg", "mn")
    world.begin_rekey("psg")
    work = world.begin("psg", "transfer", "--to", "nsg", "--json")
    until(lambda: "is tried again" in world.log("psg", "agent.out"), "the first try has failed")
    world.unblock()
    done = world.end(work)
    assert done.code == 0, done
    assert done.report["attempts"] > 1
    world.settle("nsg")


def test_dry_run(world: World) -> None:
    # PCTD with the intent to check; CTDR OK
    world.up(children=2)
    journals = [world.ikectx(host, "history", "--json").json for host in ("psg", "nsg")]
    with untouched(world):
        done = world.transfer("psg", "nsg", "--dry-run")
        assert done.code == 0, done
        assert done.json["dry_run"] is True
        assert done.report["dry_run"] is True
        assert "would take it" in done.report["text"]
        assert all(verdict["status"]["name"] == "OK" for verdict in done.report["verdicts"])
    assert journals == [world.ikectx(host, "history", "--json").json for host in ("psg", "nsg")]


def test_dry_run_says_all_that_speaks_against_it(world: World) -> None:
    # PCTD with the intent to check; CTDR with every reason
    world.up(children=2)
    world.edit("nsg", "      net {", "      web {")
    world.edit("nsg", "      net2 {", "      ftp {")
    world.edit("nsg", "remote {\n      auth = psk", "remote {\n      auth = pubkey")
    with untouched(world):
        done = world.transfer("psg", "nsg", "--dry-run", "--all")
        assert done.code == 4, done
        assert against(done.report) == {("PAD", "AUTHENTICATION"), ("SAD", "NO_CHILD")}
        assert "would refuse" in done.report["text"]


def test_a_gateway_without_the_right_to_push(world: World) -> None:
    # PCTD; CTDR NOT_ALLOWED by nsg's configuration of its peer
    world.up()
    with world.agent_with("nsg", '["push", "pull"]', '["pull"]'), untouched(world):
        refused(world.transfer("psg", "nsg"), 4, "NOT_ALLOWED")


def test_wrong_arguments(world: World) -> None:
    # no exchange
    world.up()
    with untouched(world):
        for words in (("--spi", "xyz"), ("--ike", "mn", "--all"), ("--ike-id", "-1"), ("--address", "maybe")):
            done = world.transfer("psg", "nsg", *words)
            assert done.code == 2, (words, done)
            assert done.json["error"]
