"""The CBOR subset of the context profiles, and readers that check decoded values.

Unsigned and negative integers of at most 64 bits, octet strings, UTF-8 text, arrays, maps with unsigned keys
in ascending order, false, true, null. Definite lengths, shortest heads, no tags, no floats (RFC 8949, 4.2.1).
`scan` checks that before cbor2 sees an octet, so what cbor2 does with tags, depth or duplicate keys cannot
matter. So there is one encoding for each value. Errors name places, never values: those may be keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import cbor2

from ikectx.errors import WireError

T = TypeVar("T")
D = TypeVar("D")
Read = Callable[[Any, str], T]
"""Takes a decoded value and the name of its place; Errors: WireError."""

MAX_DEPTH = 8
MAX_KEY = 0xFFFF
MAX_ITEMS, MAX_TEXT, MAX_OCTETS = 1024, 512, 16384

_UINT, _NEGATIVE, _OCTETS, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)
_MIN_OF_SIZE = {1: 24, 2: 1 << 8, 4: 1 << 16, 8: 1 << 32}


def scan(data: bytes, what: str = "CBOR") -> int:
    """The length of the item that `data` begins with. Errors: WireError."""
    return _skip(bytes(data), 0, 0, what)


def _skip(data: bytes, at: int, depth: int, what: str) -> int:
    """Check the item that begins there, and return where it ends.

    It works on numbers instead of a `Reader`, because all that is stored or sent is checked.
    """
    if at < len(data) and (first := data[at]) & 0x1F < 24:  # most heads are one octet, and need no call
        major, value, at = first >> 5, first & 0x1F, at + 1
    else:
        major, value, at = _head(data, at, what)
    if major <= _NEGATIVE:
        return at
    if major <= _TEXT:
        end = at + value
        if end > len(data):
            name = "text" if major == _TEXT else "octet string"
            raise _fail(what, f"CBOR {name} needs {value} octets, {len(data) - at} are left,", at)
        if major == _TEXT:
            try:
                data[at:end].decode()
            except UnicodeDecodeError:
                raise _fail(what, "CBOR text that is not UTF-8", end) from None
        return end
    if major <= _MAP:
        if depth >= MAX_DEPTH:
            raise _fail(what, f"CBOR nested deeper than {MAX_DEPTH}", at)
        if value > len(data) - at:
            raise _fail(what, f"a CBOR container of {value} items", at)
        last = -1
        for _ in range(value):
            if major == _MAP:
                if at < len(data) and data[at] < 24:
                    kind, key, at = _UINT, data[at], at + 1
                else:
                    kind, key, at = _head(data, at, what)
                if kind != _UINT or key > MAX_KEY or key <= last:
                    raise _fail(what, f"a CBOR map key that is no ascending number up to {MAX_KEY}", at)
                last = key
            at = _skip(data, at, depth + 1, what)
        return at
    if major == _TAG or value not in (20, 21, 22):
        raise _fail(what, "a CBOR tag or simple value", at)
    return at


def _head(data: bytes, at: int, what: str) -> tuple[int, int, int]:
    """Major type and argument of the item that begins there, and where the head ends."""
    if at >= len(data):
        raise _fail(what, "CBOR item needs 1 octets, 0 are left,", at)
    first = data[at]
    at += 1
    major, info = first >> 5, first & 0x1F
    if info < 24:
        return major, info, at
    if info > 27 or major == _SIMPLE:
        raise _fail(what, "a CBOR float, long simple value or indefinite length", at)
    size = 1 << (info - 24)
    end = at + size
    if end > len(data):
        raise _fail(what, f"CBOR head needs {size} octets, {len(data) - at} are left,", at)
    value = int.from_bytes(data[at:end])
    if value < _MIN_OF_SIZE[size]:
        raise _fail(what, "a CBOR head that is not the shortest", end)
    return major, value, end


def _fail(what: str, why: str, at: int) -> WireError:
    return WireError(f"{what}: {why} at octet {at}")


def loads(data: bytes, what: str = "CBOR", *, padding: int = 0, own: bool = False) -> Any:
    """The value of the one item in `data`, followed by at most `padding` zero octets. Errors: WireError.

    `own`: `dumps` has just made it, so that its octets need not be checked.
    """
    end = len(data) if own else scan(data, what)
    tail = data[end:]
    if len(tail) > padding or any(tail):
        raise WireError(f"{what}: {len(tail)} octets after the CBOR item that are no padding")
    try:
        return cbor2.loads(data[:end])
    except cbor2.CBORDecodeError:  # pragma: no cover: `scan` is the stricter one
        raise WireError(f"{what}: CBOR that does not parse") from None


def dumps(value: Any, what: str = "CBOR", *, own: bool = False) -> bytes:
    """`value` in its one encoding. Errors: WireError where the subset has none.

    `own`: it is made by this program from fields of known types, so that its encoding need not be checked.
    """
    try:
        data = bytes(cbor2.dumps(value, canonical=True))
    except (cbor2.CBOREncodeError, UnicodeError):
        raise WireError(f"{what}: a value that has no encoding") from None
    if not own and scan(data, what) != len(data):  # pragma: no cover: cbor2 writes one item
        raise WireError(f"{what}: more than one item")
    return data


# Readers: each checks a decoded value, says where it stood when it is wrong, and gives it back.


@functools.cache
def uint(bits: int) -> Read[int]:
    """An unsigned number of at most `bits` bits."""

    def read(value: Any, where: str) -> int:
        if type(value) is not int or not 0 <= value < 1 << bits:
            raise WireError(f"{where}: not an unsigned number of {bits} bits")
        return value

    return read


u8, u16, u32, u64 = uint(8), uint(16), uint(32), uint(64)


def boolean(value: Any, where: str) -> bool:
    """true or false."""
    if type(value) is not bool:
        raise WireError(f"{where}: not a boolean")
    return value


def text(value: Any, where: str) -> str:
    """A text of at most MAX_TEXT characters."""
    if type(value) is not str or len(value) > MAX_TEXT:
        raise WireError(f"{where}: not a text of at most {MAX_TEXT} characters")
    return value


@functools.cache
def octets(*sizes: int, most: int = MAX_OCTETS) -> Read[bytes]:
    """Octets of one of these sizes; without sizes: of any up to `most`."""

    def read(value: Any, where: str) -> bytes:
        if type(value) is not bytes or len(value) > most or (sizes and len(value) not in sizes):
            raise WireError(f"{where}: not an octet string of the right size")
        return value

    return read


def array(read: Read[T], *, most: int = MAX_ITEMS) -> Read[tuple[T, ...]]:
    """At most `most` of the same kind."""

    def read_all(value: Any, where: str) -> tuple[T, ...]:
        if type(value) is not list or len(value) > most:
            raise WireError(f"{where}: not an array of at most {most} items")
        return tuple([read(item, f"{where}[{n}]") for n, item in enumerate(value)])

    return read_all


texts = array(text)


def row(reads: Sequence[Read[Any]], defaults: Sequence[Any] = ()) -> Read[list[Any]]:
    """An array whose places have meanings; `defaults` fill the end where it is left out."""
    least = len(reads) - len(defaults)

    def read_row(value: Any, where: str) -> list[Any]:
        if type(value) is not list or not least <= len(value) <= len(reads):
            raise WireError(f"{where}: not an array of {least} to {len(reads)} items")
        places = enumerate(zip(reads, value, strict=False))
        found = [read(item, f"{where}[{n}]") for n, (read, item) in places]
        found += defaults[len(value) - least :]
        return found

    return read_row


def trim(values: Sequence[Any], defaults: Sequence[Any]) -> list[Any]:
    """The values for `row` to read, without the defaults at their end."""
    least, end = len(values) - len(defaults), len(values)
    while end > least and values[end - 1] == defaults[end - 1 - least]:
        end -= 1
    return list(values[:end])


def build(make: Callable[..., T], where: str, *args: Any, **named: Any) -> T:
    """A dataclass whose invariants the foreign values may break."""
    try:
        return make(*args, **named)
    except ValueError as error:
        raise WireError(f"{where}: {error}") from None


class MapReader:
    """A decoded map: `take` and `need` read known keys, `rest` returns the unknown ones."""

    __slots__ = ("_left", "_where")

    def __init__(self, value: Any, where: str) -> None:
        if type(value) is not dict:
            raise WireError(f"{where}: not a map")
        self._left: dict[int, Any] = dict(value)
        self._where = where

    def need(self, key: int, read: Read[T]) -> T:
        """The value of a key that must be there."""
        if key not in self._left:
            raise WireError(f"{self._where}: key {key} is missing")
        return read(self._left.pop(key), f"{self._where}: key {key}")

    def take(self, key: int, read: Read[T], default: D) -> T | D:
        """The value of a key, or `default` if it is left out."""
        if key not in self._left:  # mostly
            return default
        return read(self._left.pop(key), f"{self._where}: key {key}")

    def rest(self) -> list[tuple[int, bytes]]:
        """(key, CBOR) of the keys that were not read."""
        if not self._left:  # mostly
            return []
        return [(key, dumps(value, self._where)) for key, value in sorted(self._left.items())]


def put(out: dict[int, Any], key: int, value: Any, default: Any = None) -> None:
    """Set a key of a map that is to be encoded, unless it has its default."""
    if value != default:
        out[key] = value
