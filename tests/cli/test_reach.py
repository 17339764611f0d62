"""Whether a machine is there: the parts without I/O, and real networks made for it."""

from __future__ import annotations

import os
import socket
import struct
import time
from ipaddress import ip_address

import pytest

from ikectx_cli import reach
from ikectx_cli.reach import PacketWay
from tests.netns import namespaces

NONCE = bytes(range(16))


def test_an_echo_request_and_its_reply() -> None:
    asked = reach.request(4, NONCE)
    assert asked[0] == 8 and sum(struct.unpack(f"!{len(asked) // 2}H", asked)) % 0xFFFF == 0
    assert reach.request(6, NONCE)[:4] == bytes([128, 0, 0, 0])
    answer, header = b"\0" + asked[1:], b"\x45" + bytes(19)
    assert reach.is_reply(answer, 4, NONCE, raw=False) and reach.is_reply(header + answer, 4, NONCE, raw=True)
    assert reach.is_reply(b"\x81" + asked[1:], 6, NONCE, raw=True)
    assert not reach.is_reply(asked, 4, NONCE, raw=False)
    assert not reach.is_reply(answer[:-1] + b"x", 4, NONCE, raw=False)
    assert not reach.is_reply(b"", 4, NONCE, raw=True)


@pytest.mark.parametrize(
    ("states", "there"),
    [(["REACHABLE"], True), (["STALE"], None), (["FAILED"], False), (["INCOMPLETE"], False), ([], None)],
)
def test_what_the_neighbour_table_says(states: list[str], there: bool | None) -> None:
    assert reach.neighbour([{"dst": "10.0.0.3", "state": states}]) is there
    assert reach.neighbour([]) is None


def test_this_machine() -> None:
    loopback = ip_address("127.0.0.1")
    assert reach.way_to(loopback) == PacketWay("lo", local=True)
    assert reach.device_of(loopback) == "lo" and reach.device_of(ip_address("192.0.2.77")) == ""


@pytest.mark.parametrize("version", [4, 6])
def test_a_machine_that_is_there_and_one_that_is_not(version: int) -> None:
    net, bits = ("10.77.0.", "24") if version == 4 else ("fd77::", "64")
    here, there, nobody, far = (ip_address(net + end) for end in ("1", "2", "3", "9"))
    with namespaces(2) as (one, other):
        one.ip("link add lan0 type veth peer name lan1")
        one.give("lan1", other)
        nodad = " nodad" if version == 6 else ""
        one.ip(f"addr add {here}/{bits} dev lan0{nodad}", "link set lan0 up")
        other.ip(f"addr add {there}/{bits} dev lan1{nodad}", "link set lan1 up")
        beyond = "10.78.0.0/24" if version == 4 else "fd78::/64"
        one.ip(f"route add {beyond} via {there}")
        with one.entered():
            assert reach.way_to(there) == PacketWay("lan0", direct=True)
            assert reach.way_to(here).local and reach.device_of(here) == "lan0"
            assert reach.way_to(ip_address("10.78.0.9" if version == 4 else "fd78::9")) == PacketWay("lan0")
            assert reach.way_to(ip_address("10.79.0.9" if version == 4 else "fd79::9")) == PacketWay()
            assert reach.answers(there) is True
            began = time.monotonic()
            assert reach.answers(nobody) is False
            assert time.monotonic() - began < 5
        other.run("nft add table inet t", "nft add chain inet t i { type filter hook input priority 0 ; }")
        other.run("nft add rule inet t i icmp type echo-request drop")
        other.run("nft add rule inet t i icmpv6 type echo-request drop")
        with one.entered():
            # no reply, but its link-layer address is known
            assert reach.answers(there, 0.3) is True
        one.ip(f"neigh flush to {far} dev lan0")


def test_without_a_right_to_icmp_the_neighbour_table_tells() -> None:
    with namespaces(2) as (one, other):
        one.ip("link add lan0 type veth peer name lan1")
        one.give("lan1", other)
        one.ip("addr add 10.77.0.1/24 dev lan0", "link set lan0 up")
        other.ip("addr add 10.77.0.2/24 dev lan1", "link set lan1 up")
        with one.entered():
            for address, there in (("10.77.0.2", True), ("10.77.0.3", False)):
                assert as_nobody(address) is there


def as_nobody(address: str) -> bool | None:
    """What somebody without any right finds out."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            with pytest.raises(PermissionError):
                socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
            os.write(writing, repr(reach.answers(ip_address(address))).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as told:
        return {"True": True, "False": False, "None": None}[told.read()]
