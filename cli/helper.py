"""`ikectx updown-helper`: runs updown scripts as root for an agent that is not, on a socket of systemd's
(I/O)."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
import sys
from functools import partial
from pathlib import Path

from ikectx.errors import ConfigError, UsageError
from ikectx.escape import Escaping
from vici_bridge.updown_helper import LONGEST, serve

from .config import Config
from .service import log_format

log = logging.getLogger("ikectx")


def run(config: Config) -> int:
    """Serve until SIGTERM or SIGINT. Errors: UsageError without a socket, ConfigError for a file that
    others can write."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        raise UsageError(
            "the helper gets its socket from systemd",
            hint="see examples/systemd/own-user; systemctl enable --now ikectx-updown.socket",
        )
    only_root_writes(config.path)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(log_format())
    handler.addFilter(Escaping())
    logging.basicConfig(level="INFO", handlers=[handler])
    if sys.version_info < (3, 12):  # see `service.run`
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())
    sock = socket.socket(fileno=3)
    sock.set_inheritable(False)  # no script gets it
    asyncio.run(_serve(config, sock))
    return 0


def only_root_writes(path: Path) -> None:
    """Errors: ConfigError where another user could change which scripts are run as root."""
    real = path.resolve()
    for one in (path, path.parent, real, real.parent):
        info = os.stat(one)
        if info.st_uid not in (0, os.geteuid()) or stat.S_IMODE(info.st_mode) & 0o022:
            raise ConfigError(
                f"{one} can be changed by others than root, and it names scripts that root runs",
                hint=f"chown root {one}; chmod go-w {one}",
            )


async def _serve(config: Config, sock: socket.socket) -> None:
    scripts = {name: one.updown for name, one in config.connections.items() if one.updown}
    sock.setblocking(False)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = await asyncio.start_unix_server(partial(serve, scripts), sock=sock, limit=LONGEST)
    async with server:
        log.info("updown scripts of %d connections are run for the agent", len(scripts))
        await stop.wait()
