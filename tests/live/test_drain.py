"""A drain as `ikectx lab bench --drain` measures it, in a lab of its own."""

from __future__ import annotations

import pytest

from ikectx_cli.lab.emptying import drain

pytestmark = pytest.mark.live

SIZE = 10


def test_a_drain_moves_all_and_tells_what_each_took() -> None:
    said: list[str] = []
    found = drain(SIZE, libipsec=True, profile=True, say=said.append)
    assert (found["sas"], found["esp"], found["recovered"]) == (SIZE, "libipsec", True)
    assert found["seconds"] > 0
    # every move is some milliseconds of work at both agents
    assert all(1 < found["cpu_ms_per_sa"][host] < 1000 for host in ("psg", "nsg"))
    for host in ("psg", "nsg"):
        sampled = sum(found["profile_ms"][host].values())
        assert 0.5 < sampled / found["cpu_ms_per_sa"][host] < 1.5
    assert 0 < found["memory_kib_per_sa"] < 4096
    assert 0 <= found["lost"] < found["sent"]
    assert said[-1] == f"psg moves all {SIZE} to nsg"
