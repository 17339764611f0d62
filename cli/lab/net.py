"""The lab's network: one namespace a host, built by iproute2 and taken down to the last interface.

    mn  === core --- psg ---+
    mn2 ---  |              +--- srv (a bridge in srv's namespace: the inner network)
             +------ nsg ---+

The gateways have a second link to the core (eth1) and to the inner network (lan1), which carry nothing but
what they send to each other: with a delay of their own, which no packet between a mobile node, a gateway and
the server meets.

`mn` has two access networks: eth0 is up, eth1 waits until a scenario has it relocate. `mn2` is there for
scenarios in which nsg already serves somebody.

The inner network sends everything for the mobile nodes' inner addresses to psg, where their pool is, and goes
on doing so when one of them has moved: that is how a real network is made (`POOL`).

Addresses are fixed, because scenario files name them. Namespace names get a prefix of their own for each lab,
so that labs can stand side by side and taking one down touches nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ikectx.errors import KernelError

from . import untrack as lab_untrack
from .restoring import FLUSH, KEEP_LINKS, MADE

HOSTS = ("mn", "mn2", "psg", "nsg", "core", "srv")
GATEWAYS = ("psg", "nsg")
MOBILES = ("mn", "mn2")
CHARONS = ("mn", "psg", "nsg")
"""Hosts with a charon in every scenario."""

OUTER = {
    "mn": {4: "10.1.0.10", 6: "fd01::10"},
    "mn2": {4: "10.1.1.10", 6: "fd01:1::10"},
    "psg": {4: "10.2.1.2", 6: "fd02:1::2"},
    "nsg": {4: "10.2.2.2", 6: "fd02:2::2"},
}
"""Address of a host on its link to the core, by IP version."""

SHARED = {4: "10.2.9.1", 6: "fd02:9::1"}
"""An outer address both gateways have; the core routes it to one of them (`Tunnel.shared`)."""

CORE = {
    "mn": {4: "10.1.0.1", 6: "fd01::1"},
    "mn2": {4: "10.1.1.1", 6: "fd01:1::1"},
    "psg": {4: "10.2.1.1", 6: "fd02:1::1"},
    "nsg": {4: "10.2.2.1", 6: "fd02:2::1"},
}
"""Address of the core router on the link to that host."""

AWAY = {4: "10.5.0.10", 6: "fd05::10"}
"""Address of `mn` in its second access network (eth1, `to-mn-new` at the core), once it is there."""

CORE_AWAY = {4: "10.5.0.1", 6: "fd05::1"}

LINKS = {
    "mn": ("to-mn", "to-mn-new"),
    "mn2": ("to-mn2",),
    "psg": ("to-psg", "to-psg-nsg"),
    "nsg": ("to-nsg", "to-nsg-psg"),
    "away": ("to-mn-new",),
}
"""The core's ends of a host's links; `away` stands for the second access network of `mn` alone."""

BETWEEN_LINKS = ("to-psg-nsg", "to-nsg-psg")
"""The far ends, at the core and at the inner network, of the gateways' links to each other."""

NAT = "10.9.0.1"
NAT_PORT = {"mn": 4501, "mn2": 4502}
"""The address both mobile nodes have behind the core's NAT (`Tunnel.nat`), and what port 4500 is there."""

ANNOUNCED = {4: "10.2.2.3", 6: "fd02:2::3"}
"""A second outer address of nsg, which psg tells mobile nodes beside its own (`Tunnel.by_packet`)."""

INNER = {
    "psg": {4: "10.3.0.2", 6: "fd03::2"},
    "nsg": {4: "10.3.0.3", 6: "fd03::3"},
    "srv": {4: "10.3.0.10", 6: "fd03::10"},
    "mn": {4: "10.4.0.10", 6: "fd04::10"},
    "mn2": {4: "10.4.0.11", 6: "fd04::11"},
}
"""Addresses behind the gateways; those of the mobile nodes are their inner (virtual) addresses."""

POOL = {4: "10.4.0.0/24", 6: "fd04::/64"}
"""The networks of the mobile nodes' inner addresses. They belong to psg, so the server's routes lead there;
mn2, which is served by nsg from the beginning, has a host route to nsg."""

