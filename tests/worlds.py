"""Two or three gateways of `peers` in one process, each with an agent that can die and come back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ikectx.driver import GatewayHooks
from ikectx.engine.core import Engine
from ikectx.engine.journal import JournalHas
from ikectx.engine.journaled import MobileConfig, TransferPolicy
from ikectx.engine.report import TransferEvent, TransferReport
from ikectx.gateway import Gateway
from ikectx.peer import PeerConfig
from ikectx.sa.name import SaName
from ikectx.timing import Timing
from tests.hand_loop import LoopClock, wall
from tests.peers import CountedStore, Ether, Fuse, MemoryGateway, Network, a_context

FAST = Timing(
    connect=0.2,
    offer=0.5,
    confirm=0.1,
    hold=0.3,
    step=1.0,
    in_doubt=5.0,
    idle=5.0,
    keepalive=1.0,
    backoff=0.002,
    backoff_max=0.02,
    busy_backoff=0.002,
    turn=0.5,
    stop=0.3,
    predictive=0.5,
    request=0.6,
    unproven=0.3,
)
KEY = bytes(range(32))


class Side:
    """A gateway of the test: charon and kernel in memory, an agent that can die and come back."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.world = world
        self.daemon = MemoryGateway(name, world.ether)
        self.events: list[TransferEvent] = []
        self.fuse = Fuse()
        self.agent: Gateway
        self.store: CountedStore
        self.has: JournalHas = "whole"

    async def start(self, at: int = 0) -> None:
        """A new agent; with `at` it dies at that moment."""
        self.fuse = Fuse(at, lambda: self.world.network.kill(self.name))
        self.daemon.fuse = self.fuse
        self.store = CountedStore(self.world.folder / f"{self.name}.db", KEY)
        self.store.fuse, self.store.has = self.fuse, self.has
        peers = [
            PeerConfig(
                name,
                name,
                rights=self.world.rights,
                **self.world.brings,
                addresses=(ip_address(self.world.addresses[name]),) if name in self.world.addresses else (),
            )
            for name in self.world.names
            if name != self.name
        ]
        self.agent = Gateway(
            self.name,
            self.daemon,
            self.daemon,
            self.store,
            peers,
            policy=TransferPolicy(self.world.timing, mobile=self.world.mobile),
            hooks=GatewayHooks(
                observer=self.events.append,
                dial=self.world.network.dial_from(self.name),
                clock=LoopClock(),
                wall=lambda: self.world.wall + wall(),
            ),
        )
        await self.agent.start()
        if not self.fuse.blown:
            self.world.network.up[self.name] = self.agent

    @property
    def engine(self) -> Engine:
        """What decides in this agent."""
        return self.agent._driver.engine

    def only_open(self) -> dict[str, object]:
        """The one open transfer, as `status` shows it."""
        transfers = self.agent.status()["transfers"]
        assert isinstance(transfers, list)
        (one,) = transfers
        assert isinstance(one, dict)
        return one

    async def kill(self) -> None:
        """No clean-up: tasks vanish, connections break, the journal stays as it is."""
        self.fuse.blown = True
        self.world.network.kill(self.name)
        self.agent._driver.close()
        await asyncio.gather(*self.agent._driver.running, return_exceptions=True)
        self.store.close()

    async def restart(self) -> None:
        """Killed, and back."""
        await self.kill()
        await self.start()

    async def reaches(self, step: str) -> None:
        """Wait until charon and kernel were asked for this step."""
        await until(lambda: step in self.daemon.calls)

    async def stop(self) -> None:
        self.world.network.kill(self.name)
        await self.agent.stop()
        self.store.close()


class World:
    """Gateways a and b (and c), and the MNs between them."""

    def __init__(self, folder: Path, names: tuple[str, ...] = ("a", "b")) -> None:
        self.folder = folder
        self.names = names
        self.timing = FAST
        self.rights = frozenset({"push"})
        self.brings: dict[str, tuple[str, ...]] = {}
        """`connections` and `identities` of each `PeerConfig`."""
        self.mobile: MobileConfig | None = MobileConfig()
        self.addresses: dict[str, str] = {}
        self.wall = 0.0
        """Seconds that all clocks of the world are ahead."""
        self.ether = Ether()
        self.network = Network()
        self.sides = {name: Side(name, self) for name in names}
        self.a, self.b = self.sides["a"], self.sides["b"]

    async def quiet(self, seconds: float = 20.0) -> None:
        """Until no journal has an open transfer."""
        await self.quiet_but(0, seconds)

    async def quiet_but(self, some: int, seconds: float = 20.0) -> None:
        """Until all journals together have no more than so many open transfers."""
        async with asyncio.timeout(seconds):
            while sum(len(side.store.open_transfers()) for side in self.sides.values()) > some:
                await asyncio.sleep(0.003)

    def owner(self, sa: SaName) -> str:
        """Who serves the SA; all invariants hold."""
        assert self.ether.slips == []
        senders = self.ether.senders[sa]
        assert len(senders) == 1, f"senders: {senders}"
        name = next(iter(senders))
        for side in self.sides.values():
            daemon = side.daemon
            assert sa not in daemon.passive, f"{side.name} kept what it prepared"
            assert (sa in daemon.served) == (side.name == name)
            assert sa not in daemon.frozen, f"{side.name} is still frozen"
        return name


@asynccontextmanager
async def world(
    *,
    names: tuple[str, ...] = ("a", "b"),
    timing: Timing = FAST,
    rights: frozenset[str] = frozenset({"push"}),
    crash: tuple[str, int] = ("", 0),
    brings: dict[str, tuple[str, ...]] | None = None,
) -> AsyncIterator[World]:
    # journals are synced, and disks are slow: in memory where the machine allows
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        made = World(Path(folder), names)
        made.timing, made.rights, made.brings = timing, rights, brings or {}
        for side in made.sides.values():
            await side.start(crash[1] if side.name == crash[0] else 0)
        try:
            yield made
        finally:
            for side in made.sides.values():
                await side.stop()
            await made.network.close()


async def until(there: Callable[[], object]) -> None:
    """Wait until it is so; `hand_loop.run` bounds that."""
    while not there():
        await asyncio.sleep(0.001)


@contextmanager
def quietly() -> Iterator[None]:
    """Hundreds of failures that are meant to be need no log."""
    logging.getLogger("ikectx").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.getLogger("ikectx").setLevel(logging.NOTSET)


async def until_dead_or_done(side: Side, work: asyncio.Task[Any]) -> None:
    await until(lambda: side.fuse.blown or work.done())
    await asyncio.sleep(0.003)


ALL = frozenset({"push", "pull", "packet"})


async def one_move(w: World, **how: Any) -> tuple[SaName, TransferReport]:
    sa = w.a.daemon.serve(a_context())
    return sa, await w.a.agent.transfer(sa, "b", **how)


async def held_move(
    w: World, side: Side, step: str
) -> tuple[SaName, asyncio.Task[TransferReport], asyncio.Event]:
    """A move from a to b that waits in a step of one side, until the event is set."""
    gate = side.daemon.wait[step] = asyncio.Event()
    sa = w.a.daemon.serve(a_context())
    moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
    await side.reaches(step)
    return sa, moving, gate
