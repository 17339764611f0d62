"""Bounded reading and writing of octets: the only code that indexes bytes.

Everything is big-endian. A `Reader` raises `WireError` with the name of the field and the position, never
IndexError or struct.error; a sub-reader must be read to its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ikectx.errors import WireError


class Reader:
    """Reads `data` from front to back; `what` names it in errors."""

    __slots__ = ("_data", "_end", "_pos", "_what")

    def __init__(self, data: bytes, what: str = "message") -> None:
        self._data = bytes(data)
        self._pos = 0
        self._end = len(self._data)
        self._what = what

    @property
    def pos(self) -> int:
        """Octets read so far."""
        return self._pos

    @property
    def left(self) -> int:
        """Octets not yet read."""
        return self._end - self._pos

    def fail(self, why: str) -> WireError:
        """The error to raise for a mistake at this position."""
        return WireError(f"{self._what}: {why} at octet {self._pos}")

    def octets(self, count: int, name: str = "field") -> bytes:
        """The next `count` octets."""
        start = self._pos
        end = start + count
        if count < 0 or end > self._end:
            raise self.fail(f"{name} needs {count} octets, {self.left} are left,")
        self._pos = end
        return self._data[start:end]

    def u8(self, name: str = "field") -> int:
        return self.octets(1, name)[0]

    def u16(self, name: str = "field") -> int:
        return int.from_bytes(self.octets(2, name))

    def u32(self, name: str = "field") -> int:
        return int.from_bytes(self.octets(4, name))

    def u64(self, name: str = "field") -> int:
        return int.from_bytes(self.octets(8, name))

    def rest(self) -> bytes:
        """All that is left."""
        return self.octets(self.left)

    def cstring(self, name: str = "string") -> str:
        """UTF-8 text up to a NUL octet, which is read too."""
        end = self._data.find(b"\0", self._pos, self._end)
        if end < 0:
            raise self.fail(f"{name} has no terminating NUL")
        raw = self.octets(end - self._pos, name)
        self._pos += 1
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.fail(f"{name} is not UTF-8") from None

    @contextmanager
    def sub(self, count: int, name: str = "field") -> Iterator[Reader]:
        """A reader of the next `count` octets that must be read to its end."""
        inner = Reader(self.octets(count, name), f"{self._what}: {name}")
        yield inner
        inner.end()

    def end(self) -> None:
        """Check that nothing is left."""
        if self.left:
            raise self.fail(f"{self.left} octets too many")


class Writer:
    """Collects octets; a number that does not fit its field raises WireError."""

    __slots__ = ("_out",)

    def __init__(self) -> None:
        self._out = bytearray()

    def __len__(self) -> int:
        return len(self._out)

    def octets(self, data: bytes) -> Writer:
        self._out += data
        return self

    def number(self, value: int, size: int, name: str = "field") -> Writer:
        """`value` as an unsigned number of `size` octets."""
        try:
            self._out += value.to_bytes(size)
        except OverflowError:
            raise WireError(f"{name} {value} does not fit in {size} octets") from None
        return self

    def u8(self, value: int, name: str = "field") -> Writer:
        return self.number(value, 1, name)

    def u16(self, value: int, name: str = "field") -> Writer:
        return self.number(value, 2, name)

    def u32(self, value: int, name: str = "field") -> Writer:
        return self.number(value, 4, name)

    def u64(self, value: int, name: str = "field") -> Writer:
        return self.number(value, 8, name)

    def cstring(self, text: str, name: str = "string") -> Writer:
        """UTF-8 and a terminating NUL; text with a NUL inside is refused."""
        if "\0" in text:
            raise WireError(f"{name} holds a NUL")
        self._out += text.encode() + b"\0"
        return self

    def done(self) -> bytes:
        return bytes(self._out)
