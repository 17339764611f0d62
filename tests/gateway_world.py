"""A gateway's charon and kernel as they behave towards an agent that takes SAs in; mobile nodes that rename.

`Charon` takes HA messages as strongSwan 5.9.8 and 6.0.6 do: IKE_SAs are found by version, SPIs and role, an
IKE_ADD for one that is there makes a second that shadows it, a CHILD_ADD whose SPI is taken deletes what was
there. `Sad` is the kernel's: SAs by destination and SPI, reservations, policies. Both remember each offence.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from random import Random
from typing import Any

from ikectx.engine.ports import MoveReport
from ikectx.errors import KernelError, LinkError
from ikectx.numbers import Encr, Integ, Status
from ikectx.sa.context import Address, ChildContext, Endpoint, IkeContext, IkeGeneration, Secret
from ikectx.sa.keys import esp_keys, sk_keys
from ikectx.sa.name import SaName
from tests.kernel_tables import KernelTables
from tests.vici_bridge.test_deadlines import MemoryStore
from vici_bridge.away.absences import Away
from vici_bridge.away.follow import Follow
from vici_bridge.effects.sink import CharonSink
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.ha.messages import Attr, HaMessage, HaType
from vici_bridge.ha.sa_state import read_child, read_generation
from vici_bridge.host import CharonHost
from vici_bridge.host_config import HostConfig
from vici_bridge.kernel.algorithms import KernelReplay
from vici_bridge.kernel.kernel import LATE
from vici_bridge.kernel.mute import Muted
from vici_bridge.kernel.nat_rule import NatRule
from vici_bridge.kernel.relay import RelayRule
from vici_bridge.kernel.xfrm import ALLOW, KernelPolicy, KernelSa, Selector, Template
from vici_bridge.kernel.xfrm_parts import XfrmRequest
from vici_bridge.policy.new_names import Agreed, Wish
from vici_bridge.vici.views import SaView, sa_views

OURS = Endpoint.of("203.0.113.9", 4500)


class Sad(KernelTables):
    """XFRM of one host."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.dice = Random(seed)
        self.restored: list[bytes] = []
        self.sent: set[tuple[bytes, int]] = set()
        """(key, number) of each packet that left."""

    def reserve_spi(self, source: Address, destination: Address, low: int, high: int) -> bytes | None:
        self.step()
        free = [
            n for n in range(low, min(high, low + 5000) + 1) if (destination, n.to_bytes(4)) not in self.sas
        ]
        if not free:
            return None
        spi = self.dice.choice(free).to_bytes(4)
        self.sas[destination, spi] = KernelSa(source, destination, spi)
        return spi

    def add(self, sa: KernelSa) -> None:
        if (sa.destination, sa.spi) in self.sas:
            raise KernelError(f"{sa} exists", errno=17)
        self.sas[sa.destination, sa.spi] = sa

    def delete_sa(self, sa: KernelSa) -> bool:
        self.step()
        return self.sas.pop((sa.destination, sa.spi), None) is not None

    def batch(self, requests: Sequence[XfrmRequest]) -> None:
        self.step()
        for request in requests:
            if request.what.startswith("delete"):
                spi, address = request.what.split()[3], request.what.split()[5]
                self.sas = {
                    name: sa
                    for name, sa in self.sas.items()
                    if (str(name[0]), name[1].hex()) != (address, spi)
                }
            elif " policy " in request.what:
                self.replace_policy(KernelPolicy.parse(request.message.reveal()))
            else:
                self.add(KernelSa.parse(request.message.reveal()))

    def snapshot_inbound(self, sas: Iterable[KernelSa]) -> list[KernelSa]:
        return list(sas)

    def restore_inbound(self, sas: Iterable[KernelSa], late: int) -> None:
        """For late packets: only noted."""
        self.restored += [sa.spi for sa in sas if (sa.destination, sa.spi) not in self.sas]

    def late_sas(self) -> list[KernelSa]:
        return [sa for sa in self.sas.values() if sa.sequence == LATE]

    def drop_late(self, sas: Iterable[KernelSa]) -> int:
        return 0

    def supports(self, encr: Encr, bits: int, integ: Integ, family: int = 2) -> bool:
        return True

    def send(self, remote_ts: Address) -> bytes | None:
        """A packet for that inner address leaves: the SPI it has, None: dropped."""
        fitting = [
            policy
            for policy in self.policies.values()
            if policy.direction == "out"
            and remote_ts in policy.destination
            and (policy.mark is None or policy.mark.value & policy.mark.mask == 0)
        ]
        assert fitting, "a packet left in the clear"
        best = min(fitting, key=lambda policy: policy.priority)
        if best.action != ALLOW:
            return None
        (template,) = best.templates
        sa = self.sas.get((template.destination, template.spi))
        if sa is None or (sa.reqid and sa.reqid != template.reqid):
            return None
        number = sa.replay.oseq + 1
        used = (sa.encr_key.reveal(), number)
        assert used not in self.sent, f"number {number} left twice under one key"
        self.sent.add(used)
        self.sas[sa.destination, sa.spi] = replace(sa, replay=replace(sa.replay, oseq=number))
        return sa.spi


