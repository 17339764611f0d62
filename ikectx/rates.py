"""Rate limits for requests of strangers, no I/O.

RFC 4067 (3, CT_REQUEST_RATE) has a router drop CTARs at random above a rate. A bucket that simply runs empty
would always pass the first request after each refill, and a flood can time that. So a bucket that is less
than half full drops with a probability that grows to 1 as it runs empty.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

MEMORY = 1024
"""Sources remembered. More than that at a time are held by the total limit."""
LATELY = 10.0
"""Seconds after which a source counts as one that did not ask before, on average."""
NETWORKS = ((24, 48, 1 / 10), (16, 32, 1 / 4))
"""IPv4 and IPv6 prefix lengths of networks, and the part of the rate of all that sources of one network get
when the bucket of all is less than half full: who has hundreds of addresses has them in few networks."""


def _size(rate: float) -> float:
    """Tokens in a full bucket: two seconds' worth, at least 2, so that a burst of one second passes
    untouched."""
    return max(2.0, 2.0 * rate)


def _chance(level: float, size: float, kept: float = 0.0) -> float:
    """The probability with which a request may pass. `kept`: tokens that are not for it."""
    left = level - kept
    return 0.0 if left < 1 else min(1.0, left / ((size - kept) / 2))


@dataclass(slots=True)
class Bucket:
    """Tokens for one kind of request; `level` of them are left at `at` (seconds, monotonic)."""

    rate: float
    at: float
    level: float = -1.0

    def __post_init__(self) -> None:
        if self.level < 0:
            self.level = self.size

    @property
    def size(self) -> float:
        """Tokens in the full bucket."""
        return _size(self.rate)

    def fill(self, now: float) -> None:
        """Time has passed."""
        self.level = min(self.size, self.level + max(0.0, now - self.at) * self.rate)
        self.at = now


class _Buckets:
    """Buckets by key, those of up to `memory` keys that were used last.

    In arrays, because a flood fills them: as objects they took 1 MB, which the process did not give back.
    """

    def __init__(self, memory: int) -> None:
        none = bytes(8 * memory)
        self.level, self.rests = array("d", none), array("d", none)
        """`rests`: until when it counts as a source of which a request passed just now."""
        self._at = array("d", none)
        self._places: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def fill(self, key: int, rate: float, now: float) -> int:
        """Time has passed for the bucket of that key, which is full if it is new: its place in the arrays."""
        place = self._places.pop(key, None)
        if place is None:
            many = len(self._places)
            place = many if many < len(self.level) else self._places.pop(next(iter(self._places)))
            self.level[place], self.rests[place] = _size(rate), -math.inf
        else:
            filled = self.level[place] + max(0.0, now - self._at[place]) * rate
            self.level[place] = min(_size(rate), filled)
        self._at[place] = now
        self._places[key] = place  # behind all others
        return place


def _networks(address: IPv4Address | IPv6Address) -> list[tuple[int, float]]:
    """The keys of the networks that an address is in, each with its part of the rate."""
    four, bits = address.version == 4, address.max_prefixlen
    # a leading 1 with the length keeps networks of different length apart
    return [
        (int(address) >> (bits - (short if four else long)) | 1 << (bits + (short if four else long)), part)
        for short, long, part in NETWORKS
    ]


def one_source(address: IPv4Address | IPv6Address) -> int:
    """The key of a source, for both families in one table: an IPv4 address, an IPv6 /64."""
    # a /64 is at least 64 bits long, an IPv4 address 32
    return int(address) >> 64 | 1 << 64 if address.version == 6 else int(address)


class RateLimit:
    """Decides over requests by their source: an IPv4 address, or the /64 of an IPv6 one.

    rate, source_rate: requests per second in total and of one source. draw: random numbers in [0, 1). A
    flood of one source uses up its own bucket before it touches that of all. One half of the latter is for
    sources of which no request passed in the last `LATELY` seconds or so, because a mobile node asks once,
    and some dozens of sources that ask all the time would leave nothing to it. Of that half each network
    gets a part only (`NETWORKS`)."""

    def __init__(
        self, rate: float, source_rate: float, draw: Callable[[], float], *, memory: int = MEMORY
    ) -> None:
        self._source_rate = source_rate
        self._draw = draw
        self._total: Bucket | None = None
        self._rate = rate
        self._sources = _Buckets(memory)
        self._shares = _Buckets(memory)
        """Of networks."""

    def __len__(self) -> int:
        """Sources remembered."""
        return len(self._sources)

    def allows(self, source: IPv4Address | IPv6Address, now: float) -> bool:
        """True if a request of `source` may pass. `now` is seconds, monotonic."""
        own = self._sources.fill(one_source(source), self._source_rate, now)
        total = self._total = self._total or Bucket(self._rate, now)
        total.fill(now)
        half = total.size / 2
        shares = []
        if total.level < half:
            shares = [self._shares.fill(key, self._rate * part, now) for key, part in _networks(source)]
        lately = now < self._sources.rests[own] or any(self._shares.level[share] < 1 for share in shares)
        for chance in (
            _chance(self._sources.level[own], _size(self._source_rate)),
            _chance(total.level, total.size, half - 1 if lately else 0.0),
        ):
            if chance < 1 and self._draw() >= chance:
                return False
        self._sources.level[own] -= 1
        # by chance, because sources that began together would come back together
        self._sources.rests[own] = now + LATELY * (0.5 + self._draw())
        total.level -= 1
        for share in shares if not lately else ():
            self._shares.level[share] -= 1
        return True

    def spent(self, now: float) -> bool:
        """True if the bucket of all is empty, so that `allows` passes nobody. Costs less than that call."""
        if self._total is None:
            return False
        self._total.fill(now)
        return self._total.level < 1
