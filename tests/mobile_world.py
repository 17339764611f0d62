"""A mobile node's charon and kernel as they behave towards an agent: names that clash, crashes, and traffic.

`Charon` takes HA messages as strongSwan 5.9.8 and 6.0.6 do (a CHILD_ADD whose SPI is taken deletes what was
there; of two children with one inbound SPI the older one is deleted). `Kernel` finds SAs by destination and
SPI. A packet leaves at every step of an agent, by whatever policy is best; that a number goes out twice under
one key, or a packet in the clear, is an AssertionError. `Fuse` ends the agent at any of these steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any

import pytest

from ikectx.errors import CharonError
from ikectx.sa.context import (
    Address,
    Endpoint,
    IkeContext,
    IkeGeneration,
    ReplayState,
    TrafficSelector,
)
from ikectx.sa.keys import esp_keys, sk_keys
from ikectx.sa.name import SaName
from tests.hand_loop import HandLoop
from tests.kernel_tables import KernelTables
from tests.listed import listing_of, read_sas
from tests.peers import a_context
from tests.vici_bridge.test_deadlines import MemoryStore
from vici_bridge.effects import steps as steps_module
from vici_bridge.effects.mobile import CharonMobile
from vici_bridge.ha import messages as ha
from vici_bridge.ha.chain import import_messages
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.ha.messages import Attr, HaMessage, HaType
from vici_bridge.ha.sa_state import read_child, read_generation
from vici_bridge.host import CharonHost
from vici_bridge.host_config import HostConfig
from vici_bridge.kernel.algorithms import KernelReplay, fit_replay
from vici_bridge.kernel.kernel import LATE
from vici_bridge.kernel.rewrite import NewPlace
from vici_bridge.kernel.xfrm import ALLOW, KernelPolicy, KernelSa, Selector, Template
from vici_bridge.kernel.xfrm_parts import XfrmRequest

JUMP = 1000
OLD, NEW = Endpoint.of("198.51.100.7", 4500), Endpoint.of("203.0.113.9", 4500)
PSG, NSG = Endpoint.of("192.0.2.1", 4500), Endpoint.of("192.0.2.2", 4500)
VIP = IPv4Address("10.4.0.10")


class Crash(BaseException):
    """The agent's process is gone. No error: nothing may catch it."""


class Fuse:
    """Counts an agent's steps, and blows at one of them and each after it."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        if self.at is not None and self.count >= self.at:
            raise Crash(f"at step {self.at}")


class Kernel(KernelTables):
    """SAD and SPD."""

    def __init__(self, step: Callable[[], None]) -> None:
        super().__init__(step)
        self.used: set[tuple[bytes, int]] = set()
        self.sent: list[tuple[int, Address, int]] = []
        """(request id, destination on the wire, number) of each packet."""
        self.flows: set[Selector] = set()
        self.heard: list[bytes] = []
        """SPIs by which the agent has had the kernel decrypt, beside charon's."""
        self.lost = 0
        self.place: NewPlace | None = None

    # What an agent asks.

    def set_replay(self, sa: KernelSa, state: ReplayState, *, outbound: bool | None = None) -> None:
        super().set_replay(sa, state, outbound=outbound)
        self.send()

    def replace_policy(self, policy: KernelPolicy) -> None:
        super().replace_policy(policy)
        self.send()

    def delete_policy(self, policy: KernelPolicy) -> bool:
        found = super().delete_policy(policy)
        self.send()
        return found

    def batch(self, requests: Sequence[XfrmRequest]) -> None:
        """As `_right_keys` uses it: an SA out, and in again with other keys."""
        self.step()
        kinds = [request.what.split()[0] for request in requests]
        assert kinds == ["delete", "add"], kinds
        sa = KernelSa.parse(requests[1].message.reveal())
        assert (sa.destination, sa.spi) in self.sas
        self.sas[sa.destination, sa.spi] = sa
        self.send()

    def delete_sa(self, sa: KernelSa) -> bool:
        self.step()
        return self.sas.pop((sa.destination, sa.spi), None) is not None

    def snapshot_inbound(self, sas: Iterable[KernelSa]) -> list[KernelSa]:
        return [self.sas[sa.destination, sa.spi] for sa in sas]

    def restore_inbound(self, snapshot: Any, seconds: int) -> int:
        self.step()
        for sa in getattr(snapshot, "sas", snapshot):
            self.heard.append(sa.spi)
            self.sas.setdefault((sa.destination, sa.spi), replace(sa, sequence=LATE))
        return len(self.heard)

    # What happens by itself.

    def send(self) -> None:
        """One packet of each flow of the mobile node, by the best policy."""
        out = [policy for policy in self.policies.values() if policy.direction == "out"]
        self.flows |= {policy.selector for policy in out}
        for flow in self.flows:
            matching = [p for p in out if p.selector == flow]
            matching = [p for p in matching if p.mark is None or p.mark.value & p.mark.mask == 0]
            assert matching, "a packet left in the clear"
            self._send_by(min(matching, key=lambda p: p.priority))

    def _send_by(self, policy: KernelPolicy) -> None:
        if policy.action != ALLOW:
            self.lost += 1
            return
        (template,) = policy.templates
        wanted = (template.source, template.destination, template.reqid)
        found = [sa for sa in self.sas.values() if (sa.source, sa.destination, sa.reqid) == wanted]
        if any(template.spi):
            found = [sa for sa in found if sa.spi == template.spi]
        if not found:
            self.lost += 1
            return
        sa = found[-1]  # the youngest
        number = sa.replay.oseq + 1
        self.sas[sa.destination, sa.spi] = replace(sa, replay=replace(sa.replay, oseq=number))
        used = (sa.encr_key.reveal(), number)
        assert used not in self.used, f"number {number} went out twice under one key"
        self.used.add(used)
        wire = sa.destination
        if self.place is not None and (sa.source, wire) == (self.place.old_local, self.place.old_remote):
            wire = self.place.remote
        self.sent.append((sa.reqid, wire, number))


