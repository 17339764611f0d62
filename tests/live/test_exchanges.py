"""Exchanges of the agent's own with a real charon at the mobile node, beside the gateway's muted one.

What nSG does with an SA that its charon must not have under the old names: psg's charon is muted, and the
test speaks for it from psg's network namespace, with keys that psg's agent knows. charon at the mobile node
logs the keys it derives: they are compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ikectx.engine.ports import MoveReport
from ikectx.errors import RefusedError
from ikectx.numbers import Encr, Integ, KeMethod, Mode, Prf, Protocol
from ikectx.sa.context import (
    ChildContext,
    Endpoint,
    IkeGeneration,
    ReplayState,
    Secret,
    TrafficSelector,
)
from ikectx.sa.keys import child_keys, iv_length, sk_keys
from mobike_ext.address_update import AddressNotice, Condition
from mobike_ext.link import ask_rekey, end_rekey, run_spi_update
from mobike_ext.rekey import REKEY_OCTETS, ChildRekey, ChildRekeyed, IkeRekey, IkeRekeyed
from mobike_ext.requester import SaEnd
from mobike_ext.spi_update import FRESH_OCTETS, SpiUpdate, Unsupported, ask, ask_peer
from tests.netns import of_name
from vici_bridge.kernel.mute import MARK, Mute

from .world import LOGGED, World, spis, until

pytestmark = pytest.mark.live


@dataclass(slots=True)
class Agent:
    """The IKE_SA as psg's agent has it, and the message ID of the next request."""

    world: World
    generation: IkeGeneration
    child: ChildContext
    message_id: int
    local: Endpoint
    remote: Endpoint
    moves: list[MoveReport] = field(default_factory=list)

    @property
    def next(self) -> tuple[int, Endpoint, Endpoint]:
        return self.message_id, self.local, self.remote

    def _ran(self, move: MoveReport) -> None:
        self.moves.append(move)
        self.message_id += move.requests

    def rekey_child(self, ke: KeMethod | None = None, new_spi: bytes | None = None) -> ChildRekeyed:
        machine = ChildRekey(
            SaEnd(self.generation, *self.next),
            0,
            self.child,
            new_spi=new_spi or b"\xc9" + secrets.token_bytes(3),
            fresh=secrets.token_bytes(REKEY_OCTETS),
            ke=ke,
        )
        try:
            asyncio.run(ask_rekey(machine, mark=MARK))
            machine.installed()
            result = asyncio.run(end_rekey(machine, mark=MARK))
        finally:
            self._ran(machine.report)
        assert isinstance(result, ChildRekeyed)
        self.child = result.child
        return result

    def rekey_ike(self) -> IkeRekeyed:
        machine = IkeRekey(
            SaEnd(self.generation, *self.next),
            new_spi=secrets.token_bytes(8),
            fresh=secrets.token_bytes(REKEY_OCTETS),
        )
        asyncio.run(ask_rekey(machine, mark=MARK))
        machine.installed()
        result = asyncio.run(end_rekey(machine, mark=MARK))
        self.moves.append(machine.report)
        assert isinstance(result, IkeRekeyed)
        self.generation, self.message_id = result.generation, 0
        return result

    def ask(self, *renames: Any, **options: Any) -> Any:
        machine = SpiUpdate(
            SaEnd(self.generation, *self.next),
            renames,
            iv=secrets.token_bytes(iv_length(self.generation.encr)),
            fresh=secrets.token_bytes(FRESH_OCTETS),
            **(
                {"address": AddressNotice(secrets.token_bytes(16), Condition.NAT_ANY | Condition.NAT_THERE)}
                | options
            ),
        )
        report = asyncio.run(run_spi_update(machine, mark=MARK))
        self._ran(report.move)
        return report

    def same_child(self) -> None:
        """The mobile node has that child and no other, with the same keys."""
        crossed = (self.child.spi_out.hex(), self.child.spi_in.hex())
        until(
            lambda: self.world.children("mn") == {self.child.name: crossed}, "the mobile node has the child"
        )
        self.logged(child_keys(self.generation, self.child))

    def same_ike(self) -> None:
        """The mobile node has that IKE_SA and no other, with the same keys."""
        ours = (self.generation.spi_i.hex(), self.generation.spi_r.hex())
        until(
            lambda: [spis(sa) for sa in self.world.lab.list_sas("mn")] == [ours], "the mobile node's IKE_SA"
        )
        self.logged(sk_keys(self.generation))

    def logged(self, keys: Any) -> None:
        """The mobile node derived these keys."""
        logged = self.world.logged("mn")
        for name in keys.__slots__:
            key = getattr(keys, name).reveal().hex()
            assert not key or key in logged.get(LOGGED[name], ()), f"the mobile node has another {name}"