LAN_MAC = {"psg": "02:49:4b:45:00:02", "nsg": "02:49:4b:45:00:03"}
"""Link-layer addresses of the gateways on the inner network, fixed, so that a capture knows who is who."""

BETWEEN_MAC = "02:49:4b:45:00:01"
"""Link-layer address of the core's ends of the gateways' eth1, fixed, for its link-local address."""

BETWEEN = "fe80::49:4bff:fe45:1"
"""The link-local address that follows from it: by it a gateway reaches the other one with IPv6."""

SECOND = {4: "10.6.0.10", 6: "fd06::10"}
"""A second address of the server, in a network of its own, for a second CHILD_SA."""

SECOND_NET = {4: "10.6.0.0/24", 6: "fd06::/64"}
INNER_NET = {4: "10.3.0.0/24", 6: "fd03::/64"}

ROUTERS = (*GATEWAYS, "core")
PREFIX = {4: 24, 6: 64}
HOST_BITS = {4: 32, 6: 128}

BEHIND = 1 << 20
"""Metric of a route that counts only where there is no other."""

MTU = 1500
"""Of each link outside, in octets."""

LINKS_UP = 5.0
"""Seconds in which the links of a new network must carry packets."""

_MODULES = """
veth bridge tun dummy af_packet sch_netem nf_tables nft_queue nft_ct nft_nat nft_chain_nat nfnetlink_queue
xfrm_user af_key xfrm_algo xfrm_interface esp4 esp6 xfrm4_tunnel xfrm6_tunnel ipcomp ipcomp6
authenc authencesn echainiv seqiv ccm gcm cmac xcbc ctr cbc hmac chacha20poly1305
aes_generic sha256_generic sha512_generic sha1_generic
"""
MODULES = tuple(_MODULES.split())
"""Kernel modules a lab may use. Loading is an attempt: a kernel may have them built in, or not at all."""


