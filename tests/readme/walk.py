"""Follows README in the guest: each part is a step. Runs by the installation's Python, without this project.

`python3 -m tests.readme.walk FOLDER` writes readme.xml and readme.log into the folder, which has blocks.json.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

from .blocks import Page
from .machines import INNER, NAMES, OUTER, SERVER, Log, Machine, WrongError, addresses, network, shell

FIVE = "Five minutes to two real gateways"

ELSEWHERE = {
    ("ikectx", 0): "a command that step 6 runs",
    ("What moves where", 0): "a drawing",
    ("See it", 0): "the demo: the steps new-12 and new-13 of tests/run.sh",
    ("Library", 0): "a daemon of the reader's own; tests/ikectx has examples/own_daemon.py",
    ("Wireshark", 0): "tests/live has tshark with the dissector",
    ("Tests", 0): "these tests",
    ("Between gateways under IPsec instead of TLS", 0): "not yet",
    ("Between gateways under IPsec instead of TLS", 1): "not yet",
    ("Control socket", 0): "not yet",
    ("Handovers that the mobile node asks for", 0): "not yet",
    ("When the mobile node leaves", 0): "not yet",
    ("Roadwarriors without our agent", 0): "the scenario by-packet",
}
"""Blocks of README that this does not run, and why."""

MN = """\
connections {
    home {
        version = 2
        local_addrs = 203.0.113.7
        remote_addrs = 192.0.2.1
        vips = 0.0.0.0
        local {
            auth = pubkey
            certs = mn.pem
            id = mn@example.org
        }
        remote {
            auth = pubkey
            id = vpn.example.org
        }
        children {
            net {
                remote_ts = 10.0.0.0/16
            }
        }
    }
}
"""

SWAPS = {"psg": "nsg", OUTER["psg"]: OUTER["nsg"], INNER["psg"]: INNER["nsg"]}


def swapped(text: str) -> str:
    """The other gateway's file: names and addresses exchanged."""
    both = {**SWAPS, **{there: here for here, there in SWAPS.items()}}
    found = sorted(both, key=len, reverse=True)
    return re.sub(
        "|".join(rf"(?<![\w.]){re.escape(one)}(?!\d)" for one in found), lambda hit: both[hit[0]], text
    )


