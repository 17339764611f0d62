"""`doctor` on what comes later: a mobile node that authenticates again, and SAs that charon begins itself."""

from __future__ import annotations

from collections.abc import Iterator

from .findings import Outcome
from .world import World

_STARTERS = {
    "start_action": "the agent takes a trap out while its SA is elsewhere; where the mobile nodes can begin "
    "by themselves, start_action = none",
    "dpd_action": "where the mobile nodes can begin by themselves, dpd_action = clear",
    "close_action": "where the mobile nodes can begin by themselves, close_action = none",
}
_WORDS = {"trap", "hold", "start", "restart"}


def identities(world: World) -> Iterator[Outcome]:
    """Mobile nodes that would find a gateway of another name when they authenticate again."""
    warnings = {str(sa.get("warning") or "") for sa in world.agent("list-contexts")} - {""}
    for warning in sorted(warnings):
        yield "note", warning, "the README's section Limits says how"
    if not warnings:
        yield "ok", "mobile nodes may authenticate again after a move"


def starts(world: World) -> Iterator[Outcome]:
    """Settings by which charon begins an SA itself, also while that of the mobile node is at another
    gateway."""
    found, settings = False, world.settings("swanctl.conf") or {}
    gateways = (
        {peer.host for peer in world.config.peers} if world.config.transfer.transport != "tls" else set()
    )
    for key, setting in settings.items():
        parts = key.split(".")
        remote = settings.get(".".join([*parts[:-3], "remote_addrs"]))
        if remote is not None and remote.value in gateways:
            continue  # it protects the connection with that gateway's agent
        if len(parts) < 5 or parts[0] != "connections" or parts[-1] not in _STARTERS:
            continue
        if _WORDS & set(setting.value.replace("|", " ").split()):
            found, child = True, f"{'.'.join(parts[1:-3])}/{parts[-2]}"
            yield (
                "note",
                f"{child} has {parts[-1]} = {setting.value}: charon may begin an SA with a mobile node "
                "whose SA is at another gateway",
                _STARTERS[parts[-1]],
            )
    if not found:
        yield "ok", "charon begins no SA by itself"
