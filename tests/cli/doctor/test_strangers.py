"""That `doctor` finds what a user without rights can do, and what not."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ikectx_cli.doctor.strangers import as_nobody


def test_what_is_open_is_found_and_what_is_not_is_not() -> None:
    folder = Path("/tmp") / f"ikectx-strangers-{os.getpid()}"
    folder.mkdir(mode=0o755)
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    path = folder / "control"
    try:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as held,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as shared,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server,
        ):
            held.bind(("127.0.0.2", 0))
            port = held.getsockname()[1]
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            shared.bind(("127.0.0.3", 0))
            theirs = shared.getsockname()[1]
            server.bind(str(path))
            server.listen()
            path.chmod(0o660)
            assert as_nobody([("127.0.0.2", port)], [str(path), str(closed)]) == []
            path.chmod(0o666)
            found = as_nobody([("127.0.0.2", port), ("127.0.0.3", theirs)], [str(path), str(folder)])
            assert found is not None
            assert [text.partition(",")[0] for text in found] == [
                f"bind 127.0.0.3:{theirs}",
                f"bind 0.0.0.0:{theirs}",
                f"connect to {path}",
                f"list {folder}",
            ]
            assert os.geteuid() == 0
    finally:
        path.unlink(missing_ok=True)
        closed.rmdir()
        folder.rmdir()


def test_only_root_can_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert as_nobody([("127.0.0.1", 1)], ["/"]) is None
