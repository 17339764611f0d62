"""An SA that charon does not activate by its own HA segment."""

from __future__ import annotations

from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import pytest

from ikectx.errors import CharonError
from tests import hand_loop
from vici_bridge.effects.activate import MISSED, _established

HERE: Any = SimpleNamespace(spis=object(), remote=SimpleNamespace(address=ip_address("198.51.100.7")))


class Charon:
    """Its SA is PASSIVE until all segments were toggled, if `helps`."""

    def __init__(self, *, helps: bool) -> None:
        self.toggles, self.helps = 0, helps
        self.segments = self

    async def view(self, _spis: object) -> Any:
        return SimpleNamespace(state="ESTABLISHED" if self.toggles and self.helps else "PASSIVE")

    async def activate(self) -> None:
        self.toggles += 1


@pytest.mark.parametrize("helps", [True, False])
def test_all_segments_are_toggled_once_and_the_operator_reads_why(
    caplog: pytest.LogCaptureFixture, helps: bool
) -> None:
    charon: Any = Charon(helps=helps)

    async def scenario() -> None:
        if helps:
            assert (await _established(charon, HERE)).state == "ESTABLISHED"
        else:
            with pytest.raises(CharonError, match=r"did not activate the SA of 198\.51\.100\.7") as caught:
                await _established(charon, HERE)
            assert "ha.conf" in caught.value.hint

    hand_loop.run(scenario())
    assert charon.toggles == 1
    (record,) = caplog.records
    assert f"in {MISSED:g} s" in record.getMessage() and "segment_count" in record.getMessage()
