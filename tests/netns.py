"""Network namespaces for tests of the live kernel: each vanishes with the last that uses it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace kept by a file descriptor; what is begun inside `entered` belongs to it."""

    def __init__(self) -> None:
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.unshare(_CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "unshare")
            self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            _set(before)
            os.close(before)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _set(self.fd)
            yield
        finally:
            _set(before)
            os.close(before)

    def run(self, *commands: str) -> str:
        """Commands of iproute2 or nftables, as one would type them."""
        with self.entered():
            return "".join(
                subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout
                for command in commands
            )

    def switch_on(self, *names: str) -> None:
        """Sets kernel settings of this network, named by their paths below /proc/sys/net, to 1."""
        with self.entered():
            for name in names:
                Path("/proc/sys/net", name).write_text("1")

    def ip(self, *commands: str) -> None:
        """Commands of iproute2's `ip`, without that word, in one process."""
        with self.entered():
            done = subprocess.run(
                ["ip", "-batch", "-"], input="\n".join(commands), check=False, capture_output=True, text=True
            )
        assert not done.returncode, f"ip: {done.stderr.strip()}"
        added = [command.split() for command in commands if command.startswith("addr")]
        six = {words[2].split("/")[0]: words[words.index("dev") + 1] for words in added if ":" in words[2]}
        if six:
            self._wait_for(six)

    def _wait_for(self, six: Mapping[str, str]) -> None:
        """Until these IPv6 addresses (to devices) are ours: the kernel makes them so a moment later, also
        without duplicate address detection. Where a device has no carrier they are not, for now."""
        end = time.monotonic() + 5
        while time.monotonic() < end:
            links = self.run("ip -o link show up").splitlines()
            up = {link.split()[1].rstrip(":").split("@")[0] for link in links if "LOWER_UP" in link}
            local = self.run("ip -6 route show table local")
            if all(f"local {address} " in local for address, device in six.items() if device in up):
                return
            time.sleep(0.01)
        raise AssertionError(f"not ours after 5 s: {', '.join(six)}")

    def give(self, device: str, other: Namespace) -> None:
        """Move a device to another namespace."""
        with other.entered():
            holder = subprocess.Popen(["sleep", "60"])
        try:
            self.ip(f"link set {device} netns {holder.pid}")
        finally:
            holder.kill()
            holder.wait()

    def close(self) -> None:
        os.close(self.fd)


def _set(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Namespace]]:
    """Fresh ones with loopback up. Fails without root."""
    if os.geteuid() != 0:
        pytest.fail("network namespaces need root: sudo tests/run.sh", pytrace=False)
    made = [Namespace() for _ in range(count)]
    try:
        for space in made:
            space.ip("link set lo up")
        yield made
    finally:
        for space in made:
            space.close()


JOINED = {4: ("10.9.0.1", "10.9.0.2"), 6: ("fd09::1", "fd09::2")}
"""Addresses of two joined namespaces, by IP version."""


def join(one: Namespace, other: Namespace) -> None:
    """A link between two namespaces, with the addresses of `JOINED`."""
    one.ip("link add joined0 type veth peer name joined1")
    one.give("joined1", other)
    for space, device, place in ((one, "joined0", 0), (other, "joined1", 1)):
        space.ip(
            f"link set {device} up",
            f"addr add {JOINED[4][place]}/24 dev {device}",
            f"addr add {JOINED[6][place]}/64 dev {device} nodad",
        )


ROW = {4: ("10.0.1.9", "10.0.1.1", "10.0.2.1", "10.0.2.2")}
ROW[6] = ("fd00:1::9", "fd00:1::1", "fd00:2::1", "fd00:2::2")
"""Addresses of three namespaces in a row, by IP version: the first, the second twice, the third."""


@contextlib.contextmanager
def row() -> Iterator[tuple[Namespace, Namespace, Namespace]]:
    """Three; the second forwards by its devices left and right. Neither end has a route to the other."""
    with namespaces(3) as (first, second, third):
        second.ip(
            "link add name left type veth peer name near", "link add name right type veth peer name far"
        )
        second.give("near", first)
        second.give("far", third)
        places = ((first, "near"), (second, "left"), (second, "right"), (third, "far"))
        for place, (space, device) in enumerate(places):
            space.ip(
                f"link set {device} up",
                f"address add {ROW[4][place]}/24 dev {device}",
                f"address add {ROW[6][place]}/64 dev {device} nodad",
            )
        second.switch_on("ipv4/ip_forward", "ipv6/conf/all/forwarding")
        yield first, second, third


def of_name(name: str) -> Namespace:
    """The namespace that `ip netns add` made under that name."""
    space = Namespace.__new__(Namespace)
    space.fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    return space
