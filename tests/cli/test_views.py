"""Which IKE_SAs a command names."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace

import pytest

from ikectx.errors import RefusedError, UnknownSaError, UsageError
from ikectx.sa.context import Endpoint
from ikectx_cli.views import charon_json, chosen, sa_name, select, view_json
from tests.hand_loop import run
from tests.vici_bridge import test_known
from vici_bridge.ha.version import HaVersion
from vici_bridge.known import Known
from vici_bridge.vici.views import ChildView, SaView


def view(number: int, name: str = "home", remote: str = "203.0.113.1", state: str = "ESTABLISHED") -> SaView:
    child = ChildView(
        name="net",
        unique_id=number,
        reqid=1,
        state="INSTALLED",
        spi_in=bytes([0xC0, 0, 0, number]),
        spi_out=b"\xc1abc",
    )
    return SaView(
        name=name,
        unique_id=number,
        state=state,
        spi_i=bytes([number]) * 8,
        spi_r=bytes([0xA0 | number]) * 8,
        initiator=False,
        local=Endpoint(ip_address("192.0.2.1"), 500),
        remote=Endpoint(ip_address(remote), 500),
        local_id="psg",
        remote_id=f"mn{number}@example.org",
        established=1,
        children=(child,),
    )


ONE, TWO = view(1), view(2, name="office")
GATEWAYS = view(3, name="gateways", remote="198.51.100.1")


@pytest.mark.parametrize(
    ("request_", "wanted"),
    [
        ({"all": "yes"}, [ONE, TWO]),
        ({"ike": "office"}, [TWO]),
        ({"ike-id": "1"}, [ONE]),
        ({"spi": "0x0202"}, [TWO]),
        ({"spi": "C0000001"}, [ONE]),
        ({"peer": "mn2@example.org"}, [TWO]),
        ({"peer": "203.0.113.1"}, [ONE, TWO]),
        ({"ike": "gateways"}, [GATEWAYS]),
    ],
)
def test_an_sa_that_carries_connections_between_gateways_moves_only_by_name(
    request_: dict[str, str], wanted: list[SaView]
) -> None:
    views = [ONE, TWO, GATEWAYS, replace(view(4), state="CONNECTING")]
    assert chosen(views, request_, {"198.51.100.1"}) == list(wanted)


def test_the_beginning_of_an_spi_names_one_sa_or_none() -> None:
    """charon's ESP SPIs all begin with c: `--spi c` moved every SA."""
    with pytest.raises(UnknownSaError, match=r"2 IKE_SAs have an SPI that begins with c"):
        chosen([ONE, TWO], {"spi": "c"})


def test_one_sa_needs_no_name_and_several_do() -> None:
    assert chosen([ONE, GATEWAYS], {}, {"198.51.100.1"}) == [ONE]
    with pytest.raises(UnknownSaError, match="there are 2 IKE_SAs: say which"):
        chosen([ONE, TWO], {})
    with pytest.raises(UnknownSaError, match="no IKE_SA answers to ike nowhere"):
        chosen([ONE], {"ike": "nowhere"})
    with pytest.raises(UsageError, match="one way only"):
        chosen([ONE], {"ike": "home", "all": "yes"})
    assert chosen([], {"all": "yes"}) == []  # an empty gateway is drained already


def test_the_two_spis_of_an_ike_sa() -> None:
    assert sa_name("") is None
    assert sa_name("0101010101010101:A1A1A1A1A1A1A1A1") == ONE.spis
    for wrong in ("01", "01:02", "0101010101010101", "x" * 16 + ":" + "0" * 16, ":", "1:2:3"):
        with pytest.raises(UsageError, match="not an IKE_SA's two SPIs"):
            sa_name(wrong)


def test_what_list_shows() -> None:
    shown = view_json(ONE, None)
    assert shown["movable"] and shown["known"] and shown["reason"] == "" and shown["spi_r"] == "a1" * 8
    passive = view_json(replace(ONE, state="PASSIVE"), None)
    assert not passive["movable"] and passive["reason"] == "it is PASSIVE"
    unknown = view_json(ONE, UnknownSaError("no record of it", hint="resync"))
    assert (unknown["movable"], unknown["known"]) == (False, False)
    assert (unknown["reason"], unknown["hint"]) == ("no record of it", "resync")
    ah = view_json(ONE, RefusedError("it is AH"))
    assert (ah["movable"], ah["known"], ah["reason"]) == (False, True, "it is AH")


def test_charon_as_both_agents_status_tells_it() -> None:
    version = HaVersion()
    version.told("6.0.1")
    host = SimpleNamespace(charon_up=True, ha_version=version, listening=lambda: False)
    assert charon_json(host) == {  # type: ignore[arg-type]
        "reachable": True,
        "version": "6.0.1",
        "ha": False,
        "ha_version": 4,
        "problem": "",
    }


def test_all_sas_are_listed_only_if_all_are_meant_or_none_is_known() -> None:
    async def scenario() -> None:
        side = test_known.Side(1, 2)
        known = Known(side)
        await known.now()
        ways: list[tuple[dict[str, str], list[int], list[str]]] = [
            ({"ike-id": "2"}, [2], ["one"]),
            ({"peer": "mn1.example"}, [1], ["one"]),
            ({"all": "yes"}, [1, 2], ["all"]),
        ]
        for request, found, asked in ways:
            side.asked.clear()
            assert [one.unique_id for one in await select(known, request, ())] == found
            assert side.asked == asked
        third = test_known.view(3)
        side.sas[third.spis] = third  # nobody was told
        assert await select(known, {"ike-id": "3"}, ()) == [third]
        del side.sas[third.spis]  # nor of its end
        with pytest.raises(UnknownSaError):
            await select(known, {"ike-id": "3"}, ())

    run(scenario())
