"""The IKE daemons of hosts: which charon, and others as the mobile node `mn`: what they read, how they are
started and told.

Another daemon than charon runs from packages that are unpacked beside the installed ones (`tests/setup.sh`),
because Debian's libreswan and strongSwan conflict. It has a mount namespace with /etc of its own, the folder
`etc` of its host, and an empty /run, so that nothing of this machine's configuration counts.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ikectx.errors import CharonError

from .boot import virtual_time
from .config import PSK, Tunnel
from .net import GATEWAYS, INNER, INNER_NET, MOBILES, OUTER, SHARED, run
from .uml import cache

CHARON = "/usr/sbin/charon-systemd"
"""The installed charon; IKECTX_LAB_CHARON names another, IKECTX_LAB_CHARON_NSG one for that host only."""

UNPACKED = "IKECTX_LAB_UNPACKED"
"""The environment variable that names the folder of the unpacked packages."""

USER = "_iked"
"""Whom OpenIKED runs as; its package adds it to a machine."""


class Daemon(Protocol):
    """One kind. A word for the daemon is an argument vector; `folder` is that of its host."""

    program: str
    """The daemon itself, under the folder of the unpacked packages."""

    def files(self, tunnel: Tunnel) -> Mapping[str, str]:
        """What it reads, by name under /etc."""

    def start(self, folder: Path) -> str:
        """A line of a shell that becomes the daemon."""

    def socket(self, folder: Path) -> Path:
        """It is there as soon as the daemon can be told something."""

    def up(self, folder: Path, gateway: str) -> Sequence[Sequence[str]]:
        """Set up the tunnel to that gateway, with its CHILD_SA."""

    def down(self, folder: Path, gateway: str) -> Sequence[Sequence[str]]:
        """Delete the IKE_SA."""

    def rekey(self, folder: Path, gateway: str, what: str) -> Sequence[Sequence[str]]:
        """Rekey the IKE_SA ("ike") or its CHILD_SA ("child")."""


def lacks(kind: str) -> str:
    """Why this kernel cannot run a daemon of that kind; empty: it can."""
    if kind == "openiked" and not Path("/proc/net/pfkey").exists():
        return "OpenIKED needs PF_KEY in the kernel"
    return ""


def unpacked() -> Path:
    """The folder of the unpacked packages."""
    return Path(os.environ.get(UNPACKED) or cache() / "unpacked")


def _tool(name: str, *words: str) -> list[str]:
    """A program of the unpacked packages, with libraries from there."""
    return ["env", f"LD_LIBRARY_PATH={unpacked()}/usr/lib/x86_64-linux-gnu", f"{unpacked()}/{name}", *words]


class Libreswan:
    """pluto. `Tunnel.connection` may have `mobike`."""

    program = "usr/libexec/ipsec/pluto"

    def files(self, tunnel: Tunnel) -> Mapping[str, str]:
        """A conn for each gateway, named after it."""
        conns = []
        for gateway in GATEWAYS:
            settings = {
                "ikev2": "insist",
                "authby": "secret",
                "left": OUTER["mn"][tunnel.family],
                "leftid": "@mn.example",
                "right": (SHARED if tunnel.shared else OUTER[gateway])[tunnel.family],
                "rightid": f"@{gateway}.example",
                "rightsubnet": INNER_NET[tunnel.inner],
                "leftsubnet": f"{INNER['mn'][tunnel.inner]}/{32 if tunnel.inner == 4 else 128}",
                "mobike": "yes" if tunnel.connection.get("mobike", True) else "no",
                "encapsulation": "yes" if tunnel.encap else "auto",
                "ike": "aes_gcm128-sha2_256-dh31",
                "esp": "aes_gcm128",
                "pfs": "no",
                "leftupdown": '""',
                "auto": "ignore",
            }
            lines = "".join(f"\t{key}={value}\n" for key, value in settings.items())
            conns.append(f"conn {gateway}\n{lines}")
        secrets = "".join(f'@mn.example @{gateway}.example : PSK "{PSK}"\n' for gateway in GATEWAYS)
        return {"ipsec.conf": "config setup\n" + "\n".join(conns), "ipsec.secrets": secrets}

    def start(self, folder: Path) -> str:
        """With an empty database of certificates, which it needs."""
        words = [
            "--nofork",
            "--use-xfrm",
            "--rundir",
            str(folder),
            "--nssdir",
            f"{folder}/nss",
            "--stderrlog",
        ]
        empty = _tool("usr/bin/certutil", "-N", "-d", f"sql:{folder}/nss", "--empty-password")
        return (
            f"mkdir -p {folder}/nss && {{ test -e {folder}/nss/cert9.db || {shlex.join(empty)}; }}"
            f" && exec {shlex.join(_tool(self.program, *words))}"
        )

    def socket(self, folder: Path) -> Path:
        return folder / "pluto.ctl"

    def _whack(self, folder: Path, *words: str) -> list[str]:
        return _tool("usr/libexec/ipsec/whack", "--ctlsocket", str(self.socket(folder)), *words)

    def up(self, folder: Path, gateway: str) -> Sequence[Sequence[str]]:
        conf, control = f"{folder}/etc/ipsec.conf", str(self.socket(folder))
        add = _tool("usr/libexec/ipsec/addconn", "--config", conf, "--ctlsocket", control, gateway)
        return [self._whack(folder, "--listen"), add, self._whack(folder, "--name", gateway, "--initiate")]

    def down(self, folder: Path, gateway: str) -> Sequence[Sequence[str]]:
        return [self._whack(folder, "--name", gateway, "--terminate")]

    def rekey(self, folder: Path, gateway: str, what: str) -> Sequence[Sequence[str]]:
        names = ["--rekey-ike"] if what == "ike" else ["--rekey-child", "--rekey-ipsec"]  # of 5.x, of 4.x
        tries = [shlex.join(self._whack(folder, "--name", gateway, one, "--asynchronous")) for one in names]
        return [["sh", "-c", " || ".join(tries)]]


class OpenIked:
    """iked. As the initiator it speaks no MOBIKE. On Linux it uses PF_KEY, which has neither GCM nor SHA-2:
    `Tunnel.esp` must be aes128-sha1."""

    program = "usr/sbin/iked"

    def files(self, tunnel: Tunnel) -> Mapping[str, str]:
        """A file for each gateway, to be loaded when its tunnel is wanted: iked sets up what it loads."""
        files = {
            "iked.conf": 'ikev2 "nothing" passive esp from 192.0.2.1 to 192.0.2.2 peer 192.0.2.3\n',
            "passwd": _entry("passwd", f"{USER}:x:990:990::/run/empty:/bin/false"),
        }
        files["group"] = _entry("group", f"{USER}:x:990:")
        for gateway in GATEWAYS:
            far = (SHARED if tunnel.shared else OUTER[gateway])[tunnel.family]
            words = [
                f'ikev2 "{gateway}" active esp',
                f"from {INNER['mn'][tunnel.inner]} to {INNER_NET[tunnel.inner]}",
                f"local {OUTER['mn'][tunnel.family]} peer {far}",
                "ikesa enc aes-128-gcm prf hmac-sha2-256 group curve25519",
                "childsa enc aes-128 auth hmac-sha1 noesn",
                f'srcid mn.example dstid {gateway}.example psk "{PSK}"',
            ]
            files[f"iked-{gateway}.conf"] = " ".join(words) + "\n"
        return files

    def start(self, folder: Path) -> str:
        keys = "ca certs crls private pubkeys/fqdn pubkeys/ipv4 pubkeys/ipv6 pubkeys/ufqdn"
        made = f"for name in {keys}; do mkdir -p /etc/iked/$name; done; mkdir -p /run/empty"
        return f"{made}; exec {shlex.join(_tool(self.program, '-d', '-v', '-s', str(self.socket(folder))))}"

    def socket(self, folder: Path) -> Path:
        return folder / "iked.sock"

    def _ikectl(self, folder: Path, *words: str) -> list[str]:
        return _tool("usr/sbin/ikectl", "-s", str(self.socket(folder)), *words)

    def up(self, folder: Path, gateway: str) -> Sequence[Sequence[str]]:
        # the daemon itself reads the file, in its own /etc
        return [self._ikectl(folder, "load", f"/etc/iked-{gateway}.conf")]

    def down(self, folder: Path, gateway: str) -> Sequence[Sequence[str]]:
        return [
            self._ikectl(folder, "load", "/etc/iked.conf"),
            self._ikectl(folder, "reset", "id", f"FQDN/{gateway}.example"),
        ]

    def rekey(self, folder: Path, gateway: str, what: str) -> Sequence[Sequence[str]]:
        raise CharonError("OpenIKED rekeys by itself only")


def _entry(name: str, line: str) -> str:
    """A file of users or groups with root and one more."""
    return f"{'root:x:0:0::/root:/bin/sh' if name == 'passwd' else 'root:x:0:'}\n{line}\n"


KINDS: Mapping[str, Daemon] = {"libreswan": Libreswan(), "openiked": OpenIked()}
"""By the name of its Debian package."""


def write(kind: str, folder: Path, tunnel: Tunnel) -> None:
    """Writes what the daemon reads, for nobody else to read: iked insists on that."""
    etc = folder / "etc"
    (etc / "iked" / "private").mkdir(parents=True, exist_ok=True)
    key = etc / "iked" / "private" / "local.key"
    key.touch(mode=0o600)
    key.write_bytes((folder.parent / "pki" / "mn.key").read_bytes())  # iked wants one, whatever it uses
    (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    for name, text in KINDS[kind].files(tunnel).items():
        path = etc / name
        path.touch(mode=0o600)
        path.write_text(text)
        path.chmod(0o644 if name in ("passwd", "group") else 0o600)


def words(kind: str, folder: Path) -> list[str]:
    """What starts the daemon. Raises CharonError if its package is not unpacked."""
    daemon = KINDS[kind]
    if not (unpacked() / daemon.program).exists():
        raise CharonError(f"{unpacked() / daemon.program} is not there", hint="tests/setup.sh unpacks it")
    mounts = "mount -t tmpfs -o mode=755 lab /run"
    mounts += f" && mount --bind {folder}/etc /etc && mount --bind {unpacked()}/usr/libexec /usr/libexec"
    return ["unshare", "-m", "sh", "-c", f"{mounts} && {daemon.start(folder)}"]


def listed(kind: str, states: str) -> list[dict[str, Any]]:
    """The tunnel as `CharonVici.list_sas` would list it, from what `ip xfrm state` shows.

    Those daemons tell the SPIs of their IKE_SA to nobody, so that only the kernel's SAs are known of them.
    """
    far = {address for gateway in GATEWAYS for address in OUTER[gateway].values()} | set(SHARED.values())
    found = re.findall(r"(?m)^src (\S+) dst (\S+)\n\s+proto esp spi 0x(\S+)", states)
    found = [one for one in found if one[2] != "00000000"]
    inbound = [spi for source, _, spi in found if source in far]
    outbound = [spi for _, to, spi in found if to in far]
    if not inbound or not outbound:
        return []
    children = {
        f"net-{spi}": {"name": "net", "state": "INSTALLED", "spi-in": spi, "spi-out": other}
        for spi, other in zip(inbound, outbound, strict=False)
    }
    return [{"name": kind, "state": "ESTABLISHED", "child-sas": children}]


def as_its_own_machine(host: str) -> list[str]:
    """A mobile node stands for a machine of its own: on CPUs shared with the gateways its daemons go before
    them, or it would be their work that stretches the change of its policies under traffic."""
    return ["chrt", "-r", "1"] if host in MOBILES and realtime_works() else []


def charon_of(host: str) -> str:
    """The charon that host runs: $IKECTX_LAB_CHARON_HOST (MN, PSG, ...), $IKECTX_LAB_CHARON, or `CHARON`."""
    own = os.environ.get(f"IKECTX_LAB_CHARON_{host.upper()}")
    return own or os.environ.get("IKECTX_LAB_CHARON") or CHARON


@functools.cache
def realtime_works() -> bool:
    """Whether real-time priorities are wanted, and this machine lets root use them; a container may not.

    In virtual time nobody waits for a CPU.
    """
    return (
        not virtual_time()
        and shutil.which("chrt") is not None
        and run(["chrt", "-r", "1", "true"], check=False).returncode == 0
    )
