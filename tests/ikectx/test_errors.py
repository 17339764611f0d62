"""What reading something back from the store may raise is one error, which repeats no value."""

from __future__ import annotations

import json

import pytest

from ikectx.errors import StoreError, WireError, reading


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b'{"key": "5ec3e7"', "the note cannot be read (JSONDecodeError)"),
        (b'{"other": "5ec3e7"}', "the note cannot be read (KeyError)"),
        (b'["5ec3e7"]', "the note cannot be read (TypeError)"),
        (b'{"key": "5ec3e7 and no number"}', "the note cannot be read (ValueError)"),
        (b"[" * 200_000, "the note cannot be read (RecursionError)"),
    ],
)
def test_what_is_damaged_is_one_error_without_a_value(raw: bytes, says: str) -> None:
    with pytest.raises(StoreError) as caught, reading("the note"):
        int(json.loads(raw)["key"])
    assert str(caught.value) == says
    assert caught.value.__suppress_context__


def test_errors_of_this_project_say_why() -> None:
    with pytest.raises(StoreError, match=r"^the note cannot be read: ends at octet 3$"), reading("the note"):
        raise WireError("ends at octet 3")
    with pytest.raises(StoreError, match=r"^of another version$"), reading("the note"):
        raise StoreError("of another version")
