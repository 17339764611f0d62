"""Runs a connection's updown script as charon's updown plugin would, for SAs charon did not set up.

charon calls no script for an imported CHILD_SA, and none for one that is deleted over HA (5.9.8, 6.0.6). A
script's failure is logged and changes nothing, as with charon. But if a script could not even be started,
that is an error, because an SA that is served without its script gets no packets: the caller undoes its step,
or tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Collection, Coroutine, Mapping
from typing import Any, Protocol

from ikectx import trace
from ikectx.errors import KernelError
from ikectx.sa.context import Address, IkeContext
from vici_bridge.vici.environment import ts_pairs, updown_environment

log = logging.getLogger(__name__)

TIMEOUT = 20.0
"""Seconds that a script may take; charon itself would wait for ever."""
UMASK = 0o022
"""charon's own umask, as systemd starts it; the agent's own makes files that nobody else can read."""


class Ways(Protocol):
    """`vici_bridge.kernel.Detour`, as far as scripts need it."""

    def device_name(self, destination: Address, source: Address) -> str:
        """The device towards a destination, empty if there is no way. Errors: KernelError."""


class NotStarted(KernelError):
    """A script could not be started. `began`: it has run for other traffic selectors of that SA before."""

    began = False


class Scripts:
    """The updown scripts of a gateway, by connection name; `ways`: those of its kernel."""

    def __init__(self, scripts: Mapping[str, str], ways: Ways, host_access: Collection[str] = ()) -> None:
        """`host_access`: connections whose children have `hostaccess = yes`."""
        self._scripts = scripts
        self._ways = ways
        self._host_access = host_access

    async def run(
        self, context: IkeContext, *, up: bool, reqids: Mapping[bytes, int], unique_id: int
    ) -> None:
        """The script of the SA's connection, if it has one. `reqids` by inbound SPI.

        Errors: NotStarted if it could not be started.
        """
        script = self._scripts.get(context.connection)
        if script:
            await run_updown(
                script,
                context,
                up=up,
                interface=self._interface(context),
                reqids=reqids,
                unique_id=unique_id,
                host_access=context.connection in self._host_access,
            )

    def _interface(self, context: IkeContext) -> str:
        """The interface towards the mobile node, empty if there is none."""
        try:
            return self._ways.device_name(context.remote.address, context.local.address)
        except KernelError as error:
            log.warning("the updown script is not told the interface: %s", error)
            return ""


def _cannot(what: str, error: OSError) -> NotStarted:
    """The error for a process that could not be started, for lack of descriptors, memory or processes."""
    reason = error.strerror or str(error)
    return NotStarted(
        f"{what} cannot be started: {reason}",
        errno=error.errno or 0,
        hint="LimitNOFILE, MemoryMax and TasksMax of the service bound what it may use; `ls /proc/PID/fd`",
    )


@trace.spanned("updown")
async def run_updown(
    script: str,
    context: IkeContext,
    *,
    up: bool,
    interface: str,
    reqids: Mapping[bytes, int],
    unique_id: int,
    host_access: bool = False,
) -> None:
    """Call the script once for each selector pair of each child. `reqids` by inbound SPI.

    Errors: NotStarted.
    """
    began = False
    for child in context.children:
        for pair in ts_pairs(child):
            env = updown_environment(
                context,
                child,
                pair,
                up=up,
                interface=interface,
                reqid=reqids.get(child.spi_in, 0),
                unique_id=unique_id,
                host_access=host_access,
            )
            try:
                await _call(script, env)
            except NotStarted as error:
                error.began = began
                raise
            began = True


async def _call(script: str, env: dict[str, str]) -> None:
    path = os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    try:
        process = await _started(
            asyncio.create_subprocess_shell(
                script,
                env={"PATH": path, **env, "IKECTX_TRANSFER": "1"},
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                start_new_session=True,
                umask=UMASK,
            )
        )
    except OSError as error:
        raise _cannot(f"the updown script {script}", error) from None
    except ValueError as error:  # a value that cannot be in an environment
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


async def _started(work: Coroutine[Any, Any, Process]) -> Process:
    """The process. If the step is cancelled while asyncio still connects the pipes, the process runs already,
    and asyncio would end it without what it has started."""
    starting = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        await _end(await starting)
        raise


async def _end(process: Process) -> None:
    """End it with all that it has started: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def _output(process: Process) -> bytes:
    """The output of a process that has ended. Errors: TimeoutError.

    If the wait ends early (also because the step of the transfer was cancelled) the process is ended with all
    that it has started, because the step is repeated, and a "down" must not end after the "up" that follows
    it.
    """
    ended = False
    try:
        out, _ = await asyncio.wait_for(process.communicate(), TIMEOUT)
        ended = True
        return out
    finally:
        if not ended:
            await _end(process)
