"""`ikectx serve`: the agent of one gateway, which joins library, bridge and mobile extension.

One process owns the HA socket, the VICI connection, XFRM and the CXTP endpoint, and offers its functions on
the control socket, as VICI commands. It makes no decisions about a transfer: `ikectx.engine.tables` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from ikectx.disk.store import SqliteStore
from ikectx.driver import GatewayHooks
from ikectx.engine.journaled import MobileConfig, TransferPolicy
from ikectx.engine.report import TransferEvent, TransferReport, mn_label
from ikectx.errors import (
    CharonError,
    IkectxError,
    LinkError,
    StateError,
    UnknownSaError,
    UsageError,
    WireError,
)
from ikectx.gateway import Gateway
from ikectx.net.door import Door
from ikectx.net.mn_udp import MnServer
from ikectx.net.plain import plain_dial, plain_listen
from ikectx.peer import PeerConfig
from ikectx.sa.context import Address, Endpoint, IkeContext
from ikectx.sa.name import SaName
from ikectx.timing import Timing
from mobike_ext.naming import asks_for_names
from mobike_ext.packet_hold import Held
from mobike_ext.watch import Watcher
from vici_bridge.announcing import announce_to_relayed
from vici_bridge.effects.sink import CharonSink
from vici_bridge.effects.source import CharonSource
from vici_bridge.exchanges import MnEnder, MnMover, MnRenamer, MnSettler, MnTeller
from vici_bridge.host import CharonHost
from vici_bridge.host_config import HostConfig
from vici_bridge.kernel.ha_users import HaUsers
from vici_bridge.kernel.mute import MARK
from vici_bridge.kernel.spd_watch import SpdGuard
from vici_bridge.old_store import look_at_store
from vici_bridge.policy.admission import numbered
from vici_bridge.policy.allowed import AllowedConnection
from vici_bridge.policy.identities import reauthentication
from vici_bridge.roaming import follow_esp, passed_on
from vici_bridge.vici.codec import Message, with_json
from vici_bridge.vici.control import ControlServer, Response

from . import __version__, service
from .config import ByPacketConfig, Config
from .detours import find, names, need_ways
from .in_doubt import InDoubt, operator
from .leases import warned
from .move_log import log_event
from .render import context_json
from .requests import ADDRESSES, GATEWAY, plain_address
from .settings import left_quietly, with_numbers, within_patience
from .views import charon_json, sa_name, select, view_json

log = logging.getLogger("ikectx")

CALL_BACK_TRIES = 3
"""Requests, for each of two message IDs, to a mobile node whose transfer is undone."""
SETTLE_TRIES = 4
"""Requests at most, for each of two message IDs, to a mobile node that is asked for the next one; it is
waiting."""
EVERY = 1_000_000_000
"""As many entries of the history as there may be."""
HOOK_PATIENCE = 5.0
"""Seconds that charon waits in its updown script for a handover to let the SA go."""


def run(config: Config) -> int:
    """Run the agent until SIGTERM or SIGINT. Errors: IkectxError when it cannot start."""
    socket = Path(config.control.socket)
    mark = socket.with_name(socket.name.removesuffix(".vici") + ".mark")  # each socket has its own
    return service.run(config.state_dir, lambda store: Agent(config, store), config.state_key, mark)


def host_config(config: Config) -> HostConfig:
    """The bridge's part of the configuration, with what charon's own says."""
    numbers = with_numbers(config.charon)
    return HostConfig(
        ports=(numbers.port, numbers.port_nat_t),
        ha_buflen=numbers.ha_buflen,
        addresses=config.gateway.addresses,
        ha_local=config.charon.ha_local,
        ha_remote=config.charon.ha_remote,
        ha_port=config.charon.ha_port,
        vici=config.charon.vici,
        segments=numbers.segments,
        kernel_esp=config.charon.esp == "kernel",
        updown={name: conn.updown for name, conn in config.connections.items() if conn.updown},
        host_access=frozenset(name for name, conn in config.connections.items() if conn.hostaccess),
        forward_via={peer.name: peer.forward_via for peer in config.peers},
        announced=frozenset(name for name, conn in config.connections.items() if conn.announces),
        agents=frozenset(name for name, conn in config.connections.items() if conn.agents),
        oseq_jump=config.transfer.oseq_jump,
        late=config.transfer.late_seconds,
        early=int(config.transfer.predictive_seconds) + 60,
        collision=config.transfer.collision,
        spi_min=config.charon.spi_min,
        spi_max=config.charon.spi_max,
        rekey_after=config.transfer.rekey_after,
        rules={name: conn.rules for name, conn in config.connections.items()},
        peers={peer.name: frozenset(_addresses([peer.host])) for peer in config.peers},
        updown_helper=config.updown_helper or "",
    )


def _addresses(hosts: Iterable[str]) -> Iterator[Address]:
    """The hosts that are written as addresses, not as names."""
    for host in hosts:
        with contextlib.suppress(ValueError):
            yield ip_address(host)


class Agent:
    """The objects of one gateway's agent, and its control commands."""

    def __init__(self, config: Config, store: SqliteStore) -> None:
        self._config = config
        self._store = store
        self._host = CharonHost(host_config(config), store)
        addresses = config.gateway.addresses
        tries, timeout = within_patience(
            config.charon.vici, config.transfer.mn_tries, config.transfer.mn_timeout
        )
        call_back = min(tries, CALL_BACK_TRIES)
        self._source = CharonSource(
            self._host,
            MnMover(addresses, call_back, timeout, MARK),
            MnEnder(call_back, timeout, MARK),
            MnTeller(call_back, timeout, MARK),
        )
        self._sink = CharonSink(
            self._host,
            MnMover(addresses, tries, timeout, MARK),
            MnRenamer(addresses, tries, timeout, MARK),
            MnSettler(min(tries, SETTLE_TRIES), timeout, MARK),
            _recorder,
        )
        self._peers = [
            PeerConfig(
                peer.name,
                peer.host,
                peer.port,
                frozenset(peer.rights),
                peer.identity,
                sources=peer.connects_from,
                connections=peer.connections,
                identities=peer.identities,
                to_connections=peer.to_connections,
                to_identities=peer.to_identities,
            )
            for peer in config.peers
        ]
        timing = Timing(offer=config.transfer.prepare_timeout, predictive=config.transfer.predictive_seconds)
        self._timing = timing
        self._guard: SpdGuard | None = None
        self._doors: list[Door] = []
        self._mn_server: MnServer | None = None
        self._watcher: Watcher | None = None
        self._host.away.passing.began = self._watch_relayed
        tls = dial = None
        if config.transfer.transport == "ipsec":
            self._guard = SpdGuard()
            dial = plain_dial(timing, self._protocol, self._guard, self._listen)
        else:
            tls = config.transfer.tls
        self._gateway = Gateway(
            config.name,
            self._source,
            self._sink,
            store,
            self._peers,
            tls,
            policy=TransferPolicy(
                timing,
                config.transfer.oseq_jump,
                durable=False,  # after a loss of power charon's and the kernel's SAs are lost as well
                mobile=self._mobile(),
            ),
            hooks=GatewayHooks(self._observe, self._host.follow.hear, dial),
        )
        self._host.origins.tell = self._gateway.tell
        self._doubts = InDoubt(self._host, self._gateway)
        self._control = ControlServer(
            str(config.control.socket),
            {
                "version": self.version,
                "status": self.status,
                "list-contexts": self.list_contexts,
                "show-context": self.show_context,
                "transfer": self.transfer,
                "pull": self.pull,
                "history": self.history,
                "verify-history": self.verify_history,
                "resync": self.resync,
                "rotate-key": self.rotate_key,
                "reload": self.reload,
                "cancel": self.cancel,
                "resolve": self.resolve,
                "updown": self.updown,
                "detours": self.detours,
            },
            streamed={
                "list-contexts": "list-context",
                "transfer": "transfer-progress",
                "pull": "pull-progress",
                "history": "history-entry",
            },
            events={"transfer-state"},
            group=config.control.group,
            takes=GATEWAY,
        )
        self._started = time.time()

    async def start(self) -> None:
        """Begin with the HA address, then the control socket, then peers, because charon may start at any
        time."""
        charon = self._config.charon
        if charon.ha_users:
            ends = (charon.ha_local, charon.ha_remote)
            users = HaUsers(charon.ha_users, os.geteuid(), ends, charon.ha_port)
            await asyncio.to_thread(users.install)
            self._host.reloads.users = users
        await self._host.open()
        await look_at_store(self._host, self._store)
        self._source.resume()
        self._sink.resume()
        await self._gateway.start(self._listen if self._guard is None else ())
        if self._guard is None:
            self._gateway.keep_links()
        else:  # a link would keep an SA of charon's up
            self._doors = await plain_listen(
                self._timing, self._protocol, self._guard, self._listen, self._peers, self._gateway.accept
            )
            for door in self._doors:
                await door.start_serving()
        if self._config.mobile is not None:
            mobile = self._config.mobile
            listen = [Endpoint(ip_address(item.host), item.port) for item in mobile.listen]
            self._mn_server = MnServer(listen, self._gateway.ctar, mobile.rate, mobile.source_rate)
            await self._mn_server.start()
        if self._config.by_packet is not None:
            self._watch()
        self._host.spawn(follow_esp(self._host))
        if after := self._config.transfer.announce_after:
            self._host.spawn(announce_to_relayed(self._host, after, self._gateway.announce))
        await self._control.start()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up)
        log.info("agent %s %s serves %s", self._config.name, __version__, self._config.control.socket)

    async def stop(self) -> None:
        await self._control.close()
        if self._watcher is not None:
            await self._watcher.close()
        if self._mn_server is not None:
            await self._mn_server.close()
        for door in self._doors:
            door.close()
        await self._gateway.stop()
        if self._guard is not None:
            self._guard.close()
        await self._host.close()

    def _mobile(self) -> MobileConfig | None:
        found = self._config.mobile
        return None if found is None else MobileConfig(found.rfc_token, found.clock_skew)

    def _is_here(self, sa: SaName) -> bool:
        return sa in self._host.record

    def _watch(self) -> None:
        """Hear IKE of SAs that are not here, for [by_packet] or for relayed mobile nodes."""
        if self._watcher is None:
            bounds = self._config.by_packet or ByPacketConfig(())
            watcher = Watcher(
                self._config.gateway.addresses,
                self._is_here,
                self._ask_for,
                ports=self._host.config.ports,
                memory=bounds.memory,
                rate=bounds.rate,
            )
            watcher.start()
            self._watcher = watcher

    def _watch_relayed(self) -> None:
        try:
            self._watch()
        except LinkError as error:
            log.warning("relayed mobile nodes that roam will not be followed: %s (%s)", error, error.hint)

    async def _ask_for(self, datagrams: tuple[bytes, ...], local: Endpoint, remote: Endpoint) -> bool:
        """An IKE message of an SA that is not here arrived: get the SA from one of [by_packet] ask."""
        if await passed_on(self._host.away, datagrams, local, remote) or self._config.by_packet is None:
            return False
        report = await self._gateway.packet(datagrams, local, remote, self._config.by_packet.ask)
        return report is not None and report.result == "moved"

    @property
    def _plain_peers(self) -> frozenset[str]:
        """Addresses of gateways that are reached through an IKE_SA of this charon."""
        return frozenset(peer.host for peer in self._peers) if self._guard is not None else frozenset()

    @property
    def _listen(self) -> list[tuple[str, int]]:
        return [(item.host, item.port) for item in self._config.transfer.listen]

    @property
    def _protocol(self) -> Literal["tcp", "sctp"]:
        return "sctp" if self._config.transfer.protocol == "sctp" else "tcp"

    def _observe(self, event: TransferEvent) -> None:
        log_event(log, event, self._config.name)
        if self._control.heard("transfer-state"):
            self._control.emit("transfer-state", _event_json(event))

    # Control commands. Each item and answer has the whole as JSON under `json`.

    async def version(self, request: Message) -> Message:
        answer = {
            "daemon": "ikectx",
            "version": __version__,
            "name": self._config.name,
            "charon": self._host.ha_version.charon,
        }
        return with_json(answer, **answer)

    async def status(self, request: Message) -> Message:
        answer: dict[str, object] = {
            "name": self._config.name,
            "version": __version__,
            "uptime": int(time.time() - self._started),
            "charon": charon_json(self._host),
            "sas": len(self._host.record.names()),
            "esp": self._config.charon.esp,
            "spis": self._config.charon.spi_max - self._config.charon.spi_min + 1,
            **{key: value for key, value in self._gateway.status().items() if key != "name"},
        }
        answer["aside"] = [asdict(one) for one in self._store.aside()]
        answer["detours"] = [row.to_json() for row in self._host.away.listing()]
        if self._doors:
            places = [door.address for door in self._doors]
            answer["listening"] = [{"host": host, "port": port} for host, port in places]
        return with_json(answer, name=self._config.name)

    async def list_contexts(self, request: Message) -> AsyncIterator[Message]:
        views = await self._host.views()
        connections = await self._allowed({view.name for view in views})
        for view in views:
            rules = self._host.config.rules.get(view.name)
            others = () if rules is None else rules.local_ids
            found = view_json(view, self._host.obstacle(view, views), *self._source.way(view))
            found["warning"] = reauthentication(view, connections.get(view.name), others)
            yield with_json(found, name=view.name)

    async def _allowed(self, names: Collection[str]) -> Mapping[str, AllowedConnection]:
        """charon's connections of these names; none if they cannot be read."""
        try:
            told = await self._host.connections(names)
            return {name: AllowedConnection.read(name, one, numbered) for name, one in told.items()}
        except (CharonError, WireError):
            return {}

    async def show_context(self, request: Message) -> Message:
        views = await select(self._host.known, request, self._plain_peers)
        if len(views) != 1:
            raise UnknownSaError(f"{len(views)} IKE_SAs match, one is to be shown")
        # an SA that is only shown need not be idle
        context = await self._source.export(views[0].spis, away=True)
        return with_json(context_json(context, secrets=request.get("secrets") == "yes"))

    async def transfer(self, request: Message) -> AsyncIterator[Message]:
        to = request.get("to", "")
        if not to:
            raise UsageError("transfer needs the name of the gateway it goes to (`to`)")
        address = request.get("address", "auto")
        if address not in ADDRESSES:
            raise UsageError(f"address is {', '.join(ADDRESSES)}, not {address!r}")
        views = await select(self._host.known, request, self._plain_peers)
        names = [view.spis for view in views]
        no_detour, dry_run = (request.get(key) == "yes" for key in ("no-detour", "dry-run"))
        if not no_detour and any(peer.name == to for peer in self._peers):
            need_ways(views, to, self._host.away.stranded, self._config.connections)
        queue: asyncio.Queue[TransferEvent] = asyncio.Queue()
        with self._host.away.without_detour(names if no_detour else ()):
            work = asyncio.create_task(
                self._gateway.transfer_all(
                    names,
                    to,
                    address=ADDRESSES[address],
                    dry_run=dry_run,
                    parallel=self._config.transfer.concurrency,
                    progress=queue.put_nowait if self._control.heard("transfer-progress") else None,
                    asked_by=operator(),
                )
            )
            async for event in service.until_done(work, queue):
                yield _event_json(event)
            reports = await work
            if dry_run:
                leases = {view.spis: view.remote_vips for view in views}
                reports = warned(reports, leases, await self._host.vici.pools())
            yield _reports(reports)

    async def pull(self, request: Message) -> AsyncIterator[Message]:
        from_ = request.get("from", "")
        if not from_:
            raise UsageError("pull needs the name of the gateway it comes from (`from`)")
        try:
            mn = plain_address(request.get("mn", ""))
        except ValueError:
            raise UsageError(f"mn is not an IP address: {request.get('mn', '')!r}") from None
        queue: asyncio.Queue[TransferEvent] = asyncio.Queue()
        work = asyncio.create_task(
            self._gateway.pull(
                from_,
                mn,
                sa=sa_name(request.get("sa", "")),
                dry_run=request.get("dry-run") == "yes",
                progress=queue.put_nowait if self._control.heard("pull-progress") else None,
                asked_by=operator(),
            )
        )
        async for event in service.until_done(work, queue):
            yield _event_json(event)
        yield _reports([await work])

    async def history(self, request: Message) -> AsyncIterator[Message]:
        limit = _number(request, "limit", 100, 1, EVERY)
        audit = request.get("audit") == "yes"
        for entry in self._gateway.audit(limit) if audit else self._gateway.history(limit):
            yield with_json(entry)

    async def verify_history(self, request: Message) -> Message:
        return with_json(self._gateway.verify(request.get("head", "")).to_json())

    async def resync(self, request: Message) -> Message:
        await self._host.resync()
        return {}

    async def rotate_key(self, request: Message) -> Message:
        return service.rotate(self._store, self._config.state_dir, self._config.state_key, request)

    async def reload(self, request: Message) -> Message:
        """Certificate, key, CAs and revocation lists, as SIGHUP does."""
        if self._guard is not None:
            raise UsageError('there are no certificates with transport = "ipsec"')
        self._gateway.reload()
        return {}

    def _hang_up(self) -> None:
        try:
            self._gateway.reload()
        except IkectxError as error:
            log.error("SIGHUP: %s", error)

    async def cancel(self, request: Message) -> Message:
        name = request.get("transfer", "")
        if self._gateway.cancel(name):
            return {}
        if not self._gateway.knows(name):
            raise UsageError(
                f"there is no transfer {name!r}", hint="`ikectx status` shows those that are open"
            )
        raise StateError(
            "that transfer cannot be cancelled any more",
            hint="`ikectx status` shows what is open; once let go, only the other gateway decides",
        )

    async def resolve(self, request: Message) -> Message:
        """What is in doubt here: one transfer or SA, or all; with `decision` (reclaim, give-up) it is ended
        so."""
        return with_json(await self._doubts.resolve(request.get("transfer", ""), request.get("decision", "")))

    async def detours(self, request: Message) -> Message:
        """The SAs that left this gateway; with `end`, nothing is sent on any more for the SA of that name.

        `behind`: blocks for SAs that came here and may end.
        """
        away, name = self._host.away, request.get("end", "")
        unblock = request.get("unblock") == "yes"
        left = find(away.listing(), name) if any(names(row, name) for row in away.listing()) else None
        came = away.behind.end(name) if name and unblock else 0
        if name and (left or not came):
            away.end(left or find(away.listing(), name), unblock=unblock)
        behind = [block.to_json() for block in away.behind.listing()]
        return with_json({"detours": [row.to_json() for row in away.listing()], "behind": behind})

    async def updown(self, request: Message) -> Message:
        """The updown hook's message. An SA of a connection with `handover_to` is handed over when its mobile
        node leaves.

        charon waits for the hook, the hook for this answer: it is sent when the SA has been let go, or the
        transfer has failed, so that the ESP SAs can still be read until then.
        """
        if request.get("verb") != "down":
            return {"action": "none"}
        reqid = _number(request, "reqid", 0, 0, 0xFFFFFFFF)
        handed = {name: to for name, one in self._config.connections.items() if (to := one.handover_to)}
        # the hook knows only the child's name (PLUTO_CONNECTION), and connections are the IKE_SA's
        found = self._source.departing_by_reqid(reqid, handed)
        if found is None:  # a child alone, whose IKE_SA lives on
            return {"action": "none"}
        least = await asyncio.to_thread(left_quietly, self._config.charon.vici)
        if found[0] in self._source.departing:  # the second of several selector pairs
            return {"action": "none"}
        sa, context, quiet = found
        name, to = context.connection, handed[context.connection]
        if quiet < least:
            log.info(
                "an SA of %s (%s) went down %.0f s after its last IKE request: deleted on purpose",
                mn_label(context), name, quiet,
            )  # fmt: skip
            return {"action": "none", "reason": "the SA was deleted on purpose"}
        self._source.departing.add(sa)
        left = asyncio.Event()
        self._host.spawn(self._hand_over(sa, mn_label(context), to, left))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(left.wait(), HOOK_PATIENCE)
        return {"action": "transfer", "to": to}

    async def _hand_over(self, sa: SaName, mn: str, to: str, left: asyncio.Event) -> None:
        def seen(event: TransferEvent) -> None:
            if event.state.upper() in ("RELEASED", "KEPT", "REFUSED", "LOST"):
                left.set()

        try:
            await self._gateway.transfer(sa, to, progress=seen, asked_by="handover_to: its mobile node left")
        except IkectxError as error:
            log.warning("%s has gone silent, and its SA is not moved to %s: %s", mn, to, error)
        finally:
            left.set()
            self._source.departing.discard(sa)


