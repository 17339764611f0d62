"""The configuration of a mobile node's agent, /etc/ikectx/mobile.toml: read, checked, frozen.

Every error is a `ConfigError` that names file, line and key. examples/config/mobile.toml has all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ikectx.errors import ConfigError

from ..config import CharonConfig, ControlConfig, charon, control
from ..toml_table import (
    ConfigFile,
    HostPort,
    TomlTable,
    a_file,
    a_name,
    an_address,
    an_endpoint,
    an_integer,
    seconds,
    yes_or_no,
)

if TYPE_CHECKING:
    from ikectx.sa.context import Address

DEFAULT_PATH = "/etc/ikectx/mobile.toml"
VARIABLE = "IKECTX_MOBILE_CONFIG"


@dataclass(frozen=True, slots=True)
class MobileNodeConfig:
    """[mobile]: how a handover is asked for. Times in seconds.

    `addresses`: outer addresses to use, preferred ones first; none: those of the routing table. `retry`,
    `retry_max`: until the first repetition of a request, doubling up to the maximum. `give_up`: after which a
    request is given up. `lifetime`: for which a request is valid (its token's expiry). `predictive`: for
    which an announced move is waited for. `oseq_jump`: outbound sequence numbers left out at a move.
    `update_spi`: change SPIs if a gateway to which the SA was moved asks for it (UPDATE_SPI); otherwise the
    gateway rekeys.
    """

    addresses: tuple[Address, ...] = ()
    retry: float = 2.0
    retry_max: float = 15.0
    give_up: float = 45.0
    lifetime: float = 60.0
    predictive: float = 60.0
    oseq_jump: int = 65536
    update_spi: bool = True


@dataclass(frozen=True, slots=True)
class GatewayEntry:
    """[[gateway]]: a security gateway. `name` is its name in the gateways' own configuration.

    `addresses`: its outer IKE addresses, at most one of each family. `cxtp`: where it receives requests of
    mobile nodes (UDP); None: port 5091 of its IKE address.
    """

    name: str
    addresses: tuple[Address, ...]
    cxtp: HostPort | None = None

    def address(self, version: int) -> Address | None:
        """Its IKE address of that IP version."""
        return next((one for one in self.addresses if one.version == version), None)

    def ask(self, version: int) -> HostPort:
        """The endpoint for a CTAR, preferably of that IP version."""
        return self.cxtp or HostPort(str(self.address(version) or self.addresses[0]))


@dataclass(frozen=True, slots=True)
class MobileFile:
    """The whole file."""

    path: Path
    state_dir: Path
    gateways: tuple[GatewayEntry, ...]
    control: ControlConfig
    charon: CharonConfig
    mobile: MobileNodeConfig
    state_key: Path | None = None

    def gateway(self, name: str) -> GatewayEntry:
        """The gateway of that name. Errors: ConfigError, with the names there are."""
        for gateway in self.gateways:
            if gateway.name == name:
                return gateway
        known = ", ".join(gateway.name for gateway in self.gateways)
        raise ConfigError(f"{self.path} has no [[gateway]] named {name!r}", hint=f"known: {known}")

    def gateway_at(self, address: Address) -> GatewayEntry | None:
        """The gateway with that IKE address."""
        return next((gateway for gateway in self.gateways if address in gateway.addresses), None)


def _checked(root: TomlTable, path: Path) -> MobileFile:
    root.only("state_dir", "state_key", "control", "charon", "mobile", "gateway")
    config = MobileFile(
        path=path,
        state_dir=root.value("state_dir", a_file(path), Path("/var/lib/ikectx")),
        state_key=root.value("state_key", a_file(path), None),
        gateways=tuple(_gateway(table) for table in root.tables("gateway")),
        control=control(root.table("control")),
        charon=charon(root.table("charon")),
        mobile=_mobile(root.table("mobile")),
    )
    _agree(root, config)
    return config


def _mobile(table: TomlTable) -> MobileNodeConfig:
    table.only(*MobileNodeConfig.__slots__)
    default = MobileNodeConfig()
    found = MobileNodeConfig(
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


def _agree(root: TomlTable, config: MobileFile) -> None:
    """Checks that need the whole file."""
    names = [gateway.name for gateway in config.gateways]
    every = [address for gateway in config.gateways for address in gateway.addresses]
    if not names:
        raise root.error("gateway", "is missing", "a handover needs two gateways, each with [[gateway]]")
    for gateway, table in zip(config.gateways, root.tables("gateway"), strict=True):
        if names.count(gateway.name) > 1:
            raise table.error("name", f"{gateway.name!r} is there twice")
        for address in gateway.addresses:
            if every.count(address) > 1:
                raise table.error(
                    "address", f"{address} is there twice", "the agent tells gateways apart by their address"
                )


_FILE = ConfigFile(VARIABLE, DEFAULT_PATH, _checked)
config_path, load, parse = _FILE.path, _FILE.load, _FILE.parse
