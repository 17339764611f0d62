"""A mobile node's handovers as its agent runs them; charon, addresses and gateways are stand-ins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from ikectx.context import Address, Endpoint, IkeContext
from ikectx.cxtp import StatusBlock
from ikectx.errors import BusyError, CharonError, ConfigError, LinkError, UnknownSaError
from ikectx.mobility import Handover, MobileState, Mode, Outcome, Prepared
from ikectx.numbers import Fpt, Status
from ikectx.ports import SaName
from ikectx_cli.mobile_config import MobileFile, parse
from ikectx_cli.mobile_handover import Handovers
from ikectx_cli.mobile_notes import ASKED
from ikectx_cli.mobile_report import Report
from vici_bridge.charon import SaView, departing_view

from .test_deadlines import MemoryStore
from .test_mobile import NEW, NSG, OLD, PSG, VIP, a_node_context

CONFIG = """\
[mobile]
predictive = 30
[[gateway]]
name = "psg"
address = ["192.0.2.1", "2001:db8:1::1"]
[[gateway]]
name = "nsg"
address = ["192.0.2.2", "2001:db8:2::1"]
"""


class Mobile:
    """`CharonMobile`, remembered."""

    def __init__(self, context: IkeContext) -> None:
        self.context = context
        self.did: list[str] = []
        self.renumbered: list[int] = []
        self.state = "ESTABLISHED"
        self.local, self.remote = context.local, context.remote
        self.peers: Sequence[Endpoint] = ()
        self.busy: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.others: list[SaView] = []

    def _do(self, what: str) -> None:
        self.did.append(what)
        if what in self.fails:
            raise self.fails[what]

    async def views(self) -> list[SaView]:
        view = replace(
            departing_view(self.context),
            state=self.state,
            local=self.local,
            remote=self.remote,
            tasks=tuple(self.busy),
            unique_id=1,
        )
        return [view, *self.others]

    async def export(self, sa: SaName) -> IkeContext:
        self._do("export")
        return replace(self.context, local=self.local, remote=self.remote)

    def recorded(self, sa: SaName) -> IkeContext:
        return self.context

    async def next_request(self, sa: SaName) -> int:
        return self.context.mid_responder

    async def renumber(self, sa: SaName, expected: int, fill: Any = None) -> bool:
        assert self.state == "PASSIVE"
        self.renumbered.append(expected)
        return bool(self.busy)

    async def only_addresses(self, sa: SaName) -> bool:
        return self.busy == ["IKE_MOBIKE"]

    async def quiet(
        self, sa: SaName, *, unanswered: bool = False, anything: bool = False, patience: float = 3.0
    ) -> None:
        self._do("quiet")
        if self.busy and not (unanswered and self.busy == ["IKE_MOBIKE"]):
            raise BusyError(f"in flight: {self.busy}")
        self.state = "PASSIVE"

    async def readdress(
        self, context: IkeContext, local: Endpoint, remote: Endpoint, renames: Any, peers: Any
    ) -> IkeContext:
        self._do("readdress")
        assert self.state == "PASSIVE"
        self.local, self.remote, self.peers = local, remote, peers
        return context

    async def redirect(self, sa: SaName, local: Endpoint, remote: Endpoint, peers: Any) -> None:
        self._do("redirect")
        self.local, self.remote, self.peers = local, remote, peers

    async def loud(self, sa: SaName) -> None:
        self._do("loud")
        self.state = "ESTABLISHED"


class Outside:
    """Addresses by gateway."""

    def __init__(self, mobile: Mobile) -> None:
        self.mobile = mobile
        self.ways: dict[Address, Address] = {NSG.address: NEW.address, PSG.address: OLD.address}
        self.nudged: list[Address] = []

    async def views(self) -> list[SaView]:
        return await self.mobile.views()

    def towards(
        self, remote: Address, *, avoid: Sequence[Address] = (), among: Sequence[Address] = ()
    ) -> Address | None:
        assert VIP in avoid
        return self.ways.get(remote)

    def nudge(self, remote: Address) -> None:
        self.nudged.append(remote)


class Gateways:
    """In place of `run_handover`: what the gateways answer."""

    def __init__(self, store: MemoryStore, mobile: Mobile) -> None:
        self.store = store
        self.mobile = mobile
        self.state = MobileState.ACTIVATED
        self.statuses: tuple[StatusBlock, ...] = ()
        self.in_doubt = False
        self.expected: int | None = None
        self.prepares = True
        self.fails: Exception | None = None
        self.seen: list[tuple[str, str, bool]] = []
        self.machine: Handover | None = None

    async def __call__(
        self,
        machine: Handover,
        bind: Address | None = None,
        *,
        moves: Awaitable[Endpoint | None] | None = None,
        progress: Callable[..., None],
    ) -> Outcome:
        self.machine = machine
        if self.fails is not None:
            raise self.fails
        if machine.mode is Mode.PREDICTIVE:
            assert moves is not None
            progress(MobileState.ANNOUNCING, None)
            if not self.prepares:
                machine.state = MobileState.REFUSED
                moves.close()  # type: ignore[attr-defined]
                return Outcome(MobileState.REFUSED, (StatusBlock(Fpt.IKEV2_SA, Status.NOT_ALLOWED),))
            progress(MobileState.PREPARED, Prepared(None))  # type: ignore[arg-type]
            care_of = await moves
            machine.moved(care_of, 0.0)
        progress(MobileState.ARRIVING, None)
        asked = bool(self.store.items(ASKED))
        self.seen.append((machine.mode.value, self.mobile.state, asked))
        machine.state = self.state
        return Outcome(
            self.state,
            self.statuses,
            in_doubt=self.in_doubt,
            expected=self.expected,
            messages=2,
            octets=300,
        )


class World:
    def __init__(self, text: str = CONFIG) -> None:
        self.config: MobileFile = parse(text, Path("mobile.toml"))
        self.mobile = Mobile(a_node_context())
        self.outside = Outside(self.mobile)
        self.store = MemoryStore()
        self.gateways = Gateways(self.store, self.mobile)
        self.told: list[dict[str, Any]] = []
        self.begin()

    def begin(self) -> None:
        self.handovers = Handovers(
            self.config,
            self.outside,
            self.mobile,  # type: ignore[arg-type]
            self.store,
            self.gateways,
        )

    async def arrive(self, to: str = "nsg", **more: Any) -> Report:
        return await self.handovers.arrive(to, tell=lambda item: self.told.append(dict(item)), **more)

    def steps(self) -> list[str]:
        return [step for step in self.mobile.did if step != "export"]


def do(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


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

        async def and_then(*args: Any, **kwargs: Any) -> Outcome:
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


def test_charon_cannot_be_made_loud() -> None:
    async def scenario() -> None:
        w = World()
        w.mobile.fails["loud"] = CharonError("charon did not activate the SA", hint="look there")
        report = await w.arrive()
        assert (report.result, report.exit_code, report.hint) == ("moved", 10, "look there")

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

        async def expires(machine: Handover, bind: Any, *, moves: Any, progress: Any) -> Outcome:
            progress(MobileState.PREPARED, Prepared(None))  # type: ignore[arg-type]
            await late.wait()
            moves.close()
            return Outcome(MobileState.SILENT, announced=True)

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

        async def silent(machine: Handover, **_: Any) -> Outcome:
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
