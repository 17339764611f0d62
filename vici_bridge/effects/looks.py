"""`Looks`: charon's state at the time when SAs come in, asked once for many of them. I/O.

An SA may come in only if no SA here has its names, addresses or networks. Which SAs there are is known
without asking for all of them (`Known`). Names are compared and taken by one SA after the other, because two
may want the same.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ikectx import trace
from ikectx.errors import WireError
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict
from ikectx.together import Together
from vici_bridge.host import CharonHost
from vici_bridge.host_config import HostConfig
from vici_bridge.policy.admission import admit, depends_on_others
from vici_bridge.policy.allowed import leased, pool_ranges
from vici_bridge.policy.checks import (
    check_address,
    check_covered,
    check_ike_algorithms,
    check_names,
    check_numbers,
    check_selectors,
    check_sizes,
    check_unique,
    check_vips,
)
from vici_bridge.policy.present import Present
from vici_bridge.vici.codec import Message
from vici_bridge.vici.views import SaView, arriving_view

AGE = 0.1
"""Seconds for which charon's answers about its configuration will do; who loads another one expects it to
count."""

MANY = 50
"""Leases that take as long as another request."""


@dataclass(frozen=True, slots=True)
class Seen:
    """charon's answers. `version`: its HA wire version. `present`: its SAs (`Known`). `pools`: with their
    leases if the SA has a virtual IP of one. `connections`: that of the SA, if there is one, and the others
    if they matter for it. `listening`: whether its end of the HA link exists."""

    version: int
    present: Present
    pools: Mapping[str, Message]
    algorithms: Mapping[str, Mapping[str, str]]
    listening: bool = True
    connections: Mapping[str, Message] = field(default_factory=dict)


class Looks:
    """The looks of one gateway."""

    def __init__(self, host: CharonHost) -> None:
        self._host = host
        self._last: Seen | None = None
        self._asked_at = float("-inf")
        self._algorithms: tuple[int, Mapping[str, Mapping[str, str]]] | None = None
        """Which charon was asked (`Known.life`), and what it can do, which stays so as long as it runs."""
        self._turn = asyncio.Lock()
        self._looking = Together(self._look_for)
        self._asked: dict[tuple[str, str], tuple[float, Mapping[str, Message]]] = {}
        """When charon was asked for something of that name (empty: for all), and what it said."""
        self._many = False
        """Whether there are so many leases that all of them are not asked for with the pools."""
        self._coming: dict[SaName, asyncio.Future[None]] = {}
        """SAs that are being installed, and when that is over."""

    async def look(self, context: IkeContext) -> Seen:
        """charon's state, for an SA that comes in. Errors: CharonError, WireError."""
        return await self._looking.join(context)

    async def again(self, here: IkeContext) -> None:
        """Have the SAs that may share something with this one asked for again by the next look. Errors: as
        `look`."""
        present = self._host.known.present
        await self._host.known.again(
            view.spis for view in (*present.rivals(here), *present.same_identity(here))
        )

    async def _look_for(self, contexts: Sequence[IkeContext]) -> Sequence[Seen]:
        async with self._turn:
            now = asyncio.get_running_loop().time()
            if self._last is None or now - self._asked_at > AGE:
                self._last, self._asked_at = await self._look(), now
            present = await self._host.known.now()
            seen = replace(self._last, present=present)
            return [
                replace(
                    seen,
                    connections=await self._connections(context),
                    pools=await self._pools(context, seen.pools),
                )
                for context in contexts
            ]

    async def _connections(self, context: IkeContext) -> Mapping[str, Message]:
        """The SA's own connection, because there may be a thousand; all of them where the others matter."""

        async def asked(name: str) -> Mapping[str, Message]:
            return await self._host.connections([name] if name else None)

        found = await self._asked_for("connections", context.connection, asked)
        if depends_on_others(context, found):
            return await self._asked_for("connections", "", asked)
        return found

    async def _pools(self, context: IkeContext, pools: Mapping[str, Message]) -> Mapping[str, Message]:
        """The pools, with the leases of those that have a virtual IP of the SA."""

        async def asked(name: str) -> Mapping[str, Message]:
            return await self._host.vici.pools(name, leases=True)

        for name in _pools_of(context, pools):
            if "leases" not in pools[name]:
                pools = {**pools, **await self._asked_for("leases", name, asked)}
        return pools

    async def _asked_for(
        self, what: str, name: str, ask: Callable[[str], Awaitable[Mapping[str, Message]]]
    ) -> Mapping[str, Message]:
        now = asyncio.get_running_loop().time()
        self._asked = {which: told for which, told in self._asked.items() if now - told[0] <= AGE}
        if (what, name) not in self._asked:
            self._asked[what, name] = now, await ask(name)
        return self._asked[what, name][1]

    @trace.spanned("look")
    async def _look(self) -> Seen:
        host = self._host
        if self._algorithms is None or self._algorithms[0] != host.known.life:
            life = host.known.life
            self._algorithms = life, await host.vici.algorithms()
        pools = await host.vici.pools(leases=not self._many)
        with contextlib.suppress(WireError):  # `admit` says so
            self._many = leased(pools) > MANY
        return Seen(await host.version(), host.known.present, pools, self._algorithms[1], host.listening())

    def comes(self, here: IkeContext) -> None:
        """This SA, which shares nothing with any other, is being installed, until `came_or_not`."""
        self._host.known.comes(arriving_view(here))
        self._coming[here.spis] = asyncio.get_running_loop().create_future()

    def came_or_not(self, here: IkeContext) -> None:
        """That is over. If it came, `Known.put` was called."""
        self._host.known.came_or_not(here.spis)
        self._coming.pop(here.spis).set_result(None)

    def coming(self, here: IkeContext) -> Sequence[SaName]:
        """The SAs that are being installed and may share something with this one."""
        if not self._coming:
            return ()
        return [view.spis for view in self._host.known.present.rivals(here) if view.spis in self._coming]

    async def over(self, sas: Iterable[SaName]) -> None:
        """Wait until these are installed, or undone."""
        for sa in sas:
            if sa in self._coming:
                await asyncio.shield(self._coming[sa])


