"""What a gateway does for each SA when many move at once, by counts, which are the same on any machine."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from typing import Any

import pytest

from ikectx.disk.seal import Sealer
from ikectx.disk.store import SqliteStore
from ikectx.wire import cbor
from tests.hand_loop import run
from tests.peers import MemoryStream, a_context
from tests.worlds import world

AT_ONCE = 16
"""SAs that the gateway moves at a time, as the agent does unless it is told otherwise."""

MOST = {
    "journal entries": 9.0,
    "statements": 20.0,
    "transactions": 0.6,
    "seals": 4.1,
    "values from octets": 12.0,
    "values to octets": 6.0,
    "tasks": 10.0,
    "objects in cycles": 0.5,
}
"""For each SA, at both gateways together. What is done once for several SAs has less than one. Objects in
cycles are those that only the garbage collector frees, which looks at all objects for that."""


async def together(stream: MemoryStream, data: bytes) -> None:
    """`MemoryStream.write`, with messages that were written together read together, as over TLS."""
    assert stream.other is not None
    stream.other.inbox.put_nowait(data)


def counted(sas: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """For each SA."""
    found: Counter[str] = Counter()

    def count(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        def counting(*args: Any, **named: Any) -> Any:
            found[what] += 1
            return real(*args, **named)

        patch.setattr(owner, name, counting)

    async def scenario() -> None:
        async with world() as w:
            contexts = [a_context(n, mn=f"198.51.{n >> 8}.{n & 255}") for n in range(1, sas + 2)]
            first, *names = [w.a.daemon.serve(context) for context in contexts]
            assert (await w.a.agent.transfer(first, "b")).result == "moved"  # the link is up after that
            await w.quiet()
            for side in w.sides.values():
                side.store._db.set_trace_callback(lambda text: said.update([text.split(" ", 1)[0]]))
            count(Sealer, "seal", "seals")
            count(cbor.cbor2, "loads", "values from octets")
            count(cbor.cbor2, "dumps", "values to octets")
            count(asyncio, "create_task", "tasks")
            write = SqliteStore.write

            def counting(store: SqliteStore, *entries: Any, soon: bool = False, **how: Any) -> None:
                found["journal entries"] += 0 if soon else len(entries)
                write(store, *entries, soon=soon, **how)

            patch.setattr(SqliteStore, "write", counting)
            gc.collect()
            reports = await w.a.agent.transfer_all(names, "b", parallel=AT_ONCE)
            assert {report.result for report in reports} == {"moved"}
            await w.quiet()
            found["objects in cycles"] = gc.collect()
            patch.undo()
            for side in w.sides.values():
                side.store._db.set_trace_callback(None)

    said: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        patch.setattr(MemoryStream, "write", together)
        gc.disable()
        try:
            run(scenario())
        finally:
            gc.enable()
    found["statements"], found["transactions"] = said.total(), said["COMMIT"]
    return {what: number / sas for what, number in found.items()}


def test_an_sa_of_a_drain_takes_no_more_than_this(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = counted(32, monkeypatch), counted(128, monkeypatch)
    assert set(few) == set(MOST)
    assert {what: number for what, number in many.items() if number > MOST[what]} == {}
    growing = {what: (few[what], many[what]) for what in MOST if many[what] > 1.2 * few[what]}
    assert growing == {}, "what one SA takes grows with the number of SAs"
