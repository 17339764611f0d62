"""`Known`: charon's IKE_SAs as they are known without asking for all of them. I/O.

charon takes 0.4 s to list 1,000 SAs (5.9.8), and an agent as long to read that. So all are listed once, when
charon has come, and nothing that a mobile node waits for lists them again. From then on each SA of which
charon has news (over HA, or by its event `ike-update`), or that this agent has changed, is asked for by its
unique ID: in the background after a moment, or at once by whoever must know. charon tells that number by its
events `ike-updown` and `ike-rekey` (`Listing`). If it is not known yet, or if many SAs have changed, what
charon has told of them over HA will do until all are listed in the background. All are listed again, too, if
reports of charon were lost, because nobody repeats them.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable
from typing import Protocol

from ikectx.clock import steady_wall
from ikectx.errors import IkectxError, RefusedError, UnknownSaError
from ikectx.sa.name import SaName
from vici_bridge.ha.record import Record
from vici_bridge.policy.present import Present
from vici_bridge.vici.views import ARRIVING, SaView, nameless_view, reported_view

from .deadlines import Deadlines

log = logging.getLogger(__name__)

SETTLE = 1.0
"""Seconds from news until charon is asked, because several come of one SA that is set up or rekeyed."""
FEW = 32
"""SAs that are asked for one by one, in one go; more are asked for by a list of all."""
LISTED = 5.0
"""Seconds at least from one list in the background to the next."""
REST = 10
"""So many times as long as that list took, if that is more."""
AGAIN = 10.0
"""Seconds for which a list will do where many SAs are in the way of one that comes."""
PIECE = 16
"""SAs of a list that are looked at in one go, some 1 ms."""


class CharonSide(Protocol):
    """charon, as the host of the agent knows it."""

    record: Record
    deadlines: Deadlines

    def hear(self) -> int:
        """Take what charon has reported by now. Returns how many of its reports were lost."""

    def marked(self) -> bool:
        """Whether any SA has a mark or an if_id, which charon does not tell over HA."""

    async def views(self) -> list[SaView]:
        """All SAs. Errors: CharonError, WireError."""

    async def view(self, sa: SaName, *, search: bool = True) -> SaView | None:
        """One SA; `search`: also among all, if its unique ID is not known. Errors: as `views`."""


class Known:
    """The SAs of one charon. Errors of all coroutines: CharonError, WireError."""

    def __init__(self, side: CharonSide) -> None:
        self._side = side
        self.present = Present()
        """As they were last seen; `now` brings it up to date."""
        self._news: dict[SaName, int] = {}
        """SAs that changed since they were seen, each with the count of its last change."""
        self._count = 0
        self._unsure: set[SaName] = set()
        """Those that are known by HA alone, because charon did not show them under the number guessed."""
        self._coming: dict[SaName, SaView] = {}
        """SAs that are being installed: whoever does that says what came of it."""
        self._complete = False
        """Whether all were listed since charon came, and since reports of it were lost."""
        self._lost = 0
        """How many reports had been lost at that time."""
        self.life = 0
        """How often charon has ended or come."""
        self._listed_at = -math.inf
        """When all were listed last, by the event loop's clock."""
        self._took = 0.0
        """Seconds that this list took."""
        self._turn = asyncio.Lock()
        self._touched: set[SaName] = set()
        """SAs about which something was learnt since the list that is under way was asked for."""
        self._heard = asyncio.Event()

    def heed(self, sas: Iterable[SaName]) -> None:
        """Something about these has changed."""
        for sa in sas:
            self._count += 1
            self._news[sa] = self._count
            self._heard.set()

    def forget(self) -> None:
        """charon has ended, and its SAs with it."""
        self.life += 1
        self._complete = False
        self._news.clear()
        self._unsure.clear()
        for sa in self.present.names() - self._coming.keys():
            self.present.drop(sa)

    def put(self, view: SaView, before: Iterable[SaName] = ()) -> None:
        """charon has this SA now, which has another name than `before`."""
        for sa in before:
            self.drop(sa)
        if view.spis in self._coming:
            self._coming[view.spis] = view
        self._news.pop(view.spis, None)
        self._see(view)

    def drop(self, sa: SaName) -> None:
        """charon does not have this SA any more."""
        self._news.pop(sa, None)
        self._unsure.discard(sa)
        self._touched.add(sa)
        self.present.drop(sa)

    def comes(self, view: SaView) -> None:
        """This SA is being installed, until `came_or_not`."""
        self._coming[view.spis] = view
        self.present.put(view)

    def came_or_not(self, sa: SaName) -> None:
        """That is over. If it came, `put` was called meanwhile."""
        if self._coming.pop(sa).state == ARRIVING:
            self.drop(sa)

    def settled(self, sa: SaName) -> bool:
        """Whether charon has told nothing of this SA that was not looked at since."""
        self._hear()
        return self._complete and not (sa in self._news or sa in self._unsure or sa in self._coming)

    async def now(self) -> Present:
        """All SAs, by what charon has reported until now. They are listed only if charon has just come, if
        its reports were lost, or if many have changed and there are marks or if_ids, which are unreported."""
        self._hear()
        marked = self._side.marked()
        while not self._complete or (marked and len(self._news) > FEW):
            async with self._turn:  # somebody may list them already
                if not self._complete or (marked and len(self._news) > FEW):
                    await self._list()
        await self._ask(search=marked)
        return self.present

    async def again(self, sas: Iterable[SaName]) -> None:
        """Ask for these anew, because no report tells that an SA is PASSIVE or is being deleted, nor of one
        that no agent saw come up. Of many that is done once in `AGAIN` seconds."""
        asked = [sa for sa in sas if sa not in self._coming]
        if len(asked) <= FEW:
            self.heed(asked)
            await self._ask(search=self._side.marked())
        elif asyncio.get_running_loop().time() >= self._listed_at + AGAIN:
            await self.list_all()

    async def list_all(self) -> list[SaView]:
        """All SAs, asked for after this call."""
        async with self._turn:
            return await self._list()

    def list_after(self, seconds: float) -> float:
        """When all may be listed again in the background, by the event loop's clock: so many seconds after
        the last time, or `REST` times as many as that took."""
        return self._listed_at + max(seconds, REST * self._took)

    async def watch(self) -> None:
        """Ask for what is new in the background, until cancelled."""
        while True:
            await self._heard.wait()
            await asyncio.sleep(SETTLE)
            self._heard.clear()
            try:
                await self._catch_up()
            except IkectxError as error:
                log.debug("charon's SAs cannot be asked for now: %s", error)
                asyncio.get_running_loop().call_later(SETTLE, self._heard.set)

    def _hear(self) -> None:
        lost = self._side.hear()
        if lost != self._lost:
            self._lost, self._complete = lost, False

    async def _catch_up(self) -> None:
        self._hear()
        if self._complete:
            await self._ask(search=False)
        if self._complete and not self._unsure:
            return
        loop = asyncio.get_running_loop()
        after = self.list_after(LISTED)
        if loop.time() < after:
            loop.call_at(after, self._heard.set)
        else:
            await self.list_all()

    async def _ask(self, *, search: bool) -> None:
        """Ask for what is new, if that is not too much: then what was told over HA will do."""
        news = {sa: count for sa, count in self._news.items() if sa not in self._coming}
        views: Iterable[SaView | None] = [None] * len(news)
        asked = len(news) <= FEW
        if asked:
            views = await asyncio.gather(*(self._side.view(sa, search=search) for sa in news))
        for (sa, count), view in zip(news.items(), views, strict=True):
            if self._news.get(sa) != count or sa in self._coming:
                continue  # it has changed again, or somebody has learnt more of it
            if view is not None:
                self.put(view)
            elif sa in self._side.record and not search:
                del self._news[sa]
                self._unsure.add(sa)
                self._touched.add(sa)
                self.present.put(self._reported(sa))
            elif asked:
                self.drop(sa)
            else:  # it has gone, or is one that HA does not tell of
                del self._news[sa]
                self._unsure.add(sa)

    def _reported(self, sa: SaName) -> SaView:
        """What charon has told over HA."""
        record = self._side.record
        try:
            return reported_view(record.context(sa))
        except (UnknownSaError, RefusedError):  # it is just being set up, or cannot be moved
            return nameless_view(sa, initiator=record.initiates(sa))

    async def _list(self) -> list[SaView]:
        loop = asyncio.get_running_loop()
        while True:
            began, life = loop.time(), self.life
            news, unsure = dict(self._news), set(self._unsure)
            self._touched.clear()
            views = await self._side.views()
            if life == self.life:
                break
        self._listed_at = loop.time()
        self._took = self._listed_at - began
        for number, view in enumerate(views, 1):
            if view.spis not in self._touched and view.spis not in self._coming:
                # a note for each SA, which are written here, not with what a mobile node waits for
                self._see(view, soon=number % PIECE != 0)
            if number % PIECE == 0:
                await asyncio.sleep(0)
        gone = self.present.names() - {view.spis for view in views} - self._touched - self._coming.keys()
        for sa in gone:
            self.present.drop(sa)
        for sa, count in news.items():
            if self._news.get(sa) == count:
                del self._news[sa]
        self._unsure -= unsure
        self._complete = life == self.life
        return views

    def _see(self, view: SaView, *, soon: bool = True) -> None:
        self._touched.add(view.spis)
        self._unsure.discard(view.spis)
        self.present.put(view)
        self._side.deadlines.note(view, steady_wall(), soon=soon)
