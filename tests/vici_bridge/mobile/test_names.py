"""What the answer to a mobile node's request names, and what its handover makes of it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import pytest

from ikectx.errors import BusyError, WireError
from ikectx.node.agreement import renames_of
from ikectx.node.mobility import HandoverOutcome, MobileState
from ikectx.numbers import Fpt
from ikectx.sa.context import IkeContext
from ikectx.wire.cxtp import ContextDataBlock
from ikectx.wire.spis import AH, ESP, IKE, NewSpi, serialize_new_spis
from tests.asking_node import World as HandoverWorld
from tests.mobile_world import NEW, NSG, a_node_context, do
from vici_bridge.mobile import steps

CONTEXT = a_node_context(children=2)
FIRST, SECOND = CONTEXT.children
OWN, PEER = CONTEXT.spis


def blocks(*spis: NewSpi) -> tuple[ContextDataBlock, ...]:
    return (ContextDataBlock(Fpt.NEW_SPIS, serialize_new_spis(spis)),)


def test_an_answer_with_new_spis() -> None:
    assert renames_of((), CONTEXT) == {}
    assert renames_of((ContextDataBlock(Fpt.MN_TOKEN, b"x"),), CONTEXT) == {}
    told = blocks(NewSpi(ESP, SECOND.spi_out, b"\xc9\0\0\1"), NewSpi(IKE, PEER, b"newnewne"))
    assert renames_of(told, CONTEXT) == {SECOND.spi_out: b"\xc9\0\0\1", PEER: b"newnewne"}
    (current,) = CONTEXT.generations
    responder = replace(CONTEXT, generations=(replace(current, initiator=False),))
    assert renames_of(blocks(NewSpi(IKE, OWN, b"newnewne")), responder) == {OWN: b"newnewne"}


@pytest.mark.parametrize(
    "bad",
    [
        blocks(NewSpi(ESP, FIRST.spi_in, b"\xc9\0\0\1")),  # ours, not the gateway's
        blocks(NewSpi(ESP, b"\xc9\0\0\2", b"\xc9\0\0\1")),
        blocks(NewSpi(AH, FIRST.spi_out, b"\xc9\0\0\1")),
        blocks(NewSpi(IKE, OWN, b"newnewne")),
        blocks(NewSpi(ESP, FIRST.spi_out, b"\xc9\0\0\1"), NewSpi(ESP, FIRST.spi_out, b"\xc9\0\0\2")),
        blocks(NewSpi(ESP, FIRST.spi_out, b"\xc9\0\0\1"), NewSpi(ESP, SECOND.spi_out, b"\xc9\0\0\1")),
        (ContextDataBlock(Fpt.NEW_SPIS, b"\x09\x04abcdefgh"),),
        (ContextDataBlock(Fpt.NEW_SPIS, b"\x03\x04abcd"),),
    ],
)
def test_an_answer_that_makes_no_sense(bad: tuple[ContextDataBlock, ...]) -> None:
    with pytest.raises(WireError):
        renames_of(bad, CONTEXT)

    async def scenario() -> None:
        w = HandoverWorld()
        run = w.gateways.__call__

        async def with_blocks(*args: Any, **kwargs: Any) -> HandoverOutcome:
            return replace(await run(*args, **kwargs), blocks=bad)

        w.handovers._run = with_blocks
        w.mobile.context = CONTEXT
        report = await w.arrive()
        assert (report.result, report.serves, report.new) == ("failed", None, None)
        assert report.exit_code != 0
        assert "new SPIs" in report.detail
        assert w.steps() == ["quiet", "loud"]  # nothing was touched
        assert w.handovers.notes.in_question()[0]["to"] == "nsg"

    do(scenario())


@pytest.mark.parametrize("looks", [False, True])
def test_a_handover_with_new_spis(looks: bool) -> None:
    async def scenario() -> None:
        w = HandoverWorld()
        w.mobile.context = CONTEXT
        told = blocks(NewSpi(ESP, FIRST.spi_out, b"\xc9\0\0\1"), NewSpi(IKE, PEER, b"newnewne"))
        run = w.gateways.__call__
        asked: dict[str, Any] = {}

        async def with_blocks(*args: Any, **kwargs: Any) -> HandoverOutcome:
            return replace(await run(*args, **kwargs), blocks=told)

        async def quiet(sa: Any, **how: Any) -> None:
            asked.update(how)
            if looks and not how.get("anything"):
                w.mobile.busy = ["IKE_MOBIKE"]
                raise BusyError("it looks for its gateway")
            w.mobile.state = "PASSIVE"

        async def readdress(context: IkeContext, local: Any, remote: Any, renames: Any, peers: Any) -> Any:
            asked["renames"] = renames
            w.mobile.local, w.mobile.remote = local, remote
            (current,) = CONTEXT.generations
            w.mobile.context = replace(CONTEXT, generations=(replace(current, spi_r=b"newnewne"),))
            return w.mobile.context

        w.handovers._run = with_blocks
        w.mobile.quiet = quiet  # type: ignore[method-assign]
        w.mobile.readdress = readdress  # type: ignore[method-assign]
        report = await w.arrive()
        assert (report.result, report.exit_code, report.renamed) == ("moved", 0, 2), report
        assert asked["renames"] == {FIRST.spi_out: b"\xc9\0\0\1", PEER: b"newnewne"}
        # under its old name nobody answers what charon asks
        assert asked.get("anything", False) is looks
        assert w.handovers.notes.in_question() == []
        assert report.to_json()["renamed"] == 2

    do(scenario())


@pytest.mark.parametrize("answers", [True, False])
def test_a_handover_that_ends_by_ike(answers: bool) -> None:
    async def scenario() -> None:
        w = HandoverWorld()
        seen: list[Any] = []

        @contextlib.asynccontextmanager
        async def answering(sa: Any, local: Any, gateway: Any) -> Any:
            seen.append((local, NSG.address in gateway, w.mobile.state))
            moved = asyncio.get_running_loop().create_future()
            if answers:
                w.mobile.local, w.mobile.remote = NEW, NSG
                moved.set_result(replace(w.mobile.context, local=NEW, remote=NSG))
            yield moved

        async def silent(machine: Any, **_: Any) -> HandoverOutcome:
            if answers:
                await asyncio.Event().wait()
            return HandoverOutcome(MobileState.SILENT, in_doubt=True)

        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setattr(steps, "AFTER_IKE", 0.01)
        w.handovers.answering = answering
        w.handovers._run = silent
        report = await w.arrive()
        monkeypatch.undo()
        assert seen == [(NEW, True, "PASSIVE")]
        if answers:
            assert (report.result, report.serves, report.new) == ("moved", "nsg", (NEW, NSG))
            assert report.exit_code == 0
            assert w.handovers.notes.in_question() == []
        else:
            assert (report.result, report.serves) == ("silent", None)
        assert w.steps() == ["quiet", "loud"]

    do(scenario())
