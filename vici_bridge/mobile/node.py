"""What a mobile node's agent knows of its gateways, and how it asks them for a handover. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ikectx.errors import ConfigError
from ikectx.peer import HostPort
from ikectx.sa.context import Address


@dataclass(frozen=True, slots=True)
class MobileSettings:
    """How a handover is asked for. Times in seconds.

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
    """A security gateway. `name` is its name in the gateways' own configuration.

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
class MobileNode:
    """A mobile node's gateways and settings. `path`: the file that names them."""

    path: Path
    gateways: tuple[GatewayEntry, ...]
    settings: MobileSettings = MobileSettings()

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