def _generation(shown: dict[str, Any]) -> IkeGeneration:
    return IkeGeneration(
        spi_i=bytes.fromhex(shown["spi_i"]),
        spi_r=bytes.fromhex(shown["spi_r"]),
        nonce_i=bytes.fromhex(shown["nonce_i"]),
        nonce_r=bytes.fromhex(shown["nonce_r"]),
        initiator=shown["initiator"],
        secret=Secret(bytes.fromhex(shown["secret"])),
        prf=Prf[shown["prf"]],
        encr=Encr[shown["encr"]],
        encr_bits=shown["encr_bits"],
        integ=Integ[shown["integ"]],
        ke=KeMethod[shown["ke"]],
    )


def _selector(text: str) -> TrafficSelector:
    net = ip_network(text.removesuffix(" dynamic"))
    return TrafficSelector(net[0], net[-1], dynamic=text.endswith(" dynamic"))


def _child(shown: dict[str, Any]) -> ChildContext:
    return ChildContext(
        spi_in=bytes.fromhex(shown["spi_in"]),
        spi_out=bytes.fromhex(shown["spi_out"]),
        nonce_i=bytes.fromhex(shown["nonce_i"]),
        nonce_r=bytes.fromhex(shown["nonce_r"]),
        name=shown["name"],
        generation=0,
        initiator=shown["initiator"],
        encr=Encr[shown["encr"]],
        encr_bits=shown["encr_bits"],
        integ=Integ[shown["integ"]],
        ke=KeMethod[shown["ke"]],
        protocol=Protocol[shown["protocol"]],
        mode=Mode[shown["mode"]],
        esn=shown["esn"],
        local_ts=tuple(map(_selector, shown["local_ts"])),
        remote_ts=tuple(map(_selector, shown["remote_ts"])),
        inbound=ReplayState(window=32),
    )


def _endpoint(text: str) -> Endpoint:
    host, _, port = text.rpartition(":")
    return Endpoint(ip_address(host.strip("[]")), int(port))


@contextlib.contextmanager
def agent_of(world: World) -> Iterator[Agent]:
    """psg's charon says nothing any more; the test does, in psg's namespace."""
    shown = world.context("psg", secrets=True)
    (generation,), (child,) = shown["generations"], shown["children"]
    agent = Agent(
        world,
        _generation(generation),
        _child(child),
        shown["mid_initiator"],
        _endpoint(shown["local"]),
        _endpoint(shown["remote"]),
    )
    names = agent.generation.spis
    with of_name(world.lab.net.namespace("psg")).entered():
        mute = Mute()
        mute.mute_in(names)
        mute.mute_out(names)
        try:
            yield agent
        finally:
            mute.unmute(names)
            world.broken = True  # psg's charon knows nothing of all this


def test_a_child_is_rekeyed(world: World) -> None:
    # psg -> MN  CREATE_CHILD_SA  N(REKEY_SA), SA, Ni, TSi, TSr
    # MN -> psg  CREATE_CHILD_SA  SA, Nr, TSi, TSr
    # psg -> MN  INFORMATIONAL    D(old), answered by the MN's D; and the same once more
    world.up()
    with agent_of(world) as agent:
        for _ in range(2):
            old = agent.child
            result = agent.rekey_child()
            assert result.deleted
            assert agent.child.ke is KeMethod.NONE
            assert (agent.child.local_ts, agent.child.remote_ts) == (old.local_ts, old.remote_ts)
            agent.same_child()
            assert (agent.moves[-1].requests, agent.moves[-1].messages) == (2, 4)


@pytest.mark.parametrize(
    ("proposal", "ke"),
    [
        ("aes128gcm16-x25519", KeMethod.CURVE_25519),
        ("aes256-sha256-modp2048", KeMethod.MODP_2048),
        ("aes128gcm16-modp4096", KeMethod.MODP_4096),
        ("aes256gcm16-ecp256", KeMethod.ECP_256),
        ("aes128gcm16-ecp384", KeMethod.ECP_384),
        ("chacha20poly1305-ecp521", KeMethod.ECP_521),
        ("aes128gcm16-curve448", KeMethod.CURVE_448),
    ],
)
def test_forward_secrecy(world: World, proposal: str, ke: KeMethod) -> None:
    # as above, with KEi and KEr; the second rekey takes the method of the first
    world.up(esp=proposal)
    with agent_of(world) as agent:
        assert agent.child.ke is KeMethod.NONE  # made by IKE_AUTH
        assert agent.rekey_child(ke).deleted
        agent.same_child()
        assert agent.rekey_child().deleted
        agent.same_child()
        assert agent.child.ke is ke


