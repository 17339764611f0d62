"""`SpdIndex`: the kernel's policies by the reqid of their templates, kept up to date by its events. I/O.

The kernel finds a policy only by its selector, direction, mark and if_id, and policies with an SA's reqid may
have others than charon gives them (an operator's own, or guards). A freeze must miss none, because ESP would
go on by it. But to dump 5,000 policies takes 3 to 13 ms, and an SA that moves needs several looks while it is
frozen. So the SPD is dumped once. From then on the kernel's events are read before each look. They come
before the answer to the request that caused them, so no change that was made before the look is missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import struct
import threading
from collections import defaultdict
from collections.abc import Collection

from ikectx.errors import KernelError, WireError
from ikectx.net.readiness import Readiness

from . import xfrm_wire as wire
from .netlink import XFRM, Netlink, deaf, event_socket, listen
from .netlink_parts import HEADER, attributes, messages
from .xfrm import KernelPolicy, dump_policies

POLICY_GROUPS = (2, 4, 7)
"""XFRMNLGRP_EXPIRE, _POLICY, _MIGRATE."""
EVENT_SIZE = 1 << 16
EVENT_BUFFER = 1 << 20
"""Octets of events that wait for the next look. If there are more the SPD is dumped anew."""

_WATCHED = "the kernel's policies"

_TRIES = 4
"""Dumps in a row, if events are lost during each."""
_TEMPLATES, _POLICY = 5, 7
"""XFRMA_TMPL; XFRMA_POLICY, which holds the policy that was deleted."""
_INFO, _ID = 168, 64
"""Octets of struct xfrm_userpolicy_info and of struct xfrm_userpolicy_id."""
_INDEX_AT, _REQID_AT, _TEMPLATE = 156, 44, 64
"""Where the first has the index, and struct xfrm_user_tmpl its reqid; octets of the latter."""
_SOCKETS = 3
"""Indexes end in the direction; from this one on they are policies of single sockets, without events."""


class SpdIndex:
    """The policies of the network namespace that this object was made in. Threads may share it.

    It listens from the first look on. At a gateway where no SA moves nothing is kept.
    """

    def __init__(self, xfrm: Netlink) -> None:
        """`xfrm`: the socket for dumps. Errors: KernelError."""
        self._xfrm = xfrm
        self._lock = threading.Lock()
        self._events = event_socket(XFRM, (), _WATCHED)
        self._listens = False
        self._ready: Readiness | None = None
        self._known: dict[int, bytes] | None = None
        """Policies by the index that the kernel gave them; None: they must be dumped."""
        self._indexes: defaultdict[int, set[int]] = defaultdict(set)
        """Indexes by reqid."""

    def close(self) -> None:
        if self._ready is not None:
            self._ready.close()
        self._events.close()

    async def change(self, seconds: float) -> None:
        """Wait for the kernel's next event, but no longer than that. Errors: KernelError."""
        with self._lock:
            self._catch_up()
        if self._ready is None:
            self._ready = Readiness(self._events)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ready.readable()

    def about(self, reqids: Collection[int]) -> list[KernelPolicy]:
        """The present policies with a template for one of these reqids. Errors: KernelError, WireError."""
        if not reqids:
            return []
        with self._lock:
            known = self._present()
            found = [
                known[index] for index in sorted(set().union(*(self._indexes.get(one, ()) for one in reqids)))
            ]
        return [KernelPolicy.parse(octets) for octets in found]

    def _present(self) -> dict[int, bytes]:
        self._catch_up()
        for _ in range(_TRIES):
            if self._known is not None:
                return self._known
            self._known = {}
            self._indexes.clear()
            try:
                for answer in self._xfrm.ask(dump_policies()):
                    self._enter(answer)
                self._catch_up()  # of the changes during the dump
            except (struct.error, ValueError):
                self._known = None
                raise WireError("a policy of the kernel is cut short") from None
            except BaseException:
                self._known = None
                raise
        raise KernelError("the kernel's policies change faster than they can be read")

    def _catch_up(self) -> None:
        """Take in the events that have come. If some are missing the policies must be dumped."""
        if not self._listens:
            listen(self._events, POLICY_GROUPS, _WATCHED, EVENT_BUFFER)
            self._listens = True
        while True:
            try:
                data, (port, _) = self._events.recvfrom(EVENT_SIZE)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._known = None
                if error.errno != errno.ENOBUFS:
                    raise deaf(_WATCHED, error) from None
                continue
            if port != 0 or self._known is None:
                continue  # not from the kernel, or the dump will show what it says
            try:
                for message in messages(data):
                    self._hear(message)
            except (struct.error, ValueError, KeyError):
                self._known = None  # an event that cannot be read may concern any policy

    def _hear(self, message: bytes) -> None:
        """Errors: struct.error and ValueError (cut short), KeyError (a deletion without its policy)."""
        (kind,) = struct.unpack_from("=H", message, 4)
        if kind in (wire.NEWPOLICY, wire.UPDPOLICY):
            self._enter(message)
        elif kind == wire.DELPOLICY:
            deleted = dict(attributes(message, HEADER.size + _ID))[_POLICY]
            self._leave(*struct.unpack_from("=I", deleted, _INDEX_AT))
        elif kind == wire.POLEXPIRE:
            (hard,) = struct.unpack_from("=B", message, HEADER.size + _INFO)
            if hard:  # the policy is gone
                self._leave(*struct.unpack_from("=I", message, HEADER.size + _INDEX_AT))
        elif kind in (wire.FLUSHPOLICY, wire.MIGRATE):
            self._known = None

    def _enter(self, message: bytes) -> None:
        (index,) = struct.unpack_from("=I", message, HEADER.size + _INDEX_AT)
        self._leave(index)
        if self._known is None or index & 7 >= _SOCKETS:
            return
        reqids = _reqids(message)
        if reqids:  # others are never asked for
            self._known[index] = message
        for reqid in reqids:
            self._indexes[reqid].add(index)

    def _leave(self, index: int) -> None:
        known = None if self._known is None else self._known.pop(index, None)
        for reqid in _reqids(known) if known is not None else ():
            self._indexes[reqid].discard(index)
            if not self._indexes[reqid]:
                del self._indexes[reqid]


def _reqids(message: bytes) -> set[int]:
    """The reqids in the templates of a policy. Errors: struct.error, ValueError."""
    octets = dict(attributes(message, HEADER.size + _INFO)).get(_TEMPLATES, b"")
    ends = range(_REQID_AT, len(octets) - _TEMPLATE + _REQID_AT + 1, _TEMPLATE)
    return {struct.unpack_from("=I", octets, at)[0] for at in ends}
