"""The updown script that the agent runs for SAs that charon did not set up: what it gets, how it ends."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ikectx.errors import KernelError
from ikectx.numbers import IdType
from ikectx.sa.context import Address, Identity, IkeContext
from tests.peers import a_context
from vici_bridge import updown_helper
from vici_bridge.updown import Script, Scripts, run_updown


def call(script: str, context: IkeContext | None = None) -> None:
    asyncio.run(_run(script, context))


async def _run(script: str, context: IkeContext | None = None) -> None:
    await run_updown(
        Script(script), context or a_context(), up=True, interface="eth0", reqids={}, unique_id=1
    )


def test_b5_an_identity_with_a_nul_octet_is_no_error(tmp_path: Path) -> None:
    odd = replace(a_context(), remote_id=Identity(IdType.FQDN, b"a\0b"))
    call(f'echo "$PLUTO_PEER_ID" > {tmp_path}/id', odd)
    assert (tmp_path / "id").read_text() == "a?b\n"


def test_b5_what_cannot_stand_in_an_environment_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    odd = replace(a_context(), children=(replace(a_context().children[0], name="a\0b"),))
    call("true", odd)
    assert "cannot be run" in caplog.text


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOMEM, errno.EAGAIN])
def test_a_script_that_cannot_be_started_is_an_error(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a warning: an SA was owned whose packets nobody led here."""

    def none(*_: object, **more: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(subprocess, "Popen", none)
    with pytest.raises(KernelError, match="the updown script true cannot be started") as caught:
        call("true")
    assert caught.value.errno == error and "LimitNOFILE" in caught.value.hint


@pytest.mark.parametrize(("name", "expected"), [("eth7", "eth7"), (None, "unknown")])
def test_the_script_is_told_the_interface_if_the_kernel_knows_a_way(
    name: str | None, expected: str, tmp_path: Path
) -> None:
    class Ways:
        def device_name(self, destination: Address, source: Address) -> str:
            assert (destination, source) == (a_context().remote.address, a_context().local.address)
            if name is None:
                raise KernelError("no netlink")
            return name

    scripts = Scripts({a_context().connection: f'echo "<$PLUTO_INTERFACE>" > {tmp_path}/told'}, Ways())
    asyncio.run(scripts.run(a_context(), up=True, reqids={}, unique_id=1))
    assert (tmp_path / "told").read_text() == f"<{expected}>\n"


def test_b24_the_umask_is_charons_not_the_agents(tmp_path: Path) -> None:
    before = os.umask(0o077)  # as `service.run` sets it
    try:
        call(f"echo > {tmp_path}/state")
    finally:
        os.umask(before)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("head", ["#!/bin/sh\n", ""])
def test_a_plain_path_is_run_without_a_shell_if_it_can_be(head: str, tmp_path: Path) -> None:
    """A shell of its own takes as long as a short script. Only a shell runs a file that names no program."""
    script = tmp_path / "up+down.sh"
    script.write_text(head + f'echo "$PLUTO_VERB $*" >> {tmp_path}/ran; echo $PPID > {tmp_path}/parent\n')
    script.chmod(0o755)
    call(f"{script} --table 5 key=a:b")
    assert (tmp_path / "ran").read_text() == "up-client --table 5 key=a:b\n"
    assert (tmp_path / "ran").stat().st_mode & 0o777 == 0o644
    if head:
        assert (tmp_path / "parent").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize(
    "quoted", ["$PLUTO_VERB", "'a  b'", "~", "a*", "x; false", "`id`", "a\\b", "x > /dev/null"]
)
def test_what_a_shell_would_change_is_for_a_shell(quoted: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('#!/bin/sh\necho got "$@"\n')
    script.chmod(0o755)
    env = {"PLUTO_VERB": "up-client", "HOME": "/root"}
    by_shell = subprocess.run(
        ["/bin/sh", "-c", f"{script} {quoted}"], env={**os.environ, **env}, capture_output=True, check=False
    )
    code, out = asyncio.run(updown_helper.execute(f"{script} {quoted}", env))
    assert (code, out) == (by_shell.returncode, by_shell.stdout + by_shell.stderr)


@pytest.mark.parametrize("mode", [0o644, None])
def test_the_shell_says_what_is_wrong_with_a_file_that_is_no_program(
    mode: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    if mode is not None:
        (tmp_path / "script").write_text("#!/bin/sh\n")
        (tmp_path / "script").chmod(mode)
    call(f"{tmp_path}/script")
    assert ("Permission denied" if mode else "not found") in caplog.text
    assert f"exited with {126 if mode else 127}" in caplog.text


def gone(pid: int) -> bool:
    """Soon: a killed process ends when it gets the CPU, and is a zombie until its parent has asked for it."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


SCRIPT = "sleep 30 & echo $! > {0}/started; echo $$ > {0}/shell; wait; echo $PLUTO_VERB >> {0}/done"


async def _started(folder: Path) -> list[int]:
    while not (folder / "shell").exists() or not (folder / "shell").read_text().endswith("\n"):
        await asyncio.sleep(0.01)
    return [int((folder / name).read_text()) for name in ("started", "shell")]


def test_b32_a_script_ends_with_the_step_that_ran_it(tmp_path: Path) -> None:
    async def scenario() -> list[int]:
        step = asyncio.create_task(_run(SCRIPT.format(tmp_path)))
        pids = await _started(tmp_path)
        step.cancel()  # the limit of the step, or the agent stops
        with pytest.raises(asyncio.CancelledError):
            await step
        return pids

    assert all(gone(pid) for pid in asyncio.run(scenario()))
    assert not (tmp_path / "done").exists()


def test_b32_what_a_script_has_started_ends_with_it_when_it_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vici_bridge.updown_helper.TIMEOUT", 0.5)
    call(SCRIPT.format(tmp_path))
    assert "was ended" in caplog.text
    assert all(gone(int((tmp_path / name).read_text())) for name in ("started", "shell"))
