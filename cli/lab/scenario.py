"""Scenarios: folders of data. `scenario.toml` says what to do; HOST.conf adds swanctl.conf text to a host,
HOST.strongswan adds strongswan.conf text. path.json has `critical.counts` of its handover, in virtual time: a
run that is traced then fails where its critical path has more (`python -m tests.paths` writes these files).

    description = "one line"
    base = "move"                 # take over everything of another scenario, then what stands here
    fresh = false                 # start the daemons anew, even after a scenario that went well
    kernel_only = false           # skip with --esp libipsec
    delay_ms = 20                 # of the access link, one way
    gateway_delay_ms = 1          # between the gateways, one way
    interval_ms = 5               # of the probe's datagrams, each way
    slow_interval_ms = 20         # the same on an emulated CPU, which feels every packet (else interval_ms)
    dark_ms = 0                   # mn has no link at all for so long, between its old and its new one
    late_address_ms = 0           # mn's new link has other addresses for so long before its IPv4 address
    agents = true                 # run `ikectx serve` on the gateways
    names = "kept"                # what a transfer may change: nothing, SPIs ("renamed"), keys too ("new")
    steps = [
      "connect",                  # a verb of `VERBS`, with its arguments
      { host = "psg", run = "ikectx status --json", expect = "idle" },
    ]
    checks = [                    # run after the steps, all of them, whatever the others say
      { host = "nsg", run = "swanctl --list-sas", expect = "ESTABLISHED" },
    ]

    [tunnel]                      # the fields of lab_config.Tunnel
    auth = "cert"
    [tunnel.connection]           # swanctl.conf settings of the connection, at all hosts
    [tunnel.child]                # and of its children
    [limits]                      # what makes a scenario fail on kernel ESP
    lost_down = 0                 # packets towards mn
    late = 100                    # packets that were under way for `LATE_MS` longer than the fastest
    lost = 2                      # packets of the probe, both directions together (`Report.judge`)
    exact = true                  # `lost` is for some work of a gateway: it holds in virtual time alone
    gap_ms = 200                  # the longest gap
    gateway_octets = 600          # of CXTP for one transfer
    messages = 2                  # IKE and CXTP messages on the air while there is traffic: exactly so many
    other_lost = 0                # packets of mn2's probe

A command runs in `sh -c` on its host. `exit` is the status it must end with (default 0), `expect` a regular
expression its output must hold, `reject` one it must not; `count` says how often `expect` must be found;
`within` repeats the command for so many seconds until it satisfies.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ikectx.errors import ConfigError, UsageError

from .config import Tunnel
from .daemons import KINDS as DAEMONS
from .net import GATEWAYS, HOSTS, LINKS, MOBILES
from .twin import KINDS

FOLDER = Path(__file__).resolve().parent.parent.parent / "tests" / "scenarios"

VERBS = {
    "connect": (0, 2, "[GATEWAY [MOBILE]]: the tunnel comes up (mn's at psg)"),
    "terminate": (
        0,
        2,
        "[HOST [MOBILE]]: the tunnel is deleted from there (mn), and must be gone at both ends",
    ),
    "traffic": (1, 1, "start | stop: the UDP probes (mn's, mn2's where it takes part) and the capture"),
    "wait": (1, 1, "SECONDS"),
    "transfer": (2, 9, "FROM TO [OPTION...]: ikectx transfer, which must succeed"),
    "move": (
        2,
        3,
        "FROM TO [keep]: the same by the agent's control socket; with keep the address moves along",
    ),
    "pull": (2, 2, "TO FROM: what ikectx pull does at TO, by its agent's control socket"),
    "handover": (
        2,
        2,
        "GATEWAY predictive | leaving | reactive: mn asks for it by its agent, and relocates meanwhile",
    ),
    "follow": (1, 1, "GATEWAY: mn relocates, and GATEWAY must find its SA by itself"),
    "twin": (1, 1, "KIND: mn2 has an SA with nsg that has names of mn's: inbound | outbound | ike | all"),
    "relocate": (0, 0, "mn leaves its access network and is in its other one"),
    "dark": (0, 0, "mn relocates without a tunnel, under a probe in clear: how long its link itself is dark"),
    "stays": (0, 0, "mn, a stock one, relocates and stays at psg: what its own charon takes"),
    "cut": (2, 2, "HOST HOST: the core forwards nothing more between the two (away: mn's other network)"),
    "mend": (0, 0, "undoes every cut"),
    "ping": (0, 1, "[MOBILE]: the tunnel carries packets both ways"),
    "rekey": (2, 3, "HOST child | ike [MOBILE]: and wait until the new one is in use at both ends"),
    "roam": (0, 0, "mn changes its address within its access network; the gateway in charge must follow"),
    "baseline": (
        1,
        2,
        "psk | cert | eap [relocate]: terminate and connect to nsg from scratch, under the probe",
    ),
    "agent": (2, 2, "HOST stop | kill | start"),
    "charon": (2, 2, "HOST stop | kill | start"),
}
"""Verbs of a step: how few and many arguments they take, and what they do. HOST may be `owner` or `other`."""

ALIASES = ("owner", "other")
PLACES = (*MOBILES, *GATEWAYS, *ALIASES)

WORDS: dict[str, dict[int, tuple[str, ...]]] = {
    "traffic": {1: ("start", "stop")},
    "connect": {1: GATEWAYS, 2: MOBILES},
    "handover": {1: GATEWAYS, 2: ("predictive", "leaving", "reactive")},
    "follow": {1: GATEWAYS},
    "twin": {1: tuple(KINDS)},
    "cut": {1: tuple(LINKS), 2: tuple(LINKS)},
    "terminate": {1: PLACES, 2: MOBILES},
    "ping": {1: MOBILES},
    "rekey": {1: PLACES, 2: ("child", "ike"), 3: MOBILES},
    "baseline": {1: ("psk", "cert", "eap"), 2: ("relocate",)},
    "agent": {1: PLACES, 2: ("stop", "kill", "start")},
    "charon": {1: PLACES, 2: ("stop", "kill", "start")},
}
"""What an argument of a verb may be, where that is a list."""

NAMES = ("kept", "renamed", "new")

KEYS = (
    *("agents", "names", "fresh", "kernel_only", "delay_ms", "gateway_delay_ms"),
    *("dark_ms", "late_address_ms", "interval_ms", "slow_interval_ms"),
)
LIMITS = ("lost", "exact", "lost_down", "late", "gap_ms", "messages", "gateway_octets", "other_lost")
"""Of scenario.toml, those of `Scenario` with a default; and those of its [limits]."""

COARSE_MS = 20.0
"""Milliseconds between datagrams of a brief run's probe on an emulated CPU: at 5, a transfer waits for it."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command on a host, and what must be true of it."""

    host: str
    run: str
    expect: str = ""
    reject: str = ""
    exit: int = 0
    count: int | None = None
    within: float = 0.0
    name: str = ""

    def verdict(self, status: int, output: str) -> str:
        """Empty when the command did what it should, else what is wrong."""
        if status != self.exit:
            return f"exit {status} instead of {self.exit}"
        if self.expect:
            found = len(re.findall(self.expect, output, re.MULTILINE))
            if self.count is not None and found != self.count:
                return f"{found} times /{self.expect}/ instead of {self.count}"
            if self.count is None and not found:
                return f"no /{self.expect}/"
        if self.reject and re.search(self.reject, output, re.MULTILINE):
            return f"there is /{self.reject}/"
        return ""


