"""The helper that runs updown scripts for an agent, and what an agent cannot make it do."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from ikectx.errors import ConfigError, UsageError
from ikectx_cli import helper
from ikectx_cli.config import parse
from tests.hand_loop import run_bounded as run
from tests.peers import a_context
from vici_bridge import updown_helper
from vici_bridge.updown import NotStarted, Script, run_updown
from vici_bridge.updown_helper import ask, serve


@asynccontextmanager
async def helping(folder: Path, **scripts: str) -> AsyncIterator[str]:
    path = str(folder / "helper")
    async with await asyncio.start_unix_server(partial(serve, scripts), path, limit=updown_helper.LONGEST):
        yield path


def test_a_script_gets_what_charon_would_give_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of the helper's own")

    async def scenario() -> None:
        async with helping(tmp_path, home="umask; env | sort; exit 7") as path:
            code, out = await ask(path, "home", {"PLUTO_VERB": "up-client", "IKECTX_TRANSFER": "1"})
        assert code == 7
        umask, *env = out.decode().splitlines()
        assert umask == "0022"
        assert [one.partition("=")[0] for one in env if not one.startswith(("_", "PWD", "SHLVL"))] == [
            "IKECTX_TRANSFER",
            "PATH",
            "PLUTO_VERB",
        ]

    run(scenario())


def test_an_agent_uses_it(tmp_path: Path) -> None:
    context = a_context()

    async def scenario() -> None:
        async with helping(
            tmp_path, **{context.connection: f'echo "$PLUTO_VERB" >> {tmp_path}/told'}
        ) as path:
            script = Script("the helper has its own", context.connection, path)
            await run_updown(script, context, up=True, interface="eth0", reqids={}, unique_id=1)
        assert (tmp_path / "told").read_text().startswith("up-")
        with pytest.raises(NotStarted, match="cannot be started") as caught:
            await run_updown(
                Script("x", "home", str(tmp_path / "none")),
                context, up=True, interface="eth0", reqids={}, unique_id=1,
            )  # fmt: skip
        assert "ikectx-updown.socket" in caught.value.hint
        async with helping(tmp_path, other="true") as path:  # the configuration was changed meanwhile
            with pytest.raises(NotStarted, match=r"no script of .* \(systemctl restart ikectx-updown\)"):
                await run_updown(
                    Script("x", "home", path),
                    context, up=True, interface="eth0", reqids={}, unique_id=1,
                )  # fmt: skip

    run(scenario())


@pytest.mark.parametrize(
    "told",
    [
        {"connection": "another", "env": {}},
        {"connection": "home", "env": {"LD_PRELOAD": "/tmp/x.so"}},
        {"connection": "home", "env": {"PATH": "/tmp"}},
        {"connection": "home", "env": {"PLUTO_X": 1}},
        {"connection": "home", "env": {"PLUTO_X": "a\0b"}},
        {"connection": "home", "env": []},
        {"connection": ["home"], "env": {}},
        {"connection": "home"},
        ["home"],
        "",
        "x" * (updown_helper.LONGEST + 1),
        "[" * 100_000,
    ],
)
def test_nothing_else_is_run(told: object, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with helping(tmp_path, home=f"touch {tmp_path}/ran") as path:
            reader, writer = await asyncio.open_unix_connection(path)
            line = (told if isinstance(told, str) and told else json.dumps(told)).encode() + b"\n"
            writer.write(line)
            answer = await reader.read()
            assert json.loads(answer)["error"] if len(line) <= updown_helper.LONGEST else not answer
            writer.close()
        assert not (tmp_path / "ran").exists()

    run(scenario())


def test_output_of_any_octets_comes_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with helping(tmp_path, home="head -c 300000 /dev/zero | tr '\\0' '\\377'; exit 4") as path:
            code, out = await ask(path, "home", {})
        assert (code, out.decode()) == (4, "\N{REPLACEMENT CHARACTER}" * updown_helper.LONGEST)

    run(scenario())


def test_output_without_an_end_stops_nothing_else_and_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script may write as fast as it is read."""
    read, rounds, kept, really = 0, 0, list[bytes](), os.read

    def always(number: int, size: int) -> bytes:
        nonlocal read
        if size != 1 << 16:  # how `subprocess` hears that the program could not be started
            return really(number, size)
        read += 1
        assert read <= rounds + 2, "nothing else was done meanwhile"
        return b"" if read > 20 else b"x" * size

    async def count() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    async def scenario() -> None:
        counting = asyncio.create_task(count())
        with monkeypatch.context() as patch:
            patch.setattr(os, "read", always)
            kept.append((await updown_helper.execute("true", {}))[1])
        counting.cancel()
        assert len(kept[0]) == updown_helper.LONGEST

    run(scenario())


