"""What crosses the ports to a gateway's charon and kernel."""

from __future__ import annotations

from dataclasses import fields

from ikectx.engine.ports import MoveReport


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