@dataclass
class Sa:
    """One IKE_SA of charon."""

    id: IkeId
    generation: IkeGeneration
    unique_id: int
    state: str = "CONNECTING"
    name: str = ""
    remote_id: str = ""
    local: Endpoint = field(default_factory=lambda: OURS)
    remote: Endpoint = field(default_factory=lambda: OURS)
    mids: list[int] = field(default_factory=lambda: [0, 0])
    children: list[ChildContext] = field(default_factory=list)
    view: SaView | None = None


class Charon:
    """Any number of IKE_SAs; children's SAs are in `sad`, whether an agent can see that or not."""

    def __init__(self, sad: Sad) -> None:
        self.sad = sad
        self.sas: dict[IkeId, Sa] = {}
        self.offences: list[str] = []
        self.count = 0
        self.refuse_children = False
        self.step: Callable[[], None] = lambda: None

    # VICI

    async def half_open(self) -> int:
        return 0

    async def version(self) -> dict[str, str]:
        return {"version": "5.9.8"}

    async def connection(self, name: str) -> dict[str, Any] | None:
        return (await self.connections()).get(name)

    async def connections(self, names: object = None) -> dict[str, Any]:
        child = {"mode": "TUNNEL", "local-ts": ["10.1.0.0/16"], "remote-ts": ["dynamic"]}
        return {
            "home": {
                "name": "home",
                "children": {"rw": child},
                "local-1": {"class": "public key", "id": "gw.example"},
                "remote-1": {"class": "pre-shared key", "id": "*.example"},
            }
        }

    async def pools(self, name: str = "", *, leases: bool = False) -> dict[str, Any]:
        return {"mobile": {"base": "10.3.0.1", "size": "65534", **({"leases": {}} if leases else {})}}

    async def algorithms(self) -> dict[str, Any]:
        return {}

    async def close(self) -> None: ...

    def views(self) -> list[SaView]:
        """What list-sas shows; kept, since a thousand SAs are looked at a thousand times."""
        for sa in self.sas.values():
            if sa.view is None:
                (sa.view,) = sa_views([self._view(sa)])
        return [sa.view for sa in self.sas.values() if sa.view is not None]

    def _view(self, sa: Sa) -> dict[str, Any]:
        return {
            "name": sa.name,
            "uniqueid": str(sa.unique_id),
            "version": "2",
            "state": sa.state,
            "initiator": "yes" if sa.id.initiator else "no",
            "initiator-spi": sa.id.spi_i.hex(),
            "responder-spi": sa.id.spi_r.hex(),
            "remote-id": sa.remote_id,
            "local-host": str(sa.local.address),
            "local-port": str(sa.local.port),
            "remote-host": str(sa.remote.address),
            "remote-port": str(sa.remote.port),
            "child-sas": {
                f"{child.name}-{number}": {
                    "name": child.name,
                    "uniqueid": str(number),
                    "reqid": "1",
                    "state": "INSTALLED",
                    "spi-in": child.spi_in.hex(),
                    "spi-out": child.spi_out.hex(),
                }
                for number, child in enumerate(sa.children)
            },
        }

    # HA

    def hear(self, message: HaMessage) -> None:
        if message.type in (HaType.SEGMENT_TAKE, HaType.SEGMENT_DROP):
            for sa in self.sas.values():
                if message.type is HaType.SEGMENT_DROP and sa.state == "PASSIVE":
                    sa.state, sa.view = "ESTABLISHED", None
            return
        name = message.find(Attr.IKE_ID, IkeId)
        if name is None:
            return
        if message.type is HaType.IKE_ADD:
            self._ike_add(name, message)
            return
        found = self.sas.get(name)
        if found is None:
            return
        sa = found
        sa.view = None
        match message.type:
            case HaType.IKE_UPDATE:
                sa.name = message.find(Attr.CONFIG_NAME, str) or sa.name
                sa.local = message.find(Attr.LOCAL_ADDR, Endpoint) or sa.local
                sa.remote = message.find(Attr.REMOTE_ADDR, Endpoint) or sa.remote
                told = message.get(Attr.REMOTE_ID)
                sa.remote_id = str(told) if told is not None else sa.remote_id
                if sa.state == "CONNECTING" and sa.name:
                    sa.state = "PASSIVE"
            case HaType.IKE_MID_INITIATOR | HaType.IKE_MID_RESPONDER:
                mid = message.need(Attr.MID, int)
                if mid:
                    sa.mids[message.type is HaType.IKE_MID_RESPONDER] = mid
            case HaType.CHILD_ADD:
                self._child_add(sa, read_child(message, 0))
            case HaType.CHILD_DELETE:
                spi = message.need(Attr.INBOUND_SPI, bytes)
                for child in [child for child in sa.children if child.spi_in == spi]:
                    self._drop_child(sa, child)
            case HaType.IKE_DELETE:
                for child in list(sa.children):
                    self._drop_child(sa, child)
                del self.sas[name]

    def _ike_add(self, name: IkeId, message: HaMessage) -> None:
        if name in self.sas:
            self.offences.append(f"{name} is shadowed")
        self.count += 1
        generation = read_generation(replace(message, attributes=message.attributes))
        sa = Sa(name, replace(generation, spi_i=name.spi_i, spi_r=name.spi_r), self.count)
        rekeyed = message.find(Attr.IKE_REKEY_ID, IkeId)
        if rekeyed is not None:
            old = self.sas.pop(rekeyed, None)
            if old is None:
                self.offences.append(f"{rekeyed} cannot be adopted")
            else:
                sa.children, sa.local, sa.remote = old.children, old.local, old.remote
                sa.remote_id = old.remote_id
        self.sas[name] = sa

    def _child_add(self, sa: Sa, child: ChildContext) -> None:
        if self.refuse_children:
            return
        names = ((sa.local.address, child.spi_in), (sa.remote.address, child.spi_out))
        if any(one in self.sad.sas for one in names):
            for one in names:
                self.offences.append(f"{one[0]} {one[1].hex()} was deleted")
                self.sad.sas.pop(one, None)
            return
        keys = esp_keys(sa.generation, child)
        for (address, spi), (encr, _), inward in zip(names, keys, (True, False), strict=True):
            self.sad.add(
                KernelSa(
                    sa.remote.address if inward else sa.local.address,
                    address,
                    spi,
                    reqid=_reqid(child),
                    encr_name="rfc4106(gcm(aes))",
                    encr_key=encr,
                    icv_bits=128,
                    is_aead=True,
                    replay=KernelReplay(0, 0, 32 if inward else 0, 0),
                )
            )
        sa.children.append(child)
        self._policy(sa, child)

    def _policy(self, sa: Sa, child: ChildContext) -> None:
        ours, theirs = child.local_ts[0], child.remote_ts[0]
        selector = Selector.between(ip_network(f"{ours.start}/16"), ip_network(f"{theirs.start}/32"))
        template = Template(sa.local.address, sa.remote.address, reqid=_reqid(child), spi=child.spi_out)
        self.sad.policies["out", selector, None] = KernelPolicy("out", selector, 5000, templates=(template,))
        inward = Selector.between(ip_network(f"{theirs.start}/32"), ip_network(f"{ours.start}/16"))
        template = Template(sa.remote.address, sa.local.address, reqid=_reqid(child))
        self.sad.policies["in", inward, None] = KernelPolicy("in", inward, 5000, templates=(template,))

    def _drop_child(self, sa: Sa, child: ChildContext) -> None:
        sa.children.remove(child)
        self.sad.sas.pop((sa.local.address, child.spi_in), None)
        self.sad.sas.pop((sa.remote.address, child.spi_out), None)
        others = [one for one in sa.children if one.remote_ts == child.remote_ts]
        if others:
            self._policy(sa, others[-1])
        else:
            self.sad.policies = {
                key: policy
                for key, policy in self.sad.policies.items()
                # charon deletes by selector: the agent's own policies have its user in theirs
                if key[2] is not None
                or policy.selector.user
                or child.remote_ts[0].start
                not in (policy.destination if policy.direction == "out" else policy.source)
            }

    def serve(self, context: IkeContext) -> Sa:
        """Somebody's SA that is here already."""
        self.count += 1
        sa = Sa(IkeId.of(context.current), context.current, self.count, "ESTABLISHED", context.connection)
        sa.local, sa.remote, sa.remote_id = OURS, context.remote, str(context.remote_id)
        self.sas[sa.id] = sa
        for child in context.children:
            self._child_add(sa, child)
        return sa


