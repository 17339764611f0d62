"""Gateways tell each other where SAs are: packets reach the one that serves, and never go in a circle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from random import Random
from typing import Any

import pytest

from ikectx.errors import StoreError
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from ikectx.wire.whereabouts import What, Whereabouts
from tests.vici_bridge.away.test_absences import Gateway, left
from tests.vici_bridge.test_deadlines import MemoryStore
from tests.vici_bridge.vici.test_views import context
from vici_bridge.away.absences import Away
from vici_bridge.away.follow import Follow
from vici_bridge.away.origins import Origins
from vici_bridge.ha.record import ChildAdded, Deleted, Rekeyed, Updated

INNER = {"a": "10.3.0.1", "b": "10.3.0.2", "c": "10.3.0.3", "d": "10.3.0.4"}
PEERS = {"a": "bcd", "b": "acd", "c": "abd", "d": "abc"}


class Record:
    """What charon has."""

    def __init__(self) -> None:
        self.sas: dict[tuple[bytes, bytes], IkeContext] = {}

    def context(self, name: tuple[bytes, bytes]) -> IkeContext:
        return self.sas[name]

    def of(self, mn: str) -> list[tuple[bytes, bytes]]:
        return [name for name, one in self.sas.items() if str(one.remote_id) == mn]


class Node(Gateway):
    """A gateway among others; its agent may die."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.world = world
        self.record = Record()
        self.origins: Origins
        self.follow: Follow
        super().__init__()

    def begin(self) -> None:
        kernel: Any = self.kernel
        routes: Any = self.routes
        record: Any = self.record
        ways = {name: (ip_address(INNER[name]),) for name in self.world.peers[self.name]}
        self.away = Away(self.store, kernel, routes, ways, wall=lambda: next(self.world.wall))
        self.origins = Origins(self.store, wall=lambda: next(self.world.wall))
        self.follow = Follow(self.away, self.origins, record, lambda sa: sa in self.world.moving)
        self.origins.tell = self.tell
        self.away.load()
        self.origins.load()

    def restart(self) -> None:
        self.begin()
        views = [self.world.view(one) for one in self.record.sas.values()]
        self.follow.look(views)

    def tell(self, peer: str, news: Whereabouts) -> None:
        """In the store, until it is heard: the last about each SA."""
        self.world.post[self.name, peer, news.sa] = news

    def drop(self) -> None:
        """charon's policies go with its SA."""
        self.kernel.policies = {key: one for key, one in self.kernel.policies.items() if not one.templates}


