"""A mobile node's handovers as its agent runs them; charon, addresses and gateways are stand-ins."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.errors import BusyError, CharonError, ConfigError, LinkError, UnknownSaError
from ikectx.node.mobility import Handover, HandoverOutcome, HandoverPrepared, MobileState
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import Endpoint
from ikectx.sa.name import SaName
from ikectx.wire.cxtp import StatusBlock
from tests.asking_node import CONFIG, World, do
from tests.mobile_world import NEW, NSG, OLD, PSG, VIP


def test_reactive() -> None:
    async def scenario() -> None:
        w = World()
        report = await w.arrive()
        assert (report.result, report.exit_code, report.from_, report.to) == ("moved", 0, "psg", "nsg")
        assert (report.old, report.new, report.serves) == ((OLD, PSG), (NEW, NSG), "nsg")
        assert w.steps() == ["quiet", "readdress", "loud"]
        assert w.gateways.seen == [("reactive", "PASSIVE", True)]
        assert (w.mobile.local, w.mobile.remote) == (NEW, NSG)
        assert [str(peer) for peer in w.mobile.peers] == ["192.0.2.2:4500", "[2001:db8:2::1]:4500"]
        assert w.handovers.notes.in_question() == []
        assert w.handovers.notes.last()["result"] == "moved"
        assert [item["phase"] for item in w.told] == ["held", "asking", "asked", "readdressed", "active"]
        assert w.outside.nudged == []
        machine = w.gateways.machine
        assert machine is not None
        assert (machine.mn, machine.care_of) == (OLD.address, NEW)
        assert (machine.psg.name, machine.nsg.name) == ("psg", "nsg")
        assert str(machine.nsg.cxtp) == "192.0.2.2:5091"
        shown = report.to_json()
        assert shown["new"] == {"local": str(NEW), "remote": str(NSG)}
        assert (shown["vips"], shown["children"]) == ([str(VIP)], ["net0"])

    do(scenario())


async def at_a_new_place() -> World:
    """charon is known to be idle, and the old address is gone."""
    w = World()
    w.outside.told = await w.mobile.views()
    w.outside.own = [NEW.address]
    return w


def test_the_new_gateway_is_asked_before_charon_is_passive() -> None:
    async def scenario() -> None:
        w = await at_a_new_place()
        report = await w.arrive()
        assert (report.result, report.exit_code) == ("moved", 0)
        assert w.gateways.seen == [("reactive", "ESTABLISHED", True)]
        assert (w.gateways.ahead, w.mobile.went) == ([False], [(NEW, NSG)]), "packets wait for the request"
        assert w.steps() == ["quiet", "readdress", "loud"]
        machine = w.gateways.machine
        assert machine is not None and machine.expects == w.mobile.context.mid_responder

    do(scenario())


def test_an_exchange_that_begins_just_then_goes_on_with_the_new_gateway() -> None:
    async def scenario() -> None:
        w = await at_a_new_place()
        w.mobile.busy = ["CHILD_REKEY"]
        report = await w.arrive()
        assert (report.result, report.exit_code) == ("moved", 0)
        assert w.steps() == ["quiet", "quiet", "redirect"]
        assert w.mobile.did[-1] == "home"

    do(scenario())


@pytest.mark.parametrize("serves", [True, False])
def test_a_request_that_charon_had_at_the_last_moment(serves: bool) -> None:
    """The new gateway would use its message ID again, which charon ignores."""

    async def scenario() -> None:
        w = await at_a_new_place()
        before = w.mobile.context.mid_responder

        async def next_request(sa: Any) -> int:
            return before + 1

        w.mobile.next_request = next_request  # type: ignore[method-assign]
        w.gateways.state = MobileState.ACTIVATED if serves else MobileState.REFUSED
        await w.arrive()
        assert w.steps() == ["quiet", "readdress", "loud", "rekey"] if serves else ["quiet", "loud"]

    do(scenario())


def test_what_the_old_way_still_carries_is_not_sent_ahead() -> None:
    async def scenario() -> None:
        w = World()
        w.outside.told = await w.mobile.views()
        await w.arrive()
        assert w.mobile.went == []
        assert w.gateways.seen == [("reactive", "PASSIVE", True)]

    do(scenario())


def test_what_was_known_of_charon_s_sas_is_asked_anew_after_a_handover() -> None:
    """charon reports nothing of what the agent did to its SAs: it was thought to be with the old gateway."""

    async def scenario() -> None:
        w = World()
        w.outside.told = await w.mobile.views()
        await w.arrive()
        assert w.outside.changes == 1

    do(scenario())


def test_an_address_that_was_given() -> None:
    async def scenario() -> None:
        w = World()
        report = await w.arrive(address=ip_address("203.0.113.50"))
        assert report.new == (Endpoint.of("203.0.113.50", 4500), NSG)

    do(scenario())


def test_the_other_ip_version_where_only_that_leads_there() -> None:
    async def scenario() -> None:
        w = World()
        six = ip_address("2001:db8:9::9")
        w.outside.ways = {ip_address("2001:db8:2::1"): six}
        report = await w.arrive()
        assert report.new == (Endpoint(six, 4500), Endpoint.of("2001:db8:2::1", 4500))

    do(scenario())


def test_while_charon_looks_for_its_gateway_the_sa_stays_active() -> None:
    async def scenario() -> None:
        w = World()
        w.mobile.busy = ["IKE_MOBIKE"]
        report = await w.arrive()
        assert report.result == "moved"
        assert w.gateways.seen == [("reactive", "ESTABLISHED", True)]
        assert w.steps() == ["quiet", "quiet", "readdress", "loud"]

    do(scenario())


def test_what_psg_left_unanswered_is_asked_of_nsg_under_the_number_it_expects() -> None:
    async def scenario() -> None:
        w = World()
        w.mobile.busy = ["IKE_MOBIKE"]
        w.gateways.expected = 8
        await w.arrive()
        assert w.mobile.renumbered == [8]
        assert w.outside.nudged == [NSG.address]
        machine = w.gateways.machine
        assert machine is not None
        assert machine.expects == w.mobile.context.mid_responder

    do(scenario())


def test_an_idle_sa_is_left_alone_by_the_number_nsg_expects() -> None:
    async def scenario() -> None:
        w = World()
        w.gateways.expected = 8
        await w.arrive()
        assert w.outside.nudged == []

    do(scenario())


def test_an_exchange_about_children_must_end_first() -> None:
    async def scenario() -> None:
        w = World()
        w.mobile.busy = ["CHILD_REKEY"]
        with pytest.raises(BusyError):
            await w.arrive()
        assert w.gateways.seen == []
        assert w.mobile.state == "ESTABLISHED"
        assert not w.handovers.notes.in_question()

    do(scenario())


def test_an_exchange_that_charon_begins_while_nsg_takes_the_sa() -> None:
    """It goes on with nsg; the children are charon's business then."""

    async def scenario() -> None:
        w = World()
        w.mobile.busy = ["IKE_MOBIKE"]
        run = w.gateways.__call__

        async def and_then(*args: Any, **kwargs: Any) -> HandoverOutcome:
            outcome = await run(*args, **kwargs)
            w.mobile.busy = ["CHILD_REKEY"]
            return outcome

        w.handovers._run = and_then
        report = await w.arrive()
        assert (report.result, report.exit_code) == ("moved", 0)
        assert w.steps() == ["quiet", "quiet", "redirect"]
        assert (w.mobile.remote, w.mobile.state) == (NSG, "ESTABLISHED")

    do(scenario())


