"""Notices between agents: told until they are heard, over lost links, deaths and old peers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ikectx.errors import StoreError
from ikectx.numbers import Fpt, Status
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict
from ikectx.wire.whereabouts import What, Whereabouts
from tests.hand_loop import run
from tests.peers import a_context
from tests.worlds import World, one_move, until, world

SA = SaName(b"initiato", b"responde")
ENDED = Whereabouts(SA, 1, What.ENDED)
MOVED = Whereabouts(SA, 1, What.MOVED, "c")


class Heard(list[tuple[str, Whereabouts]]):
    """What a's agent heard. `trouble`: errors to raise, one for each that it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.trouble: list[Exception] = []

    def __call__(self, peer: str, news: Whereabouts) -> None:
        if self.trouble:
            raise self.trouble.pop(0)
        self.append((peer, news))


@asynccontextmanager
async def two() -> AsyncIterator[tuple[World, Heard]]:
    async with world() as w:
        heard = Heard()
        w.a.agent._driver.hear = heard
        yield w, heard


def waiting(w: World) -> int:
    return len(w.b.store.items("notice"))


def test_it_is_told_at_once_and_once() -> None:
    async def main() -> None:
        async with two() as (w, heard):
            w.b.agent.tell("a", ENDED)
            await until(lambda: not waiting(w))
            assert heard == [("b", ENDED)]

    run(main())


def test_it_is_told_by_a_step_of_a_transfer(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """b's SA, which came from a, was to go to a again and stays."""

    async def main() -> None:
        async with two() as (w, heard):
            monkeypatch.setattr(w.b.daemon, "stays", lambda sa: w.b.agent.tell("a", ENDED), raising=False)
            sa = w.b.daemon.serve(a_context())
            w.a.daemon.verdicts = [Verdict(Fpt.PAD, Status.NO_CONNECTION, "none")]
            assert (await w.b.agent.transfer(sa, "a")).result == "refused"
            await until(lambda: not waiting(w))
            assert heard == [("b", ENDED)]

    run(main())
    assert "a mistake in the program" not in caplog.text


def test_it_waits_for_the_link() -> None:
    async def main() -> None:
        async with two() as (w, heard):
            w.network.kill("a")
            w.b.agent.tell("a", MOVED)
            await asyncio.sleep(0.1)
            w.b.agent.tell("a", ENDED)
            assert waiting(w) == 1, "the last of it says all"
            w.network.up["a"] = w.a.agent
            await until(lambda: not waiting(w))
            assert heard == [("b", ENDED)]

    run(main())


def test_it_outlives_the_agent() -> None:
    async def main() -> None:
        async with two() as (w, heard):
            w.network.kill("a")
            w.b.agent.tell("a", ENDED)
            await w.b.kill()
            w.network.up["a"] = w.a.agent
            await w.b.start()
            await until(lambda: not waiting(w))
            assert heard == [("b", ENDED)]

    run(main())


def test_a_full_disk_keeps_nobody_from_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with two() as (w, heard):

            def full(*_: object, **__: object) -> None:
                raise StoreError("the disk is full")

            with monkeypatch.context() as patch:
                patch.setattr(w.b.store, "put", full)
                with pytest.raises(StoreError):
                    w.b.agent.tell("a", ENDED)
                await until(lambda: bool(heard))
            assert heard == [("b", ENDED)]
            w.b.agent.tell("a", MOVED)
            await until(lambda: len(heard) > 1 and not waiting(w))
            assert heard == [("b", ENDED), ("b", MOVED)]

    run(main())


def test_it_is_told_again_where_it_could_not_be_taken_in() -> None:
    async def main() -> None:
        async with two() as (w, heard):
            heard.trouble = [StoreError("no space left"), StoreError("no space left")]
            w.b.agent.tell("a", ENDED)
            await until(lambda: not waiting(w))
            assert heard == [("b", ENDED)]

    run(main())


def test_a_peer_that_knows_nothing_of_it_is_left_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older one takes it for a CTD that does not parse, answers so, and goes on."""

    async def main() -> None:
        async with two() as (w, heard):
            monkeypatch.setattr("ikectx.engine.core.is_notice", lambda message: False)
            w.b.agent.tell("a", ENDED)
            await until(lambda: not waiting(w))
            assert heard == []
            _, report = await one_move(w)
            assert report.result == "moved"

    run(main())
    assert "knows no WHEREABOUTS" in caplog.text


def test_thousands_fit() -> None:
    async def main() -> None:
        async with two() as (w, heard):
            for number in range(500):
                w.b.agent.tell(
                    "a", Whereabouts(SaName(number.to_bytes(8), SA.spi_r), 1, What.MOVED, "c" * 40)
                )
            await until(lambda: not waiting(w))
            assert len(heard) == 500

    run(main())


def test_a_peer_that_is_none_any_more_is_told_nothing() -> None:
    async def main() -> None:
        async with two() as (w, _):
            w.b.agent.tell("gone", ENDED)
            assert waiting(w) == 0

    run(main())
