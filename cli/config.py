"""The one configuration file, /etc/ikectx/ikectx.toml: read, checked, and given as frozen dataclasses.

Every error is a `ConfigError` that names file, line and key. Relative file names count from the
folder of the configuration file. The README has the file with all keys explained.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ikectx.errors import ConfigError

if TYPE_CHECKING:
    from ikectx.context import Address

DEFAULT_PATH = "/etc/ikectx/ikectx.toml"
DEFAULT_SOCKET = "/run/ikectx.vici"
DEFAULT_PORT = 5091
"""Of CXTP (RFC 4067, section 7)."""

RIGHTS = ("push", "pull")

T = TypeVar("T")
_NEEDED: Any = object()


@dataclass(frozen=True, slots=True)
class HostPort:
    """Where CXTP is spoken: an IP address, or for a peer a DNS name, and a TCP port."""

    host: str
    port: int = DEFAULT_PORT

    @property
    def address(self) -> str:
        """The same as `host`."""
        return self.host

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """[control]: the agent's own socket; with `group`, that group may use it too."""

    socket: str = DEFAULT_SOCKET
    group: str | None = None


@dataclass(frozen=True, slots=True)
class CharonConfig:
    """[charon]: as strongswan.conf has it. The agent binds `ha_local`, charon's `ha.remote`."""

    vici: str = "unix:///run/charon.vici"
    ha_local: str = "127.0.0.2"
    ha_remote: str = "127.0.0.1"
    ha_port: int = 4510
    segments: int = 1
    esp: str = "kernel"

    @property
    def kernel_esp(self) -> bool:
        """False with charon's user-space ESP (libipsec)."""
        return self.esp == "kernel"


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """[gateway]: the outer addresses this gateway serves mobile nodes from, preferred ones first."""

    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """[transfer]: where to listen, who we are (PEM files), and how to move. Times in seconds."""

    listen: tuple[HostPort, ...]
    certificate: Path
    key: Path
    ca: Path
    oseq_jump: int = 65536
    late_seconds: int = 5
    prepare_timeout: float = 30.0
    mn_tries: int = 5
    mn_timeout: float = 0.5
    concurrency: int = 16


@dataclass(frozen=True, slots=True)
class ConnectionConfig:
    """[connections.NAME]: what VICI does not tell about charon's connection NAME."""

    name: str
    updown: str | None = None
    handover_to: str | None = None


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """[[peer]]: another gateway. `rights` are what it may do here: push SAs to us, pull ours.

    `identity` is the name its certificate must hold (a DNS name, or the CN), by default `name`.
    `forward_via`: its inner addresses, to which packets for a moved mobile node are sent on.
    """

    name: str
    address: HostPort
    identity: str
    rights: tuple[str, ...] = ("push",)
    forward_via: tuple[Address, ...] = ()

    @property
    def host(self) -> str:
        return self.address.host

    @property
    def port(self) -> int:
        return self.address.port

    @property
    def may_push(self) -> bool:
        return "push" in self.rights

    @property
    def may_pull(self) -> bool:
        return "pull" in self.rights


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file. `name`: what the other gateways know this one by, as in its certificate."""

    path: Path
    name: str
    state_dir: Path
    gateway: GatewayConfig
    transfer: TransferConfig
    control: ControlConfig = ControlConfig()
    charon: CharonConfig = CharonConfig()
    connections: Mapping[str, ConnectionConfig] = field(default_factory=dict)
    peers: tuple[PeerConfig, ...] = ()

    def peer(self, name: str) -> PeerConfig:
        """The peer of that name. Errors: ConfigError, with the names there are."""
        for peer in self.peers:
            if peer.name == name:
                return peer
        known = ", ".join(peer.name for peer in self.peers) or "none"
        raise ConfigError(f"{self.path} has no [[peer]] named {name!r}", hint=f"known peers: {known}")


def config_path(given: str | None) -> Path:
    """The file to read: the one given, $IKECTX_CONFIG, or the default."""
    return Path(given or os.environ.get("IKECTX_CONFIG") or DEFAULT_PATH)


def load(path: Path) -> Config:
    """Read and check a file. Errors: ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}", hint="name another file with --config or $IKECTX_CONFIG"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at octet {error.start}") from None
    return parse(text, path)


def parse(text: str, path: Path) -> Config:
    """Check the text of a file; `path` is for messages and relative names. Errors: ConfigError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"\(at line (\d+), column \d+\)$|\(at end of document\)$", str(error))
        line = where[1] if where and where[1] else str(text.count("\n") + 1)
        raise ConfigError(f"{path}:{line}: not TOML: {str(error).split(' (at ')[0]}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not TOML: nested too deeply") from None
    root = _Table(data, (), _Source(path, _scan(text)))
    config = _config(root, path)
    _agree(root, config)
    return config


@dataclass(frozen=True, slots=True)
class _Source:
    path: Path
    lines: Mapping[tuple[str, ...], int]

    def line(self, key: tuple[str, ...]) -> int:
        """Of the key, or of the nearest thing around it that has one."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)


