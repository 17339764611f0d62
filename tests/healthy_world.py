"""A gateway as `doctor` sees it, on which all is well until a test says otherwise."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ikectx.errors import IkectxError
from ikectx.net.five_tuple import Flow
from ikectx.sa.context import Address
from ikectx_cli.config import Config, PeerSection
from ikectx_cli.doctor.checks import CHECKS, FOR_ROOT
from ikectx_cli.doctor.findings import Finding, examine
from ikectx_cli.doctor.world import PeerAnswer, UdpOwner, World
from ikectx_cli.reach import PacketWay
from ikectx_cli.settings import Setting

VIA = 'forward_via = ["10.0.0.3"]\n'
"""The inner address of the one peer."""

TOML = f"""\
name = "psg"
state_dir = "state"
[gateway]
addresses = ["192.0.2.1"]
[transfer]
listen = ["192.0.2.1:5091"]
certificate = "own.pem"
key = "own.key"
ca = "ca.pem"
[connections.home]
updown = "/etc/updown"
[[peer]]
name = "nsg"
address = "198.51.100.1"
{VIA}"""

IPSEC = TOML.replace('certificate = "own.pem"\nkey = "own.key"\nca = "ca.pem"', 'transport = "ipsec"')

CHARON = {"reachable": True, "version": "5.9.8", "ha": True, "ha_version": 3, "problem": ""}
HA = {"local": "127.0.0.1", "remote": "127.0.0.2", "monitor": "no", "resync": "no"}


class Pki:
    """A CA and certificates of it."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.ca = self.build("test ca", self.key, issuer="test ca").sign(self.key, hashes.SHA256())

    def build(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        *,
        issuer: str = "test ca",
        days: float = 100,
        since: float = 1,
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        subject, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer))
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(by)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=since))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=name == issuer, path_length=None), critical=True)
        )

    def revoke(self, folder: Path, *numbers: int, days: float = 7) -> None:
        """Write the revocation list ca.crl."""
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.ca.subject)
            .last_update(now - datetime.timedelta(days=30))
            .next_update(now + datetime.timedelta(days=days))
        )
        for number in numbers:
            entry = x509.RevokedCertificateBuilder().serial_number(number).revocation_date(now).build()
            builder = builder.add_revoked_certificate(entry)
        signed = builder.sign(self.key, hashes.SHA256())
        (folder / "ca.crl").write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def write(self, folder: Path, name: str = "psg", **options: Any) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        usages = options.pop("usages", (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH))
        dns = options.pop("dns", ())
        builder = self.build(name, key, **options).add_extension(
            x509.ExtendedKeyUsage(usages), critical=False
        )
        if dns:
            names = x509.SubjectAlternativeName([x509.DNSName(item) for item in dns])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        (folder / "own.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / "ca.pem").write_bytes(self.ca.public_bytes(serialization.Encoding.PEM))
        (folder / "own.key").touch(mode=0o600)
        (folder / "own.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )


class Fake(World):
    """A world in which all is well, until a test says otherwise."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, "/none")
        self.answers: dict[str, Any] = {
            "version": {"daemon": "charon-systemd", "version": "5.9.8"},
            "stats": {"plugins": ["vici", "ha"]},
            "conns": [{"name": "home"}],
            "pools": {},
            "status": {"name": "psg", "version": "0.1.0", "charon": dict(CHARON)},
            "list-contexts": [{"name": "home", "known": True}],
        }
        self.ha: dict[str, str] | None = dict(HA)
        self.swanctl = {"connections.home.children.net.updown": "/etc/updown"}
        self.pids: dict[str, int | None] = {"agent": 10, "charon": 20}
        self.starts = {10: 100, 20: 200}
        self.caps: int | None = 1 << 12 | 1 << 13
        self.owners = {"127.0.0.2": UdpOwner(10, "ikectx"), "127.0.0.1": UdpOwner(20, "charon")}
        self.foreign: set[str] = set()
        self.stranger: list[str] | None = []
        self.root = True
        self.user = 0
        self.peer = PeerAnswer(frozenset({"nsg"}), 0.0, 9e12)
        self.tools = {"ip", "nft"}
        self.way = PacketWay("lan0", direct=True)
        self.there: bool | None = True
        self.trials: dict[str, tuple[bool | None, str]] = {}
        self.stuck: set[int] = set()
        self.drops: list[str] | None = []
        self.redirecting: set[str] = set()
        self.notes: bool | IkectxError | None = True
        self.time = datetime.datetime.now(datetime.UTC).timestamp()

    def _get(self, what: str) -> Any:
        answer = self.answers[what]
        if isinstance(answer, IkectxError):
            raise answer
        return answer

    def charon(self, what: str) -> Any:
        return self._get(what)

    def agent(self, command: str) -> Any:
        return self._get(command)

    def is_root(self) -> bool:
        return self.root

    def agent_pid(self) -> int | None:
        return self.pids["agent"]

    def agent_user(self) -> int | None:
        return self.user

    def charon_pid(self) -> int | None:
        return self.pids["charon"]

    def started(self, pid: int) -> int | None:
        return self.starts.get(pid)

    def capabilities(self, pid: int | None) -> int | None:
        return self.caps

    def settings(self, which: str) -> dict[str, Setting] | None:
        if which == "swanctl.conf":
            return {key: Setting(value, which) for key, value in self.swanctl.items()}
        if self.ha is None:
            return None
        return {f"charon.plugins.ha.{key}": Setting(value, which) for key, value in self.ha.items()}

    def udp_owner(self, address: str, port: int) -> UdpOwner | None:
        return self.owners.get(address)

    def as_nobody(self, addresses: object, paths: object) -> list[str] | None:
        return self.stranger

    def is_local(self, address: str) -> bool:
        return address not in self.foreign

    def device_of(self, address: str) -> str:
        return "wan0"

    def way_to(self, address: Address) -> PacketWay:
        return self.way

    def is_there(self, address: Address) -> bool | None:
        return self.there

    def connect(self, peer: PeerSection) -> PeerAnswer:
        return self.peer

    def tool(self, name: str) -> str | None:
        return f"/usr/sbin/{name}" if name in self.tools else None

    def forwards(self, version: int) -> bool:
        return version not in self.stuck

    def redirects(self, device: str) -> bool:
        return device in self.redirecting

    def forward_drops(self) -> list[str] | None:
        return self.drops

    def probe(self, *command: str) -> tuple[bool | None, str]:
        return self.trials.get(command[0], (True, ""))

    def exists(self, path: str) -> bool:
        return path not in self.foreign

    def notes_right(self) -> bool | None:
        if isinstance(self.notes, IkectxError):
            raise self.notes
        return self.notes

    def now(self) -> float:
        return self.time


class Protected(Fake):
    """With transport = "ipsec"; `protected` says what of it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.protected: list[str] = []
        self.error: IkectxError | None = None
        self.plain = PeerAnswer()

    def check_protection(self, flow: Flow) -> None:
        self.protected.append(str(flow))
        if self.error is not None:
            raise self.error

    def _dial(self, peer: PeerSection) -> PeerAnswer:
        return self.plain


def bad(world: World) -> list[Finding]:
    return [finding for finding in examine(world, CHECKS, FOR_ROOT) if finding.level != "ok"]


def only(world: World, check: str, level: str, found: str) -> Finding:
    """The one thing that is wrong."""
    findings = bad(world)
    assert [(item.check, item.level) for item in findings] == [(check, level)], findings
    assert found in findings[0].found
    return findings[0]
