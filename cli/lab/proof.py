"""What must be the same after a transfer: SPIs and keys at the mobile node and at the gateway in charge."""

from __future__ import annotations

import os

from .hosts import Lab
from .measure import Snapshot, snapshot


class Proof:
    """Compares mn's SA after a transfer with what was noted before.

    `kept`: its SPIs must be the same; `new`: so need not be its keys.
    """

    def __init__(self, lab: Lab, *, kept: bool, new: bool) -> None:
        self._lab = lab
        self._kept, self._new = kept, new
        self._salt = os.urandom(16)
        self._before: tuple[Snapshot, Snapshot] | None = None

    @property
    def noted(self) -> bool:
        """Is there something to compare with?"""
        return self._before is not None

    def note(self, source: str) -> None:
        """Takes the SA as mn and the gateway `source` have it."""
        self._before = (self._snapshot("mn"), self._snapshot(source))

    def _snapshot(self, host: str) -> Snapshot:
        return snapshot(self._lab, host, self._salt, "mn")

    def compare(self, owner: str) -> tuple[bool, bool | None]:
        """Whether SPIs and keys are right, at mn and at the gateway `owner`, once. Keys None: not visible."""
        assert self._before is not None
        (mobile, gateway), self._before = self._before, None
        after, there = self._snapshot("mn"), self._snapshot(owner)
        if self._lab.tunnel.libipsec:
            return after.ike == there.ike and (after.ike == mobile.ike or not self._kept), None
        expected = 2 * self._lab.tunnel.children
        alive = len(after.esp) >= expected and len(there.esp) >= expected
        if self._lab.tunnel.others:  # it tells nobody the SPIs of its IKE_SA
            alive = alive and (there.ike == gateway.ike or not self._kept)
        else:
            alive = alive and after.ike == there.ike
        if not self._kept:
            told = {key for _spi, key in mobile.keys}
            same = {key for _spi, key in after.keys | there.keys} <= told
            return alive, alive and (same or self._new)
        spis = alive and after.ike == mobile.ike and after.esp <= mobile.esp and there.esp <= gateway.esp
        keys = spis and after.keys <= mobile.keys and there.keys <= gateway.keys and there.keys <= mobile.keys
        return spis, keys