_HEADER = re.compile(r"\s*(\[\[?)([^\[\]]+)\]")
_ASSIGNMENT = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[\w-]+|"([^"]*)"|'([^']*)'""")


def _scan(text: str) -> dict[tuple[str, ...], int]:
    """Where each table and key begins. tomllib does not tell; this is good enough for messages."""
    lines: dict[tuple[str, ...], int] = {}
    counts: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = _parts(header[2])
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, str(counts[table]))
            lines.setdefault(table, number)
        elif assignment := _ASSIGNMENT.match(line):
            lines.setdefault((*table, *_parts(assignment[1])), number)
    return lines


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part[1] or part[2] or part[0].strip("\"'") for part in _PART.finditer(dotted))


class _Table:
    """A table of the file that knows where it stands."""

    def __init__(self, data: dict[str, Any], where: tuple[str, ...], source: _Source) -> None:
        self._data = data
        self._where = where
        self._source = source

    def error(self, key: str, why: str, hint: str = "") -> ConfigError:
        """The error for one of this table's keys (or for the table: key empty)."""
        place = (*self._where, key) if key else self._where
        return ConfigError(
            f"{self._source.path}:{self._source.line(place)}: {_dotted(place)} {why}", hint=hint
        )

    def value(self, key: str, kind: Callable[[Any], T], default: T = _NEEDED) -> T:
        """The key's value through `kind`, which raises ValueError with what is wrong."""
        if key not in self._data:
            if default is _NEEDED:
                raise self.error(key, "is missing")
            return default
        try:
            return kind(self._data[key])
        except ValueError as error:
            raise self.error(key, str(error)) from None

    def several(self, key: str, kind: Callable[[Any], T], default: tuple[T, ...] = _NEEDED) -> tuple[T, ...]:
        """A list (one value alone counts as one) of distinct values."""

        def kinds(value: Any) -> tuple[T, ...]:
            values = tuple(kind(item) for item in (value if isinstance(value, list) else [value]))
            for at, item in enumerate(values):
                if item in values[:at]:
                    raise ValueError(f"has {item} twice")
            if not values and default is _NEEDED:
                raise ValueError("must not be empty")
            return values

        return self.value(key, kinds, default)

    def table(self, key: str) -> _Table:
        """A table below; an empty one where there is none."""
        return _Table(self.value(key, _table, {}), (*self._where, key), self._source)

    def tables(self, key: str) -> list[_Table]:
        """An array of tables, [[key]]."""
        none: list[dict[str, Any]] = []
        items = self.value(key, _tables, none)
        return [_Table(item, (*self._where, key, str(n)), self._source) for n, item in enumerate(items)]

    def named(self, key: str) -> list[tuple[str, _Table]]:
        """Tables by names of the file's own choice, [key.NAME]."""
        outer = self.table(key)
        return [(name, outer.table(name)) for name in outer._data]

    def only(self, *known: str) -> None:
        """No other keys than these may be there."""
        for key in self._data:
            if key not in known:
                from difflib import get_close_matches

                near = get_close_matches(key, known, 1, 0.6)
                hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
                raise self.error(key, "is not known", hint)


def _dotted(place: tuple[str, ...]) -> str:
    if not place:
        return "the file"
    plain = [part for part in place if not part.isdigit()]
    return ".".join(part if re.fullmatch(r"[\w-]+", part) else f'"{part}"' for part in plain)


# Kinds of values: each returns the value or raises ValueError with "must be ...".


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a table")
    return value