def test_a_script_ends_with_the_agent_that_asked_or_after_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with helping(tmp_path, home=f"echo $$ > {tmp_path}/pid; sleep 60") as path:

            async def ended(work: Awaitable[object]) -> None:
                task = asyncio.ensure_future(work)
                while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                    await asyncio.sleep(0.01)
                pid = int((tmp_path / "pid").read_text())
                if not late:
                    task.cancel()
                with pytest.raises(TimeoutError if late else asyncio.CancelledError):
                    await task
                while os.path.exists(f"/proc/{pid}"):
                    await asyncio.sleep(0.01)
                (tmp_path / "pid").unlink()

            late = False
            await ended(ask(path, "home", {}))
            monkeypatch.setattr(updown_helper, "TIMEOUT", 0.5)
            late = True
            await ended(ask(path, "home", {}))

    run(scenario())


def test_the_process_with_the_socket_that_systemd_gives(tmp_path: Path) -> None:
    path = configuration(tmp_path)
    program = textwrap.dedent(f"""
        import os, socket, sys
        from pathlib import Path
        from ikectx_cli import helper
        from ikectx_cli.config import load

        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        assert sock.detach() == 3
        sock = socket.socket(fileno=3)
        sock.bind({str(tmp_path / "socket")!r})
        sock.listen()
        sock.set_inheritable(True)  # as systemd gives it
        sock.detach()
        os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
        print("listening", flush=True)
        sys.exit(helper.run(load(Path({str(path)!r}))))
    """)

    async def scenario() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"listening\n"
        try:
            assert await ask(str(tmp_path / "socket"), "home", {"PLUTO_VERB": "up"}) == (3, b"up\n")
        finally:
            process.terminate()
            _, said = await process.communicate()
        assert process.returncode == 0, said
        assert b"the script of home was run for the agent: exit code 3" in said

    run(scenario())


def configuration(folder: Path) -> Path:
    """A file that only this user can write, in such a folder."""
    path = folder / "ikectx.toml"
    path.write_text(
        'name = "psg"\n[gateway]\naddresses = ["192.0.2.1"]\n'
        '[transfer]\nlisten = ["192.0.2.1:5091"]\ncertificate = "a"\nkey = "a"\nca = "a"\n'
        "[connections.home]\nupdown = '[ -e /proc/self/fd/3 ] || echo $PLUTO_VERB; exit 3'\n"
    )
    folder.chmod(0o755)
    path.chmod(0o644)
    return path


def test_the_helper_runs_only_with_systemd_s_socket_and_root_s_configuration(tmp_path: Path) -> None:
    path = configuration(tmp_path)
    with pytest.raises(UsageError, match="from systemd"):
        helper.run(parse(path.read_text(), path))
    helper.only_root_writes(path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    link = elsewhere / "ikectx.toml"
    link.symlink_to(path)
    helper.only_root_writes(link)
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="can be changed by others than root"):
        helper.only_root_writes(link)
    tmp_path.chmod(0o755)
    path.chmod(0o664)
    with pytest.raises(ConfigError, match="can be changed by others than root"):
        helper.only_root_writes(path)
