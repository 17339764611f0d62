"""An agent that stops where the lab wants it: before or after an effect or a write of its journal, and at a
message. `bin/ikectx` of a lab that kills runs its agents as this module, so that the product has no hook.

    python -m ikectx_cli.lab.stops ARGUMENT...

is `ikectx ARGUMENT...`. In the folder that $IKECTX_LAB_STOPS names there are

    want      the point at which the agent is to stop, once, and how often it passes there first; it takes
              the file away
    stopped   a FIFO, to which it writes that point then
    go        a FIFO; the agent goes on when somebody has opened and closed it
    synced    the end of what is on the disk for certain in the store's log: salt and offset (`store_cut`)

The file points.log beside that folder has the points that it has passed, a line each.

The whole process stands still meanwhile, but for its threads. Names of points are those of `kill_cases`.
"""

from __future__ import annotations

import functools
import os
import runpy
import select
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ikectx import trace
from ikectx.disk.store import SqliteStore
from ikectx.net import mn_udp
from mobike_ext import link
from mobike_ext.packet_io import RawLink
from vici_bridge.effects.runner import Runner

from .config import PRODUCT, STOPS
from .kill_cases import AFTER, ANY, BEFORE, effect_point, journal_point, message_point
from .store_cut import valid_end

At = Callable[[str], None]
"""Reaches the point of that name."""

_passed: Counter[str] = Counter()
"""How often a point that is wanted has been passed."""


def reach(folder: Path, point: str) -> None:
    """This point is passed, or the process stops here until the lab lets it go on."""
    with suppress(OSError), (folder.parent / "points.log").open("a") as file:
        file.write(point + "\n")
    want = folder / "want"
    try:
        wanted, passes = want.read_text().split()
        if wanted not in (point, ANY):
            return
        _passed[wanted] += 1
        if _passed[wanted] <= int(passes):
            return
        want.unlink()
    except FileNotFoundError:
        return
    _passed.clear()
    # opened first, because the lab may let it go on as soon as it has read where it stopped
    go = os.open(folder / "go", os.O_RDONLY | os.O_NONBLOCK)
    try:
        (folder / "stopped").write_text(point)
        poll = select.poll()
        poll.register(go, 0)  # POLLHUP: somebody has opened and closed it
        poll.poll()
    finally:
        os.close(go)


def watch(folder: Path) -> None:
    """Has the agent of this process reach its points from now on."""
    at = partial(reach, folder)
    _wrap(Runner, "_limited", partial(_effect, at))
    _wrap(SqliteStore, "write", partial(_write, at, folder))
    _wrap(SqliteStore, "sync", partial(_sync, folder))
    _wrap(trace, "message", partial(_between, at))
    _wrap(mn_udp._Run, "_send", partial(_then, at, message_point("sent", "Ctar")))
    _wrap(mn_udp._Run, "_readable", partial(_then, at, message_point("received", "Ctaa")))
    _wrap(mn_udp._Reply, "send", partial(_then, at, message_point("sent", "Ctaa")))
    _wrap(mn_udp.MnServer, "_handle", partial(_first, at, message_point("received", "Ctar")))
    _wrap(link, "_send", partial(_said, at))
    _wrap(RawLink, "receive", partial(_heard, at))


def _wrap(owner: Any, name: str, wrap: Callable[..., Any]) -> None:
    """Puts `wrap` in the place of a function of the product, which it gets as its first argument."""
    product = getattr(owner, name)

    @functools.wraps(product)
    def instead(*args: Any, **kwargs: Any) -> Any:
        return wrap(product, *args, **kwargs)

    setattr(owner, name, instead)


async def _effect(at: At, limited: Any, runner: Any, effect: Any, work: Any) -> Any:
    step = runner._ledger.of(work.sa).step
    at(effect_point(step, effect.name, BEFORE))
    facts = await limited(runner, effect, work)
    at(effect_point(step, effect.name, AFTER))
    return facts


def _write(
    at: At, folder: Path, write: Any, store: Any, *entries: Any, durable: bool = True, soon: bool = False
) -> None:
    for entry in entries:
        at(journal_point(entry.state, BEFORE))
    write(store, *entries, durable=durable, soon=soon)
    if durable and not soon:
        _sync(folder, lambda _store: None, store)
    for entry in entries:
        at(journal_point(entry.state, AFTER))


def _sync(folder: Path, sync: Any, store: Any) -> None:
    """Note that all that was written so far is on the disk."""
    end = valid_end(Path(f"{store._path}-wal"))
    sync(store)
    (folder / "synced").write_text(" ".join(map(str, end)))


def _between(at: At, message: Any, way: str, name: str, *_more: Any) -> None:
    at(message_point(way, name))


def _then(at: At, point: str, work: Any, *args: Any) -> None:
    work(*args)
    at(point)


async def _first(at: At, point: str, work: Any, *args: Any) -> None:
    at(point)
    await work(*args)


def _said(at: At, send: Any, raw: Any, datagrams: Any) -> Any:
    trouble = send(raw, datagrams)
    if datagrams:
        at(message_point("sent", "Ike"))
    return trouble


async def _heard(at: At, receive: Any, raw: Any, within: float) -> Any:
    found = await receive(raw, within)
    if found is not None:
        at(message_point("received", "Ike"))
    return found


if __name__ == "__main__":
    watch(Path(os.environ[STOPS]))
    runpy.run_module(PRODUCT, run_name="__main__")
