"""A mobile node with an agent, and gateways where its SA's SPIs are taken by somebody else's.

By itself it hears of new SPIs in the answer to its request:

    MN -> nsg   CTAR           answered by a CTAA with the new SPIs; no IKE message

After a push, nsg asks for them by IKE, charon answers, and the agent asks back:

    nsg -> MN   INFORMATIONAL  N(UPDATE_SA_ADDRESSES), N(UPDATE_SPI)...    answered without the last
    MN -> nsg   INFORMATIONAL  N(UPDATE_SPI)..., answered with the same

With ESP in user space the mobile node's charon rekeys its child each time.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ikectx.numbers import Protocol
from ikectx.sa.context import Endpoint
from ikectx_cli.lab.net import OUTER
from mobike_ext.address_update import AddressNotice, Condition
from mobike_ext.link import run_spi_update
from mobike_ext.naming import ask, ask_peer
from mobike_ext.requester import SaEnd
from mobike_ext.spi_update import Renamed, SpiUpdate
from tests.netns import of_name

from .test_collisions import agreed, lives_on, names_at_psg, other_at_nsg, others, served
from .test_exchanges import _child, _endpoint, _generation
from .test_mobile import afterwards, asks, hands_over, mobile, status, up
from .world import World, spis, until

__all__ = ["afterwards", "mobile"]

pytestmark = pytest.mark.live


def installed(sa: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (child["spi-in"], child["spi-out"])
        for child in sa["child-sas"].values()
        if child["state"] == "INSTALLED"
    }


@pytest.mark.parametrize("words", [("--reactive",), ("--predictive", "--now")])
@pytest.mark.parametrize("kind", ["inbound", "ike", "all"])
def test_the_answer_names_new_spis(mobile: World, tmp_path: Path, kind: str, words: tuple[str, ...]) -> None:
    keys = {"inbound": ("spi_in",), "ike": ("spi_i", "spi_r"), "all": ("spi_i", "spi_r", "spi_in")}[kind]
    up(mobile)
    names = names_at_psg(mobile)
    other = other_at_nsg(mobile, tmp_path, **{key: names[key] for key in keys})
    done = asks(mobile, "handover", "--to", "nsg", "--json", *words)
    assert done.code == 0, done
    report = done.json
    assert report["result"] == "moved", report
    assert report["renamed"] == len({"spi_in", "spi_r"} & set(keys))
    assert mobile.lab.list_sas("psg") == []
    here, node = served(mobile), mobile.one("mn")
    assert node["remote-host"] == OUTER["nsg"][4]
    assert spis(here) == spis(node)
    if "spi_r" in keys:
        assert spis(node)[0] == names["spi_i"] and spis(node)[1] != names["spi_r"]
    assert "UPD_SA_ADDR" not in mobile.log("mn")
    lives_on(mobile, other)


def test_an_outbound_spi_that_is_taken_is_refused(mobile: World, tmp_path: Path) -> None:
    # MN -> nsg CTAR, CTAA with the refusal: nobody can ask the MN for its own SPI there
    up(mobile)
    names = names_at_psg(mobile)
    other = other_at_nsg(mobile, tmp_path, spi_out=names["spi_out"], remote=names["remote"])
    report = asks(mobile, "handover", "--to", "nsg", "--json").json
    assert (report["result"], report["serves"]) == ("refused", "psg"), report
    assert others(mobile) == other
    mobile.ping()


@pytest.mark.parametrize(
    ("kind", "asked_before"), [("inbound", True), ("inbound", False), ("ike", False), ("all", False)]
)
def test_a_push_to_a_mobile_node_with_an_agent(
    mobile: World, tmp_path: Path, kind: str, asked_before: bool
) -> None:
    # psg knows of the agent since MN -> psg CTAR, or by its configuration
    keys = {"inbound": ("spi_in",), "ike": ("spi_r",), "all": ("spi_r", "spi_in", "spi_out", "remote")}[kind]
    if asked_before:
        up(mobile, gateway="nsg", inside="announce")
        old = installed(mobile.one("mn"))
        hands_over(mobile, "psg")
        until(lambda: not old & installed(mobile.one("mn")), "the mobile node has rekeyed its child")
        mobile.agree("psg")
    else:
        up(mobile)
    names = names_at_psg(mobile)
    ((names["spi_in"], names["spi_out"]),) = installed(mobile.one("psg"))
    other = other_at_nsg(mobile, tmp_path, **{key: names[key] for key in keys})
    before = status(mobile)["renamed"]
    done = mobile.transfer("psg", "nsg")
    assert done.code == 0, done
    assert done.report["result"] == "moved"
    until(lambda: status(mobile)["renamed"] == before + 1, "the mobile node's agent has asked back")
    until(lambda: agreed(mobile), "both ends agree")
    node = mobile.one("mn")
    assert node["remote-host"] == OUTER["nsg"][4]
    if "spi_r" in keys:
        assert spis(node)[0] == names["spi_i"] and spis(node)[1] != names["spi_r"]
    else:
        assert spis(node) == (names["spi_i"], names["spi_r"])
    assert "does not know UPDATE_SPI" not in mobile.log("nsg", "agent.out")
    lives_on(mobile, other)


def test_a_node_that_does_not_move_is_left_alone(mobile: World) -> None:
    # every exchange from both sides, and nothing of the agent's between them: the SA is never passive
    up(mobile)
    for host in ("mn", "psg"):
        mobile.rekey_child(host, "psg")
        mobile.rekey_ike(host, "psg")
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            assert [sa["state"] for sa in mobile.lab.list_sas("mn")] == ["ESTABLISHED"]
    assert "(41960)" not in mobile.log("psg")
    mobile.ping()
    mobile.serves("psg")
    mobile.ends("mn", "psg")


@pytest.mark.parametrize("kind", ["inbound", "ike"])
@pytest.mark.parametrize("step", ["run_spi_update", "count", "readdress", "loud"])
def test_an_agent_that_dies_while_it_asks_back(mobile: World, tmp_path: Path, step: str, kind: str) -> None:
    # as a push, but the mobile node falls silent before or after its own request; the next agent repeats it,
    # octet for octet. Where it was never sent, nsg rekeys, and is heard when the SA is active again
    keys = {"inbound": ("spi_in",), "ike": ("spi_r",)}[kind]
    up(mobile)
    names = names_at_psg(mobile)
    other = other_at_nsg(mobile, tmp_path, **{key: names[key] for key in keys})
    lab = mobile.lab
    lab.stop("mn", "agent")
    root = str(Path(__file__).parent.parent.parent)
    words = [sys.executable, str(Path(__file__).with_name("dying.py")), str(lab.work / "mn" / "mobile.toml")]
    dying = lab.spawn("mn", "agent", ["env", f"PYTHONPATH={root}", *words, step])
    lab.wait_agent("mn")
    until(lambda: status(mobile)["watched"] == 1, "the agent listens")
    work = mobile.begin("psg", "transfer", "--to", "nsg", "--json")
    assert dying.wait(timeout=20) == 9
    lab.started.pop(("mn", "agent"))
    assert mobile.one("mn")["state"] == "PASSIVE"
    (lab.work / "mn" / "ikectx.vici").unlink(missing_ok=True)
    lab.start_agent("mn")
    done = mobile.end(work)
    assert done.code == 0, done
    until(lambda: agreed(mobile), "both ends agree", 20)
    lives_on(mobile, other)


@pytest.mark.parametrize("ike", [False, True])
def test_a_gateway_that_asks_by_ike_during_a_handover(mobile: World, ike: bool) -> None:
    # MN -> nsg CTAR, which nobody answers; the test, as nsg, has the SA's keys from psg:
    # nsg -> MN INFORMATIONAL N(UPDATE_SA_ADDRESSES), N(UPDATE_SPI)...; the mobile node's agent answers itself
    up(mobile)
    shown = mobile.context("psg", secrets=True)
    (generation,), (child,) = map(_generation, shown["generations"]), map(_child, shown["children"])
    own = generation.spi_i if generation.initiator else generation.spi_r
    asks = [ask(Protocol.ESP, child.spi_in, b"\xc9\0\0\1"), ask_peer(Protocol.ESP, child.spi_out)]
    asks += [ask(Protocol.IKE, own, b"\x99" * 8)] if ike else []
    machine = SpiUpdate(
        SaEnd(
            generation,
            shown["mid_initiator"],
            Endpoint.of(OUTER["nsg"][4], 4500),
            _endpoint(shown["remote"]),
        ),
        asks,
        iv=secrets.token_bytes(64),
        fresh=secrets.token_bytes(512),
        address=AddressNotice(secrets.token_bytes(16), Condition.NAT_ANY | Condition.NAT_THERE),
    )
    mobile.lab.stop("nsg", "agent")
    try:
        config = str(mobile.lab.work / "mn" / "mobile.toml")
        work = mobile.begin("mn", "mobile", "--config", config, "handover", "--to", "nsg", "--json")
        until(lambda: mobile.one("mn")["state"] == "PASSIVE", "the SA is passive")
        time.sleep(0.3)
        with of_name(mobile.lab.net.namespace("nsg")).entered():
            report = asyncio.run(run_spi_update(machine))
        assert isinstance(report.outcome, Renamed), report
        assert len(report.outcome.pairs) == len(asks)
        done = mobile.end(work)
        assert done.code == 0, done
        assert (done.json["result"], done.json["serves"]) == ("moved", "nsg")
        node = mobile.one("mn")
        assert (node["state"], node["remote-host"]) == ("ESTABLISHED", OUTER["nsg"][4])
        assert ("c9000001" in {out for _, out in installed(node)}) or "REKEYING" in str(node["child-sas"])
        assert (spis(node)[1] == "99" * 8) is ike
    finally:
        mobile.lab.start_agent("nsg")
        mobile.broken = True  # nsg's charon knows nothing of all this
