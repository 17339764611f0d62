"""The configuration of a mobile node's agent, /etc/ikectx/mobile.toml: read, checked, frozen.

Every error is a `ConfigError` that names file, line and key. examples/config/mobile.toml has all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vici_bridge.mobile.node import GatewayEntry, MobileNode, MobileSettings

from ..config import CharonConfig, ControlConfig, charon, control
from ..toml_table import (
    ConfigFile,
    TomlTable,
    a_file,
    a_name,
    an_address,
    an_endpoint,
    an_integer,
    seconds,
    yes_or_no,
)

DEFAULT_PATH = "/etc/ikectx/mobile.toml"
VARIABLE = "IKECTX_MOBILE_CONFIG"


@dataclass(frozen=True, slots=True)
class MobileFile:
    """The whole file. `node`: [mobile] and each [[gateway]]."""

    node: MobileNode
    state_dir: Path
    control: ControlConfig
    charon: CharonConfig
    state_key: Path | None = None


def _checked(root: TomlTable, path: Path) -> MobileFile:
    root.only("state_dir", "state_key", "control", "charon", "mobile", "gateway")
    node = MobileNode(
        path, tuple(_gateway(table) for table in root.tables("gateway")), _mobile(root.table("mobile"))
    )
    _agree(root, node)
    return MobileFile(
        node=node,
        state_dir=root.value("state_dir", a_file(path), Path("/var/lib/ikectx")),
        state_key=root.value("state_key", a_file(path), None),
        control=control(root.table("control")),
        charon=charon(root.table("charon")),
    )


def _mobile(table: TomlTable) -> MobileSettings:
    table.only(*MobileSettings.__slots__)
    default = MobileSettings()
    found = MobileSettings(
        addresses=table.several("addresses", an_address, default.addresses),
        retry=table.value("retry", seconds(0.05, 60), default.retry),
        retry_max=table.value("retry_max", seconds(0.05, 600), default.retry_max),
        give_up=table.value("give_up", seconds(0.1, 3600), default.give_up),
        lifetime=table.value("lifetime", seconds(1, 300), default.lifetime),
        predictive=table.value("predictive", seconds(1, 3600), default.predictive),
        oseq_jump=table.value("oseq_jump", an_integer(1, 1 << 24), default.oseq_jump),
        update_spi=table.value("update_spi", yes_or_no, default.update_spi),
    )
    if found.retry > found.retry_max:
        raise table.error("retry", "must not be above retry_max")
    return found


def _gateway(table: TomlTable) -> GatewayEntry:
    table.only("name", "address", "cxtp")
    gateway = GatewayEntry(
        name=table.value("name", a_name),
        addresses=table.several("address", an_address),
        cxtp=table.value("cxtp", an_endpoint(names=True), None),
    )
    versions = [address.version for address in gateway.addresses]
    if len(set(versions)) < len(versions):
        raise table.error("address", "must be one address, or one IPv4 and one IPv6 address")
    return gateway


def _agree(root: TomlTable, node: MobileNode) -> None:
    """Checks that need the whole file."""
    names = [gateway.name for gateway in node.gateways]
    every = [address for gateway in node.gateways for address in gateway.addresses]
    if not names:
        raise root.error("gateway", "is missing", "a handover needs two gateways, each with [[gateway]]")
    for gateway, table in zip(node.gateways, root.tables("gateway"), strict=True):
        if names.count(gateway.name) > 1:
            raise table.error("name", f"{gateway.name!r} is there twice")
        for address in gateway.addresses:
            if every.count(address) > 1:
                raise table.error(
                    "address", f"{address} is there twice", "the agent tells gateways apart by their address"
                )


_FILE = ConfigFile(VARIABLE, DEFAULT_PATH, _checked)
config_path, load, parse = _FILE.path, _FILE.load, _FILE.parse
