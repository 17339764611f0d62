"""The segment of an IKE_SA, as charon reckons it."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from vici_bridge.ha.segment import ALL, segment_of


@pytest.mark.parametrize(
    ("peer", "of_16", "of_3"),
    [
        ("10.32.0.1", 9, 2),
        ("10.1.0.10", 15, 3),
        ("198.51.100.7", 5, 1),
        ("203.0.113.9", 7, 2),
        ("255.255.255.255", 10, 2),
        ("0.0.0.1", 8, 2),
        ("10.32.7.200", 15, 3),
        ("fd01::10", 1, 1),
        ("fd02::10", 1, 1),
    ],
)
def test_it_is_what_ha_kernel_c_says(peer: str, of_16: int, of_3: int) -> None:
    """From that file's functions (5.9.8 to 6.0.6), compiled by themselves."""
    assert segment_of(ip_address(peer), 16) == of_16
    assert segment_of(ip_address(peer), 3) == of_3
    assert segment_of(ip_address(peer), 1) == segment_of(ip_address(peer), 0) == ALL


def test_each_segment_has_its_share() -> None:
    found = [segment_of(ip_address("10.32.0.0") + number, 16) for number in range(1600)]
    assert {found.count(segment) for segment in range(1, 17)} <= set(range(70, 131))
