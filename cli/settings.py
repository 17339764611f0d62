"""Reads strongSwan's settings files (strongswan.conf, swanctl.conf), as far as agent and `doctor` need them.

The format: sections `name { ... }`, `key = value` up to the end of the line, `#` comments, quoted values, and
`include PATTERN`, relative to the including file (man strongswan.conf, 5.9). Section references (`name :
other { ... }`) and ~key deletions are skipped. A file that does not follow the format gives could be read,
because none of this decides more than an advice, or how long a mobile node must have been silent.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ikectx.wire.ikev2 import RetransmitPolicy

from .config import CharonConfig

_TOKEN = re.compile(
    r"""
    [ \t\r\n]+ | \#[^\n]*
  | (?P<close>\})
  | include[ \t]+(?P<include>"[^"\n]*"|[^\s{}#]+)
  | (?P<key>"[^"\n]*"|[^\s={}#":,]+)[ \t]*=[ \t]*(?P<value>"(?:\\.|[^"\\])*"|[^\n#{}]*)
  | (?P<section>"[^"\n]*"|[^\s={}#":,]+)(?:[ \t]*:[^={}\n]*)?\s*\{
    """,
    re.VERBOSE,
)

MAX_DEPTH = 10
CONF = "/etc/strongswan.conf"
SWANCTL = "/etc/swanctl/swanctl.conf"

LEFT_QUIETLY = 10.0
"""Seconds without an IKE request in either direction after which an SA that goes down counts as abandoned by
its mobile node, not as deleted; less if charon gives up earlier."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and the file that it is in."""

    value: str
    file: str


def load(path: str, root: str = "") -> dict[str, Setting]:
    """All settings in `path` and what it includes, by dotted names; a later one wins.

    `root` is put before every absolute path: where another process has its root. Errors: OSError for
    `path` itself; included files that cannot be read are left out.
    """
    reader = _SettingsReader(root)
    reader.read(path, [], 0)
    return reader.settings


def pid_behind(path: str) -> int | None:
    """The process that listens on a unix socket."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(2)
            sock.connect(path)
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return None
    pid: int = struct.unpack("3i", raw)[0]
    return pid or None


def of_charon(pid: int | None, which: str) -> dict[str, Setting] | None:
    """All settings of `strongswan.conf` or `swanctl.conf`, as the charon with that pid reads them (by its
    environment and root). None if they cannot be read."""
    variable, path = {
        "strongswan.conf": ("STRONGSWAN_CONF", CONF),
        "swanctl.conf": ("SWANCTL_DIR", SWANCTL),
    }[which]
    value = _environment(pid).get(variable) or os.environ.get(variable)
    if value:
        path = value if which == "strongswan.conf" else os.path.join(value, "swanctl.conf")
    for root in [f"/proc/{pid}/root"] * bool(pid) + [""]:
        with contextlib.suppress(OSError):
            return load(path, root)
    return None


def _environment(pid: int | None) -> dict[str, str]:
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.decode("utf-8", "replace").partition("=") for item in raw.split(b"\0"))
    return {name: value for name, _, value in pairs}


def number(settings: Mapping[str, Setting], key: str, default: int) -> int:
    """The number that charon has for that key behind `charon.`; `default` also where it is 0."""
    for daemon in ("charon-systemd", "charon"):
        with contextlib.suppress(KeyError, ValueError):
            return int(settings[f"{daemon}.{key}"].value) or default
    return default


def is_yes(value: str) -> bool:
    """Whether charon takes a setting's value for "yes" where it can be "no"."""
    return value.lower() not in ("no", "false", "0", "disabled")


def with_numbers(config: CharonConfig) -> CharonConfig:
    """The same with the ports, the length of HA messages and the number of HA segments that charon really
    has, from its strongswan.conf where they are not set."""
    settings = of_charon(pid_behind(config.vici.removeprefix("unix://")), "strongswan.conf") or {}
    return replace(
        config,
        port=config.port or number(settings, "port", 500),
        port_nat_t=config.port_nat_t or number(settings, "port_nat_t", 4500),
        ha_buflen=config.ha_buflen or number(settings, "plugins.ha.buflen", 2048),
        segments=config.segments or number(settings, "plugins.ha.segment_count", 1),
    )


def give_up(settings: Mapping[str, Setting]) -> float:
    """Seconds after which charon gives up a request that is not answered, at the least (5.9.8: 165)."""
    return sum(_waits(settings))


def _waits(settings: Mapping[str, Setting]) -> list[float]:
    """Seconds that charon waits after each sending of a request, at the least."""

    def number(key: str, default: float) -> float:
        for daemon in ("charon-systemd", "charon"):
            with contextlib.suppress(KeyError, ValueError):
                return float(settings[f"{daemon}.retransmit_{key}"].value)
        return default

    timeout, base, tries = number("timeout", 4.0), number("base", 1.8), int(number("tries", 5))
    most = number("limit", 0) or float("inf")
    share = 1 - min(100.0, max(0.0, number("jitter", 0))) / 100
    return [share * min(timeout * base**each, most) for each in range(max(0, min(tries, 100)) + 1)]


def left_quietly(vici: str) -> float:
    """Seconds without an IKE request that show that a mobile node has gone: charon's patience, with some
    allowance, or `LEFT_QUIETLY`. `vici`: charon's socket."""
    settings = of_charon(pid_behind(vici.removeprefix("unix://")), "strongswan.conf")
    return LEFT_QUIETLY if settings is None else min(LEFT_QUIETLY, 0.8 * give_up(settings))


def within_patience(vici: str, tries: int, timeout: float) -> tuple[int, float]:
    """How often a mobile node is asked by us, and for how many seconds at first: as given, or less, so that
    all of it ends before charon repeats a request for the last time.

    charon of the gateway that lets an SA go is mute meanwhile. If its dead peer detection had no repetition
    left when the SA stays there, it would drop the SA of a mobile node that lives. `vici`: the socket of
    charon here, whose settings that one is supposed to have as well.
    """
    waits = _waits(of_charon(pid_behind(vici.removeprefix("unix://")), "strongswan.conf") or {})
    most = 0.8 * (sum(waits[:-1]) or waits[0])
    timeout, wait = min(timeout, most), RetransmitPolicy(min(timeout, most), tries=tries).wait
    while tries > 1 and sum(map(wait, range(1, tries + 1))) > most:
        tries -= 1
    return tries, timeout


class _SettingsReader:
    def __init__(self, root: str) -> None:
        self._root = root
        self.settings: dict[str, Setting] = {}

    def read(self, path: str, section: list[str], depth: int) -> None:
        with open(self._root + path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        names = list(section)
        at = 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            at = match.end() if match else at + 1
            if match is None:
                continue
            if match["key"] is not None:
                value = match["value"].strip()
                if len(value) > 1 and value[0] == value[-1] == '"':
                    value = value[1:-1]
                self.settings[".".join([*names, match["key"].strip('"')])] = Setting(value, path)
            elif match["section"] is not None:
                names.append(match["section"].strip('"'))
            elif match["include"] is not None and depth < MAX_DEPTH:
                self._include(os.path.join(os.path.dirname(path), match["include"].strip('"')), names, depth)
            elif match["close"] and len(names) > len(section):
                names.pop()

    def _include(self, pattern: str, section: list[str], depth: int) -> None:
        for path in sorted(glob.glob(self._root + pattern)):
            with contextlib.suppress(OSError):
                self.read(path.removeprefix(self._root), section, depth + 1)