def _reqid(child: ChildContext) -> int:
    return int(child.remote_ts[0].start) & 0xFFFF


class Socket:
    """The HA socket."""

    def __init__(self, charon: Charon) -> None:
        self.charon = charon

    async def send(self, datagrams: Iterable[bytes]) -> None:
        for datagram in datagrams:
            self.charon.step()
            self.charon.hear(HaMessage.parse(datagram))

    async def read(self) -> None: ...

    def hear(self) -> int:
        return 0

    def listening(self) -> bool:
        return True

    def close(self) -> None: ...


class Mute:
    """nftables."""

    def __init__(self) -> None:
        self.said = 0
        """Messages of charon that were dropped."""
        self.muted: set[SaName] = set()
        self.answering: set[SaName] = set()
        """SAs that are muted, but for requests of the mobile node and their answers."""
        self.ever: set[SaName] = set()

    def mute_in(self, spis: SaName) -> None:
        self.muted.add(spis)
        self.ever.add(spis)

    mute_out = mute = mute_in

    def only_answer(self, spis: SaName) -> None:
        self.muted.discard(spis)
        self.answering.add(spis)

    def unmute(self, spis: SaName) -> None:
        self.muted.discard(spis)
        self.answering.discard(spis)

    def listing(self) -> list[Muted]:
        return [Muted(spis, direction, 0) for spis in self.muted for direction in ("in", "out")]

    def half_muted(self) -> set[SaName]:
        return set(self.answering)

    def dropped(self, spis: SaName) -> int:
        return self.said


