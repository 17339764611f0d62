"""A gateway that hands its SAs to others and takes theirs: the asyncio endpoint of the engine (I/O).

    store = open_store("/var/lib/ikectx", now=time.time())
    gateway = Gateway("psg", source, sink, store, [PeerConfig("nsg", "192.0.2.2")], TlsConfig(cert, key, ca))
    await gateway.start([("192.0.2.1", 5091)])
    report = await gateway.transfer(SaName(spi_i, spi_r), "nsg")

`source` and `sink` implement the protocols of `engine.ports`. All decisions are made by the tables in
`engine.tables`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterable, Sequence
from functools import partial

from ikectx.disk.audit import Verified
from ikectx.disk.store import SqliteStore
from ikectx.engine.core import Announce, Arrive, Engine, Pull, Resolve, Show, Tell, Transfer
from ikectx.engine.journal import ROLES, JournalEntry
from ikectx.engine.journaled import EngineConfig, TransferPolicy
from ikectx.engine.ports import Address, ContextSink, ContextSource
from ikectx.engine.report import SOURCE_STANDS, TransferReport, sa_json, status_json
from ikectx.engine.tables import SourceState
from ikectx.engine.transfers import Decision
from ikectx.net.credentials import Credentials, TlsConfig
from ikectx.net.door import Door
from ikectx.net.links import Links, Stream
from ikectx.net.tls import tls_dial, tls_listen
from ikectx.sa.context import Address as IpAddress
from ikectx.sa.context import Endpoint, IkeContext
from ikectx.sa.name import SaName
from ikectx.wire.cxtp import Ctar
from ikectx.wire.whereabouts import Whereabouts

from .driver import Driver, GatewayHooks, Observer
from .errors import ConfigError, IkectxError, StateError, UnknownSaError, UsageError, WireError
from .peer import PeerConfig

log = logging.getLogger("ikectx.gateway")

SLOW = 1.0
"""Seconds for SAs that begin to move together, before others begin beside those that are not there yet."""


async def _room(
    moving: set[asyncio.Task[TransferReport]], most: int, group: int
) -> set[asyncio.Task[TransferReport]]:
    """Wait until a group can begin beside those that move, or until one can after `SLOW` seconds. Returns
    those that still move."""
    loop = asyncio.get_running_loop()
    end = loop.time() + SLOW
    while len(moving) > most - group:
        wait = max(0.0, end - loop.time()) if len(moving) < most else None
        done, moving = await asyncio.wait(moving, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            break
    return moving


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
        policy: TransferPolicy | None = None,
        hooks: GatewayHooks | None = None,
    ) -> None:
        """Errors: ConfigError; UsageError for a source or sink that lacks a method of its class."""
        for given, port in ((source, ContextSource), (sink, ContextSink)):
            if not isinstance(given, port):
                raise UsageError(
                    f"{type(given).__name__} lacks methods of {port.__name__}",
                    hint=f"inherit from ikectx.{port.__name__}, which has those that a daemon can do without",
                )
        self.name = name
        self._peers = {peer.name: peer for peer in peers}
        self._certified = {peer.certified: peer for peer in peers}
        if not len(peers) == len(self._peers) == len(self._certified):
            raise ConfigError("two peers have one name", hint="each peer needs names of its own")
        policy = policy or TransferPolicy()
        hooks = self._hooks = hooks or GatewayHooks()
        self._timing = policy.timing
        self._store = store
        self._tls = tls
        self._credentials: Credentials | None = None
        self._tending: asyncio.Task[None] | None = None
        self._doors: list[Door] = []
        self._listening: list[tuple[str, int]] = []
        engine = Engine(EngineConfig(name, tuple(peers), policy, store.has), secrets.token_bytes)
        self._driver = Driver(engine, source, sink, store, hooks)

    # -- life --------------------------------------------------------------------------------------------

    async def start(self, listen: Sequence[tuple[str, int]] = ()) -> None:
        """Recover the transfers that the journal has open, then listen on these addresses and ports.

        Errors: LinkError if a port is not available, ConfigError for unusable certificates, StoreError.
        """
        if self._driver.links is not None:
            raise StateError("the gateway runs already")
        if self._tls is None and (listen or self._hooks.dial is None):
            raise ConfigError("a gateway without TLS configuration needs `dial` and cannot listen")
        driver = self._driver
        found = self._credentials = None if self._tls is None else Credentials(self._tls, self._hooks.wall)
        driver.connect(self._hooks.dial or tls_dial(_given(found), self._timing, listen))
        try:
            if found is not None:
                self._tending = asyncio.create_task(found.tend(), name="ikectx tends its certificates")
            if listen:
                peers = list(self._peers.values())
                self._doors = await tls_listen(_given(found), self._timing, listen, self.accept, peers)
            for line in await self.recover():
                log.info("recovered: %s", line)
            driver.engine.start(driver.now())
            driver.pump()
            for door in self._doors:
                await door.start_serving()
                self._listening.append(door.address)
        except BaseException:
            await self.stop()
            raise

    def keep_links(self) -> None:
        """From now on have a link to each peer, so that no handover waits for one. Errors: StateError."""
        self._running().keep(self._peers.values())

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Addresses that it listens on; with the port that the system chose for port 0."""
        return list(self._listening)

    async def stop(self) -> None:
        """Cancel transfers that still serve the SA, wait a little, close. Open ones stay in the journal."""
        for door in self._doors:
            door.close()
        self._doors, self._listening = [], []
        if self._tending is not None:
            self._tending.cancel()
        await self._driver.stop()

    def reload(self) -> None:
        """Read certificate, key, CAs and revocation lists again, and close the connections that they forbid
        now.

        The agent does so by itself soon after the files have changed. Errors: ConfigError, and what was
        read before stays in use; StateError for a gateway that does not run or has none."""
        if self._credentials is None:
            raise StateError("this gateway has no certificates in use")
        self._credentials.reload()

    async def recover(self) -> list[str]:
        """Go on with the transfers that the journal has open, in the background; one line for each. `start`
        calls it."""
        lines = []
        for entry in self._store.open_transfers():
            what = f"{entry.transfer_id.hex()} ({entry.role}, {entry.mn}, {entry.state})"
            try:
                said = self._driver.engine.restore(self._driver.now(), entry)
            except (WireError, ValueError) as error:
                log.error("transfer %s cannot be taken up: %s", entry.transfer_id.hex(), error)
                said = f"cannot be taken up: {error}"
            if said:
                lines.append(f"{what}: {said}")
        self._driver.pump()
        return lines

    def _running(self) -> Links:
        if self._driver.links is None:
            raise StateError("the gateway does not run")
        return self._driver.links

    # -- outgoing ----------------------------------------------------------------------------------------

    async def transfer(
        self,
        sa: SaName,
        to: str,
        *,
        address: Address = "update",
        dry_run: bool = False,
        progress: Observer | None = None,
        asked_by: str = "",
    ) -> TransferReport:
        """Move one IKE_SA to the peer `to`; returns the report.

        `address` "keep": the gateway's address moves along, and the mobile node is not told one. `dry_run`:
        all checks at both ends are made, nothing is changed. If the SA is busy, `busy_attempts` tries are
        made. `asked_by`: whose wish it is, for the audit log.

        Errors: UsageError (no such peer), UnknownSaError, BusyError (it is being moved), StateError (not
        started); everything else is in the report. A call that is cancelled cancels a transfer that has not
        let go.
        """
        self._running()
        wanted = Transfer(SaName(*sa), to, address, dry_run, asked_by)
        report: TransferReport = await self._driver.ask(wanted, progress)
        return report

    async def transfer_all(
        self,
        sas: Iterable[SaName],
        to: str,
        *,
        address: Address = "update",
        dry_run: bool = False,
        parallel: int = 8,
        progress: Observer | None = None,
        asked_by: str = "",
    ) -> list[TransferReport]:
        """Move several SAs, `parallel` at a time; reports in the order of `sas`.

        A quarter of them begin together, so that what each step asks of charon, the kernel and the disk is
        asked once for several, and while some wait for their mobile nodes there is something to do for
        others. Those that are still under way after `SLOW` seconds do not hold up the next ones.

        An error about one SA becomes its report. Errors: UsageError, StateError.
        """
        self._peer(to)
        self._running()

        async def one(sa: SaName) -> TransferReport:
            try:
                return await self.transfer(
                    sa, to, address=address, dry_run=dry_run, progress=progress, asked_by=asked_by
                )
            except IkectxError as error:
                return self._never_began(sa, to, error, address, dry_run)

        left, begun = list(dict.fromkeys(sas)), list[asyncio.Task[TransferReport]]()
        most = max(1, parallel)
        group = max(1, most // 4)
        moving = set[asyncio.Task[TransferReport]]()
        try:
            while left:
                now = [asyncio.create_task(one(sa)) for sa in left[: min(group, most - len(moving))]]
                del left[: len(now)]
                begun += now
                moving.update(now)
                moving = await _room(moving, most, group)
            return list(await asyncio.gather(*begun))
        except asyncio.CancelledError:
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)
            raise

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

    def cancel(self, transfer_id: str) -> bool:
        """Stop a transfer of this gateway. True: the SA is kept; False: it has been let go, or is unknown."""
        cancelled = self._driver.engine.cancel(self._driver.now(), transfer_id)
        self._driver.pump()
        return cancelled

    async def announce(self, sa: SaName) -> None:
        """Tell the mobile node of that SA the addresses of this gateway, by which it may come itself when it
        is relayed (RFC 4555, 3.6). Errors: UnknownSaError, BusyError, RefusedError, LinkError (silent)."""
        self._running()
        await self._driver.ask(Announce(SaName(*sa)))

    async def resolve(self, transfer_id: str, decision: Decision, by: str = "operator") -> TransferReport:
        """Serve the SA of a transfer in doubt here again ("reclaim"), or drop it here ("give-up"), whatever
        the peer says, because `by` decides so.

        If the peer owns a reclaimed SA all the same, both gateways serve it. Errors: StateError unless it
        is in doubt.
        """
        report: TransferReport = await self._driver.ask(Resolve(transfer_id, decision, by))
        return report

    def in_doubt(self) -> list[TransferReport]:
        """Transfers of this gateway that have let the SA go and are neither confirmed nor refused."""
        runs = self._driver.engine.transfers.open.values()
        return [run.report() for run in runs if run.machine.state is SourceState.RELEASED]

    def context_of(self, transfer_id: str) -> IkeContext | None:
        """The SA of an open transfer of this gateway."""
        run = self._driver.engine.transfers.named(transfer_id)
        return None if run is None else run.context

    def connected(self, peer: str) -> bool:
        """Whether there is an open connection to that peer."""
        return self._driver.links is not None and self._driver.links.connected(peer)

    def heard(self, peer: str) -> float | None:
        """When the last message of that peer came, in seconds since 1970; None: none came since the start."""
        return self._driver.engine.heard.get(peer)

    # -- asking others -----------------------------------------------------------------------------------

    async def pull(
        self,
        from_: str,
        mn: IpAddress,
        *,
        sa: SaName | None = None,
        dry_run: bool = False,
        progress: Observer | None = None,
        asked_by: str = "",
    ) -> TransferReport:
        """Have the SA of the mobile node at that outer address moved here from the peer `from_`; returns the
        report.

        `sa` names the SA if the mobile node has several. The peer must have granted the right `pull`, and
        moves the SA as by `transfer` there. It is asked again for `Timing.request` seconds while the SA is
        busy.

        Errors: UsageError (no such peer), StateError (not started); everything else is in the report, as this
        gateway sees it.
        """
        self._peer(from_)
        self._running()
        report: TransferReport = await self._driver.ask(
            Pull(from_, mn, None if sa is None else SaName(*sa), dry_run, asked_by), progress
        )
        return report

    async def ctar(self, message: Ctar, source: Endpoint) -> bytes | None:
        """Handle a CTAR that a mobile node sent from that UDP endpoint. Returns the CTAA, or None for no
        answer.

        Returns when the handover is over. Copies get None until then, and afterwards the same CTAA, until
        their token expires. Errors: StateError (not started, or no `mobile` was given).
        """
        self._running()
        answer: bytes | None = await self._driver.ask(Arrive(message, source))
        return answer

    async def packet(
        self,
        datagrams: bytes | Sequence[bytes],
        local: Endpoint,
        remote: Endpoint,
        ask: Sequence[str],
    ) -> TransferReport | None:
        """An IKE message of an SA that is not here came from `remote`: fetch the SA from the gateway that has
        it.

        `datagrams`: the message from the IKE header on, or all its fragments. The peers of `ask` are asked in
        this order, and must have granted the right `packet`. None: none of them has the SA, or the message is
        of no use. This method has no rate limit: see `mobike_ext.watch`.

        Errors: UsageError (no such peer, no message), StateError.
        """
        self._running()
        parts = (datagrams,) if isinstance(datagrams, bytes) else tuple(datagrams)
        report: TransferReport | None = await self._driver.ask(Show(parts, local, remote, tuple(ask)))
        return report

    def tell(self, peer: str, news: Whereabouts) -> None:
        """Tell the peer that gave an SA where the SA is now, until it has confirmed that. Errors:
        StoreError."""
        _, told = self._driver.begin(Tell(peer, news))
        if told.done():
            told.result()
        else:  # a step that the driver carries out has come to this: it is the next thing that it does
            told.add_done_callback(partial(_told, peer))

    def _peer(self, name: str) -> PeerConfig:
        return self._driver.engine.peer(name)

    # -- incoming ----------------------------------------------------------------------------------------

    async def accept(self, stream: Stream) -> None:
        """Serve a connection that a peer has opened, until it ends."""
        peer = next((self._certified[name] for name in stream.names if name in self._certified), None)
        links = self._driver.links
        if peer is None or links is None:
            shown = ", ".join(sorted(stream.names)) or "no name"
            log.warning("refused a connection from %s: its certificate says %s", stream.label, shown)
            stream.close()
            return
        await links.serve(stream, peer)

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
                    "connected": self.connected(peer.name),
                }
                for peer in self._peers.values()
            ],
            "transfers": [_entry_json(entry) for entry in self._store.open_transfers()],
        }

    def audit(self, limit: int = 100) -> list[dict[str, object]]:
        """The audit log, newest first, as plain JSON values. Errors: StoreError."""
        return self._store.audit_lines(limit)

    def verify(self, head: str = "") -> Verified:
        """Check the audit log. `head`: that of an earlier verification. Errors: StoreError, UsageError."""
        return self._store.audit_verify(head)

    def knows(self, transfer_id: str) -> bool:
        """Whether the journal has the transfer of that ID (hexadecimal), in either role."""
        try:
            ident = bytes.fromhex(transfer_id)
        except ValueError:
            return False
        return any(self._store.find(role, ident) is not None for role in ROLES)

    def history(self, limit: int = 100) -> list[dict[str, object]]:
        """The journal, newest first, as plain JSON values."""
        return [_entry_json(entry) for entry in self._store.history(limit)]


def _told(peer: str, told: asyncio.Future[object]) -> None:
    if not told.cancelled() and (error := told.exception()) is not None:
        log.error("%s is not told where an SA of it is: %s", peer, error)


def _given(credentials: Credentials | None) -> Credentials:
    if credentials is None:
        raise ConfigError("no TLS configuration")
    return credentials


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
