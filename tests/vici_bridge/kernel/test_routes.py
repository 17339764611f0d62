"""Messages about routes: what is packed is read again, and octets that are no route are an error."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from ikectx.errors import KernelError
from vici_bridge.kernel.netlink_parts import CREATE
from vici_bridge.kernel.routes import NEWROUTE, UNICAST, KernelRoute
from vici_bridge.kernel.xfrm_parts import INET, INET6

ROUTES = [
    KernelRoute(
        INET, ip_address("10.4.0.10"), 32, gateway=ip_address("10.3.0.3"), metric=1024, table=255, kind=7
    ),
    KernelRoute(
        INET, ip_address("10.4.0.0"), 16, gateway=ip_address("fd03::3"), device=3, table=255, maker=91
    ),
    KernelRoute(INET6, ip_address("fd04::10"), 128, ip_address("fd01::1"), scope=255, kind=UNICAST),
]


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_is_read_as_it_was_packed(route: KernelRoute) -> None:
    message = route.request(NEWROUTE, CREATE, "route it").message.reveal()
    assert int.from_bytes(message[:4], "little") == len(message) and len(message) % 4 == 0
    assert KernelRoute.parse(message) == route


@pytest.mark.parametrize("cut", [16, 27, 33])
def test_what_is_cut_short_is_an_error(cut: int) -> None:
    message = ROUTES[0].request(NEWROUTE, CREATE, "route it").message.reveal()
    with pytest.raises(KernelError, match="about a route cannot be read"):
        KernelRoute.parse(message[:cut])


def test_an_address_of_a_strange_length_is_an_error() -> None:
    message = bytearray(ROUTES[0].request(NEWROUTE, CREATE, "route it").message.reveal())
    message[28:30] = (7).to_bytes(2, "little")
    with pytest.raises(KernelError):
        KernelRoute.parse(bytes(message))