def _reqid(child: Any) -> int:
    """One for children of the same selectors, as charon gives them."""
    return int(child.remote_ts[0].start) >> 16 & 0xFF | 0x100


@dataclass
class Child:
    """A CHILD_SA of charon."""

    unique_id: int
    context: Any
    local: Endpoint
    remote: Endpoint
    state: str = "INSTALLED"


@dataclass
class Charon:
    """One IKE_SA with its children; `context` is what it was set up with."""

    context: IkeContext
    kernel: Kernel | None
    state: str = "ESTABLISHED"
    tasks: list[str] = field(default_factory=list)
    queued: list[str] = field(default_factory=list)
    children: list[Child] = field(default_factory=list)
    rekeyed: list[str] = field(default_factory=list)
    rekey_time: int = 1800
    refuse_children: bool = False
    wrong_first: bool = False
    """Deletes the newer of two children with one SPI."""
    gone: bool = False
    active: bool = False
    """Of the segment; charon's are not active when it starts."""
    peers: tuple[Endpoint, ...] = ()

    def __post_init__(self) -> None:
        self.local, self.remote = self.context.local, self.context.remote
        self.count = 0
        for child in self.context.children:
            keys = esp_keys(self.context.generations[child.generation], child)
            self._install(child, keys, (child.inbound, child.outbound))

    def _install(
        self,
        child: Any,
        keys: Any,
        states: tuple[ReplayState, ReplayState] = (ReplayState(0, 32), ReplayState()),
    ) -> bool:
        if self.kernel is not None:
            names = ((self.local.address, child.spi_in), (self.remote.address, child.spi_out))
            if any(name in self.kernel.sas for name in names):
                for name in names:  # the clean-up of what could not be added
                    self.kernel.sas.pop(name, None)
                return False
            for name, (encr, integ), inward in zip(names, keys, (True, False), strict=True):
                given = states[0] if inward else states[1]
                replay = KernelReplay(
                    0 if inward else given.seq,
                    given.seq if inward else 0,
                    32 if inward else 0,
                    fit_replay(given, 32).bitmap if inward else 0,
                )
                self.kernel.sas[name] = KernelSa(
                    self.remote.address if inward else self.local.address,
                    name[0],
                    name[1],
                    reqid=_reqid(child),
                    encr_name="rfc4106(gcm(aes))",
                    encr_key=encr,
                    icv_bits=128,
                    is_aead=True,
                    auth_key=integ,
                    replay=replay,
                )
        self.count += 1
        self.children.append(Child(self.count, child, self.local, self.remote))
        self._policies()
        return True

    def _policies(self) -> None:
        """The policies of the youngest child; without any, none."""
        if self.kernel is None:
            return
        theirs = [key for key in self.kernel.policies if key[2] is None]
        for key in theirs:
            del self.kernel.policies[key]
        for child in self.children:  # a later one takes the place of an earlier one with its selectors
            for ours, far in ((a, b) for a in child.context.local_ts for b in child.context.remote_ts):
                selector = Selector.between(
                    ip_network(f"{ours.start}/32"), ip_network(f"{far.start}/24", strict=False)
                )
                reqid = _reqid(child.context)
                template = Template(child.local.address, child.remote.address, reqid=reqid)
                policy = KernelPolicy("out", selector, 5000, templates=(template,))
                self.kernel.policies["out", selector, None] = policy

    # VICI.

    async def half_open(self) -> int:
        return 0

    async def version(self) -> dict[str, str]:
        return {"version": "5.9.8"}

    def list_sas(self) -> list[dict[str, Any]]:
        if self.gone:
            return []
        view = {
            "name": self.context.connection,
            "uniqueid": "1",
            "version": "2",
            "state": self.state,
            "initiator": "yes",
            "initiator-spi": self.context.spis[0].hex(),
            "responder-spi": self.context.spis[1].hex(),
            "local-host": str(self.local.address),
            "local-port": str(self.local.port),
            "remote-host": str(self.remote.address),
            "remote-port": str(self.remote.port),
            "local-vips": [str(vip) for vip in self.context.local_vips],
            "tasks-active": list(self.tasks),
            "tasks-queued": list(self.queued),
            "rekey-time": "9000",
            "child-sas": {
                f"{child.context.name}-{child.unique_id}": {
                    "name": child.context.name,
                    "uniqueid": str(child.unique_id),
                    "reqid": "1",
                    "state": child.state,
                    "spi-in": child.context.spi_in.hex(),
                    "spi-out": child.context.spi_out.hex(),
                    "rekey-time": str(self.rekey_time),
                    "life-time": "2000",
                }
                for child in self.children
            },
        }
        return [view]

    async def read_sas(self, read: Callable[[bytes], Any], *, ike_ids: Sequence[int] = ()) -> list[Any]:
        return await read_sas(self.list_sas(), read, ike_ids=ike_ids)

    async def connection(self, name: str) -> dict[str, Any] | None:
        return (await self.connections()).get(name)

    async def connections(self, names: object = None) -> dict[str, Any]:
        return {}

    async def close(self) -> None: ...

    async def rekey(self, *, ike_id: int | None = None, child_id: int | None = None) -> int:
        self.rekeyed.append(f"child {child_id}" if child_id is not None else f"ike {ike_id}")
        return 1

    # HA.

    def hear(self, message: HaMessage) -> None:
        match message.type:
            case HaType.SEGMENT_TAKE:
                self._segment(active=False)
            case HaType.SEGMENT_DROP:
                self._segment(active=True)
            case HaType.IKE_ADD:
                if message.need(Attr.IKE_REKEY_ID, IkeId).spis == self.context.spis:
                    generations = (*self.context.generations, read_generation(message))
                    self.context = replace(self.context, generations=generations)
                    self.state = "CONNECTING"
            case HaType.IKE_MID_INITIATOR | HaType.IKE_MID_RESPONDER:
                pass
            case HaType.IKE_UPDATE if message.need(Attr.IKE_ID, IkeId).spis == self.context.spis:
                if self.state == "CONNECTING" and message.get(Attr.CONFIG_NAME) is not None:
                    self.state = "PASSIVE"
                self.local = message.find(Attr.LOCAL_ADDR, Endpoint) or self.local
                self.remote = message.find(Attr.REMOTE_ADDR, Endpoint) or self.remote
                self.peers = message.every(Attr.PEER_ADDR, Endpoint) or self.peers
            case HaType.CHILD_ADD:
                last = len(self.context.generations) - 1
                child = read_child(message, last)  # whatever the generation its keys stem from
                if not self.refuse_children:
                    self._install(child, esp_keys(self.context.generations[last], child))
            case HaType.CHILD_DELETE:
                spi = message.need(Attr.INBOUND_SPI, bytes)
                found = [child for child in self.children if child.context.spi_in == spi]
                if found:
                    self._delete(found[-1] if self.wrong_first else found[0])
            case _:
                raise AssertionError(message.type)

    def _segment(self, *, active: bool) -> None:
        if active is self.active:
            return
        self.active = active
        old, new = ("PASSIVE", "ESTABLISHED") if active else ("ESTABLISHED", "PASSIVE")
        if self.state == old:
            self.state = new

    def _delete(self, child: Child) -> None:
        self.children.remove(child)
        if self.kernel is not None:
            self.kernel.sas.pop((child.local.address, child.context.spi_in), None)
            self.kernel.sas.pop((child.remote.address, child.context.spi_out), None)
        self._policies()


