"""A gateway that hands its SAs to others and takes theirs: the asyncio endpoint of the engine (I/O).

    store = open_store("/var/lib/ikectx", now=time.time())
    gateway = Gateway("psg", source, sink, store, [PeerConfig("nsg", "192.0.2.2")], TlsConfig(cert, key, ca))
    await gateway.start([("192.0.2.1", 5091)])
    report = await gateway.transfer((spi_i, spi_r), "nsg")

`source` and `sink` are `ports`; all decisions are `transfer`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace as changed
from ipaddress import ip_address
from typing import Any
from weakref import WeakValueDictionary

from .context import Address as IpAddress
from .cxtp import Ctc, Ctd, Message, Pctd
from .errors import (
    BusyError,
    ConfigError,
    IkectxError,
    StateError,
    UnknownSaError,
    UsageError,
    WireError,
)
from .incoming import Desk
from .links import Dial, Link, Links, PeerConfig, Stream, TlsConfig, tls_dial, tls_listen
from .numbers import Status
from .outgoing import Address, Outgoing
from .ports import Clock, ContextSink, ContextSource, SaName
from .run import Observer, Parts, log_mistake
from .store import JournalEntry, SqliteStore
from .transfer import (
    OSEQ_JUMP,
    SOURCE_STANDS,
    SourceInput,
    SourceState,
    Timing,
    TransferEvent,
    TransferReport,
    sa_json,
    status_json,
)

log = logging.getLogger("ikectx.aio")


class MonotonicClock:
    """`ports.Clock` of this machine."""

    def now(self) -> float:
        return time.monotonic()


class Gateway:
    """One gateway: its peers, its transfers in both directions, its journal."""

    def __init__(
        self,
        name: str,
        source: ContextSource,
        sink: ContextSink,
        store: SqliteStore,
        peers: Sequence[PeerConfig],
        tls: TlsConfig | None = None,
        *,
        timing: Timing | None = None,
        oseq_jump: int = OSEQ_JUMP,
        busy_attempts: int = 5,
        durable: bool = True,
        clock: Clock | None = None,
        wall: Callable[[], float] = time.time,
        observer: Observer | None = None,
        dial: Dial | None = None,
    ) -> None:
        """`oseq_jump`: the sinks' (packets). `observer` sees every change of state of every transfer.

        `durable`: the journal is on the disk itself before an SA is let go or taken. That costs the MN a sync
        of the disk on each side, and is needed only where SAs outlive a loss of power; charon's do not.

        `dial` replaces TLS (other transports, tests); the other side then gives its streams to `accept`.
        Errors: ConfigError.
        """
        self.name = name
        self._parts = Parts(
            name,
            source,
            sink,
            store,
            timing or Timing(),
            clock or MonotonicClock(),
            wall,
            oseq_jump,
            durable,
            observer,
        )
        self._peers = {peer.name: peer for peer in peers}
        certified = {peer.certified: peer for peer in peers}
        if not len(peers) == len(self._peers) == len(certified):
            raise ConfigError("two peers have one name", hint="each peer needs names of its own")
        self._certified = certified
        self._busy_attempts = busy_attempts
        self._tls = tls
        self._dial = dial
        self._links: Links | None = None
        self._servers: list[asyncio.Server] = []
        self._listening: list[tuple[str, int]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._outgoing: dict[bytes, Outgoing] = {}
        self._asked_for: set[SaName] = set()
        self._mn_locks: WeakValueDictionary[tuple[str, IpAddress], asyncio.Lock] = WeakValueDictionary()
        self._desks: dict[tuple[str, IpAddress], Desk] = {}

    # -- life --------------------------------------------------------------------------------------------

    async def start(self, listen: Sequence[tuple[str, int]] = ()) -> None:
        """Recover what the journal has open, then listen on these addresses and ports.

        Errors: LinkError when a port cannot be had, ConfigError for unusable certificates, StoreError.
        """
        if self._links is not None:
            raise StateError("the gateway runs already")
        if self._tls is None and (listen or self._dial is None):
            raise ConfigError("a gateway without TLS configuration needs `dial` and cannot listen")
        dial = self._dial or tls_dial(_given(self._tls), self._parts.timing)
        self._links = Links(dial, self._parts.timing, self._arrived)
        try:
            if listen:
                self._servers = await tls_listen(_given(self._tls), self._parts.timing, listen, self.accept)
            for line in await self.recover():
                log.info("recovered: %s", line)
            for server in self._servers:
                await server.start_serving()
                self._listening += [sock.getsockname()[:2] for sock in server.sockets]
        except BaseException:
            await self.stop()
            raise

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where it listens; with the port that was had for port 0."""
        return list(self._listening)

    async def stop(self) -> None:
        """Cancel what has not been let go, wait a little, close. What is open stays in the journal."""
        links, self._links = self._links, None
        for server in self._servers:
            server.close()
        self._servers, self._listening = [], []
        runs = list(self._outgoing.values())
        for run in runs:
            run.signals.put_nowait(SourceInput.CANCEL)
        for desk in self._desks.values():
            desk.post.put_nowait(None)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._parts.timing.stop)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for run in runs:
            if not run.settled.done():
                run.settled.set_result(run.report())
        if links is not None:
            await links.close()

    async def recover(self) -> list[str]:
        """Take up what the journal has open, in the background; one line for each. `start` does it."""
        lines = []
        for entry in self._parts.store.open_transfers():
            ident = entry.transfer_id.hex()
            if entry.transfer_id in self._outgoing or self._is_open_here(entry):
                continue
            try:
                lines.append(f"{ident} ({entry.role}, {entry.mn}, {entry.state}): {self._take_up(entry)}")
            except (WireError, ValueError) as error:
                log.error("transfer %s cannot be taken up: %s", ident, error)
                lines.append(
                    f"{ident} ({entry.role}, {entry.mn}, {entry.state}): cannot be taken up: {error}"
                )
        return lines

    def _is_open_here(self, entry: JournalEntry) -> bool:
        return any(entry.transfer_id in desk.runs for desk in self._desks.values())

    def _take_up(self, entry: JournalEntry) -> str:
        peer = self._peers.get(entry.peer) or PeerConfig(entry.peer, "")
        mn = ip_address(entry.mn_address)
        if entry.role == "target":
            self._desk(peer, mn).post.put_nowait(entry)
            return "undone" if entry.state in ("checking", "preparing", "prepared", "undoing") else "finished"
        run = Outgoing.resumed(self._parts, self._running(), peer, entry)
        self._outgoing[entry.transfer_id] = run
        self._spawn(self._walk(run, self._resume(run, mn)), f"ikectx recovery {entry.transfer_id.hex()}")
        if run.machine.state is SourceState.RELEASED:
            return f"{entry.peer} is asked whether it owns the SA"
        return "cleaned up" if run.machine.state is SourceState.CLEANING else "kept and served here"

    def _mn_lock(self, run: Outgoing, mn: IpAddress) -> asyncio.Lock:
        """One transfer for each MN and peer at a time: messages name no other thing (RFC 4067)."""
        return self._mn_locks.setdefault((run.peer.name, mn), asyncio.Lock())

    async def _resume(self, run: Outgoing, mn: IpAddress) -> None:
        async with self._mn_lock(run, mn):
            await run.go(SourceInput.RESTART)

    def _running(self) -> Links:
        if self._links is None:
            raise StateError("the gateway does not run")
        return self._links

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, IkectxError):
                log.error("%s: %s", task.get_name(), error)
            else:
                log_mistake(task.get_name(), error)

    # -- outgoing ----------------------------------------------------------------------------------------

    async def transfer(
        self,
        sa: SaName,
        to: str,
        *,
        address: Address = "update",
        dry_run: bool = False,
        progress: Observer | None = None,
    ) -> TransferReport:
        """Move one IKE_SA to the peer `to`; how it ended.

        `address` "keep": the gateway's address moves along, the MN is not told. `dry_run`: all checks at both
        ends, nothing is touched. An SA that is busy is tried again `busy_attempts` times.

        Errors: UsageError (no such peer), UnknownSaError, BusyError (it is being moved), StateError
        (not started); everything else is in the report. A call
        that is cancelled cancels a transfer that has not let go.
        """
        peer = self._peers.get(to)
        if peer is None:
            known = ", ".join(sorted(self._peers)) or "none"
            raise UsageError(f"no peer is called {to!r}", hint=f"configured peers: {known}")
        links = self._running()
        if sa in self._asked_for or self._moving(sa):
            raise BusyError("that IKE_SA is being moved already", hint="`ikectx status` shows the transfer")
        if dry_run:
            run = Outgoing(
                self._parts, links, peer, sa=sa, transfer_id=secrets.token_bytes(8), address=address
            )
            await run.export()
            return await run.ask_only()
        self._asked_for.add(sa)
        try:
            for attempt in range(1, self._busy_attempts + 1):
                report = await self._attempt(peer, sa, address, progress)
                report = changed(report, attempts=attempt)
                if report.status is not Status.BUSY or report.result not in ("kept", "refused"):
                    break
                if attempt < self._busy_attempts:
                    await asyncio.sleep(self._parts.timing.busy_backoff * 2 ** (attempt - 1))
        finally:
            self._asked_for.discard(sa)
        return report

    async def _attempt(
        self, peer: PeerConfig, sa: SaName, address: Address, progress: Observer | None
    ) -> TransferReport:
        run = Outgoing(
            self._parts,
            self._running(),
            peer,
            sa=sa,
            transfer_id=secrets.token_bytes(8),
            address=address,
            observer=progress,
        )
        self._outgoing[run.transfer_id] = run
        self._spawn(self._walk(run, self._move(run)), f"ikectx transfer {run.transfer_id.hex()}")
        try:
            return await asyncio.shield(run.settled)
        except asyncio.CancelledError:
            run.signals.put_nowait(SourceInput.CANCEL)
            raise

    async def _move(self, run: Outgoing) -> None:
        await run.export()
        if run.context is None:
            await run.begin()
            return
        lock = self._mn_lock(run, run.context.remote.address)
        waited = lock.locked()
        async with lock:
            if waited:
                await run.export()
            await run.begin()

    async def _walk(self, run: Outgoing, work: Coroutine[Any, Any, None]) -> None:
        """The task of a transfer: goes on when its report has been given as "in-doubt"."""
        try:
            await work
        except UnknownSaError as error:
            run.settled.set_exception(error)
        except Exception as error:
            # a mistake in here: leave everything as it stands, the next start reads the journal
            if not run.settled.done():
                mistake = StateError(f"a mistake here: {type(error).__name__}")
                run.blame(error if isinstance(error, IkectxError) else mistake)
                run.settled.set_result(run.report())
            raise
        finally:
            self._outgoing.pop(run.transfer_id, None)
            run.over.set()
            self._tidy()

    async def transfer_all(
        self,
        sas: Iterable[SaName],
        to: str,
        *,
        address: Address = "update",
        dry_run: bool = False,
        parallel: int = 8,
        progress: Observer | None = None,
    ) -> list[TransferReport]:
        """Move many, `parallel` at a time; reports in the order of `sas`.

        An error about one SA becomes its report. Errors: UsageError, StateError.
        """
        if to not in self._peers:
            raise UsageError(f"no peer is called {to!r}", hint=f"configured peers: {', '.join(self._peers)}")
        self._running()
        limit = asyncio.Semaphore(max(1, parallel))

        async def one(sa: SaName) -> TransferReport:
            async with limit:
                try:
                    return await self.transfer(sa, to, address=address, dry_run=dry_run, progress=progress)
                except IkectxError as error:
                    return self._never_began(sa, to, error, address, dry_run)

        return list(await asyncio.gather(*(one(sa) for sa in dict.fromkeys(sas))))

    def _never_began(
        self, sa: SaName, to: str, error: IkectxError, address: Address, dry_run: bool
    ) -> TransferReport:
        _, here, there = SOURCE_STANDS[SourceState.NEW]
        unknown = isinstance(error, UnknownSaError)
        return TransferReport(
            transfer_id="",
            sa=sa,
            mn="",
            mn_address="",
            from_=self.name,
            to=to,
            result="refused" if unknown else "kept",
            status=error.status,
            text=str(error),
            hint=error.hint,
            state_here=f"{self.name} {'has no such SA' if unknown else here}",
            state_there=f"{to} {there}",
            address=address,
            dry_run=dry_run,
            exit_code=error.exit_code,
        )

    def _moving(self, sa: SaName) -> bool:
        return any(run.sa == sa for run in self._outgoing.values())

    def _find(self, transfer_id: str) -> Outgoing | None:
        try:
            return self._outgoing.get(bytes.fromhex(transfer_id))
        except ValueError:
            return None

    def cancel(self, transfer_id: str) -> bool:
        """Stop a transfer of ours. True: it will be kept; False: it has let go already, or is unknown."""
        run = self._find(transfer_id)
        if run is None or run.machine.state not in (
            SourceState.NEW,
            SourceState.OFFERED,
            SourceState.FREEZING,
        ):
            return False
        run.signals.put_nowait(SourceInput.CANCEL)
        return True

    async def reclaim(self, transfer_id: str) -> TransferReport:
        """Serve the SA of a transfer in doubt here again, whatever the peer says: the operator's word.

        If the peer owns it all the same, both gateways serve it. Errors: StateError unless it is in doubt.
        """
        run = self._find(transfer_id)
        if run is None or run.machine.state is not SourceState.RELEASED:
            raise StateError(
                f"transfer {transfer_id} is not in doubt"
                if run
                else f"no transfer {transfer_id} is open here",
                hint="`ikectx status` shows those that are",
            )
        run.signals.put_nowait(SourceInput.RECLAIM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._parts.timing.step):
                await run.over.wait()
        return run.report()

    def _tidy(self) -> None:
        """Between transfers, the journal's log goes into its database."""
        if self._parts.store.wants_checkpoint and self._links is not None:
            self._spawn(asyncio.to_thread(self._parts.store.checkpoint), "ikectx checkpoint")

    # -- incoming ----------------------------------------------------------------------------------------

    async def accept(self, stream: Stream) -> None:
        """Serve a connection that a peer has opened, until it ends."""
        peer = next((self._certified[name] for name in stream.names if name in self._certified), None)
        if peer is None or self._links is None:
            shown = ", ".join(sorted(stream.names)) or "no name"
            log.warning("refused a connection from %s: its certificate says %s", stream.label, shown)
            stream.close()
            return
        await self._links.serve(stream, peer)

    async def _arrived(self, link: Link, message: Message) -> None:
        if isinstance(message, Ctc):
            self._cancelled(link, message)
        elif isinstance(message, Pctd | Ctd):
            self._desk(link.peer, message.mn).post.put_nowait((link, message))
        else:
            log.warning("%s sent a %s: not served here", link.label, message.TYPE.name)

    def _cancelled(self, link: Link, message: Ctc) -> None:
        """A CTC names no more than the MN: it ends what can still be ended, in both directions."""
        for run in self._outgoing.values():
            if run.peer.name == link.peer.name and run.context and run.context.remote.address == message.mn:
                run.signals.put_nowait(SourceInput.CTC)
        desk = self._desks.get((link.peer.name, message.mn))
        if desk is not None:
            desk.post.put_nowait((link, message))

    def _desk(self, peer: PeerConfig, mn: IpAddress) -> Desk:
        key = (peer.name, mn)
        desk = self._desks.get(key)
        if desk is None:
            desk = self._desks[key] = Desk(self._parts, peer, mn, self._busy)
            self._spawn(self._staff(key, desk), f"ikectx desk for {peer.name}, {mn}")
        return desk

    async def _staff(self, key: tuple[str, IpAddress], desk: Desk) -> None:
        links = self._links
        try:
            with contextlib.nullcontext() if links is None else links.in_use(desk.peer):
                await desk.work()
        finally:
            del self._desks[key]
            self._tidy()

    def _busy(self, asking: Desk, sa: SaName) -> bool:
        """Is that SA in a transfer elsewhere in this gateway?"""
        return self._moving(sa) or any(desk.holds(sa) for desk in self._desks.values() if desk is not asking)

    # -- what operators read -----------------------------------------------------------------------------

    def status(self) -> dict[str, object]:
        """Peers and open transfers, as plain JSON values."""
        return {
            "name": self.name,
            "listening": [{"host": host, "port": port} for host, port in self._listening],
            "peers": [
                {
                    "name": peer.name,
                    "host": peer.host,
                    "port": peer.port,
                    "rights": sorted(peer.rights),
                    "connected": self._links is not None and self._links.connected(peer.name),
                }
                for peer in self._peers.values()
            ],
            "transfers": [_entry_json(entry) for entry in self._parts.store.open_transfers()],
        }

    def history(self, limit: int = 100) -> list[dict[str, object]]:
        """The journal, newest first, as plain JSON values."""
        return [_entry_json(entry) for entry in self._parts.store.history(limit)]


def _given(tls: TlsConfig | None) -> TlsConfig:
    if tls is None:
        raise ConfigError("no TLS configuration")
    return tls


def _entry_json(entry: JournalEntry) -> dict[str, object]:
    return {
        "transfer_id": entry.transfer_id.hex(),
        "role": entry.role,
        "peer": entry.peer,
        "sa": sa_json(entry.sa),
        "mn": entry.mn,
        "mn_address": entry.mn_address,
        "state": entry.state,
        "epoch": entry.epoch,
        "result": entry.result,
        "status": status_json(entry.status),
        "detail": entry.detail,
        "started": entry.started,
        "updated": entry.updated,
        "phases_ms": dict(entry.phases),
        "air": dict(entry.moved),
    }


__all__ = ["Gateway", "MonotonicClock", "TransferEvent"]
