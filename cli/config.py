"""The one configuration file, /etc/ikectx/ikectx.toml: read, checked, and returned as frozen dataclasses.

Every error is a `ConfigError` that names file, line and key. Relative file names are relative to the folder
of the configuration file. examples/config/ikectx.toml explains all keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikectx.engine.tables import OSEQ_JUMP
from ikectx.errors import ConfigError
from ikectx.peer import HostPort
from vici_bridge.policy.allowed import Range, Rules
from vici_bridge.policy.proposals import ConfiguredProposal
from vici_bridge.rekey_after_move import RekeyAfter

from .toml_table import (
    ConfigFile,
    TomlTable,
    a_file,
    a_name,
    a_number,
    a_text,
    a_vici_uri,
    an_absolute_path,
    an_address,
    an_endpoint,
    an_integer,
    one_of,
    seconds,
    yes_or_no,
)

if TYPE_CHECKING:
    from ikectx.net.credentials import TlsConfig
    from ikectx.sa.context import Address

DEFAULT_PATH = "/etc/ikectx/ikectx.toml"
VARIABLE = "IKECTX_CONFIG"
DEFAULT_SOCKET = "/run/ikectx.vici"
RIGHTS = ("push", "pull", "packet")


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """[control]: the agent's own socket; with `group`, that group may use it too."""

    socket: str = DEFAULT_SOCKET
    group: str | None = None


@dataclass(frozen=True, slots=True)
class CharonConfig:
    """[charon]: the settings of strongswan.conf. The agent binds `ha_local`, which is charon's `ha.remote`.

    `segments`, `port`, `port_nat_t`, `ha_buflen` 0: what strongswan.conf says. `ha_users`: only
    these users, and the agent's, may send to the HA addresses (nftables); empty: all.
    New SPIs for SAs whose own are taken here come from `spi_min` to `spi_max`, as charon's do.
    """

    vici: str = "unix:///run/charon.vici"
    ha_local: str = "127.0.0.2"
    ha_remote: str = "127.0.0.1"
    ha_port: int = 4510
    segments: int = 0
    esp: str = "kernel"
    port: int = 0
    port_nat_t: int = 0
    ha_buflen: int = 0
    spi_min: int = 0xC0000000
    spi_max: int = 0xCFFFFFFF
    ha_users: tuple[str, ...] = ()

    @property
    def kernel_esp(self) -> bool:
        """False with charon's user-space ESP (libipsec)."""
        return self.esp == "kernel"


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """[gateway]: the outer addresses on which this gateway serves mobile nodes, preferred ones first."""

    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """[transfer]: addresses to listen on, our identity (PEM files), and how to move SAs. Times in seconds.

    `transport` "ipsec": plain `protocol` between gateways, refused if the kernel's SPD does not protect it;
    certificates are then not needed. `predictive_seconds`: how long an announced mobile node is waited for.
    `revocation_lists`: PEM files, lists of the CAs in `ca`; `expired_lists`: whether they go on to count
    when their next update is due ("accept"), or peers are refused then. `collision`: how an SA whose SPI is
    taken here is treated. `rekey_after`: what is rekeyed with a new key exchange after an SA came
    here. `announce_after`: how long after its SA came a relayed mobile node is told our addresses; 0: never.
    """

    listen: tuple[HostPort, ...]
    certificate: Path
    key: Path
    ca: Path
    transport: str = "tls"
    protocol: str = "tcp"
    predictive_seconds: float = 60.0
    collision: str = "update"
    rekey_after: RekeyAfter = "no"
    announce_after: float = 0.0
    oseq_jump: int = 65536
    late_seconds: int = 5
    prepare_timeout: float = 30.0
    mn_tries: int = 5
    mn_timeout: float = 0.5
    concurrency: int = 32
    revocation_lists: tuple[Path, ...] = ()
    expired_lists: str = "refuse"

    @property
    def tls(self) -> TlsConfig:
        """The files that TLS takes."""
        from ikectx.net.credentials import TlsConfig

        accept = self.expired_lists == "accept"
        return TlsConfig(self.certificate, self.key, self.ca, self.revocation_lists, accept)


