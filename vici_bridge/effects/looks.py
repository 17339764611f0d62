"""`Looks`: charon's state at the time when SAs come in, asked once for many of them. I/O.

An SA may come in only if no SA here has its names, addresses or networks. With a thousand SAs charon takes a
tenth of a second to answer, and the answer as long to parse. So the list of some seconds ago will do, with
the changes since: SAs that came in themselves (`came`), and those of which charon has told over HA that
something is new, or that were deleted, each of which is asked for alone. Names are compared and taken by one
SA after the other, because two may want the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ikectx import trace
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict
from ikectx.together import Together
from vici_bridge.host import CharonHost
from vici_bridge.host_config import HostConfig
from vici_bridge.policy.admission import admit, depends_on_others
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
from vici_bridge.vici.views import ARRIVING, SaView, arriving_view

AGE = 0.1
"""Seconds for which charon's answers about its configuration will do; who loads another one expects it to
count."""
LISTED = 10.0
"""Seconds for which the list of its SAs will do, with the changes since."""
MANY = 32
"""SAs with news at most that are asked for one by one."""


@dataclass(frozen=True, slots=True)
class Seen:
    """charon's answers. `version`: its HA wire version. `present`: its SAs, up to date as long as this look
    is the last one. `connections`: that of the SA, if there is one, and the others if they matter for it.
    `listening`: whether its end of the HA link exists."""

    version: int
    present: Present
    pools: Mapping[str, Message]
    algorithms: Mapping[str, Mapping[str, str]]
    listening: bool = True
    connections: Mapping[str, Message] = field(default_factory=dict)


class Looks:
    """The looks of one gateway, and the SAs that came in since the last one."""

    def __init__(self, host: CharonHost) -> None:
        self._host = host
        self._last: Seen | None = None
        self._asked_at = self._listed_at = float("-inf")
        self._life = 0
        """Which charon was asked (`Listing.life`)."""
        self._algorithms: Mapping[str, Mapping[str, str]] | None = None
        """What it can do, which stays the same as long as it runs."""
        self._turn = asyncio.Lock()
        self._looking = Together(self._look_for)
        self._came: dict[SaName, SaView] = {}
        """SAs that came in while charon is asked for all."""
        self._asked: dict[str | None, tuple[float, Mapping[str, Message]]] = {}
        """When charon was asked for the connection of that name (None: for all), and what it said."""
        self._coming: dict[SaName, tuple[SaView, asyncio.Future[None]]] = {}
        """SAs that are being installed: what is known of them, and when that is over."""

    async def look(self, context: IkeContext) -> Seen:
        """charon's state, for an SA that comes in. Errors: CharonError, WireError."""
        return await self._looking.join(context)

    async def _look_for(self, contexts: Sequence[IkeContext]) -> Sequence[Seen]:
        async with self._turn:
            self._host.hear()  # what charon has told by now counts
            changed, life = self._host.changed, self._host.listing.life
            last, now = self._last, asyncio.get_running_loop().time()
            if life != self._life:  # the SAs of a charon that has ended are in nobody's way
                last, self._life, self._algorithms = None, life, None
            if last is None or now - self._listed_at > LISTED or len(changed) > MANY:
                self._last = last = await self._look(None)
                self._listed_at = self._asked_at = now
            elif now - self._asked_at > AGE:
                self._last = last = await self._look(last.present)
                self._asked_at = now
            while self._host.gone:
                last.present.drop(self._host.gone.pop())
            # whoever installs an SA says what came of it
            while news := changed - self._coming.keys():
                changed.difference_update(news)
                try:
                    views = await asyncio.gather(*map(self._host.view, news))
                except BaseException:
                    changed.update(news)
                    raise
                for sa, view in zip(news, views, strict=True):
                    if view is None:
                        last.present.drop(sa)
                    else:
                        last.present.put(view)
            return [replace(last, connections=await self._connections(context)) for context in contexts]

    async def _connections(self, context: IkeContext) -> Mapping[str, Message]:
        """The SA's own connection, because there may be a thousand; all of them where the others matter."""
        found = await self._asked_for(context.connection)
        return await self._asked_for(None) if depends_on_others(context, found) else found

    async def _asked_for(self, name: str | None) -> Mapping[str, Message]:
        now = asyncio.get_running_loop().time()
        self._asked = {which: told for which, told in self._asked.items() if now - told[0] <= AGE}
        if name not in self._asked:
            found = await self._host.connections(None if name is None else [name])
            self._asked[name] = now, found
        return self._asked[name][1]

    @trace.spanned("look")
    async def _look(self, present: Present | None) -> Seen:
        """`present`: its SAs, None: all are listed."""
        host = self._host
        if present is None:
            self._last = None
            self._came.clear()
            host.changed.clear()
            host.gone.clear()
            present = Present(await host.views())
        if self._algorithms is None:
            self._algorithms = await host.vici.algorithms()
        seen = Seen(
            await host.version(), present, await host.vici.pools(), self._algorithms, host.listening()
        )
        if self._last is None:
            for view in (*self._came.values(), *(view for view, _ in self._coming.values())):
                present.put(view)
        return seen

    def comes(self, here: IkeContext) -> None:
        """This SA, which shares nothing with any other, is being installed, until `came_or_not`."""
        view = arriving_view(here)
        self._coming[view.spis] = view, asyncio.get_running_loop().create_future()
        if self._last is not None:
            self._last.present.put(view)

    def came_or_not(self, here: IkeContext) -> None:
        """That is over. If it came, `came` was called."""
        view, over = self._coming.pop(here.spis)
        over.set_result(None)
        if view.state == ARRIVING and self._last is not None:
            self._last.present.drop(view.spis)

    def coming(self, here: IkeContext) -> Sequence[SaName]:
        """The SAs that are being installed and may share something with this one."""
        if self._last is None or not self._coming:
            return ()
        return [view.spis for view in self._last.present.rivals(here) if view.spis in self._coming]

    async def over(self, sas: Iterable[SaName]) -> None:
        """Wait until these are installed, or undone."""
        for sa in sas:
            if sa in self._coming:
                await asyncio.shield(self._coming[sa][1])

    def came(self, view: SaView, before: Iterable[SaName] = ()) -> None:
        """This SA came in, or has another name than `before`."""
        self._host.changed.discard(view.spis)
        self._host.gone.discard(view.spis)
        if view.spis in self._coming:
            self._coming[view.spis] = view, self._coming[view.spis][1]
        if self._last is None:
            self._came[view.spis] = view
            return
        for name in before:
            self._last.present.drop(name)
        self._last.present.put(view)


def objections(
    context: IkeContext,
    here: IkeContext,
    seen: Seen,
    config: HostConfig,
    *,
    keep_address: bool,
    relayed_by: str = "",
) -> list[Verdict]:
    """All reasons against an SA whatever other SAs are here. `here`: the SA as it would be here.

    `relayed_by`: the gateway at whose address the mobile node stays.
    """
    verdicts = list(check_covered(here, seen.version))
    if not relayed_by:
        verdicts += check_address(here, context, keep_address)
    elif here.local.port != context.local.port and here.remote == context.remote:
        why = f"charon here has other UDP ports than that of {relayed_by}, which would relay it"
        verdicts.append(Verdict(Fpt.IKEV2_SA, Status.NOT_COVERED, why))
    verdicts += check_sizes(here, seen.version, config.ha_buflen)
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
