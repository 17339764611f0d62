"""What no key may protect twice, in packets as they pass the router."""

from __future__ import annotations

import struct

from ikectx_cli.lab.twice import IKE, SeenNumbers


def ip(protocol: int, payload: bytes) -> bytes:
    return bytes([0x45]) + bytes(8) + bytes([protocol]) + bytes(10) + payload


def esp(number: int, spi: int = 7) -> bytes:
    return struct.pack("!II", spi, number) + bytes(24)


def udp(payload: bytes, port: int = 4500) -> bytes:
    return struct.pack("!HHHH", port, port, 8 + len(payload), 0) + payload


def ike(iv: bytes, text: bytes, number: int = 3) -> bytes:
    head = IKE.pack(b"i" * 8, b"r" * 8, 46, 0x20, 37, 0x08, number, 0)
    return head + bytes(4) + iv + text


def test_an_esp_number_twice_in_one_direction() -> None:
    seen = SeenNumbers()
    for number in (1, 2, 2):
        seen.packet(ip(50, esp(number)), sent=True)
    seen.packet(ip(50, esp(1)), sent=False)
    seen.packet(ip(17, udp(esp(5))), sent=False)
    assert seen.told() == ["ESP to the MN, SPI 00000007: 1"]
    seen.packet(ip(17, udp(esp(5))), sent=False)
    assert len(seen.told()) == 2


def test_an_iv_of_two_messages() -> None:
    seen = SeenNumbers()
    for _ in range(3):
        seen.packet(ip(17, udp(bytes(4) + ike(b"12345678", b"one"))), sent=True)
    seen.packet(ip(17, udp(bytes(4) + ike(b"12345679", b"two"))), sent=True)
    assert not seen.told()
    seen.packet(ip(17, udp(ike(b"12345678", b"two", 4), port=500)), sent=True)
    assert seen.told() == ["IKE IV to the MN, message 4 of 37: 1"]


def test_what_is_no_packet() -> None:
    seen = SeenNumbers()
    for octets in (b"", bytes(19), ip(50, b"abc"), ip(17, bytes(8)), ip(17, udp(bytes(4) + b"short"))):
        seen.packet(octets, sent=True)
    assert not seen.told()