@dataclass(frozen=True, slots=True)
class ConnectionConfig:
    """[connections.NAME]: properties of charon's connection NAME that VICI does not report.

    `hostaccess`: its children have `hostaccess = yes`, which the updown script is told.
    `announces`: its updown script has the network send packets for a mobile node to the gateway that serves
    it, so that a move needs no detour. `agents`: its mobile nodes run `ikectx mobile serve`. `local_ids`,
    `virtual_ips`, `ike_proposals`, `esp_proposals`: what SAs that come in may have (`Rules`).
    """

    name: str
    updown: str | None = None
    hostaccess: bool = False
    handover_to: str | None = None
    announces: bool = False
    agents: bool = False
    local_ids: tuple[str, ...] = ()
    virtual_ips: tuple[Range, ...] = ()
    ike_proposals: tuple[ConfiguredProposal, ...] = ()
    esp_proposals: tuple[ConfiguredProposal, ...] = ()

    @property
    def rules(self) -> Rules:
        """Limits for SAs of this connection that charon does not report."""
        return Rules(self.local_ids, self.virtual_ips, self.ike_proposals, self.esp_proposals)


@dataclass(frozen=True, slots=True)
class MobileSection:
    """[mobile]: where mobile nodes ask for a handover (CTAR, UDP), and how often they may.

    `rate`, `source_rate`: requests per second, in all and from one address. `rfc_token`: the 32-bit token of
    RFC 4067 is accepted. `clock_skew`: seconds that a mobile node's clock may be ahead or behind.
    """

    listen: tuple[HostPort, ...]
    rate: float = 10.0
    source_rate: float = 2.0
    rfc_token: bool = False
    clock_skew: float = 30.0


@dataclass(frozen=True, slots=True)
class ByPacketConfig:
    """[by_packet]: the gateways to ask about IKE messages of SAs that are not here.

    `ask`: names of peers, in this order. `rate`: questions per second; `memory`: unknown SAs remembered.
    """

    ask: tuple[str, ...]
    rate: float = 10.0
    memory: int = 1024


