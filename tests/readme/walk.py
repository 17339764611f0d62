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
from functools import partial
from pathlib import Path

from .blocks import Page
from .machines import INNER, NAMES, OUTER, SERVER, Log, Machine, WrongError, addresses, network, shell

FIVE = "Five minutes to two real gateways"
HANDOVERS = "Handovers that the mobile node asks for"
UNDER_IPSEC = "Between gateways under IPsec instead of TLS"
MOST_EXPOSED = 3.1
"""By `systemd-analyze security`, of 10, for agents that run as root."""

ELSEWHERE = {
    ("ikectx", 0): "a command that step 6 runs",
    ("What moves where", 0): "a drawing",
    ("See it", 0): "the demo: the steps new-12 and new-13 of tests/run.sh",
    ("Library", 0): "a daemon of the reader's own; tests/ikectx has examples/own_daemon.py",
    ("Wireshark", 0): "tests/live has tshark with the dissector",
    ("Tests", 0): "these tests",
    ("Roadwarriors without our agent", 0): "the scenario by-packet",
}
"""Blocks of README that this does not run, and why."""

MN = """\
connections {
    home {
        version = 2
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
        self.began = 0  # when the first move began

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
        self.mn.run("swanctl --load-all --noprompt")
        self.mn.run("swanctl --terminate --ike home --force || true")
        self.mn.run("swanctl --initiate --child net --timeout 30")
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
        if "cp /opt/ikectx/examples/config/ikectx.toml" not in self.psg.run("! ikectx doctor"):
            raise WrongError("doctor does not say what comes first")
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

    def healthy(self, *machines: Machine) -> None:
        """`ikectx doctor` finds nothing wrong; without machines: on either gateway."""
        for machine in machines or self.gateways:
            found = json.loads(machine.run("ikectx doctor --json"))["findings"]
            if wrong := [one for one in found if one["level"] != "ok"]:
                raise WrongError(f"doctor on {machine.name}: {json.dumps(wrong, indent=1)}")

    def moved(self) -> None:
        """Step 6, while packets flow."""
        self.connect()
        self.began = int(time.time())
        self.under_traffic(lambda: self.psg.run(self.page.take(FIVE, 5)))
        self.serves(self.nsg)

    def under_traffic(self, move: Callable[[], object], most_lost: int = 60) -> None:
        """Make a move while the mobile node asks the server 20 times a second: it goes on soon.

        How many packets are lost on an idle machine is what the scenarios measure.
        """
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
        """That gateway has the mobile node's SA, and the other has not, or soon."""
        # the other one is asked last: its charon answers nobody while it waits for the updown hook
        others = [machine for machine in self.gateways if machine is not gateway]
        self.until(partial(self.has_sa, gateway), f"{gateway.name} does not have the SA")
        for other in others:
            self.until(partial(self.has_none, other), f"{other.name} still has the SA")
        self.answers()

    @staticmethod
    def has_sa(gateway: Machine) -> bool:
        return "mn@example.org" in gateway.run("ikectx list --json")

    def has_none(self, gateway: Machine) -> bool:
        return not self.has_sa(gateway)

    @staticmethod
    def until(holds: Callable[[], bool], wrong: str) -> None:
        """Wait until it holds, but not for ever. Errors: WrongError."""
        end = time.monotonic() + 30
        while not holds():
            if time.monotonic() > end:
                raise WrongError(wrong)

    def logged(self) -> None:
        """One line of the journal about each move, and no warnings."""
        for machine in self.gateways:
            lines = machine.run("journalctl --no-pager -o cat -u ikectx -g 'move of'").splitlines()
            wanted = r"INFO ikectx: move of mn@example\.org from psg to nsg: moved in \d+ ms \(transfer \w+\)"
            if len(lines) != 1 or not re.fullmatch(wanted, lines[0]):
                raise WrongError(f"{machine.name} logs of one move: {lines}")
            warnings = machine.run(f"journalctl --no-pager -o cat -u ikectx -p warning -S @{self.began}")
            if warnings.strip() not in ("", "-- No entries --"):
                raise WrongError(f"{machine.name} warns: {warnings}")

    def hardened(self) -> None:
        """The units leave little to whoever takes an agent over."""
        self.exposed(self.nsg, "ikectx", MOST_EXPOSED)
        self.exposed(self.mn, "ikectx-mobile", MOST_EXPOSED)

    def own_user(self) -> None:
        """psg's agent without root from now on, its SAs being at nsg."""
        self.psg.run(self.page.take("An agent without root"))
        status = self.psg.run("id -u ikectx; cat /proc/$(systemctl show -p MainPID --value ikectx)/status")
        user = status.split()[0]
        if not re.search(rf"^Uid:\s+{user}\s+{user}\s", status, re.MULTILINE):
            raise WrongError(f"the agent does not run as user {user}: {status}")
        self.exposed(self.psg, "ikectx", 2.0)

    def exposed(self, machine: Machine, unit: str, most: float) -> None:
        """What `systemd-analyze security` counts of a unit, of 10."""
        said = machine.run(f"systemd-analyze security --no-pager {unit}.service")
        level = float(re.search(r"exposure level .*: ([\d.]+)", said)[1])  # type: ignore[index]
        print(f"{unit}.service on {machine.name}: exposure {level}", flush=True)
        if level > most:
            raise WrongError(said)
        if "not locked" in machine.run(f"journalctl --no-pager -o cat -u {unit}"):
            raise WrongError(f"{unit}.service on {machine.name} does not let the agent lock its memory")

    def rebooted(self) -> None:
        """A gateway that has moved its SAs away boots, goes on sending packets on, and takes the SAs back."""
        self.psg.reboot()
        self.answers()
        self.healthy()
        self.nsg.run("ikectx transfer --to psg --all")
        self.serves(self.psg)

    def shut_out(self) -> None:
        """psg refuses nsg, whose certificate is revoked, and then takes it for good again, without a
        restart."""
        revoke = self.page.take("Certificates")
        toml = self.psg.read("/etc/ikectx/ikectx.toml")
        named = toml.replace("[transfer]\n", '[transfer]\nrevocation_lists = ["ca.crl"]\n')
        self.psg.write("/etc/ikectx/ikectx.toml", named)
        self.listed(re.sub("--reason.* --cert nsg.pem ", "", revoke))
        self.psg.run("systemctl restart ikectx")
        self.healthy()
        self.listed(revoke)
        self.psg.run("systemctl reload ikectx")
        said = self.psg.run("! ikectx transfer --to nsg --all 2>&1")
        if "certificate revoked" not in said:
            raise WrongError(f"psg moves an SA to a gateway whose certificate is revoked: {said}")
        self.listed(re.sub("--reason.* --cert nsg.pem ", "", revoke))
        self.psg.run("ikectx transfer --to nsg --all")
        self.nsg.run("ikectx transfer --to psg --all")
        self.serves(self.psg)
        said = self.psg.run("journalctl --no-pager -o cat -u ikectx-updown")
        if "the script of home was run for the agent: exit code 0" not in said:
            raise WrongError(f"the helper ran no script: {said}")

    def kept_address(self) -> None:
        """What charon tells while psg's agent is away waits at the socket that systemd keeps, and starts
        the agent."""
        self.psg.run("systemctl stop ikectx 2> /dev/null && ! systemctl is-active -q ikectx")
        self.connect()
        self.psg.run("timeout 30 sh -c 'until ikectx status > /dev/null 2>&1; do sleep 0.2; done'")
        self.serves(self.psg)
        self.psg.run("ikectx transfer --to nsg --all --dry-run")
        self.healthy()

    def listed(self, command: str) -> None:
        """psg gets the revocation list that the command makes."""
        shell("cd /tls\n" + command, log=self.log)
        self.psg.write("/etc/ikectx/ca.crl", Path("/tls/ca.crl").read_text(), 0o644)

    def asked_by_the_mobile_node(self) -> None:
        """The mobile node's own agent, and the handovers that it asks for."""
        for machine in self.gateways:
            section = self.page.take(HANDOVERS, 0)
            machine.append("/etc/ikectx/ikectx.toml", section if machine is self.psg else swapped(section))
            machine.run("systemctl restart ikectx")
        self.mn.write("/etc/strongswan.d/charon/ha.conf", self.page.take(FIVE, 1))
        example = Path("/checkout/examples/config/mobile.toml").read_text()
        self.mn.write("/etc/ikectx/mobile.toml", re.sub(r', "2001:[^"]*"', "", example))
        self.mn.run(self.page.take(HANDOVERS, 1))
        self.connect()
        self.healthy(self.mn)
        now, soon = self.page.take(HANDOVERS, 2).strip().splitlines()
        self.under_traffic(lambda: self.mn.run(now))
        self.serves(self.nsg)
        self.mn.run(swapped(soon))
        self.mn.run("ip addr add 203.0.113.8/24 dev mn-out && ip addr del 203.0.113.7/24 dev mn-out")
        self.mn.run("ip route replace default via 203.0.113.254")
        self.serves(self.psg)

    def under_ipsec(self) -> None:
        """The gateways' connection under IPsec; the very first attempt to move has to succeed."""
        section, connection = (self.page.take(UNDER_IPSEC, at) for at in (0, 1))
        for machine in self.gateways:
            own = (section, connection) if machine is self.psg else (swapped(section), swapped(connection))
            text = machine.read("/etc/ikectx/ikectx.toml")
            machine.write("/etc/ikectx/ikectx.toml", re.sub(r"\[transfer\]\n(.+\n)*", own[0], text))
            machine.write("/etc/swanctl/conf.d/gateways.conf", own[1])
            for place, kind in (("x509", "pem"), ("private", "key")):
                name = f"{machine.name}-ike.{kind}"
                machine.write(f"/etc/swanctl/{place}/{name}", Path("/ike", name).read_text(), 0o600)
            machine.run("swanctl --load-all --noprompt && systemctl restart ikectx")
        self.psg.run("ikectx transfer --to nsg --peer mn@example.org")
        self.serves(self.nsg)
        self.healthy()
        self.nsg.run("ikectx transfer --to psg --peer mn@example.org")
        self.serves(self.psg)

    def by_the_control_socket(self) -> None:
        self.psg.write("/root/control.py", self.page.take("Control socket"))
        self.psg.run("/opt/ikectx/.venv/bin/python /root/control.py")
        self.serves(self.nsg)

    def left_silently(self) -> None:
        """charon at psg gives its mobile node up, which it does not reach; nsg does, and gets the SA."""
        hook = re.search(r"updown = .*?(?= })", self.page.take("When the mobile node leaves"))
        home, toml = "/etc/swanctl/conf.d/home.conf", "/etc/ikectx/ikectx.toml"
        before = {path: self.psg.read(path) for path in (home, toml)}
        text = re.sub(r"updown = .*", hook[0], before[home])  # type: ignore[index]
        self.psg.write(home, text.replace("mobike = yes", "mobike = yes\n        dpd_delay = 2s"))
        handing = '[connections.home]\nhandover_to = "nsg"'
        self.psg.write(toml, before[toml].replace("[connections.home]", handing))
        # charon gives up after 3.6 s
        impatient = "retransmit_tries = 2\nretransmit_timeout = 1.0\nretransmit_base = 1.2\n"
        self.psg.write("/etc/strongswan.d/impatient.conf", f"charon {{\n{impatient}}}\n")
        anew = "swanctl --reload-settings && swanctl --load-all --noprompt && systemctl restart ikectx"
        self.psg.run(anew)
        self.connect()
        shell("nft add table inet cut", log=self.log)
        shell("nft add chain inet cut forward '{ type filter hook forward priority 0; }'", log=self.log)
        for ends in ("ip saddr 192.0.2.1 ip daddr", "ip daddr 192.0.2.1 ip saddr"):
            shell(f"nft add rule inet cut forward {ends} 203.0.113.0/24 drop", log=self.log)
        self.serves(self.nsg)
        shell("nft delete table inet cut", log=self.log)
        for path, content in before.items():
            self.psg.write(path, content)
        self.psg.run(f"rm /etc/strongswan.d/impatient.conf; {anew}")
        self.nsg.run("ikectx transfer --to psg --all")
        self.serves(self.psg)

    def upgraded(self) -> None:
        """A newer version, on one gateway."""
        shell(
            "cd /shared/origin"
            " && git -c user.name=a -c user.email=a@example.org commit -q --allow-empty -m newer",
            log=self.log,
        )
        self.nsg.run(self.page.take("Upgrade"))
        if "newer" not in self.nsg.run("git -C /opt/ikectx log -1 --format=%s"):
            raise WrongError("nsg does not have the newer version")
        self.serves(self.nsg)

    def monitored(self) -> None:
        said = self.nsg.run(self.page.take("Monitoring"))
        if not re.search(r"move of mn@example\.org from psg to nsg: moved", said):
            raise WrongError(f"the journal has no line of the move: {said}")

    def removed(self) -> None:
        """A gateway without ikectx is what it was before, and the other one has no tunnel any more."""
        self.nsg.run(self.page.take("Remove it"))
        left = self.nsg.run("ls -d /etc/ikectx /var/lib/ikectx /opt/ikectx /run/ikectx* 2> /dev/null || true")
        left += self.nsg.run("nft list tables; ss -Hlunp; systemctl list-units --all 'ikectx*' --no-legend")
        if re.search("ikectx|4510", left):
            raise WrongError(f"this is left at nsg: {left}")
        self.connect(OUTER["nsg"])

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
        logged,
        own_user,
        rebooted,
        shut_out,
        kept_address,
        asked_by_the_mobile_node,
        hardened,
        left_silently,
        under_ipsec,
        by_the_control_socket,
        upgraded,
        monitored,
        removed,
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