class Relay:
    """nftables' other use: packets under old SPIs go back to the other gateway."""

    def __init__(self) -> None:
        self.now: set[RelayRule] = set()
        self.ever: set[RelayRule] = set()

    def add(self, one: RelayRule) -> None:
        self.now.add(one)
        self.ever.add(one)

    def remove(self, one: RelayRule) -> None:
        self.now.discard(one)


class Nat:
    """nftables' relays of whole mobile nodes."""

    def __init__(self) -> None:
        self.rules: set[NatRule] = set()

    def change(self, old: Iterable[NatRule], new: Iterable[NatRule]) -> None:
        self.rules = (self.rules - set(old)) | set(new)

    def set(self, rules: Iterable[NatRule]) -> None:
        self.rules = set(rules)

    def close(self) -> None: ...


class Detour:
    """Policy routes: no gateway has a way to another here."""

    def add(self, prefixes: object, via: object, inside: object = ()) -> list[object]:
        return []

    def remove(self, prefixes: object) -> None: ...

    def shut(self, prefixes: object) -> list[object]:
        return []

    def open_up(self, prefixes: object) -> None: ...

    def listing(self, *, shut: bool = False) -> list[object]:
        return []

    def device_to(self, prefix: object, via: object) -> int:
        return 0

    def device_now(self, prefix: object) -> int:
        return 0

    def close(self) -> None: ...