Step = Command | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario, read and checked."""

    name: str
    description: str
    steps: tuple[Step, ...]
    checks: tuple[Command, ...] = ()
    tunnel: Tunnel = field(default_factory=Tunnel)
    agents: bool = True
    delay_ms: float = 20.0
    gateway_delay_ms: float = 1.0
    dark_ms: float = 0.0
    late_address_ms: float = 0.0
    interval_ms: float = 5.0
    slow_interval_ms: float = 0.0
    lost: int | None = None
    exact: bool = False
    lost_down: int | None = None
    late: int | None = None
    gap_ms: float | None = None
    messages: int | None = None
    gateway_octets: int | None = None
    other_lost: int | None = None
    names: str = "kept"
    kernel_only: bool = False
    fresh: bool = False
    overrides: Mapping[str, str] = field(default_factory=dict)
    path: Mapping[str, Mapping[str, int]] | None = None

    def brief(self, *, slow: bool) -> Scenario:
        """What it tests, without what only figures need: the ways of today; on a `slow` CPU, a fine probe.

        Of a coarser probe as much less may be lost: the limit stands for a time.
        """
        steps = tuple(step for step in self.steps if isinstance(step, Command) or step[0] not in FIGURES)
        had = (slow and self.slow_interval_ms) or self.interval_ms
        interval = max(had, COARSE_MS) if slow else had
        lost = None if self.lost is None else math.ceil(self.lost * had / interval)
        return dataclasses.replace(self, steps=steps, interval_ms=interval, slow_interval_ms=0.0, lost=lost)

    @property
    def relocates(self) -> bool:
        """Whether the mobile node changes its access network, apart from what `FIGURES` do."""
        return any(isinstance(step, tuple) and step[0] in RELOCATES for step in self.steps)

    @property
    def disturbs_network(self) -> bool:
        """Whether addresses, links or routes may come out of it changed."""
        commands = [step.run for step in (*self.steps, *self.checks) if isinstance(step, Command)]
        return (
            self.tunnel.shared
            or any(isinstance(step, tuple) and MOVES & set(step) for step in self.steps)
            or any("ip " in one or "nft" in one for one in commands)
        )

    @property
    def crashes(self) -> bool:
        """Whether a charon is killed in it: its SAs stay in the kernel, and no charon knows them any more."""
        return any(isinstance(step, tuple) and step[0] == "charon" and "kill" in step for step in self.steps)


RELOCATES = {"relocate", "handover", "follow"}
"""Verbs that put the mobile node into its other access network, under a tunnel that it has."""

FIGURES = {"baseline", "dark", "stays"}
"""Verbs that only figures need (`Scenario.brief`)."""

MOVES = {"roam", "relocate", "handover", "follow", "cut", "dark", "stays", "kill"}
"""Words of steps after which addresses are not what they were."""


def names(folder: Path = FOLDER) -> list[str]:
    """The scenarios of a folder; those whose name begins with `_` are only bases for others."""
    found = [path.parent.name for path in folder.glob("*/scenario.toml")]
    return sorted(name for name in found if not name.startswith("_"))


def neighbours(wanted: Iterable[str], folder: Path = FOLDER) -> list[str]:
    """The same names in an order in which those stand together that can share running daemons.

    One that wants fresh daemons comes first, when they are.
    """
    groups: list[list[Scenario]] = []
    for scenario in sorted((load(name, folder) for name in wanted), key=lambda one: not one.fresh):
        for group in groups:
            if group[0].agents == scenario.agents and group[0].tunnel.same_daemons(scenario.tunnel):
                group.append(scenario)
                break
        else:
            groups.append([scenario])
    return [scenario.name for group in groups for scenario in group]


def load(name: str, folder: Path = FOLDER) -> Scenario:
    """Reads a scenario by name. Raises UsageError (unknown name), ConfigError (a key that is wrong)."""
    source = folder / name / "scenario.toml"
    if not source.exists():
        raise UsageError(f"no scenario {name}", hint=f"there are: {', '.join(names(folder)) or 'none'}")
    merged, overrides = _merged(name, folder, ())
    found = _scenario(name, source, merged, overrides)
    counted = source.parent / "path.json"
    return dataclasses.replace(found, path=json.loads(counted.read_text())) if counted.exists() else found


def _merged(name: str, folder: Path, seen: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The keys of a scenario over those of its bases, and the swanctl.conf texts of all of them."""
    source = folder / name / "scenario.toml"
    if name in seen:
        raise ConfigError(f"{source}: base: {name} is its own base")
    try:
        with source.open("rb") as file:
            own = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: {error}") from None
    base: dict[str, Any] = {}
    overrides: dict[str, str] = {}
    if "base" in own:
        base, overrides = _merged(str(own.pop("base")), folder, (*seen, name))
    for host in HOSTS:
        for kind, key in ((".conf", host), (".strongswan", f"{host}.strongswan")):
            extra = source.parent / f"{host}{kind}"
            if extra.exists():
                overrides[key] = overrides.get(key, "") + extra.read_text()
    return _over(base, own), overrides