class Rewrite:
    """Packets of the old pair go by other addresses; what is rewritten outlives the agent."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    @property
    def place(self) -> NewPlace | None:
        return self.kernel.place

    def begin(self, place: NewPlace) -> bool:
        self.kernel.step()
        self.kernel.place = place
        self.kernel.send()
        return True

    def end(self) -> None:
        self.kernel.step()
        self.kernel.place = None
        self.kernel.send()

    def close(self) -> None: ...


class Socket:
    """The HA socket."""

    def __init__(self, charon: Charon, step: Callable[[], None]) -> None:
        self.charon = charon
        self.step = step
        self.heard: list[HaType] = []

    async def send(self, datagrams: Iterable[bytes]) -> None:
        for datagram in datagrams:
            self.step()
            if self.charon.gone:
                raise CharonError("charon does not listen on its HA address")
            message = HaMessage.parse(datagram)
            if message.attributes:
                self.heard.append(message.type)
            self.charon.hear(message)
            if self.charon.kernel is not None:
                self.charon.kernel.send()

    async def read(self) -> None: ...

    def hear(self) -> int:
        return 0

    def listening(self) -> bool:
        return not self.charon.gone

    def close(self) -> None: ...


class Store(MemoryStore):
    """Puts and deletions are steps, too."""

    def __init__(self) -> None:
        super().__init__()
        self.step: Callable[[], None] = lambda: None

    def put(self, kind: str, key: str, value: bytes, *, soon: bool = False) -> None:
        self.step()
        super().put(kind, key, value, soon=soon)

    def delete(self, kind: str, key: str, *, soon: bool = False) -> None:
        self.step()
        super().delete(kind, key, soon=soon)

    def keep(self, role: str, key: str, row: bytes | None, *, soon: bool = False) -> None:
        self.step()
        super().keep(role, key, row, soon=soon)


class Ways:
    """The routes of a node's host, of which charon looks at those that change. `stirred`: how often it was
    made to look by nothing else."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def is_here(self, address: object) -> bool:
        return address in self._node.places

    def stir(self, towards: object) -> None:
        self._node.stirred += 1


