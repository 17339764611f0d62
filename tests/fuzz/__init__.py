"""Octets and trees that somebody damaged, and all decoders of foreign octets (`targets`)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF)


def changed(dice: Random, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds, changed in a few places; sometimes nothing of one."""
    if dice.randrange(10) == 0:
        return dice.randbytes(dice.randrange(300))
    data = bytearray(dice.choice(seeds))
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(data) or 1)
        match dice.choice(("set", "set", "number", "cut", "end", "insert", "again", "other")):
            case "set":
                data[at : at + 1] = dice.randbytes(1)
            case "number":  # lengths are where they hurt
                width = dice.choice((1, 2, 4))
                data[at : at + width] = bytes([dice.choice(NUMBERS)]) * width
            case "cut":
                del data[at : at + dice.randint(1, 16)]
            case "end":
                del data[at:]
            case "insert":
                data[at:at] = dice.randbytes(dice.randint(1, 8))
            case "again":
                data[at:at] = data[at : at + dice.randint(1, 40)]
            case _:
                other = dice.choice(seeds)
                data[at:] = other[dice.randrange(len(other) or 1) :]
    return bytes(data)


def damaged(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Octets as `changed` makes them."""
    return st.randoms(use_true_random=False).map(lambda dice: changed(dice, seeds))


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
