"""A running lab: its folder, its namespaces, its daemons, and commands on its hosts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ikectx import trace
from ikectx.errors import CharonError, IkectxError, KernelError, StateError, UsageError
from vici_bridge.vici.client import CharonVici, ControlClient, json_of

from . import announce as lab_announce
from . import bird as lab_bird
from . import daemons as lab_daemons
from . import drain as lab_drain
from . import inject as lab_inject
from .boot import virtual_time
from .config import Tunnel, write_all
from .daemons import as_its_own_machine, charon_of
from .leftovers import DETOUR, of_sas
from .net import GATEWAYS, HOST_BITS, HOSTS, INNER, MOBILES, POOL, Net, load_modules, run
from .state import read_state, states, write_state
from .waiting import began

DEFAULT_NAME = "default"
ROOT = Path("/tmp")  # noqa: S108  a tmpfs or an overlay on one, short enough for a unix socket's path
LOGS = ("charon.log", "agent.out", "updown.log")
"""Appended to by daemons and by the lab's updown script, in a host's folder."""

TRACE = "trace.jsonl"
"""In a host's folder, what its agent notes where `Lab.traced` is."""

CLEARED = 20.0
"""Seconds in which nothing may be left of SAs that were deleted."""

PATIENCE = 90.0
"""Seconds to wait for a route. An emulated machine needs ten of them, a real one a tenth of one."""


