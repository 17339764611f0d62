"""`Origins`: which gateway gave an SA to this one, and the notices due to that gateway (I/O: the store).

A gateway that gave an SA away sends packets for it on to here (`away`), until it is told that the SA has
ended, has moved on, or is there again (`ikectx.wire.whereabouts`). Each origin is stored by the name that the
SA had when it was given, and has its present name here. It is kept when the SA has moved on, too: the gateway
that it went to tells us, and we tell the one before us. So no gateway need believe another one to which it
gave nothing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from ikectx.engine.ports import Store
from ikectx.errors import StoreError, reading
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from ikectx.wire.whereabouts import What, Whereabouts, spis_text
from vici_bridge.vici.views import prefixes

from .departures import Departure, News

log = logging.getLogger(__name__)

_KIND = "origin"
"""Kind of store entry, by the name that the SA had when it came, and the peer: an `Origin`. It is not
in the ledger, because it stays through other transfers."""
_VERSION = 1
_REMEMBERED = 86400.0
"""Seconds for which an SA that ended is remembered, because its mobile node may return to this gateway."""

Tell = Callable[[str, Whereabouts], None]
"""Tells the peer of that name, until it has acknowledged it. Errors: StoreError."""


class Place(StrEnum):
    """The place of the SA, as far as this gateway knows."""

    COMING = "coming"
    """The SA is being taken in."""
    HERE = "here"
    ON = "on"
    """The SA moved on from here; `now` is its name of then."""
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Origin:
    """One SA that a peer gave. `sa`, `epoch`: as in `Whereabouts`. `now`: its name here.

    `mn`: the mobile node's identity. `prefixes`: its addresses. `since`: when it came to its place, seconds
    since 1970. `relay`: the address of the peer at which the mobile node stays; empty: it came itself.
    `announced`: the mobile node was told this gateway's addresses, or cannot be.
    """

    peer: str
    sa: SaName
    epoch: int
    now: SaName
    mn: str
    prefixes: tuple[str, ...]
    since: float
    place: Place = Place.COMING
    relay: str = ""
    announced: bool = False

    @property
    def key(self) -> str:
        """Its key in the store."""
        return f"{self.sa.key} {self.peer}"

    def dumps(self) -> bytes:
        """The stored form."""
        return json.dumps(
            {
                "version": _VERSION,
                "peer": self.peer,
                "sa": self.sa.pair,
                "epoch": self.epoch,
                "now": self.now.pair,
                "mn": self.mn,
                "prefixes": self.prefixes,
                "since": self.since,
                "place": str(self.place),
                "relay": self.relay,
                "announced": self.announced,
            }
        ).encode()

    @classmethod
    def loads(cls, key: str, raw: bytes) -> Origin:
        """Read what `dumps` wrote. Errors: StoreError."""
        with reading(f"the origin {key}"):
            found: Any = json.loads(raw)
            if found["version"] != _VERSION:
                raise StoreError(f"the origin {key} is of version {found['version']}, not {_VERSION}")
            return cls(
                peer=found["peer"],
                sa=SaName.from_pair(found["sa"]),
                epoch=found["epoch"],
                now=SaName.from_pair(found["now"]),
                mn=found["mn"],
                prefixes=tuple(found["prefixes"]),
                since=found["since"],
                place=Place(found["place"]),
                relay=found.get("relay", ""),
                announced=found.get("announced", False),
            )


class Origins:
    """All origins of one gateway; those in the store are there after `load`."""

    def __init__(self, store: Store, wall: Callable[[], float] = time.time) -> None:
        self._store = store
        self._wall = wall
        self._rows: dict[str, Origin] = {}
        self.tell: Tell = lambda peer, news: None
        """Set later, by the object that can tell other gateways."""

    def load(self) -> None:
        """Read the store; a row that cannot be read is logged and left there."""
        for key, raw in self._store.items(_KIND):
            try:
                row = Origin.loads(key, raw)
            except StoreError as error:
                log.error("%s", error)
                continue
            if row.place is Place.ENDED and self._wall() - row.since > _REMEMBERED:
                self._store.delete(_KIND, key)
            else:
                self._rows[key] = row

    def came(self, context: IkeContext, peer: str, now: SaName, *, relayed: bool = False) -> None:
        """The peer gives the SA of that context; its name here is `now`, which may still change.

        `relayed`: the mobile node stays at the peer's address, which passes its packets on.
        """
        relay = str(context.remote.address) if relayed else ""
        remote = prefixes(ts for child in context.children for ts in child.remote_ts)
        mn, since = str(context.remote_id), self._wall()
        row = Origin(peer, context.spis, context.epoch + 1, now, mn, tuple(remote), since, relay=relay)
        for old in [old for old in self._rows.values() if old.place is Place.ENDED]:
            # the peer has served these addresses since, and so has forgotten that it gave the SA before
            same = (old.peer, old.mn, old.prefixes) == (peer, mn, row.prefixes)
            if same or since - old.since > _REMEMBERED:
                self._forget(old, soon=True)
        self._keep(row, soon=True)

    def serves(self, context: IkeContext, now: SaName) -> None:
        """The SA is served here from now on."""
        for row in self._of(context.spis, Place.COMING):
            self._keep(replace(row, now=now, place=Place.HERE), soon=True)

    def relayed_by(self, context: IkeContext) -> str:
        """The peer at whose address the mobile node of that SA stays; empty: none."""
        for row in self._now(context.spis, Place.HERE):
            if row.relay and row.relay == str(context.remote.address):
                return row.peer
        return ""

    def unannounced(self, seconds: float) -> list[SaName]:
        """The SAs whose mobile node has stayed for so long at another gateway's address, and was not told
        ours."""
        due = self._wall() - seconds
        there = [row for row in self._rows.values() if row.relay and row.place is Place.HERE]
        return [row.now for row in there if not row.announced and row.since <= due]

    def announced(self, sa: SaName) -> None:
        """The mobile node was told this gateway's addresses, or cannot be. Errors: StoreError."""
        for row in self._now(sa, Place.HERE):
            self._keep(replace(row, announced=True))

    def reached(self, sa: SaName, mn: str) -> None:
        """The mobile node sends from that address now: if that is not the gateway's which relays it, it has
        come itself. Errors: StoreError."""
        for row in self._now(sa, Place.HERE):
            if row.relay and row.relay != mn:
                log.info("%s has come here itself, %s need not relay it any more", row.mn, row.peer)
                self._tell(row, What.CAME)
                self._keep(replace(row, relay=""))

    def undone(self, context: IkeContext) -> None:
        """The SA did not come after all; it may have been served for a moment, until the disk was full."""
        for row in self._of(context.spis, Place.COMING, Place.HERE):
            if row.place is Place.COMING or row.epoch == context.epoch + 1:
                self._forget(row)

    def renamed(self, old: SaName, new: SaName, esp: Iterable[bytes] = ()) -> None:
        """An IKE_SA was rekeyed here, or got other SPIs in another way, or its CHILD_SAs did.

        `esp`: the SPIs under which the mobile node receives ESP that is not in UDP.
        """
        for row in self._now(old, Place.HERE):
            if old != new:
                self._keep(replace(row, now=new))
            if row.relay and (old != new or esp):
                self._tell(row, What.RENAMED, spis_text(new, esp))

    def left(self, departure: Departure) -> None:
        """The SA moved on from here; a peer that has it back needs no notice about it. The caller's step
        writes what has changed."""
        for row in self._now(departure.sa, Place.HERE, Place.ENDED):
            if row.peer == departure.peer:
                self._forget(row, soon=True)
            else:
                self._tell(row, What.MOVED, departure.peer)
                self._keep(replace(row, place=Place.ON), soon=True)

    def stays(self, sa: SaName) -> None:
        """The SA was to move on and did not. The gateway that was to get it may wait for a notice of one of
        these."""
        for row in self._now(sa, Place.HERE):
            self._tell(row, What.HERE)

    def end(self, departure: Departure) -> None:
        """The SA was ended here while it left, so the gateway that has it now must end it. Errors:
        StoreError."""
        self.tell(departure.peer, Whereabouts(departure.sa, departure.epoch, What.END))

    def ended_by(self, peer: str, sa: SaName, epoch: int) -> SaName | None:
        """The peer that gave the SA has had it ended. Returns its name here; None: it is not here."""
        found = [row for row in self._of(sa, Place.HERE) if (row.peer, row.epoch) == (peer, epoch)]
        return found[0].now if found else None

    def heard(self, departure: Departure, news: News) -> None:
        """The gateway that the SA moved on to sends news of it: pass them on to the gateways before us."""
        for row in self._now(departure.sa, Place.ON, Place.ENDED):
            if news is News.ENDS:
                self._end(row)
            elif row.peer == departure.at:
                self._forget(row)  # that gateway has it itself
            else:
                self._tell(row, What.MOVED, departure.at)
                self._keep(replace(row, place=Place.ON))

    def back(self, departure: Departure, who: str, now: SaName) -> None:
        """An SA that had moved on from here is served here again; or another mobile node has its address."""
        for row in self._now(departure.sa, Place.ON, Place.ENDED):
            if who == row.mn:
                self._tell(row, What.HERE)
                self._keep(replace(row, place=Place.HERE, now=now))
            else:
                self._end(row)

    def gone(self, sa: SaName, heir: Callable[[Origin], SaName | None]) -> None:
        """charon no longer has the SA. `heir`: an SA of the same mobile node here, for the same addresses."""
        for row in self._now(sa, Place.HERE):
            now = heir(row)
            if now is None:
                self._end(row)
            else:
                self._keep(replace(row, now=now))

    def appeared(self, sa: SaName, mn: str, covers: Callable[[tuple[str, ...]], bool]) -> None:
        """An SA came up: note it if a mobile node's SA for the same addresses had ended here."""
        for row in [row for row in self._rows.values() if row.place is Place.ENDED and row.mn == mn]:
            if covers(row.prefixes):
                self._tell(row, What.HERE)
                self._keep(replace(row, place=Place.HERE, now=sa))

    def look(
        self,
        listed: Iterable[SaName],
        departed: Iterable[SaName],
        heir: Callable[[Origin], SaName | None],
    ) -> None:
        """After the agent or charon started: compare with charon's list, and with departures from here."""
        names, on = set(listed), set(departed)
        for row in list(self._rows.values()):
            lost = (row.place is Place.HERE and row.now not in names) or (
                row.place is Place.ON and row.now not in on
            )
            now = heir(row) if lost or row.place is Place.ENDED else None
            if now is not None:
                self._tell(row, What.HERE)
                self._keep(replace(row, place=Place.HERE, now=now))
            elif lost:
                self._end(row)

    def _of(self, sa: SaName, *places: Place) -> list[Origin]:
        return [row for row in self._rows.values() if row.sa == sa and row.place in places]

    def _now(self, sa: SaName, *places: Place) -> list[Origin]:
        return [row for row in self._rows.values() if row.now == sa and row.place in places]

    def _end(self, row: Origin) -> None:
        if row.place is not Place.ENDED:
            self._tell(row, What.ENDED)  # first: a repeated notice does no harm, a lost one does
            self._keep(replace(row, place=Place.ENDED, since=self._wall()))

    def _tell(self, row: Origin, what: What, to: str = "") -> None:
        self.tell(row.peer, Whereabouts(row.sa, row.epoch, what, to))

    def _keep(self, row: Origin, *, soon: bool = False) -> None:
        self._store.put(_KIND, row.key, row.dumps(), soon=soon)
        self._rows[row.key] = row

    def _forget(self, row: Origin, *, soon: bool = False) -> None:
        self._store.delete(_KIND, row.key, soon=soon)  # first: where the disk is full it is tried again
        self._rows.pop(row.key, None)
