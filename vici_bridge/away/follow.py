"""`Follow`: passes events of SAs here, and other gateways' notices about theirs, to `away` and `origins`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from ipaddress import ip_network

from ikectx.errors import KernelError, RefusedError, StoreError, UnknownSaError
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from ikectx.wire.whereabouts import What, Whereabouts, spis_in
from vici_bridge.ha.record import ChildAdded, Deleted, Record, RecordChange, Rekeyed, Updated
from vici_bridge.vici.views import SaView

from .absences import Away
from .departures import News, Stage, within
from .origins import Origin, Origins
from .pairs import pairs_in, pairs_of
from .passing import plain_spis

log = logging.getLogger(__name__)

_NEWS = {What.HERE: News.HERE, What.MOVED: News.MOVED, What.ENDED: News.ENDS}


class Follow:
    """For one gateway. `importing`: whether that SA is being taken in. `end`: makes charon delete one."""

    def __init__(
        self,
        away: Away,
        origins: Origins,
        record: Record,
        importing: Callable[[SaName], bool],
        end: Callable[[SaName], None] = lambda sa: None,
    ) -> None:
        self._away = away
        self._origins = origins
        self._record = record
        self._importing = importing
        self._end = end

    def hear(self, peer: str, news: Whereabouts) -> None:
        """Take in a peer's notice about an SA that was given to it. Errors: KernelError, StoreError."""
        if news.what == What.END:
            name = self._origins.ended_by(peer, news.sa, news.epoch)
            if name is not None:
                self._end(name)
            return
        if news.what == What.RENAMED:
            self._away.renamed(peer, news.sa, news.epoch, *spis_in(news.to))
            return
        if news.what == What.CAME:
            self._away.came(peer, news.sa, news.epoch)
            return
        if news.what == What.READY:
            self._away.ready(peer, news.sa, news.epoch)
            return
        kind = _NEWS[news.what]
        departure = self._away.hear(peer, news.sa, news.epoch, kind, news.to)
        if departure is not None:
            self._origins.heard(departure, kind)

    def serves(self, sa: SaName, context: IkeContext) -> None:
        """This gateway serves `context` under that name: its addresses are here. Errors: as `hear`."""
        who = str(context.remote_id)
        for departure in self._away.serves(sa, who, pairs_of(context)):
            self._origins.back(departure, who, sa)

    def heed(self, change: RecordChange) -> None:
        """Take in charon's report of a change. Raises nothing."""
        match change:
            case ChildAdded(name) | Updated(name):
                self._try(lambda: self._came_up(name))
                if isinstance(change, ChildAdded):
                    self._renamed(name, name)
            case Rekeyed(old, new):
                self._renamed(old, new)
            case Deleted(name):
                self._try(lambda: self._origins.gone(name, self._heir))

    def moves(self, sa: SaName, mn: str) -> None:
        """charon reports that the mobile node of that SA is at the address `mn` now. Raises nothing."""
        self._try(lambda: self._origins.reached(sa, mn))

    def _renamed(self, old: SaName, new: SaName) -> None:
        """The SA has other SPIs, of its own or of its CHILD_SAs."""
        esp: tuple[bytes, ...] = ()
        with contextlib.suppress(UnknownSaError, RefusedError):
            esp = () if self._importing(new) else plain_spis(self._record.context(new))
        self._try(lambda: self._origins.renamed(old, new, esp))

    def look(self, views: Sequence[SaView]) -> None:
        """Take in charon's list after a start of charon or of the agent. Raises nothing.

        Addresses may have come into use here, or SAs may have ended, while no agent ran; and strongSwan's
        starter flushes the SPD when it starts charon.
        """
        self._try(lambda: self._look(views))

    def _look(self, views: Sequence[SaView]) -> None:
        away = self._let_go()
        for view in views if self._away.listing() else ():
            if view.state == "ESTABLISHED" and view.spis not in away and not self._importing(view.spis):
                for departure in self._away.serves(view.spis, view.remote_id, pairs_in(view)):
                    self._origins.back(departure, view.remote_id, view.spis)
        self._away.restore()
        departed = [departure.sa for departure in self._away.listing()]
        self._origins.look([view.spis for view in views], departed, self._heir)

    def _let_go(self) -> set[SaName]:
        """SAs that have left: charon may have them for a moment yet, or had them when it was asked."""
        return {departure.sa for departure in self._away.listing() if departure.stage is Stage.AWAY}

    def _came_up(self, name: SaName) -> None:
        """A CHILD_SA came up: end departures and blocks of its addresses."""
        if not self._importing(name) and name not in self._let_go():
            context = self._record.context(name)
            self.serves(name, context)
            self._origins.appeared(name, str(context.remote_id), lambda wanted: _covers(context, wanted))

    def _heir(self, origin: Origin) -> SaName | None:
        """An SA of the same mobile node here, for the addresses of one that was given to us."""
        for name in self._record.of(origin.mn):
            with contextlib.suppress(UnknownSaError, RefusedError):
                if not self._importing(name) and _covers(self._record.context(name), origin.prefixes):
                    return name
        return None

    @staticmethod
    def _try(work: Callable[[], None]) -> None:
        try:
            work()
        except (UnknownSaError, RefusedError):
            pass  # reported in part only; or it cannot be moved, and is listed at the next start
        except (KernelError, StoreError) as error:
            log.error("packets for a mobile node may go to where it is no more: %s", error)


def _covers(context: IkeContext, wanted: Sequence[str]) -> bool:
    """Whether all these prefixes are the mobile node's end of some CHILD_SA."""
    theirs = [network for _, remote in pairs_of(context) for network in remote]
    return all(any(within(ip_network(prefix), network) for network in theirs) for prefix in wanted)