class World:
    """Some gateways, one mobile node."""

    def __init__(self, peers: dict[str, str] | None = None, seed: int = 1) -> None:
        self.peers = peers or PEERS
        self.dice = Random(seed)
        self.wall: Iterator[float] = itertools.count(1e9)
        self.post: dict[tuple[str, str, tuple[bytes, bytes]], Whereabouts] = {}
        self.moving: set[tuple[bytes, bytes]] = set()
        self.nodes = {name: Node(name, self) for name in self.peers}
        self.at = ""
        self.sa: IkeContext
        self.epoch = 0
        self.been: set[str] = set()
        """Gateways that the SA has left."""

    def view(self, one: IkeContext) -> Any:
        from vici_bridge.vici.views import departing_view

        seen = departing_view(one)
        texts = [str(one.children[0].remote_ts[0].start) + "/32"]
        child = replace(seen.children[0], local_ts=("10.3.0.0/24",), remote_ts=tuple(texts))
        return replace(seen, children=(child,))

    def named(self) -> IkeContext:
        generation = replace(self.sa.current, spi_i=self.dice.randbytes(8), spi_r=self.dice.randbytes(8))
        return replace(self.sa, generations=(generation,), epoch=self.epoch)

    def connect(self, name: str) -> None:
        """The mobile node sets up an SA there."""
        self.sa = context()
        self.epoch = 0
        self.sa = self.named()
        self.at = name
        self.been.discard(name)
        node = self.nodes[name]
        node.record.sas[self.sa.spis] = self.sa
        node.protect(self.sa)
        node.follow.heed(ChildAdded(self.sa.spis, b"spi."))

    def rekey(self) -> None:
        old, node = self.sa, self.nodes[self.at]
        self.sa = self.named()
        node.record.sas = {self.sa.spis: self.sa}
        node.follow.heed(Rekeyed(old.spis, self.sa.spis))

    def end(self) -> None:
        node = self.nodes[self.at]
        node.record.sas = {}
        node.drop()
        node.follow.heed(Deleted(self.sa.spis))
        self.at = ""

    def deliver(self, few: bool = False) -> None:
        """Notices that wait; those that they lead to as well, unless only a few are."""
        while self.post:
            keys = list(self.post)
            for key in keys:
                if few and self.dice.random() < 0.5:
                    continue
                news = self.post.pop(key, None)
                if news is not None:
                    self.nodes[key[1]].follow.hear(key[0], news)
            if few:
                return

    def move(self, to: str, *, whole: bool = False, fails: bool = False, rename: bool = False) -> None:
        """To another gateway: as the two machines have it. `whole`: in one CTD."""
        source, target = self.nodes[self.at], self.nodes[to]
        before = replace(self.sa, epoch=self.epoch)
        here = replace(self.named(), epoch=self.epoch) if rename else before
        policies = [one for one in source.kernel.policies.values() if one.templates]
        self.moving.add(here.spis)

        def prepare() -> None:
            target.away.comes(before)
            target.protect(before)

        def freeze() -> None:
            source.away.leave(before, to, policies, unprepared=whole)
            source.drop()

        for step in (freeze, prepare) if whole else (prepare, freeze):
            step()
            self.check()
        self.been.add(self.at)
        ready = Whereabouts(before.spis, before.epoch + 1, What.READY)
        if whole and self.dice.random() < 0.7:
            source.follow.hear(to, ready)
            self.check()
        target.origins.came(before, source.name, here.spis)
        if fails:
            target.drop()
            target.away.stays(before)
            target.origins.undone(before)
            self.moving.discard(here.spis)
            self.check()
            for policy in policies:
                source.kernel.replace_policy(policy)
            source.away.back(before.spis)
            source.origins.stays(before.spis)
            self.been.discard(self.at)
            self.check()
            source.follow.hear(to, ready)
            self.check()
            return
        target.record.sas = {here.spis: here}
        target.origins.serves(before, here.spis)
        target.follow.serves(here.spis, here)
        self.moving.discard(here.spis)
        self.check()
        source.record.sas = {}
        departure = source.away.left(before.spis)
        assert departure is not None
        source.origins.left(departure)
        self.sa, self.at, self.epoch = here, to, self.epoch + 1
        self.been.discard(to)
        self.check()

    def check(self) -> None:
        for name in self.been:
            self.trace(name)

    def trace(self, name: str) -> str:
        """Where a packet ends that arrives at a gateway which has had the SA."""
        way = [name]
        while True:
            node = self.nodes[way[-1]]
            fate = node.packet()
            if fate == "protected":
                return f"protected at {node.name}"
            if not fate.startswith("sent on"):
                # where it ended, as with any SA that ends; those that sent it there hear of that
                ended = node.name not in self.been and len(way) > 1
                assert fate == "dropped" or ended, f"{' '.join(way)}: {fate}"
                return fate
            after = next(one for one, address in INNER.items() if fate.endswith(address))
            assert after not in way, f"round and round: {' '.join(way)} {after}"
            way.append(after)


def test_the_detour_follows_a_second_move() -> None:
    world = World()
    world.connect("a")
    world.move("b", rename=True)
    assert world.trace("a") == "protected at b"
    world.rekey()
    world.move("c")
    assert world.trace("a") == "protected at c", "by way of b"
    world.deliver()
    assert world.nodes["a"].packet() == f"sent on to {INNER['c']}"
    world.end()
    world.deliver()
    assert {world.trace(name) for name in "ab"} == {"dropped"}


def test_a_gateway_without_a_way_to_the_third_sends_by_the_second() -> None:
    world = World({"a": "b", "b": "ac", "c": "b", "d": ""})
    world.connect("a")
    world.move("b")
    world.move("c")
    world.deliver()
    assert world.nodes["a"].packet() == f"sent on to {INNER['b']}"
    assert world.nodes["a"].away.listing()[0].at == "c"
    assert world.trace("a") == "protected at c"


