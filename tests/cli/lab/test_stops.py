"""stops.py and kill_lab.py: an agent that stands at a point goes on, however late it comes to wait."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ikectx_cli.lab import stops
from ikectx_cli.lab.kill_cases import ANY
from ikectx_cli.lab.kill_lab import Stop


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "psg" / "stops"
    found.mkdir(parents=True)
    for name in ("stopped", "go"):
        os.mkfifo(found / name)
    return found


def a_stop(folder: Path, point: str = "take.way.before", passes: int = 0) -> Stop:
    stops._passed.clear()  # an agent begins with none
    return Stop(cast(Any, SimpleNamespace(work=folder.parent.parent)), "psg", point, passes)


def agent(folder: Path, *points: str) -> threading.Thread:
    def run() -> None:
        for point in points:
            stops.reach(folder, point)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_an_agent_stands_at_its_point_until_it_is_let_go(folder: Path) -> None:
    stop = a_stop(folder)
    stop.arm()
    there = agent(folder, "take.look.before", "take.way.before", "take.way.after")
    assert stop.wait(5)
    there.join(0.2)
    assert there.is_alive()
    stop.go_on()
    there.join(5)
    assert not there.is_alive()
    passed = (folder.parent / "points.log").read_text().split()
    assert passed == ["take.look.before", "take.way.before", "take.way.after"]


def test_an_agent_that_has_just_said_that_it_stops_is_let_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lab was quicker: nobody waited to be let go, and the agent stood there for ever."""
    write = Path.write_text

    def slow(path: Path, *args: Any, **more: Any) -> int:
        done = write(path, *args, **more)
        if path.name == "stopped":
            time.sleep(0.2)
        return done

    monkeypatch.setattr(Path, "write_text", slow)
    stop = a_stop(folder)
    stop.arm()
    there = agent(folder, "take.way.before")
    assert stop.wait(5)
    stop.go_on()
    there.join(5)
    assert not there.is_alive()


def test_an_agent_that_comes_to_its_point_when_it_is_let_go_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has taken the order to stop, and not said so yet."""
    unlink, taken, read = Path.unlink, threading.Event(), threading.Event()

    def slow(path: Path, *args: Any, **more: Any) -> None:
        unlink(path, *args, **more)
        if threading.current_thread() is not threading.main_thread():
            taken.set()
            read.wait(5)

    monkeypatch.setattr(Path, "unlink", slow)
    stop = a_stop(folder)
    stop.arm()
    there = agent(folder, "take.way.before")
    assert taken.wait(5)
    threading.Timer(0.2, read.set).start()
    stop.go_on()
    there.join(5)
    assert not there.is_alive()
    assert stop.reached


@pytest.mark.parametrize(
    ("point", "passed"),
    [
        ("take.way.before", ["take.look.before", "take.way.before", "take.look.before", "take.way.before"]),
        (ANY, ["take.look.before", "take.way.before"]),
    ],
)
def test_it_goes_on_as_often_as_it_is_to_pass_first(folder: Path, point: str, passed: list[str]) -> None:
    stop = a_stop(folder, point, 1)
    stop.arm()
    there = agent(folder, *["take.look.before", "take.way.before"] * 3)
    assert stop.wait(5)
    assert (folder.parent / "points.log").read_text().split() == passed
    stop.go_on()
    there.join(5)
    assert not there.is_alive()


def test_nobody_stops_where_nobody_came(folder: Path) -> None:
    stop = a_stop(folder)
    stop.arm()
    assert not stop.wait(0.05)
    stop.go_on()
    stop.go_on()
    there = agent(folder, "take.way.before")
    there.join(5)
    assert not there.is_alive() and not stop.reached
