"""For all tests: a run that is told to end still writes its report."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """SIGTERM, by which tests/run.sh ends what takes too long, is Ctrl-C: what was begun is tidied up."""

    def stop(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
