"""One lab with real charons and user-space ESP, kept up for all tests of a run.

A test gets a `World` in which nothing is set up, brings its tunnel up with `up`, and asks what both ends
say of it. Addresses, connections and credentials are the lab's: the mobile node `mn` has the connections
`psg` and `nsg`, both gateways have `mn`, the children are `net` and `net2`.

With user-space ESP no charon can change the addresses of a CHILD_SA: the mobile node rekeys it as soon as
it has answered UPDATE_SA_ADDRESSES. `settle` waits for that; its exchange is

    MN -> gateway  CREATE_CHILD_SA   N(REKEY_SA), SA, Ni, TSi, TSr    sent again until charon is active
    gateway -> MN  CREATE_CHILD_SA   SA, Nr, TSi, TSr
    MN -> gateway  INFORMATIONAL     D(old CHILD_SA), answered by the gateway's D
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from ikectx.errors import CharonError
from ikectx_cli.lab.config import Tunnel
from ikectx_cli.lab.hosts import Lab, agent_file
from ikectx_cli.lab.measure import Reports
from ikectx_cli.lab.net import CHARONS, GATEWAYS, INNER, OUTER, SECOND, SECOND_NET
from vici_bridge.vici.client import ControlClient, RemoteError, json_of

PATIENCE = 12.0
"""Seconds for something that charons do by themselves."""

TUNING = """
charon-systemd {
  # soon again, and for about a minute: the moments in which nobody answers are what is tested here
  retransmit_timeout = 0.4
  retransmit_base = 1.2
  retransmit_limit = 1
  retransmit_tries = 50
}
"""
KEYS_IN_LOG = "charon-systemd { filelog { log { ike = 4\n chd = 4 } } }\n"
"""charon logs every key it derives: what an agent derives, and what nSG's charon makes of it, is compared."""
LOGGED = {
    "skeyseed": "SKEYSEED",
    "sk_d": "Sk_d secret",
    "sk_ai": "Sk_ai secret",
    "sk_ar": "Sk_ar secret",
    "sk_ei": "Sk_ei secret",
    "sk_er": "Sk_er secret",
    "sk_pi": "Sk_pi secret",
    "sk_pr": "Sk_pr secret",
    "encr_i": "encryption initiator key",
    "encr_r": "encryption responder key",
    "integ_i": "integrity initiator key",
    "integ_r": "integrity responder key",
}
"""What charon (5.9.8 to 6.0.6) calls the keys that `ikectx show --secrets` shows."""
_OCTETS = re.compile(r"\]\s+\d+: ([0-9A-F]{2} )+| => \d+ bytes @")
"""Lines of charon's log that show octets of keys."""


