"""What `doctor` sees of the real world, where probing it is harmless."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ikectx.errors import CharonError, LinkError
from ikectx.peer import HostPort
from ikectx_cli.config import PeerSection, parse
from ikectx_cli.doctor.world import PeerAnswer, World
from ikectx_cli.settings import load
from tests.healthy_world import IPSEC, TOML, Pki
from tests.netns import namespaces
from vici_bridge.kernel.message_ids import MessageIds
from vici_bridge.kernel.spd_watch import SpdGuard


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki()


@pytest.fixture
def real(tmp_path: Path, pki: Pki) -> World:
    pki.write(tmp_path)
    toml = TOML.replace('"192.0.2.1:5091"', '"127.0.0.1:5091"')
    return World(parse(toml, tmp_path / "ikectx.toml"), str(tmp_path / "control"))


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
        assert real.agent_user() == os.geteuid()
    assert real.agent_pid() is None and real.agent_user() is None
    assert real.is_local("127.0.0.5") and not real.is_local("192.0.2.1")
    started = real.started(os.getpid())
    assert started is not None and started > 0 and real.started(1 << 30) is None
    assert isinstance(real.capabilities(None), int)
    assert real.tool("sh") and real.tool("no-such-tool") is None
    assert real.probe("false")[0] in (False, None)


def test_what_the_kernel_notes_of_message_ids(real: World) -> None:
    with namespaces(1) as (space,), space.entered():
        assert real.notes_right() is None
        with contextlib.closing(MessageIds()) as noted:
            noted.prepare()
        assert real.notes_right() is True
        space.run("nft delete rule inet ikectx_ids output handle 4")
        assert real.notes_right() is False


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
        answer = real.connect(PeerSection("psg", place, "psg"))
    assert (answer.failed, answer.names, answer.refused) == ("", {"psg"}, refuse)
    assert answer.not_before is not None and answer.not_before > 1e9
    assert real.connect(PeerSection("psg", place, "psg")).failed == "Connection refused"


def test_connecting_to_a_stranger(real: World, tmp_path: Path) -> None:
    (tmp_path / "stranger").mkdir()
    Pki().write(tmp_path / "stranger")
    with tls_server(tmp_path / "stranger", refuse=False) as place:
        assert "certificate verify failed" in real.connect(PeerSection("psg", place, "psg")).failed
    (tmp_path / "own.key").write_text("no PEM")
    assert "own.pem" in real.connect(PeerSection("psg", place, "psg")).failed


def test_the_real_world_s_plain_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpdGuard, "protection", lambda self, flow: None)
    monkeypatch.setattr(SpdGuard, "_bind", lambda self, held, found: None)
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
