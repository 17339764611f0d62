"""Keeps an agent's memory, which holds keys, from swap and core dumps (prctl(2), mlock2(2))."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource

log = logging.getLogger("ikectx")

_PR_SET_DUMPABLE = 4
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4


def protect_memory(libc: ctypes.CDLL | None = None) -> None:
    """No core dump, no debugger of another process without privilege, no page in swap. Raises nothing.

    Where memory cannot be locked, that is logged: a limit on locked memory (RLIMIT_MEMLOCK) would end
    the agent as soon as it needed more, so it must be without limit.
    """
    libc = libc or ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(OSError):  # a unit may forbid to change limits, after it has set this one
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        log.warning("memory may be dumped: %s", os.strerror(ctypes.get_errno()))
    why = _lock(libc)
    if why:
        log.warning("memory is not locked, so keys may get into swap: %s", why)


def _lock(libc: ctypes.CDLL) -> str:
    """The reason if it did not work."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
        except (ValueError, OSError):
            return "there is a limit on locked memory (LimitMEMLOCK=infinity in the unit takes it away)"
    # as pages are used: all at once would take the memory of whole thread stacks
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        return os.strerror(ctypes.get_errno())
    return ""