@dataclass(frozen=True, slots=True)
class Done:
    """How a command of the product ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def report(self) -> dict[str, Any]:
        """The one report of a transfer."""
        (report,) = self.json["reports"]
        assert isinstance(report, dict)
        return report


@dataclass(slots=True)
class World:
    """The lab, and what tests ask of it."""

    lab: Lab
    tunnel: Tunnel = field(default_factory=lambda: Tunnel(libipsec=True))
    broken: bool = False
    """The daemons must be started anew before the next test."""
    marks: dict[Path, int] = field(default_factory=dict)

    # -- set-up -----------------------------------------------------------------------------

    def build(self) -> None:
        self.lab.up(self.tunnel)
        self.tune()
        # charon's user-space ESP wants an address of its own in the selectors of its side
        for number, host in enumerate(GATEWAYS, 2):
            for network in SECOND_NET.values():
                self.must(host, "ip", "address", "add", str(ip_network(network)[number]), "dev", "lo")

    def inner_address(self, verb: str) -> None:
        """Put the mobile node's inner address on it (add), for tunnels without virtual IP, or take it off."""
        for inner in INNER["mn"].values():
            self.lab.command("mn", ["ip", "address", verb, inner, "dev", "lo"])

    def tune(self, hosts: tuple[str, ...] = CHARONS, times: str = TUNING) -> None:
        """Short retransmission times, or others; keys in the log."""
        for host in hosts:
            # a file beside strongswan.conf: a daemon whose own has changed starts anew when it is reloaded
            (self.lab.work / host / "more.conf").write_text(times + KEYS_IN_LOG)
            self.must(host, "swanctl", "--reload-settings")

    def clean(self) -> None:
        """Nothing of the test before is left: no SA, no rule, no open transfer, every daemon up."""
        self.unblock()
        self.tunnel = Tunnel(libipsec=True)
        self.inner_address("del")
        stopped = any(self.lab.started.get((host, "agent")) is None for host in GATEWAYS)
        if not self.broken and not stopped:
            for host in CHARONS:
                self.forget(host)
            with contextlib.suppress(AssertionError):
                until(lambda: self.idle("psg") and self.idle("nsg"), "both agents idle", 5.0)
                for host in GATEWAYS:
                    self.forget_departures(host)
                # what daemons say while they forget the test before is not of the next one
                self.marks = {path: path.stat().st_size for path in self._logs()}
                return
        self.anew(Tunnel(libipsec=True))
        self.broken = False

    def anew(self, tunnel: Tunnel) -> None:
        """Every daemon starts anew with that tunnel's configuration; no SA is up."""
        self.lab.configure(tunnel)
        self.marks = {}  # logs begin anew with the daemons
        self.tune()

    def reload(self, tunnel: Tunnel, overrides: Mapping[str, str] | None = None) -> None:
        """That tunnel's configuration is loaded; daemons that cannot load theirs start anew."""
        before = dict(self.lab.started)
        self.lab.reload(tunnel, overrides)
        now = self.lab.started.items()
        anew = {host for (host, name), daemon in now if before.get((host, name)) != daemon}
        # their logs begin anew with the daemons
        self.marks = {path: mark for path, mark in self.marks.items() if path.parent.name not in anew}

    def forget(self, host: str) -> None:
        """charon drops its SAs at once, whatever the other side answers."""
        for sa in self.lab.list_sas(host):
            with contextlib.suppress(CharonError):
                self.lab.vici(host).request(
                    "terminate", {"ike-id": sa["uniqueid"], "force": "yes", "timeout": "-1"}
                )
        until(lambda: not self.lab.list_sas(host), f"{host} has no SA")

    def forget_departures(self, host: str) -> None:
        """The agent knows of no SA that left. One that it knows gets its detour again, some time after the
        mobile node has connected to the other gateway, which is when that gateway tells of it."""
        for row in self.status(host)["detours"]:
            with (
                contextlib.suppress(RemoteError),  # it has gone since
                ControlClient(f"{self.lab.work}/{host}/ikectx.vici", timeout=10.0) as agent,
            ):
                agent.request("detours", {"end": ":".join(row["sa"]), "unblock": "yes"})

    def up(
        self, gateway: str = "psg", *, overrides: Mapping[str, str] | None = None, **tunnel: Any
    ) -> dict[str, Any]:
        """The tunnel of these `Tunnel` fields, set up at a gateway; the gateway's IKE_SA.

        `overrides`: text of swanctl.conf by host, which wins.
        """
        self.tunnel = Tunnel(libipsec=True, **tunnel)
        if not self.tunnel.vip:
            self.inner_address("add")
        self.reload(self.tunnel, overrides)
        self.lab.connect(gateway)
        self.ping()
        if (gateway, "agent") in self.lab.started:
            self.recorded(gateway)
        return self.serves(gateway)

    def tunnel_with(self, **changes: Any) -> Tunnel:
        """The present tunnel, with some fields changed."""
        return replace(self.tunnel, **changes)

    # -- commands ---------------------------------------------------------------------------

    def must(self, host: str, *argv: str) -> str:
        done = self.lab.command(host, argv)
        assert done.returncode == 0, f"{host}: {' '.join(argv)}: {done.stdout}{done.stderr}"
        return done.stdout

    def ikectx(self, host: str, *argv: str) -> Done:
        done = self.lab.command(host, ["ikectx", *argv], timeout=100.0)
        return Done(done.returncode, done.stdout, done.stderr)

    def transfer(self, source: str, to: str, *argv: str) -> Done:
        """`ikectx transfer`, however it ends."""
        return self.ikectx(source, "transfer", "--to", to, "--json", *argv)

    @contextlib.contextmanager
    def states(self, host: str) -> Iterator[list[str]]:
        """The states of transfers that a gateway's agent tells meanwhile."""
        reports = Reports(self.lab, host)
        reports.start()
        try:
            yield reports.states
        finally:
            reports.stop()

    def begin(self, host: str, *argv: str) -> subprocess.Popen[str]:
        """`ikectx` in the background."""
        return subprocess.Popen(
            [*self.lab.net.enter(host), "ikectx", *argv],
            env=self.lab.environment(host),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def end(work: subprocess.Popen[str]) -> Done:
        """What came of `begin`."""
        out, err = work.communicate(timeout=60)
        return Done(work.returncode, out, err)

    def move(self, source: str, to: str, *argv: str) -> dict[str, Any]:
        """A transfer that must succeed with the IKE_SA unchanged; its report. Does not wait for traffic."""
        before, keys = self.one("mn"), self.keys(source)
        assert keys
        done = self.transfer(source, to, *argv)
        assert done.code == 0, f"{done.out}\n{done.err}"
        report = done.report
        assert report["result"] == "moved", report
        assert self.lab.list_sas(source) == []
        after, there = self.one("mn"), self.one(to)
        assert spis(after) == spis(before) == spis(there)
        assert after["remote-host"] == OUTER[to][self.tunnel.family]
        assert there["state"] == "ESTABLISHED"
        for host in ("mn", to):
            # both ends derived them themselves; at nSG charon derived them from what it was given
            logged = self.logged(host)
            lacking = [name for name, key in keys if key not in logged.get(LOGGED[name], ())]
            assert not lacking, f"{host} has other keys: {lacking}"
        return report

    def moved(self, **tunnel: Any) -> dict[str, Any]:
        """The tunnel of these fields, set up at psg and then moved to nsg; the IKE_SA as it was at psg."""
        sa = self.up(**tunnel)
        self.move("psg", "nsg")
        self.settle("nsg")
        return sa

    def lives_through_a_move(self, end: str = "mn") -> None:
        """psg -> nsg with the SA that is up, every exchange there, and its end from one side."""
        self.agree("psg")
        self.move("psg", "nsg")
        self.settle("nsg")
        self.talks("nsg")
        self.ends(end, "nsg")

    def settle(self, gateway: str) -> None:
        """The mobile node's children are anew at that gateway, and carry packets."""
        self.agree(gateway)
        self.ping()
        self.serves(gateway)

    # -- what charons do ----------------------------------------------------------------------

    def one(self, host: str) -> dict[str, Any]:
        """Its only IKE_SA."""
        found = self.lab.list_sas(host)
        assert len(found) == 1, f"{host} has {len(found)} IKE_SAs: {found}"
        return found[0]

    def serves(self, gateway: str) -> dict[str, Any]:
        """Only that gateway has the SA, it is the mobile node's, and it is up; its IKE_SA."""
        other = "nsg" if gateway == "psg" else "psg"
        assert self.lab.list_sas(other) == [], f"{other} has an SA as well"
        here, mobile = self.one(gateway), self.one("mn")
        assert spis(here) == spis(mobile)
        assert (here["state"], mobile["state"]) == ("ESTABLISHED", "ESTABLISHED")
        assert mobile["remote-host"] == OUTER[gateway][self.tunnel.family]
        return here

    def children(self, host: str) -> dict[str, tuple[str, str]]:
        """(inbound, outbound) SPI of each installed child, by name, at a host with one IKE_SA."""
        return {
            child["name"]: (child["spi-in"], child["spi-out"])
            for child in self.one(host)["child-sas"].values()
            if child["state"] == "INSTALLED"
        }

    def agree(self, gateway: str) -> None:
        """Wait until both ends have the same children, and nothing under way."""

        def same() -> bool:
            here, mobile = self.children(gateway), self.children("mn")
            idle = not tasks(self.one(gateway)) and not tasks(self.one("mn"))
            crossed = {name: (spi_out, spi_in) for name, (spi_in, spi_out) in mobile.items()}
            # rekeyed by the mobile node: a child installed twice at one end is on its way out
            return idle and here == crossed and len(here) == self.tunnel.children

        until(same, f"{gateway} and the mobile node agree on their children")

    def rekey_ike(self, host: str, gateway: str) -> None:
        """An IKE rekey begun by `host`, done when both ends have the new SPIs and no old IKE_SA.

        CREATE_CHILD_SA SA, N, KE both ways, then INFORMATIONAL D of the old IKE_SA.
        """
        old = spis(self.one(host))
        self.lab.vici(host).rekey(ike_id=int(self.one(host)["uniqueid"]))

        def new() -> bool:
            both = self.lab.list_sas(gateway), self.lab.list_sas("mn")
            return (
                all(len(found) == 1 for found in both)
                and spis(both[0][0]) == spis(both[1][0]) != old
                and not any(tasks(found[0]) for found in both)
            )

        until(new, f"IKE rekey by {host}")

    def rekey_child(self, host: str, gateway: str, child: str = "net") -> None:
        """A child rekey begun by `host`: CREATE_CHILD_SA N(REKEY_SA), then INFORMATIONAL D of the old one."""
        old = self.children(host)[child]
        ids = [
            int(one["uniqueid"])
            for one in self.one(host)["child-sas"].values()
            if (one["spi-in"], one["spi-out"]) == old
        ]
        self.lab.vici(host).rekey(child_id=ids[0])
        until(lambda: self.children(host).get(child, old) != old, f"child rekey by {host}")
        self.agree(gateway)

    def begin_rekey(self, host: str) -> None:
        """`host` begins to rekey its only child; it may not get through."""
        (child,) = (one for one in self.one(host)["child-sas"].values() if one["state"] == "INSTALLED")
        self.lab.vici(host).rekey(child_id=int(child["uniqueid"]))
        until(lambda: tasks(self.one(host)), f"{host} has begun a rekey")

    def talks(self, gateway: str) -> None:
        """Every exchange works from both sides, and traffic flows."""
        for host in ("mn", gateway):
            self.rekey_child(host, gateway)
            self.rekey_ike(host, gateway)
        self.ping()
        self.serves(gateway)

    def ends(self, host: str, gateway: str) -> None:
        """`host` deletes the IKE_SA (INFORMATIONAL D, answered); nothing is left at either end."""
        self.lab.terminate(host)
        for each in ("mn", gateway):
            until(lambda each=each: not self.lab.list_sas(each), f"{each} has no SA")
        self.nothing_left()

    def nothing_left(self) -> None:
        """No SA, no nftables rule, no route of ours, nothing in the agents' records."""
        for host in CHARONS:
            assert self.lab.list_sas(host) == []
            # charon lists an SA no more before it has taken its routes away and told the agent
            until(lambda host=host: not self.muted(host), f"{host} mutes nothing")  # type: ignore[misc]
            until(lambda host=host: not self.routed(host), f"{host} has no route of an SA")  # type: ignore[misc]
        for host in GATEWAYS:
            until(lambda host=host: self.status(host)["sas"] == 0, f"{host}'s record is empty")
            assert self.idle(host)

    def routed(self, host: str) -> bool:
        """Is there a route of charon's for the mobile node's inner address?"""
        routes = self.must(host, "ip", "route", "show", "table", "all", "dev", "ipsec0")
        return INNER["mn"][self.tunnel.inner] in routes

    # -- keys ------------------------------------------------------------------------------------

    def context(self, host: str, *, secrets: bool = False) -> Any:
        """What `ikectx show` shows of the only SA."""
        with ControlClient(f"{self.lab.work}/{host}/ikectx.vici", timeout=10.0) as agent:
            return json_of(agent.request("show-context", {"secrets": "yes" if secrets else "no"}))

    def keys(self, host: str) -> list[tuple[str, str]]:
        """(name, hexadecimal) of all keys that the agent derives for the IKE_SA and its children."""
        context = self.context(host, secrets=True)
        parts = [context["generations"][-1], *context["children"]]
        return [(name, key) for part in parts for name, key in part["keys"].items() if key]

    def logged(self, host: str) -> dict[str, list[str]]:
        """Octets by their name that charon logged during this test, in hexadecimal."""
        found: dict[str, list[str]] = {}
        name = ""
        for line in self.log(host).splitlines():
            if title := re.search(r"\] (?:  )?(\S.*) => \d+ bytes @", line):
                name = title[1]
                found.setdefault(name, []).append("")
            elif name and (octets := re.search(r"\]\s+\d+: ((?:[0-9A-F]{2} )+) ", line)):
                found[name][-1] += octets[1].replace(" ", "").lower()
            else:
                name = ""
        return found

    # -- the agents -----------------------------------------------------------------------------

    def restart(self, host: str, *, kill: bool = False) -> None:
        """The agent ends (`kill`: without knowing), and begins anew; its charon goes on."""
        with self.without_agent(host, kill=kill):
            pass

    @contextlib.contextmanager
    def without_agent(self, host: str, *, kill: bool = False) -> Iterator[None]:
        """As `restart`, with something done in between."""
        self.lab.stop(host, "agent", kill=kill)
        # a killed agent leaves its socket behind: the new one would replace it, but must be waited for
        (self.lab.work / host / "ikectx.vici").unlink(missing_ok=True)
        try:
            yield
        finally:
            self.lab.start_agent(host)
        until(lambda: self.status(host)["charon"]["reachable"], f"{host}'s agent has found charon")

    @contextlib.contextmanager
    def agent_with(self, host: str, old: str, new: str) -> Iterator[None]:
        """Meanwhile the agent of a host runs with something else in its configuration."""
        config = agent_file(self.lab.work, host)
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new))
        try:
            self.restart(host)
            yield
        finally:
            config.write_text(text)
            self.restart(host)

    def edit(self, host: str, old: str, new: str) -> None:
        """Change swanctl.conf of a host and load it: until the next `up`, which writes it anew."""
        path = self.lab.work / host / "swanctl.conf"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        self.must(host, "swanctl", "--load-all")

    def status(self, host: str) -> Any:
        with ControlClient(f"{self.lab.work}/{host}/ikectx.vici", timeout=10.0) as agent:
            return json_of(agent.request("status"))

    def recorded(self, host: str) -> None:
        """Wait until its agent has heard of every SA there is; killed before, it would not know them."""
        until(
            lambda: self.status(host)["sas"] == len(self.lab.list_sas(host)), f"{host} has recorded its SAs"
        )

    def idle(self, host: str) -> bool:
        """No transfer is open there."""
        return not self.status(host)["transfers"]

    def muted(self, host: str) -> bool:
        """Is an SA's IKE kept from the wire there? (The agent's nftables table alone mutes nothing.)"""
        return "elements = {" in self.lab.command(host, ["nft", "list", "table", "inet", "ikectx"]).stdout

    def well(self) -> None:
        """No daemon has ended by itself, and no agent has met what nobody thought of."""
        ended = {pair: process.poll() for pair, process in self.lab.started.items()}
        assert not any(code is not None for code in ended.values()), f"ended by itself: {ended}"
        for path in self._logs():
            if path.name == "agent.out":
                _, _, trouble = self.log(path.parent.name, path.name).partition("Traceback")
                assert not trouble, f"{path.parent.name}: Traceback{trouble}"

    # -- the net ------------------------------------------------------------------------------

    def ping(self, child: int = 1, within: float = PATIENCE) -> None:
        """The server answers the mobile node through the tunnel."""
        inner = self.tunnel.inner
        far = INNER["srv"][inner] if child == 1 else SECOND[inner]
        words = ["ping", "-c", "1", "-W", "1", "-I", INNER["mn"][inner], far]
        until(lambda: self.lab.command("mn", words).returncode == 0, f"ping to {far}", within)

    def block(self, source: str, destination: str) -> None:
        """The core router drops IKE and ESP from one host to another."""
        rules = "add table inet test\nadd chain inet test way { type filter hook forward priority 0; }\n"
        for version in (4, 6):
            word = "ip" if version == 4 else "ip6"
            one, two = OUTER[source][version], OUTER[destination][version]
            rules += f"add rule inet test way {word} saddr {one} {word} daddr {two} meta l4proto udp drop\n"
        self.must("core", "nft", rules)

    def unblock(self) -> None:
        self.must("core", "nft", "add table inet test; delete table inet test")

    @contextlib.contextmanager
    def blocked(self, source: str, destination: str) -> Iterator[None]:
        self.block(source, destination)
        try:
            yield
        finally:
            self.unblock()

    # -- logs -----------------------------------------------------------------------------------

    def _logs(self) -> list[Path]:
        return [
            path
            for host in CHARONS
            for path in (self.lab.work / host / "agent.out", self.lab.work / host / "charon.log")
            if path.exists()
        ]

    def log(self, host: str, name: str = "charon.log") -> str:
        """What was logged since the test began."""
        path = self.lab.work / host / name
        with path.open("rb") as file:
            file.seek(self.marks.get(path, 0))
            return file.read().decode(errors="replace")

    def story(self) -> Iterator[tuple[str, str]]:
        """The ends of all logs of this test, without key material."""
        for path in self._logs():
            lines = self.log(path.parent.name, path.name).splitlines()
            shown = [line for line in lines if not _OCTETS.search(line)]
            yield f"{path.parent.name}/{path.name}", "\n".join(shown[-50:])


def spis(sa: Mapping[str, Any]) -> tuple[str, str]:
    return str(sa["initiator-spi"]), str(sa["responder-spi"])


def tasks(sa: Mapping[str, Any]) -> list[str]:
    kinds = ("tasks-active", "tasks-queued", "tasks-passive")
    return [str(task) for kind in kinds for task in sa.get(kind, ())]


def address(host: str, version: int = 4) -> str:
    return str(ip_address(OUTER[host][version]))


def until(true: Callable[[], object], what: str, within: float = PATIENCE, *, pause: float = 0.05) -> None:
    """Wait for it, looking every `pause` s. An AssertionError in it counts as "not yet"."""
    limit = time.monotonic() + within
    while True:
        trouble = ""
        try:
            if true():
                return
        except AssertionError as error:
            trouble = f" ({error})"
        assert time.monotonic() < limit, f"not within {within:g} s: {what}{trouble}"
        time.sleep(pause)
