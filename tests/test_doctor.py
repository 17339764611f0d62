"""`doctor`: each mistake in a world made for it, and the probes of the real world where they are harmless."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ikectx.errors import CharonError, IkectxError, KernelError, LinkError
from ikectx.flow import Flow
from ikectx_cli import commands, doctor
from ikectx_cli.config import Config, PeerConfig, parse
from ikectx_cli.doctor import Finding
from ikectx_cli.doctor_world import PeerAnswer, UdpOwner, World
from ikectx_cli.settings import Setting, load
from ikectx_cli.toml_table import HostPort

TOML = """\
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
"""

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
            "status": {"name": "psg", "version": "0.1.0", "charon": {"reachable": True}},
            "list-contexts": [{"name": "home", "known": True}],
        }
        self.ha: dict[str, str] | None = dict(HA)
        self.swanctl = {"connections.home.children.net.updown": "/etc/updown"}
        self.pids: dict[str, int | None] = {"agent": 10, "charon": 20}
        self.starts = {10: 100, 20: 200}
        self.caps: int | None = 1 << 12 | 1 << 13
        self.owners = {"127.0.0.2": UdpOwner(10, "ikectx"), "127.0.0.1": UdpOwner(20, "charon")}
        self.foreign: set[str] = set()
        self.peer = PeerAnswer(frozenset({"nsg"}), 0.0)
        self.tools = {"ip", "nft"}
        self.trials: dict[str, tuple[bool | None, str]] = {}
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

    def agent_pid(self) -> int | None:
        return self.pids["agent"]

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

    def is_local(self, address: str) -> bool:
        return address not in self.foreign

    def connect(self, peer: PeerConfig) -> PeerAnswer:
        return self.peer

    def tool(self, name: str) -> str | None:
        return f"/usr/sbin/{name}" if name in self.tools else None

    def probe(self, *command: str) -> tuple[bool | None, str]:
        return self.trials.get(command[0], (True, ""))

    def exists(self, path: str) -> bool:
        return path not in self.foreign

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

    def _try(self, flow: Flow) -> PeerAnswer:  # type: ignore[override]
        return self.plain


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki()


@pytest.fixture
def world(tmp_path: Path, pki: Pki) -> Fake:
    (tmp_path / "ikectx.toml").write_text(TOML)
    (tmp_path / "state").mkdir(mode=0o700)
    pki.write(tmp_path)
    return Fake(parse(TOML, tmp_path / "ikectx.toml"))


def bad(world: World) -> list[Finding]:
    return [finding for finding in doctor.examine(world) if finding.level != "ok"]


def only(world: World, check: str, level: str, found: str) -> Finding:
    """The one thing that is wrong."""
    findings = bad(world)
    assert [(item.check, item.level) for item in findings] == [(check, level)], findings
    assert found in findings[0].found
    return findings[0]


def test_all_is_well(world: Fake) -> None:
    findings = doctor.examine(world)
    assert {finding.level for finding in findings} == {"ok"}
    assert {finding.check for finding in findings} == {name for name, _ in doctor.CHECKS} - {
        "pools",
        "protection",
    }


def test_charon_is_away(world: Fake) -> None:
    for what in ("version", "stats", "conns", "pools"):
        world.answers[what] = CharonError("charon's VICI socket cannot be used", hint="start strongSwan")
    world.pids["charon"] = None
    findings = bad(world)
    assert findings[0] == Finding("charon", "fail", "charon's VICI socket cannot be used", "start strongSwan")
    for finding in findings[1:]:
        assert (finding.level, finding.found) == ("note", "not checked, because of charon")


def test_ha_plugin_missing_or_deaf(world: Fake) -> None:
    world.answers["stats"] = {"plugins": ["vici"]}
    fix = only(world, "ha plugin", "fail", "not loaded the ha plugin").fix
    assert "libcharon-extra-plugins" in fix and "local = 127.0.0.1, remote = 127.0.0.2, monitor = no" in fix
    world.answers["stats"] = {"plugins": ["ha"]}
    del world.owners["127.0.0.1"]
    only(world, "ha plugin", "fail", "does not listen on 127.0.0.1:4510")


@pytest.mark.parametrize(
    "key, value, level, found",
    [
        ("monitor", None, "fail", "monitor is yes, not no"),
        ("monitor", "yes", "fail", "monitor is yes, not no"),
        ("local", "127.0.0.9", "fail", "local is 127.0.0.9, not 127.0.0.1"),
        ("remote", None, "fail", "remote is not set, not 127.0.0.2"),
        ("segment_count", "4", "fail", "segment_count is 4, not 1"),
        ("resync", None, "warn", "resync is on"),
        ("secret", "hush", "fail", "secret is set"),
    ],
)
def test_ha_settings(world: Fake, key: str, value: str | None, level: str, found: str) -> None:
    assert world.ha is not None
    world.ha.pop(key, None)
    if value is not None:
        world.ha[key] = value
    finding = only(world, "ha settings", level, found)
    assert "hush" not in finding.found + finding.fix


def test_ha_settings_unreadable(world: Fake) -> None:
    world.ha = None
    only(world, "ha settings", "note", "cannot be read")


def test_ha_socket(world: Fake) -> None:
    world.owners["127.0.0.2"] = UdpOwner(99, "nc")
    assert "gets the keys" in only(world, "ha socket", "fail", "taken by nc (pid 99)").found
    world.owners["127.0.0.2"] = UdpOwner(0, "a process that cannot be seen")
    assert bad(world) == []
    del world.owners["127.0.0.2"]
    only(world, "ha socket", "fail", "nobody listens")


def test_agent_away_or_confused(world: Fake) -> None:
    world.answers["status"] = world.answers["list-contexts"] = LinkError("no agent listens", hint="start it")
    world.pids["agent"] = None
    del world.owners["127.0.0.2"]
    levels = {(finding.check, finding.level) for finding in bad(world)}
    assert levels == {("ha socket", "warn"), ("agent", "fail"), ("order", "note")}
    world.answers["status"] = {"name": "other", "charon": {"reachable": False}}
    world.answers["list-contexts"] = []
    texts = [finding.found for finding in bad(world) if finding.check == "agent"]
    assert "goes by 'other'" in texts[0] and "cannot reach charon" in texts[1]


def test_charon_started_before_the_agent(world: Fake) -> None:
    world.answers["list-contexts"] = [{"name": "home", "known": False}]
    assert (
        "came up while the agent was away"
        in only(world, "order", "warn", "1 SAs cannot be moved (home)").found
    )
    world.starts = {10: 200, 20: 100}
    assert "Before=strongswan.service" in only(world, "order", "warn", "charon started before").fix


def test_capabilities(world: Fake) -> None:
    world.caps = 1 << 12
    only(world, "capabilities", "fail", "the agent has no CAP_NET_RAW")
    world.caps = 0
    only(world, "capabilities", "fail", "no CAP_NET_ADMIN and no CAP_NET_RAW")
    world.caps = None
    only(world, "capabilities", "note", "cannot be read")


def test_secret_files(world: Fake) -> None:
    world.config.transfer.key.chmod(0o640)
    assert "chmod 0600" in only(world, "secret files", "fail", "open to others (0640)").fix
    world.config.transfer.key.chmod(0o600)
    world.config.state_dir.chmod(0o755)
    assert "chmod 0700" in only(world, "secret files", "fail", "the store of keys").fix


@pytest.mark.parametrize(
    "options, level, found",
    [
        ({"days": 3}, "warn", "expires in 3.0 days"),
        ({"days": -2, "since": 9}, "fail", "expired 2 days ago"),
        ({"since": -2}, "fail", "not valid yet"),
        ({"name": "gw7"}, "note", "holds gw7, not 'psg'"),
        ({"name": "psg", "dns": ["gw8.example"]}, "note", "holds gw8.example, not 'psg'"),
        ({"usages": [ExtendedKeyUsageOID.SERVER_AUTH]}, "fail", "not for clientAuth"),
    ],
)
def test_certificates(
    world: Fake, pki: Pki, tmp_path: Path, options: dict[str, Any], level: str, found: str
) -> None:
    pki.write(tmp_path, **options)
    only(world, "certificates", level, found)


def test_certificate_files(world: Fake, pki: Pki, tmp_path: Path) -> None:
    other = Pki()
    (tmp_path / "ca.pem").write_bytes(other.ca.public_bytes(serialization.Encoding.PEM))
    only(world, "certificates", "fail", "was not issued by a CA")
    pki.write(tmp_path)
    own = (tmp_path / "own.key").read_bytes()
    pki.write(tmp_path)
    (tmp_path / "own.key").write_bytes(own)
    only(world, "certificates", "fail", "is not the key of")
    (tmp_path / "own.key").write_text("no PEM")
    only(world, "certificates", "fail", "not PEM")
    (tmp_path / "own.key").unlink()
    only(world, "certificates", "fail", "No such file")


def test_clock(world: Fake) -> None:
    os.utime(world.config.path, (world.time + 3600, world.time + 3600))
    only(world, "clock", "fail", "behind")


def test_kernel(world: Fake, tmp_path: Path) -> None:
    world.trials["ip"] = (False, "RTNETLINK answers: Protocol not supported")
    assert "esp4" in only(world, "kernel", "fail", "Protocol not supported").fix
    world.trials = {"ip": (None, "only root can try it"), "nft": (None, "only root can try it")}
    assert [finding.level for finding in bad(world)] == ["note", "note"]
    world.trials = {"nft": (False, "Operation not supported")}
    only(world, "kernel", "fail", "nftables does not work")
    world.tools = {"ip"}
    assert "nftables" in only(world, "kernel", "fail", "nft is missing").fix
    world.trials, world.tools = {}, {"nft"}
    only(world, "kernel", "fail", "ip is missing")


def test_user_space_esp(world: Fake, tmp_path: Path) -> None:
    text = TOML.replace("[gateway]", '[charon]\nesp = "libipsec"\n[gateway]')
    world.config = parse(text, tmp_path / "ikectx.toml")
    only(world, "kernel", "note", "user-space ESP")
    world.foreign = {"/dev/net/tun"}
    only(world, "kernel", "fail", "/dev/net/tun")


def test_addresses(world: Fake) -> None:
    world.foreign = {"192.0.2.1"}
    assert [finding.found.split(":")[0] for finding in bad(world)] == [
        "[gateway] addresses",
        "[transfer] listen",
    ]


@pytest.mark.parametrize(
    "answer, found, fix",
    [
        (PeerAnswer(failed="Connection refused"), "Connection refused", "firewall"),
        (PeerAnswer(frozenset({"gw9"}), 0.0), "certificate for gw9", 'identity = "gw9"'),
        (PeerAnswer(frozenset(), 0.0), "certificate for nobody", "identity"),
        (PeerAnswer(frozenset({"nsg"}), 0.0, refused=True), "does not accept us", 'name = "psg"'),
        (PeerAnswer(frozenset({"nsg"}), 9e12), "not valid yet", "clock"),
    ],
)
def test_peers(world: Fake, answer: PeerAnswer, found: str, fix: str) -> None:
    world.peer = answer
    assert fix in only(world, "peers", "fail", found).fix


def test_no_peers(world: Fake, tmp_path: Path) -> None:
    world.config = parse(TOML.partition("[[peer]]")[0], tmp_path / "ikectx.toml")
    only(world, "peers", "warn", "no [[peer]]")


def test_connections(world: Fake) -> None:
    world.answers["conns"] = []
    only(world, "connections", "warn", "no connection 'home'")
    world.answers["conns"] = [{"name": "home"}]
    world.swanctl["connections.a.b.children.net.updown"] = "/x"
    fix = only(world, "connections", "warn", "connection 'a.b' has an updown script").fix
    assert fix == 'write [connections.a.b] updown = "/x"'


def test_pools(world: Fake) -> None:
    world.answers["pools"] = {"rw": {"base": "10.9.0.0", "size": "254"}}
    only(world, "pools", "note", "pool rw")


def test_the_command(
    world: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("ikectx_cli.doctor_world.World", lambda config, control: world)
    args = ["--config", str(tmp_path / "ikectx.toml"), "doctor"]
    assert commands.run(args) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("0 note, 0 warn, 0 fail")
    world.answers["stats"] = {"plugins": []}
    assert commands.run(args) == 1
    assert "fail ha plugin: charon has not loaded the ha plugin\n    install it" in capsys.readouterr().out
    assert world.ha is not None
    world.ha = {"monitor": "yes"}
    commands.run(args)
    assert capsys.readouterr().out.count("    in strongswan.conf") == 1
    world.ha = dict(HA)
    assert commands.run([*args, "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["ok"] is False
    assert {"check", "level", "found", "fix"} == set(value["findings"][0])


def test_the_sample_for_strongswan_passes(world: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Path(__file__).parent.parent / "examples" / "config" / "ha.conf"
    settings = {f"charon.plugins.{key}": setting for key, setting in load(str(sample)).items()}
    assert len(settings) == 6
    monkeypatch.setattr(world, "settings", lambda which: settings)
    assert [finding for finding in bad(world) if finding.check == "ha settings"] == []


# -- the real world


@pytest.fixture
def real(tmp_path: Path, pki: Pki) -> World:
    pki.write(tmp_path)
    return World(parse(TOML, tmp_path / "ikectx.toml"), str(tmp_path / "control"))


def test_sockets_and_processes(real: World, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.77", 0))
        port = sock.getsockname()[1]
        owner = real.udp_owner("127.0.0.77", port)
        assert owner is not None and owner.pid in (0, os.getpid())
        assert real.udp_owner("127.0.0.78", port) is None
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind(("::1", 0))
        assert real.udp_owner("::1", sock.getsockname()[1]) is not None
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "control"))
        listening.listen()
        assert real.agent_pid() == os.getpid()
    assert real.agent_pid() is None
    assert real.is_local("127.0.0.5") and not real.is_local("192.0.2.1")
    started = real.started(os.getpid())
    assert started is not None and started > 0 and real.started(1 << 30) is None
    assert isinstance(real.capabilities(None), int)
    assert real.tool("sh") and real.tool("no-such-tool") is None
    assert real.probe("false")[0] in (False, None)


def test_charon_and_agent_away(real: World, tmp_path: Path) -> None:
    real.config = parse(f'charon.vici = "unix://{tmp_path}/none"\n' + TOML, tmp_path / "ikectx.toml")
    for _ in range(2):
        with pytest.raises(CharonError):
            real.charon("version")
    with pytest.raises(LinkError):
        real.agent("status")


def test_settings_files(real: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "strongswan.conf").write_text(
        "# comment { \n"
        "charon {\n  load_modular = yes # to the end\n  plugins {\n    include parts/*.conf\n  }\n}\n"
        'charon-systemd : charon {\n  "port" = "4 # 5"\n}\nempty =\ninclude none/*.conf\n'
    )
    (tmp_path / "parts" / "ha.conf").write_text("ha\n{\n  monitor = no\n  local=127.0.0.1}\nvici { }\n} }\n")
    settings = load(str(tmp_path / "strongswan.conf"))
    assert {key: setting.value for key, setting in settings.items()} == {
        "charon.load_modular": "yes",
        "charon.plugins.ha.monitor": "no",
        "charon.plugins.ha.local": "127.0.0.1",
        "charon-systemd.port": "4 # 5",
        "empty": "",
    }
    assert settings["charon.plugins.ha.monitor"].file == str(tmp_path / "parts" / "ha.conf")
    (tmp_path / "strongswan.conf").write_text(f"include {tmp_path}/strongswan.conf\na = 1\n")
    assert load(str(tmp_path / "strongswan.conf"))["a"].value == "1"
    monkeypatch.setenv("STRONGSWAN_CONF", str(tmp_path / "strongswan.conf"))
    found = real.settings("strongswan.conf")
    assert found is not None
    monkeypatch.setenv("SWANCTL_DIR", str(tmp_path / "none"))
    assert real.settings("swanctl.conf") is None or real.charon_pid() is not None


@contextlib.contextmanager
def tls_server(folder: Path, *, refuse: bool) -> Iterator[HostPort]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "own.pem", folder / "own.key")
    context.load_verify_locations(folder / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                raw, _ = listening.accept()
                with context.wrap_socket(raw, server_side=True) as sock:
                    if not refuse:
                        sock.recv(1)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield HostPort("127.0.0.1", listening.getsockname()[1])
        thread.join(5)


@pytest.mark.parametrize("refuse", [False, True])
def test_connecting_to_a_peer(real: World, tmp_path: Path, refuse: bool) -> None:
    with tls_server(tmp_path, refuse=refuse) as place:
        answer = real.connect(PeerConfig("psg", place, "psg"))
    assert (answer.failed, answer.names, answer.refused) == ("", {"psg"}, refuse)
    assert answer.not_before is not None and answer.not_before > 1e9
    assert real.connect(PeerConfig("psg", place, "psg")).failed == "Connection refused"


def test_connecting_to_a_stranger(real: World, tmp_path: Path) -> None:
    (tmp_path / "stranger").mkdir()
    Pki().write(tmp_path / "stranger")
    with tls_server(tmp_path / "stranger", refuse=False) as place:
        assert "certificate verify failed" in real.connect(PeerConfig("psg", place, "psg")).failed
    (tmp_path / "own.key").write_text("no PEM")
    assert "own.pem" in real.connect(PeerConfig("psg", place, "psg")).failed


# -- transport = "ipsec"


IPSEC = TOML.replace('certificate = "own.pem"\nkey = "own.key"\nca = "ca.pem"', 'transport = "ipsec"')


@pytest.fixture
def protected(tmp_path: Path) -> Protected:
    path = tmp_path / "ikectx.toml"
    path.write_text(IPSEC)
    (tmp_path / "state").mkdir(mode=0o700)
    return Protected(parse(IPSEC, path))


def test_protected_by_ipsec(protected: Protected) -> None:
    findings = doctor.examine(protected)
    assert {finding.level for finding in findings} == {"ok"}
    assert protected.protected[:2] == [
        "tcp between 192.0.2.1:49152 and 198.51.100.1:5091",
        "tcp between 192.0.2.1:5091 and 198.51.100.1:49152",
    ]
    found = {finding.check: finding.found for finding in findings}
    assert found["protection"] == "nsg (198.51.100.1): ESP protects tcp to and from 198.51.100.1"
    assert found["certificates"].startswith("not needed")
    assert found["peers"].endswith("is reached")


def unprotected(world: Protected, level: str, found: str) -> Finding:
    """What is said of the protection; the peer is not spoken to then."""
    first, second = bad(world)
    assert (first.check, first.level) == ("protection", level)
    assert found in first.found
    assert (second.check, second.level) == ("peers", "note")
    assert "not tried, because of protection" in second.found
    return first


def test_not_protected_by_ipsec(protected: Protected) -> None:
    protected.error = LinkError("no IPsec policy protects it", hint="in swanctl.conf: a child")
    assert unprotected(protected, "fail", "no IPsec policy").fix == "in swanctl.conf: a child"
    protected.error = KernelError("refused", hint="as root")
    unprotected(protected, "note", "not checked: refused")
    protected.error = None
    protected.plain = PeerAnswer(refused=True)
    assert "exactly one [[peer]]" in only(protected, "peers", "fail", "does not accept us").fix
    protected.plain = PeerAnswer(failed="Connection refused")
    only(protected, "peers", "fail", "Connection refused")


def test_peers_known_by_address(protected: Protected, tmp_path: Path) -> None:
    text = IPSEC + '[[peer]]\nname = "third"\naddress = "198.51.100.1:5092"\n'
    world = Protected(parse(text, tmp_path / "ikectx.toml"))
    only(world, "protection", "fail", "198.51.100.1 is the address of nsg and of third")
    text = IPSEC.replace("198.51.100.1", "nowhere.invalid")
    unprotected(Protected(parse(text, tmp_path / "ikectx.toml")), "fail", "nowhere.invalid")


def test_the_real_world_s_plain_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "check_protection", lambda self, flow: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        listen = IPSEC.replace("192.0.2.1:5091", "0.0.0.0:5091").replace("198.51.100.1", f"127.0.0.1:{port}")
        world = World(parse(listen, tmp_path / "ikectx.toml"), "/none")
        (peer,) = world.config.peers
        assert str(world.flows("127.0.0.1", port)[0].local.address) == "127.0.0.1"
        assert world.connect_plainly(peer) == PeerAnswer()
    assert "refused" in world.connect_plainly(peer).failed
    world = World(parse(listen.replace("0.0.0.0", "192.0.2.1"), tmp_path / "ikectx.toml"), "/none")
    assert str(world.flows("127.0.0.1", port)[0].local.address) == "192.0.2.1"
    monkeypatch.undo()
    with pytest.raises(LinkError, match=r"no way from 192\.0\.2\.1"):
        world.connect_plainly(peer)
    world = World(parse(listen, tmp_path / "ikectx.toml"), "/none")
    with pytest.raises(LinkError, match="stays on this machine"):
        world.connect_plainly(peer)
