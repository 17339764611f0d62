"""The CBOR subset of profiles: what is outside, what is inside, what has no place in it."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest

from ikectx.errors import WireError
from ikectx.wire import cbor


@pytest.mark.parametrize(
    "data",
    [
        "",  # nothing
        "18",  # head cut
        "1817",  # not the shortest
        "190017",
        "1a0000ffff",
        "1b00000000ffffffff",
        "1c",  # reserved
        "5f4101ff",  # indefinite
        "9fff",
        "bfff",
        "4401",  # octets cut
        "61ff",  # text that is not UTF-8
        "63eda080",  # a surrogate
        "8201",  # array cut
        "9bffffffffffffffff",
        "bb7fffffffffffffff",
        "5bffffffffffffffff",
        "a10102a1",  # two items
        "a201000100",  # duplicate key
        "a202000100",  # keys out of order
        "a12000",  # negative key
        "a1616100",  # text key
        "a11a0001000000",  # key above 65535
        "a1a00000",  # map as key
        "c11a514b67b0",  # tags: a time,
        "c249010000000000000000",  # a big number,
        "d81d00",  # a shared reference,
        "d8238161",  # ...
        "f5f5",
        "f7",  # undefined
        "f0",
        "f8ff",
        "f97e00",  # floats
        "fa47c35000",
        "fb7ff8000000000000",
        "ff",
        "81" * 9 + "00",  # too deep
        "81" * 100_000 + "00",
        "a100" * 9 + "00",
    ],
)
def test_cbor_outside_the_subset(data: str) -> None:
    with pytest.raises(WireError):
        cbor.loads(bytes.fromhex(data))


@pytest.mark.parametrize(
    "value",
    [
        0,
        23,
        24,
        255,
        256,
        65535,
        65536,
        (1 << 64) - 1,
        -1,
        -(1 << 64),
        b"",
        "",
        "ü",
        [],
        {},
        True,
        False,
        None,
        [[[[[[[]]]]]]],
        {0: 1, 23: [2], 24: {}, 65535: "x"},
    ],
)
def test_cbor_inside_the_subset(value: Any) -> None:
    data = cbor.dumps(value)
    assert cbor.loads(data) == value
    assert cbor.loads(data + bytes(7), padding=7) == value
    assert cbor.scan(data + b"more") == len(data)
    assert cbor2.dumps(value, canonical=True) == data


@pytest.mark.parametrize(
    "value", [1 << 64, 1.5, "\ud800", object(), {"a": 1}, {-1: 0}, {65536: 0}, [[[[[[[[[]]]]]]]]]]
)
def test_cbor_has_no_place_for(value: Any) -> None:
    with pytest.raises(WireError):
        cbor.dumps(value)
