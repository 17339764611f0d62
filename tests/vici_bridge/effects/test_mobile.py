"""A mobile node's charon and kernel: the move of an SA to another gateway, and what stands in its way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from ikectx.clock import steady_wall
from ikectx.errors import BusyError, CharonError, KernelError, StateError, UnknownSaError
from ikectx.node.agreement import Agreement
from ikectx.numbers import Status
from ikectx.sa.context import Address, Endpoint, ReplayState
from ikectx.sa.keys import esp_keys
from ikectx.sa.name import SaName
from tests.mobile_world import (
    JUMP,
    NEW,
    NSG,
    OLD,
    PSG,
    VIP,
    Kernel,
    Node,
    a_move,
    a_node_context,
    at,
    do,
    quick,
)
from vici_bridge.effects import steps as steps_module
from vici_bridge.effects.mobile import BEGUN, EndedUnheardError
from vici_bridge.effects.mobile_move import MobileMove
from vici_bridge.effects.steps import MoveSteps
from vici_bridge.ha import messages as ha
from vici_bridge.ha.messages import HaType
from vici_bridge.kernel.kernel import LATE
from vici_bridge.kernel.xfrm import KernelPolicy, KernelSa
from vici_bridge.kernel.xfrm_parts import TRANSPORT

__all__ = ["quick"]


def test_it_exports_what_only_the_mobile_node_has() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        context = await node.mobile.export(node.sa)
        assert (context.local, context.remote) == (OLD, PSG)
        assert context.local_vips == (VIP,)
        assert context.current.initiator
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


def kernel_policies(kernel: Kernel) -> tuple[KernelPolicy, KernelPolicy]:
    """An inbound policy as charon has it for the first outbound one, and that."""
    out = next(policy for policy in kernel.policies.values() if policy.direction == "out")
    sel, (template,) = out.selector, out.templates
    turned = replace(
        sel,
        source=sel.destination,
        source_prefix=sel.destination_prefix,
        destination=sel.source,
        destination_prefix=sel.source_prefix,
    )
    back = replace(template, source=template.destination, destination=template.source)
    return replace(out, direction="in", selector=turned, templates=(back,)), out


def test_packets_go_by_the_new_place_before_anything_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        node = Node(a_node_context(children=2))
        kernel = node.kernel
        assert kernel is not None
        context = await node.mobile.export(node.sa)
        kernel.send()
        before = len(kernel.sent)
        await node.mobile.ahead(context, NEW, NSG)
        assert kernel.place is not None and len(kernel.place.pairs) == 2
        kernel.send()
        numbers: dict[int, int] = {reqid: number for reqid, _, number in kernel.sent[:before]}
        for reqid, destination, number in kernel.sent[before:]:
            if destination == NSG.address:
                assert number > numbers[reqid] + JUMP  # below that everything is old for the new gateway
        assert kernel.sent[-1][1] == NSG.address
        assert HaType.IKE_UPDATE not in node.socket.heard
        await node.mobile.quiet(node.sa)
        mark = len(kernel.sent)
        (inbound, outbound), seen = kernel_policies(kernel), []
        end = node.host.rewrite.end  # type: ignore[union-attr]

        def ends() -> None:
            # charon's policies want the new pair by now, and packets still come by the old one
            guards = [policy for policy in kernel.policies.values() if policy.mark is not None]
            seen.append({(policy.direction, int(policy.templates[0].source)) for policy in guards})
            end()

        monkeypatch.setattr(node.host.rewrite, "end", ends)
        for policy in (inbound, replace(inbound, direction="fwd")):
            kernel.replace_policy(policy)
        await node.mobile.readdress(context, NEW, NSG)
        assert seen == [{("in", 0), ("fwd", 0)}] and outbound.direction == "out"
        for policy in (inbound, replace(inbound, direction="fwd")):
            kernel.delete_policy(policy)
        await node.mobile.loud(node.sa)
        assert {destination for _, destination, _ in kernel.sent[mark:]} == {NSG.address}
        assert kernel.lost == 0
        at(node, NEW, NSG)

    do(scenario())


@pytest.mark.parametrize("why", ["versions", "transport", "no kernel", "no children", "kernel"])
def test_packets_wait_where_they_cannot_go_ahead(why: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        node = Node(a_node_context(children=0 if why == "no children" else 1), kernel=why != "no kernel")
        context = await node.mobile.export(node.sa)
        local = Endpoint.of("2001:db8::9", 4500) if why == "versions" else NEW
        kernel = node.kernel
        if kernel is not None and why == "transport":
            kernel.sas = {name: replace(sa, mode=TRANSPORT) for name, sa in kernel.sas.items()}
        if kernel is not None and why == "kernel":
            kernel.set_replay = refuses  # type: ignore[method-assign]
        await node.mobile.ahead(context, local, NSG)
        await node.mobile.home(node.sa)
        assert kernel is None or kernel.place is None
        assert ("waits for the new gateway" in caplog.text) is (why == "kernel")

    def refuses(*args: Any, **more: Any) -> None:
        raise KernelError("not now")

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
        new = SaName(node.sa[0], b"\x55" * 8)
        assert after.spis == node.charon.context.spis == new
        assert (after.mid_initiator, after.mid_responder) == (0, 0)
        at(node, NEW, NSG)
        kept = node.host.record.context(new)
        assert node.sa not in node.host.record
        assert (kept.remote, len(kept.generations), kept.children[0].generation) == (NSG, 2, 0)
        assert {entry.spis for entry in node.host.deadlines._entries.values()} >= {new.key}
        # and on from there
        node.sa = new
        await a_move(node, OLD, PSG)
        assert (node.charon.remote, node.charon.state) == (PSG, "ESTABLISHED")

    do(scenario())


def test_both_inbound_spis_are_heard_until_the_other_end_has_changed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(packets: int, within: float) -> int:
        monkeypatch.setattr(steps_module, "LINGER", within)
        node = Node(a_node_context())
        assert node.kernel is not None
        asked: list[bytes] = []
        get_sas, linger = node.kernel.get_sas, MoveSteps._linger

        def counted(names: Sequence[tuple[Address, bytes]]) -> list[KernelSa | None]:
            inbound, *others = get_sas(names)
            if inbound is not None and inbound.spi == b"\xc3\0\0\0":
                assert (OLD.address, b"\xc1\0\0\0") in node.kernel.sas  # type: ignore[union-attr]
                asked.append(inbound.spi)
                usage = replace(inbound.usage, packets=packets if len(asked) > 3 else 0)
                inbound = replace(inbound, usage=usage)
            return [inbound, *others]

        async def lingering(steps: MoveSteps, move: MobileMove) -> Any:
            monkeypatch.setattr(node.kernel, "get_sas", counted)
            return await linger(steps, move)

        monkeypatch.setattr(MoveSteps, "_linger", lingering)
        await a_move(node, OLD, NSG, {b"\xc1\0\0\0": b"\xc3\0\0\0", b"\xc2\0\0\0": b"\xc4\0\0\0"})
        if not packets:
            # the gateway that served it may go on with the old one, until the other begins with the new one
            assert node.kernel.heard == [b"\xc1\0\0\0"]
            assert node.kernel.sas[OLD.address, b"\xc1\0\0\0"].sequence == LATE
            packets = 1
            await asyncio.sleep(0.2)
        assert (OLD.address, b"\xc1\0\0\0") not in node.kernel.sas
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


def test_who_knows_charons_sas_hears_that_they_have_changed() -> None:
    """charon reports nothing of what it was ordered to change."""

    async def scenario() -> None:
        node = Node(a_node_context())
        told: list[str] = []
        node.host.on_change = lambda change: told.append(node.charon.state)
        await a_move(node)
        assert told[-1] == "ESTABLISHED"

    do(scenario())


@pytest.mark.parametrize(("there", "stirred"), [(True, 0), (False, 1)])
def test_one_that_no_gateway_wants_at_its_new_place_looks_for_its_own(there: bool, stirred: int) -> None:
    """charon does not hear that an address goes while the SA is passive."""

    async def scenario() -> None:
        node = Node(a_node_context())
        await node.mobile.quiet(node.sa)
        if not there:
            node.places.discard(OLD.address)
        await node.mobile.loud(node.sa)
        assert node.charon.state == "ESTABLISHED"
        assert node.stirred == stirred

    do(scenario())


def test_guards_go_with_an_sa_that_charon_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are more important than the policies of the SA with which the node connects anew."""

    async def scenario() -> None:
        node = Node(a_node_context())
        assert node.kernel is not None
        context = await node.mobile.export(node.sa)
        await node.mobile.quiet(node.sa)
        before = set(node.kernel.dump_policies())

        async def dead(*_: object) -> None:
            raise CharonError("charon is gone")

        monkeypatch.setattr(node.mobile.steps, "add_pairs", dead)
        with pytest.raises(CharonError):
            await node.mobile.readdress(context, NEW, NSG)
        assert set(node.kernel.dump_policies()) - before
        node.charon.gone = True
        await node.mobile.loud(node.sa)
        assert not set(node.kernel.dump_policies()) - before

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