def _pools_of(context: IkeContext, pools: Mapping[str, Message]) -> list[str]:
    """The names of the pools that have a virtual IP of the SA."""
    try:
        ranges = pool_ranges(pools)
    except WireError:  # `admit` says so
        return []
    return [name for name, its in ranges.items() if any(vip in its for vip in context.remote_vips)]


def objections(
    context: IkeContext,
    here: IkeContext,
    seen: Seen,
    config: HostConfig,
    messages: Sequence[bytes],
    *,
    keep_address: bool,
    relayed_by: str = "",
) -> list[Verdict]:
    """All reasons against an SA whatever other SAs are here. `here`: the SA as it would be here. `messages`:
    those by which charon would take it in.

    `relayed_by`: the gateway at whose address the mobile node stays.
    """
    verdicts = list(check_covered(here, seen.version))
    if not relayed_by:
        verdicts += check_address(here, context, keep_address)
    elif here.local.port != context.local.port and here.remote == context.remote:
        why = f"charon here has other UDP ports than that of {relayed_by}, which would relay it"
        verdicts.append(Verdict(Fpt.IKEV2_SA, Status.NOT_COVERED, why))
    verdicts += check_sizes(messages, config.ha_buflen)
    if not seen.listening:
        verdicts.append(Verdict(Fpt.IKEV2_SA, Status.CHARON, "charon does not listen on its HA address"))
    verdicts += check_names(here, seen.connections)
    verdicts += admit(here, seen.connections, seen.pools, config, relayed_by)
    verdicts += check_numbers(here, config.oseq_jump)
    verdicts += check_ike_algorithms(here, seen.algorithms)
    return verdicts


def conflicts(here: IkeContext, seen: Seen, rivals: Sequence[SaView]) -> list[Verdict]:
    """All reasons against it because of SAs that may share something with it, but for its SPIs."""
    return [
        *check_unique(here, seen.connections, seen.present),
        *check_vips(here, rivals, seen.pools),
        *check_selectors(here, rivals),
    ]
