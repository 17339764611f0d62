"""A mobile node's agent that dies at any step of a move, and what its next start finds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import CharonError
from tests.mobile_world import NEW, NSG, OLD, PSG, Crash, Node, a_move, a_node_context, at, do, quick

__all__ = ["quick"]

SHAPES = {
    "beside": (NEW, NSG, {}),
    "same local address": (OLD, NSG, {}),
    "same gateway": (NEW, PSG, {}),
    "renamed": (NEW, NSG, {b"\xc1\0\0\0": b"\xc3\0\0\0", b"\xc2\0\0\0": b"\xc4\0\0\0"}),
    "all renamed": (NEW, NSG, {b"\xc2\0\0\0": b"\xc4\0\0\0", b"\x22GWr\0\0\0\1": b"\x55" * 8}),
    "half renamed": (OLD, NSG, {b"\xc2\0\0\0": b"\xc4\0\0\0"}),
}


@pytest.mark.parametrize(("shape", "older"), [*((shape, False) for shape in SHAPES), ("beside", True)])
def test_a_crash_at_any_step(shape: str, older: bool) -> None:
    """The next agent makes the SA active, where the one before it was taking it; then it moves back."""
    local, remote, renames = SHAPES[shape]

    async def crashed(step: int) -> bool:
        node = Node(a_node_context(children=2, older=older))
        node.begin(step)
        try:
            await a_move(node, local, remote, renames)
            ended = True
        except (Crash, asyncio.CancelledError):
            ended = False
        node.begin()
        await node.mobile.resume()
        moved = (node.charon.local, node.charon.remote) == (local, remote)
        assert moved or (node.charon.local, node.charon.remote) == (OLD, PSG)
        at(node, node.charon.local, node.charon.remote)
        assert node.charon.context.spis in node.host.record
        node.sa = node.charon.context.spis
        if moved:
            await a_move(node, OLD, PSG)
            assert (node.charon.local, node.charon.remote, node.charon.state) == (OLD, PSG, "ESTABLISHED")
        return ended

    async def every() -> int:
        step = 1
        while not await crashed(step):
            step += 1
        return step

    assert do(every()) > 12


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=2, max_size=5), st.sampled_from(sorted(SHAPES)))
def test_agents_that_crash_again_and_again(steps: list[int], shape: str) -> None:
    local, remote, renames = SHAPES[shape]

    async def scenario() -> None:
        node = Node(a_node_context(children=2))
        node.begin(steps[0])
        try:
            await a_move(node, local, remote, renames)
        except (Crash, asyncio.CancelledError):
            for step in steps[1:]:
                node.begin(step)
                try:
                    await node.mobile.resume()
                except (Crash, asyncio.CancelledError):
                    continue
        node.begin()
        await node.mobile.resume()
        at(node, node.charon.local, node.charon.remote)

    do(scenario())


def test_resume_waits_for_charon_and_forgets_what_it_no_longer_has() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        await node.mobile.quiet(node.sa)
        node.begin()
        real = node.charon.list_sas
        tries = 0

        def away() -> list[dict[str, Any]]:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise CharonError("not there yet")
            return real()

        node.charon.list_sas = away  # type: ignore[method-assign]
        await node.mobile.resume()
        at(node, OLD, PSG)
        await node.mobile.quiet(node.sa)
        node.charon.gone = True
        await node.mobile.resume()
        assert not node.store.rows("mobile")

    do(scenario())


@pytest.mark.parametrize("broken", [b"no note of a move", b"{}"])
def test_b13_a_note_that_cannot_be_read_keeps_no_sa_passive(broken: bytes) -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        await node.mobile.quiet(node.sa)
        other = node.sa.renamed({node.sa.spi_i: b"\0" * 8})  # sorted first, and gone from charon
        node.host.own.note(node.sa, move=broken)
        node.host.own.note(other, move=broken)
        node.begin()
        ended = await node.mobile.resume()  # raises nothing
        assert list(ended) == []
        assert node.charon.state == "ESTABLISHED"
        assert node.charon.rekeyed == ["child 1"]  # nobody knows how far its move had come
        assert not node.store.rows("mobile")

    do(scenario())


def test_b13_an_sa_that_could_not_be_made_active_is_tried_again() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        await node.mobile.quiet(node.sa)
        real = node.host.segments.activate
        tries = 0

        async def refuses() -> None:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise CharonError("charon did not activate the SA")
            await real()

        node.host.segments.activate = refuses  # type: ignore[method-assign]
        with pytest.raises(CharonError):
            await node.mobile.loud(node.sa)
        node.mobile.loud_later(node.sa, asyncio.Lock())
        async with asyncio.timeout(60):
            while node.charon.state != "ESTABLISHED":
                await asyncio.sleep(1)
        assert tries == 3

    do(scenario())