def run(
    argv: Sequence[str], *, text: str | None = None, check: bool = True, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end, output captured. With `check`, a failure raises KernelError."""
    done = subprocess.run(
        list(argv),
        input=text,
        capture_output=True,
        text=True,
        check=False,
        env=None if env is None else dict(env),
    )
    if check and done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise KernelError(f"{' '.join(argv)}: {words[-1] if words else f'exit {done.returncode}'}")
    return done


def load_modules() -> None:
    """Asks for every module of `MODULES`; those that are missing or built in are no error."""
    if shutil.which("modprobe"):
        run(["modprobe", "-a", "-q", *MODULES], check=False)


@dataclass(frozen=True, slots=True)
class Net:
    """The namespaces of one lab. `prefix` makes their names unique on this machine.

    `delay_ms`: one way, between a mobile node and the core. `gateway_delay_ms`: one way, between the
    gateways, outside and inside.
    """

    prefix: str
    delay_ms: float = 20.0
    gateway_delay_ms: float = 1.0

    @property
    def gateways_round_trip_ms(self) -> float:
        """Where this kernel has netem."""
        return 2 * self.gateway_delay_ms

    def namespace(self, host: str) -> str:
        return f"{self.prefix}-{host}"

    def enter(self, host: str) -> list[str]:
        """The words that put a command into the network namespace of `host`."""
        return ["nsenter", f"--net=/run/netns/{self.namespace(host)}"]

    def up(self) -> list[str]:
        """Builds everything. Returns warnings (what this kernel cannot do). Raises KernelError."""
        ns = {host: self.namespace(host) for host in HOSTS}
        for name in ns.values():
            run(["ip", "netns", "add", name])
        links = [
            f"link add name eth0 netns {ns[host]} type veth peer name to-{host} netns {ns['core']}"
            for host in OUTER
        ]
        links.append(f"link add name eth1 netns {ns['mn']} type veth peer name to-mn-new netns {ns['core']}")
        links += [
            f"link add name lan0 address {LAN_MAC[host]} netns {ns[host]}"
            f" type veth peer name to-{host} netns {ns['srv']}"
            for host in GATEWAYS
        ]
        for host, other in (GATEWAYS, GATEWAYS[::-1]):
            here, far = ns[host], f"type veth peer name to-{host}-{other}"
            links.append(f"link add name eth1 netns {here} {far} address {BETWEEN_MAC} netns {ns['core']}")
            links.append(f"link add name lan1 netns {here} {far} netns {ns['srv']}")
        run(["ip", "-batch", "-"], text="\n".join(links) + "\n")
        for host in HOSTS:
            run([*self.enter(host), "sh", "-c", _SYSCTLS, "sh", "1" if host in ROUTERS else "0"])
            run(["ip", "-n", ns[host], "-batch", "-"], text="\n".join(self._addresses(host)) + "\n")
        self._wait_for_links()
        warnings = self._delay()
        self._meet()
        return warnings

    def _wait_for_links(self) -> None:
        """Until every link carries packets: the kernel makes it so up to a second after both ends are up, and
        drops what is sent before. Never raises; what follows tells what a link lacks."""
        waiting = {host: ["eth0"] * (host in OUTER) for host in HOSTS}
        waiting |= {host: ["eth0", "eth1", "lan0", "lan1"] for host in GATEWAYS}
        waiting["core"] = [*(f"to-{host}" for host in OUTER), *BETWEEN_LINKS]
        waiting["srv"] = [*(f"to-{host}" for host in GATEWAYS), *BETWEEN_LINKS, "br0"]
        limit = time.monotonic() + LINKS_UP
        for host, links in waiting.items():
            words = ["ip", "-n", self.namespace(host), "-o", "link", "show", "up"]
            while time.monotonic() < limit:
                shown = [line for line in run(words, check=False).stdout.splitlines() if " state UP " in line]
                found = {line.split()[1].rstrip(":").partition("@")[0] for line in shown}
                if found.issuperset(links):
                    break
                time.sleep(0.05)

    def _meet(self) -> None:
        """Have gateways know the link addresses on the ways to each other, as those that are up for long do:
        whoever measures a handover would measure ARP there. Never raises."""
        for host, other in (GATEWAYS, GATEWAYS[::-1]):
            pings = [f"ping -q -c 1 -W 1 {where[other][v]} &" for where in (OUTER, INNER) for v in (4, 6)]
            run([*self.enter(host), "sh", "-c", " ".join([*pings, "wait"])], check=False)

    def _addresses(self, host: str) -> list[str]:
        lines = ["link set lo up"]
        if host in OUTER:
            lines.append(f"link set eth0 mtu {MTU} up")
            for version in (4, 6):
                address = f"{OUTER[host][version]}/{PREFIX[version]}"
                lines += [_address(version, address, "eth0"), _default(CORE[host][version])]
        if host == "mn":
            lines.append("link set eth1 down")
        if host in GATEWAYS:
            lines.append("link set lan0 up")
            lines += [_address(v, f"{SHARED[v]}/{HOST_BITS[v]}", "lo") for v in (4, 6)]
            lines += [_address(v, f"{INNER[host][v]}/{PREFIX[v]}", "lan0") for v in (4, 6)]
            lines += [f"route add {SECOND_NET[v]} via {INNER['srv'][v]}" for v in (4, 6)]
            lines += _to_other(host)
            # where the inner link fails, what mobile nodes send must not take the default route, outside
            inside = (*INNER_NET.values(), *SECOND_NET.values())
            lines += [f"route add unreachable {net} metric {BEHIND}" for net in inside]
        if host == "core":
            for far in OUTER:
                lines.append(f"link set to-{far} mtu {MTU} up")
                lines += [_address(v, f"{CORE[far][v]}/{PREFIX[v]}", f"to-{far}") for v in (4, 6)]
            lines += [f"link set {device} up" for device in ("to-mn-new", *BETWEEN_LINKS)]
            lines += [_address(v, f"{CORE_AWAY[v]}/{PREFIX[v]}", "to-mn-new") for v in (4, 6)]
            lines += [f"route add {SHARED[v]}/{HOST_BITS[v]} via {OUTER['psg'][v]}" for v in (4, 6)]
        if host == "srv":
            lines.append("link add name br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0")
            ports = (*(f"to-{far}" for far in GATEWAYS), *BETWEEN_LINKS)
            lines += [f"link set {port} master br0 up" for port in ports] + ["link set br0 up"]
            lines += [_address(v, f"{INNER['srv'][v]}/{PREFIX[v]}", "br0") for v in (4, 6)]
            lines += [_address(v, f"{SECOND[v]}/{PREFIX[v]}", "br0") for v in (4, 6)]
            lines += [f"route add {POOL[v]} via {INNER['psg'][v]}" for v in (4, 6)]
            lines += [f"route add {INNER['mn2'][v]}/{HOST_BITS[v]} via {INNER['nsg'][v]}" for v in (4, 6)]
        return lines

    def _delay(self) -> list[str]:
        access = [("mn", "eth0"), ("mn", "eth1"), ("mn2", "eth0")]
        access += [("core", device) for host in MOBILES for device in LINKS[host]]
        between = [(host, device) for host in GATEWAYS for device in ("eth1", "lan1")]
        wanted = [(*end, self.delay_ms) for end in access] + [
            (*end, self.gateway_delay_ms) for end in between
        ]
        for host, device, delay in wanted:
            if not self._delay_by(host, device, delay):
                asked = f"{self.delay_ms:g} ms and {self.gateway_delay_ms:g} ms"
                return [
                    "this kernel has no netem: the access link and the way between the gateways have no"
                    f" delay (asked for {asked})"
                ]
        return []

    def _delay_by(self, host: str, device: str, delay: float) -> bool:
        """False: this kernel cannot do that."""
        words = ["tc", "-n", self.namespace(host), "qdisc", "replace", "dev", device, "root", "netem"]
        words += ["delay", f"{delay}ms", "limit", "10000"]
        return delay <= 0 or run(words, check=False).returncode == 0

    def restore(self) -> None:
        """Puts back what a scenario may have changed: addresses, routes, filters (not those of agents)."""
        for host in HOSTS:
            lines = [line for line in self._addresses(host) if not line.startswith("link add")]
            script = KEEP_LINKS if host in GATEWAYS else FLUSH
            kept = " ".join(
                f"{words[2]}@{words[4]}" for line in lines if (words := line.split())[0] == "addr"
            )
            text = "\n".join([f"{MADE}{script}ip -force -batch - <<'E'", *lines, "E"])
            run([*self.enter(host), "sh", "-c", text, "sh", kept], check=False)
        self._meet()

    def relocate(
        self, host: str = "mn", *, dark_ms: float = 0.0, late_ms: float = 0.0
    ) -> subprocess.Popen[str] | None:
        """The mobile node leaves one access network and is in the other. Raises KernelError.

        The old addresses go first and together, before charon could look for its gateway by the second one.
        The link stays: charon's virtual IP is on it. `dark_ms`: for so long it has neither. `late_ms`,
        without `dark_ms`: what the new link has at first is a link-local address, then a ULA, and only after
        so many milliseconds its IPv4 address; a process that sees to that goes on when this returns.
        """
        shown = run([*self.enter(host), "ip", "-o", "addr", "show", "dev", "eth1", "scope", "global"])
        away = f" {AWAY[4]}/" in shown.stdout
        new, old = ("eth0", "eth1") if away else ("eth1", "eth0")
        there, router = (OUTER[host], CORE[host]) if away else (AWAY, CORE_AWAY)
        gone = AWAY if away else OUTER[host]
        leaving = [f"addr del {gone[v]}/{PREFIX[v]} dev {old}" for v in (6, 4)]
        lines = [f"link set {new} up", f"neigh flush dev {new}"]
        own = {v: _address(v, f"{there[v]}/{PREFIX[v]}", new) for v in (4, 6)}
        ways = {v: f"route replace default via {router[v]} dev {new}" for v in (4, 6)}
        if dark_ms:
            with self._batch_of(host) as tell:
                tell(leaving)
                end = time.monotonic() + dark_ms / 1000
                self._leave_link(host, gone, there)
                time.sleep(max(0.0, end - time.monotonic()))
                tell([*lines, own[4], ways[4], own[6], ways[6]])
            return None
        self._leave_link(host, gone, there)
        lines += leaving
        if not late_ms:
            lines += [own[4], ways[4], own[6], ways[6]]
            run([*self.enter(host), "ip", "-batch", "-"], text="\n".join(lines) + "\n")
            return None
        lines += [f"addr replace fe80::10/64 dev {new} nodad", f"{ways[6]} onlink"]
        wait = f"sleep {late_ms / 2000}"
        steps = [_batch(lines), "echo left", wait, _batch([own[6]]), wait, _batch([own[4], ways[4]])]
        words = [*self.enter(host), "sh", "-ec", "\n".join(steps)]
        arriving = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert arriving.stdout is not None
        if arriving.stdout.readline() != "left\n":
            raise KernelError(f"{host} could not leave its access network")
        return arriving

    @contextlib.contextmanager
    def _batch_of(self, host: str) -> Iterator[Callable[[Sequence[str]], None]]:
        """Has iproute2 do lines at once, by one process that has started already. Raises KernelError."""
        words = [*self.enter(host), "ip", "-batch", "-"]
        with subprocess.Popen(words, stdin=subprocess.PIPE, text=True) as batch:
            assert batch.stdin is not None
            told = batch.stdin

            def tell(lines: Sequence[str]) -> None:
                told.write("\n".join(lines) + "\n")
                told.flush()

            yield tell
        if batch.returncode:
            raise KernelError(f"{' '.join(words)}: exit {batch.returncode}")

    def _leave_link(self, host: str, gone: Mapping[int, str], there: Mapping[int, str]) -> None:
        """Nobody on the new link knows another, as where a mobile node comes for the first time; and what is
        under way by the old one does not arrive, as where its radio is elsewhere."""
        left, reached = LINKS[host] if gone is not AWAY else reversed(LINKS[host])
        core = [f"neigh flush dev {reached}"]
        core += [f"route del blackhole {there[v]}/{HOST_BITS[v]}" for v in (4, 6)]
        core += [f"route replace blackhole {gone[v]}/{HOST_BITS[v]}" for v in (4, 6)]
        words = ["ip", "-n", self.namespace("core"), "-force", "-batch", "-"]
        run(words, text="\n".join(core) + "\n", check=False)
        run(["tc", "-n", self.namespace("core"), "qdisc", "del", "dev", left, "root"], check=False)
        self._delay_by("core", left, self.delay_ms)

    def unplug(self) -> None:
        """Nothing is under way to mn by its second access network, which it has left."""
        run(["ip", "-n", self.namespace("mn"), "link", "set", "eth1", "down"])

    @contextlib.contextmanager
    def mute_router(self) -> Iterator[None]:
        """The core does not ask the second access network who is there: mn makes itself known by sending.

        So it is where nobody sends to a mobile node before that has sent something itself.
        """
        files = "/proc/sys/net/ipv[46]/neigh/to-mn-new/mcast_solicit"
        try:
            run([*self.enter("core"), "sh", "-c", f"for file in {files}; do echo 0 > $file; done"])
            yield
        finally:
            run([*self.enter("core"), "sh", "-c", f"for file in {files}; do echo 3 > $file; done"])

    def announce(self, family: int | None) -> None:
        """Has charon at psg tell mobile nodes `ANNOUNCED` of that IP version; None: of neither.

        psg has the address, too, on an interface that goes nowhere: charon tells all addresses it finds, and
        the core routes this one to nsg. A bridge without ports is such an interface on every kernel.
        """
        psg, nsg = ["ip", "-n", self.namespace("psg")], ["ip", "-n", self.namespace("nsg")]
        run([*psg, "link", "del", "handover"], check=False)
        for version, address in ANNOUNCED.items():
            run([*nsg, "addr", "del", f"{address}/{PREFIX[version]}", "dev", "eth0"], check=False)
        if family is None:
            return
        run([*self.enter("psg"), "sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore"])
        lines = ["link add handover type bridge", "link set handover up"]
        lines.append(_address(family, f"{ANNOUNCED[family]}/{HOST_BITS[family]}", "handover"))
        run([*psg, "-batch", "-"], text="\n".join(lines) + "\n")
        lines = [_address(v, f"{ANNOUNCED[v]}/{PREFIX[v]}", "eth0") for v in (4, 6)]
        run([*nsg, "-batch", "-"], text="\n".join(lines) + "\n")

    def translate(self, *, on: bool) -> None:
        """Puts both mobile nodes behind one IPv4 address, with ports that anybody can reach, or ends that."""
        core = self.enter("core")
        run([*core, "nft", "delete table ip nat"], check=False)
        run([*core, "ip", "addr", "del", f"{NAT}/32", "dev", "lo"], check=False)
        run([*core, sys.executable, "-I", "-S", lab_untrack.__file__], check=False)
        if not on:
            return
        run([*core, "ip", "addr", "add", f"{NAT}/32", "dev", "lo"])
        rules = ["add table ip nat"]
        rules.append("add chain ip nat post { type nat hook postrouting priority 100; }")
        rules.append("add chain ip nat pre { type nat hook prerouting priority -100; }")
        # what gateways send each other with this source has passed the NAT already (ESP under old SPIs)
        rules.append("add chain ip nat again { type filter hook prerouting priority -300; }")
        rules.append(f"add rule ip nat again ip saddr {NAT} notrack")
        for host, port in NAT_PORT.items():
            own = OUTER[host][4]
            rules.append(f"add rule ip nat post ip saddr {own} udp sport 4500 snat to {NAT}:{port}")
            rules.append(f"add rule ip nat post ip saddr {own} ip daddr 10.2.0.0/16 snat to {NAT}")
            rules.append(f"add rule ip nat pre ip daddr {NAT} udp dport {port} dnat to {own}:4500")
        run([*core, "nft", "-f", "-"], text="\n".join(rules) + "\n")

    def route_inside(self, *, static: bool) -> None:
        """Gives the server the routes of `POOL`, or takes them away for a routing daemon to make its own.

        What was announced for a mobile node goes in both cases. Never raises.
        """
        gone = [f"route flush exact {INNER['mn'][v]}/{HOST_BITS[v]}" for v in (4, 6)]
        verb = "replace" if static else "del"
        wanted = [f"route {verb} {POOL[v]} via {INNER['psg'][v]}" for v in (4, 6)]
        for version, lines in ((4, (gone[0], wanted[0])), (6, (gone[1], wanted[1]))):
            words = ["ip", f"-{version}", "-force", "-batch", "-"]
            run([*self.enter("srv"), *words], text="\n".join(lines) + "\n", check=False)

    def cut(self, one: str, other: str) -> None:
        """The core forwards nothing more between two hosts, whichever links they use. Raises KernelError."""
        self.drop(LINKS[one], LINKS[other], both=True, table="cut")

    def mend(self) -> None:
        """Undoes every `cut`."""
        run([*self.enter("core"), "nft", "delete table inet cut"], check=False)

    def drop(self, source: Sequence[str], target: Sequence[str], *, both: bool, table: str = "fault") -> None:
        """The core drops what comes by one of its links and goes by another one. Raises KernelError."""
        sides = ["{ " + ", ".join(f'"{device}"' for device in side) + " }" for side in (source, target)]
        rules = [f"add table inet {table}"]
        rules.append(f"add chain inet {table} f {{ type filter hook forward priority 0; }}")
        ways = (sides, sides[::-1])[: 1 + both]
        rules += [f"add rule inet {table} f iifname {a} oifname {b} drop" for a, b in ways]
        run([*self.enter("core"), "nft", "-f", "-"], text="\n".join(rules) + "\n")

    def let_pass(self) -> None:
        """Undoes every `drop`."""
        run([*self.enter("core"), "nft", "delete table inet fault"], check=False)

    def silence(self, host: str) -> None:
        """Nothing leaves a gateway by any of its links, or comes to it. Raises KernelError."""
        for owner, device in self._ends(host):
            words = ["tc", "-n", self.namespace(owner), "qdisc", "replace", "dev", device, "root", "netem"]
            run([*words, "loss", "100%"])

    def hear(self, host: str) -> None:
        """Undoes `silence`. Never raises."""
        for owner, device in self._ends(host):
            run(["tc", "-n", self.namespace(owner), "qdisc", "del", "dev", device, "root"], check=False)
        self._delay()

    @staticmethod
    def _ends(host: str) -> list[tuple[str, str]]:
        """Both ends of each link of a gateway, by host and device."""
        other = next(gateway for gateway in GATEWAYS if gateway != host)
        far = [("core", f"to-{host}"), ("core", f"to-{host}-{other}")]
        far += [("srv", f"to-{host}"), ("srv", f"to-{host}-{other}")]
        return [*((host, device) for device in ("eth0", "eth1", "lan0", "lan1")), *far]

    def pids(self, host: str) -> list[int]:
        done = run(["ip", "netns", "pids", self.namespace(host)], check=False)
        return [int(word) for word in done.stdout.split()]

    def down(self) -> None:
        """Ends every process inside, then the namespaces. Never raises; safe on a half-built lab."""
        present = [host for host in HOSTS if Path("/run/netns", self.namespace(host)).exists()]
        for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 2.0)):
            alive = [pid for host in present for pid in self.pids(host)]
            for pid in alive:
                _kill(pid, number)
            limit = time.monotonic() + patience
            while alive and time.monotonic() < limit:
                time.sleep(0.05)
                alive = [pid for pid in alive if _alive(pid)]
            if not alive:
                break
        for host in present:
            run(["ip", "netns", "del", self.namespace(host)], check=False)


_SYSCTLS = """
router=$1
put() { echo "$1" > "/proc/sys/net/$2" 2>/dev/null || true; }
for d in all default; do
  put 0 ipv4/conf/$d/rp_filter; put 0 ipv4/conf/$d/send_redirects; put 0 ipv4/conf/$d/accept_redirects
  put 1 ipv4/conf/$d/accept_local
  put 0 ipv6/conf/$d/accept_ra; put 0 ipv6/conf/$d/accept_dad; put 0 ipv6/conf/$d/accept_redirects
  put $router ipv6/conf/$d/forwarding
done
for d in /proc/sys/net/ipv6/conf/*; do put 0 ipv6/conf/${d##*/}/accept_dad; done
for d in /proc/sys/net/ipv4/conf/*; do
  d=${d##*/}; put 0 ipv4/conf/$d/rp_filter; put 0 ipv4/conf/$d/send_redirects