@pytest.mark.parametrize(
    ("state", "status", "in_doubt", "result", "code", "serves"),
    [
        (MobileState.REFUSED, Status.NO_CONNECTION, False, "refused", 4, "psg"),
        (MobileState.REFUSED, Status.BUSY, True, "refused", 4, None),
        (MobileState.SILENT, None, True, "silent", 5, None),
        (MobileState.SILENT, None, False, "silent", 5, "psg"),
    ],
)
def test_a_no_or_nothing(
    state: MobileState, status: Status | None, in_doubt: bool, result: str, code: int, serves: str | None
) -> None:
    async def scenario() -> None:
        w = World()
        w.gateways.state, w.gateways.in_doubt = state, in_doubt
        w.gateways.statuses = () if status is None else (StatusBlock(Fpt.IKEV2_SA, status),)
        report = await w.arrive()
        assert (report.result, report.exit_code, report.serves) == (result, code, serves)
        assert report.hint
        assert report.status is (status or Status.UNREACHABLE)
        assert w.steps() == ["quiet", "loud"]
        assert (w.mobile.local, w.mobile.remote, w.mobile.state) == (OLD, PSG, "ESTABLISHED")
        assert w.outside.nudged == [PSG.address]
        assert bool(w.handovers.notes.in_question()) is in_doubt
        if in_doubt:
            assert "handover --to nsg" in report.hint
            w.begin()  # also another agent knows
            assert w.handovers.notes.in_question()[0]["to"] == "nsg"
            w.gateways.state, w.gateways.in_doubt = MobileState.ACTIVATED, False
            assert (await w.arrive()).result == "moved"
        assert w.handovers.notes.in_question() == []

    do(scenario())