def test_a_peer_that_insists_on_a_key_exchange(world: World) -> None:
    # psg -> MN  CREATE_CHILD_SA  without KE: NO_PROPOSAL_CHOSEN; psg -> MN  once more with the IKE_SA's
    world.up(esp="aes128gcm16-x25519")
    with agent_of(world) as agent:
        assert agent.rekey_child().deleted
        assert agent.child.ke is KeMethod.CURVE_25519
        assert agent.moves[-1].requests == 3
        agent.same_child()


def test_refusals(world: World) -> None:
    # psg -> MN  CREATE_CHILD_SA  with a method the MN does not have: NO_PROPOSAL_CHOSEN
    # psg -> MN  CREATE_CHILD_SA  for a child the MN does not have: CHILD_SA_NOT_FOUND
    before = world.up() and world.children("mn")
    with agent_of(world) as agent:
        with pytest.raises(RefusedError, match="NO_PROPOSAL_CHOSEN"):
            agent.rekey_child(KeMethod.ECP_256)
        child, agent.child = agent.child, replace(agent.child, spi_in=b"\xc0\1\2\3")
        with pytest.raises(RefusedError, match="CHILD_SA_NOT_FOUND"):
            agent.rekey_child()
        assert world.children("mn") == before
        agent.child = child
        assert agent.rekey_child().deleted
        agent.same_child()


def test_both_ends_rekey_the_child(world: World) -> None:
    # MN -> psg  CREATE_CHILD_SA  N(REKEY_SA) ..., which nobody answers
    # psg -> MN  CREATE_CHILD_SA  N(REKEY_SA) ..., and so on: the MN takes it all the same
    world.up()
    with agent_of(world) as agent:
        world.begin_rekey("mn")
        old = agent.child
        assert agent.rekey_child().deleted
        crossed = (agent.child.spi_out.hex(), agent.child.spi_in.hex())
        until(lambda: world.children("mn")[agent.child.name] == crossed, "the mobile node has the child")
        assert (old.spi_out.hex(), old.spi_in.hex()) not in world.children("mn").values()
        agent.logged(child_keys(agent.generation, agent.child))


@pytest.mark.parametrize(
    "ike", ["aes128gcm16-prfsha256-x25519", "aes256-sha384-modp3072", "aes128-sha256-ecp384"]
)
def test_the_ike_sa_is_rekeyed(world: World, ike: str) -> None:
    # psg -> MN  CREATE_CHILD_SA  SA, Ni, KEi;  MN -> psg  SA, Nr, KEr
    # psg -> MN  INFORMATIONAL    D(IKE_SA), empty answer
    # then under the new SPIs, from message ID 0: a child rekey, an IKE rekey, another child rekey
    world.up(ike=ike)
    with agent_of(world) as agent:
        for _ in range(2):
            assert agent.rekey_ike().deleted
            agent.same_ike()
            assert agent.rekey_child().deleted
            agent.same_child()


def test_a_peer_that_does_not_know_update_spi(world: World) -> None:
    # psg -> MN  INFORMATIONAL  N(UPDATE_SA_ADDRESSES), N(NAT_DETECTION_*), N(COOKIE2), N(UPDATE_SPI) x 4,
    #                           N(UPDATE_SPI_SUPPORTED)
    # MN -> psg  INFORMATIONAL  N(NAT_DETECTION_*), N(COOKIE2): as if the notifies were not there
    world.up()
    with agent_of(world) as agent:
        names = agent.generation, agent.child
        every = (
            ask(Protocol.ESP, names[1].spi_in, b"\xc9\1\2\3"),
            ask_peer(Protocol.ESP, names[1].spi_out),
            ask(Protocol.IKE, names[0].spi_r, b"newnames"),
            ask_peer(Protocol.IKE, names[0].spi_i),
        )
        report = agent.ask(*every, address=None, announce=True)
        assert report.outcome == Unsupported()
        assert (report.move.requests, report.move.messages) == (1, 2)
        # user-space ESP has no other way to move a child than a rekey, so this comes last
        report = agent.ask(*every, announce=True)
        assert report.outcome == Unsupported()
        assert world.one("mn")["state"] == "ESTABLISHED"
        agent.same_ike()