class Talk:
    """`new_names.SpiTalk`: what a mobile node agrees to, one after the other."""

    def __init__(self, exchanges: Iterator[Agreed]) -> None:
        self._exchanges = exchanges
        self.given_up: list[str] = []

    async def next(self) -> Agreed | None:
        return next(self._exchanges, None)

    async def give_up(self, why: str) -> None:
        self.given_up.append(why)


class Mobiles:
    """All mobile nodes: what each has, and how it answers. `agent`: knows UPDATE_SPI."""

    def __init__(self, low: int, high: int, seed: int = 1) -> None:
        self.range = (low, high)
        self.dice = Random(seed)
        self.have: dict[str, IkeContext] = {}
        self.stock: set[str] = set()
        self.silent: set[str] = set()
        self.asked: list[Wish] = []
        self.moved: set[str] = set()

    def add(self, context: IkeContext) -> None:
        self.have[str(context.remote_id)] = context

    def _free(self, address: Address) -> bytes:
        used = {
            child.spi_out
            for context in self.have.values()
            if context.remote.address == address
            for child in context.children
        }
        low, high = self.range
        return self.dice.choice([n.to_bytes(4) for n in range(low, high + 1) if n.to_bytes(4) not in used])

    async def move(self, here: IkeContext, final: object, arrived: object) -> MoveReport:
        """The address update alone."""
        who = str(here.remote_id)
        if who in self.silent:
            raise LinkError("silent", status=Status.PEER_SILENT)
        self.moved.add(who)
        return MoveReport(messages=2, requests=1)

    def rename(self, here: IkeContext, wish: Wish) -> Talk:
        """`new_names.SpiRenamer`."""
        self.asked.append(wish)
        return Talk(self._agree(here, wish))

    def _agree(self, here: IkeContext, wish: Wish) -> Iterator[Agreed]:
        who = str(here.remote_id)
        if who in self.silent:
            raise LinkError("silent", status=Status.PEER_SILENT)
        now = here
        rekeys = who in self.stock or not wish.update
        if rekeys and wish.ike:
            now = self._with_ike(now, self._rekeyed(now.current, wish.ike))
            yield self._agreed(now, "rekey")
        for spi_in, new_in in wish.children:
            children = list(now.children)
            place = next(n for n, child in enumerate(children) if child.spi_in == spi_in)
            changed = replace(children[place], spi_in=new_in, spi_out=self._free(now.remote.address))
            if rekeys:
                nonces = (self.dice.randbytes(32), self.dice.randbytes(32))
                last = len(now.generations) - 1
                changed = replace(
                    changed, generation=last, initiator=True, nonce_i=nonces[0], nonce_r=nonces[1]
                )
            children[place] = changed
            now = replace(now, children=tuple(children), mid_initiator=now.mid_initiator + 1)
            if rekeys:
                yield self._agreed(now, "rekey")
        if not rekeys and wish.ike:
            current = now.current
            new = replace(current, **{"spi_i" if current.initiator else "spi_r": wish.ike})  # type: ignore[arg-type]
            now = self._with_ike(now, new)
        self.moved.add(who)
        yield self._agreed(
            now,
            "rekey" if rekeys else "update",
            report=MoveReport(messages=2, requests=1),
            supports=not rekeys if wish.update else None,
        )

    def _agreed(self, now: IkeContext, how: str, **more: Any) -> Agreed:
        self.have[str(now.remote_id)] = now
        return Agreed(now, str(now.remote_id) in self.moved, how, **more)

    def _with_ike(self, now: IkeContext, new: IkeGeneration) -> IkeContext:
        return replace(now, generations=(*now.generations, new), mid_initiator=0, mid_responder=0)

    def _rekeyed(self, old: IkeGeneration, ours: bytes) -> IkeGeneration:
        return replace(
            old,
            spi_i=ours,
            spi_r=self.dice.randbytes(8),
            initiator=True,
            nonce_i=self.dice.randbytes(32),
            nonce_r=self.dice.randbytes(32),
            secret=Secret(self.dice.randbytes(32)),
            old_skd=sk_keys(old).sk_d,
            old_prf=old.prf,
        )


