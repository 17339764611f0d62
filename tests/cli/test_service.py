"""An agent as a process: it says when it is ready, stops at a signal, and leaves its store closed."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ikectx.disk.place import open_store
from ikectx.disk.store import SqliteStore, opens
from ikectx.errors import ConfigError, KernelError, UsageError
from ikectx_cli import agent, service
from ikectx_cli.config import DEFAULT_SOCKET


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """A process's: `run` is called in the tests' own here."""
    before = os.umask(0o022)
    yield
    os.umask(before)


class Agent:
    """Notes what is done to it; `signals`: what it sends itself once it has started."""

    def __init__(self, store: SqliteStore, *signals: signal.Signals, error: Exception | None = None) -> None:
        self.store = store
        self.calls: list[str] = []
        self._signals = signals
        self._error = error

    async def start(self) -> None:
        self.calls.append("start")
        if self._error is not None:
            raise self._error
        for number in self._signals:
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)

    async def stop(self) -> None:
        self.calls.append("stop")
        self.store.put("test", "open", b"still")


def run(state_dir: Path, *signals: signal.Signals, error: Exception | None = None) -> list[Agent]:
    made: list[Agent] = []

    def make(store: SqliteStore) -> Agent:
        made.append(Agent(store, *signals, error=error))
        return made[-1]

    try:
        assert service.run(state_dir, make) == 0
    finally:
        for agent in made:
            with pytest.raises(Exception, match="closed"):
                agent.store.get("test", "open")
    return made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(tmp_path: Path, number: signal.Signals) -> None:
    (agent,) = run(tmp_path / "state", number)
    assert agent.calls == ["start", "stop"]


def test_each_socket_has_a_mark_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = []
    monkeypatch.setattr(service, "run", lambda *given: marks.append(given[-1]))
    for socket_path in (DEFAULT_SOCKET, "/run/gw.a", "/run/gw.b"):
        config = SimpleNamespace(control=SimpleNamespace(socket=socket_path), state_dir=None, state_key=None)
        agent.run(config)  # type: ignore[arg-type]
    assert list(map(str, marks)) == ["/run/ikectx.mark", "/run/gw.a.mark", "/run/gw.b.mark"]


def test_one_that_cannot_start_is_stopped_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="no way"):
        run(tmp_path / "state", error=KernelError("no way"))


def test_the_store_is_closed_where_there_can_be_no_agent(tmp_path: Path) -> None:
    stores: list[SqliteStore] = []

    def make(store: SqliteStore) -> Agent:
        stores.append(store)
        raise ConfigError("no agent of this")

    with pytest.raises(ConfigError, match="no agent"):
        service.run(tmp_path / "state", make)
    with pytest.raises(Exception, match="closed"):
        stores[0].get("test", "open")


def test_what_it_makes_is_its_owners(tmp_path: Path) -> None:
    run(tmp_path / "state", signal.SIGTERM)
    for path in (tmp_path / "state").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path.name


def test_the_stores_key_is_systemds_credential_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LoadCredentialEncrypted= gives it: systemd has decrypted it, with a TPM if there is one."""
    credentials, place = tmp_path / "credentials", tmp_path / "state"
    credentials.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    other = credentials / "something.else"
    other.write_bytes(b"of another service")
    assert service.key_file(None) is None
    key = credentials / "ikectx.state-key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o400)
    assert service.key_file(None) == key
    assert service.key_file(tmp_path / "configured") == tmp_path / "configured"
    run(place, signal.SIGTERM)
    assert not (place / "state.key").exists() and opens(place / "state.db", bytes(range(32)))
    with open_store(place, key_file=key) as store, pytest.raises(UsageError, match="comes from") as caught:
        service.rotate(store, place, None, {})
    assert "--key" in caught.value.hint


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_when_it_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    path = f"@ikectx-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + path[1:] if abstract else path)
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        with pytest.raises(KernelError):
            run(tmp_path / "state", error=KernelError("no way"))
        with pytest.raises(BlockingIOError):
            systemd.recv(100)
        run(tmp_path / "state", signal.SIGTERM)
        assert systemd.recv(100) == b"READY=1"


