"""A gateway is drained: every SA it serves moves to another one by one `transfer --all`, and what that takes.

    python -m ikectx_cli.lab.emptying RESULT SIZE ESP [profile]

is one drain on this machine, which a guest runs for `ikectx lab bench --drain`; its JSON goes to RESULT.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from ikectx.errors import CharonError

from . import guest as lab_guest
from .config import Tunnel
from .fleet import SEGMENTS, Fleet, prepare
from .hosts import Lab
from .net import GATEWAYS, INNER
from .profiled import PROFILE, ProfiledLab
from .traffic import Probe
from .usage import circumstances, clock_stands_still, cpu, memory_kib, spent_ms

DELAY_MS = 20.0
AFTER = 2.0
"""Seconds for which the probe goes on behind the last SA."""

MEMORY_MIB = 3072
"""Of a guest: charon's logs of a thousand SAs are in it, too."""

Say = Callable[[str], None]


def run(size: int, guest: str, clock: str, *, libipsec: bool, profile: bool, say: Say) -> dict[str, Any]:
    """`drain` in a guest of `lab_guest.WAYS` (or auto), and on what machine that was. Raises IkectxError.

    ESP in user space needs no other kernel than this machine's.
    """
    words = [str(size), "libipsec" if libipsec else "kernel", *([PROFILE] if profile else [])]
    return lab_guest.result(
        __spec__.name, words, guest, clock, libipsec=libipsec, memory_mib=MEMORY_MIB, say=say
    )


def drain(size: int, *, libipsec: bool, profile: bool, say: Say) -> dict[str, Any]:
    """Drains psg of `size` SAs, none of which collides with one at nsg; one of them has traffic meanwhile.
    `profile`: also what the agents' CPU time goes into, which costs a little of it.

    Raises IkectxError when the lab does not come up, or not every SA moves.
    """
    lab = (ProfiledLab if profile else Lab).new(delay_ms=DELAY_MS)
    try:
        say("network and daemons")
        prepare(lab, libipsec=libipsec)
        lab.up(Tunnel(segments=SEGMENTS, libipsec=libipsec))
        say(f"{size} mobile nodes connect to psg")
        # what the agents hold before there are SAs: they have read their files and listened to charon
        idle = memory_kib(lab)
        with Fleet(lab, size).connected() as fleet:
            return _drained(lab, fleet, idle, say)
    finally:
        lab.down()


def _drained(lab: Lab, fleet: Fleet, idle: dict[str, int], say: Say) -> dict[str, Any]:
    near, far = fleet.inner(0), INNER["srv"][4]
    probe = Probe(lab, {"mn": [(near, far)], "srv": [(far, near)]}, "mn")
    probe.launch()
    probe.begin()
    time.sleep(0.5)
    say(f"psg moves all {fleet.size} to nsg")
    if isinstance(lab, ProfiledLab):
        lab.begin()
    used, charons, began = cpu(lab), cpu(lab, "charon"), time.monotonic()
    fleet.move("psg", "nsg")
    seconds = time.monotonic() - began
    still = clock_stands_still()
    spent = spent_ms(used, cpu(lab), clock_stands_still=still)
    theirs = spent_ms(charons, cpu(lab, "charon"), clock_stands_still=still)
    profile = {"profile_ms": lab.end(fleet.size)} if isinstance(lab, ProfiledLab) else {}
    held = memory_kib(lab)
    time.sleep(AFTER)
    traffic = probe.stop()
    serves = {host: len(lab.list_sas(host)) for host in GATEWAYS}
    if serves != {"psg": 0, "nsg": fleet.size}:
        raise CharonError(f"after the drain psg serves {serves['psg']} SAs, nsg {serves['nsg']}")
    return summary(
        fleet.size,
        seconds,
        {host: spent[host] for host in GATEWAYS},
        {host: held[host] - idle[host] for host in GATEWAYS},
        {
            "segments": SEGMENTS,
            "charon_ms_per_sa": {
                host: None if took is None else round(took / fleet.size, 1) for host, took in theirs.items()
            },
            "lost": traffic.lost,
            "causes": traffic.as_json()["causes"],
            "sent": traffic.up.sent + traffic.down.sent,
            "gap_ms": traffic.gap_ms,
            "interval_ms": traffic.interval_ms,
            "recovered": traffic.recovered,
            **profile,
            **circumstances(lab),
        },
    )


def summary(
    size: int,
    seconds: float,
    cpu_ms: dict[str, float | None],
    memory_kib: dict[str, int],
    rest: dict[str, Any],
) -> dict[str, Any]:
    """What is told of a drain: totals to figures for one SA. `memory_kib`: what each agent has grown by."""
    return {
        "sas": size,
        "seconds": round(seconds, 2),
        "sas_per_second": round(size / seconds, 1) if seconds else None,
        "cpu_ms_per_sa": {
            host: None if used is None else round(used / size, 1) for host, used in cpu_ms.items()
        },
        "memory_kib_per_sa": round(sum(memory_kib.values()) / size, 1),
        "memory_kib": memory_kib,
        **rest,
    }


if __name__ == "__main__":
    sys.exit(
        lab_guest.program(
            lambda size, esp, *more: drain(
                int(size), libipsec=esp == "libipsec", profile=PROFILE in more, say=print
            )
        )
    )
