"""IKE_SAs told to charon: chains, other names, additional children; each against a stand-in for charon."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from ikectx.errors import CharonError
from ikectx.sa.context import ChildContext, IkeContext
from ikectx.sa.keys import esp_keys, sk_keys
from tests.gateway_world import OURS, Charon, Sad
from tests.vici_bridge.effects.test_sink import a_context, chained
from vici_bridge.ha.chain import import_messages, leftovers, reshape, settle, undo_messages
from vici_bridge.ha.ike_id import HIDDEN, IkeId
from vici_bridge.ha.messages import Attr, HaMessage, HaType
from vici_bridge.ha.record import COND_PPK
from vici_bridge.policy.new_names import with_own_spi


def here() -> IkeContext:
    """An SA rekeyed twice, with a child of each generation."""
    context = chained(a_context(1))
    old = context.current
    third = replace(
        old, spi_i=b"3.MNi...", spi_r=b"3.GWr...", old_skd=sk_keys(old).sk_d, nonce_r=bytes(range(32))
    )
    child = context.children[0]
    children = tuple(
        replace(child, generation=number, spi_in=b"in %d" % number, spi_out=b"out%d" % number)
        for number in range(3)
    )
    generations = (*context.generations, third)
    return replace(context, generations=generations, children=children, local=OURS, policies=())


def feed(charon: Charon, messages: Iterable[HaMessage]) -> None:
    for message in messages:
        charon.hear(HaMessage.parse(message.serialize()))


def has(charon: Charon, context: IkeContext) -> None:
    """charon has exactly that SA, with the right keys."""
    (sa,) = charon.sas.values()
    assert sa.id == IkeId.of(context.current)
    assert sk_keys(sa.generation) == sk_keys(context.current)
    expected = {}
    for child in context.children:
        keys = esp_keys(context.generations[child.generation], child)
        expected[context.local.address, child.spi_in] = keys[0][0]
        expected[context.remote.address, child.spi_out] = keys[1][0]
    assert {name: sa.encr_key for name, sa in charon.sad.sas.items()} == expected
    assert charon.offences == []


def renamed(context: IkeContext, *places: int) -> IkeContext:
    def new(child: ChildContext) -> ChildContext:
        return replace(child, spi_in=b"NI" + child.spi_in[2:], spi_out=b"NO" + child.spi_out[2:])

    children = [new(child) if at in places else child for at, child in enumerate(context.children)]
    return replace(context, children=tuple(children))


def with_new_name(context: IkeContext) -> IkeContext:
    generations = (*context.generations, with_own_spi(context.current, b"new name"))
    return replace(context, generations=generations, mid_initiator=0, mid_responder=0)


def test_an_import_names_ancestors_so_that_no_packet_can() -> None:
    context = here()
    names = [message.need(Attr.IKE_ID, IkeId) for message in import_messages(context, 3)]
    assert {name.version for name in names if name.spis != context.spis} == {HIDDEN}
    assert {name.version for name in names if name.spis == context.spis} == {2}
    charon = Charon(Sad())
    feed(charon, import_messages(context, 3))
    has(charon, context)
    feed(charon, undo_messages(context, 3))
    assert charon.sas == {} and charon.sad.sas == {}


@pytest.mark.parametrize("places", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("name", [False, True])
def test_children_of_any_generation_get_other_names(places: tuple[int, ...], name: bool) -> None:
    context = here()
    charon = Charon(Sad())
    feed(charon, import_messages(context, 3))
    after = renamed(with_new_name(context) if name else context, *places)
    feed(charon, reshape(context, after, 3))
    # both pairs of a child stand side by side
    assert len(charon.sad.sas) == 6 + 2 * len(places)
    feed(charon, leftovers(context, after, 3))
    has(charon, after)
    if not places and not name:
        assert reshape(context, after, 3) == leftovers(context, after, 3) == []
    if places == (2,) and not name:
        assert [message.type for message in reshape(context, after, 3)] == [HaType.CHILD_ADD]


@pytest.mark.parametrize("places", [(), (0,), (1,), (0, 1, 2)])
def test_a_burst_that_stopped_anywhere_is_ended(places: tuple[int, ...]) -> None:
    context = here()
    after = renamed(with_new_name(context), *places)
    for stop in range(len(reshape(context, after, 3)) + 1):
        charon = Charon(Sad())
        feed(charon, import_messages(context, 3))
        feed(charon, reshape(context, after, 3)[:stop])
        (sa,) = charon.sas.values()
        listed = {(child.spi_in, child.spi_out) for child in sa.children}
        ours = {(c.spi_in, c.spi_out): c for c in (*context.children, *after.children)}
        there = tuple(child for pair, child in ours.items() if pair in listed)
        if sa.id.version == HIDDEN:
            number = [g.spi_i + g.spi_r for g in after.generations].index(sa.id.spi_i + sa.id.spi_r)
            before = replace(after, children=there)
            feed(charon, reshape(before, after, 3, stopped=number))
        else:
            named = after if sa.id == IkeId.of(after.current) else context
            before = replace(named, children=there)
            feed(charon, [*(settle(after, 3) if named is after else ()), *reshape(before, after, 3)])
        feed(charon, leftovers(before, after, 3))
        has(charon, after)
        (sa,) = charon.sas.values()
        assert sa.state == "PASSIVE"


def test_what_charon_cannot_take() -> None:
    with pytest.raises(CharonError):
        import_messages(replace(here(), conditions=COND_PPK), 5)
