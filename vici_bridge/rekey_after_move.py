"""Fresh keys for SAs that have come here: an IKE_SA rekey, then one of each CHILD_SA; or the CHILD_SAs alone.

The gateway that served an SA before can derive all its keys. The rekey of an IKE_SA always has a key exchange
of its own (RFC 7296, 1.3.2), that of a CHILD_SA only if its proposal has one. So the IKE_SA is rekeyed first,
and its children get keys from an SK_d that the gateway before has never had. If the children alone are
wanted, a child whose rekey had no key exchange has the IKE_SA rekeyed as well. charon does the rekeys when
the agent asks for them, and makes the new SA before it deletes the old one. A rekey may collide with another
exchange and fail, so it is asked for until it has happened.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

from ikectx.engine.ports import Store
from ikectx.errors import StoreError, reading
from ikectx.sa.name import SaName
from vici_bridge.vici.views import ChildView, SaView

log = logging.getLogger(__name__)

_KIND = "fresh"
"""Kind of store entry, by IKE_SA: what of it is to be rekeyed. It is not in the ledger, because that
begins when the transfer is over."""
AGAIN = 5.0
"""Seconds until a rekey that has not happened is asked for again."""
TRIES = 20

RekeyAfter = Literal["no", "child", "ike"]
"""What is rekeyed after an SA came here: nothing, its CHILD_SAs, or the IKE_SA and then its CHILD_SAs."""

Ask = tuple[Literal["ike", "child"], int]
"""The SA that charon is to rekey, by its unique ID."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """`spis`: of the IKE_SA as it came, in hex; `children`: their inbound SPIs. `alone`: the IKE_SA need not
    be rekeyed.

    `step`: what was asked for last, at `asked` (wall clock, seconds).
    """

    spis: str
    children: tuple[str, ...]
    step: str = ""
    asked: float = 0.0
    tries: int = 0
    alone: bool = False

    def again(self, step: str) -> float:
        """When that may be asked for: the first time at once."""
        return self.asked + AGAIN if step == self.step else 0.0


class FreshKeys:
    """The SAs whose keys another gateway knows, durable in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wanted: dict[str, _Wanted] = {}
        for key, value in store.items(_KIND):
            try:
                with reading("a rekey that is due"):
                    read = json.loads(value)
                    self._wanted[key] = _Wanted(**{**read, "children": tuple(read["children"])})
            except StoreError:
                store.delete(_KIND, key)

    def __len__(self) -> int:
        return len(self._wanted)

    def want(self, spis: SaName, children: Iterable[bytes], what: RekeyAfter = "ike") -> None:
        """Ask for keys of its own for this IKE_SA and its CHILD_SAs (inbound SPIs)."""
        if what != "no":
            self._keep(_Wanted(spis.key, tuple(spi.hex() for spi in children), alone=what == "child"))

    def due(self, views: Iterable[SaView], wall: float) -> list[Ask]:
        """The rekeys to ask charon for now; SAs that are rekeyed or gone are forgotten."""
        named: dict[str, SaView] = {}
        with_child: dict[str, SaView] = {}
        for view in views:
            named[view.spis.key] = view
            with_child.update((child.spi_in.hex(), view) for child in view.children)
        asks: list[Ask] = []
        for noted in list(self._wanted.values()):
            wanted = noted
            rekeyed = (with_child[child] for child in wanted.children if child in with_child)
            found = named.get(wanted.spis) or next(rekeyed, None)
            if found is None:
                self._forget(wanted)
                continue
            view = found
            left: list[Ask] = [("child", child.unique_id) for child in _left(view, wanted)]
            if wanted.alone and not left and not _exchanged(view):
                log.info(
                    "%s: its CHILD_SAs have no key exchange of their own, so it is rekeyed, too", view.name
                )
                wanted = replace(wanted, alone=False)
            if view.spis.key == wanted.spis and not wanted.alone:
                left = [("ike", view.unique_id)]
                # children that were rekeyed before the IKE_SA have keys from the old SK_d
                wanted = replace(wanted, children=_installed(view) or wanted.children)
                self._keep(wanted)
            if not left:
                log.info("%s has keys that only this gateway and its mobile node know", view.name)
                self._forget(wanted)
            elif wanted.tries >= TRIES:
                log.error("%s could not be rekeyed: the gateway it came from knows its keys", view.name)
                self._forget(wanted)
            elif view.state == "ESTABLISHED" and not view.tasks and wall >= wanted.again(left[0][0]):
                asks += left
                self._keep(replace(wanted, step=left[0][0], asked=wall, tries=wanted.tries + 1))
        return asks

    def _keep(self, wanted: _Wanted) -> None:
        if self._wanted.get(wanted.spis) == wanted:
            return
        self._wanted[wanted.spis] = wanted
        self._store.put(_KIND, wanted.spis, json.dumps(asdict(wanted)).encode())

    def _forget(self, wanted: _Wanted) -> None:
        self._wanted.pop(wanted.spis, None)
        self._store.delete(_KIND, wanted.spis)


def _installed(view: SaView) -> tuple[str, ...]:
    return tuple(child.spi_in.hex() for child in view.children if child.state == "INSTALLED")


def _exchanged(view: SaView) -> bool:
    """Whether the keys of each child that is in use had a key exchange."""
    return all(child.key_exchange for child in view.children if child.state == "INSTALLED")


def _left(view: SaView, wanted: _Wanted) -> list[ChildView]:
    """The children as they came. One that was rekeyed is listed for some more seconds, in another state."""
    return [
        child for child in view.children if child.spi_in.hex() in set(wanted.children) & set(_installed(view))
    ]