class Node:
    """A mobile node whose agent may end at any step and begin anew; charon, kernel and store go on."""

    def __init__(self, context: IkeContext, *, kernel: bool = True) -> None:
        self.fuse = Fuse()
        self.kernel = Kernel(self._step) if kernel else None
        self.charon = Charon(context, self.kernel)
        self.store = Store()
        self.store.step = self._step
        self.context = context
        self.sa: SaName = context.spis
        self.places = {OLD.address, NEW.address}
        self.stirred = 0
        self.begin()
        for message in import_messages(replace(context, local_vips=()), 3):
            self.host.record.feed(message)
        self.host.save()

    def _step(self) -> None:
        self.fuse()

    def begin(self, at: int | None = None) -> None:
        """An agent starts; it will end at its `at`-th step."""
        self.fuse = Fuse()
        self.store.waiting.clear()
        config = HostConfig((), kernel_esp=False, oseq_jump=JUMP, mobile_node=True)
        self.host = CharonHost(config, self.store)
        self.host.detour.close()
        self.host.detour = Ways(self)  # type: ignore[assignment]
        self.host.kernel = self.kernel  # type: ignore[assignment]
        if self.kernel is not None:
            self.host.rewrite = Rewrite(self.kernel)  # type: ignore[assignment]
            self.kernel.place = None  # `CharonHost.open` ends what an earlier agent has left
        self.host.vici = self.charon  # type: ignore[assignment]
        self.host.listing = listing_of(lambda: self.charon.list_sas())
        self.socket = Socket(self.charon, self._step)
        self.host.ha_link = self.socket  # type: ignore[assignment]
        self.host.record.load(self.store.items("record"))
        self.mobile = CharonMobile(self.host)
        self.fuse = Fuse(at)


