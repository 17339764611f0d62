"""Fixtures of the live tests: one lab for the whole run, cleared before each test."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from ikectx_cli.lab.daemons import charon_of
from ikectx_cli.lab.hosts import Lab
from ikectx_cli.lab.net import CHARONS

from .world import World

PACKAGES = "tests/setup.sh installs what the tests need"
NEEDED = {
    "/usr/sbin/swanctl": PACKAGES,
    "/dev/net/tun": "modprobe tun; a container needs the device",
}
"""What must be there beside charon, and what to do where it is not."""


@pytest.fixture(scope="session")
def session_world() -> Iterator[World]:
    if os.geteuid() != 0:
        pytest.fail("network namespaces need root: sudo tests/run.sh live", pytrace=False)
    for path, remedy in {**dict.fromkeys(map(charon_of, CHARONS), PACKAGES), **NEEDED}.items():
        if not Path(path).exists():
            pytest.fail(f"there is no {path}: {remedy}", pytrace=False)
    world = World(Lab.new())
    try:
        world.build()
        yield world
    finally:
        world.lab.down()


@pytest.fixture
def world(session_world: World, request: pytest.FixtureRequest) -> Iterator[World]:
    session_world.clean()
    request.node.stash[_WORLD] = session_world
    yield session_world
    if not request.node.stash.get(_FAILED, False):
        session_world.well()


_WORLD = pytest.StashKey[World]()
_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows what every daemon said during the test, and costs the next test a fresh start."""
    report = yield
    world = item.stash.get(_WORLD, None)
    if report.failed and world is not None:
        world.broken = item.stash[_FAILED] = True
        if report.when == "call":
            report.sections += list(world.story())
    return report
