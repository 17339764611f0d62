"""Agents that die and come back with no store, or with an old copy of it, by seed: never two owners of an SA.

`python -m tests.engine_seeds --world lost-stores --seeds 10000` tries more.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

from ikectx.engine import transfers
from ikectx.engine.arrivals import Arrivals
from ikectx.engine.new_gateway import Incoming
from ikectx.engine.old_gateway import Outgoing
from ikectx.engine.requests import Request
from ikectx.engine.unknown_transfers import UnknownTransfers
from tests.engine_seeds import some, tried
from tests.forgetful_world import Forgetful

SEEDS = 240
PARTS = 4
DENIED = (1253, 1654)
"""Seeds in which a gateway is asked for an SA that it had before its store was lost."""

ENDLESS = (6551, 7352)
"""An SA has gone, of which an old copy says that it was offered: its numbers were raised again and again."""
TOLD = 10194
"""A mobile node was refused, and a transfer of the operator's brings its SA all the same."""
UNHEARD = (79387, 81408)
"""How the SA stands cannot be asked for a moment: it was taken back as an old copy said, or cleared away."""
TAKEN = (13552, 24448)
"""An old copy says that an SA left which is coming back: it is cleared away, and taken back where it was."""
BUSY = 22383
"""One in which a gateway asks for the SA again, and is sent it by a transfer from before the loss."""
SENT = 39355
"""The same, after the gateway had served the SA in that transfer and undone it."""
COPIED = 304183
"""An old copy says that an SA was let go to a gateway that refuses it, and another one has it since."""
GONE = 16487
"""A mobile node hears no answer for so long that its SA has moved on when it asks again."""
THAWED = 630
"""One in which the copy is from the middle of a freeze."""


@pytest.fixture
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gateway says that it is ready, as when the rarest seeds were found: each further message shifts what
    comes after it, and one seed in 300,000 would have to be looked for anew."""
    monkeypatch.setattr(Incoming, "_say_ready", lambda *_: None)


def never(*_: object) -> Generator[None, None, bool]:
    yield from ()
    return False


@pytest.mark.parametrize("part", range(PARTS))
def test_no_store_makes_two_owners_and_every_run_ends(part: int) -> None:
    count = SEEDS // PARTS
    assert some(part * count, count, "lost-stores") == {}


def test_stores_are_lost_and_somebody_has_to_decide() -> None:
    """The seeds are worth something only if that comes up."""
    forgot = decided = 0
    for seed in range(40):
        world = Forgetful(seed)
        world.run()
        forgot += world.forgot
        decided += world.decided
    assert forgot > 5
    assert decided


@pytest.mark.parametrize("seed", DENIED)
def test_what_a_lost_store_may_have_had_is_not_denied(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(seed, "lost-stores") == ""
    monkeypatch.setattr(UnknownTransfers, "_may_be_lost", never)
    assert tried(seed, "lost-stores")


def test_an_sa_that_is_on_its_way_out_is_not_denied() -> None:
    assert tried(BUSY, "lost-stores") == ""


@pytest.mark.parametrize("seed", ENDLESS)
def test_an_offered_sa_that_has_gone_is_let_be(seed: int) -> None:
    assert tried(seed, "lost-stores") == ""


@pytest.mark.usefixtures("unsaid")
def test_nobody_is_refused_what_another_transfer_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(TOLD, "lost-stores") == ""
    monkeypatch.setattr(Arrivals, "_came_otherwise", never)
    assert "owns it: True" in tried(TOLD, "lost-stores")


def test_nobody_is_told_again_that_an_sa_is_here_which_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(GONE, "lost-stores") == ""
    monkeypatch.setattr(Arrivals, "_has_left", never)
    assert "told OK by b, which owns it: False" in tried(GONE, "lost-stores")


@pytest.mark.parametrize("seed", UNHEARD)
def test_an_old_copy_is_not_believed_before_charon_could_be_asked(seed: int) -> None:
    assert tried(seed, "lost-stores") == ""


@pytest.mark.parametrize("seed", TAKEN)
def test_what_an_old_copy_has_let_go_is_cleared_away(seed: int) -> None:
    assert tried(seed, "lost-stores") == ""


@pytest.mark.usefixtures("unsaid")
def test_a_transfer_from_before_the_loss_answers_no_new_request(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(SENT, "lost-stores") == ""
    monkeypatch.setattr(Request, "may_bring", lambda *_: True)
    assert "one IV twice" in tried(SENT, "lost-stores")


@pytest.mark.usefixtures("unsaid")
def test_an_old_copy_s_sa_that_is_refused_is_left_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(COPIED, "lost-stores") == ""
    never_copied = property(lambda _: False, lambda _run, _value: None)
    monkeypatch.setattr(Outgoing, "copied", never_copied, raising=False)
    assert "a and c own" in tried(COPIED, "lost-stores")


def test_a_freeze_of_which_an_old_copy_tells_is_not_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(THAWED, "lost-stores") == ""
    monkeypatch.setattr(transfers, "_MAY_THAW", ())
    assert "own" in tried(THAWED, "lost-stores")