@dataclass(slots=True)
class Lab:
    """One lab. `work` is its folder; `started` holds the daemons by (host, name)."""

    name: str
    work: Path
    net: Net
    tunnel: Tunnel = field(default_factory=Tunnel)
    agents: bool = True
    keep: bool = False
    traced: bool = False
    """Do the agents note when each of their steps begins and ends (`ikectx.trace`)?"""
    warnings: list[str] = field(default_factory=list)
    started: dict[tuple[str, str], subprocess.Popen[bytes]] = field(default_factory=dict)
    _vici: dict[str, CharonVici] = field(default_factory=dict)
    _extras: tuple[bool, int | None] | None = None
    """What the network has beside itself: NAT, the announced address. None: not known."""

    # -- life -------------------------------------------------------------------------------

    @classmethod
    def new(
        cls,
        name: str | None = None,
        *,
        delay_ms: float = 20.0,
        gateway_delay_ms: float = 1.0,
        traced: bool = False,
    ) -> Lab:
        """A lab that is not up yet; without a name it gets one. Raises StateError when it exists."""
        name = name or secrets.token_hex(3)
        work = ROOT / f"ikl-{name}"
        try:
            work.mkdir(mode=0o755)
        except FileExistsError:
            raise StateError(f"a lab named {name} is there already", hint="ikectx lab down") from None
        return cls(name, work, Net(f"ikl-{name}", delay_ms, gateway_delay_ms), traced=traced)

    @classmethod
    def find(cls, name: str) -> Lab:
        """The lab of that name that this user brought up. Raises UsageError."""
        state, work = read_state(ROOT / f"ikl-{name}"), ROOT / f"ikl-{name}"
        net = Net(f"ikl-{name}", state["delay_ms"], state["gateway_delay_ms"])
        return cls(name, work, net, state["tunnel"], state["agents"])

    def up(
        self,
        tunnel: Tunnel,
        *,
        agents: bool = True,
        overrides: Mapping[str, str] | None = None,
        keep: bool = False,
    ) -> None:
        """Namespaces, announcer, then on each gateway the agent before its charon."""
        self.keep = keep
        load_modules()
        self.warnings += self.net.up()
        self._save(tunnel, agents)
        for host, address in (("srv", INNER["srv"][4]), ("core", "0.0.0.0")):  # noqa: S104  in a namespace
            words = [sys.executable, "-I", "-S", lab_announce.__file__, address, "5353"]
            self.spawn(host, "announcer", words)
        self.configure(tunnel, agents=agents, overrides=overrides)

    def configure(
        self, tunnel: Tunnel, *, agents: bool = True, overrides: Mapping[str, str] | None = None
    ) -> None:
        """(Re)starts the daemons with another configuration; the network stays as it is."""
        self.stop_daemons()
        self._save(tunnel, agents)
        self._write(tunnel, overrides or {})
        self._start(tunnel.hosts)

    @property
    def agent_hosts(self) -> tuple[str, ...]:
        """The hosts with an agent."""
        return self.tunnel.agents if self.agents else ()

    def _start(self, hosts: Sequence[str]) -> None:
        agents = [host for host in hosts if host in self.agent_hosts]
        for host in agents:
            self.start_agent(host, wait=False)
        for host in agents:
            self.wait_agent(host)
        for host in hosts:
            self.start_daemon(host)
        for host in hosts:
            self.wait_daemon(host)

    def reload(self, tunnel: Tunnel, overrides: Mapping[str, str] | None = None) -> None:
        """Gives running charons another configuration. SAs stay where no daemon of the host starts anew.

        Those start anew that read files of their own which are others now, and daemons of other kinds.
        """
        hosts = dict.fromkeys((*self.tunnel.hosts, *tunnel.hosts))
        others = {*self.tunnel.others, *tunnel.others}
        before = {host: self._own_files(host) for host in hosts}
        self._save(tunnel, self.agents)
        self._write(tunnel, overrides or {})
        anew = [host for host in hosts if host in others or self._own_files(host) != before[host]]
        self.stop_daemons(anew)
        self._start([host for host in tunnel.hosts if host in anew])
        for host in tunnel.charons:
            if host not in anew:
                self._load(host)

    def restore(self) -> None:
        """Puts the network back to what it was; the daemons must be told anew (`reload`, `configure`)."""
        self.net.restore()
        self._extras = None

    def _own_files(self, host: str) -> tuple[str, ...]:
        """What the daemons of a host read once, when they start; nothing where it has none."""
        if host not in self.tunnel.charons:
            return ()
        paths = [self.work / host / "strongswan.conf"]
        if host in self.agent_hosts:
            paths.append(agent_file(self.work, host))
        return tuple(path.read_text() if path.exists() else "" for path in paths)

    def _write(self, tunnel: Tunnel, overrides: Mapping[str, str]) -> None:
        write_all(self.work, tunnel, overrides)
        for host, kind in tunnel.others.items():
            lab_daemons.write(kind, self.work / host, tunnel)
        extras = tunnel.nat, tunnel.family if tunnel.by_packet else None
        if extras != self._extras:
            self.net.translate(on=extras[0])
            self.net.announce(extras[1])
            self._extras = extras
        self.net.route_inside(static=tunnel.inside != "bird")
        self._route(on=tunnel.inside == "bird")
        for host in MOBILES:
            for version, address in INNER[host].items():
                own = not tunnel.vip and tunnel.mode == "tunnel" and tunnel.inner == version
                what = [f"{address}/{HOST_BITS[version]}", "dev", "lo"]
                run([*self.net.enter(host), "ip", "addr", "replace" if own else "del", *what], check=own)

    def _route(self, *, on: bool) -> None:
        """Starts routing daemons inside anew and waits until the server has learned the way; or ends them."""
        for host in lab_bird.HOSTS:
            self.stop(host, "bird")
        if not on:
            return
        if not Path(lab_bird.BIRD).exists():
            raise KernelError(f"{lab_bird.BIRD} is not there", hint="apt-get install bird2")
        for host in lab_bird.HOSTS:
            folder = self.work / host
            folder.mkdir(exist_ok=True)
            (folder / "bird.conf").write_text(lab_bird.config(host))
            words = ["-f", "-c", str(folder / "bird.conf"), "-s", str(folder / "bird.ctl")]
            self.spawn(host, "bird", [lab_bird.BIRD, *words])
        for version, pool in POOL.items():
            limit = time.monotonic() + PATIENCE
            words = ["ip", f"-{version}", "route", "show", "exact", pool]
            while INNER["psg"][version] not in self.command("srv", words).stdout:
                if time.monotonic() > limit:
                    raise KernelError(f"srv: BIRD has learned no way to {pool}", hint=f"see {self.work}/srv")
                time.sleep(0.1)

    def _load(self, host: str) -> None:
        done = self.command(host, ["swanctl", "--load-all"])
        if done.returncode != 0:
            raise CharonError(f"{host}: swanctl --load-all: {(done.stderr or done.stdout).strip()[-400:]}")

    def clear(self) -> str:
        """Deletes every SA and waits until nothing of them is left.

        Returns what stays, or what is not there to begin with; nothing where it is done.
        """
        charons = self.tunnel.charons
        if self.tunnel.others:
            return "not every host has charon"
        wanted = {(host, "charon") for host in charons} | {(host, "agent") for host in self.agent_hosts}
        for host, name in sorted(wanted):
            if (host, name) not in self.started or self.started[host, name].poll() is not None:
                return f"{host} has no {name}"
        limit = time.monotonic() + CLEARED
        try:
            for host in charons:
                for sa in self.list_sas(host):
                    with contextlib.suppress(CharonError):  # it may have gone meanwhile
                        self.vici(host).terminate(ike_id=int(sa["uniqueid"]), force=True, timeout_ms=3000)
            for host in charons:
                self.forget_departures(host)
                while stays := self._of_sas(host):
                    if time.monotonic() > limit:
                        return f"{host} still has {' '.join(stays.split())[:200]}"
                    time.sleep(0.5)
                    self.forget_departures(host)
        except IkectxError as error:
            return str(error)
        return ""

    def forget_departures(self, host: str) -> None:
        """A gateway's agent forgets the SAs that left it, and drops nothing for them any more."""
        if host not in GATEWAYS or host not in self.agent_hosts:
            return
        with self.agent(host) as agent:
            answer = json_of(agent.request("detours"))
            for name in {":".join(row["sa"]) for row in (*answer["detours"], *answer["behind"])}:
                with contextlib.suppress(IkectxError):  # it may have gone meanwhile
                    agent.request("detours", {"end": name, "unblock": "yes"})

    def _of_sas(self, host: str) -> str:
        """See `leftovers.of_sas`."""
        return of_sas(self.net.enter(host))

    def empty_logs(self) -> None:
        """What running daemons have said is gone: a look into a log finds only what comes from now on."""
        for host in self.tunnel.charons:
            for name in LOGS:
                with contextlib.suppress(FileNotFoundError):
                    os.truncate(self.work / host / name, 0)

    def _save(self, tunnel: Tunnel, agents: bool) -> None:
        self.tunnel, self.agents = tunnel, agents
        state = {
            "delay_ms": self.net.delay_ms,
            "gateway_delay_ms": self.net.gateway_delay_ms,
            "agents": agents,
            "tunnel": asdict(tunnel),
            "owner": os.getpid(),
        }
        state["keep"] = self.keep
        write_state(self.work, state)

    def down(self) -> None:
        """Ends and removes everything of this lab. Never raises; may be called twice."""
        self.net.down()
        for process in self.started.values():
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                process.kill()
        self.started.clear()
        for client in self._vici.values():
            client.close()
        shutil.rmtree(self.work, ignore_errors=True)

    # -- daemons ----------------------------------------------------------------------------

    def start_agent(self, host: str, *, wait: bool = True) -> None:
        """Starts a host's agent; before charon, since whoever holds its HA address receives keys."""
        words = ["mobile", "serve"] if host in MOBILES else ["serve"]
        words = [str(self.work / "bin" / "ikectx"), *words, "--config", str(agent_file(self.work, host))]
        self.spawn(host, "agent", [*as_its_own_machine(host), *self.agent_program(host), *words])
        if wait:
            self.wait_agent(host)

    def agent_program(self, host: str) -> list[str]:
        """Words before an agent's command, by which another module than the product's is run."""
        return []

    def wait_agent(self, host: str) -> None:
        self._wait_file(host, "agent", self.work / host / "ikectx.vici")

    def start_daemon(self, host: str) -> None:
        """Starts the IKE daemon of a host; `wait_daemon` waits for it."""
        if host in self.tunnel.others:
            words = lab_daemons.words(self.tunnel.others[host], self.work / host)
            self.spawn(host, self.tunnel.others[host], [*as_its_own_machine(host), *words])
        else:
            self.start_charon(host, wait=False)

    def wait_daemon(self, host: str) -> None:
        """Waits until the IKE daemon of a host can be told something. Raises CharonError."""
        if host in self.tunnel.others:
            kind = self.tunnel.others[host]
            self._wait_file(host, kind, lab_daemons.KINDS[kind].socket(self.work / host))
        else:
            self.wait_charon(host)

    def start_charon(self, host: str, *, wait: bool = True) -> None:
        """Starts a charon with a private /run, for the fixed path of the HA plugin's FIFO, and loads it."""
        # a copy: an AppArmor profile is bound to the installed path and keeps charon out of the folder
        source = charon_of(host)
        binary = self.work / "bin" / f"charon-{host}"
        if not binary.exists():
            if not Path(source).exists():
                raise CharonError(f"{source} is not there", hint="apt-get install charon-systemd")
            shutil.copy2(source, binary)
        (self.work / host / "charon.vici").unlink(missing_ok=True)
        words = [
            *as_its_own_machine(host),
            "unshare",
            "-m",
            "sh",
            "-c",
            'mount -t tmpfs -o mode=755 lab /run && exec "$0"',
            str(binary),
        ]
        if virtual_time():
            drain = self.spawn(
                host, "drain", [sys.executable, "-I", "-S", lab_drain.__file__], stdin=subprocess.PIPE
            )
            assert drain.stdin is not None
            with drain.stdin as polls:
                fcntl.fcntl(polls, fcntl.F_SETPIPE_SZ, lab_drain.PIPE)
                self.spawn(host, "charon", words, stdout=polls.fileno())
        else:
            self.spawn(host, "charon", words)
        if wait:
            self.wait_charon(host)

    def wait_charon(self, host: str) -> None:
        self._wait_file(host, "charon", self.work / host / "charon.vici")
        self._load(host)

    def _wait_file(self, host: str, name: str, path: Path) -> None:
        if why := began(self.started[host, name], path):
            log = (self.work / host / f"{name}.out").read_text(errors="replace").strip()[-600:]
            raise CharonError(f"{host}: {name} {why}: {log or 'it said nothing'}")

    def stop(self, host: str, name: str, *, kill: bool = False) -> None:
        """Ends one daemon and waits for its end. `kill` is the crash: no chance to tidy up."""
        process = self.started.pop((host, name), None)
        if process is None:
            return
        if kill:
            process.kill()
        else:
            process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop_daemons(self, hosts: Collection[str] = HOSTS) -> None:
        """Ends charons and agents and clears what they left in the kernel."""
        kinds = ("charon", "agent", *lab_daemons.KINDS)
        pairs = [pair for pair in self.started if pair[1] in kinds and pair[0] in hosts]
        for pair in pairs:
            self.started[pair].terminate()
        for pair in pairs:
            self.stop(*pair)
        for host in {pair[0] for pair in pairs}:
            self.flush(host)
            self.clean(host)

    def clean(self, host: str) -> None:
        """Removes what the daemons of a host have written."""
        for name in ("state", *LOGS, "points.log", "ikectx.vici", "ikectx.mark", "charon.vici"):
            path = self.work / host / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def flush(self, host: str) -> None:
        """Clears what daemons left in the kernel of a host."""
        script = "ip xfrm state flush; ip xfrm policy flush; nft flush ruleset"
        for which in ("table 220", DETOUR, f"table {lab_bird.TABLE}"):
            script += f"; ip route flush {which}; ip -6 route flush {which}"
        self.command(host, ["sh", "-c", script])

    def spawn(
        self,
        host: str,
        name: str,
        argv: Sequence[str],
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a daemon on a host; its output goes to the host's folder, as NAME.out, or into `stdout`."""
        folder = self.work / host
        folder.mkdir(exist_ok=True)
        with (folder / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                [*self.net.enter(host), *argv],
                stdin=stdin,
                stdout=out if stdout is None else stdout,
                stderr=out,
                env=self.environment(host),
                cwd=folder,
                start_new_session=True,
            )
        self.started[host, name] = process
        return process

    # -- commands ---------------------------------------------------------------------------

    def environment(self, host: str) -> dict[str, str]:
        """What a command on that host sees: the host's settings, and nothing of the caller's."""
        folder = self.work / host
        path = f"{self.work}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {
            "PATH": path,
            "HOME": str(self.work),
            "LANG": "C.UTF-8",
            "TERM": os.environ.get("TERM", "dumb"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "STRONGSWAN_CONF": f"{folder}/strongswan.conf",
            "SWANCTL_DIR": str(folder),
            "VICI_URI": f"unix://{folder}/charon.vici",
            ("IKECTX_MOBILE_CONFIG" if host in MOBILES else "IKECTX_CONFIG"): str(
                agent_file(self.work, host)
            ),
            "LAB": str(self.work),
            "HOST": host,
            **({trace.VARIABLE: f"{folder}/{TRACE}"} if self.traced else {}),
        }

    def command(
        self, host: str, argv: Sequence[str], *, timeout: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host and captures its output. A timeout is exit status 124."""
        self._check_host(host)
        words = [*self.net.enter(host), *argv]
        try:
            return subprocess.run(
                words,
                capture_output=True,
                text=True,
                errors="replace",
                env=self.environment(host),
                timeout=timeout,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(words, 124, "", f"no end after {timeout:.0f} s")

    def connect(self, gateway: str = "psg", mobile: str = "mn") -> None:
        """Brings the tunnel up to a gateway, from the side the tunnel names. Raises CharonError."""
        host, peer = (mobile, gateway) if self.tunnel.initiator == "mn" else (gateway, mobile)
        if host in self.tunnel.others:
            self.tell(host, lab_daemons.KINDS[self.tunnel.others[host]].up(self.work / host, gateway))
            limit = time.monotonic() + CLEARED
            while not self.list_sas(host):
                if time.monotonic() > limit:
                    raise CharonError(f"{host}: the tunnel did not come up")
                time.sleep(0.1)
            return
        for number in range(1, self.tunnel.children + 1):
            child = "net" if number == 1 else f"net{number}"
            try:
                self.initiate(host, peer, child)
            except CharonError as error:
                log = (self.work / host / "charon.log").read_text(errors="replace").splitlines()
                said = " / ".join(log[-3:])
                raise CharonError(f"{host}: the tunnel did not come up: {error}: {said}") from None

    def agent(self, host: str, timeout: float = 60.0) -> ControlClient:
        """A client of that host's agent."""
        return ControlClient(str(self.work / host / "ikectx.vici"), timeout=timeout)

    def vici(self, host: str) -> CharonVici:
        """A VICI client of that host's charon; a unix socket reaches it from any namespace."""
        if host not in self._vici:
            self._vici[host] = CharonVici(f"unix://{self.work}/{host}/charon.vici", timeout=180.0)
        return self._vici[host]

    def list_sas(self, host: str, ike: str | None = None) -> list[dict[str, Any]]:
        """charon's IKE_SAs, of one connection (`ike`) or all; each has `child-sas`, empty or not. Another
        daemon's: see `daemons.listed`."""
        if host in self.tunnel.others:
            states = self.command(host, ["ip", "xfrm", "state", "list", "nokeys"]).stdout
            return lab_daemons.listed(self.tunnel.others[host], states)
        return [{"child-sas": {}, **sa} for sa in self.vici(host).list_sas(ike)]

    def strongswan(self) -> str:
        """The version of the running charons; by host where they differ. Raises CharonError."""
        found = {host: str(self.vici(host).version().get("version", "")) for host in self.tunnel.charons}
        if len(set(found.values())) == 1:
            return next(iter(found.values()))
        return ", ".join(f"{host} {version}" for host, version in found.items())

    def initiate(self, host: str, peer: str, child: str) -> None:
        """Has charon set up a CHILD_SA (and its IKE_SA) and waits for it. Raises CharonError."""
        self.vici(host).request(
            "initiate", {"ike": peer, "child": child, "timeout": "60000", "loglevel": "-1"}
        )

    def tell(self, host: str, commands: Iterable[Sequence[str]]) -> None:
        """Runs commands that tell a daemon what to do. Raises CharonError for the first that fails."""
        for argv in commands:
            done = self.command(host, argv)
            if done.returncode != 0:
                said = (done.stdout + done.stderr).strip()[-400:]
                raise CharonError(f"{host}: {argv[-1]}: exit {done.returncode}: {said}")

    def inject(self, host: str, text: str) -> None:
        """Gives the charon of a host messages of its HA plugin: see `lab_inject`. Raises KernelError."""
        words = [sys.executable, "-I", "-S", lab_inject.__file__]
        run([*self.net.enter(host), *words], text=text, env=self.environment(host))

    def terminate(self, host: str) -> None:
        """Has charon delete its IKE_SAs and waits for the peer's answer."""
        for sa in self.list_sas(host):
            self.vici(host).terminate(ike_id=int(sa["uniqueid"]), timeout_ms=20000)

    def forget(self, host: str) -> None:
        """A host's SAs go without a word that anybody could hear."""
        for sa in self.list_sas(host):
            with contextlib.suppress(CharonError):  # it tells of the time that passed without an answer
                self.vici(host).terminate(ike_id=int(sa["uniqueid"]), force=True, timeout_ms=100)

    def attach(self, host: str, argv: Sequence[str]) -> int:
        """Runs a command on a host with this terminal. Returns its exit status."""
        self._check_host(host)
        return subprocess.run(
            [*self.net.enter(host), *argv], env=self.environment(host), check=False
        ).returncode

    def _check_host(self, host: str) -> None:
        if host not in HOSTS:
            raise UsageError(f"no host {host} in the lab", hint="hosts: " + " ".join(HOSTS))


def idle(sa: Mapping[str, Any]) -> bool:
    """Whether an IKE_SA as charon lists it is up, and none of its exchanges is under way, or waits."""
    tasks = ("tasks-active", "tasks-queued", "tasks-passive")
    return sa["state"] == "ESTABLISHED" and not any(sa.get(kind) for kind in tasks)


def save_logs(lab: Lab, folder: Path) -> None:
    """Copies logs, configurations and measurements; neither keys nor the agents' stores."""
    for host in (*lab.tunnel.hosts, "srv"):
        target = folder / host
        target.mkdir(parents=True, exist_ok=True)
        for path in (lab.work / host).glob("*"):
            if path.suffix in (".log", ".out", ".conf", ".toml", ".json") and path.is_file():
                shutil.copyfile(path, target / path.name)


def agent_file(work: Path, host: str) -> Path:
    """What the agent of that host reads."""
    return work / host / ("mobile.toml" if host in MOBILES else "ikectx.toml")


def names(*, kept: bool = False) -> list[str]:
    """Names of this user's labs; with `kept` only of those that `lab up` made."""
    return [name for name, state in states(ROOT) if state["keep"] or not kept]


def sweep() -> list[str]:
    """Takes down what a killed run left: labs not made by `lab up` whose process is gone."""
    gone = []
    for name, state in states(ROOT):
        if state["keep"] or Path(f"/proc/{state['owner']}").exists():
            continue
        Lab.find(name).down()
        gone.append(name)
    return gone
