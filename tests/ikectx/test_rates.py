"""Rate limits with given dice and a hand-moved clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from ikectx.rates import RateLimit

HERE = ip_address("192.0.2.1")


def dice(seed: int = 1) -> Callable[[], float]:
    return random.Random(seed).random


def flood(limit: RateLimit, a_second: int, seconds: float, *, sources: int = 1, start: float = 0.0) -> int:
    passed = 0
    for number in range(int(a_second * seconds)):
        source = IPv4Address(0x0A000000 + number % sources)
        passed += limit.allows(source, start + number / a_second)
    return passed


def test_below_the_limit_all_pass() -> None:
    assert flood(RateLimit(10, 10, lambda: 0.999), 10, 30) == 300
    # a MN that asks again after 2, 4, 8 s is never held
    limit = RateLimit(10, 2, lambda: 0.999)
    assert all(limit.allows(HERE, at) for at in (0, 2, 6, 14, 29))


def test_a_source_cannot_use_up_what_all_share() -> None:
    limit = RateLimit(10, 2, dice())
    assert 2 * 20 <= flood(limit, 200, 20) <= 2 * 20 + 4
    assert all(limit.allows(ip_address(f"192.0.2.{n}"), 20.0) for n in range(5))


@pytest.mark.parametrize("seed", range(5))
def test_many_sources_share_the_total(seed: int) -> None:
    limit = RateLimit(10, 2, dice(seed))
    assert 10 * 20 - 5 <= flood(limit, 200, 20, sources=100) <= 10 * 20 + 20


def test_above_the_limit_chance_decides_not_who_comes_first() -> None:
    """Of two that share a bucket, one always a little earlier than the other, both get their part."""
    limit = RateLimit(10, 1000, dice())
    early = late = 0
    for tick in range(2000):
        early += limit.allows(IPv4Address(1), tick * 0.05)
        late += limit.allows(IPv4Address(2), tick * 0.05 + 0.001)
    assert 0.35 < late / (early + late) < 0.65


def test_ipv6_sources_count_by_their_64() -> None:
    limit = RateLimit(1000, 1, lambda: 0.0)
    passed = sum(limit.allows(ip_address(f"2001:db8::{n:x}"), 0.0) for n in range(10))
    assert passed == 2
    assert limit.allows(ip_address("2001:db8:0:1::1"), 0.0)
    assert len(limit) == 2


def test_memory_is_bounded_and_the_total_still_holds() -> None:
    limit = RateLimit(10, 2, dice(), memory=16)
    assert flood(limit, 1000, 10, sources=1000) <= 10 * 10 + 20
    assert len(limit) == 16
    assert len(limit._shares) <= 16


def test_time_that_stands_still_or_goes_back_fills_nothing() -> None:
    limit = RateLimit(1, 1, lambda: 0.0)
    assert [limit.allows(HERE, at) for at in (5.0, 5.0, 5.0, 4.0)] == [True, True, False, False]


def test_a_rate_of_zero_passes_two_ever() -> None:
    limit = RateLimit(0, 0, lambda: 0.0)
    assert sum(limit.allows(HERE, float(at)) for at in range(1000)) == 2


@pytest.mark.parametrize("seed", range(5))
def test_who_asks_once_gets_through_beside_sources_that_ask_all_the_time(seed: int) -> None:
    """Each of them keeps to its own limit; together they ask for six times what all may have."""
    limit = RateLimit(10, 2, dice(seed))
    heard = 0
    for tick in range(30 * 64):
        now = tick / 64
        limit.allows(IPv4Address(0x0A000000 + tick % 32), now)
        if tick % 64 == 63 and now > 3:
            heard += limit.allows(IPv4Address(0x0B000000 + tick), now)
    assert heard >= 26  # of 27: the attackers leave the half that is kept, less one


def addresses(version: int, count: int) -> list[IPv4Address | IPv6Address]:
    """So many sources that one attacker has: of an IPv4 /23, or /64s of an IPv6 /36."""
    if version == 4:
        return [IPv4Address(0x0A000000 + number) for number in range(count)]
    return [IPv6Address((0x20010DB8 << 96) + (number << 76)) for number in range(count)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("version", [4, 6])
def test_who_has_hundreds_of_addresses_takes_no_rate_from_others(seed: int, version: int) -> None:
    limit = RateLimit(10, 2, dice(seed))
    theirs = addresses(version, 500)
    heard = asked = 0
    for tick in range(60 * 100):
        now = tick / 100
        limit.allows(theirs[tick % len(theirs)], now)
        if tick % 100 == 99 and now > 3:
            asked += 1
            heard += limit.allows(IPv4Address(0x0B000000 + (tick << 6)), now)
    assert heard >= 0.9 * asked


def test_mobile_nodes_of_one_network_have_all_of_the_rate() -> None:
    limit = RateLimit(10, 2, lambda: 0.999)
    assert all(limit.allows(IPv4Address(0x0A000000 + number), number // 10) for number in range(250))