done
put 1 ipv4/conf/lan1/arp_ignore; put 1 ipv4/conf/all/promote_secondaries; put $router ipv4/ip_forward
put 0 ipv4/icmp_ratelimit; put 0 ipv6/icmp/ratelimit
"""


def _address(version: int, address: str, device: str) -> str:
    return f"addr add {address} dev {device}" + (" nodad" if version == 6 else "")


def _batch(lines: Sequence[str]) -> str:
    """A shell command that has iproute2 do all of this."""
    return "ip -batch - <<'E'\n" + "\n".join(lines) + "\nE"


def _to_other(host: str) -> list[str]:
    """The links of a gateway that carry what it sends to the other one. lan1 does not answer for lan0."""
    other = next(gateway for gateway in GATEWAYS if gateway != host)
    lines = ["link set eth1 up", "link set lan1 up"]
    for version, router in ((4, CORE[host][4]), (6, BETWEEN)):
        way = f"via {router} dev eth1 onlink src {OUTER[host][version]}"
        lines.append(f"route add {OUTER[other][version]}/{HOST_BITS[version]} {way}")
        way = f"dev lan1 src {INNER[host][version]}"
        lines.append(f"route add {INNER[other][version]}/{HOST_BITS[version]} {way}")
    return lines


def _default(router: str) -> str:
    return f"route add default via {router} dev eth0"


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"


def has_kernel_esp() -> bool:
    """Whether this kernel can hold an ESP SA: tried, in a namespace that is thrown away."""
    name = f"ikl-probe-{os.getpid()}"
    if run(["ip", "netns", "add", name], check=False).returncode != 0:
        return False
    try:
        words = [
            "xfrm",
            "state",
            "add",
            "src",
            "192.0.2.1",
            "dst",
            "192.0.2.2",
            "proto",
            "esp",
            "spi",
            "0x1000",
        ]
        words += ["mode", "tunnel", "aead", "rfc4106(gcm(aes))", "0x" + "00" * 20, "128"]
        return run(["ip", "-n", name, *words], check=False).returncode == 0
    finally:
        run(["ip", "netns", "del", name], check=False)
