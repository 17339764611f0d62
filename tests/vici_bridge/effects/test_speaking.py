"""charon is unmuted with the message IDs that it was told, however long it takes to read them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from ikectx.sa.name import SaName
from tests.gateway_world import Place, Socket
from tests.vici_bridge.effects.test_sink import a_context, final_of, place, run
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.ha.messages import HaMessage, HaType

IDS = (HaType.IKE_MID_INITIATOR, HaType.IKE_MID_RESPONDER)


class LateSocket(Socket):
    """charon reads message IDs, and what follows them, a while after it was sent."""

    def __init__(self, here: Place) -> None:
        super().__init__(here.charon)
        self.queue: list[bytes] = []

    async def send(self, datagrams: Iterable[bytes]) -> None:
        for datagram in datagrams:
            if self.queue or HaMessage.parse(datagram).type in IDS:
                if not self.queue:
                    asyncio.get_running_loop().call_later(0.05, self._read_all)
                self.queue.append(datagram)
            else:
                await super().send([datagram])

    async def read(self) -> None:
        while self.queue:
            await asyncio.sleep(0.001)

    def _read_all(self) -> None:
        for datagram in self.queue:
            self.charon.hear(HaMessage.parse(datagram))
        self.queue.clear()


def test_an_sa_that_was_active_before_is_unmuted_with_its_message_ids() -> None:
    """It would answer the mobile node's request 9, and expect 9 once more."""
    unmuted: dict[SaName, list[int]] = {}

    async def scenario() -> None:
        here, first = place(), a_context(1)
        second = a_context(2, mn="198.51.100.8")
        unmute = here.mute.unmute

        def noted(spis: SaName) -> None:
            (sa,) = (sa for sa in here.charon.sas.values() if sa.id.spis == spis)
            unmuted[spis] = list(sa.mids)
            unmute(spis)

        for one in (first, second):
            here.mobiles.add(one)
            await here.sink.prepare(one, False)
        here.host.ha_link = LateSocket(here)  # type: ignore[assignment]
        here.mute.unmute = noted  # type: ignore[method-assign]
        for one in (first, second):  # the first's toggle activates both
            final = final_of(one)
            await here.sink.take(one, final)
            report = await here.sink.move_peer(one, final)
            await here.sink.activate(one, final, report)
        here.sound()
        for one in (first, second):
            expected = [final_of(one).mid_initiator + report.requests, final_of(one).mid_responder]
            assert unmuted[one.spis] == expected == here.charon.sas[IkeId.of(one.current)].mids

    run(scenario())
