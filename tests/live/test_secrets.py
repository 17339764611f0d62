"""Nothing that must stay secret is written, shown or passed on where others can read it."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import sqlite3
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from ikectx.driver import ERASE_AFTER
from ikectx_cli.lab.config import PSK
from ikectx_cli.lab.net import GATEWAYS

from .test_mobile import afterwards, asks, mobile, settled, up
from .world import LOGGED, World, until

__all__ = ["afterwards", "mobile"]

pytestmark = pytest.mark.live

SHARED = ("shared Diffie Hellman secret", "DH secret", "key exchange secret")
"""What charon calls the shared secret of an IKE_SA and of a child; strongSwan 6 has one name for both."""

SECRET = {*LOGGED.values(), *SHARED}
"""What charon calls key material, of which nothing may be found anywhere."""


class Tap:
    """Stands before an agent's control socket while it is open, and notes what passes there, both ways."""

    def __init__(self, path: Path) -> None:
        self.seen = bytearray()
        self._path, self._behind = path, path.with_suffix(".behind")
        self._listener = socket.socket(socket.AF_UNIX)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Tap:
        self._path.rename(self._behind)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # a thread that still waits there would take the connections of the next socket with that descriptor
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        self._behind.rename(self._path)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                agent = socket.socket(socket.AF_UNIX)
                agent.connect(str(self._behind))
                for one, other in ((client, agent), (agent, client)):
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while octets := one.recv(65536):
                self.seen += octets
                other.sendall(octets)
            other.shutdown(socket.SHUT_WR)


LOOKS = 20


class Watch:
    """Looks at the command lines and environments of all processes, as `ps` would, while it is open."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._stop = threading.Event()

    def _look(self) -> None:
        """Some times at each process, which may become another program at first, and not for ever."""
        looked: dict[str, int] = {}
        while not self._stop.wait(0.01):
            looked = {name: looked.get(name, 0) + 1 for name in os.listdir("/proc") if name.isdigit()}
            for name in (name for name, times in looked.items() if times <= LOOKS):
                for part in ("cmdline", "environ"):
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
    """A key as it is and as somebody may print it, from its beginning and from its end."""
    yield from _forms(key)
    yield from _forms(key[::-1])


def _forms(key: bytes) -> Iterator[bytes]:
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
            with contextlib.suppress(FileNotFoundError):  # an agent has removed it meanwhile
                found[str(path.relative_to(world.lab.work))] = path.read_bytes()
    return found


def talkative(world: World, host: str) -> None:
    """Its agent begins anew, with a log of everything and a trace."""
    world.lab.stop(host, "agent")
    folder = world.lab.work / host
    words = (
        ["mobile", "--config", f"{folder}/mobile.toml", "serve"]
        if host == "mn"
        else ["serve", "--config", f"{folder}/ikectx.toml"]
    )
    said = ("IKECTX_LOG=DEBUG", f"IKECTX_TRACE={folder}/trace.jsonl")
    world.lab.spawn(host, "agent", ["env", *said, "ikectx", *words])
    world.lab.wait_agent(host)


def secrets_of(world: World) -> set[bytes]:
    """Every key that any charon logged, the PSK, and the keys of the agents' stores."""
    logged = {
        bytes.fromhex(octets)
        for host in ("mn", *GATEWAYS)
        for name, all_octets in world.logged(host).items()
        if name in SECRET
        for octets in all_octets
    }
    stores = {path.read_bytes() for path in world.lab.work.rglob("state.key")}
    assert len(logged) > 10 and len(stores) >= 2
    return {*logged, *stores, PSK.encode()}


def found_nowhere(secrets: Iterable[bytes], places: Mapping[str, bytes]) -> None:
    assert any("state.db" in name for name in places)
    assert any(b"DEBUG" in octets for name, octets in places.items() if "agent.out" in name)
    assert any(octets for name, octets in places.items() if name.endswith("trace.jsonl"))
    for key in secrets:
        for form in forms(key):
            where = [name for name, octets in places.items() if form in octets]
            assert not where, f"a secret of {len(key)} octets is in {where}"


def sealed_record(world: World, host: str) -> list[bytes]:
    """What the agent's store has of SAs in the record, as it is on the disk."""
    with contextlib.closing(sqlite3.connect(world.lab.work / host / "state" / "state.db")) as db:
        return [value for (value,) in db.execute("SELECT value FROM items WHERE kind = 'record'")]


