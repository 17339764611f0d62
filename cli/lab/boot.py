"""What every way to run a command in a guest has in common: the job, and the process it runs in.

A guest is a process here (a UML kernel, virtme-ng with QEMU, or the command itself where the guest is this
machine). Its console is read to the end of the job. The process group of a guest ends with this process,
whatever ends that: Linux signals the guest when the thread that started it is gone (prctl(2),
PR_SET_PDEATHSIG, set by setpriv(1)).
"""

from __future__ import annotations

import asyncio
import compileall
import contextlib
import importlib.util
import os
import re
import secrets
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ikectx.errors import KernelError

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

CHECKOUT = Path(__file__).resolve().parent.parent.parent
"""The folder of this project's packages."""

PACKAGES = {"ikectx": "ikectx", "vici_bridge": "vici_bridge", "mobike_ext": "mobike_ext", "ikectx_cli": "cli"}
"""The project's packages, and the folder of each below `CHECKOUT`."""

FOLDERS = Path("/tmp")  # noqa: S108  a UML guest's memory may be there, and a unix socket's path is short
"""Where guests and runs have their folders."""

GUEST, CLOCK = "IKECTX_LAB_GUEST", "IKECTX_LAB_CLOCK"
"""Environment variables of a job: in which kind of guest it runs, and by which clock (real, virtual)."""

KEPT_LINES = 12
"""Lines of a console that are told when a guest does not start."""

Output = Callable[[bytes], None]
"""Takes a line that the job has written, to either stream, with its end."""


class NotStartedError(KernelError):
    """A guest ended, or its time was over, before it came to its job. The message ends with what it said."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to run in a guest, and in what kind of guest.

    `argv` runs as root in the folder `folder`, which the guest sees under the same path. `shared` is the one
    folder in which the guest's writes are this machine's, too. `root` is the folder of the installation whose
    programs run. `clock` is real, or virtual: it stands still while a program runs and jumps to the next
    timer while all wait. `cpus`: how many the guest has (0: what suits it). `memory_mib` also holds what the
    guest writes outside of `shared`.
    """

    argv: tuple[str, ...]
    folder: Path = field(default_factory=Path.cwd)
    shared: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    root: Path = Path("/")
    clock: str = "real"
    cpus: int = 0
    memory_mib: int = 1536


@dataclass(frozen=True, slots=True)
class Marks:
    """The words by which a guest's console tells that the job begins, and that it has ended with a status.

    They hold a number drawn for one boot: nothing else that is written can be taken for them.
    """

    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def begin(self) -> str:
        return f"ikectx-guest-{self.token}: begin"

    @property
    def end(self) -> str:
        """Followed by the exit status."""
        return f"ikectx-guest-{self.token}: end "

    def around(self, command: str) -> list[str]:
        """Lines of a shell script that run a command, both its streams on the console, between the marks."""
        begin, end = shlex.quote(self.begin), shlex.quote(self.end)
        return [f"echo {begin}", f"{command} 2>&1", "status=$?", "sync", f"echo {end}$status"]


@dataclass(frozen=True, slots=True)
class Boot:
    """One attempt to start a guest: its command line, and how long it may take to its job (seconds).

    `marks`: None where the command line is the job itself, whose status is that of the process. `gently`:
    seconds between the request to end (SIGTERM) and the order (SIGKILL); 0: the order alone, for a guest that
    has nothing here to tidy up.
    """

    what: str
    words: Sequence[str]
    marks: Marks | None
    patience: float = 60.0
    gently: float = 0.0
    environment: Mapping[str, str] | None = None


async def run(boot: Boot, output: Output) -> int:
    """Runs a guest to the end of its job; returns the job's exit status. The guest ends with this.

    Raises NotStartedError, and KernelError when the guest ended before its job did.
    """
    last_word = signal.SIGTERM if boot.gently else signal.SIGKILL
    words = ["setpriv", "--pdeathsig", last_word.name.removeprefix("SIG"), *boot.words]
    async with _console() as (there, stream):
        try:
            process = await asyncio.create_subprocess_exec(
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=there,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env=None if boot.environment is None else dict(boot.environment),
            )
        except OSError as error:
            raise NotStartedError(f"{boot.what} cannot be started: {words[0]}: {error.strerror}") from None
        finally:
            os.close(there)
        try:
            lines = _lines(stream)
            if boot.marks is None:
                async for line in lines:
                    output(line)
                return await process.wait()
            await _to_job(boot, boot.marks, lines)
            return await _to_end(boot, boot.marks, lines, output)
        finally:
            await _end(process, boot.gently)