class Walk:
    """The machines, README's blocks, and what has been seen."""

    def __init__(self, shared: Path) -> None:
        self.shared = shared
        self.log = Log(shared / "readme.log")
        self.page = Page(json.loads((shared / "blocks.json").read_text()))
        self.psg, self.nsg, self.mn = self.all = [Machine(name, self.log) for name in NAMES]
        self.gateways = [self.psg, self.nsg]

    # -- what README takes for granted

    def installed(self) -> None:
        """Step 1, which the guest's first program ran before systemd."""
        self.page.take(FIVE, 0)
        said = (self.shared / "install.log").read_text()
        if (self.shared / "installed").read_text().strip() != "0":
            raise WrongError(f"step 1 of README failed:\n{said}")

    def strongswan_works(self) -> None:
        """Three machines, with the connection of examples/config on both gateways, and a tunnel."""
        network(self.log)
        shell(
            """
            umask 077; mkdir -p /ike && cd /ike
            pki --gen --type ecdsa --size 256 --outform pem > ca.key
            pki --self --ca --in ca.key --type ecdsa --dn CN=users --outform pem > ca.pem
            issue() { # issue FILE NAME
                pki --gen --type ecdsa --size 256 --outform pem > $1.key
                pki --issue --in $1.key --type ecdsa --cacert ca.pem --cakey ca.key --dn "CN=$2" --san "$2" \\
                    --flag serverAuth --outform pem > $1.pem
            }
            issue gw vpn.example.org; issue mn mn@example.org
            issue psg-ike psg.example; issue nsg-ike nsg.example
            """,
            log=self.log,
        )
        connection = Path("/checkout/examples/config/swanctl.conf").read_text()
        for machine in self.all:
            addresses(machine)
            own = "mn" if machine is self.mn else "gw"
            for place, name in (("x509ca", "ca.pem"), ("x509", f"{own}.pem"), ("private", f"{own}.key")):
                machine.write(f"/etc/swanctl/{place}/{name}", Path("/ike", name).read_text(), 0o600)
        self.psg.write("/etc/swanctl/conf.d/home.conf", connection)
        self.nsg.write("/etc/swanctl/conf.d/home.conf", connection.replace("10.9.1.0/24", "10.9.2.0/24"))
        self.mn.write("/etc/swanctl/conf.d/home.conf", MN)
        for machine in self.all:
            machine.boot()
        self.connect()

    def connect(self, remote: str = "") -> None:
        """The mobile node connects anew, to psg or where `remote` says."""
        if remote:
            self.mn.run(
                f"sed -i 's/remote_addrs = .*/remote_addrs = {remote}/' /etc/swanctl/conf.d/home.conf"
            )
        self.mn.run("swanctl --load-all -q && swanctl --terminate --ike home --force || true")
        self.mn.run("swanctl --initiate --child net")
        self.answers()

    def answers(self, count: int = 5, most_lost: int = 0) -> None:
        """The server answers through the tunnel."""
        said = self.mn.run(f"ping -q -i 0.2 -c {count} -W 2 {SERVER} || true")
        lost = count - int(re.search(r"(\d+) received", said)[1])  # type: ignore[index]
        if lost > most_lost:
            raise WrongError(f"{lost} of {count} pings were lost")

    # -- README

    def configured(self) -> None:
        """Steps 2 to 5."""
        ha, certificates, toml, start = (self.page.take(FIVE, at) for at in (1, 2, 3, 4))
        shell("mkdir -p /tls && cd /tls\n" + certificates, log=self.log)
        for machine in self.gateways:
            machine.write("/etc/strongswan.d/charon/ha.conf", ha)
            machine.write("/etc/ikectx/ikectx.toml", toml if machine is self.psg else swapped(toml))
            for name in ("ca.pem", f"{machine.name}.pem", f"{machine.name}.key"):
                machine.write(f"/etc/ikectx/{name}", Path("/tls", name).read_text(), 0o600)
        self.psg.run(start, check=False)  # nsg's agent does not run yet
        self.nsg.run(start)
        self.healthy()

    def healthy(self) -> None:
        """`ikectx doctor` finds nothing wrong on either gateway."""
        for machine in self.gateways:
            found = json.loads(machine.run("ikectx doctor --json"))["findings"]
            if wrong := [one for one in found if one["level"] != "ok"]:
                raise WrongError(f"doctor on {machine.name}: {json.dumps(wrong, indent=1)}")

    def moved(self) -> None:
        """Step 6, while packets flow."""
        self.connect()
        self.under_traffic(lambda: self.psg.run(self.page.take(FIVE, 5)))
        self.serves(self.nsg)

    def under_traffic(self, move: Callable[[], object], most_lost: int = 4) -> None:
        """Make a move while the mobile node asks the server 20 times a second."""
        ping = self.mn.start(f"ping -q -i 0.05 -W 1 {SERVER}")
        time.sleep(0.5)
        try:
            move()
        finally:
            time.sleep(1)
            self.mn.run("kill -INT $(pidof ping)")
            said, _ = ping.communicate()
        self.log.write(said)
        sent, received = (int(one) for one in re.search(r"(\d+) packets.*, (\d+) received", said).groups())  # type: ignore[union-attr]
        if sent - received > most_lost:
            raise WrongError(f"{sent - received} of {sent} pings were lost")

    def serves(self, gateway: Machine) -> None:
        """That gateway has the mobile node's SA, and the other has not."""
        for machine in self.gateways:
            there = "mn@example.org" in machine.run("ikectx list --json")
            if there != (machine is gateway):
                raise WrongError(f"{machine.name} {'still has' if there else 'does not have'} the SA")
        self.answers()

    def nothing_in_the_clear(self) -> None:
        found = shell("nft list chain inet spy forward", log=self.log)
        if set(re.findall(r"counter packets (\d+)", found)) != {"0"}:
            raise WrongError(f"packets left in the clear:\n{found}")

    def all_of_readme(self) -> None:
        """Nothing of README is left out unknown to this."""
        left = [one for one in self.page.unused() if one not in ELSEWHERE]
        if left:
            raise WrongError(f"nothing runs these blocks of README: {left}")

    STEPS: tuple[Callable[[Walk], None], ...] = (
        installed,
        strongswan_works,
        configured,
        moved,
        nothing_in_the_clear,
        all_of_readme,
    )


def report(path: Path, cases: list[tuple[str, float, str]]) -> None:
    """The steps as JUnit: name, seconds, and what went wrong."""
    suite = ET.Element("testsuite", name="readme", tests=str(len(cases)))
    for name, seconds, wrong in cases:
        case = ET.SubElement(suite, "testcase", classname="readme", name=name, time=f"{seconds:.1f}")
        if wrong:
            ET.SubElement(case, "failure", message=wrong.splitlines()[0]).text = wrong
    ET.ElementTree(suite).write(path)


def main(shared: Path) -> int:
    (shared / "journals").mkdir()
    walk = Walk(shared)
    cases: list[tuple[str, float, str]] = []
    for step in walk.STEPS:
        began, wrong = time.monotonic(), ""
        walk.log.write(f"\n=== {step.__name__}")
        try:
            step(walk)
        except (WrongError, LookupError, OSError, ValueError, TypeError, subprocess.SubprocessError) as error:
            wrong = str(error) if isinstance(error, WrongError) else traceback.format_exc()
        cases.append((step.__name__, time.monotonic() - began, wrong))
        print(f"{step.__name__}: {wrong or 'right'} ({cases[-1][1]:.1f} s)", flush=True)
        if wrong:
            break
    failed = bool(cases[-1][2])
    if failed:
        for machine in walk.all:
            if machine.leader:
                said = machine.run("journalctl --no-pager -o short-precise", check=False)
                (shared / "journals" / machine.name).write_text(said)
    report(shared / "readme.xml", cases)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