def _recorder(here: IkeContext, request: tuple[bytes, ...]) -> Held:
    """Records requests of an SA's mobile node while the SA is mute, except those that charon cannot answer.
    `request`: one that came before."""
    skip = partial(asks_for_names, here.current)
    return Held(here.spis, here.local, here.remote, mark=MARK, skip=skip, request=request)


def _reports(reports: Sequence[TransferReport]) -> Response:
    return Response(
        with_json(
            {"reports": [report.to_json() for report in reports]},
            moved=sum(report.result == "moved" for report in reports),
            total=len(reports),
        )
    )


def _event_json(event: TransferEvent) -> Message:
    flat: dict[str, Any] = {
        "transfer": event.transfer_id,
        "role": event.role,
        "peer": event.peer,
        "phase": event.state,
        "mn": event.mn,
        "ms": round(event.ms, 1),
        "detail": event.detail,
    }
    report = event.report.to_json() if event.report is not None else None
    return with_json({**flat, "sa": event.sa.pair, "report": report}, **flat)


def _number(request: Message, key: str, default: int, low: int, high: int) -> int:
    """A number of a request. Errors: UsageError, also for one that is not in low..high."""
    try:
        number = int(request.get(key) or default)
    except ValueError:
        raise UsageError(f"{key} is not a number: {str(request.get(key))[:40]!r}") from None
    if not low <= number <= high:
        raise UsageError(f"{key} must be a number from {low} to {high}")
    return number
