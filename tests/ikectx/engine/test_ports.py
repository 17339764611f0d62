"""What crosses the ports to a gateway's charon and kernel."""

from __future__ import annotations

from dataclasses import fields

import ikectx
from ikectx.engine.ports import ContextSink, MoveReport
from tests.peers import Ether, MemoryGateway, a_context


def test_reports_of_two_exchanges_sum_in_every_field() -> None:
    ones = MoveReport(**{field.name: 2**at for at, field in enumerate(fields(MoveReport))})  # type: ignore[arg-type]
    both = ones + ones
    for at, field in enumerate(fields(MoveReport)):
        if field.name != "proven_by_traffic":
            assert getattr(both, field.name) == 2 * 2**at, field.name


def test_one_exchange_that_traffic_proved_proves_the_sum() -> None:
    proven = MoveReport(proven_by_traffic=True)
    for pair in ((proven, MoveReport()), (MoveReport(), proven), (proven, proven)):
        assert (pair[0] + pair[1]).proven_by_traffic is True
    assert (MoveReport() + MoveReport()).proven_by_traffic is False


def test_a_sink_that_says_nothing_of_it_never_changes_spis() -> None:
    plain, context = MemoryGateway("b", Ether()), a_context()
    ContextSink.tell_later(plain, context, True)
    assert not ContextSink.must_tell(plain, context)
    assert not ContextSink.renames(plain, context)
    assert not ContextSink.cannot_send(plain, context)
    assert ContextSink.new_names(plain, context) == ()
    assert ikectx.Renamer is ContextSink