def _tables(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("must be written as [[…]] tables")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("must be a text in quotes that is not empty")
    return value


def _name(value: Any) -> str:
    if not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", _text(value)):
        raise ValueError(f"{value!r} must be a name of letters, digits, dots and hyphens")
    return str(value)


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def kind(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return kind


def _seconds(low: float, high: float) -> Callable[[Any], float]:
    def kind(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"must be a number of seconds from {low:g} to {high:g}")
        return float(value)

    return kind


def _one_of(*choices: str) -> Callable[[Any], str]:
    def kind(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"must be {' or '.join(repr(choice) for choice in choices)}")
        return str(value)

    return kind


def _address(value: Any) -> Address:
    try:
        return ip_address(_text(value))
    except ValueError:
        raise ValueError(f"{value!r} must be an IP address") from None


_HOST_NAME = re.compile(r"(?=.{1,253}$)(?!.*\.[0-9]+$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")


def _endpoint(*, names: bool = False) -> Callable[[Any], HostPort]:
    """ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT; with `names` a host name in place of the address."""

    def kind(value: Any) -> HostPort:
        text = _text(value)
        match = re.fullmatch(r"\[([^\]]*)\](?::(\d{1,5}))?|([^:]*):(\d{1,5})", text)
        host, port = (match[1] or match[3], match[2] or match[4]) if match else (text, None)
        number = int(port) if port else DEFAULT_PORT
        try:
            host = str(ip_address(host))
        except ValueError:
            if not names or not _HOST_NAME.fullmatch(host):
                number = 0
        if not 1 <= number <= 65535:
            what = "a host" if names else "an IP address"
            raise ValueError(
                f"{text!r} must be {what} and a port, as in 192.0.2.1:5091 or [2001:db8::1]:5091"
            )
        return HostPort(host, number)

    return kind


def _vici_uri(value: Any) -> str:
    if not re.fullmatch(r"unix:///.+", _text(value)):
        raise ValueError(f"{value!r} must be a unix socket, as in unix:///run/charon.vici")
    return str(value)


def _absolute(value: Any) -> str:
    if not os.path.isabs(_text(value)):
        raise ValueError(f"{value!r} must be an absolute path")
    return str(value)


def _config(root: _Table, path: Path) -> Config:
    folder = path.parent

    def file(value: Any) -> Path:
        return folder / _text(value)

    root.only("name", "state_dir", "control", "charon", "gateway", "transfer", "connections", "peer")
    return Config(
        path=path,
        name=root.value("name", _name),
        state_dir=root.value("state_dir", file, Path("/var/lib/ikectx")),
        control=_control(root.table("control")),
        charon=_charon(root.table("charon")),
        gateway=_gateway(root.table("gateway")),
        transfer=_transfer(root.table("transfer"), file),
        connections={name: _connection(name, table) for name, table in root.named("connections")},
        peers=tuple(_peer(table) for table in root.tables("peer")),
    )


def _control(table: _Table) -> ControlConfig:
    table.only(*ControlConfig.__slots__)
    default = ControlConfig()
    return ControlConfig(
        socket=table.value("socket", _absolute, default.socket),
        group=table.value("group", _text, default.group),
    )


def _charon(table: _Table) -> CharonConfig:
    table.only(*CharonConfig.__slots__)
    default = CharonConfig()
    charon = CharonConfig(
        vici=table.value("vici", _vici_uri, default.vici),
        ha_local=str(table.value("ha_local", _address, ip_address(default.ha_local))),
        ha_remote=str(table.value("ha_remote", _address, ip_address(default.ha_remote))),
        ha_port=table.value("ha_port", _integer(1, 65535), default.ha_port),
        segments=table.value("segments", _integer(1, 16), default.segments),
        esp=table.value("esp", _one_of("kernel", "libipsec"), default.esp),
    )
    if charon.ha_local == charon.ha_remote:
        raise table.error(
            "ha_local", "must differ from ha_remote", "charon and the agent need an address each"
        )
    return charon


def _gateway(table: _Table) -> GatewayConfig:
    table.only(*GatewayConfig.__slots__)
    return GatewayConfig(table.several("addresses", _address))


def _transfer(table: _Table, file: Callable[[Any], Path]) -> TransferConfig:
    table.only(*TransferConfig.__slots__)
    default = TransferConfig((), Path(), Path(), Path())
    return TransferConfig(
        listen=table.several("listen", _endpoint()),
        certificate=table.value("certificate", file),
        key=table.value("key", file),
        ca=table.value("ca", file),
        oseq_jump=table.value("oseq_jump", _integer(1, 1 << 24), default.oseq_jump),
        late_seconds=table.value("late_seconds", _integer(0, 60), default.late_seconds),
        prepare_timeout=table.value("prepare_timeout", _seconds(1, 600), default.prepare_timeout),
        mn_tries=table.value("mn_tries", _integer(1, 20), default.mn_tries),
        mn_timeout=table.value("mn_timeout", _seconds(0.05, 30), default.mn_timeout),
        concurrency=table.value("concurrency", _integer(1, 1024), default.concurrency),
    )


def _connection(name: str, table: _Table) -> ConnectionConfig:
    table.only("updown", "handover_to")
    return ConnectionConfig(
        name=name,
        updown=table.value("updown", _text, None),
        handover_to=table.value("handover_to", _name, None),
    )


def _peer(table: _Table) -> PeerConfig:
    table.only(*PeerConfig.__slots__)
    name = table.value("name", _name)
    return PeerConfig(
        name=name,
        address=table.value("address", _endpoint(names=True)),
        identity=table.value("identity", _text, name),
        rights=table.several("rights", _one_of(*RIGHTS), ("push",)),
        forward_via=table.several("forward_via", _address, ()),
    )


def _agree(root: _Table, config: Config) -> None:
    """What only the whole file can tell."""
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