def test_one_that_is_ended_in_the_moment_it_becomes_passive(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        pause = node.host.segments.pause

        async def paused() -> None:
            await pause()
            node.charon.gone = True

        monkeypatch.setattr(node.host.segments, "pause", paused)
        with pytest.raises(EndedUnheardError):
            await node.mobile.quiet(node.sa)
        with pytest.raises(UnknownSaError) as gone:
            await node.mobile.quiet(node.sa)
        assert not isinstance(gone.value, EndedUnheardError), "it was gone before"

    do(scenario())


def test_one_that_is_replaced_in_the_moment_it_becomes_passive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway rekeys the IKE_SA just then: the new one became passive, too, and must not stay so."""

    async def scenario() -> None:
        node = Node(a_node_context())
        pause, context = node.host.segments.pause, node.charon.context

        async def paused() -> None:
            await pause()
            new = replace(context.current, spi_i=b"newnewne", spi_r=b"newnewer")
            node.charon.context = replace(context, generations=(new,))

        monkeypatch.setattr(node.host.segments, "pause", paused)
        with pytest.raises(EndedUnheardError):
            await node.mobile.quiet(node.sa)
        assert (node.charon.active, node.charon.state) == (True, "ESTABLISHED")

    do(scenario())


@pytest.mark.parametrize("had", [False, True], ids=["psg-had-it-not", "psg-had-it"])
def test_what_nobody_answered_begins_anew_under_the_number_that_is_expected(
    had: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        node = Node(replace(a_node_context(), mid_initiator=7, mid_responder=3))
        assert await node.mobile.next_request(node.sa) == 3
        node.charon.tasks = ["IKE_DPD"]  # its ID is 6
        await node.mobile.quiet(node.sa, unanswered=True)
        for wrong in (5, 9):
            assert not await node.mobile.renumber(node.sa, wrong, NEW, NSG)
        assert node.host.record.context(node.sa).mid_initiator == 7
        node.socket.heard.clear()
        filled: list[int] = []

        async def use_up(sa: SaName, message_id: int, local: Endpoint, remote: Endpoint) -> int:
            assert (sa, local, remote) == (node.sa, NEW, NSG)
            filled.append(message_id)
            return message_id + answers

        monkeypatch.setattr(node.mobile, "use_up", use_up)
        answers = 0
        if not had:  # charon must not say 6 twice
            assert not await node.mobile.renumber(node.sa, 6, NEW, NSG)
            assert node.socket.heard == []
        answers = 1
        assert await node.mobile.renumber(node.sa, 7 if had else 6, NEW, NSG)
        assert node.socket.heard == [ha.HaType.IKE_MID_INITIATOR]
        assert node.host.record.context(node.sa).mid_initiator == 7
        assert filled == ([] if had else [6, 6])
        node.charon.tasks = []
        before = node.host.record.context(node.sa).mid_initiator
        for expected, after in ((before, before), (before - 1, before), (before + 1, before + 1)):
            assert not await node.mobile.renumber(node.sa, expected, NEW, NSG)
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


def test_a_rekey_that_came_due_while_the_sa_was_passive_is_asked_for() -> None:
    # charon forgets it, and the CHILD_SA would expire
    async def scenario() -> None:
        node = Node(a_node_context())
        await node.mobile.quiet(node.sa)
        node.charon.rekey_time = -3
        await node.mobile.loud(node.sa)
        (due,) = node.host.deadlines.due(steady_wall())
        assert bytes.fromhex(due.child) == node.context.children[0].spi_in

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


def test_new_names_are_heard_before_charon_has_them() -> None:
    # the gateway may send by them as soon as it has agreed; what came so does not come again
    async def scenario() -> None:
        node = Node(a_node_context())
        assert node.kernel is not None
        renames = {b"\xc1\0\0\0": b"\xc3\0\0\0", b"\xc2\0\0\0": b"\xc4\0\0\0"}
        old = node.kernel.sas[OLD.address, b"\xc1\0\0\0"]
        node.mobile.hear(OLD, {b"\xc1\0\0\0": b"\xc3\0\0\0"})
        ours = node.kernel.sas[OLD.address, b"\xc3\0\0\0"]
        assert (ours.encr_key, ours.sequence, ours.replay.seq) == (old.encr_key, LATE, 0)
        came = replace(ours.replay, seq=1 << 24, bitmap=7)
        node.kernel.sas[OLD.address, ours.spi] = replace(ours, replay=came)
        await a_move(node, OLD, NSG, renames)
        at(node, OLD, NSG)
        now = node.kernel.sas[OLD.address, b"\xc3\0\0\0"]
        assert now.sequence != LATE
        assert (now.replay.seq, now.replay.bitmap & 7) == (1 << 24, 7)

    do(scenario())


def test_what_was_ended_while_it_was_passive_and_no_agent_ran() -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        await node.mobile.quiet(node.sa)
        node.begin()  # another agent
        assert {sa: context.spis for sa, context in node.mobile.left_passive().items()} == {node.sa: node.sa}
        node.charon.gone = True
        assert await node.mobile.resume() == {node.sa: node.sa}
        assert node.mobile.left_passive() == {}
        assert await node.mobile.resume() == {}
        assert not await node.mobile.listed(node.sa)

    do(scenario())


@pytest.mark.parametrize("passive", [True, False])
@pytest.mark.parametrize("looks", [1, 2, 3, 4])
def test_a_charon_that_hangs_has_the_new_addresses_when_it_answers_again(
    looks: int, passive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new gateway serves the SA by then, and charon went on at the old one's address for good."""

    async def scenario() -> None:
        node = Node(a_node_context())
        context = await node.mobile.export(node.sa)
        await node.mobile.ahead(context, NEW, NSG)
        if passive:
            await node.mobile.quiet(node.sa)
        listed, hangs = node.charon.list_sas, looks

        def hanging() -> Any:
            nonlocal hangs
            if hangs:
                hangs -= 1
                raise CharonError("charon did not answer in time")
            return listed()

        monkeypatch.setattr(node.charon, "list_sas", hanging)
        applied = await node.mobile.apply(context, Agreement(NEW, NSG, {}, (NSG,)), passive=passive)
        assert applied.passive
        try:
            await node.mobile.loud(node.sa)
        except CharonError:
            node.mobile.loud_later(node.sa, asyncio.Lock())
        for _ in range(100):
            if not hangs and node.charon.state == "ESTABLISHED" and not node.store.rows("mobile"):
                break
            await asyncio.sleep(1.0)
        at(node, NEW, NSG)
        assert node.charon.peers == (NSG,)

    do(scenario())


@pytest.mark.parametrize("begins", [False, True])
def test_an_exchange_that_waits_in_charons_queue_is_begun(begins: bool) -> None:
    """charon was told message IDs, and looked for its gateway before: nothing else told it to begin."""

    async def scenario() -> None:
        node = Node(a_node_context())
        context = await node.mobile.export(node.sa)
        node.charon.tasks = ["IKE_MOBIKE"]
        await node.mobile.quiet(node.sa, unanswered=True)
        node.charon.tasks, node.charon.queued = [], ["IKE_MOBIKE", "IKE_MOBIKE"]
        await node.mobile.readdress(context, NEW, NSG)
        await node.mobile.loud(node.sa)
        if begins:
            node.charon.tasks, node.charon.queued = ["IKE_MOBIKE"], ["IKE_MOBIKE"]
        await asyncio.sleep(2 * BEGUN)
        assert bool(node.charon.rekeyed) is not begins

    do(scenario())
