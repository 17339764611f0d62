"""Which of charon's HA segments an IKE_SA is in: a hash of its peer's address (`ha_kernel.c`, strongSwan
5.9.8 to 6.0.6). Pure.

The hash is that of Linux 4.1 and later (`jhash_2words`), as charon takes it there. All IPv6 peers share one
segment.
"""

from __future__ import annotations

from ikectx.sa.context import Address

ALL = 0
"""Names all segments in a message; the first one is 1."""

_MASK = 0xFFFFFFFF
_INIT = (0xDEADBEEF + (1 << 2)) & _MASK
_ROUNDS = (14, 11, 25, 16, 4, 14, 24)


def segment_of(peer: Address, count: int) -> int:
    """The segment, from 1 to `count`, of an IKE_SA with a peer at this address; `ALL` if there is only one,
    or if it is not known how many there are (0)."""
    if count <= 1:
        return ALL
    first = int(peer) if peer.version == 4 else 0
    words = [(first + _INIT) & _MASK, _INIT, _INIT]
    changed, by = 2, 1
    for bits in _ROUNDS:
        turned = words[by] << bits | words[by] >> 32 - bits
        words[changed] = ((words[changed] ^ words[by]) - turned) & _MASK
        changed, by = (changed + 1) % 3, changed
    return (words[2] * count >> 32) + 1
