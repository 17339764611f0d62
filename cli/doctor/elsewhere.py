"""`doctor` where there is no gateway's configuration: before one is written, and on a mobile node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..config import Config, GatewayConfig, TransferConfig
from .checks import (
    FOR_ROOT,
    capabilities,
    charon_runs,
    clock,
    esp,
    ha_plugin,
    ha_settings,
    ha_socket,
    ha_version,
    nftables,
    secret_files,
)
from .findings import Checks, Finding, Outcome, examine
from .world import World

COPY = "mkdir -p /etc/ikectx; cp /opt/ikectx/examples/config/{0} /etc/ikectx/ and change what is not yours"


def nothing_yet(path: Path) -> Config:
    """A configuration with nothing but defaults, and without other gateways."""
    nothing = TransferConfig((), Path(), Path(), Path(), transport="ipsec")
    return Config(path, "", Path("/var/lib/ikectx"), GatewayConfig(()), nothing)


def before(world: World) -> list[Finding]:
    """What can be said of this machine before it has a configuration."""
    fix = f"{COPY.format('ikectx.toml')} (on a mobile node: mobile.toml)"
    first = Finding("configuration", "fail", f"there is no {world.config.path}", fix)
    return [first, *examine(world, BEFORE, FOR_ROOT)]


def on_mobile_node(world: World) -> list[Finding]:
    """What would keep a mobile node from asking for handovers."""
    return examine(world, MOBILE, FOR_ROOT)


def mobile_agent(world: World) -> Iterator[Outcome]:
    """The mobile node's agent, what it says of its SAs, and whether routes lead to the gateways."""
    status = world.agent("status")
    yield "ok", f"the agent runs, version {status.get('version')}"
    if (status.get("charon") or {}).get("reachable") is False:
        yield "fail", "the agent cannot reach charon", "compare [charon] vici with charon.plugins.vici.socket"
    for sa in status.get("sas", ()):
        who = f"{sa.get('name')} #{sa.get('ike_id')}"
        if sa.get("gateway") is None:
            yield (
                "warn",
                f"{who} is at {sa.get('remote')}, which is no [[gateway]]",
                "write a [[gateway]] with this address, if it is one of yours",
            )
        elif sa.get("reason"):
            yield "warn", f"{who} cannot be handed over: {sa['reason']}", str(sa.get("hint", ""))
        else:
            yield "ok", f"{who} is at {sa['gateway']}"
    for gateway in status.get("gateways", ()):
        ways = {key: way for key, way in gateway.items() if key != "name"}
        if ways and set(ways.values()) == {"no way there"}:
            yield "warn", f"no route leads to {gateway.get('name')} ({', '.join(ways)})", "see ip route"


BEFORE: Checks = (
    ("charon", charon_runs),
    ("ha plugin", ha_plugin),
    ("ha settings", ha_settings),
    ("kernel", esp),
    ("kernel", nftables),
)

MOBILE: Checks = (
    ("charon", charon_runs),
    ("ha plugin", ha_plugin),
    ("ha settings", ha_settings),
    ("ha socket", ha_socket),
    ("agent", mobile_agent),
    ("ha version", ha_version),
    ("capabilities", capabilities),
    ("secret files", secret_files),
    ("clock", clock),
    ("kernel", esp),
)
