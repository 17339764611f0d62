"""What charon and the kernel have of one SA, in words for an operator who has to decide about it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ikectx.errors import CharonError, KernelError, StateError, WireError

if TYPE_CHECKING:
    from ikectx.sa.name import SaName
    from vici_bridge.host import CharonHost
    from vici_bridge.vici.views import SaView

DROP_PATIENCE = 5.0
"""Seconds for charon to forget an SA that it was forced to."""


async def evidence(host: CharonHost, sa: SaName) -> dict[str, str]:
    """charon's and the kernel's part of the SA, each in words. Raises nothing that they cause."""
    view: SaView | None = None
    try:
        view = await host.view(sa)
        charon = "has no such SA" if view is None else f"{view.name} #{view.unique_id}, {view.state}"
    except (CharonError, WireError) as error:
        charon = f"cannot be asked: {error}"
    try:
        mute = sa in {one.spis for one in await asyncio.to_thread(host.mute.listing)}
        kernel = f"IKE is {'dropped' if mute else 'not dropped'}, {_esp(host, view)}"
    except KernelError as error:
        kernel = f"cannot be asked: {error}"
    return {"charon": charon, "kernel": kernel}


def _esp(host: CharonHost, view: SaView | None) -> str:
    if host.kernel is None:
        return "ESP is in user space"
    if view is None or not view.children:
        return "no CHILD_SA is known"
    policies = host.kernel.policies_about({child.reqid for child in view.children})
    out = sum(policy.direction == "out" for policy in policies)
    return f"{len(view.children)} CHILD_SAs, {out} policies by which packets leave"


async def drop_orphan(host: CharonHost, sa: SaName) -> None:
    """Have charon forget an SA that is mute, and that this agent knows nothing of. Nothing is sent to its
    peer.

    Nor need charon have it any more. Errors: StateError if it is no such SA, CharonError, KernelError.
    """
    if sa not in host.orphans.known:
        raise StateError(
            f"the SA {sa} is not one that the store knows nothing of", hint="see `ikectx resolve`"
        )
    view = await host.view(sa)
    if view is not None:
        # nftables drops its Delete; charon does not wait for an answer
        await host.vici.terminate(view.unique_id, -1, force=True)
    end = asyncio.get_running_loop().time() + DROP_PATIENCE
    while view is not None and await host.view(sa) is not None:
        if asyncio.get_running_loop().time() > end:
            raise CharonError(f"charon still lists {view.name} #{view.unique_id}", hint="see charon's log")
        await asyncio.sleep(0.01)
    host.mute.unmute(sa)
    host.orphans.known.discard(sa)