def test_no_secret_is_written_or_shown(world: World) -> None:
    # IKE_SA_INIT, IKE_AUTH, IKE and child rekeys with PFS, psg -> nsg with the agents' most talkative log, a
    # transfer that fails, and one that is cut off by a crash: then everything is searched for every key that
    # any charon logged, for the PSK and the stores' keys
    said: dict[str, bytes] = {}
    proposals = {"esp": "aes256-sha256-x25519", "ike": "aes256-sha256-x25519"}
    world.reload(world.tunnel_with(**proposals))  # no agent starts anew behind its tap
    for host in GATEWAYS:
        talkative(world, host)
    world.broken = True
    taps = [Tap(world.lab.work / host / "ikectx.vici") for host in GATEWAYS]
    with Watch() as watch:
        with taps[0], taps[1]:
            world.up(**proposals)
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
            until(lambda: sealed_record(world, "psg"), "the SA is in psg's store")
            sealed = sealed_record(world, "psg")
            report = world.transfer("psg", "nsg")
            assert report.code == 0, report
            said["transfer"] = (report.out + report.err).encode()
            world.settle("nsg")
        # asked for, and not noted
        asked_for = world.ikectx("nsg", "show", "mn", "--secrets", "--json").out.encode()
        files = list((world.lab.work / "psg" / "state").iterdir())
        until(
            lambda: not any(one in path.read_bytes() for path in files if path.exists() for one in sealed),
            "what psg had of the SA is in no file any more",
            within=4 * ERASE_AFTER,
        )
        world.block("psg", "mn")
        world.lab.stop("psg", "agent", kill=True)
        failed = world.transfer("nsg", "psg")
        assert failed.code == 5
        said["transfer failed"] = (failed.out + failed.err).encode()
        # the journal with an open transfer holds the context, and the files are as the crash left them
        world.restart("psg")
        work = world.begin("nsg", "transfer", "--to", "psg")
        until(lambda: world.status("nsg")["transfers"], "a transfer is open")
        for words in (("history", "--json"), ("history", "--audit", "--json"), ("resolve", "--json")):
            done = world.ikectx("psg", *words)
            said[" ".join(words)] = (done.out + done.err).encode()
        world.lab.stop("nsg", "agent", kill=True)
        ended = world.end(work)
        said["transfer cut off"] = (ended.out + ended.err).encode()
    keys = secrets_of(world)
    assert len(keys) > 30
    assert b"cxtp_octets" in taps[0].seen
    # the search finds what is there: ten keys or more where they were asked for
    assert sum(any(form in asked_for for form in forms(key)) for key in keys) >= 10
    socket_said = {f"control socket {n}": bytes(tap.seen) for n, tap in enumerate(taps)}
    found_nowhere(keys, {**written(world), **said, **socket_said, "ps": b"\0".join(watch.seen)})


def test_no_secret_of_a_handover_is_written_or_shown(mobile: World) -> None:
    # MN -> psg CTAR, psg -> nsg PCTD, CTDR, psg -> MN CTAA; MN -> nsg CTAR, nsg -> psg CT-Req,
    # psg -> nsg CTD, nsg -> MN CTAA: the mobile node's agent has a log, a store and a control socket, too
    said: dict[str, bytes] = {}
    mobile.reload(mobile.tunnel_with(mobile=True))
    for host in ("mn", *GATEWAYS):
        talkative(mobile, host)
    mobile.broken = True
    taps = [Tap(mobile.lab.work / host / "ikectx.vici") for host in ("mn", *GATEWAYS)]
    with Watch() as watch, taps[0], taps[1], taps[2]:
        up(mobile)
        for words in (("status",), ("handover", "--to", "nsg", "--predictive", "--now", "--json")):
            done = asks(mobile, *words)
            assert done.code == 0, done
            said[" ".join(words)] = (done.out + done.err).encode()
        settled(mobile, "nsg")
    socket_said = {f"control socket {n}": bytes(tap.seen) for n, tap in enumerate(taps)}
    assert b"handover" in taps[0].seen
    found_nowhere(
        secrets_of(mobile), {**written(mobile), **said, **socket_said, "ps": b"\0".join(watch.seen)}
    )


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