def test_back_and_forth() -> None:
    world = World()
    world.connect("a")
    for to in "babab":
        world.move(to, rename=True)
        world.deliver()
        assert {world.trace(name) for name in world.been} == {f"protected at {to}"}
    left = [node.away.listing() for node in world.nodes.values()]
    assert sorted(map(len, left)) == [0, 0, 0, 1]


def test_what_does_not_come_back_is_sent_on_again_only_when_that_is_safe() -> None:
    world = World()
    world.connect("a")
    world.move("b")
    world.move("a", fails=True)
    assert world.trace("a") == "dropped"
    world.deliver()
    assert world.trace("a") == "protected at b"


def test_an_agent_that_was_away_finds_out() -> None:
    world = World()
    world.connect("a")
    world.move("b")
    b = world.nodes["b"]
    b.record.sas = {}
    b.drop()
    b.restart()
    world.deliver()
    assert world.trace("a") == "dropped"
    assert [row.stage for row in world.nodes["a"].away.listing()] == ["ended"]

    world.connect("b")  # anew, with the same address
    world.deliver()
    assert world.trace("a") == "protected at b"

    world.end()
    world.deliver()
    world.connect("a")
    assert world.trace("a") == "protected at a"
    assert world.nodes["a"].away.listing() == []


def test_an_sa_that_did_not_come_is_forgotten_although_the_disk_was_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    world.connect("a")
    origins, sa = world.nodes["b"].origins, world.sa
    origins.came(sa, "a", sa.spis)

    def full(kind: str, key: str, *, soon: bool = False) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(world.nodes["b"].store, "delete", full)
        with pytest.raises(StoreError):
            origins.undone(sa)
    origins.undone(sa)
    assert not list(world.nodes["b"].store.items("origin"))


def test_an_sa_that_is_let_go_after_charon_listed_it_is_not_here() -> None:
    """The agent was killed in a transfer: it lists charon's SAs, and ends the transfer meanwhile."""
    world = World()
    world.connect("a")
    listed = [world.view(world.sa)]
    world.move("b")
    world.nodes["a"].follow.look(listed)
    assert world.trace("a") == "protected at b"
    assert world.nodes["a"].away.listing()


def test_an_sa_that_charon_has_not_let_go_yet_is_not_here() -> None:
    """The agent was killed in a release, when packets followed the SA already."""
    world = World()
    world.connect("a")
    listed = [world.view(world.sa)]
    world.move("b")
    a = world.nodes["a"]
    a.record.sas[world.sa.spis] = world.sa
    a.follow.look(listed)
    assert a.away.listing()


def test_an_sa_that_was_served_for_a_moment_is_forgotten() -> None:
    world = World()
    world.connect("a")
    origins, sa = world.nodes["b"].origins, world.sa
    origins.came(sa, "a", sa.spis)
    origins.serves(sa, sa.spis)  # what was to be written with it did not get onto the disk
    origins.undone(sa)
    assert not list(world.nodes["b"].store.items("origin"))


def test_an_sa_with_an_heir_has_not_ended() -> None:
    """The mobile node authenticates anew, and the new SA is there before the old one goes."""
    world = World()
    world.connect("a")
    world.move("b")
    b, old = world.nodes["b"], world.sa
    world.sa = world.named()
    b.record.sas = {world.sa.spis: world.sa}
    b.follow.heed(Deleted(old.spis))
    assert not world.post
    world.move("c")
    world.deliver()
    assert world.trace("a") == "protected at c"


def test_only_who_was_given_an_sa_is_believed() -> None:
    world = World()
    world.connect("a")
    world.move("b")
    a = world.nodes["a"]
    (row,) = a.away.listing()
    for what in (What.ENDED, What.HERE):
        a.follow.hear("c", Whereabouts(row.sa, row.epoch, what))
    a.follow.hear("c", Whereabouts(row.sa, row.epoch, What.MOVED, "c"))
    a.follow.hear("b", Whereabouts(row.sa, row.epoch + 1, What.ENDED))
    a.follow.hear("b", Whereabouts(SaName(b"unknown.", b"unknown."), 1, What.ENDED))
    assert world.trace("a") == "protected at b"