def _over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in own.items():
        before = result.get(key)
        both = isinstance(value, dict) and isinstance(before, dict)
        result[key] = _over(before, value) if both and isinstance(before, dict) else value
    return result


def _scenario(name: str, source: Path, keys: dict[str, Any], overrides: Mapping[str, str]) -> Scenario:
    limits = keys.pop("limits", {})
    steps = keys.pop("steps", None)
    if not isinstance(steps, list) or not steps:
        raise ConfigError(f"{source}: steps: a list of steps is needed")
    checks = keys.pop("checks", [])
    tunnel = _tunnel(source, keys.pop("tunnel", {}))
    default: dict[str, Any] = {one.name: one.default for one in dataclasses.fields(Scenario)}
    known = {key: type(default[key])(keys.pop(key)) for key in KEYS if key in keys}
    known |= {key: limits.pop(key) for key in LIMITS if key in limits}
    known["description"] = str(keys.pop("description", ""))
    if known.get("names", NAMES[0]) not in NAMES:
        raise ConfigError(f"{source}: names: one of {', '.join(NAMES)}")
    for key in (*keys, *(f"limits.{key}" for key in limits)):
        raise ConfigError(f"{source}: {key}: no such key")
    found = tuple(_step(source, step) for step in steps)
    _fit(source, (*found, *(_command(source, check) for check in checks)), tunnel)
    return Scenario(
        name=name,
        steps=found,
        checks=tuple(_command(source, check) for check in checks),
        tunnel=tunnel,
        overrides=overrides,
        **known,
    )


