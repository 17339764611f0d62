"""Cookies for CTARs: a gateway under load prefers senders that receive at the address they send from. No I/O.

As in RFC 7296, 2.6: the gateway keeps no state, asks with a CTAA that has a COOKIE block, and the mobile node
sends its CTAR again with that block in front of all others. A sender with a forged source address never sees
the cookie. The octets are the gateway's own; for the mobile node they have no meaning.

A gateway may receive thousands of strangers' datagrams a second, so nothing is parsed before it is needed.
The cookie is not covered by the mobile node's tag: the gateway removes it before it looks at the CTAR.
"""

from __future__ import annotations

from dataclasses import replace

from ikectx.mac import equal, hmac_sha256
from ikectx.numbers import Cxtp, Fpt

from .cxtp import HEADER_SIZE, ContextDataBlock, Ctaa, Ctar

LIFE = 60.0
"""Seconds for which cookies are made under one key; they are valid for as long again."""
LENGTH = 12
"""Octets of a cookie of ours: the key's number and the first 11 octets of a HMAC-SHA-256."""
MAX_LENGTH = 64
"""Octets of the longest cookie that a mobile node sends back."""

_FIRST = 0x10 | Cxtp.CTAR
_V4 = 0x80
_BLOCK = bytes(Fpt.COOKIE.to_bytes(2)) + bytes([(4 + LENGTH) // 8, 0])
_SIZE = len(_BLOCK) + LENGTH


def fixed_part(datagram: bytes) -> int:
    """Octets of a CTAR in front of its blocks; 0: by its first octets this is no CTAR."""
    if len(datagram) < 20 or datagram[0] != _FIRST or int.from_bytes(datagram[2:4]) != len(datagram):
        return 0
    if datagram[1] & _V4:
        return 20
    return 44 if len(datagram) >= 44 else 0


def split(datagram: bytes, fixed: int) -> tuple[bytes, bytes]:
    """A CTAR with that `fixed_part`: its cookie, empty where it has none, and the CTAR without it."""
    if datagram[fixed : fixed + 2] != _BLOCK[:2] or len(datagram) < fixed + 4:
        return b"", datagram
    end = fixed + 8 * datagram[fixed + 2]
    length = len(datagram) - (end - fixed)
    if not fixed < end <= len(datagram):
        return b"", datagram  # the parser of the whole CTAR reports what is wrong
    rest = datagram[:2] + length.to_bytes(2) + datagram[4:fixed] + datagram[end:]
    return datagram[fixed + 4 : end], rest


class Cookies:
    """Makes and checks the cookies of one gateway. `secret`: octets that nobody else has."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._keys: dict[int, bytes] = {}

    def _key(self, number: int) -> bytes:
        key = self._keys.get(number)
        if key is None:
            if len(self._keys) > 1:
                del self._keys[min(self._keys)]
            key = self._keys[number] = hmac_sha256(self._secret, number.to_bytes(8))
        return key

    def _make(self, number: int, host: str, port: int) -> bytes:
        mark = hmac_sha256(self._key(number), f"{host} {port}".encode())
        return bytes([number & 0xFF]) + mark[: LENGTH - 1]

    def make(self, host: str, port: int, now: float) -> bytes:
        """For that source address and port. `now`: seconds, monotonic, not negative."""
        return self._make(int(now // LIFE), host, port)

    def right(self, cookie: bytes, host: str, port: int, now: float) -> bool:
        """True if the cookie was made here for that source, within the last two `LIFE`."""
        number = int(now // LIFE)
        if cookie[:1] != bytes([number & 0xFF]):
            number -= 1
        if number < 0 or cookie[:1] != bytes([number & 0xFF]):
            return False
        return equal(cookie, self._make(number, host, port))


def ask(datagram: bytes, fixed: int, cookie: bytes) -> bytes:
    """The CTAA that asks the sender of a CTAR for this cookie; never longer than the CTAR, else empty."""
    address = datagram[HEADER_SIZE : HEADER_SIZE + (4 if fixed == 20 else 16)]
    size = HEADER_SIZE + len(address) + _SIZE
    if size > len(datagram):
        return b""
    flags = datagram[1] & _V4
    return bytes([0x10 | Cxtp.CTAA, flags]) + size.to_bytes(2) + address + _BLOCK + cookie


def asked(ctaa: Ctaa) -> ContextDataBlock | None:
    """The block to send back, if the CTAA asks for a cookie."""
    if ctaa.statuses or len(ctaa.blocks) != 1:
        return None
    block = ctaa.blocks[0]
    if block.fpt != Fpt.COOKIE or block.presence is not None or not 0 < len(block.data) <= MAX_LENGTH:
        return None
    return block


def with_cookie(message: Ctar, block: ContextDataBlock) -> Ctar:
    """The CTAR with that cookie, in place of an earlier one."""
    others = tuple(each for each in message.blocks if each.fpt != Fpt.COOKIE)
    return replace(message, blocks=(block, *others))
