"""Octets and trees that somebody damaged: what fuzz tests feed to decoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF)


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds, changed in a few places; sometimes nothing of one."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(("set", "set", "number", "cut", "end", "insert", "again", "other"))):
            case "set":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "number":  # lengths are where they hurt
                width = draw(st.sampled_from((1, 2, 4)))
                data[at : at + width] = bytes([draw(st.sampled_from(NUMBERS))]) * width
            case "cut":
                del data[at : at + draw(st.integers(1, 16))]
            case "end":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "again":
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
            case _:
                other = draw(st.sampled_from(seeds))
                data[at:] = other[draw(st.integers(0, max(0, len(other) - 1))) :]
    return bytes(data)


LEAVES = st.one_of(
    st.text(max_size=8),
    st.sampled_from(("", "0", "-1", "9" * 30, "yes", "::%x", "10.0.0.0/33", "dynamic[tcp/x]", "a..b", "\0")),
    st.lists(st.text(max_size=4), max_size=2),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
)


@st.composite
def damaged_tree(
    draw: st.DrawFn, tree: dict[str, Any], leaves: st.SearchStrategy[Any] = LEAVES
) -> dict[str, Any]:
    """A tree of sections in which something is missing, or something else than it should be."""

    def walk(value: Any, odds: int) -> Any:
        if draw(st.integers(0, odds)) == 0:
            return draw(leaves)
        if isinstance(value, dict):
            return {name: walk(one, odds) for name, one in value.items() if draw(st.integers(0, odds))}
        if isinstance(value, list):
            return [walk(one, odds) if isinstance(one, dict) else one for one in value]
        return value

    found = walk(tree, draw(st.sampled_from((3, 12, 40))))
    return found if isinstance(found, dict) else {}
