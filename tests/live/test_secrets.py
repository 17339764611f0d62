"""Nothing that must stay secret is written, shown or passed on where others can read it."""

from __future__ import annotations

import base64
import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ikectx_cli.lab.config import PSK
from ikectx_cli.lab.net import GATEWAYS

from .world import LOGGED, World, until

pytestmark = pytest.mark.live

SHARED = ("shared Diffie Hellman secret", "DH secret", "key exchange secret")
"""What charon calls the shared secret of an IKE_SA and of a child; strongSwan 6 has one name for both."""

SECRET = {*LOGGED.values(), *SHARED}
"""What charon calls key material, of which nothing may be found anywhere."""


class Watch:
    """Looks at the command lines and environments of all processes, as `ps` would, while it is open."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._stop = threading.Event()

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            for name in os.listdir("/proc"):
                for part in ("cmdline", "environ") if name.isdigit() else ():
                    with contextlib.suppress(OSError):
                        self.seen.add(Path("/proc", name, part).read_bytes())

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def forms(key: bytes) -> Iterator[bytes]:
    """A key as it is, and as somebody may print it."""
    text = key.hex()
    yield key
    yield from (
        text.encode(),
        text.upper().encode(),
        " ".join(text[n : n + 2] for n in range(0, len(text), 2)).encode(),
    )
    yield base64.b64encode(key).rstrip(b"=")
    yield repr(key)[2:-1].encode()


def written(world: World) -> dict[str, bytes]:
    """All files of the lab but what charon itself reads and writes (its log shows keys, in these tests)."""
    own = {"charon.log", "swanctl.conf", "own.pem", "state.key"}
    found = {}
    for path in world.lab.work.rglob("*"):
        if path.is_file() and path.name not in own and "pki" not in path.parts:
            found[str(path.relative_to(world.lab.work))] = path.read_bytes()
    return found


def test_no_secret_is_written_or_shown(world: World) -> None:
    # IKE_SA_INIT, IKE_AUTH, IKE and child rekeys with PFS, psg -> nsg with the agents' most talkative log, a
    # transfer that fails, and one that is cut off by a crash: then everything is searched for every key that
    # any charon logged, and for the PSK
    said: dict[str, bytes] = {}
    for host in GATEWAYS:
        world.lab.stop(host, "agent")
        config = str(world.lab.work / host / "ikectx.toml")
        world.lab.spawn(host, "agent", ["env", "IKECTX_LOG=DEBUG", "ikectx", "serve", "--config", config])
        world.lab.wait_agent(host)
    world.broken = True
    with Watch() as watch:
        world.up(esp="aes256-sha256-x25519", ike="aes256-sha256-x25519")
        world.rekey_ike("mn", "psg")
        world.rekey_child("psg", "psg")
        for words in (
            ("list",),
            ("show", "mn"),
            ("status",),
            ("doctor",),
            ("transfer", "--to", "nsg", "--dry-run"),
        ):
            for option in ((), ("--json",)):
                done = world.ikectx("psg", *words, *option)
                said[" ".join((*words, *option))] = (done.out + done.err).encode()
        asked_for = world.ikectx("psg", "show", "mn", "--secrets", "--json").out.encode()
        report = world.transfer("psg", "nsg")
        assert report.code == 0, report
        said["transfer"] = (report.out + report.err).encode()
        world.settle("nsg")
        world.block("psg", "mn")
        world.lab.stop("psg", "agent", kill=True)
        failed = world.transfer("nsg", "psg")
        assert failed.code == 5
        said["transfer failed"] = (failed.out + failed.err).encode()
        # the journal with an open transfer holds the context, and the files are as the crash left them
        world.restart("psg")
        work = world.begin("nsg", "transfer", "--to", "psg")
        until(lambda: world.status("nsg")["transfers"], "a transfer is open")
        done = world.ikectx("psg", "history", "--json")
        said["history"] = (done.out + done.err).encode()
        world.lab.stop("nsg", "agent", kill=True)
        ended = world.end(work)
        said["transfer cut off"] = (ended.out + ended.err).encode()
    keys = {
        bytes.fromhex(octets)
        for host in ("mn", *GATEWAYS)
        for name, all_octets in world.logged(host).items()
        if name in SECRET
        for octets in all_octets
    }
    assert len(keys) > 30
    places = {**written(world), **said, "ps": b"\0".join(watch.seen)}
    assert any("state.db" in name for name in places)
    assert any(b"DEBUG" in octets for name, octets in places.items() if "agent.out" in name)
    # the search finds what is there: ten keys or more where they were asked for
    assert sum(any(form in asked_for for form in forms(key)) for key in keys) >= 10
    for key in {*keys, PSK.encode()}:
        for form in forms(key):
            where = [name for name, octets in places.items() if form in octets]
            assert not where, f"a secret of {len(key)} octets is in {where}"


def test_files_are_for_root_only(world: World) -> None:
    # no exchange
    world.up()
    for host in GATEWAYS:
        folder = world.lab.work / host
        state = folder / "state"
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        names = {path.name for path in state.iterdir()}
        assert {"state.db", "state.key"} <= names
        for path in state.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert stat.S_IMODE((folder / "ikectx.vici").stat().st_mode) & 0o007 == 0


def test_show_names_secrets_and_shows_them_only_when_asked(world: World) -> None:
    # IKE_SA_INIT, IKE_AUTH, CREATE_CHILD_SA (IKE rekey by the MN, child rekey by psg with PFS): what `show
    # --secrets` shows is what the MN's charon derived
    world.up(esp="aes128gcm16-x25519")
    world.rekey_ike("mn", "psg")
    world.rekey_child("psg", "psg")
    logged = world.logged("mn")
    plain = world.ikectx("psg", "show", "mn", "--json")
    assert plain.code == 0
    assert "<secret, 32 octets>" in plain.out
    for name in LOGGED.values():
        assert not [octets for octets in logged.get(name, ()) if octets in plain.out]
    shown = world.ikectx("psg", "show", "mn", "--secrets", "--json").json
    (old, new) = shown["generations"][0], shown["generations"][-1]
    keys = {**new["keys"]}
    assert len(keys) == 8
    for name, key in keys.items():
        if key:
            assert key == logged[LOGGED[name]][-1], name
    assert len(shown["generations"]) == 1 or old["keys"]["sk_d"] in logged[LOGGED["sk_d"]]
    (child,) = shown["children"]
    secrets = [secret for name in SHARED for secret in logged.get(name, ())]
    assert child["secret"] in secrets
    for name, key in child["keys"].items():
        if key:
            assert key == logged[LOGGED[name]][-1], name
    assert new["secret"] in secrets
    # and for people
    text = world.ikectx("psg", "show", "mn").out
    assert "<secret" in text
    assert child["keys"]["encr_i"] not in text
    assert child["keys"]["encr_i"] in world.ikectx("psg", "show", "mn", "--secrets").out
