"""Runs a connection's updown script as charon's updown plugin would, for SAs charon did not set up.

charon calls no script for an imported CHILD_SA, and none for one that is deleted over HA (5.9.8, 6.0.6). A
script's failure is logged and changes nothing, as with charon. But if a script could not even be started,
that is an error, because an SA that is served without its script gets no packets: the caller undoes its step,
or tries again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from ikectx import trace
from ikectx.errors import KernelError
from ikectx.sa.context import Address, IkeContext
from vici_bridge import updown_helper
from vici_bridge.vici.environment import ts_pairs, updown_environment

log = logging.getLogger(__name__)


class Ways(Protocol):
    """`vici_bridge.kernel.Detour`, as far as scripts need it."""

    def device_name(self, destination: Address, source: Address) -> str:
        """The device towards a destination, empty if there is no way. Errors: KernelError."""


class NotStarted(KernelError):
    """A script could not be started. `began`: it has run for other traffic selectors of that SA before."""

    began = False


@dataclass(frozen=True, slots=True)
class Script:
    """A connection's updown script. `helper`: the socket of the helper that runs it; empty: this process
    does."""

    command: str
    connection: str = ""
    helper: str = ""

    async def run(self, env: Mapping[str, str]) -> tuple[int, bytes]:
        """Its exit code and output. Errors: OSError if it could not be started; TimeoutError; ValueError
        for a variable that cannot be in an environment."""
        if self.helper:
            return await updown_helper.ask(self.helper, self.connection, env)
        return await updown_helper.execute(self.command, env)


class Scripts:
    """The updown scripts of a gateway, by connection name; `ways`: those of its kernel."""

    def __init__(
        self, scripts: Mapping[str, str], ways: Ways, host_access: Collection[str] = (), helper: str = ""
    ) -> None:
        """`host_access`: connections whose children have `hostaccess = yes`. `helper`: as in `Script`."""
        self._scripts = scripts
        self._ways = ways
        self._host_access = host_access
        self._helper = helper

    async def run(
        self, context: IkeContext, *, up: bool, reqids: Mapping[bytes, int], unique_id: int
    ) -> None:
        """The script of the SA's connection, if it has one. `reqids` by inbound SPI.

        Errors: NotStarted if it could not be started.
        """
        script = self._scripts.get(context.connection)
        if script:
            await run_updown(
                Script(script, context.connection, self._helper),
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


def _cannot(script: Script, error: OSError) -> NotStarted:
    """The error for a script that could not be started: for lack of descriptors or memory, or of the
    helper."""
    hint = "LimitNOFILE, MemoryMax and TasksMax of the service bound what it may use; `ls /proc/PID/fd`"
    if script.helper:
        hint = f"the updown helper ({script.helper}): systemctl status ikectx-updown.socket ikectx-updown"
    reason = error.strerror or str(error)
    text = f"the updown script {script.command} cannot be started: {reason}"
    return NotStarted(text, errno=error.errno or 0, hint=hint)


@trace.spanned("updown")
async def run_updown(
    script: Script,
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


async def _call(script: Script, env: Mapping[str, str]) -> None:
    try:
        code, out = await script.run({**env, "IKECTX_TRANSFER": "1"})
    except TimeoutError:
        seconds = updown_helper.TIMEOUT
        log.warning("updown script %s took over %.0f s and was ended", script.command, seconds)
        return
    except OSError as error:
        raise _cannot(script, error) from None
    except ValueError as error:  # a value that cannot be in an environment
        log.warning("updown script %s cannot be run: %s", script.command, error)
        return
    for line in out.decode("utf-8", "replace").splitlines():
        log.info("updown: %s", line)
    if code:
        log.warning("updown script %s exited with %d", script.command, code)