def test_no_socket() -> None:
    async def scenario() -> None:
        w = World()
        w.gateways.fails = LinkError("no socket to send CTARs from")
        with pytest.raises(LinkError):
            await w.arrive()
        assert w.steps() == ["quiet", "loud"]
        assert w.handovers.notes.in_question() == []

    do(scenario())


def test_charon_fails_at_the_end() -> None:
    async def scenario() -> None:
        w = World()
        w.mobile.fails["readdress"] = CharonError("charon did not add the CHILD_SAs")
        report = await w.arrive()
        # `loud` ended it, as far as it can tell; but charon is not where it should be
        assert (report.result, report.serves, report.exit_code) == ("moved", "nsg", CharonError.exit_code)
        assert "does not talk to it" in report.detail

    do(scenario())


def test_charon_may_have_gone_on_to_another_address_of_the_new_gateway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By MOBIKE, as soon as it is active again."""

    async def scenario() -> None:
        w = World()
        loud = w.mobile.loud

        async def probes(sa: SaName) -> None:
            await loud(sa)
            w.mobile.remote = Endpoint.of("2001:db8:2::1", 4500)

        monkeypatch.setattr(w.mobile, "loud", probes)
        report = await w.arrive()
        assert (report.result, report.exit_code, report.detail) == ("moved", 0, "")

    do(scenario())


def test_charon_cannot_be_made_loud() -> None:
    async def scenario() -> None:
        w = World()
        w.mobile.fails["loud"] = CharonError("charon did not activate the SA", hint="look there")
        report = await w.arrive()
        assert (report.result, report.exit_code, report.hint) == ("moved", 10, "look there")
        assert w.mobile.did[-1] == "loud later"  # B13: nothing else would, before the agent starts anew

    do(scenario())


# Predictive.


def test_announced_and_completed_by_hand() -> None:
    async def scenario() -> None:
        w = World()
        report = await w.handovers.announce("nsg")
        assert (report.result, report.announced, report.serves) == ("announced", True, "psg")
        assert w.steps() == []
        status = w.handovers.status()
        assert status is not None and (status["from"], status["to"]) == ("psg", "nsg")
        assert (await w.handovers.announce("nsg")) is report
        moved = await w.arrive()
        assert moved is report
        assert (moved.result, moved.mode, moved.new) == ("moved", "predictive", (NEW, NSG))
        assert w.steps() == ["quiet", "readdress", "loud"]
        assert w.gateways.seen == [("predictive", "PASSIVE", True)]
        assert w.handovers.status() is None

    do(scenario())


def test_announced_and_completed_at_a_new_address() -> None:
    async def scenario() -> None:
        w = World()
        w.outside.ways[NSG.address] = OLD.address
        await w.handovers.announce("nsg")
        w.handovers.addresses_changed()
        await asyncio.sleep(0.01)
        assert w.steps() == []
        w.outside.ways = {}
        w.handovers.addresses_changed()
        await asyncio.sleep(0.01)
        assert w.steps() == []
        w.outside.ways = {NSG.address: NEW.address}
        w.handovers.addresses_changed()
        w.handovers.addresses_changed()
        report = await w.arrive()  # whoever asks as well gets the same
        assert (report.result, report.new) == ("moved", (NEW, NSG))
        w.handovers.addresses_changed()
        assert w.handovers.status() is None

    do(scenario())


def test_an_announcement_that_is_refused() -> None:
    async def scenario() -> None:
        w = World()
        w.gateways.prepares = False
        report = await w.handovers.announce("nsg")
        assert (report.result, report.exit_code, report.serves) == ("refused", 4, "psg")
        assert report.detail.startswith("psg: ")
        assert w.steps() == []
        assert w.handovers.status() is None
        assert (await w.arrive()).result == "moved"

    do(scenario())


def test_an_announcement_that_nobody_completes() -> None:
    async def scenario() -> None:
        w = World()
        late = asyncio.Event()

        async def expires(machine: Handover, bind: Any, *, moves: Any, progress: Any) -> HandoverOutcome:
            progress(MobileState.PREPARED, HandoverPrepared(None))  # type: ignore[arg-type]
            await late.wait()
            moves.close()
            return HandoverOutcome(MobileState.SILENT, announced=True)

        w.handovers._run = expires
        await w.handovers.announce("nsg")
        pending = w.handovers._pending
        assert pending is not None and pending.task is not None
        late.set()
        report = await pending.task
        assert (report.result, report.serves) == ("silent", "psg")
        assert "nobody moved in time" in report.detail
        assert w.steps() == []
        assert w.handovers.status() is None

    do(scenario())


def test_another_gateway_after_an_announcement() -> None:
    async def scenario() -> None:
        third = CONFIG + '[[gateway]]\nname = "third"\naddress = "192.0.2.3"\n'
        w = World(third)
        w.outside.ways[ip_address("192.0.2.3")] = NEW.address
        await w.handovers.announce("nsg")
        report = await w.arrive("third")
        assert (report.result, report.to, report.mode) == ("moved", "third", "reactive")
        assert w.handovers.status() is None
        assert not await w.handovers.cancel()

    do(scenario())


def test_a_gateway_that_nobody_knows_ends_no_announcement() -> None:
    async def scenario() -> None:
        w = World()
        await w.handovers.announce("nsg")
        for work in (w.arrive("nowhere"), w.handovers.announce("nowhere"), w.arrive("nowhere", anew=True)):
            with pytest.raises(ConfigError, match="nowhere"):
                await work
        status = w.handovers.status()
        assert status is not None and status["to"] == "nsg"

    do(scenario())


def test_the_same_gateway_anew() -> None:
    async def scenario() -> None:
        w = World()
        await w.handovers.announce("nsg")
        report = await w.arrive("nsg", anew=True)
        assert (report.result, report.mode, report.announced) == ("moved", "reactive", False)
        assert w.handovers.status() is None

    do(scenario())


def test_calling_an_announcement_off() -> None:
    async def scenario() -> None:
        w = World()
        await w.handovers.announce("nsg")
        assert await w.handovers.cancel()
        assert w.handovers.status() is None
        assert w.mobile.state == "ESTABLISHED"
        w.handovers.addresses_changed()
        assert (await w.arrive()).mode == "reactive"

    do(scenario())


def test_the_agent_ends_in_the_middle() -> None:
    async def scenario() -> None:
        w = World()
        stuck = asyncio.Event()

        async def silent(machine: Handover, **_: Any) -> HandoverOutcome:
            stuck.set()
            await asyncio.Event().wait()
            raise AssertionError

        w.handovers._run = silent
        work = asyncio.create_task(w.arrive())
        await stuck.wait()
        with pytest.raises(BusyError, match="another handover"):
            await w.arrive()
        with pytest.raises(BusyError, match="another handover"):
            await w.handovers.announce("nsg")
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert w.mobile.state == "ESTABLISHED"
        assert w.steps() == ["quiet", "loud"]

    do(scenario())


# What cannot be.


def test_already_there() -> None:
    async def scenario() -> None:
        w = World()
        for report in (await w.arrive("psg"), await w.handovers.announce("psg")):
            assert (report.result, report.exit_code, report.serves) == ("already", 0, "psg")
        assert w.steps() == []

    do(scenario())


def test_unknown_gateways_and_sas() -> None:
    async def scenario() -> None:
        w = World()
        with pytest.raises(ConfigError, match="nowhere"):
            await w.arrive("nowhere")
        with pytest.raises(UnknownSaError, match="no IKE_SA"):
            await w.arrive(sa=(b"x" * 8, b"y" * 8))
        with pytest.raises(ConfigError, match="IPv6"):
            lonely = World(CONFIG.replace('["192.0.2.2", "2001:db8:2::1"]', '"192.0.2.2"'))
            await lonely.arrive(address=ip_address("2001:db8::5"))
        w.outside.ways = {}
        with pytest.raises(LinkError, match="leads to nsg"):
            await w.arrive()
        w.mobile.remote = Endpoint.of("192.0.2.99", 4500)
        with pytest.raises(ConfigError, match="no \\[\\[gateway\\]\\]"):
            await w.arrive()

    do(scenario())


def test_the_right_one_of_several_sas() -> None:
    async def scenario() -> None:
        w = World()
        (own,) = await w.mobile.views()
        stranger = replace(own, spi_i=b"s" * 8, remote=Endpoint.of("203.0.113.200", 500))
        w.mobile.others = [stranger]
        assert (await w.arrive()).spis == own.spis
        w = World()
        w.mobile.others = [replace(own, spi_i=b"s" * 8)]
        with pytest.raises(UnknownSaError, match="say which"):
            await w.arrive()
        assert (await w.arrive(sa=own.spis)).result == "moved"

    do(scenario())