def test_a_notify_socket_that_is_gone_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    (agent,) = run(tmp_path / "state", signal.SIGTERM)
    assert agent.calls == ["start", "stop"]


def test_a_log_level_that_is_none_is_a_mistake_of_the_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IKECTX_LOG", "loud")
    with pytest.raises(UsageError, match="'loud'") as caught:
        run(tmp_path / "state", signal.SIGTERM)
    assert "debug" in caught.value.hint
    assert not (tmp_path / "state").exists(), "nothing is begun"


@pytest.mark.parametrize("last", ["before the end", "with the end"])
def test_all_items_come_before_the_end_of_the_work(last: str) -> None:
    async def main() -> list[int]:
        items: asyncio.Queue[int] = asyncio.Queue()

        async def work() -> None:
            items.put_nowait(1)
            await asyncio.sleep(0)
            items.put_nowait(2)
            items.put_nowait(3)
            if last == "before the end":
                await asyncio.sleep(0.01)

        return [item async for item in service.until_done(asyncio.ensure_future(work()), items)]

    assert asyncio.run(main()) == [1, 2, 3]


def test_work_that_fails_ends_its_items() -> None:
    async def main() -> None:
        items: asyncio.Queue[int] = asyncio.Queue()

        async def work() -> None:
            items.put_nowait(1)
            raise KernelError("no way")

        task = asyncio.ensure_future(work())
        assert [item async for item in service.until_done(task, items)] == [1]
        with pytest.raises(KernelError):
            await task

    asyncio.run(main())


def test_a_client_that_leaves_stops_no_work() -> None:
    async def main() -> None:
        items: asyncio.Queue[int] = asyncio.Queue()
        go = asyncio.Event()

        async def work() -> str:
            await go.wait()
            return "done"

        task = asyncio.ensure_future(work())

        async def listen() -> None:
            async for _ in service.until_done(task, items):
                pass

        listener = asyncio.ensure_future(listen())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task(), task}, "nothing waits on for its items"
        go.set()
        assert await task == "done"

    asyncio.run(main())


def test_what_nobody_caught_is_logged_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(service._mistake)
        loop.call_soon(int, "a key")
        await asyncio.sleep(0.01)
        loop.call_exception_handler(
            {
                "message": "socket.accept() out of system resource",
                "exception": OSError(24, "Too many open files"),
            }
        )
        loop.call_exception_handler({"message": "something else"})

    asyncio.run(scenario())
    assert "ValueError, a mistake in the program" in caplog.text and "a key" not in caplog.text
    assert "the event loop: Too many open files" in caplog.text
    assert "the event loop: something else" in caplog.text


def test_words_from_outside_forge_no_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.Logger("root")
    monkeypatch.setattr(logging, "root", root)
    monkeypatch.setattr(logging, "getLogger", lambda name=None: root)
    run(tmp_path, signal.SIGTERM)
    root.warning("%s is gone", "a\nERROR ikectx: forged\x1b[31m")
    assert "WARNING root: a\\x0aERROR ikectx: forged\\x1b[31m is gone" in capsys.readouterr().err


def test_the_limit_of_the_log_ends_with_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.Logger("root")
    monkeypatch.setattr(logging, "root", root)
    monkeypatch.setattr(logging, "getLogger", lambda name=None: root)
    run(tmp_path, signal.SIGTERM)
    for _ in range(100):
        root.warning("again")
    assert capsys.readouterr().err.count("WARNING root: again") == 100


def test_the_journal_gets_priorities(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w+") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        found = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        handler = logging.StreamHandler(stream)
        handler.setFormatter(service.log_format())
        for level, text in ((logging.INFO, "well"), (logging.WARNING, "two\nlines"), (logging.ERROR, "bad")):
            handler.emit(logging.LogRecord("a", level, "", 0, text, None, None))
        stream.seek(0)
        assert stream.read().splitlines() == [
            "<6>INFO a: well",
            "<4>WARNING a: two",
            "<4>lines",
            "<3>ERROR a: bad",
        ]
        monkeypatch.setenv("JOURNAL_STREAM", "0:0")
        assert not isinstance(service.log_format(), service.JournalFormatter)
