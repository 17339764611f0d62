"""UPDATE_SPI at a mobile node: a gateway to which the SA was pushed asks for other SPIs.

    nSG -> MN   INFORMATIONAL  N(UPDATE_SA_ADDRESSES)..., N(UPDATE_SPI)+    charon answers, without the notify
    MN -> nSG   INFORMATIONAL  N(UPDATE_SPI)+, the same from this side      the agent; the SA is passive
    nSG -> MN                  N(UPDATE_SPI)+                               both ends have the new SPIs

charon does not know the notify, and the agent cannot intercept its messages. So the agent receives a copy of
each request, lets charon answer, and asks for the same the other way round (`naming.mirrored`), in time: the
new gateway waits 8 s if it knows of an agent here, else 500 ms, and then rekeys, which shows in charon's
message IDs. Meanwhile charon is passive; an exchange of its own that was in flight begins anew after it,
because its message ID is used here (the new gateway has not answered it and never will).

Each request is noted before it is sent. An agent that starts anew sends it again, octet for octet, and gets
the same answer (the new gateway repeats it for 60 s).

If a handover has made the SA passive already, the agent answers in place of charon (`SpiWatch.answering`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from ikectx.errors import (
    CharonError,
    IkectxError,
    KernelError,
    LinkError,
    WireError,
)
from ikectx.mistakes import log_mistake
from ikectx.numbers import Protocol
from ikectx.sa.context import Address, Endpoint, IkeContext
from ikectx.sa.name import SaName
from mobike_ext.link import run_spi_update, serving
from mobike_ext.mirror import Mirror
from mobike_ext.naming import mirrored
from mobike_ext.notify import Reason, UpdateSpi
from mobike_ext.responder import Asked, GatewayResponder, ResponderRole, SpiResponder
from mobike_ext.spi_update import Renamed
from vici_bridge.effects.mobile import AGAIN, CharonMobile
from vici_bridge.effects.shelter import Shelter, Sheltered
from vici_bridge.ha.record import RecordChange
from vici_bridge.host import CharonHost
from vici_bridge.kernel.ike_queue import Waiting
from vici_bridge.kernel.mute import MARK
from vici_bridge.own_names import OwnNames
from vici_bridge.vici.codec import parse_message
from vici_bridge.vici.views import SaView

from .farewell import Farewells
from .held import HeldRequests

log = logging.getLogger("ikectx")

IN_TIME = 6.0
"""Seconds within which the request must be sent: less than a gateway waits that knows of this agent."""
REPEATED = 50.0
"""Seconds in which the gateway certainly repeats its answer (it does for 60)."""
SETTLE = 0.2
"""Seconds from a change of the SAs until the sockets that listen are changed, too."""


class SpiWatch:
    """Receives gateways' requests, for each of charon's SAs, from `start` to `close`.

    `lock`: held while an SA is passive. `farewells`: deletes at gateways an SA that is ended here meanwhile.
    `allowed` False: no SPI is ever changed; invitations are heard all the same. `held`: requests from other
    places than the SA's gateway's, which charon has not had yet.
    """

    def __init__(
        self,
        host: CharonHost,
        mobile: CharonMobile,
        lock: asyncio.Lock,
        farewells: Farewells | None = None,
        *,
        allowed: bool = True,
        held: HeldRequests | None = None,
    ) -> None:
        self._host = host
        self._mobile = mobile
        self._lock = lock
        self._farewells = farewells
        self._allowed = allowed
        self._held = held
        self._shelter = Shelter(host)
        self._listeners: dict[SaName, tuple[Endpoint, asyncio.Task[None]]] = {}
        self._soon: asyncio.TimerHandle | None = None
        self._started = False
        self._work: set[asyncio.Task[None]] = set()
        self.renamed = 0
        """Requests that were granted."""
        self.invited: Callable[[str, SaName], Awaitable[object]] | None = None
        """Goes to the gateway of that name, as the serving one wants (`Handovers.arrive`)."""

    @property
    def watched(self) -> int:
        """Number of IKE_SAs that are listened to."""
        return sum(not task.done() for _, task in self._listeners.values())

    # What is listened to.

    def start(self) -> None:
        """Begin to listen, now and whenever `changed` is called."""
        self._started = True
        self._look()

    def changed(self, change: RecordChange | None = None) -> None:
        """SAs or addresses may have changed."""
        self._shelter.heed(change)
        if self._soon is None and self._started:
            self._look_in(SETTLE)

    def _look_in(self, seconds: float) -> None:
        self._soon = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        self._soon = None
        self._spawn(self._listen_to_all())

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._work.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, IkectxError):
                log.error("what a gateway asked for was not done: %s", error)
            else:
                log_mistake(log, "what a gateway asked for", error)

    async def close(self) -> None:
        """Stop; an exchange under way ends with the SA active, its note left."""
        self._started = False
        if self._soon is not None:
            self._soon.cancel()
        tasks = [*self._work, *(task for _, task in self._listeners.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listeners.clear()
        self._shelter.close()

    async def _listen_to_all(self) -> None:
        try:
            views = await self._host.views()
        except (CharonError, WireError):
            if self._soon is None:
                self._look_in(AGAIN)
            return
        known = set(self._host.record.names())
        if self._held is not None:
            self._held.watch({view.spis: view.remote.address for view in views if view.spis in known})
        wanted = {view.spis: view.local for view in views if view.spis in known}
        for sa, (local, task) in list(self._listeners.items()):
            if wanted.get(sa) != local or task.done():
                task.cancel()
                del self._listeners[sa]
        for sa, local in wanted.items():
            if sa not in self._listeners:
                self._listeners[sa] = (local, asyncio.create_task(self._listen(sa, local)))

    async def _listen(self, sa: SaName, local: Endpoint) -> None:
        try:
            context = self._mobile.recorded(sa)
            machine = SpiResponder(
                context.current,
                context.mid_responder,
                local,
                OwnNames(self._host, sa),
                role=ResponderRole.WATCH,
            )
            with serving(machine, mark=MARK) as requests:
                while (event := await requests.next()) is not None:
                    if self._lock.locked():
                        # charon is passive and does not answer, so the request will be repeated
                        machine.expected_id = event.message_id
                    else:
                        self._asked(sa, event)
        except IkectxError as error:
            log.warning("requests of gateways at %s are not received: %s", local, error)

    # One request.

    def _asked(self, sa: SaName, event: Asked) -> None:
        if self._held is not None:
            held = self._held.claim(sa, event.source, event.message_id)
            if held and event.moves:
                self._spawn(self._shelter_from(sa, event, self._held, held))
            else:
                self._held.end(held)
        if event.invitation and self.invited is not None:
            self._spawn(self._follow(sa, event))
        elif event.pairs and self._allowed:
            self._spawn(self._ask_back(sa, event, asyncio.get_running_loop().time()))
        elif event.reasons:
            names = ", ".join(sorted({reason.name for reason in event.reasons}))
            log.info("%s asked for other SPIs, which is not granted: %s", event.source, names)

    async def _shelter_from(
        self, sa: SaName, event: Asked, requests: HeldRequests, held: Sequence[Waiting]
    ) -> None:
        """The gateway has the SA at another address: shelter its packets, then let charon have that
        request."""
        sheltered: Sheltered | None = None
        try:
            try:
                if (view := await self._host.view(sa)) is not None:
                    sheltered = self._shelter.begin(view)
            finally:
                requests.end(held)
                requests.moved(sa, event.source.address)
            if sheltered is not None:
                await self._shelter.end(sheltered, event.source.address)
        except IkectxError as error:
            log.info("packets may be lost while charon goes to %s: %s", event.source, error)

    async def _follow(self, sa: SaName, event: Asked) -> None:
        """The gateway wants this node to go to another one, once charon has answered it."""
        end = asyncio.get_running_loop().time() + IN_TIME
        while not await self._answered(sa, event):
            if asyncio.get_running_loop().time() > end:
                log.warning("%s invited us elsewhere, but charon did not answer in time", event.source)
                return
            await asyncio.sleep(0.005)
        assert self.invited is not None
        log.info("%s wants this node to go to %s", event.source, event.invitation)
        await self.invited(event.invitation, sa)

    async def _ask_back(self, sa: SaName, event: Asked, heard: float) -> None:
        """Ask the gateway for the same SPIs; its own request is answered by charon."""
        while not await self._answered(sa, event):
            if asyncio.get_running_loop().time() > heard + IN_TIME:
                log.warning("%s asked for other SPIs, but charon did not answer in time", event.source)
                return
            await asyncio.sleep(0.005)
        async with self._lock:
            if not await self._answered(sa, event):
                return  # a handover was faster
            # an exchange in flight is charon's own, in most cases a rekey because of the new address
            try:
                await self._mobile.quiet(sa, anything=True, patience=0.0)
            except IkectxError:
                if self._mobile.is_quiet(sa):
                    self._mobile.loud_later(sa, self._lock)
                raise
            try:
                if asyncio.get_running_loop().time() > heard + IN_TIME + SETTLE:
                    log.warning("%s asked for other SPIs, but charon took too long", event.source)
                    return
                if await self._mobile.next_request(sa) > event.message_id + 1:
                    log.info("%s asked for other SPIs, and does not wait for them any more", event.source)
                    return
                # if the SPIs come without the address, it has asked from there, too
                note = await self._note(sa, event.source, mirrored(event.pairs))
                await self._say_until_told(sa, note)
            finally:
                try:
                    await self._mobile.loud(sa)
                except IkectxError:
                    self._mobile.loud_later(sa, self._lock)
                    raise
                await self._leave(sa, event)

    async def _leave(self, sa: SaName, event: Asked) -> None:
        """The SA was ended here while it was passive: delete it at its gateway, too."""
        ike = {one.old: one.new for one in event.pairs if one.protocol is Protocol.IKE}
        new = sa.renamed(ike)
        if self._farewells is None or sa not in self._listeners or not await self._farewells.ended(sa, new):
            return
        context, local = self._mobile.recorded(sa), self._listeners[sa][0]
        # the gateway may or may not have received the last request about SPIs, or of charon before it
        after = context.mid_initiator
        under = [(context.current, tuple(range(max(0, after - 1), after + 2)))]
        if new != sa:
            under.append((replace(context.current, spi_i=new[0], spi_r=new[1]), (0,)))
        gateways = {event.source, context.remote}
        await self._farewells.say(
            (sa, new), [(keys, local, to, ids) for to in gateways for keys, ids in under]
        )

    async def _answered(self, sa: SaName, event: Asked) -> bool:
        """Whether charon has answered the request, and uses the address in it."""
        if self._mobile.recorded(sa).mid_responder <= event.message_id:
            return False
        view = await self._host.view(sa)
        return view is not None and (not event.moves or view.remote == event.source)

    async def _note(self, sa: SaName, remote: Endpoint, asks: tuple[UpdateSpi, ...]) -> Mirror:
        """Note the request that will be sent; the SA is passive."""
        context, view = self._mobile.recorded(sa), await self._host.view(sa)
        if view is None:
            raise CharonError("charon has lost the SA meanwhile")
        # charon reports the ID after the last one used; a request that is in flight has it, unanswered
        used = await self._in_flight(sa)
        ends = view.local, remote
        note = Mirror.fresh_one(context, context.mid_initiator - used, ends, asks, secrets.token_bytes)
        self._host.own.note(sa, mirror=note.dumps())
        return note

    async def _in_flight(self, sa: SaName) -> bool:
        trees = await self._host.vici.read_sas(lambda octets: parse_message(octets, foreign=True))
        name = (sa.spi_i.hex(), sa.spi_r.hex())
        found = [one for tree in trees for one in tree.values()]
        found = [one for one in found if (one.get("initiator-spi"), one.get("responder-spi")) == name]
        return any(one.get("tasks-active") for one in found)

    async def _say_until_told(self, sa: SaName, note: Mirror) -> None:
        """`_say`, again while charon cannot be asked: what the gateway has agreed to must not be forgotten.
        Errors: IkectxError."""
        end = asyncio.get_running_loop().time() + REPEATED
        while True:
            try:
                return await self._say(sa, note)
            except CharonError as error:
                if asyncio.get_running_loop().time() + AGAIN > end:
                    raise
                log.warning("%s and its new SPIs: %s; trying again", note.remote, error)
            await asyncio.sleep(AGAIN)

    async def _say(self, sa: SaName, note: Mirror) -> None:
        """Send the request, and apply the answer. The SA is passive, also at the end. Errors: IkectxError."""
        mobile = self._mobile
        context = mobile.recorded(sa)
        ours = {one.old: one.new for one in note.asks if one.protocol is Protocol.ESP and not one.choose}
        try:
            mobile.hear(note.local, ours)
        except KernelError as error:
            log.warning("packets under new SPIs will be lost until charon has them: %s", error)
        try:
            report = await run_spi_update(note.machine(context), mark=MARK)
        except (LinkError, KernelError) as error:
            # charon's request in flight with that ID stays as it is: see `CharonMobile.renumber`
            log.warning("%s did not answer the request for other SPIs: %s", note.remote, error)
        else:
            # at once, because charon's own exchange is about a child that may be gone soon
            await mobile.count(sa, initiator=note.message_id + report.move.requests)
            if not note.asks:
                log.debug("%s has had request %d of this node", note.remote, note.message_id)
            elif isinstance(report.outcome, Renamed):
                renames = {one.old: one.new for one in report.outcome.pairs}
                await mobile.readdress(context, note.local, note.remote, renames)
                self.renamed += 1
                told = ", ".join(f"{old.hex()} -> {new.hex()}" for old, new in renames.items())
                log.info("%s: new SPIs, as %s asked: %s", context.connection, note.remote, told)
            else:
                log.warning("%s asked for other SPIs, then refused them", note.remote)
        self._host.own.note(sa, mirror=b"")

    # A handover.

    @contextlib.asynccontextmanager
    async def answering(
        self, sa: SaName, local: Endpoint, gateway: Collection[Address]
    ) -> AsyncIterator[asyncio.Future[IkeContext]]:
        """While `sa` is passive: answer the gateway's requests at `local` for addresses and SPIs, and apply
        them.

        The future is the SA after that. The request is authentic and new, so this gateway serves the SA,
        whatever its answer to the CTAR. No other task may change the SA meanwhile.
        """
        context = self._mobile.recorded(sa)
        moved: asyncio.Future[IkeContext] = asyncio.get_running_loop().create_future()
        machine = GatewayResponder(
            gateway,
            context.current,
            context.mid_responder,
            local,
            OwnNames(self._host, sa),
            conditions=context.conditions,
        )

        async def answer() -> None:
            with serving(machine, mark=MARK) as requests:
                while (event := await requests.next()) is not None:
                    # a second one: in a moment charon answers, and this node asks for the same
                    refusal = Reason.BUSY if moved.done() else None
                    if refusal is None and (event.moves or event.pairs):
                        try:
                            moved.set_result(await self._apply(context, machine, event))
                        except IkectxError as error:
                            if event.moves:
                                # it must not believe that we are there: charon answers what it repeats
                                log.warning("%s is not answered: %s", event.source, error)
                                return
                            log.warning("the SAs of %s are not renamed: %s", event.source, error)
                            refusal = Reason.BUSY
                    requests.answer(refusal)

        task = asyncio.create_task(answer())
        try:
            yield moved
        finally:
            if machine.retired:
                self._spawn(_to_its_end(task))  # for the old SPIs, which charon no longer knows
            else:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                if machine.answered:
                    await self._mobile.count(sa, responder=machine.expected_id)

    async def _apply(self, context: IkeContext, machine: GatewayResponder, event: Asked) -> IkeContext:
        """Do what the gateway asks for; returns the SA as it is then. Errors: IkectxError."""
        renames = {one.old: one.new for one in event.pairs}
        peers = [Endpoint(address, event.source.port) for address in machine.gateway]
        after = await self._mobile.readdress(context, machine.local, event.source, renames, peers)
        self.renamed += bool(renames)
        return after

    # After a start.

    async def resume(self) -> None:
        """Send again the requests of an earlier agent that may be unanswered. Raises nothing.

        Call it before `CharonMobile.resume`, which makes the SA active again.
        """
        for row in self._host.own.all():
            if not row.facts.mirror:
                continue
            sa = row.sa
            view = await self._view(sa)
            try:
                if view is not None and view.state == "PASSIVE":
                    async with self._lock:
                        await self._say_until_told(sa, Mirror.loads(row.facts.mirror))
                else:
                    self._host.own.note(sa, mirror=b"")
            except IkectxError as error:
                log.warning("SPIs that were being changed when the agent ended: %s", error)
                self._host.own.note(sa, mirror=b"")

    async def _view(self, sa: SaName) -> SaView | None:
        """charon's view, as soon as it answers."""
        while True:
            try:
                return await self._host.view(sa)
            except (CharonError, WireError) as error:
                log.debug("SPIs that were being changed wait for charon: %s", error)
                await asyncio.sleep(AGAIN)


async def _to_its_end(task: asyncio.Task[None]) -> None:
    await task
