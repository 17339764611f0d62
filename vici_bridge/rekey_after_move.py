"""Fresh keys for SAs that have come here: an IKE_SA rekey, then one of each CHILD_SA.

The gateway that served an SA before can derive all its keys. The rekey of an IKE_SA always has a key exchange
of its own (RFC 7296, 1.3.2), that of a CHILD_SA only if its proposal has one. So the IKE_SA is rekeyed first,
and its children get keys from an SK_d that the gateway before has never had. charon does the rekeys when the
agent asks for them. A rekey may collide with another exchange and fail, so it is asked for until it has
happened.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

from ikectx.engine.ports import Store
from ikectx.sa.name import SaName
from vici_bridge.vici.views import ChildView, SaView

log = logging.getLogger(__name__)

_KIND = "fresh"
AGAIN = 5.0
"""Seconds until a rekey that has not happened is asked for again."""
TRIES = 20

Ask = tuple[Literal["ike", "child"], int]
"""The SA that charon is to rekey, by its unique ID."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """`spis`: of the IKE_SA as it came, in hex; `children`: their inbound SPIs.

    `step`: what was asked for last, at `asked` (wall clock, seconds).
    """

    spis: str
    children: tuple[str, ...]
    step: str = ""
    asked: float = 0.0
    tries: int = 0

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
                read = json.loads(value)
                self._wanted[key] = _Wanted(**{**read, "children": tuple(read["children"])})
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                store.delete(_KIND, key)

    def __len__(self) -> int:
        return len(self._wanted)

    def want(self, spis: SaName, children: Iterable[bytes]) -> None:
        """Ask for keys of its own for this IKE_SA and its CHILD_SAs (inbound SPIs)."""
        self._keep(_Wanted(spis.key, tuple(spi.hex() for spi in children)))

    def due(self, views: Iterable[SaView], wall: float) -> list[Ask]:
        """The rekeys to ask charon for now; SAs that are rekeyed or gone are forgotten."""
        views = list(views)
        asks: list[Ask] = []
        for noted in list(self._wanted.values()):
            wanted = noted
            view = next((view for view in views if _is(view, wanted)), None)
            if view is None:
                self._forget(wanted)
                continue
            if view.spis.key == wanted.spis:
                left: list[Ask] = [("ike", view.unique_id)]
                # children that were rekeyed before the IKE_SA have keys from the old SK_d
                wanted = replace(wanted, children=_installed(view) or wanted.children)
                self._keep(wanted)
            else:
                left = [("child", child.unique_id) for child in _left(view, wanted)]
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


def _left(view: SaView, wanted: _Wanted) -> list[ChildView]:
    """The children as they came. One that was rekeyed is listed for some more seconds, in another state."""
    return [
        child for child in view.children if child.spi_in.hex() in set(wanted.children) & set(_installed(view))
    ]


def _is(view: SaView, wanted: _Wanted) -> bool:
    children = {child.spi_in.hex() for child in view.children}
    return view.spis.key == wanted.spis or not children.isdisjoint(wanted.children)
