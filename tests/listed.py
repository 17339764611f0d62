"""`Charon.read_sas`, in worlds without charon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vici_bridge.vici.codec import serialize_message
from vici_bridge.vici.list_sas import Listing

_T = TypeVar("_T")


async def read_sas(
    sas: list[dict[str, Any]], read: Callable[[bytes], _T], *, ike_ids: Sequence[int] = ()
) -> list[_T]:
    """`Charon.read_sas`, of these SAs."""
    return [
        read(serialize_message({sa["name"]: {key: value for key, value in sa.items() if key != "name"}}))
        for sa in sas
        if not ike_ids or int(sa["uniqueid"]) in ike_ids
    ]


def listing_of(list_sas: Callable[[], list[dict[str, Any]]]) -> Listing:
    """A listing of what `list_sas` gives then, as `Charon` would."""

    async def ask(read: Callable[[bytes], _T], *, ike_ids: Sequence[int] = ()) -> list[_T]:
        return await read_sas(list_sas(), read, ike_ids=ike_ids)

    return Listing(ask)