class Place:
    """A gateway whose agent may die and begin anew; charon, kernel and store go on."""

    def __init__(self, store: MemoryStore, mobiles: Mobiles, *, kernel: bool = True, **config: Any) -> None:
        self.store = store
        self.mobiles = mobiles
        self.sad = Sad()
        self.charon = Charon(self.sad)
        self.mute = Mute()
        self.relay = Relay()
        self.nat = Nat()
        self._kernel = kernel
        self._config = {"addresses": (OURS.address,), "oseq_jump": 1000, **config}
        self.host: CharonHost
        self.sink: CharonSink
        self.begin()

    def begin(self) -> None:
        """An agent starts; what the one before it had not written yet is lost."""
        self.store.waiting.clear()
        self.host = CharonHost(HostConfig(kernel_esp=False, **self._config), self.store)
        self.host.detour.close()
        self.host.detour = Detour()  # type: ignore[assignment]
        self.host.kernel = self.sad if self._kernel else None  # type: ignore[assignment]
        self.host.nat = self.nat  # type: ignore[assignment]
        self.host.away = Away(self.store, self.host.kernel, self.host.detour, {}, nat=self.host.nat)
        self.host.away.load()
        self.host.follow = Follow(self.host.away, self.host.origins, self.host.record, self.host.importing)
        self.host.vici = self.charon  # type: ignore[assignment]
        self.host.mute = self.mute  # type: ignore[assignment]
        self.host.ha_link = Socket(self.charon)  # type: ignore[assignment]

        async def views() -> list[SaView]:
            return self.charon.views()

        async def view(sa: SaName, *, search: bool = True) -> SaView | None:
            return next((view for view in self.charon.views() if view.spis == sa), None)

        self.host.views = views  # type: ignore[method-assign]
        self.host.view = view  # type: ignore[method-assign]
        self.host.record.load(self.store.items("record"))
        self.sink = CharonSink(self.host, self.mobiles.move, self.mobiles.rename)
        self.sink._renames.relay = self.relay  # type: ignore[assignment]

    def sound(self) -> None:
        """No SA was harmed; names are unique; both ends have the same names and keys."""
        assert self.charon.offences == []
        assert not [sa for sa in self.charon.sas if sa.version != 2]
        expected: dict[tuple[Address, bytes], bytes] = {}
        for sa in self.charon.sas.values():
            mobile = self.mobiles.have.get(sa.remote_id)
            if mobile is None:
                continue
            assert sa.id == IkeId.of(mobile.current)
            assert sk_keys(sa.generation) == sk_keys(mobile.current)
            assert sa.state == "ESTABLISHED"
            assert sorted((c.spi_in, c.spi_out) for c in sa.children) == sorted(
                (c.spi_in, c.spi_out) for c in mobile.children
            )
            for child in mobile.children:
                keys = esp_keys(mobile.generations[child.generation], child)
                names = ((OURS.address, child.spi_in), (mobile.remote.address, child.spi_out))
                for name, (encr, _) in zip(names, keys, strict=True):
                    assert name not in expected, f"{name} twice"
                    expected[name] = encr.reveal()
        assert {name: sa.encr_key.reveal() for name, sa in self.sad.sas.items()} == expected
        assert not [key for key in self.sad.policies if key[2] is not None], "a guard was left"
        assert self.mute.muted == set()
        for row in self.host.coming.all():
            left = row.facts
            assert (left.stage, left.plan, left.guards, left.drawn) == ("imported", b"", (), "")


def fresh(count: int) -> bytes:
    return secrets.token_bytes(count)
