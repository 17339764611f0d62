"""What a mobile node's agent knows of charon's SAs without asking."""

from __future__ import annotations

import asyncio
from typing import Any

from ikectx.errors import CharonError
from tests.mobile_world import Node, a_node_context, do, quick
from vici_bridge.ready import AGAIN, SETTLE, Ready

__all__ = ["quick"]


def test_sas_are_known_when_nothing_has_changed_since_they_were_listed() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        ready = Ready(node.host)
        node.host.charon_up = True
        assert ready.views() is None  # nobody has looked
        ready.changed()
        ready.changed()
        assert ready.views() is None
        await asyncio.sleep(2 * SETTLE)
        known = ready.views()
        assert known is not None and [view.spis for view in known] == [node.sa]
        node.host.charon_up = False
        assert ready.views() is None
        node.host.charon_up = True
        ready.changed()
        assert ready.views() is None

    do(scenario())


def test_an_exchange_under_way_is_looked_after_until_it_ends() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        ready = Ready(node.host)
        node.host.charon_up = True
        node.charon.tasks = ["CHILD_REKEY"]
        ready.changed()
        await asyncio.sleep(2 * SETTLE)
        known = ready.views()
        assert known is not None and known[0].tasks == ("CHILD_REKEY",)
        node.charon.tasks = []
        await asyncio.sleep(2 * AGAIN)
        known = ready.views()
        assert known is not None and known[0].tasks == ()

    do(scenario())


def test_what_charon_tells_while_it_is_asked_counts() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        ready = Ready(node.host)
        node.host.charon_up = True
        asked: list[Any] = []
        views = node.host.views

        async def twice() -> Any:
            asked.append(ready.views())
            if len(asked) == 1:
                raise CharonError("not yet")
            if len(asked) == 2:
                ready.changed()
            return await views()

        node.host.views = twice  # type: ignore[method-assign]
        ready.changed()
        await asyncio.sleep(2 * AGAIN + 4 * SETTLE)
        assert asked == [None, None, None]
        assert ready.views() is not None

    do(scenario())