@contextlib.asynccontextmanager
async def _console() -> AsyncIterator[tuple[int, asyncio.StreamReader]]:
    """A pipe: the descriptor for the guest, and what comes out of it.

    It is closed here at the end, although a program of the guest's may outlive it and hold the other end.
    asyncio leaves a pipe of its own open then, and complains when the loop is closed.
    """
    here, there = os.pipe()
    stream = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(here, "rb", 0)
    )
    try:
        yield there, stream
    finally:
        transport.close()
        await asyncio.sleep(0)  # closing takes a turn of the loop


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length, the last one perhaps without its end."""
    rest = b""
    while chunk := await stream.read(65536):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


async def _to_job(boot: Boot, marks: Marks, lines: AsyncIterator[bytes]) -> None:
    """Reads to the mark at the job's beginning. Raises NotStartedError."""
    said: deque[str] = deque(maxlen=KEPT_LINES)
    why = "ended before it had started"
    try:
        async with asyncio.timeout(boot.patience):
            async for line in lines:
                text = line.decode(errors="replace").strip()
                if text == marks.begin:
                    return
                if text:
                    said.append(text)
    except TimeoutError:
        why = f"did not start within {boot.patience:.0f} s"
    last = "\n".join(f"  {line}" for line in said)
    raise NotStartedError(
        f"{boot.what} {why}" + (f"; it said last:\n{last}" if last else " and said nothing")
    )


async def _to_end(boot: Boot, marks: Marks, lines: AsyncIterator[bytes], output: Output) -> int:
    """Gives on what the job writes, and returns its status. Raises KernelError."""
    last = ""
    async for line in lines:
        text, mark, status = line.partition(marks.end.encode())
        if text:
            output(text)
        if mark:
            return int(status)
        last = text.decode(errors="replace").strip() or last
    raise KernelError(f"{boot.what} ended before its job did; its last line was: {last or '(none)'}")


async def _end(process: asyncio.subprocess.Process, gently: float) -> None:
    """Ends the process group of a guest: asked first where that is wanted, and then forced."""
    if gently and process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), gently)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


@contextlib.contextmanager
def own_folder(kind: str, where: Path = FOLDERS) -> Iterator[Path]:
    """A folder for as long as it is used; its name has this process, so that `sweep` knows whose it was."""
    with tempfile.TemporaryDirectory(prefix=f"ikl-{kind}-{os.getpid()}-", dir=where) as path:
        yield Path(path)


def sweep(where: Path = FOLDERS) -> list[str]:
    """Removes the folders that killed processes left; returns their names."""
    gone = []
    for path in sorted(where.glob("ikl-*-*-*")):
        owner = re.fullmatch(r"ikl-[a-z]+-([0-9]+)-.*", path.name)
        if owner is not None and not Path("/proc", owner[1]).exists() and _is_ours(path):
            shutil.rmtree(path, ignore_errors=True)
            gone.append(path.name)
    return gone


def _is_ours(path: Path) -> bool:
    """Whether it is a folder of this user's: everybody may write beside it."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def code() -> str:
    """The state of this checkout, as git names it; empty where it is none."""
    words = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def virtual_time() -> bool:
    """Whether this process is in a guest whose clock stands still while a program runs."""
    return os.environ.get(CLOCK) == "virtual"


def byte_code() -> None:
    """Compiles this project's packages where they lie: most guests cannot, and would at every start anew."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            compileall.compile_dir(folder, quiet=2, maxlevels=2)


@contextlib.contextmanager
def tidy() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like Ctrl-C, so that every `finally` runs, and to its end: once is enough."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(_number: int, _frame: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
