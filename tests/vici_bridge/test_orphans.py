"""SAs that are mute though no row of the store says why."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from ikectx.disk.store import SqliteStore
from ikectx.engine.ledger import Ledger, SourceFacts
from ikectx.errors import RefusedError
from ikectx.numbers import Status
from ikectx.sa.name import SaName
from vici_bridge.effects.evidence import drop_orphan
from vici_bridge.kernel.mute import Muted
from vici_bridge.orphans import Orphans

ONE, TWO = SaName(b"i" * 8, b"r" * 8), SaName(b"j" * 8, b"s" * 8)


@dataclass
class FakeMute:
    muted: list[SaName] = field(default_factory=list)
    answering: set[SaName] = field(default_factory=set)

    def half_muted(self) -> set[SaName]:
        return set(self.answering)

    def listing(self) -> list[Muted]:
        return [Muted(sa, direction, 0) for sa in self.muted for direction in ("in", "out")]

    def unmute(self, sa: SaName) -> None:
        if sa in self.answering:
            self.answering.remove(sa)
        else:
            self.muted.remove(sa)


def test_what_is_mute_without_a_reason_is_found_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    leaving: Ledger[SourceFacts] = Ledger(SqliteStore(":memory:", bytes(32)), "source")
    mute = FakeMute([ONE, TWO])
    importing: set[SaName] = set()
    orphans = Orphans(mute, leaving, importing.__contains__)  # type: ignore[arg-type]
    importing.add(TWO)
    asyncio.run(orphans.sweep({ONE, TWO}))
    assert orphans.known == {ONE} and str(ONE) in caplog.text
    with pytest.raises(RefusedError) as caught:
        orphans.check(ONE)
    assert caught.value.status is Status.IN_DOUBT and f"ikectx resolve {ONE}" in caught.value.hint
    orphans.check(TWO)
    # charon has lost it: it is mute no more
    asyncio.run(orphans.sweep({TWO}))
    assert orphans.known == set() and mute.muted == [TWO]
    # one that this agent froze
    importing.clear()
    leaving.note(TWO, request=7)
    asyncio.run(orphans.sweep({TWO}))
    assert orphans.known == set() and mute.muted == [TWO]


def test_one_whose_mobile_node_nobody_calls_back_speaks_again() -> None:
    leaving: Ledger[SourceFacts] = Ledger(SqliteStore(":memory:", bytes(32)), "source")
    mute = FakeMute(answering={ONE, TWO})
    orphans = Orphans(mute, leaving, lambda _: False)  # type: ignore[arg-type]
    leaving.note(ONE, request=7)
    asyncio.run(orphans.sweep({ONE, TWO}))
    assert mute.answering == {ONE}
    asyncio.run(orphans.sweep({TWO}))  # charon has given it up
    assert mute.answering == set()


def test_one_that_charon_has_lost_meanwhile_can_be_given_up() -> None:
    async def view(sa: SaName) -> None:
        return None

    mute = FakeMute([ONE])
    host: Any = SimpleNamespace(orphans=SimpleNamespace(known={ONE}), view=view, mute=mute)
    asyncio.run(drop_orphan(host, ONE))
    assert host.orphans.known == set() and mute.muted == []


def test_an_sa_that_is_thawed_meanwhile_is_none(caplog: pytest.LogCaptureFixture) -> None:
    class Thawing(FakeMute):
        def listing(self) -> list[Muted]:
            found = super().listing()
            self.muted.clear()
            return found

    leaving: Ledger[SourceFacts] = Ledger(SqliteStore(":memory:", bytes(32)), "source")
    orphans = Orphans(Thawing([ONE]), leaving, lambda sa: False)  # type: ignore[arg-type]
    asyncio.run(orphans.sweep({ONE}))
    orphans.check(ONE)
    assert caplog.text == ""
