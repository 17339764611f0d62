"""`ikectx mobile serve`: the agent of a mobile node, beside a stock charon.

One process owns the HA socket, the VICI connection and the notes of handovers, and offers its functions on
the control socket, as VICI commands. `vici_bridge.mobile.handover` carries out a handover.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ikectx import trace
from ikectx.disk.store import SqliteStore
from ikectx.errors import CharonError, IkectxError, KernelError, UnknownSaError, UsageError, WireError
from ikectx.sa.context import Address, Endpoint, IkeContext
from ikectx.sa.name import SaName
from vici_bridge.effects.beside import keep_packets
from vici_bridge.effects.mobile import CharonMobile
from vici_bridge.ha.record import RecordChange
from vici_bridge.host import CharonHost
from vici_bridge.host_config import HostConfig
from vici_bridge.kernel.addresses import OuterAddresses
from vici_bridge.mobile.farewell import Farewells, Told
from vici_bridge.mobile.handover import Handovers
from vici_bridge.mobile.held import HeldRequests
from vici_bridge.mobile.report import MobileReport
from vici_bridge.mobile.spis import SpiWatch
from vici_bridge.ready import Ready
from vici_bridge.vici.codec import Message, with_json
from vici_bridge.vici.control import ControlServer, Response
from vici_bridge.vici.views import SaView

from .. import __version__, service
from ..requests import MOBILE, plain_address
from ..views import charon_json
from .config import MobileFile

log = logging.getLogger("ikectx")

WHATS = ("arrive", "announce")


def run(config: MobileFile) -> int:
    """Run the agent until SIGTERM or SIGINT. Errors: IkectxError when it cannot start."""
    return service.run(config.state_dir, lambda store: MobileAgent(config, store), config.state_key)


class _Outside:
    """`parties.Outside` on this host."""

    def __init__(self, host: CharonHost, addresses: OuterAddresses, ready: Ready) -> None:
        self._host = host
        self._addresses = addresses
        self._ready = ready

    async def views(self) -> list[SaView]:
        return await self._host.views()

    def known(self) -> list[SaView] | None:
        return self._ready.views()

    def changed(self) -> None:
        self._ready.changed()

    def has(self, address: Address) -> bool:
        return self._addresses.is_local(address)

    def addresses(self) -> list[Address]:
        return self._addresses.listed()

    def towards(
        self, remote: Address, *, avoid: Sequence[Address] = (), among: Sequence[Address] = ()
    ) -> Address | None:
        return self._addresses.towards(remote, avoid=avoid, among=among)

    def nudge(self, remote: Address) -> None:
        self._addresses.nudge(remote)


class MobileAgent:
    """The objects of a mobile node's agent, and its control commands."""

    def __init__(self, config: MobileFile, store: SqliteStore) -> None:
        self._config = config
        self._store = store
        charon = config.charon
        self._host = CharonHost(
            HostConfig(
                addresses=config.node.settings.addresses,
                ha_local=charon.ha_local,
                ha_remote=charon.ha_remote,
                ha_port=charon.ha_port,
                vici=charon.vici,
                kernel_esp=charon.kernel_esp,
                oseq_jump=config.node.settings.oseq_jump,
                mobile_node=True,
            ),
            store,
        )
        self._addresses = OuterAddresses()
        self._ready = Ready(self._host)
        self._mobile = CharonMobile(self._host)
        self._farewells = Farewells(self._mobile)
        self.handovers = Handovers(
            config.node,
            _Outside(self._host, self._addresses, self._ready),
            self._mobile,
            store,
            farewells=self._farewells,
        )
        self._held = HeldRequests() if charon.kernel_esp and config.node.settings.update_spi else None
        self._spis = SpiWatch(
            self._host,
            self._mobile,
            self.handovers.lock,
            self._farewells,
            allowed=config.node.settings.update_spi,
            held=self._held,
        )
        self._spis.invited = self.handovers.arrive
        self.handovers.answering = self._spis.answering if config.node.settings.update_spi else None
        self._control = ControlServer(
            str(config.control.socket),
            {
                "version": self.version,
                "status": self.status,
                "handover": self.handover,
                "cancel": self.cancel,
                "resync": self.resync,
                "rotate-key": self.rotate_key,
            },
            streamed={"handover": "handover-progress"},
            group=config.control.group,
            takes=MOBILE,
        )
        self._work: set[asyncio.Task[MobileReport]] = set()
        self._started = time.time()

    async def start(self) -> None:
        """Begin with the HA address, because charon may start at any time. Errors: IkectxError."""
        self._host.on_change = self._sas_changed
        await self._host.open()
        passive = self._mobile.left_passive()
        if self._held is not None:
            keep_packets()
            await self._held.start()
        try:
            self._addresses.watch(self._addresses_changed)
        except KernelError as error:
            log.warning("%s; an announced move must be completed by `ikectx mobile handover`", error)
        # open handovers are completed before a new one begins
        self._host.spawn(self._resume(passive))
        await self._control.start()
        log.info("mobile node's agent %s serves %s", __version__, self._config.control.socket)

    async def _resume(self, passive: Mapping[SaName, IkeContext]) -> None:
        # an error about one SA must not leave the others passive, because only this agent makes them active
        try:
            await self._spis.resume()
        except IkectxError as error:
            log.error("SPIs that were being changed when the agent ended: %s", error)
        self._spis.start()
        async with self.handovers.lock:
            ended = await self._mobile.resume()
        for sa, name in ended.items():
            try:
                if sa in passive:
                    await self._leave(sa, name, passive[sa])
            except IkectxError as error:
                log.error("an SA that ended while no agent ran may stay at its gateway: %s", error)
        await self._ask_again()

    async def _leave(self, sa: SaName, name: SaName, context: IkeContext) -> None:
        """An SA was ended here while it was passive and no agent ran: delete it at the gateways that may have
        it."""
        asked = [one for one in self.handovers.notes.in_question() if one["spi_i"] == sa.spi_i.hex()]
        names = [name for one in asked for name in (one["to"], one["from"])]
        found = self._config.node.gateway_at(context.remote.address)
        gateways = [self._config.node.gateway(name) for name in names] or (
            [found] if found is not None else []
        )
        # the gateway may or may not have received the last message of charon or of an agent
        ids = tuple(range(max(0, context.mid_initiator - 1), context.mid_initiator + 2))
        under = [(context.current, ids)]
        if name != sa:
            under.append((replace(context.current, spi_i=name[0], spi_r=name[1]), (0,)))
        deletes: list[Told] = []
        for gateway in gateways:
            for address in gateway.addresses:
                own = self._addresses.towards(
                    address, avoid=context.local_vips, among=self._config.node.settings.addresses
                )
                if own is not None:
                    ends = Endpoint(own, context.local.port), Endpoint(address, context.remote.port)
                    deletes += [(keys, *ends, numbers) for keys, numbers in under]
        await self._farewells.say((sa, name), deletes)

    async def _ask_again(self) -> None:
        """The new gateway may have taken an SA that an earlier agent asked it to take: ask it again, which
        tells."""
        while True:
            try:
                listed = [view.spis for view in await self._host.views()]
                break
            except (CharonError, WireError):  # charon starts after its agent
                await asyncio.sleep(1)
        self.handovers.notes.only(listed)
        for asked in self.handovers.notes.in_question():
            sa = SaName.from_key(asked["spi_i"] + asked["spi_r"])
            log.warning("%s was asked to serve %s: asking again", asked["to"], asked["connection"])
            try:
                await self.handovers.arrive(asked["to"], sa)
            except IkectxError as error:
                log.warning("handover to %s: %s", asked["to"], error)

    def _sas_changed(self, change: RecordChange | None) -> None:
        self._ready.changed(change)
        self._spis.changed(change)

    @trace.spanned("addresses changed")
    def _addresses_changed(self) -> None:
        self.handovers.addresses_changed()
        self._spis.changed()

    async def stop(self) -> None:
        """End open work; an SA that is moving just now is made active first."""
        await self._control.close()
        await self._spis.close()
        if self._held is not None:
            self._held.close()
        await self.handovers.close()
        for work in list(self._work):
            work.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        await self._farewells.close()
        self._addresses.close()
        await self._host.close()

    # Control commands. Each answer has the whole as JSON under `json`.

    async def version(self, request: Message) -> Message:
        answer = {"daemon": "ikectx-mobile", "version": __version__, "charon": self._host.ha_version.charon}
        return with_json(answer, **answer)

    async def status(self, request: Message) -> Message:
        views: Sequence[SaView] = ()
        with contextlib.suppress(CharonError, WireError):
            views = await self._host.views()
            self.handovers.notes.only([view.spis for view in views])
        answer: dict[str, object] = {
            "version": __version__,
            "uptime": int(time.time() - self._started),
            "charon": charon_json(self._host),
            "esp": self._config.charon.esp,
            "sas": [self._view_json(view) for view in views],
            "gateways": [self._gateway_json(gateway.name) for gateway in self._config.node.gateways],
            "aside": [asdict(one) for one in self._store.aside()],
            "announced": self.handovers.status(),
            "in_question": self.handovers.notes.in_question(),
            "last": self.handovers.notes.last(),
            "renamed": self._spis.renamed,
            "watched": self._spis.watched,
        }
        return with_json(answer, sas=len(views))

    def _view_json(self, view: SaView) -> dict[str, object]:
        gateway, obstacle = self._config.node.gateway_at(view.remote.address), self._host.obstacle(view)
        return {
            "name": view.name,
            "ike_id": view.unique_id,
            "state": view.state,
            "gateway": gateway.name if gateway is not None else None,
            "local": str(view.local),
            "remote": str(view.remote),
            "spi_i": view.spi_i.hex(),
            "spi_r": view.spi_r.hex(),
            "vips": [str(vip) for vip in view.local_vips],
            "children": [child.name for child in view.children if child.state == "INSTALLED"],
            "tasks": list(view.tasks),
            "movable": view.state == "ESTABLISHED" and gateway is not None and obstacle is None,
            "reason": "" if obstacle is None else str(obstacle),
        }

    def _gateway_json(self, name: str) -> dict[str, object]:
        gateway = self._config.node.gateway(name)
        found: dict[str, object] = {"name": name}
        for address in gateway.addresses:
            own: Address | None = None
            with contextlib.suppress(KernelError):
                own = self._addresses.towards(address, among=self._config.node.settings.addresses)
            found[str(address)] = f"from {own}" if own is not None else "no way there"
        return found

    async def handover(self, request: Message) -> AsyncIterator[Message]:
        to = request.get("to", "")
        what = request.get("what") or "arrive"
        if not to:
            raise UsageError("handover needs the name of the gateway it goes to (`to`)")
        if what not in WHATS:
            raise UsageError(f"what is {' or '.join(WHATS)}, not {what!r}")
        sa = await self._select(request)
        items: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()
        if what == "announce":
            leaving = request.get("leaving") == "yes"
            work = asyncio.create_task(
                self.handovers.announce(to, sa, leaving=leaving, tell=items.put_nowait)
            )
        else:
            address = _address(request.get("address", ""))
            anew = request.get("anew") == "yes"
            work = asyncio.create_task(
                self.handovers.arrive(to, sa, address=address, anew=anew, tell=items.put_nowait)
            )
        self._work.add(work)
        work.add_done_callback(self._work.discard)
        async for item in service.until_done(work, items):
            yield with_json(item, **{key: str(value) for key, value in item.items()})
        report: MobileReport = await work
        answer = report.to_json()
        flat = {key: str(answer[key]) for key in ("result", "exit_code", "from", "to")}
        yield Response(with_json(answer, **flat))

    async def cancel(self, request: Message) -> Message:
        found = await self.handovers.cancel()
        return with_json({"cancelled": found}, cancelled=found)

    async def rotate_key(self, request: Message) -> Message:
        return service.rotate(self._store, self._config.state_dir, self._config.state_key, request)

    async def resync(self, request: Message) -> Message:
        await self._host.resync()
        return {}

    async def _select(self, request: Message) -> SaName | None:
        """The SA that `ike` or `ike-id` names; None: the only one. Errors: UnknownSaError, UsageError."""
        ike, number = request.get("ike", ""), request.get("ike-id", "")
        if ike and number:
            raise UsageError("name the SA by ike or by ike-id")
        if not ike and not number:
            return None
        views = [
            view
            for view in await self._host.views()
            if (ike and view.name == ike) or (number and str(view.unique_id) == number)
        ]
        if len(views) != 1:
            raise UnknownSaError(
                f"{len(views)} IKE_SAs answer to {ike or number}", hint="`ikectx mobile status` shows them"
            )
        return views[0].spis


def _address(text: str) -> Address | None:
    if not text:
        return None
    try:
        return plain_address(text)
    except ValueError:
        raise UsageError(f"{text!r} is not an IP address") from None