def test_a_relayed_node_that_comes_itself_is_reported_once_and_is_told_no_more() -> None:
    world = World()
    world.connect("a")
    given = world.sa
    world.move("b")
    a, b = world.nodes["a"], world.nodes["b"]
    at, relayed_at = given.spis, str(given.remote.address)
    world.deliver()
    b.origins.came(given, "a", at, relayed=True)
    b.origins.serves(given, at)
    assert b.origins.unannounced(1000) == [] and b.origins.unannounced(0) == [at]
    b.origins.announced(at)
    b.restart()
    assert b.origins.unannounced(0) == []
    b.follow.moves(at, relayed_at)  # another port of the gateway that relays it
    assert b.origins.relayed_by(given) == "a" and not world.post
    b.follow.moves(at, "198.51.100.9")
    b.follow.moves(at, "198.51.100.10")
    assert world.post == {("b", "a", at): Whereabouts(at, given.epoch + 1, What.CAME)}
    assert b.origins.relayed_by(given) == ""
    a.follow.hear("b", Whereabouts(at, given.epoch + 1, What.CAME))
    assert world.trace("a") == "protected at b"


@pytest.mark.parametrize("seed", range(60))
def test_a_walk(seed: int) -> None:
    """Moves of all kinds, notices late or lost for a while, agents that die: no circle, and nothing in the
    clear at any moment; and when all has been told, packets reach the one that serves."""
    dice = Random(seed)
    world = World(seed=seed)
    world.connect("a")
    connected = 1
    for _ in range(25):
        choice = dice.random()
        others = [name for name in INNER if name != world.at]
        if not world.at:
            world.connect(dice.choice(list(INNER)))
            connected += 1
        elif choice < 0.5:
            world.move(dice.choice(others), whole=dice.random() < 0.4, rename=dice.random() < 0.3)
        elif choice < 0.65:
            world.move(dice.choice(others), whole=dice.random() < 0.4, fails=True)
        elif choice < 0.75:
            world.rekey()
        elif choice < 0.8:
            world.end()
        elif choice < 0.9:
            world.nodes[dice.choice(list(INNER))].restart()
        world.check()
        world.deliver(few=True)
        world.check()
    world.deliver()
    if world.at:
        # one that connected anew elsewhere was not given to that gateway by those before
        fates = {f"protected at {world.at}"} | ({"dropped"} if connected > 1 else set())
        assert {world.trace(name) for name in world.been} <= fates


def test_what_charon_tells_of_an_sa_that_it_is_about_to_drop_ends_no_departure() -> None:
    """`ikectx resync` at that moment: the SA's policies went, and its packets left in the clear."""
    gateway, record = Gateway(), Record()
    here = left(gateway)
    record.sas[here.spis] = here
    follow = Follow(gateway.away, Origins(MemoryStore()), record, lambda sa: False)  # type: ignore[arg-type]
    follow.heed(Updated(here.spis))
    del record.sas[here.spis]
    assert gateway.packet() == "sent on to 10.3.0.3"


def test_what_a_peer_gives_again_and_again_is_remembered_once() -> None:
    """A mobile node that connects to the same gateway each day, and is given to this one each day."""
    store, now = MemoryStore(), [1e9]
    origins = Origins(store, wall=lambda: now[0])
    told: list[What] = []
    origins.tell = lambda peer, news: told.append(news.what)
    here = context()
    for day in range(40):
        now[0] += 86401.0
        name = SaName(day.to_bytes(8), b"abcdefgh")
        one = replace(here, generations=(replace(here.current, spi_i=name.spi_i, spi_r=name.spi_r),))
        origins.came(one, "a", one.spis)
        origins.serves(one, one.spis)
        origins.gone(one.spis, lambda row: None)
    assert len(store.items("origin")) == 1
    told.clear()
    origins.appeared(here.spis, str(here.remote_id), lambda wanted: True)
    assert told == [What.HERE]
    origins.gone(here.spis, lambda row: None)
    origins.came(replace(here, remote_id=replace(here.remote_id, data=b"another")), "b", here.spis)
    assert len(store.items("origin")) == 2, "the other one has just ended"
    now[0] += 86401.0
    origins.came(replace(here, remote_id=replace(here.remote_id, data=b"a third")), "b", here.spis)
    assert len(store.items("origin")) == 1, "what ended more than a day ago is forgotten"
