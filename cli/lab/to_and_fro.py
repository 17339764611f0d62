"""One SA moves to and fro between both gateways, and what CPU time that takes their agents and charons.

    python -m ikectx_cli.lab.to_and_fro RESULT MOVES ESP [profile]

is one measurement on this machine, which a guest runs for `ikectx lab bench --moves`; RESULT gets its JSON.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from ikectx.errors import CharonError

from . import guest as lab_guest
from .config import Tunnel
from .emptying import Say
from .hosts import Lab
from .net import GATEWAYS
from .profiled import PROFILE, ProfiledLab
from .usage import circumstances, clock_stands_still, cpu, spent_ms

WARM = 4
"""Moves before the first that counts: Python compiles, charon loads."""
PAUSE = 0.1
"""Seconds between two moves, in which the mobile node's charon may finish what it does behind one."""
MEMORY_MIB = 1024


def run(moves: int, guest: str, clock: str, *, libipsec: bool, profile: bool, say: Say) -> dict[str, Any]:
    """`to_and_fro` in a guest of `lab_guest.WAYS` (or auto), and on what machine that was. Raises
    IkectxError."""
    words = [str(moves), "libipsec" if libipsec else "kernel", *([PROFILE] if profile else [])]
    return lab_guest.result(
        __spec__.name, words, guest, clock, libipsec=libipsec, memory_mib=MEMORY_MIB, say=say
    )


def to_and_fro(moves: int, *, libipsec: bool, profile: bool, say: Say) -> dict[str, Any]:
    """The CPU time (user and system, all threads) of each agent and charon, for one move on average.
    `profile`: also what the agents' goes into, which costs a little of it.

    Raises IkectxError when the lab does not come up, or a move fails twice.
    """
    lab = (ProfiledLab if profile else Lab).new(delay_ms=1.0)
    try:
        say("network and daemons")
        lab.up(Tunnel(libipsec=libipsec))
        lab.connect()
        say(f"{moves} moves")
        places = list(GATEWAYS)
        for number in range(-WARM, moves):
            if number == 0:
                agents, charons = cpu(lab), cpu(lab, "charon")
                if isinstance(lab, ProfiledLab):
                    lab.begin()
            _move(lab, *places)
            places.reverse()
            time.sleep(PAUSE)
        still = clock_stands_still()
        return {
            "moves": moves,
            "cpu_ms": _each(spent_ms(agents, cpu(lab), clock_stands_still=still), moves),
            "charon_ms": _each(spent_ms(charons, cpu(lab, "charon"), clock_stands_still=still), moves),
            **({"profile_ms": lab.end(moves)} if isinstance(lab, ProfiledLab) else {}),
            **circumstances(lab),
        }
    finally:
        lab.down()


def _each(spent: Mapping[str, float | None], moves: int) -> dict[str, float | None]:
    return {name: None if (used := spent[name]) is None else round(used / moves, 2) for name in GATEWAYS}


def _move(lab: Lab, source: str, to: str) -> None:
    """Moves the only SA. Once more, if its mobile node was just rekeying it."""
    for _ in range(2):
        done = lab.command(source, ["ikectx", "transfer", "--to", to, "--all", "--json"])
        if done.returncode == 0:
            return
        time.sleep(1.0)
    raise CharonError(f"{source}: transfer --to {to}: {(done.stdout + done.stderr).strip()[-600:]}")


if __name__ == "__main__":
    sys.exit(
        lab_guest.program(
            lambda moves, esp, *more: to_and_fro(
                int(moves), libipsec=esp == "libipsec", profile=PROFILE in more, say=print
            )
        )
    )
