"""What connections from outside get at a gateway's TCP port, and agents without descriptors. Real charon."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ikectx_cli.lab import attacker as lab_attacker
from ikectx_cli.lab.net import OUTER, PREFIX

from .world import World, until

pytestmark = pytest.mark.live

MIB = 1 << 20


class Use:
    """What the agent of a host uses now."""

    def __init__(self, world: World, host: str) -> None:
        self.pid = agent(world, host)
        status = Path(f"/proc/{self.pid}/status").read_text()
        self.memory = 1024 * int(status.partition("VmRSS:")[2].split()[0])
        self.descriptors = len(os.listdir(f"/proc/{self.pid}/fd"))
        self.log = (world.lab.work / host / "agent.out").stat().st_size
        self.state = sum(path.stat().st_size for path in (world.lab.work / host / "state").iterdir())


def agent(world: World, host: str) -> int:
    daemon = world.lab.started[host, "agent"]
    assert daemon is not None
    return daemon.pid


@contextlib.contextmanager
def attack(world: World, kind: str, rate: float, seconds: float, most: int = 0) -> Iterator[None]:
    """`lab_attacker` on mn2, which is a peer of both gateways, until its time is over."""
    spis = ("00" * 8, "00" * 8)
    order = lab_attacker.Order(kind, rate, seconds, str(world.lab.work), spis, most)
    attacker = subprocess.Popen(
        [*world.lab.net.enter("mn2"), *lab_attacker.words(order)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield
        out, _ = attacker.communicate(timeout=seconds + 30)
        assert attacker.returncode == 0
        assert json.loads(out)["sent"] > rate, out
    finally:
        if attacker.poll() is None:
            attacker.kill()
            attacker.wait()


def beside(world: World, during: Callable[[], None], seconds: float) -> Use:
    """The most of all that nsg's agent used meanwhile; `status` answered each time, or this raises."""
    most, end = Use(world, "nsg"), time.monotonic() + seconds
    during()
    while time.monotonic() < end:
        world.status("nsg")
        now = Use(world, "nsg")
        for name in ("memory", "descriptors", "log", "state"):
            setattr(most, name, max(getattr(most, name), getattr(now, name)))
        time.sleep(0.1)
    return most


@pytest.mark.parametrize(
    ("kind", "rate", "most"), [("half-open", 500, 1500), ("links", 100, 1000), ("flood", 2000, 0)]
)
def test_what_comes_from_outside_is_bounded_and_moves_go_on(
    kind: str, rate: float, most: int, world: World
) -> None:
    # half-open: SYN, ACK, no octet, from a peer's address and 31 others; links: TLS of a peer, no message;
    # flood: PCTD (check, hold, empty), CTD and CT-Req of that peer, as fast as nsg takes them
    world.up(rogue=True)
    for address in lab_attacker.sources()[1:]:
        world.lab.command("mn2", ["ip", "address", "replace", f"{address}/{PREFIX[4]}", "dev", "eth0"])
    world.agree("psg")
    opens_what_it_keeps(world)
    before = Use(world, "nsg")
    with attack(world, kind, rate, 8.0, most):
        time.sleep(1.0)
        used = beside(world, lambda: moves(world), 6.0)
    until(lambda: Use(world, "nsg").descriptors <= before.descriptors + 1, "descriptors are given back", 30.0)
    after = Use(world, "nsg")
    assert used.memory - before.memory < 16 * MIB and after.memory - before.memory < 16 * MIB
    assert used.descriptors - before.descriptors < 40
    assert after.log - before.log < MIB // 4
    assert used.state - before.state < 24 * MIB
    world.settle("nsg")


def opens_what_it_keeps(world: World) -> None:
    """nsg has the connections to psg and to charon that an SA's way there and back needs."""
    for here, there in (("psg", "nsg"), ("nsg", "psg")):
        world.move(here, there)
        world.settle(there)


def moves(world: World) -> None:
    report = world.transfer("psg", "nsg").report
    assert report["result"] == "moved", report


def test_an_agent_without_descriptors_takes_no_sa_and_tells_why(world: World) -> None:
    # PCTD, CTDR, CTD; nsg has no socket for the MN: CTDR S=0, KERNEL; psg serves on, and calls the MN
    world.up()
    world.agree("psg")
    assert world.transfer("psg", "nsg", "--dry-run").code == 0  # so that the link is there
    world.status("nsg")  # its descriptor is free when nsg hears of the next
    pid = agent(world, "nsg")
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    drawn = world.lab.work / "nsg" / "updown.log"
    drawn.touch()
    before = drawn.read_text()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (with_free(pid, 2), limits[1]))
    try:
        done = world.transfer("psg", "nsg")
        assert done.code != 0
        report = done.report
        assert report["result"] != "moved"
        assert "did not answer" not in report["text"], report
        assert report["status"]["name"] == "KERNEL", report
        world.serves("psg")
        world.status("nsg")  # what is open already is served
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert "Too many open files" in world.log("nsg", "agent.out")
    assert len(world.log("nsg", "agent.out")) < 100_000
    until(lambda: world.idle("nsg"), "nsg has undone it", 40.0)
    world.ping()

    def ended() -> bool:
        ran = [line.split()[0] for line in drawn.read_text().removeprefix(before).splitlines()]
        return ran.count("up-client") == ran.count("down-client")

    until(ended, "nsg's script has ended what it began", 40.0)
    now = drawn.read_text()
    world.move("psg", "nsg")
    world.settle("nsg")
    assert "up-client" in drawn.read_text().removeprefix(now)


def with_free(pid: int, free: int) -> int:
    """The limit on descriptors under which the process may open so many."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    unused = (number for number in itertools.count() if number not in used)
    return next(itertools.islice(unused, free, None))


def test_strangers_connections_end_before_tls(world: World) -> None:
    # SYN from an address that is no peer's: RST
    world.up()
    before = Use(world, "nsg")
    code = (
        "import socket\n"
        "ends = 0\n"
        "for _ in range(300):\n"
        "    try:\n"
        f"        with socket.create_connection(('{OUTER['nsg'][4]}', 5091), 5) as sock:\n"
        "            sock.settimeout(5)\n"
        "            ends += sock.recv(1) == b''\n"
        "    except ConnectionError:\n"
        "        ends += 1\n"
        "print(ends)\n"
    )
    assert world.must("mn", "python3", "-c", code).strip() == "300"
    until(lambda: Use(world, "nsg").descriptors <= before.descriptors + 1, "descriptors are given back")
    assert Use(world, "nsg").log - before.log < 10_000
    log = world.log("nsg", "agent.out")
    assert f"turned a connection from {OUTER['mn'][4]} away" in log
    world.move("psg", "nsg")
