"""A mobile node that asks for handovers; its charon, its addresses and its gateways are stand-ins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ikectx.errors import BusyError
from ikectx.node.mobility import Handover, HandoverMode, HandoverOutcome, HandoverPrepared, MobileState
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import Address, Endpoint, IkeContext
from ikectx.sa.name import SaName
from ikectx.wire.cxtp import StatusBlock
from ikectx_cli.mobile.config import parse
from tests.mobile_world import NEW, NSG, OLD, PSG, VIP, a_node_context
from tests.vici_bridge.test_deadlines import MemoryStore
from vici_bridge.effects.mobile import Applied, CharonMobile
from vici_bridge.mobile.handover import Handovers
from vici_bridge.mobile.node import MobileNode
from vici_bridge.mobile.notes import ASKED
from vici_bridge.mobile.report import MobileReport
from vici_bridge.vici.views import SaView, departing_view

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
        self.went: list[tuple[Endpoint, Endpoint]] = []
        self._not_applied: dict[SaName, Any] = {}

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

    def known(self, view: SaView) -> IkeContext:
        return replace(self.context, local=self.local, remote=self.remote)

    async def ahead(self, context: IkeContext, local: Endpoint, remote: Endpoint) -> None:
        self.went.append((local, remote))

    def is_quiet(self, sa: SaName) -> bool:
        return False

    async def home(self, sa: SaName) -> None:
        self.did.append("home")

    async def rekey(self, sa: SaName) -> None:
        self._do("rekey")

    async def apply(self, *args: Any, **more: Any) -> Applied:
        return await CharonMobile.apply(self, *args, **more)  # type: ignore[arg-type]

    def recorded(self, sa: SaName) -> IkeContext:
        return self.context

    async def next_request(self, sa: SaName) -> int:
        return self.context.mid_responder

    async def renumber(self, sa: SaName, expected: int, local: Endpoint, remote: Endpoint) -> bool:
        assert self.state == "PASSIVE"
        self.renumbered.append(expected)
        return bool(self.busy)

    async def only_addresses(self, sa: SaName) -> bool:
        return self.busy == ["IKE_MOBIKE"]

    async def quiet(
        self, sa: SaName, *, unanswered: bool = False, anything: bool = False, patience: float = 3.0
    ) -> None:
        await asyncio.sleep(0)  # until charon answers
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

    def loud_later(self, sa: SaName, lock: object) -> None:
        self.did.append("loud later")


class Outside:
    """Addresses by gateway."""

    def __init__(self, mobile: Mobile) -> None:
        self.mobile = mobile
        self.ways: dict[Address, Address] = {NSG.address: NEW.address, PSG.address: OLD.address}
        self.nudged: list[Address] = []
        self.told: list[SaView] | None = None
        self.own = [OLD.address, NEW.address]
        self.changes = 0

    async def views(self) -> list[SaView]:
        return await self.mobile.views()

    def known(self) -> list[SaView] | None:
        return self.told

    def has(self, address: Address) -> bool:
        return address in self.own

    def addresses(self) -> list[Address]:
        return list(self.own)

    def towards(
        self, remote: Address, *, avoid: Sequence[Address] = (), among: Sequence[Address] = ()
    ) -> Address | None:
        assert VIP in avoid
        found = self.ways.get(remote)
        return None if found in avoid else found

    def changed(self) -> None:
        self.changes += 1

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
        self.ahead: list[bool] = []
        """Whether packets went by the new place already when the new gateway was asked."""
        self.machine: Handover | None = None

    async def __call__(
        self,
        machine: Handover,
        bind: Address | None = None,
        *,
        moves: Awaitable[Endpoint | None] | None = None,
        progress: Callable[..., None],
    ) -> HandoverOutcome:
        self.machine = machine
        if self.fails is not None:
            raise self.fails
        if machine.mode is HandoverMode.PREDICTIVE:
            assert moves is not None
            progress(MobileState.ANNOUNCING, None)
            if not self.prepares:
                machine.state = MobileState.REFUSED
                moves.close()  # type: ignore[attr-defined]
                return HandoverOutcome(MobileState.REFUSED, (StatusBlock(Fpt.IKEV2_SA, Status.NOT_ALLOWED),))
            progress(MobileState.PREPARED, HandoverPrepared(None))  # type: ignore[arg-type]
            care_of = await moves
            machine.moved(care_of, 0.0)
        progress(MobileState.ARRIVING, None)
        asked = bool(self.store.items(ASKED))
        self.ahead.append(bool(self.mobile.went))
        self.seen.append((machine.mode.value, self.mobile.state, asked))
        machine.state = self.state
        return HandoverOutcome(
            self.state,
            self.statuses,
            in_doubt=self.in_doubt,
            expected=self.expected,
            messages=2,
            octets=300,
        )


class World:
    def __init__(self, text: str = CONFIG) -> None:
        self.config: MobileNode = parse(text, Path("mobile.toml")).node
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

    async def arrive(self, to: str = "nsg", **more: Any) -> MobileReport:
        return await self.handovers.arrive(to, tell=lambda item: self.told.append(dict(item)), **more)

    def steps(self) -> list[str]:
        return [step for step in self.mobile.did if step not in ("export", "home")]


def do(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)
