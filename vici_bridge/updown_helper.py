"""Runs updown scripts for an agent that has not the rights which charon gives them: both ends of its socket
(I/O).

The helper knows the scripts from the configuration, and the agent names a connection and gives the PLUTO_*
variables: whoever takes the agent over can call these scripts, with any such variables, and nothing else. One
connection is one call: a line of JSON there and one back. If the agent goes, the script is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import signal
import subprocess
from collections.abc import Mapping

from ikectx.within import Limit

log = logging.getLogger(__name__)

TIMEOUT = 20.0
"""Seconds that a script may take; charon itself would wait for ever."""
UMASK = 0o022
"""charon's own umask, as systemd starts it; the agent's own makes files that nobody else can read."""
_SHELL = "/bin/sh"
LONGEST = 1 << 18
"""Octets of a request, and of the output that is passed on."""
_ANSWER = 6 * LONGEST + 256
"""Octets of an answer: JSON has six for one that is no text."""
PATIENCE = 5.0
"""Seconds that a request may take to arrive."""
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
_PLAIN = re.compile(r"/[\w./+-]+( [\w./:=,@%+-]+)*", re.ASCII)
"""A script that means the same to the kernel as to a shell."""
_VARIABLE = re.compile(r"PLUTO_[A-Z0-9_]{1,64}|IKECTX_TRANSFER")


async def execute(script: str, env: Mapping[str, str]) -> tuple[int, bytes]:
    """Run a script, by a shell where it needs one, with PATH, these variables and charon's umask: its exit
    code and output.

    Errors: OSError if it could not be started; TimeoutError; ValueError for a variable that cannot be in an
    environment.
    """
    out, theirs = os.pipe()
    try:
        try:
            process = _start(script, env, theirs)
        finally:
            os.close(theirs)
        os.set_blocking(out, False)
        return await _ended(process, out)
    finally:
        os.close(out)


# --- the agent's end ---------------------------------------------------------------------------------------


async def ask(path: str, connection: str, env: Mapping[str, str]) -> tuple[int, bytes]:
    """Have the helper at that socket run the connection's script. Result and errors: those of `execute`."""
    reader, writer = await asyncio.open_unix_connection(path, limit=_ANSWER)
    try:
        writer.write(json.dumps({"connection": connection, "env": dict(env)}).encode() + b"\n")
        with Limit(TIMEOUT + PATIENCE):
            answer = await reader.readline()
    finally:
        writer.close()
    try:
        told = json.loads(answer)
        if told.get("late"):
            raise TimeoutError
        if error := told.get("error"):
            raise OSError(int(told.get("errno") or errno.EPERM), str(error))
        return int(told["code"]), str(told["output"]).encode()
    except _UNREADABLE:
        raise OSError(errno.EPROTO, "the updown helper gave no answer that can be read") from None


# --- the helper's end --------------------------------------------------------------------------------------


async def serve(
    scripts: Mapping[str, str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """One call by an agent. `scripts`: by connection name. Raises nothing."""
    try:
        async with asyncio.timeout(PATIENCE):
            line = await reader.readline()
        answer = await _answer(scripts, line, reader)
        if answer is not None:
            writer.write(json.dumps(answer).encode() + b"\n")
            async with asyncio.timeout(PATIENCE):
                await writer.drain()
    except (OSError, ValueError) as error:  # TimeoutError is an OSError; ValueError: the line is too long
        log.warning("an agent's call was given up: %s", error or "it took too long")
    finally:
        writer.close()


async def _answer(
    scripts: Mapping[str, str], line: bytes, reader: asyncio.StreamReader
) -> dict[str, object] | None:
    """None if the agent has gone."""
    try:
        connection, env = _read(line)
        script = scripts.get(connection)
    except _UNREADABLE as error:
        log.warning("an agent's call was refused: %s", error)
        return {"error": "the updown helper refused the call: its log says why", "errno": 0}
    if script is None:
        log.warning("an agent asked for the script of connection %s, which has none here", connection)
        found = f"the updown helper has no script of {connection}: it read ikectx.toml when it started"
        return {"error": f"{found} (systemctl restart ikectx-updown)", "errno": errno.ENOENT}
    work = asyncio.create_task(execute(script, env))
    gone = asyncio.create_task(reader.read(1))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return None
        code, out = work.result()
    except TimeoutError:
        return {"late": True}
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else 0
        return {"error": os.strerror(number) if number else str(error), "errno": number or 0}
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
    log.info("the script of %s was run for the agent: exit code %d", connection, code)
    return {"code": code, "output": out[:LONGEST].decode("utf-8", "replace")}


def _read(line: bytes) -> tuple[str, dict[str, str]]:
    """Errors: `_UNREADABLE`."""
    told = json.loads(line)
    connection, env = told["connection"], told["env"]
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name) or not isinstance(value, str):
            raise ValueError(f"a variable is not one of charon's: {name!r}")
    return connection, env


# --- processes ---------------------------------------------------------------------------------------------


def _start(script: str, env: Mapping[str, str], out: int) -> subprocess.Popen[bytes]:
    """Start a script with its output to that descriptor, in a session of its own.

    A path with plain arguments needs no shell of its own, which takes as long as a short script. The shell
    says what is wrong with a file that cannot be run. asyncio's own subprocesses have three transports each,
    and before Python 3.12 a thread.
    """
    env = {"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), **env}

    def start(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            words,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            close_fds=False,  # all others are closed by the exec
            start_new_session=True,
            umask=UMASK,
        )

    if _PLAIN.fullmatch(script):
        with contextlib.suppress(OSError):  # a file without `#!`, or none
            return start(*script.split())
    return start(_SHELL, "-c", script)


async def _ended(process: subprocess.Popen[bytes], out: int) -> tuple[int, bytes]:
    """The exit code and output of a process that has ended. Errors: TimeoutError.

    If the wait ends early (also because the step of the transfer was cancelled) the process is ended with all
    that it has started, because the step is repeated, and a "down" must not end after the "up" that follows
    it.
    """
    code = None
    try:
        with Limit(TIMEOUT):
            octets = await _output(out)
            code = await _end(process)
        return code, octets
    finally:
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await _end(process)


async def _output(out: int) -> bytes:
    """The first `LONGEST` octets of what comes through a pipe until nobody has its other end any more."""
    loop, octets = asyncio.get_running_loop(), b""
    while True:
        try:
            more = os.read(out, 1 << 16)
        except BlockingIOError:
            readable = asyncio.Event()
            loop.add_reader(out, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(out)
            continue
        if not more:
            return octets
        octets += more[: LONGEST - len(octets)]
        await asyncio.sleep(0)  # a script may write as fast as this reads


async def _end(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that ends; mostly it has, because that closes its output."""
    pause = 0.0
    while (code := process.poll()) is None:
        await asyncio.sleep(pause)
        pause = min(pause + 0.001, 0.05)
    return code
