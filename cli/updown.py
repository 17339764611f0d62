"""`ikectx updown`: the hook for `updown =` in swanctl.conf. Standard library only: it must start fast.

charon (the updown plugin, strongSwan 5.9.8 to 6.0.6) runs it through a shell, once for each pair of traffic
selectors when a CHILD_SA comes up or goes down, with PLUTO_* in the environment, and *waits for it while it
has the IKE_SA checked out*. When a CHILD_SA comes up, the agent is told and not waited for. When it goes
down, the agent's answer is waited for, but not for long: as long as charon waits here, the SA's keys and
counters are still in the kernel, for a handover. After that charon's stock script takes over, with the same
environment and the same arguments. No failure here affects the SA.

    updown = /path/to/.venv/bin/ikectx updown --connection home
    updown = /path/to/.venv/bin/ikectx updown --connection home --then "/etc/my-updown with arguments"

PLUTO_CONNECTION has the name of the *child*; `--connection` names the connection that it belongs to.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

STOCK = (
    "/usr/lib/ipsec/_updown",
    "/usr/libexec/ipsec/_updown",
    "/usr/libexec/strongswan/_updown",
    "/usr/local/libexec/ipsec/_updown",
)
"""Paths of charon's own script: Debian, others, Fedora, built from source."""

DEFAULT_SOCKET = "/run/ikectx.vici"
DEFAULT_CONFIG = "/etc/ikectx/ikectx.toml"
LONGEST = 1 << 20
"""Octets of a configuration file."""
PATIENCE = 0.5
"""Seconds that the agent has to accept the message."""
DOWN_PATIENCE = 8.0
"""Seconds that the agent has to answer when an SA goes down: at once, or when it has handed the SA over."""

HELP = """\
Usage: ikectx updown [--connection NAME] [--then COMMAND] [--config FILE] [--socket PATH] [ARGUMENT...]

  The hook for `updown =` in swanctl.conf. Tells the agent what charon says in
  PLUTO_*, then runs charon's stock script with the same environment and the
  ARGUMENTs, or COMMAND (by a shell) in its place.
"""


def main(args: Sequence[str]) -> NoReturn:
    """Tell the agent, then become the script that charon would have run."""
    options, rest = parse(args)
    if "help" in options:
        print(HELP, end="")
        sys.exit(0)
    if os.environ.get("PLUTO_VERB") and not os.environ.get("IKECTX_TRANSFER"):
        down = os.environ["PLUTO_VERB"].startswith("down")
        tell(socket_path(options), request(os.environ, options.get("connection", "")), answer=down)
    sys.stdout.flush()
    run_script(options.get("then"), rest)


def parse(args: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Options of ours, wherever they are before `--`, and the rest for the script."""
    options: dict[str, str] = {}
    rest: list[str] = []
    left = list(args)
    while left:
        arg = left.pop(0)
        name, equals, value = arg.partition("=")
        if arg == "--":
            rest += left
            break
        if arg == "--help":
            options["help"] = ""
        elif name in ("--connection", "--then", "--config", "--socket") and (equals or left):
            options[name[2:]] = value if equals else left.pop(0)
        else:
            rest.append(arg)
    return options, rest


def socket_path(options: Mapping[str, str]) -> str:
    """The given socket, or that of the environment or the configuration, or the default."""
    given = options.get("socket") or os.environ.get("IKECTX_SOCKET")
    if given:
        return given
    path = options.get("config") or os.environ.get("IKECTX_CONFIG") or DEFAULT_CONFIG
    try:
        import tomllib

        with open(path, "rb") as file:
            text = file.read(LONGEST).decode()
        return str(tomllib.loads(text)["control"]["socket"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return DEFAULT_SOCKET


def request(env: Mapping[str, str], connection: str) -> bytes:
    """The VICI packet for the command `updown`, with its length in front: verb, reqid, child, PLUTO_*."""
    values = {name: value for name, value in env.items() if name.startswith("PLUTO_")}
    values["verb"] = env.get("PLUTO_VERB", "").partition("-")[0]
    values["reqid"] = env.get("PLUTO_REQID", "")
    values["child"] = env.get("PLUTO_CONNECTION", "")
    if connection:
        values["connection"] = connection
    body = b""
    for name, value in sorted(values.items()):
        key, octets = (text.encode("utf-8", "replace") for text in (name, value))
        if len(key) <= 255 and len(octets) <= 65535:
            body += b"\3" + bytes([len(key)]) + key + len(octets).to_bytes(2) + octets
    packet = b"\0\6updown" + body
    return len(packet).to_bytes(4) + packet


def tell(path: str, packet: bytes, *, answer: bool) -> None:
    """Send it, wait for the `answer` if wanted, and go on; a word on standard output is for charon's log."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(path)
            sock.sendall(packet)
            if answer:
                sock.settimeout(DOWN_PATIENCE)
                sock.recv(4096)
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        print(f"ikectx: the agent on {path!r} was not told, or is silent: {why}")


def run_script(then: str | None, args: Sequence[str]) -> NoReturn:
    """Become the script. Without one there is nothing to do, as in charon's default."""
    try:
        if then:
            os.execv("/bin/sh", ["sh", "-c", f'{then} "$@"', "updown", *args])  # noqa: S606
        for script in STOCK:
            if os.access(script, os.X_OK):
                os.execv(script, [script, *args])  # noqa: S606
    except OSError as error:
        print(f"ikectx: the updown script cannot be run: {error.strerror or error}")
    sys.stdout.flush()
    sys.exit(0)
