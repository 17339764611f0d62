"""Which events of nftables tell that one of our tables was removed, and that the agent makes it again."""

from __future__ import annotations

import asyncio
import struct

import pytest

from vici_bridge.kernel import nft_events
from vici_bridge.kernel.nft_events import NftEvents, removes
from vici_bridge.kernel.nftables import run_nft


def event(kind: int, table: bytes, port: int = 7) -> bytes:
    name = table + b"\0"
    body = struct.pack("=HH", 4 + len(name), 1) + name + bytes(-len(name) % 4)
    return struct.pack("=IHHII", 20 + len(body), 10 << 8 | kind, 0, 0, port) + bytes((1, 0, 0, 1)) + body


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (event(2, b"ikectx"), True),
        (event(8, b"ikectx_ids"), True),
        (event(14, b"ikectx"), True),
        (event(14, b"ikectx", port=9), False),  # our own
        (event(12, b"ikectx"), False),
        (event(2, b"ikectx2"), False),
        (event(2, b"filter") + event(2, b"ikectx"), True),
        (event(2, b"filter")[:18], True),
        (struct.pack("=IHHII", 16, 3, 0, 0, 0), False),
    ],
)
def test_removals_of_our_tables_are_told_from_others(data: bytes, expected: bool) -> None:
    assert removes(data, ("ikectx", "ikectx_ids"), (9,)) is expected


@pytest.mark.kernel_esp
def test_a_flush_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft_events, "_SOON", 0.0)

    async def scenario() -> int:
        seen = asyncio.Event()
        run_nft("add table inet ikectx_events")
        events = NftEvents(("ikectx_events",), tuple, seen.set)
        try:
            run_nft("add table inet ikectx_other")
            run_nft("delete table inet ikectx_other")
            await asyncio.sleep(0.05)
            assert not seen.is_set()
            run_nft("delete table inet ikectx_events")
            await asyncio.wait_for(seen.wait(), 5)
        finally:
            events.close()
        return 0

    assert asyncio.run(scenario()) == 0