__all__ = ["JUMP", "Charon", "Crash", "Fuse", "Kernel", "Node", "Store", "ha"]


# --- an SA and its move


def a_node_context(*, children: int = 1, older: bool = False) -> IkeContext:
    """As a mobile node sees it: the initiator, with a virtual IP of its own."""
    seen = a_context()
    (generation,) = seen.generations
    generation = replace(generation, initiator=True)
    generations: tuple[IkeGeneration, ...] = (generation,)
    if older:
        newer = replace(
            generation,
            spi_i=b"\x33" * 8,
            spi_r=b"\x44" * 8,
            old_skd=sk_keys(generation).sk_d,
            old_prf=generation.prf,
        )
        generations = (generation, newer)
    (child,) = seen.children
    own = (TrafficSelector(VIP, VIP),)
    every = []
    for number in range(children):
        far = ip_address(f"10.{number}.0.0")
        every.append(
            replace(
                child,
                name=f"net{number}",
                initiator=True,
                spi_in=b"\xc1\0\0" + bytes([number]),
                spi_out=b"\xc2\0\0" + bytes([number]),
                nonce_i=child.nonce_i + bytes([number]),
                local_ts=own,
                remote_ts=(TrafficSelector(far, far + 255),),
                inbound=ReplayState(300 + number, 32, 0xFFFF0001),
                outbound=ReplayState(500 + number),
            )
        )
    return replace(
        seen,
        generations=generations,
        local=OLD,
        remote=PSG,
        children=tuple(every),
        remote_vips=(),
        local_vips=(VIP,),
        policies=(),
    )


def do(work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=HandLoop) as runner:
        return runner.run(work)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = asyncio.sleep

    async def at_once(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    async def shortly(seconds: float) -> None:
        await sleep(seconds / 100)

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    monkeypatch.setattr(asyncio, "sleep", shortly)
    monkeypatch.setattr(steps_module, "PATIENCE", 0.05)
    monkeypatch.setattr(steps_module, "LINGER", 0.0)


async def a_move(
    node: Node, local: Endpoint = NEW, remote: Endpoint = NSG, renames: dict[bytes, bytes] | None = None
) -> IkeContext:
    context = await node.mobile.export(node.sa)
    await node.mobile.ahead(context, local, remote)
    await node.mobile.quiet(node.sa)
    after = await node.mobile.readdress(context, local, remote, renames or {})
    await node.mobile.loud(node.sa)
    return after


def at(node: Node, local: Endpoint, remote: Endpoint) -> None:
    """The SA is there, active, alone, and nothing of the way is left."""
    charon = node.charon
    assert charon.state == "ESTABLISHED"
    assert (charon.local, charon.remote) == (local, remote)
    assert all((child.local, child.remote) == (local, remote) for child in charon.children)
    assert len(charon.children) == len(node.context.children)
    assert not node.store.rows("mobile")
    if node.kernel is not None:
        assert node.kernel.place is None
        # beside those that the kernel drops by itself
        ends = {(sa.source, sa.destination) for sa in node.kernel.sas.values() if sa.sequence != LATE}
        assert ends == {(local.address, remote.address), (remote.address, local.address)}
        assert not [policy for policy in node.kernel.policies.values() if policy.mark is not None]
        for child, old in zip(charon.children, node.context.children, strict=True):
            keys = esp_keys(node.context.generations[old.generation], old)
            inbound = node.kernel.sas[local.address, child.context.spi_in]
            outbound = node.kernel.sas[remote.address, child.context.spi_out]
            assert (inbound.encr_key, outbound.encr_key) == (keys[0][0], keys[1][0])
            assert inbound.replay.seq >= old.inbound.seq
            if (local, remote) != (OLD, PSG):
                assert outbound.replay.oseq >= old.outbound.seq + JUMP
