"""What a gateway does once when its store was lost or is an older copy."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import pytest

from ikectx.disk.store import SqliteStore
from ikectx.engine.ledger import Ledger, SourceFacts, TargetFacts
from ikectx.engine.tables import OSEQ_JUMP
from ikectx.errors import CharonError, KernelError
from ikectx.sa.context import ReplayState
from ikectx.sa.name import SaName
from vici_bridge import old_store
from vici_bridge.kernel.xfrm import KernelSa
from vici_bridge.old_store import mistrust
from vici_bridge.orphans import Orphans

from .test_orphans import FakeMute

FROZEN, SERVED, LET_GO, HALF = (SaName(bytes([one]) * 8, b"r" * 8) for one in b"fslh")
MN, HERE = ip_address("198.51.100.1"), ip_address("192.0.2.1")

Charon = dict[SaName, tuple[str, tuple[bytes, ...]]]
"""State and outbound SPIs of its SAs."""


@dataclass
class FakeKernel:
    """Its outbound numbers, by SPI; those of `gone` go while they are read."""

    numbers: dict[bytes, int]
    gone: set[bytes] = field(default_factory=set)

    def dump_sas(self) -> list[KernelSa]:
        ours = [KernelSa(HERE, MN, spi, 50) for spi in self.numbers]
        return [*ours, KernelSa(MN, HERE, b"in__", 50), KernelSa(HERE, MN, b"ah__", 51)]

    def is_outbound(self, sa: KernelSa) -> bool:
        return sa.destination == MN

    def get_replay(self, sa: KernelSa, *, outbound: bool) -> tuple[ReplayState, None]:
        if sa.spi in self.gone:
            raise KernelError("it has gone")
        return ReplayState(seq=self.numbers[sa.spi]), None

    def set_replay(self, sa: KernelSa, state: ReplayState, *, outbound: bool) -> None:
        self.numbers[sa.spi] = state.seq


class Host:
    """The parts of a `CharonHost` that it needs. `charon` None: charon is away."""

    def __init__(self, kernel: FakeKernel | None, charon: Charon | None, muted: set[SaName]) -> None:
        store = SqliteStore(":memory:", bytes(32))
        self.kernel = kernel
        self.mute = FakeMute(sorted(muted))
        self.leaving: Ledger[SourceFacts] = Ledger(store, "source")
        self.coming: Ledger[TargetFacts] = Ledger(store, "target")
        self.orphans = Orphans(self.mute, self.leaving, lambda sa: False)  # type: ignore[arg-type]
        self._charon = charon
        self.refusals = 0
        """How often charon does not answer first."""

    async def views(self) -> list[Any]:
        self.refusals -= 1
        if self._charon is None or self.refusals >= 0:
            raise CharonError("charon is away")
        return [
            SimpleNamespace(spis=sa, state=state, children=[SimpleNamespace(spi_out=spi) for spi in spis])
            for sa, (state, spis) in self._charon.items()
        ]

    def mistrust(self, *let_go: SaName) -> None:
        asyncio.run(mistrust(self, let_go))  # type: ignore[arg-type]


def test_outbound_numbers_go_past_what_others_may_have_sent() -> None:
    """But not those of an SA that is only prepared here."""
    kernel = FakeKernel({b"one_": 300, b"two_": (1 << 32) - 5, b"gone": 7, b"prep": 9}, {b"gone"})
    charon: Charon = {SERVED: ("ESTABLISHED", (b"one_", b"two_", b"gone")), HALF: ("PASSIVE", (b"prep",))}
    Host(kernel, charon, set()).mistrust()
    assert kernel.numbers == {b"one_": 300 + 2 * OSEQ_JUMP, b"two_": (1 << 32) - 1, b"gone": 7, b"prep": 9}


def test_charon_is_asked_again_if_it_could_not_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(old_store, "PAUSES", (0.0, 0.0, 0.0))
    kernel = FakeKernel({b"one_": 300, b"prep": 9})
    host = Host(kernel, {SERVED: ("ESTABLISHED", (b"one_",)), HALF: ("PASSIVE", (b"prep",))}, set())
    host.refusals = 2
    host.mistrust()
    assert kernel.numbers == {b"one_": 300 + 2 * OSEQ_JUMP, b"prep": 9}


def test_steps_that_may_be_over_are_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    charon: Charon = {sa: ("ESTABLISHED", ()) for sa in (FROZEN, SERVED, LET_GO)}
    charon[HALF] = ("PASSIVE", ())
    host = Host(None, charon, {FROZEN, LET_GO})
    for sa in (FROZEN, SERVED, LET_GO):
        host.leaving.note(sa, request=7)
    for sa in (SERVED, HALF):
        host.coming.note(sa, stage="active")
    host.mistrust(LET_GO)
    assert [row.sa for row in host.leaving.all()] == [LET_GO]
    assert [row.sa for row in host.coming.all()] == [HALF]
    # it was frozen in a step of which the copy tells; it may have been let go since, so an operator decides
    assert host.orphans.known == {FROZEN} and "ikectx resolve" in caplog.text


def test_a_charon_that_is_away_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(old_store, "PAUSES", (0.0,))
    kernel = FakeKernel({b"one_": 300})
    host = Host(kernel, None, {FROZEN})
    host.coming.note(SERVED, stage="active")
    host.mistrust()
    assert len(host.coming) == 1 and not host.orphans.known
    assert kernel.numbers == {b"one_": 300 + 2 * OSEQ_JUMP}, "which of them it serves could not be asked"
