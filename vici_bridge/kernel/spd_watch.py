"""`SpdGuard`: requires the kernel's IPsec policies to protect connections between gateways. I/O.

It implements `ikectx.net.plain.Guard` by three measures, because each alone leaves a gap. The SPD is read
before the first packet and after each change that can matter. Changes come over a netlink socket, which is
emptied before octets are sent or passed on, so that no change waits behind them. And the socket itself gets
the templates found (IP_XFRM_POLICY): the kernel then drops its packets rather than let one pass otherwise,
whatever happens to the SPD, and whatever disable_xfrm or disable_policy are. SCTP's outbound packets ignore
a socket's policy; they have only the first two measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ikectx.errors import IkectxError, KernelError, LinkError
from ikectx.net.five_tuple import Flow

from .detour import way_to
from .netlink import ROUTE, XFRM, Netlink, event_socket
from .netlink_parts import messages
from .spd_index import EVENT_BUFFER, EVENT_SIZE, POLICY_GROUPS
from .spd_lookup import Protection, check_sas, find_sas, may_concern, protection, socket_policies
from .xfrm import KernelPolicy, KernelSa, dump_policies

log = logging.getLogger(__name__)

_IP_XFRM_POLICY, _IPV6_XFRM_POLICY = 17, 35


@dataclass(slots=True, eq=False)
class _Held:
    """One connection under guard; `ikectx.net.plain.Hold`."""

    guard: SpdGuard
    flow: Flow
    socket: socket.socket
    lost: Callable[[LinkError], None]
    found: Protection | None = None
    error: LinkError | None = field(default=None)

    def verify(self) -> None:
        self.guard.look()
        if self.error is not None:
            raise self.error

    def release(self) -> None:
        self.guard.forget(self)


class SpdGuard:
    """Guards connections in the network namespace that this object was made in.

    Calls block for some 100 us, and for some ms if the SPD has thousands of policies. Not thread-safe.
    Errors: KernelError.
    """

    def __init__(self) -> None:
        self._xfrm = Netlink(XFRM, "XFRM")
        self._route = Netlink(ROUTE, "routes")
        self._events: socket.socket | None = None
        self._held: set[_Held] = set()

    def close(self) -> None:
        """Close the sockets; connections under guard are cut."""
        self._dead(LinkError("the IPsec policies are not watched any more"))
        self._xfrm.close()
        self._route.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Guard.

    async def check(self, flow: Flow) -> None:
        """See `ikectx.net.plain.Guard`."""
        self.protection(flow)

    async def hold(self, flow: Flow, sock: socket.socket, lost: Callable[[LinkError], None]) -> _Held:
        """See `ikectx.net.plain.Guard`."""
        self._watch()  # first, so that a change while the SPD is read is an event already
        held = _Held(self, flow, sock, lost)
        self._bind(held, self.protection(flow))
        self._held.add(held)
        return held

    def protection(self, flow: Flow) -> Protection:
        """The present protection of a flow. Errors: LinkError."""
        try:
            self._check_way(flow)
            answers = self._xfrm.ask(dump_policies())
            policies = [KernelPolicy.parse(answer) for answer in answers if may_concern(answer, flow)]
            found = protection(policies, flow)
            for direction, templates in (("out", found.outbound), ("in", found.inbound)):
                for template in templates or ():
                    sas = self._xfrm.ask(find_sas(flow, template, direction))
                    check_sas((KernelSa.parse(sa) for sa in sas), template, flow)
        except LinkError:
            raise
        except IkectxError as error:
            raise LinkError(
                f"IPsec's protection of {flow} cannot be checked: {error}", hint=error.hint
            ) from None
        return found

    def _check_way(self, flow: Flow) -> None:
        """Refuse flows for which the kernel does not consult its policies. Errors: LinkError, KernelError."""
        local, device = way_to(self._route, flow.local.address, flow.remote.address)
        if local:
            raise LinkError(f"{flow} stays on this machine, where IPsec protects nothing")
        if not device:
            raise LinkError(
                f"there is no way from {flow.local.address} to {flow.remote.address}",
                hint=f"see ip route get {flow.remote.address} from {flow.local.address}",
            )
        names = ["all"]
        with contextlib.suppress(OSError):
            names.append(socket.if_indextoname(device))
        for name in names:
            for switch in ("disable_xfrm", "disable_policy"):
                place = Path(f"/proc/sys/net/ipv{flow.local.address.version}/conf/{name}/{switch}")
                with contextlib.suppress(OSError):
                    if place.read_text().strip() not in ("", "0"):
                        raise LinkError(
                            f"{flow} is not protected: {switch} is on for {name}",
                            hint=f"sysctl -w net.ipv{flow.local.address.version}.conf.{name}.{switch}=0",
                        )

    def _bind(self, held: _Held, found: Protection) -> None:
        """Bind the socket to the protection that was found. Errors: LinkError."""
        if held.found == found:
            return
        if held.flow.local.address.version == 4:
            level, option = socket.IPPROTO_IP, _IP_XFRM_POLICY
        else:
            level, option = socket.IPPROTO_IPV6, _IPV6_XFRM_POLICY
        try:
            for value in socket_policies(held.flow, found):
                held.socket.setsockopt(level, option, value)
        except OSError as error:
            raise LinkError(
                f"the kernel does not hold the connection to its protection: {error.strerror}",
                hint="the agent needs CAP_NET_ADMIN" if error.errno == errno.EPERM else "",
            ) from None
        held.found = found

    # Changes.

    def _watch(self) -> None:
        """Errors: LinkError."""
        if self._events is not None:
            return
        try:
            self._events = event_socket(XFRM, POLICY_GROUPS, "IPsec policies", EVENT_BUFFER)
        except KernelError as error:
            raise LinkError(str(error)) from None
        asyncio.get_running_loop().add_reader(self._events.fileno(), self.look)

    def look(self) -> None:
        """Take in all changes up to now; connections that are not protected any more are told."""
        stale: set[_Held] = set()
        while self._events is not None:
            try:
                data, (port, _) = self._events.recvfrom(EVENT_SIZE)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                if error.errno == errno.ENOBUFS:  # changes went missing
                    stale |= self._held
                    continue
                self._dead(
                    LinkError(f"IPsec policies cannot be watched any more: {os.strerror(error.errno or 0)}")
                )
                return
            if port == 0:  # from the kernel
                found = messages(data)
                stale |= {held for held in self._held if any(may_concern(one, held.flow) for one in found)}
        for held in stale:
            self._again(held)

    def _again(self, held: _Held) -> None:
        try:
            self._bind(held, self.protection(held.flow))
        except LinkError as error:
            self._fail(held, error)

    def _fail(self, held: _Held, error: LinkError) -> None:
        held.error = error
        if held in self._held:
            self._held.discard(held)
            held.lost(error)

    def _dead(self, error: LinkError) -> None:
        self._close_events()
        for held in list(self._held):
            self._fail(held, error)

    def forget(self, held: _Held) -> None:
        """The connection is closed."""
        self._held.discard(held)
        if not self._held:
            self._close_events()

    def _close_events(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            with contextlib.suppress(RuntimeError, ValueError):
                asyncio.get_running_loop().remove_reader(events.fileno())
            events.close()
