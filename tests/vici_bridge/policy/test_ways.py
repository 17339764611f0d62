"""How a mobile node gets to another gateway: what is chosen, and what is refused beforehand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ikectx.errors import RefusedError
from ikectx.numbers import Mode
from ikectx.sa.context import IkeContext, Secret
from tests.vici_bridge.vici.test_views import context, selector
from vici_bridge.policy.ways import caution, check_relay, reason, wanted
from vici_bridge.vici.views import COND_NAT_ANY, COND_NAT_FAKE, COND_NAT_THERE, EXT_MOBIKE, SaView

PLAIN = replace(context(), extensions=EXT_MOBIKE)
BEHIND = replace(PLAIN, conditions=COND_NAT_THERE)
FORCED = replace(PLAIN, conditions=COND_NAT_ANY | COND_NAT_FAKE)
"""The gateway alone has `encap = yes`, and there is no NAT (5.9.8: nat-fake, without nat-remote)."""
OLD = replace(PLAIN, extensions=0)
REKEYED = replace(
    PLAIN, generations=(replace(PLAIN.current, old_skd=Secret(bytes(32)), old_prf=PLAIN.current.prf),)
)


def chosen_by(here: IkeContext, spi: str) -> IkeContext:
    """The SA with that SPI at the mobile node."""
    return replace(here, children=(replace(here.children[0], spi_out=bytes.fromhex(spi)),))


@pytest.mark.parametrize(
    ("here", "relayed_by", "kernel", "way", "why"),
    [
        (PLAIN, "", True, "update", "as asked for"),
        (BEHIND, "", True, "relay", "NAT"),
        (FORCED, "", True, "update", "as asked for"),
        (BEHIND, "", False, "update", "NAT"),  # user-space ESP is in UDP always
        (OLD, "", True, "relay", "MOBIKE"),
        (chosen_by(PLAIN, "12345678"), "", True, "update", "as asked for"),
        (chosen_by(REKEYED, "c2345678"), "", True, "update", "as asked for"),
        (chosen_by(REKEYED, "12345678"), "", True, "relay", "was rekeyed"),  # libreswan has forgotten MOBIKE
        (chosen_by(REKEYED, "12345678"), "", False, "update", "was rekeyed"),  # libipsec's SPIs are any
        (PLAIN, "psg", True, "relay", "psg relays it"),
        (PLAIN, "nsg", True, "relay", "goes on by itself"),
    ],
)
def test_what_is_chosen(here: Any, relayed_by: str, kernel: bool, way: str, why: str) -> None:
    assert wanted(here, "nsg", "auto", relayed_by, kernel_esp=kernel) == way
    assert why in reason(here, "nsg", relayed_by)
    for wish in ("keep", "relay"):
        assert wanted(here, "nsg", wish, relayed_by, kernel_esp=kernel) == wish  # type: ignore[arg-type]
    if not relayed_by:
        assert wanted(here, "nsg", "update", relayed_by, kernel_esp=kernel) == "update"
    else:
        with pytest.raises(RefusedError, match="relays it"):
            wanted(here, "nsg", "update", relayed_by, kernel_esp=kernel)


def test_a_window_that_the_mobile_nodes_charon_may_not_carry() -> None:
    child = PLAIN.children[0]
    large = replace(PLAIN, children=(replace(child, inbound=replace(child.inbound, window=4096)),))
    assert "4096 packets" in caution(large, "update")
    assert [caution(large, "relay"), caution(large, "keep"), caution(PLAIN, "update")] == [""] * 3


def listed(here: Any, spi: bytes) -> SaView:
    found = object.__new__(SaView)
    values = {"name": "mn", "unique_id": 7, "remote": here.remote, "spi_i": spi, "spi_r": here.current.spi_r}
    for name, value in values.items():
        object.__setattr__(found, name, value)
    return found


def test_what_cannot_be_relayed() -> None:
    child = BEHIND.children[0]
    transport = replace(BEHIND, children=(replace(child, mode=Mode.TRANSPORT),))
    ends_here = replace(BEHIND, children=(replace(child, local_ts=(selector(str(BEHIND.local.address)),)),))
    check_relay(BEHIND, [listed(BEHIND, BEHIND.current.spi_i)], forwards=True, able=True)
    cases: list[tuple[Any, list[SaView], bool, bool, str]] = [
        (BEHIND, [], False, True, "does not forward IPv4"),
        (BEHIND, [], True, False, "cannot pass packets on"),
        (transport, [], True, True, "own address"),
        (ends_here, [], True, True, "own address"),
        (BEHIND, [listed(BEHIND, b"another1")], True, True, "#7"),
    ]
    for here, views, forwards, able, why in cases:
        with pytest.raises(RefusedError, match=why) as error:
            check_relay(here, views, forwards=forwards, able=able)
        assert error.value.hint