@dataclass(frozen=True, slots=True)
class PeerSection:
    """[[peer]]: another gateway. `rights` are what it may do here: push SAs to us, pull ours.

    `identity` is the name that its certificate must have (a DNS name, or the CN), by default `name`.
    `forward_via`: its inner addresses, to which packets for a moved mobile node are sent on. `connects_from`:
    networks from which it connects to us, beside `address`. `connections`, `identities`: the SAs that it may
    bring, by connection name and by identity in the form of a connection's `id`; `to_connections`,
    `to_identities`: those that may go to it; empty: all.
    """

    name: str
    address: HostPort
    identity: str
    rights: tuple[str, ...] = ("push",)
    forward_via: tuple[Address, ...] = ()
    connects_from: tuple[IPv4Network | IPv6Network, ...] = ()
    connections: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()
    to_connections: tuple[str, ...] = ()
    to_identities: tuple[str, ...] = ()

    @property
    def host(self) -> str:
        return self.address.host

    @property
    def port(self) -> int:
        return self.address.port


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file. `name`: this gateway's name among the other gateways, as in its certificate.

    `updown_helper`: the socket of the helper that runs updown scripts (`ikectx updown-helper`); None: the
    agent runs them."""

    path: Path
    name: str
    state_dir: Path
    gateway: GatewayConfig
    transfer: TransferConfig
    control: ControlConfig = ControlConfig()
    charon: CharonConfig = CharonConfig()
    mobile: MobileSection | None = None
    by_packet: ByPacketConfig | None = None
    connections: Mapping[str, ConnectionConfig] = field(default_factory=dict)
    peers: tuple[PeerSection, ...] = ()
    state_key: Path | None = None
    updown_helper: str | None = None

    def peer(self, name: str) -> PeerSection:
        """The peer of that name. Errors: ConfigError, with the names there are."""
        for peer in self.peers:
            if peer.name == name:
                return peer
        known = ", ".join(peer.name for peer in self.peers) or "none"
        raise ConfigError(f"{self.path} has no [[peer]] named {name!r}", hint=f"known peers: {known}")


def _checked(root: TomlTable, path: Path) -> Config:
    file = a_file(path)
    root.only(
        "name",
        "state_dir",
        "state_key",
        "updown_helper",
        "control",
        "charon",
        "gateway",
        "transfer",
        "mobile",
        "by_packet",
        "connections",
        "peer",
    )
    config = Config(
        path=path,
        name=root.value("name", a_name),
        state_dir=root.value("state_dir", file, Path("/var/lib/ikectx")),
        state_key=root.value("state_key", file, None),
        updown_helper=root.value("updown_helper", an_absolute_path, None),
        control=control(root.table("control")),
        charon=charon(root.table("charon")),
        gateway=_gateway(root.table("gateway")),
        transfer=_transfer(root.table("transfer"), file),
        mobile=_mobile(root.table("mobile")) if "mobile" in root else None,
        by_packet=_by_packet(root.table("by_packet")) if "by_packet" in root else None,
        connections={name: _connection(name, table) for name, table in root.named("connections")},
        peers=tuple(_peer(table) for table in root.tables("peer")),
    )
    _agree(root, config)
    return config


def control(table: TomlTable) -> ControlConfig:
    """[control]."""
    table.only(*ControlConfig.__slots__)
    default = ControlConfig()
    return ControlConfig(
        socket=table.value("socket", an_absolute_path, default.socket),
        group=table.value("group", a_text, default.group),
    )


def charon(table: TomlTable) -> CharonConfig:
    """[charon]."""
    table.only(*CharonConfig.__slots__)
    default = CharonConfig()
    found = CharonConfig(
        vici=table.value("vici", a_vici_uri, default.vici),
        ha_local=str(table.value("ha_local", an_address, ip_address(default.ha_local))),
        ha_remote=str(table.value("ha_remote", an_address, ip_address(default.ha_remote))),
        ha_port=table.value("ha_port", an_integer(1, 65535), default.ha_port),
        segments=table.value("segments", an_integer(0, 16), default.segments),
        esp=table.value("esp", one_of("kernel", "libipsec"), default.esp),
        port=table.value("port", an_integer(0, 65535), default.port),
        port_nat_t=table.value("port_nat_t", an_integer(0, 65535), default.port_nat_t),
        ha_buflen=table.value("ha_buflen", an_integer(0, 65507), default.ha_buflen),
        spi_min=table.value("spi_min", an_integer(256, 0xFFFFFFFF), default.spi_min),
        spi_max=table.value("spi_max", an_integer(256, 0xFFFFFFFF), default.spi_max),
        ha_users=table.several("ha_users", a_text, ()),
    )
    if found.spi_min > found.spi_max:
        raise table.error("spi_min", "must not be above spi_max")
    if found.ha_local == found.ha_remote:
        raise table.error(
            "ha_local", "must differ from ha_remote", "charon and the agent need an address each"
        )
    return found


def _gateway(table: TomlTable) -> GatewayConfig:
    table.only(*GatewayConfig.__slots__)
    return GatewayConfig(table.several("addresses", an_address))


def _transfer(table: TomlTable, file: Callable[[Any], Path]) -> TransferConfig:
    table.only(*TransferConfig.__slots__)
    default = TransferConfig((), Path(), Path(), Path())
    transport = table.value("transport", one_of("tls", "ipsec"), default.transport)
    none = [Path()] if transport == "ipsec" else []
    found = TransferConfig(
        listen=table.several("listen", an_endpoint()),
        certificate=table.value("certificate", file, *none),
        key=table.value("key", file, *none),
        ca=table.value("ca", file, *none),
        transport=transport,
        protocol=table.value("protocol", one_of("tcp", "sctp"), default.protocol),
        predictive_seconds=table.value("predictive_seconds", seconds(1, 3600), default.predictive_seconds),
        collision=table.value("collision", one_of("update", "rekey", "refuse"), default.collision),
        rekey_after=table.value("rekey_after", _rekey_after, default.rekey_after),
        announce_after=table.value("announce_after", seconds(0, 86400), default.announce_after),
        oseq_jump=table.value("oseq_jump", an_integer(1, OSEQ_JUMP), default.oseq_jump),
        late_seconds=table.value("late_seconds", an_integer(0, 60), default.late_seconds),
        prepare_timeout=table.value("prepare_timeout", seconds(1, 600), default.prepare_timeout),
        mn_tries=table.value("mn_tries", an_integer(1, 20), default.mn_tries),
        mn_timeout=table.value("mn_timeout", seconds(0.05, 30), default.mn_timeout),
        concurrency=table.value("concurrency", an_integer(1, 1024), default.concurrency),
        revocation_lists=table.several("revocation_lists", file, ()),
        expired_lists=table.value("expired_lists", one_of("refuse", "accept"), default.expired_lists),
    )
    if found.protocol == "sctp" and transport != "ipsec":
        raise table.error("protocol", "'sctp' needs transport = \"ipsec\"", "TLS is spoken over TCP")
    return found


def _rekey_after(value: Any) -> RekeyAfter:
    """true and false: as earlier versions had it."""
    words: tuple[RekeyAfter, ...] = ("no", "child", "ike")
    known: dict[Any, RekeyAfter] = {False: "no", True: "ike", **dict(zip(words, words, strict=True))}
    if not isinstance(value, bool | str) or value not in known:
        raise ValueError("must be 'no' or 'child' or 'ike'")
    return known[value]


def _mobile(table: TomlTable) -> MobileSection:
    table.only(*MobileSection.__slots__)
    default = MobileSection(())
    return MobileSection(
        listen=table.several("listen", an_endpoint()),
        rate=table.value("rate", a_number(0.1, 100_000), default.rate),
        source_rate=table.value("source_rate", a_number(0.1, 100_000), default.source_rate),
        rfc_token=table.value("rfc_token", yes_or_no, default.rfc_token),
        clock_skew=table.value("clock_skew", seconds(0, 3600), default.clock_skew),
    )


def _by_packet(table: TomlTable) -> ByPacketConfig:
    table.only(*ByPacketConfig.__slots__)
    default = ByPacketConfig(())
    return ByPacketConfig(
        ask=table.several("ask", a_name),
        rate=table.value("rate", a_number(0.1, 100_000), default.rate),
        memory=table.value("memory", an_integer(1, 1 << 20), default.memory),
    )


def _connection(name: str, table: TomlTable) -> ConnectionConfig:
    table.only(*(key for key in ConnectionConfig.__slots__ if key != "name"))
    return ConnectionConfig(
        name=name,
        updown=table.value("updown", a_text, None),
        hostaccess=table.value("hostaccess", yes_or_no, False),
        handover_to=table.value("handover_to", a_name, None),
        announces=table.value("announces", yes_or_no, False),
        agents=table.value("agents", yes_or_no, False),
        local_ids=table.several("local_ids", a_text, ()),
        virtual_ips=table.several("virtual_ips", _a_range, ()),
        ike_proposals=table.several("ike_proposals", _a_proposal, ()),
        esp_proposals=table.several("esp_proposals", _a_proposal, ()),
    )


def _a_range(value: Any) -> Range:
    try:
        return Range.parse(a_text(value))
    except ValueError:
        raise ValueError(
            f"{value!r} must be a network, an address or a range, as in 10.9.0.0/16 or 10.9.0.1-10.9.0.99"
        ) from None


def _a_proposal(value: Any) -> ConfiguredProposal:
    return ConfiguredProposal.parse(a_text(value))


def _peer(table: TomlTable) -> PeerSection:
    table.only(*PeerSection.__slots__)
    name = table.value("name", a_name)
    return PeerSection(
        name=name,
        address=table.value("address", an_endpoint(names=True)),
        identity=table.value("identity", a_text, name),
        rights=table.several("rights", one_of(*RIGHTS), ("push",)),
        forward_via=table.several("forward_via", an_address, ()),
        connects_from=table.several("connects_from", _a_network, ()),
        connections=table.several("connections", a_text, ()),
        identities=table.several("identities", a_text, ()),
        to_connections=table.several("to_connections", a_text, ()),
        to_identities=table.several("to_identities", a_text, ()),
    )


def _a_network(value: Any) -> IPv4Network | IPv6Network:
    try:
        return ip_network(a_text(value))
    except ValueError:
        raise ValueError(
            f"{value!r} must be an address or a network without host bits, as in 192.0.2.1 or 192.0.2.0/28"
        ) from None


def _agree(root: TomlTable, config: Config) -> None:
    """Checks that need the whole file."""
    names = [peer.name for peer in config.peers]
    for peer, table in zip(config.peers, root.tables("peer"), strict=True):
        if peer.name == config.name:
            raise table.error("name", f"{peer.name!r} is this gateway itself")
        if names.count(peer.name) > 1:
            raise table.error("name", f"{peer.name!r} is there twice")
    for name, table in root.named("connections"):
        to = config.connections[name].handover_to
        if to is not None and to not in names:
            known = ", ".join(names) or "none"
            raise table.error("handover_to", f"{to!r} is not a [[peer]]", f"known peers: {known}")
    if config.by_packet is not None:
        for name in config.by_packet.ask:
            if name not in names:
                table = root.table("by_packet")
                raise table.error(
                    "ask", f"{name!r} is not a [[peer]]", f"known peers: {', '.join(names) or 'none'}"
                )


_FILE = ConfigFile(VARIABLE, DEFAULT_PATH, _checked)
config_path, load, parse = _FILE.path, _FILE.load, _FILE.parse
