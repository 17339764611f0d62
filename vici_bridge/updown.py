"""Runs a connection's updown script as charon's updown plugin would, for SAs charon did not set up.

charon calls no script for an imported CHILD_SA, and none for one that is deleted over HA (5.9.8, 6.0.6).
A script's failure is logged and changes nothing, as with charon.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process

from ikectx import trace
from ikectx.context import IkeContext

from .charon import ts_pairs, updown_environment

log = logging.getLogger(__name__)

TIMEOUT = 20.0
"""Seconds a script may take; charon itself would wait for ever."""
UMASK = 0o022
"""charon's own, as systemd starts it; that of the agent lets nobody read what it writes."""


@trace.spanned("ip route get", "call")
async def outgoing_interface(context: IkeContext) -> str:
    """The interface towards the MN, empty where none can be told."""
    command = ("ip", "-j", "route", "get", str(context.remote.address), "from", str(context.local.address))
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=PIPE, stderr=DEVNULL, start_new_session=True
        )
        return str(json.loads(await _output(process))[0].get("dev", ""))
    except (OSError, TimeoutError, ValueError, LookupError):
        return ""


@trace.spanned("updown")
async def run_updown(
    script: str, context: IkeContext, *, up: bool, interface: str, reqids: dict[bytes, int], unique_id: int
) -> None:
    """Call the script once for each selector pair of each child. `reqids` by inbound SPI."""
    for child in context.children:
        for local_ts, remote_ts in ts_pairs(child):
            env = updown_environment(
                context,
                child,
                local_ts,
                remote_ts,
                up=up,
                interface=interface,
                reqid=reqids.get(child.spi_in, 0),
                unique_id=unique_id,
            )
            await _call(script, env)


async def _call(script: str, env: dict[str, str]) -> None:
    path = os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    try:
        process = await asyncio.create_subprocess_shell(
            script,
            env={"PATH": path, **env, "IKECTX_TRANSFER": "1"},
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            start_new_session=True,
            umask=UMASK,
        )
    except (OSError, ValueError) as error:  # ValueError: what cannot stand in an environment
        log.warning("updown script %s cannot be run: %s", script, error)
        return
    try:
        out = await _output(process)
    except TimeoutError:
        log.warning("updown script %s took over %.0f s and was ended", script, TIMEOUT)
        return
    for line in out.decode("utf-8", "replace").splitlines():
        log.info("updown: %s", line)
    if process.returncode:
        log.warning("updown script %s exited with %d", script, process.returncode)


async def _output(process: Process) -> bytes:
    """What it printed, when it has ended. Errors: TimeoutError.

    Where nobody waits any longer (also because the step of the transfer was cancelled) it is ended with all
    that it has started: the step is done again, and a "down" must not end after the "up" that follows it.
    """
    ended = False
    try:
        out, _ = await asyncio.wait_for(process.communicate(), TIMEOUT)
        ended = True
        return out
    finally:
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
