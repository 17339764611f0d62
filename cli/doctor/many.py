"""`doctor` on a charon with many SAs, whose defaults are for few."""

from __future__ import annotations

from collections.abc import Iterator

from vici_bridge.vici.answers import View

from ..settings import is_yes, number
from .findings import Outcome
from .world import World

MANY = 1000
"""IKE_SAs from which on charon takes milliseconds more for one that moves (5.9.8)."""
IN_A_ROW = 16
"""IKE_SAs in a row of charon's table that cost nothing."""
FIX = (
    "see the README's section Gateways with thousands of SAs: examples/config/many-sas.conf into "
    "/etc/strongswan.d, then start charon anew when the gateway is drained"
)


def many_sas(world: World) -> Iterator[Outcome]:
    stats = world.charon("stats")
    count = _total(stats)
    settings = world.settings("strongswan.conf")
    if settings is None or count < MANY:
        yield "ok", f"{count} IKE_SAs"
        return
    found = False
    rows = number(settings, "ikesa_table_size", 1)
    if rows * IN_A_ROW < count:
        found = True
        yield (
            "note",
            f"charon has {count} IKE_SAs in a table of {rows} {'row' if rows == 1 else 'rows'} "
            "(charon.ikesa_table_size), so it goes through many of them for each message",
            FIX,
        )
    off = any(
        not is_yes(settings[key].value)
        for key in ("charon-systemd.install_routes", "charon.install_routes")
        if key in settings
    )
    if not off and "kernel-libipsec" not in stats.get("plugins", []):
        found = True
        yield (
            "note",
            f"charon installs a route for each CHILD_SA, and reads all of them before ({count} IKE_SAs; "
            "charon.install_routes)",
            FIX,
        )
    if not found:
        yield "ok", f"{count} IKE_SAs, for which charon has the right settings"


def _total(stats: View) -> int:
    told = stats.get("ikesas")
    total = told.get("total", "") if isinstance(told, dict) else ""
    return int(total) if isinstance(total, str) and total.isdigit() else 0
