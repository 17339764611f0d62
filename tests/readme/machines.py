"""Machines with a systemd of their own (systemd-nspawn), and the network between them. Runs in the guest.

mn 203.0.113.7 ---+                      +--- psg 192.0.2.1     10.0.0.2 ---+
                  +--- the guest routes -+                                  +--- srv 10.0.0.10
                                         +--- nsg 198.51.100.1  10.0.0.3 ---+
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("psg", "nsg", "mn")
OUTER = {"psg": "192.0.2.1", "nsg": "198.51.100.1", "mn": "203.0.113.7"}
INNER = {"psg": "10.0.0.2", "nsg": "10.0.0.3"}
SERVER = "10.0.0.10"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class WrongError(Exception):
    """Something of README does not hold; the text says what."""


@dataclass
class Log:
    """What was run and what it said; also on the console, in short."""

    path: Path

    def write(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text.rstrip("\n") + "\n")


def shell(script: str, *, log: Log, check: bool = True, words: Sequence[str] = ()) -> str:
    """Run shell lines, by `words` if elsewhere; returns what they print. Errors: WrongError."""
    began = time.monotonic()
    done = subprocess.run(
        [*words, "bash", "-euo", "pipefail", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    where = words[-1] if words else "guest"
    log.write(
        f"[{where}] $ {script.strip()}\n{done.stdout}--- {done.returncode}, {time.monotonic() - began:.1f} s"
    )
    if check and done.returncode:
        raise WrongError(f"{where}: {script.strip()}\nended with {done.returncode}:\n{done.stdout}")
    return done.stdout


@dataclass
class Machine:
    """One machine, whose files are in /machines/NAME."""

    name: str
    log: Log
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    leader: str = ""

    @property
    def files(self) -> Path:
        return Path("/machines", self.name)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """A file of the machine, with the folders that it needs."""
        place = self.files / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(mode)

    def read(self, path: str) -> str:
        return (self.files / path.lstrip("/")).read_text()

    def append(self, path: str, text: str) -> None:
        self.write(path, self.read(path) + "\n" + text)

    def boot(self) -> None:
        """Start it and wait until its systemd has started all units. Errors: WrongError."""
        wires = [f"--network-interface={wire}" for wire in self.wires()]
        words = [
            "systemd-nspawn",
            "--quiet",
            "--boot",
            "--console=pipe",
            "--capability=CAP_IPC_LOCK",
            f"--machine={self.name}",
            *wires,
        ]
        with Path(f"/shared/journals/{self.name}.console").open("ab") as console:
            self.process = subprocess.Popen(
                [*words, "--bind-ro=/shared/origin", f"--directory={self.files}"],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        self.wait()

    def reboot(self) -> None:
        """Errors: WrongError."""
        self.run("systemctl reboot", check=False)
        self.wait()

    def wires(self) -> list[str]:
        return [f"{self.name}-out", *([f"{self.name}-in"] if self.name in INNER else [])]

    def wait(self) -> None:
        """Until the machine that has been started is up, which the guest's limit of time bounds.
        Errors: WrongError."""
        assert self.process is not None
        while self.process.poll() is None:
            found = subprocess.run(
                ["machinectl", "show", self.name, "--property=Leader", "--value"],
                capture_output=True, text=True, check=False,
            ).stdout.strip()  # fmt: skip
            if found and found != self.leader:
                self.leader = found
                state = self.run("systemctl is-system-running --wait || true").strip()
                if state in ("running", "degraded"):
                    return
                self.leader = ""
            time.sleep(0.2)
        raise WrongError(f"{self.name} ended with {self.process.returncode} before it was up")

    def run(self, script: str, *, check: bool = True) -> str:
        """Shell lines in the machine, as root; returns what they print. Errors: WrongError."""
        return shell(script, log=self.log, check=check, words=self._words())

    def start(self, script: str) -> subprocess.Popen[str]:
        """The same, not waited for."""
        self.log.write(f"[{self.name}] $ {script} &")
        return subprocess.Popen(
            [*self._words(), "bash", "-c", script],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def _words(self) -> list[str]:
        enter = [
            "nsenter",
            "--target",
            self.leader,
            "--mount",
            "--uts",
            "--ipc",
            "--net",
            "--pid",
            "--cgroup",
        ]
        return [*enter, "env", "-i", f"PATH={PATH}", "HOME=/root", "LANG=C.UTF-8", f"MACHINE={self.name}"]


def network(log: Log) -> None:
    """Make the wires, the router's addresses and the server."""
    lines = [
        "echo 1 > /proc/sys/net/ipv4/ip_forward",
        "ip link add inside type bridge",
        "ip link set inside up",
    ]
    for name, address in OUTER.items():
        router = address.rpartition(".")[0] + ".254"
        lines += [
            f"ip link add {name}-out type veth peer name {name}-r",
            f"ip addr add {router}/24 dev {name}-r && ip link set {name}-r up",
        ]
    for name in INNER:
        lines += [
            f"ip link add {name}-in type veth peer name {name}-b",
            f"ip link set {name}-b master inside up",
        ]
    # systemd-nspawn asks udev's notes whether a device is ready, and there is no udev here
    lines.append("mkdir -p /run/udev/data")
    lines.append(
        "for wire in /sys/class/net/*-out /sys/class/net/*-in; do"
        " echo I:1 > /run/udev/data/n$(cat $wire/ifindex); done"
    )
    lines += [
        "ip netns add srv",
        "ip link add eth0 netns srv type veth peer name srv-b",
        "ip link set srv-b master inside up",
        f"ip -n srv addr add {SERVER}/24 dev eth0 && ip -n srv link set eth0 up && ip -n srv link set lo up",
        f"ip -n srv route add 10.9.1.0/24 via {INNER['psg']}",
        f"ip -n srv route add 10.9.2.0/24 via {INNER['nsg']}",
        # what leaves a gateway, or the mobile node from its virtual IP, in the clear; without a tunnel the
        # node's own packets for the server take its default route
        "nft add table inet spy",
        "nft add chain inet spy forward '{ type filter hook prerouting priority -300; }'",
        "nft add rule inet spy forward iifname { psg-r, nsg-r, mn-r } ip saddr 10.0.0.0/8 counter",
        "nft add rule inet spy forward iifname { psg-r, nsg-r } ip daddr 10.0.0.0/8 counter",
    ]
    shell("\n".join(lines), log=log)


def addresses(machine: Machine) -> None:
    """Files by which the machine's systemd-networkd gives it its addresses, and its name."""
    outer = OUTER[machine.name]
    router = outer.rpartition(".")[0] + ".254"
    wires = {f"{machine.name}-out": f"Address={outer}/24\nGateway={router}\n"}
    if machine.name in INNER:
        wires[f"{machine.name}-in"] = f"Address={INNER[machine.name]}/24\n"
        machine.write("/etc/sysctl.d/forward.conf", "net.ipv4.ip_forward = 1\n")
    for wire, text in wires.items():
        text = f"[Match]\nName={wire}\n[Network]\nIPv6AcceptRA=no\nLinkLocalAddressing=no\n{text}"
        machine.write(f"/etc/systemd/network/{wire}.network", text)
    machine.write("/etc/hostname", f"{machine.name}\n")
    machine.write("/etc/machine-id", "")
    # nobody answers questions for names here: each would leave by the outer link
    machine.write("/etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {machine.name}\n")
    machine.write("/etc/resolv.conf", "")
    shell(f"systemctl -q --root={machine.files} enable systemd-networkd", log=machine.log)
