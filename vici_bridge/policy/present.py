"""charon's SAs as they were last seen, by the things that an SA which comes may not share with them. Pure.

A gateway that takes in a thousand SAs checks each of them against all others. So they are kept by name, SPI,
virtual IP and selector, and an SA is compared with the few that have something in common with it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence, Set

from ikectx.errors import WireError
from ikectx.sa.context import Address, IkeContext
from ikectx.sa.name import SaName
from vici_bridge.vici.views import SaView, address_range, prefixes

from .new_names import Taken, own_spi

_Key = tuple[str, Hashable]
_WIDE: _Key = ("wide", None)
"""SAs with a remote selector of several addresses, which may overlap any other one."""


class Present:
    """The SAs of one charon. Each has its last view."""

    def __init__(self, views: Iterable[SaView] = ()) -> None:
        self._views: dict[SaName, SaView] = {}
        self._keys: dict[SaName, frozenset[_Key]] = {}
        self._having: dict[_Key, set[SaName]] = {}
        for view in views:
            self.put(view)

    @property
    def views(self) -> Sequence[SaView]:
        """All of them."""
        return list(self._views.values())

    def names(self) -> Set[SaName]:
        """The names of all of them."""
        return self._views.keys()

    def put(self, view: SaView) -> None:
        """charon has this SA, in place of what was seen of it before."""
        name, keys = view.spis, frozenset(_keys(view))
        if self._keys.get(name) != keys:  # mostly an SA is seen again with the same
            self.drop(name)
            self._keys[name] = keys
            for key in keys:
                self._having.setdefault(key, set()).add(name)
        self._views[name] = view

    def drop(self, sa: SaName) -> None:
        """charon does not have this SA; it need not be known."""
        self._views.pop(sa, None)
        for key in self._keys.pop(sa, ()):
            names = self._having[key]
            names.discard(sa)
            if not names:
                del self._having[key]

    def taken(self, here: IkeContext | None = None) -> Taken:
        """The names in use, None: all of them; else those that `here` has as well. Names of AH are separate
        from those of ESP. `here`: the context with this gateway's address."""
        if here is None:
            keys: Iterable[_Key] = self._having
            pairs = frozenset(self._views)
        else:
            keys = [key for key in _names(here) if key in self._having]
            pairs = frozenset({here.spis} & self._views.keys())
        found = list(keys)
        return Taken(
            frozenset(name for kind, name in found if kind == "esp"),  # type: ignore[misc]
            frozenset(spi for kind, spi in found if kind == "ike"),  # type: ignore[misc]
            pairs,
        )

    def same_identity(self, here: IkeContext) -> list[SaView]:
        """The SAs of the same connection between the same two identities, without this one."""
        names = self._having.get(_who_comes(here), set()) - {here.spis}
        return [self._views[name] for name in sorted(names)]

    def at(self, mn: Address) -> list[SaView]:
        """The SAs whose mobile node has this outer address."""
        return [self._views[name] for name in sorted(self._having.get(("at", mn), set()))]

    def rivals(self, here: IkeContext) -> list[SaView]:
        """The SAs that may share something with this one; not all of them do."""
        children = [text for child in here.children for text in prefixes(child.remote_ts)]
        hosts = [_remote(text) for text in children]
        if _WIDE in hosts:
            return list(self.views)
        names = {here.spis}
        for key in (*_names(here), *hosts, *(("vip", vip) for vip in here.remote_vips), _WIDE):
            names |= self._having.get(key, set())
        return [self._views[name] for name in sorted(names) if name in self._views]


def _names(here: IkeContext) -> Iterator[_Key]:
    yield "ike", own_spi(here.current)
    for child in here.children:
        yield "esp", (here.local.address, child.spi_in)
        yield "esp", (here.remote.address, child.spi_out)


def _who_comes(here: IkeContext) -> _Key:
    return "who", (here.connection, str(here.local_id), str(here.remote_eap_id or here.remote_id))


def _keys(view: SaView) -> Iterator[_Key]:
    yield "who", (view.name, view.local_id, view.remote_eap_id or view.remote_id)
    yield "at", view.remote.address
    yield "ike", view.spi_i if view.initiator else view.spi_r
    for vip in view.remote_vips:
        yield "vip", vip
    for child in view.children:
        if child.protocol != "AH":
            yield "esp", (view.local.address, child.spi_in)
            yield "esp", (view.remote.address, child.spi_out)
        for text in child.remote_ts:
            yield _remote(text)


def _remote(text: str) -> _Key:
    try:
        version, low, high = address_range(text)
    except WireError:  # whoever compares it will say so
        return _WIDE
    return ("remote", (version, low)) if low == high else _WIDE
