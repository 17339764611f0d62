"""Lifetimes that charon does not know, because it started its timers anew although the SA is older.

charon starts rekey and reauth timers from the connection's settings whenever an IKE_SA goes from PASSIVE to
ESTABLISHED (also for every other SA of the segment, at each activation). A deadline here is the earlier one
from before; when it is due, the agent asks charon to rekey. Times are seconds since 1970 by
`ikectx.clock.steady_wall`, which nobody sets while the agent runs. An agent that starts takes the earlier of
two times: that, and the one by the clock that counts since the machine was started.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace

from ikectx.clock import steady_wall, this_start, uptime
from ikectx.engine.ports import Store
from ikectx.errors import StoreError, reading
from ikectx.sa.name import SaName
from vici_bridge.vici.views import ChildView, SaView

log = logging.getLogger(__name__)

_KIND = "deadline"
"""Kind of store entry, by IKE_SA and CHILD_SA: a `Deadline`. It is not in the ledger, because it counts
when the transfer is over."""
MARGIN = 10.0
"""A deadline is not kept if it is less than so many seconds earlier than charon's own timer."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """Ask for a rekey at `due` (steady wall clock, seconds). `child`: inbound SPI in hex, empty: the IKE_SA.

    `up`: the same in seconds since that start of the machine which `start` names.
    """

    spis: str
    child: str
    due: float
    start: str = ""
    up: float = 0.0

    @property
    def key(self) -> str:
        """The key of its entry in the store."""
        return f"{self.spis}/{self.child}"


class Deadlines:
    """All deadlines, durable in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._entries: dict[str, Deadline] = {}
        self._next: float | None = None
        """The earliest one's `due`, if that is known: it is asked for many times while an SA moves."""
        self._seen: set[SaName] = set()
        """SAs whose timers were noted. Later toggles start them anew, so that they tell nothing more."""
        for key, value in store.items(_KIND):
            try:
                with reading("a deadline"):
                    self._entries[key] = _earlier(Deadline(**json.loads(value)))
            except StoreError:
                store.delete(_KIND, key)

    def keep(self, spis: SaName, child: bytes | None, due: float, *, soon: bool = True) -> None:
        """Note a deadline; the earlier of two stays."""
        up = uptime() + due - steady_wall()
        entry = Deadline(spis.key, child.hex() if child else "", due, this_start(), up)
        key = entry.key
        known = self._entries.get(key)
        if known is None or entry.due < known.due - 1:  # charon tells whole seconds
            self._entries[key] = entry
            if self._next is not None:
                self._next = min(self._next, entry.due)
            # with what is journaled next: most are noted while an SA is activated
            self._store.put(_KIND, key, json.dumps(asdict(entry)).encode(), soon=soon)

    def note(self, view: SaView, wall: float, *, soon: bool = True) -> None:
        """Keep the IKE_SA's own timer as a deadline when it is first seen active, because the next activation
        starts it anew. `soon`: see `Store.put`. Errors: StoreError, unless `soon`."""
        if view.state not in ("ESTABLISHED", "REKEYING") or view.spis in self._seen:
            return
        self._seen.add(view.spis)
        left = [seconds for seconds in (view.rekey, view.reauth) if seconds is not None]
        if left:
            self.keep(view.spis, None, wall + min(left), soon=soon)

    def missed(self, view: SaView, wall: float) -> None:
        """The SA is active again: CHILD_SAs whose time came meanwhile are due now, because charon forgets a
        rekey of an IKE_SA that is passive (`rekey_child_sa` in ike_sa.c, strongSwan 5.9.8)."""
        for child in view.children:
            if _overdue(child):
                self.keep(view.spis, child.spi_in, wall)

    def gone(self, sa: SaName) -> None:
        """charon no longer has the SA."""
        self._seen.discard(sa)

    def renamed(self, old: SaName, new: SaName) -> None:
        """The IKE_SA was rekeyed: its CHILD_SAs go on under the new name, with what is left of their time."""
        for entry in [one for one in self._entries.values() if one.spis == old.key and one.child]:
            moved = replace(entry, spis=new.key)
            del self._entries[entry.key]
            self._entries[moved.key] = moved
            self._store.put(_KIND, moved.key, json.dumps(asdict(moved)).encode(), soon=True)
            self._store.delete(_KIND, entry.key, soon=True)

    def due(self, wall: float) -> list[Deadline]:
        """Those that are due. Each stays due until `asked` or `later` is called for it, or `settle` drops
        it."""
        return [entry for entry in self._entries.values() if entry.due <= wall]

    def settle(self, entry: Deadline, view: SaView | None, wall: float) -> bool:
        """Whether charon is to be asked for that rekey: not if the SA is gone, or charon rekeys it early
        enough itself. Then the deadline is dropped. `view`: the SA, None: charon does not have it."""
        timers: list[int | None] = []
        there = view is not None and not entry.child
        if view is not None and not entry.child:
            timers = [view.rekey, view.reauth]
        elif view is not None:
            found = [child for child in view.children if child.spi_in.hex() == entry.child]
            timers = [child.rekey for child in found if not _overdue(child)]
            there = bool(found)
        own = [seconds for seconds in timers if seconds is not None]
        if not there or (own and wall + min(own) <= entry.due + MARGIN):
            self._drop(entry.key)
            return False
        return True

    def asked(self, entry: Deadline) -> None:
        """charon has been asked for that rekey. Errors: StoreError; it is not asked again by this agent."""
        self._drop(entry.key)

    def later(self, entry: Deadline, wall: float) -> None:
        """charon could not be asked for that rekey: it is due again at `wall`."""
        self._entries[entry.key] = replace(entry, due=wall)
        self._next = None

    def next_due(self) -> float | None:
        """The time of the earliest deadline."""
        if self._next is None:
            self._next = min((entry.due for entry in self._entries.values()), default=None)
        return self._next

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None and entry.due == self._next:
            self._next = None
        self._store.delete(_KIND, key)


def _overdue(child: ChildView) -> bool:
    """Whether its rekey should have begun by charon's own timer, and has not."""
    return child.state == "INSTALLED" and child.rekey is not None and child.rekey <= 0


def _earlier(entry: Deadline) -> Deadline:
    """The entry of an earlier agent, at the earlier of its two times: the wall clock may have been set."""
    due = steady_wall() + entry.up - uptime()
    same = entry.start and entry.start == this_start()
    return replace(entry, due=due) if same and due < entry.due - 1 else entry
