"""For all tests: a run that is told to end still writes its report; what needs root fails without."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

settings.register_profile("ikectx", deadline=None)
settings.load_profile("ikectx")  # 200 ms an example are too few on a busy machine


def pytest_configure() -> None:
    """SIGTERM, by which tests/run.sh ends what takes too long, is Ctrl-C: what was begun is tidied up."""

    def stop(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


@pytest.fixture
def as_root() -> None:
    """Raw and packet sockets, namespaces, giving up rights: a test that cannot run has not passed."""
    if os.geteuid() != 0:
        pytest.fail("needs root: sudo tests/run.sh", pytrace=False)