def _fit(source: Path, steps: Iterable[Step], tunnel: Tunnel) -> None:
    """Steps that need a host or an agent the scenario does not have. Raises ConfigError."""
    for step in steps:
        if isinstance(step, tuple) and step[0] == "handover" and not tunnel.mobile:
            raise ConfigError(f"{source}: steps: handover needs mobile = true in [tunnel]")
        if (
            isinstance(step, tuple)
            and step[0] in ("charon", "roam")
            and step[1:2] == ("mn",)
            and tunnel.others
        ):
            raise ConfigError(f"{source}: steps: mn has no charon, but {tunnel.daemon}")
        if isinstance(step, tuple) and step[0] == "twin":
            needs = {"second": True, "nat": step[1] in ("outbound", "all")}
            for key in (key for key, needed in needs.items() if needed and not getattr(tunnel, key)):
                raise ConfigError(f"{source}: steps: twin {step[1]} needs {key} = true in [tunnel]")
        named = step[1:] if isinstance(step, tuple) else (step.host,)
        if "mn2" in named and not tunnel.second:
            raise ConfigError(f"{source}: steps: mn2 takes part only with second = true in [tunnel]")


def _tunnel(source: Path, keys: Mapping[str, Any]) -> Tunnel:
    fields = {one.name for one in dataclasses.fields(Tunnel)}
    for key in keys:
        if key not in fields:
            raise ConfigError(f"{source}: tunnel.{key}: no such key", hint=", ".join(sorted(fields)))
    allowed: dict[str, tuple[object, ...]] = {
        "family": (4, 6),
        "inner": (4, 6),
        "initiator": ("mn", "gateway"),
        "mode": ("tunnel", "transport"),
        "inside": ("static", "announce", "bird"),
        "daemon": ("charon", *DAEMONS),
        "segments": tuple(range(1, 17)),
    }
    for key, values in {**allowed, "auth": ("psk", "cert", "eap")}.items():
        if keys.get(key, values[0]) not in values:
            raise ConfigError(f"{source}: tunnel.{key}: one of {', '.join(map(str, values))}")
    for key in ("vip", "encap", "shared", "libipsec", "mobile", "by_packet", "second", "nat", "forward_via"):
        if not isinstance(keys.get(key, False), bool):
            raise ConfigError(f"{source}: tunnel.{key}: true or false")
    return Tunnel(**keys)


def _step(source: Path, step: object) -> Step:
    if not isinstance(step, str):
        return _command(source, step)
    words = tuple(shlex.split(step))
    if not words or words[0] not in VERBS:
        raise ConfigError(f"{source}: steps: {step!r} is no verb", hint=", ".join(VERBS))
    few, many, help_text = VERBS[words[0]]
    if not few <= len(words) - 1 <= many:
        raise ConfigError(f"{source}: steps: {step!r}: {words[0]} takes {help_text}")
    for at, allowed in WORDS.get(words[0], {}).items():
        if at < len(words) and words[at] not in allowed:
            raise ConfigError(
                f"{source}: steps: {step!r}: {words[at]} is none of {', '.join(allowed)}", hint=help_text
            )
    return words


def _command(source: Path, table: object) -> Command:
    if not isinstance(table, dict):
        raise ConfigError(f"{source}: a command is a table with host and run, not {table!r}")
    fields = {one.name for one in dataclasses.fields(Command)}
    for key in table:
        if key not in fields:
            raise ConfigError(f"{source}: a command has no key {key}", hint=", ".join(sorted(fields)))
    try:
        command = Command(**table)
        re.compile(command.expect)
        re.compile(command.reject)
    except (TypeError, re.error) as error:
        raise ConfigError(f"{source}: {table!r}: {error}") from None
    if command.host not in (*HOSTS, *ALIASES):
        raise ConfigError(f"{source}: no host {command.host}", hint=" ".join((*HOSTS, *ALIASES)))
    return command
