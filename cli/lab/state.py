"""What a lab keeps of itself in its folder, for the commands that come later: lab.json.

Labs lie where everybody may write, and root acts by what stands in these files. So what another user has
made, or could change, is not read.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ikectx.errors import UsageError

from ..render import printable
from .config import Tunnel

LONGEST_STATE = 1 << 16
"""Octets of a lab.json."""


def read_state(folder: Path) -> dict[str, Any]:
    """`delay_ms`, `gateway_delay_ms`, `tunnel`, `agents`, `owner` (a process), and whether to `keep` it.

    Raises UsageError.
    """
    path = folder / "lab.json"
    try:
        _only_ours(folder.lstat(), folder)
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
        ) as file:
            _only_ours(os.fstat(file.fileno()), path)
            octets = file.read(LONGEST_STATE)
    except (FileNotFoundError, NotADirectoryError):
        name = folder.name.removeprefix("ikl-")
        raise UsageError(f"no lab named {name} is up", hint="ikectx lab up") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}", hint=_REMOVE.format(folder)) from None
    try:
        state = json.loads(octets)
        tunnel = _tunnel(state["tunnel"])
        delays = {key: state[key] for key in ("delay_ms", "gateway_delay_ms")}
        agents, owner, keep = (state[key] for key in ("agents", "owner", "keep"))
        good = all(isinstance(one, int | float) and 0 <= one <= 10_000 for one in delays.values())
        if not (
            good
            and isinstance(owner, int)
            and isinstance(agents, bool)
            and isinstance(keep, bool)
            and owner > 0
        ):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UsageError(f"{path} is damaged", hint=_REMOVE.format(folder)) from None
    return {**delays, "tunnel": tunnel, "agents": agents, "owner": owner, "keep": keep}


_REMOVE = "ip netns shows what is left of it; then rm -r {}"


def _only_ours(found: os.stat_result, path: Path) -> None:
    """Raises UsageError for what belongs to another user, or what others may write."""
    if found.st_uid != os.geteuid():
        raise UsageError(f"{path} is of user {found.st_uid}: it is not read", hint="take another --name")
    if found.st_mode & 0o022 or not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
        raise UsageError(f"{path} could be written by others: it is not read", hint="take another --name")


def _tunnel(told: Mapping[str, Any]) -> Tunnel:
    """Raises TypeError, ValueError for what `Tunnel` cannot be."""
    made = Tunnel(**told)
    for one in fields(Tunnel):
        value, default = getattr(made, one.name), getattr(Tunnel(), one.name)
        if type(value) is not type(default):
            raise ValueError(one.name)
    return made


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Whole or not at all, and so that only this user can change it, whatever the umask."""
    fresh = folder / "lab.json.new"
    fresh.write_text(json.dumps(state))
    fresh.chmod(0o644)
    fresh.rename(folder / "lab.json")


def states(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """This user's labs, by name. Others, and damaged ones, are named on standard error, and left alone."""
    for path in sorted(root.glob("ikl-*/lab.json")):
        try:
            yield path.parent.name.removeprefix("ikl-"), read_state(path.parent)
        except UsageError as error:
            print(f"note: {printable(str(error))}", file=sys.stderr)
