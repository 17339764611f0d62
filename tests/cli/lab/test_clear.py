"""What counts as a packet that left a gateway in the clear."""

from __future__ import annotations

import struct
from collections import Counter
from ipaddress import ip_address

import pytest

from ikectx_cli.lab import clear as lab_clear
from ikectx_cli.lab.net import AWAY, INNER, LAN_MAC, OUTER

NSG = bytes.fromhex(LAN_MAC["nsg"].replace(":", ""))
SRV = b"\x02\0\0\0\0\x09"


def frame(source: str, target: str, to: bytes = SRV, protocol: int = 17, payload: bytes = bytes(8)) -> bytes:
    ends = ip_address(source).packed + ip_address(target).packed
    if ip_address(source).version == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0)
        return to + SRV + b"\x08\x00" + head + ends + payload
    head = struct.pack("!IHBB", 0x60000000, len(payload), protocol, 64)
    return to + SRV + b"\x86\xdd" + head + ends + payload


def kept(data: bytes, mode: str = "tunnel", gateway: bytes | None = None, *, sent: bool = True) -> bool:
    """Runs the program, as the kernel would, on a frame that leaves (or arrives)."""
    lines, at, value = lab_clear.program(mode, gateway), 0, 0
    while True:
        code, true, false, wanted = lines[at]
        at += 1
        if code == 21:
            at += true if value == wanted else false
        elif code == 6:
            return wanted > 0
        elif wanted >= 0xFFFFF000:
            value = lab_clear.PACKET_OUTGOING if sent else 0
        else:
            size = {48: 1, 40: 2, 32: 4}[code]
            if wanted + size > len(data):
                return False
            value = int.from_bytes(data[wanted : wanted + size], "big")


@pytest.mark.parametrize("v", [4, 6])
def test_outside_nothing_may_show_an_inner_address(v: int) -> None:
    for mobile in ("mn", "mn2"):
        assert kept(frame(INNER["srv"][v], INNER[mobile][v]))
        assert kept(frame(INNER[mobile][v], INNER["srv"][v]))
    assert not kept(frame(INNER["srv"][v], INNER["mn"][v]), sent=False)
    assert not kept(frame(OUTER["psg"][v], OUTER["mn"][v], protocol=lab_clear.ESP))
    assert not kept(SRV + SRV + b"\x08\x06" + bytes(28))
    assert not kept(frame(INNER["srv"][v], INNER["mn"][v])[:20])


@pytest.mark.parametrize("v", [4, 6])
def test_inside_packets_for_an_inner_address_go_to_the_other_gateway_only(v: int) -> None:
    assert not kept(frame(INNER["srv"][v], INNER["mn"][v], NSG), gateway=NSG)
    assert kept(frame(INNER["srv"][v], INNER["mn"][v], SRV), gateway=NSG)
    assert kept(frame(INNER["srv"][v], INNER["mn"][v], NSG[:5] + b"\x07"), gateway=NSG)
    assert not kept(frame(INNER["mn"][v], INNER["srv"][v], SRV), gateway=NSG)


@pytest.mark.parametrize("v", [4, 6])
def test_in_transport_mode_only_what_is_not_protected_counts(v: int) -> None:
    gateway, node = OUTER["psg"][v], OUTER["mn"][v]
    echo = 1 if v == 4 else 58
    assert kept(frame(gateway, node), "transport") and kept(frame(gateway, AWAY[v]), "transport")
    assert not kept(frame(INNER["srv"][v], INNER["mn"][v]), "transport")
    reply = frame(gateway, node, protocol=echo, payload=(b"\0" if v == 4 else b"\x81") + bytes(7))
    assert lab_clear.parse(reply, "transport") == (gateway, node, echo)
    ports = struct.pack("!HHHH", 4500, 40000, 8, 0)
    error = (b"\x03" if v == 4 else b"\x01") + bytes(7)
    for protocol, payload in ((50, bytes(8)), (51, bytes(8)), (17, ports), (echo, error)):
        found = frame(gateway, node, protocol=protocol, payload=payload)
        assert lab_clear.parse(found, "transport") is None
    assert lab_clear.parse(frame(gateway, node), "transport") == (gateway, node, 17)
    assert lab_clear.parse(frame(gateway, node)[:30], "transport") is None


def test_equal_packets_are_counted_together() -> None:
    found = lab_clear.parse(frame(INNER["srv"][4], INNER["mn"][4]), "tunnel")
    assert found is not None
    seen = Counter([("eth0", *found)] * 3)
    told = {"interface": "eth0", "from": "10.3.0.10", "to": "10.4.0.10", "protocol": 17, "packets": 3}
    assert lab_clear.told(seen) == [told] and lab_clear.told(Counter()) == []
