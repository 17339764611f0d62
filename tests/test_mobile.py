"""A mobile node's SA gets other addresses: on a modelled charon and kernel, with crashes at every step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from ipaddress import IPv4Address, ip_address, ip_network
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.context import Endpoint, IkeContext, IkeGeneration, ReplayState, TrafficSelector
from ikectx.errors import BusyError, CharonError, StateError, StoreError, UnknownSaError, UsageError
from ikectx.keys import esp_keys
from ikectx.numbers import Status
from vici_bridge import ha
from vici_bridge import steps as steps_module
from vici_bridge.ha import HaType
from vici_bridge.moves import ChildMove, Move, guards_of, leads, plan_move
from vici_bridge.xfrm import ALLOW, BLOCK, Encap, KernelPolicy, KernelSa, Mark, Selector, Template

from .mobile_world import JUMP, Crash, Node
from .peers import HandClock, a_context

OLD, NEW = Endpoint.of("198.51.100.7", 4500), Endpoint.of("203.0.113.9", 4500)
PSG, NSG = Endpoint.of("192.0.2.1", 4500), Endpoint.of("192.0.2.2", 4500)
VIP = IPv4Address("10.4.0.10")


def a_node_context(*, children: int = 1, older: bool = False) -> IkeContext:
    """As a mobile node sees it: the initiator, with a virtual IP of its own."""
    seen = a_context()
    (generation,) = seen.generations
    generation = replace(generation, initiator=True)
    generations: tuple[IkeGeneration, ...] = (generation,)
    if older:
        from ikectx.keys import sk_keys

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
    return asyncio.run(work)


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
    await node.mobile.quiet(node.sa)
    context = await node.mobile.export(node.sa)
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
    for kind in ("quiet", "move"):
        assert not node.store.items(kind)
    if node.kernel is not None:
        ends = {(sa.source, sa.destination) for sa in node.kernel.sas.values()}
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


def test_it_exports_what_only_the_mobile_node_has() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        context = await node.mobile.export(node.sa)
        assert (context.local, context.remote) == (OLD, PSG)
        assert context.local_vips == (VIP,)
        assert context.current.initiator
        assert context.children[0].outbound.seq >= 500
        await node.mobile.quiet(node.sa)
        passive = await node.mobile.export(node.sa)
        assert (passive.spis, passive.local_vips) == (context.spis, context.local_vips)

    do(scenario())


def test_a_move_beside_the_old_pair_loses_nothing() -> None:
    async def scenario() -> None:
        node = Node(a_node_context(children=2))
        after = await a_move(node)
        assert (after.local, after.remote) == (NEW, NSG)
        at(node, NEW, NSG)
        kernel = node.kernel
        assert kernel is not None and kernel.lost == 0
        # to the old gateway until the new pair's number is raised, then to the new one only
        for flow in {reqid for reqid, _, _ in kernel.sent}:
            ways = [destination for reqid, destination, _ in kernel.sent if reqid == flow]
            assert PSG.address not in ways[ways.index(NSG.address) :]
        assert node.socket.heard.index(HaType.CHILD_ADD) < node.socket.heard.index(HaType.CHILD_DELETE)
        assert node.charon.rekeyed == []
        assert node.charon.peers == (NSG,)

    do(scenario())


@pytest.mark.parametrize(("local", "remote"), [(OLD, NSG), (NEW, PSG)])
def test_pairs_that_share_a_name_come_one_after_the_other(local: Endpoint, remote: Endpoint) -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        await a_move(node, local, remote)
        at(node, local, remote)
        assert node.socket.heard.index(HaType.CHILD_DELETE) < node.socket.heard.index(HaType.CHILD_ADD)
        assert node.kernel is not None and node.kernel.lost

    do(scenario())


def test_a_child_older_than_its_ike_sas_keys_keeps_its_keys() -> None:
    async def scenario() -> None:
        node = Node(a_node_context(older=True))
        await a_move(node)
        at(node, NEW, NSG)
        assert node.host.record.context(node.sa).children[0].generation == 0
        await a_move(node, OLD, PSG)
        assert node.charon.remote == PSG

    do(scenario())


def test_new_names_and_new_addresses_at_once() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        names = {b"\xc1\0\0\0": b"\xc3\0\0\0", b"\xc2\0\0\0": b"\xc4\0\0\0"}
        after = await a_move(node, OLD, NSG, names)
        assert [(child.spi_in, child.spi_out) for child in after.children] == [(b"\xc3\0\0\0", b"\xc4\0\0\0")]
        at(node, OLD, NSG)
        assert node.kernel is not None and node.kernel.lost == 0  # beside, for no name is shared
        (kept,) = node.host.record.context(node.sa).children
        assert kept.spi_in == b"\xc3\0\0\0"

    do(scenario())


IKE_NAMES = {b"\x22GWr\0\0\0\1": b"\x55" * 8}


def test_a_new_name_of_the_ike_sa() -> None:
    async def scenario() -> None:
        node = Node(a_node_context(older=False))
        after = await a_move(node, NEW, NSG, IKE_NAMES)
        new = (node.sa[0], b"\x55" * 8)
        assert after.spis == node.charon.context.spis == new
        assert (after.mid_initiator, after.mid_responder) == (0, 0)
        at(node, NEW, NSG)
        kept = node.host.record.context(new)
        assert node.sa not in node.host.record
        assert (kept.remote, len(kept.generations), kept.children[0].generation) == (NSG, 2, 0)
        assert {entry.spis for entry in node.host.deadlines._entries.values()} >= {
            new[0].hex() + new[1].hex()
        }
        # and on from there
        node.sa = new
        await a_move(node, OLD, PSG)
        assert (node.charon.remote, node.charon.state) == (PSG, "ESTABLISHED")

    do(scenario())


def test_both_inbound_spis_are_heard_until_the_other_end_has_changed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(packets: int, within: float) -> int:
        clock = HandClock()
        monkeypatch.setattr(steps_module, "time", SimpleNamespace(monotonic=clock.now))
        monkeypatch.setattr(steps_module, "LINGER", within)
        node = Node(a_node_context())
        assert node.kernel is not None
        asked: list[bytes] = []
        replay = node.kernel.get_replay

        def counted(sa: KernelSa, *, outbound: bool | None = None) -> Any:
            state, usage = replay(sa, outbound=outbound)
            if not outbound and sa.spi == b"\xc3\0\0\0":
                assert (OLD.address, b"\xc1\0\0\0") in node.kernel.sas  # type: ignore[union-attr]
                asked.append(sa.spi)
                clock.forward(0.01)
                return state, replace(usage, packets=packets if len(asked) > 3 else 0)
            return state, usage

        monkeypatch.setattr(node.kernel, "get_replay", counted)
        await a_move(node, OLD, NSG, {b"\xc1\0\0\0": b"\xc3\0\0\0", b"\xc2\0\0\0": b"\xc4\0\0\0"})
        return len(asked)

    assert do(scenario(1, 60.0)) < 10
    assert do(scenario(0, 0.2)) > 10


def test_nothing_to_move() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        await a_move(node, OLD, PSG)
        at(node, OLD, PSG)
        assert not {HaType.CHILD_ADD, HaType.CHILD_DELETE, HaType.IKE_UPDATE} & set(node.socket.heard)

    do(scenario())


def test_everything_twice() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        context = await node.mobile.export(node.sa)
        for _ in range(2):
            await node.mobile.quiet(node.sa)
        for _ in range(2):
            await node.mobile.readdress(context, NEW, NSG)
        with pytest.raises(StateError, match="another change"):
            await node.mobile.readdress(context, OLD, NSG)
        for _ in range(2):
            await node.mobile.loud(node.sa)
        at(node, NEW, NSG)
        assert node.socket.heard.count(HaType.CHILD_ADD) == 1
        with pytest.raises(StateError, match="not PASSIVE"):
            await node.mobile.readdress(context, NEW, NSG)
        await a_move(node, OLD, PSG)
        assert (node.charon.local, node.charon.remote) == (OLD, PSG)

    do(scenario())


def test_the_earlier_lifetimes_stand() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        await a_move(node)
        assert {entry.child for entry in node.host.deadlines._entries.values()} == {"", "c1000000"}

    do(scenario())


# Without ESP in the kernel.


def test_with_user_space_esp_charon_rekeys_the_children() -> None:
    async def scenario() -> None:
        node = Node(a_node_context(), kernel=False)
        await a_move(node)
        at(node, NEW, NSG)
        assert node.charon.rekeyed == ["child 2"]

    do(scenario())


def test_a_rekeyed_child_that_lingers_is_left_to_charon() -> None:
    async def scenario() -> None:
        node = Node(a_node_context(children=2, older=True), kernel=False)
        fresh = [replace(child, generation=1) for child in node.context.children]
        context = node.host.record.context(node.sa)
        node.host.record.moved(node.sa, replace(context, children=(fresh[0], context.children[1])))
        node.charon.children[1].state = "REKEYED"
        await a_move(node)
        assert (node.charon.state, node.charon.remote) == ("ESTABLISHED", NSG)
        states = {child.state: (child.local, child.remote) for child in node.charon.children}
        assert states == {"INSTALLED": (NEW, NSG), "REKEYED": (OLD, PSG)}

    do(scenario())


def test_with_user_space_esp_an_older_child_is_refused_in_time() -> None:
    async def scenario() -> None:
        node = Node(a_node_context(older=True), kernel=False)
        with pytest.raises(CharonError) as caught:
            await node.mobile.quiet(node.sa)
        assert caught.value.status is Status.NOT_COVERED
        at(node, OLD, PSG)

    do(scenario())


# Not now.


def test_an_exchange_in_flight() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        node.charon.tasks = ["CHILD_REKEY"]
        with pytest.raises(BusyError, match="CHILD_REKEY"):
            await node.mobile.quiet(node.sa, unanswered=True, patience=0.02)
        assert not await node.mobile.only_addresses(node.sa)
        node.charon.tasks = ["IKE_MOBIKE"]
        with pytest.raises(BusyError, match="IKE_MOBIKE"):
            await node.mobile.quiet(node.sa, patience=0.02)
        assert await node.mobile.only_addresses(node.sa)
        at(node, OLD, PSG)
        await node.mobile.export(node.sa)
        await node.mobile.quiet(node.sa, unanswered=True)
        assert node.charon.state == "PASSIVE"

    do(scenario())


@pytest.mark.parametrize("had", [False, True], ids=["psg-had-it-not", "psg-had-it"])
def test_what_nobody_answered_begins_anew_under_the_number_that_is_expected(had: bool) -> None:
    async def scenario() -> None:
        node = Node(replace(a_node_context(), mid_initiator=7, mid_responder=3))
        assert await node.mobile.next_request(node.sa) == 3
        node.charon.tasks = ["IKE_DPD"]  # its ID is 6
        await node.mobile.quiet(node.sa, unanswered=True)
        for wrong in (5, 9):
            assert not await node.mobile.renumber(node.sa, wrong)
        assert node.host.record.context(node.sa).mid_initiator == 7
        node.socket.heard.clear()
        filled: list[int] = []

        async def fill(message_id: int) -> int:
            filled.append(message_id)
            return message_id + answers

        answers = 0
        if not had:  # charon must not say 6 twice
            assert not await node.mobile.renumber(node.sa, 6)
            assert not await node.mobile.renumber(node.sa, 6, fill)
            assert node.socket.heard == []
        answers = 1
        assert await node.mobile.renumber(node.sa, 7 if had else 6, fill)
        assert node.socket.heard == [ha.HaType.IKE_MID_INITIATOR]
        assert node.host.record.context(node.sa).mid_initiator == 7
        assert filled == ([] if had else [6, 6])
        node.charon.tasks = []
        before = node.host.record.context(node.sa).mid_initiator
        for expected, after in ((before, before), (before - 1, before), (before + 1, before + 1)):
            assert not await node.mobile.renumber(node.sa, expected)
            assert node.host.record.context(node.sa).mid_initiator == after

    do(scenario())


def test_an_exchange_that_ends_in_time() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        node.charon.tasks = ["IKE_MOBIKE"]
        asyncio.get_running_loop().call_later(0.02, node.charon.tasks.clear)
        await node.mobile.quiet(node.sa)
        assert node.charon.state == "PASSIVE"

    do(scenario())


def test_an_exchange_that_begins_just_then(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        segment = node.charon._segment

        def begun(*, active: bool) -> None:
            segment(active=active)
            node.charon.tasks = ["CHILD_REKEY"]

        monkeypatch.setattr(node.charon, "_segment", begun)
        with pytest.raises(BusyError, match="began"):
            await node.mobile.quiet(node.sa)
        at(node, OLD, PSG)

    do(scenario())


def test_what_is_not_there() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        node.charon.gone = True
        for call in (node.mobile.quiet, node.mobile.export):
            with pytest.raises(UnknownSaError):
                await call(node.sa)
        await node.mobile.loud(node.sa)

    do(scenario())


def test_a_child_nobody_told_of() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        stranger = replace(node.context.children[0], spi_in=b"\x99" * 4, spi_out=b"\x98" * 4)
        node.charon._install(stranger, esp_keys(node.context.current, stranger))
        with pytest.raises(UnknownSaError, match="no record of CHILD_SA"):
            await node.mobile.quiet(node.sa)

    do(scenario())


def test_numbers_that_are_used_up() -> None:
    async def scenario() -> None:
        context = a_node_context()
        (child,) = context.children
        full = replace(child, outbound=ReplayState((1 << 32) - JUMP))
        node = Node(replace(context, children=(full,)))
        with pytest.raises(CharonError, match="used up"):
            await node.mobile.quiet(node.sa)

    do(scenario())


def test_charon_that_adds_no_child() -> None:
    """The IKE_SA is at nSG; charon makes its children anew."""

    async def scenario() -> None:
        node = Node(a_node_context())
        node.charon.refuse_children = True
        context = await node.mobile.export(node.sa)
        await node.mobile.quiet(node.sa)
        with pytest.raises(CharonError, match="did not add"):
            await node.mobile.readdress(context, NEW, NSG)
        with pytest.raises(CharonError, match="did not add"):
            await node.mobile.loud(node.sa)
        assert (node.charon.state, node.charon.remote) == ("ESTABLISHED", NSG)
        assert node.charon.rekeyed == ["child 1"]
        assert node.kernel is not None
        assert not [policy for policy in node.kernel.policies.values() if policy.mark is not None]

    do(scenario())


def test_charon_that_deletes_the_wrong_child() -> None:
    """It would be one of another order; the second try, at `loud`, puts it right."""

    async def scenario() -> None:
        node = Node(a_node_context())
        node.charon.wrong_first = True
        context = await node.mobile.export(node.sa)
        await node.mobile.quiet(node.sa)
        with pytest.raises(CharonError, match="instead of the old one"):
            await node.mobile.readdress(context, NEW, NSG)
        node.charon.wrong_first = False
        await node.mobile.loud(node.sa)
        at(node, NEW, NSG)

    do(scenario())


def test_redirect_leaves_the_rest_to_charon() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        node.charon.tasks = ["CHILD_REKEY"]
        await node.mobile.redirect(node.sa, NEW, NSG)
        assert (node.charon.local, node.charon.remote, node.charon.peers) == (NEW, NSG, (NSG,))
        assert node.charon.rekeyed == ["child 1"]
        assert node.host.record.context(node.sa).remote == NSG

    do(scenario())


# Crashes.

SHAPES = {
    "beside": (NEW, NSG, {}),
    "same local address": (OLD, NSG, {}),
    "same gateway": (NEW, PSG, {}),
    "renamed": (NEW, NSG, {b"\xc1\0\0\0": b"\xc3\0\0\0", b"\xc2\0\0\0": b"\xc4\0\0\0"}),
    "all renamed": (NEW, NSG, {b"\xc2\0\0\0": b"\xc4\0\0\0", b"\x22GWr\0\0\0\1": b"\x55" * 8}),
    "half renamed": (OLD, NSG, {b"\xc2\0\0\0": b"\xc4\0\0\0"}),
}


@pytest.mark.parametrize(("shape", "older"), [*((shape, False) for shape in SHAPES), ("beside", True)])
def test_a_crash_at_any_step(shape: str, older: bool) -> None:
    """The next agent makes the SA active, where the one before it was taking it; then it moves back."""
    local, remote, renames = SHAPES[shape]

    async def crashed(step: int) -> bool:
        node = Node(a_node_context(children=2, older=older))
        node.begin(step)
        try:
            await a_move(node, local, remote, renames)
            ended = True
        except (Crash, asyncio.CancelledError):
            ended = False
        node.begin()
        await node.mobile.resume()
        moved = (node.charon.local, node.charon.remote) == (local, remote)
        assert moved or (node.charon.local, node.charon.remote) == (OLD, PSG)
        at(node, node.charon.local, node.charon.remote)
        assert node.charon.context.spis in node.host.record
        node.sa = node.charon.context.spis
        if moved:
            await a_move(node, OLD, PSG)
            assert (node.charon.local, node.charon.remote, node.charon.state) == (OLD, PSG, "ESTABLISHED")
        return ended

    async def every() -> int:
        step = 1
        while not await crashed(step):
            step += 1
        return step

    assert do(every()) > 12


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=2, max_size=5), st.sampled_from(sorted(SHAPES)))
def test_agents_that_crash_again_and_again(steps: list[int], shape: str) -> None:
    local, remote, renames = SHAPES[shape]

    async def scenario() -> None:
        node = Node(a_node_context(children=2))
        node.begin(steps[0])
        try:
            await a_move(node, local, remote, renames)
        except (Crash, asyncio.CancelledError):
            for step in steps[1:]:
                node.begin(step)
                try:
                    await node.mobile.resume()
                except (Crash, asyncio.CancelledError):
                    continue
        node.begin()
        await node.mobile.resume()
        at(node, node.charon.local, node.charon.remote)

    do(scenario())


def test_resume_waits_for_charon_and_forgets_what_it_no_longer_has() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        await node.mobile.quiet(node.sa)
        node.begin()
        real = node.charon.list_sas
        tries = 0

        def away() -> list[dict[str, Any]]:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise CharonError("not there yet")
            return real()

        node.charon.list_sas = away  # type: ignore[method-assign]
        await node.mobile.resume()
        at(node, OLD, PSG)
        await node.mobile.quiet(node.sa)
        node.charon.gone = True
        await node.mobile.resume()
        assert not node.store.items("quiet")

    do(scenario())


# Notes and policies.


def test_a_note_comes_back_as_it_was() -> None:
    move = Move(
        OLD,
        PSG,
        NEW,
        NSG,
        (
            ChildMove(b"abcd", b"efgh", b"ijkl", b"mnop", 7, 99, ReplayState(1 << 40, 64, 5, True)),
            ChildMove(b"1234", b"5678", b"1234", b"5678", 8),
        ),
        (NSG, Endpoint.of("2001:db8::2", 4500)),
        (b"\1\2", b""),
        (b"12345678", b"abcdefgh"),
        True,
    )
    assert Move.loads(move.dumps()) == move
    for raw in (b"", b"{}", b"[]", move.dumps()[:-1], move.dumps().replace(b"ends", b"end")):
        with pytest.raises(StoreError):
            Move.loads(raw)


def test_renames_must_be_of_this_sa() -> None:
    context = a_node_context()
    for wrong in ({b"none": b"1234"}, {b"\xc1\0\0\0": b"12345678"}, {b"12345678": b"87654321"}):
        with pytest.raises(UsageError):
            plan_move(context, [], NEW, NSG, wrong)


def test_guards_match_all_that_the_policy_does_and_go_before_it() -> None:
    selector = Selector.between(ip_network("10.4.0.10/32"), ip_network("10.3.0.0/24"))
    template = Template(OLD.address, PSG.address, reqid=3)
    for mark in (None, Mark(0x10, 0xFF), Mark(1 << 31, 1 << 31)):
        policy = KernelPolicy("out", selector, 371327, templates=(template,), mark=mark, index=9)
        value, mask = (mark.value, mark.mask) if mark is not None else (0, 0)
        for block in (False, True):
            pair = guards_of(policy, block=block)
            assert {guard.action for guard in pair} == {BLOCK if block else ALLOW}
            for guard in pair:
                assert guard.priority < policy.priority
                assert (guard.selector, guard.index) == (selector, 0)
                assert guard.templates == (() if block else (template,))
                assert KernelPolicy.parse(guard.raw).mark == guard.mark != mark
            for packet in (0, 0x10, 0xFFFFFFFF, 1 << 31, 1 << 30, 0x80000010):
                inside = packet & mask == value
                marks = [guard.mark for guard in pair if guard.mark is not None]
                assert sum(packet & one.mask == one.value for one in marks) == inside
    with pytest.raises(UsageError, match="32 bits"):
        guards_of(KernelPolicy("out", selector, mark=Mark(1, 0xFFFFFFFF)), block=False)


def test_the_way_an_sa_leads() -> None:
    sa = KernelSa(OLD.address, PSG.address, b"abcd", encap=Encap(4500, 4500))
    assert leads(sa, OLD, PSG)
    assert not leads(None, OLD, PSG)
    assert not leads(sa, PSG, OLD)
    assert not leads(sa, OLD, replace(PSG, port=40000))
    assert leads(replace(sa, encap=None), OLD, replace(PSG, port=40000))
