"""Whoever an index finds for an SA is all that a comparison with every SA would find."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from random import Random

import pytest

from tests.vici_bridge.vici.test_views import VIEW, context
from vici_bridge.policy.checks import check_selectors, check_vips
from vici_bridge.policy.new_names import clash
from vici_bridge.policy.present import Present
from vici_bridge.vici.views import SaView, sa_view

OTHER = sa_view("mn", VIEW)

TEXTS = (
    "10.3.0.1/32",
    "10.3.0.2/32[tcp/80]",
    "10.3.0.0/24",
    "10.3.0.1..10.3.0.9",
    "fd03::1/128",
    "0.0.0.0/0",
)


def a_view(dice: Random, number: int) -> SaView:
    child = OTHER.children[0]
    made = replace(
        child,
        spi_in=dice.randrange(1, 9).to_bytes(4),
        spi_out=dice.randrange(1, 9).to_bytes(4),
        protocol=dice.choice(("ESP", "ESP", "AH")),
        remote_ts=tuple(dice.sample(TEXTS, dice.randrange(1, 3))),
        local_ts=("0.0.0.0/0",),
    )
    return replace(
        OTHER,
        spi_i=number.to_bytes(8),
        spi_r=dice.randrange(1, 9).to_bytes(8),
        children=(made,),
        remote_vips=(ip_address(f"10.3.0.{dice.randrange(1, 5)}"),),
    )


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_overlooked(seed: int) -> None:
    dice = Random(seed)
    present, views = Present(), dict[object, SaView]()
    for number in range(1, 30):
        view = a_view(dice, dice.randrange(1, 12))
        present.put(view)
        views[view.spis] = view
        if number % 4 == 0:
            gone = dice.choice(list(views))
            present.drop(gone)  # type: ignore[arg-type]
            del views[gone]
    here = context()
    child = here.children[0]
    here = replace(
        here,
        children=(replace(child, spi_in=dice.randrange(1, 9).to_bytes(4), spi_out=bytes(4)),),
        remote_vips=(ip_address("10.3.0.1"),),
    )
    assert {view.spis for view in present.views} == views.keys()
    every, found = list(views.values()), present.rivals(here)
    for check in (lambda some: check_selectors(here, some), lambda some: check_vips(here, some, {})):
        assert {str(verdict) for verdict in check(found)} == {str(verdict) for verdict in check(every)}
    assert clash(here, present.taken(here)) == clash(here, present.taken())


def test_what_is_dropped_leaves_nothing() -> None:
    present = Present([OTHER])
    present.put(replace(OTHER, children=()))
    present.drop(OTHER.spis)
    present.drop(OTHER.spis)
    assert not present._having and not present.views and present.taken() == Present().taken()
