"""SPIs reserved in the live kernel; that needs no ESP."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from ikectx.errors import KernelError
from tests.netns import namespaces
from vici_bridge.kernel.kernel import Kernel
from vici_bridge.kernel.xfrm import KernelSa


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with namespaces(1) as (space,), space.entered(), Kernel() as made:
        yield made


@pytest.mark.parametrize(("ours", "theirs"), [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")])
def test_each_spi_is_reserved_once(kernel: Kernel, ours: str, theirs: str) -> None:
    here, there = ip_address(ours), ip_address(theirs)
    spis = [kernel.reserve_spi(there, here, 0xC0000010, 0xC0000012) for _ in range(4)]
    # the fourth finds none
    assert spis[3] is None
    assert sorted(spi for spi in spis if spi) == [
        number.to_bytes(4) for number in range(0xC0000010, 0xC0000013)
    ]
    held = kernel.get_sa(here, bytes.fromhex("c0000011"))
    assert held is not None
    # no keys: so it is told from an SA that somebody uses
    assert (held.encr_name, held.auth_name) == ("", "")
    assert (held.source, held.destination) == (there, here)
    # nobody can add an SA under it, until it is given back
    with pytest.raises(KernelError):  # EEXIST, or whatever a kernel without ESP says first
        kernel.batch([KernelSa(there, here, held.spi, encr_name="ecb(cipher_null)").add()])
    assert kernel.delete_sa(held)
    assert kernel.reserve_spi(there, here, 0xC0000010, 0xC0000012) == held.spi


def test_a_range_of_charons(kernel: Kernel) -> None:
    spi = kernel.reserve_spi(ip_address("192.0.2.2"), ip_address("192.0.2.1"), 0xC0000000, 0xCFFFFFFF)
    assert spi is not None and spi[0] >> 4 == 0xC
