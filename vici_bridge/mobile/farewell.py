"""Deletes an SA at its gateways that a user of the mobile node ended while it was PASSIVE.

`swanctl --terminate` destroys such an SA without a Delete, and the agent is not notified: neither over HA nor
by a VICI event (strongSwan 5.9.8). So the agent checks whether charon still has the SAs that it made passive,
and deletes a missing one at the gateway that serves it, or at each that may.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace

from ikectx.errors import CharonError, IkectxError, UnknownSaError, WireError
from ikectx.node.mobility import HandoverOutcome
from ikectx.sa.context import Endpoint, IkeGeneration
from ikectx.sa.keys import iv_length
from ikectx.sa.name import SaName
from mobike_ext.farewell import Farewell
from mobike_ext.link import run_farewell
from vici_bridge.effects.mobile import CharonMobile
from vici_bridge.kernel.mute import MARK

from .run import HandoverRun

log = logging.getLogger("ikectx")

LOOK = 0.2
"""Seconds between two checks whether charon still has a passive SA."""
AFTER_END = 5.0
"""Seconds for which a handover's gateways are waited for after charon lost the SA."""
TOLD = 3.0
"""Seconds for which a report waits for a gateway to answer; the Delete is repeated for longer."""

Told = tuple[IkeGeneration, Endpoint, Endpoint, Sequence[int]]
"""A Delete: the IKE_SA's keys, our end, the gateway, message IDs that our next request there may have."""


class Farewells:
    """Deletes SAs at gateways in place of charon. `run`: `run_farewell`, or a stand-in."""

    def __init__(self, mobile: CharonMobile, run: Callable[..., Awaitable[bool]] = run_farewell) -> None:
        self._mobile = mobile
        self._run = run
        self._work: set[asyncio.Task[Endpoint | None]] = set()

    async def close(self) -> None:
        """Stop all Deletes."""
        for task in list(self._work):
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)

    async def ended(self, *names: SaName) -> bool:
        """Whether charon no longer has an SA, under any of its names. If it cannot be asked: no."""
        for _ in range(2):  # an SA whose SPIs change is not listed for a moment
            try:
                if await self._mobile.listed(*names):
                    return False
            except (CharonError, WireError):
                return False
            await asyncio.sleep(LOOK / 4)
        return True

    async def unless_ended(self, run: HandoverRun, asking: Awaitable[HandoverOutcome]) -> HandoverOutcome:
        """The gateways' answer. They have `AFTER_END` seconds for it once the SA was ended here."""
        task = asyncio.ensure_future(asking)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=LOOK)
                if not task.done() and run.was_held and await self.ended(run.sa, run.now):
                    await asyncio.wait({task}, timeout=AFTER_END)
                    break
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        return run.machine.outcome if task.cancelled() else task.result()

    async def leave(self, run: HandoverRun) -> bool:
        """After a handover: whether the SA was ended here during it; then it is deleted at the gateways."""
        report = run.report
        if not run.was_held and report.serves == run.psg.name:
            return False  # charon has told its gateway
        if not await self.ended(run.sa, run.now):
            return False
        answered = await self.say((run.sa, run.now), self._deletes(run))
        gateways = [one.name for one in (run.nsg, run.psg) if answered and answered.address in one.addresses]
        report.ended(gateways[0] if gateways else "")
        return True

    def _deletes(self, run: HandoverRun) -> list[Told]:
        """The Deletes: at the gateway that serves the SA; if that is not known, at both."""
        report, before = run.report, run.by_ike or run.context
        generation = replace(before.current, spi_i=run.now[0], spi_r=run.now[1])
        ids: tuple[int, ...] = (0,)
        if run.now == run.sa:
            asked, expected = before.mid_initiator, run.machine.outcome.expected
            with contextlib.suppress(UnknownSaError):
                asked = self._mobile.recorded(run.sa).mid_initiator
            # the gateway may or may not have received the request that charon had under way
            ids = (asked,) if run.was_held else (max(0, asked - 1), asked)
            if report.serves == run.nsg.name and expected is not None:
                ids = (expected,)
        local = run.machine.care_of or run.at or run.context.local
        deletes: list[Told] = []
        for gateway in (run.nsg, run.psg):
            address = gateway.address(local.address.version)
            if address is not None and report.serves in (None, gateway.name):
                deletes.append((generation, local, Endpoint(address, run.context.remote.port), ids))
        return deletes

    async def say(self, names: Iterable[SaName], deletes: Sequence[Told]) -> Endpoint | None:
        """Delete the SA at these gateways; returns the one that answered in time. The agent forgets the
        SA."""
        log.warning("an IKE_SA was ended here while it was passive: its gateway is told to delete it")
        for name in names:
            self._mobile.forget(name)
        tasks = {asyncio.create_task(self._delete(*one)) for one in deletes}
        self._work |= tasks
        for task in tasks:
            task.add_done_callback(self._work.discard)
        end = asyncio.get_running_loop().time() + TOLD
        left = set(tasks)
        while left and (wait := end - asyncio.get_running_loop().time()) > 0:
            done, left = await asyncio.wait(left, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if (answered := task.result()) is not None:
                    for other in left:  # the gateway that answered serves the SA, and has deleted it
                        other.cancel()
                    return answered
        return None

    async def _delete(
        self, generation: IkeGeneration, local: Endpoint, remote: Endpoint, ids: Sequence[int]
    ) -> Endpoint | None:
        iv = secrets.token_bytes(len(ids) * iv_length(generation.encr))
        with contextlib.suppress(IkectxError):
            if await self._run(Farewell(generation, ids, local, remote, iv=iv), mark=MARK):
                log.info("%s has deleted the IKE_SA", remote)
                return remote
        log.warning("%s did not answer a Delete of the IKE_SA that was ended here", remote)
        return None
