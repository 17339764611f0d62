"""The socket to charon's HA plugin: what is lost there is told to nobody but us."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import resource
import select
import socket
import subprocess
import sys
import textwrap

import pytest

from ikectx.errors import CharonError, StateError
from vici_bridge.ha import sockets
from vici_bridge.ha.sockets import HaSocket


async def read(agent: HaSocket) -> None:
    """The agent reads what has come. asyncio takes one datagram in a round of the loop."""
    while select.select([agent._sock], [], [], 0)[0]:
        await asyncio.sleep(0)


@pytest.mark.parametrize("messages, full", [(3, False), (200, True)])
def test_messages_that_found_the_buffer_full_are_counted_once(
    messages: int, full: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # with and without root
    monkeypatch.setattr(sockets, "_BUFFER", 8192)
    monkeypatch.setattr(sockets, "_SO_RCVBUFFORCE", socket.SO_RCVBUF)
    heard: list[bytes] = []
    lost: list[int] = []

    async def scenario() -> None:
        charon = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        charon.bind(("127.0.0.1", 0))
        port = charon.getsockname()[1]
        agent = HaSocket("127.0.0.2", "127.0.0.1", heard.append, port)
        await agent.open()
        charon.connect(("127.0.0.2", port))
        for _ in range(messages):
            charon.send(bytes(160))  # while the agent has no time to read
        await read(agent)
        charon.send(b"one more")
        await read(agent)
        lost.append(agent.hear())
        agent.close()
        charon.close()

    with caplog.at_level(logging.ERROR, logger="vici_bridge.ha.sockets"):
        asyncio.run(scenario())
    told = [int(number) for number in re.findall(r"(\d+) messages of charon's", caplog.text)]
    assert lost == [sum(told)] == [messages + 1 - len(heard)]
    assert bool(told) == full
    assert heard[-1] == b"one more"


def test_one_look_that_misses_charons_row_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    # the kernel's table comes in pieces, and a socket that is closed between two of them hides a row
    async def scenario() -> None:
        charon = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        charon.bind(("127.0.0.1", 0))
        agent = HaSocket("127.0.0.2", "127.0.0.1", lambda _: None, charon.getsockname()[1])
        await agent.open()
        looks, look = list[int](), agent._queue
        monkeypatch.setattr(agent, "_queue", lambda: None if looks.pop() == 0 else look())
        looks[:] = [1, 0]
        await agent._make_room()
        looks[:] = [0, 0]
        with pytest.raises(CharonError, match="does not listen"):
            await agent._make_room()
        agent.close()
        charon.close()

    asyncio.run(scenario())


def test_what_charon_has_sent_is_read_without_waiting() -> None:
    heard: list[bytes] = []

    async def scenario() -> None:
        charon = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        charon.bind(("127.0.0.1", 0))
        agent = HaSocket("127.0.0.2", "127.0.0.1", heard.append, charon.getsockname()[1])
        agent.hear()  # before it is open, and
        await agent.open()
        agent.hear()  # while nothing has come
        charon.connect(("127.0.0.2", charon.getsockname()[1]))
        charon.send(b"one")
        charon.send(b"two")
        agent.hear()
        assert heard == [b"one", b"two"]
        agent.close()
        agent.hear()
        charon.close()

    asyncio.run(scenario())


def test_charon_is_found_without_a_free_descriptor() -> None:
    async def scenario() -> None:
        charon = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        charon.bind(("127.0.0.1", 0))
        agent = HaSocket("127.0.0.2", "127.0.0.1", lambda _: None, charon.getsockname()[1])
        await agent.open()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = []
        try:
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1])
            )
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    taken.append(os.dup(0))
            assert agent.listening()
            charon.close()
            assert not agent.listening()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for one in taken:
                os.close(one)
            agent.close()

    asyncio.run(scenario())


def test_the_end_of_what_charon_was_sent_is_waited_for() -> None:
    async def scenario() -> None:
        charon = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        charon.bind(("127.0.0.1", 0))
        agent = HaSocket("127.0.0.2", "127.0.0.1", lambda _: None, charon.getsockname()[1])
        await agent.open()
        await agent.read()  # nothing was sent
        await agent.send([b"one", b"two"])
        waiting = asyncio.create_task(agent.read())
        for expected in (b"one", b"two"):
            await asyncio.sleep(0.02)
            assert not waiting.done()
            assert charon.recv(100) == expected
        await waiting
        await agent.send([b"three"])
        charon.close()  # what nobody reads is carried out by nobody
        await agent.read()
        agent.close()

    asyncio.run(scenario())


def test_the_socket_that_systemd_has_bound_is_taken_with_what_came_before() -> None:
    """In a process of its own, because systemd gives descriptors from 3 on."""
    program = textwrap.dedent("""
        import asyncio, os, socket
        from vici_bridge.ha.sockets import HaSocket, inherited

        systemd, charon, stranger = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3))
        assert systemd.fileno() == 3
        charon.bind(("127.0.0.1", 0))
        port = charon.getsockname()[1]
        systemd.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as systemd does
        systemd.bind(("127.0.0.2", port))
        stranger.sendto(b"forged", ("127.0.0.2", port))
        charon.sendto(b"early", ("127.0.0.2", port))
        os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
        heard = []

        async def scenario():
            agent = HaSocket("127.0.0.2", "127.0.0.1", heard.append, port)
            await agent.open()
            assert agent._sock.fileno() == 3, agent._sock
            assert not agent._sock.get_inheritable()
            while not heard:
                await asyncio.sleep(0.01)
            thief = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                thief.bind(("127.0.0.2", port))
            except OSError as error:
                print(error.strerror)
            agent.close()

        asyncio.run(scenario())
        os.environ["LISTEN_PID"] = "1"
        assert inherited("127.0.0.2", port) is None
        print(heard)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout == "Address already in use\n[b'early']\n", done.stderr
    assert "left unheard" in done.stderr


def test_an_address_that_somebody_else_has_bound_before_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as thief:
            systemd = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            for sock in (systemd, thief):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            systemd.bind(("127.0.0.2", 0))
            port = systemd.getsockname()[1]
            thief.bind(("127.0.0.2", port))
            monkeypatch.setattr(sockets, "inherited", lambda local, port: systemd)
            with pytest.raises(StateError, match=f"another program, too, of user {os.getuid()}:"):
                await HaSocket("127.0.0.2", "127.0.0.1", lambda _: None, port).open()

    asyncio.run(scenario())
