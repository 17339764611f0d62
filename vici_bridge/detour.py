"""`Detour`: packets for an MN that left are routed on to the gateway that serves it now. I/O.

A routing table of its own, asked by one rule per family before strongSwan's (220), so that neither
charon's routes nor an administrator's are touched, and all of ours can be found and removed.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from ikectx.context import Address, Secret
from ikectx.errors import KernelError

from .netlink import ROUTE, Netlink, failure
from .xfrm_parts import INET, INET6, Network, Request, family_of

log = logging.getLogger(__name__)

TABLE = 4067
PRIORITY = 210

_NEWROUTE, _DELROUTE, _GETROUTE, _NEWRULE, _DELRULE = 24, 25, 26, 32, 33
_REQUEST, _ACK, _REPLACE, _EXCL, _DUMP, _CREATE = 0x1, 0x4, 0x100, 0x200, 0x300, 0x400
_UNICAST, _LOCAL = 1, 2
_STATIC = 4


class Detour:
    """Routes by way of another gateway, in the network namespace this object was made in.

    Calls take some 100 us; threads may share it. Routes and rules stay when the agent ends; `flush` removes
    what any agent before left.
    """

    def __init__(self, table: int = TABLE, priority: int = PRIORITY) -> None:
        self._table = table
        self._priority = priority
        self._lock = threading.Lock()
        self._route = Netlink(ROUTE, "routes")

    def close(self) -> None:
        self._route.close()

    def add(self, prefixes: Iterable[str | Network], via: Sequence[str | Address]) -> list[Network]:
        """Route `prefixes` by way of the first of `via` of the same family; IPv4 also over IPv6.

        Gives those left out, each with a line in the log: a prefix of length 0 (everything would be
        sent there), one that holds the gateway itself, one without a gateway of a fitting family. Idempotent.
        Errors: KernelError (the gateway's inner address is not reachable, for one).
        """
        gateways = [ip_address(str(address)) for address in via]
        skipped: list[Network] = []
        routes: list[Request] = []
        families: set[int] = set()
        for prefix in map(_network, prefixes):
            gateway = _gateway(prefix, gateways)
            why = _unfit(prefix, gateway)
            if why or gateway is None:
                log.warning("packets for %s are not sent on to another gateway: %s", prefix, why)
                skipped.append(prefix)
                continue
            families.add(_family(prefix))
            routes.append(self._route_request(_NEWROUTE, prefix, gateway))
        with self._lock:
            rules = [self._rule_request(_NEWRULE, family) for family in sorted(families)]
            requests = [*routes, *rules]
            for request, outcome in zip(requests, self._route.transact(requests), strict=True):
                if outcome.errno not in (0, errno.EEXIST):
                    raise failure(request, outcome)
        return skipped

    def remove(self, prefixes: Iterable[str | Network]) -> None:
        """Undo `add` for these prefixes, whatever their gateway. Idempotent. Errors: KernelError."""
        wanted = [prefix for prefix in map(_network, prefixes) if prefix.prefixlen]
        with self._lock:
            self._delete(wanted)

    def flush(self) -> None:
        """Remove every detour. Errors: KernelError."""
        with self._lock:
            self._delete(self._listing())

    def listing(self) -> list[Network]:
        """All prefixes that are sent on. Errors: KernelError."""
        with self._lock:
            return self._listing()

    def _delete(self, prefixes: Sequence[Network]) -> None:
        requests = [self._route_request(_DELROUTE, prefix, None) for prefix in prefixes]
        for request, outcome in zip(requests, self._route.transact(requests), strict=True):
            if outcome.errno not in (0, errno.ESRCH):
                raise failure(request, outcome)
        used = {_family(prefix) for prefix in self._listing()}
        for family in {INET, INET6} - used:
            request = self._rule_request(_DELRULE, family)
            outcome = self._route.transact([request])[0]
            if outcome.errno not in (0, errno.ENOENT, errno.EAFNOSUPPORT):
                raise failure(request, outcome)

    def _listing(self) -> list[Network]:
        found: list[Network] = []
        for family in (INET, INET6):
            request = _message(
                rtmsg,
                _GETROUTE,
                _REQUEST | _DUMP,
                {"family": family},
                [("RTA_TABLE", self._table)],
                what="list the detours",
            )
            try:
                answers = self._route.ask(request)
            except KernelError as error:
                # strict listings answer so where the table was never made
                if error.errno in (errno.ENOENT, errno.EAFNOSUPPORT):
                    continue
                raise
            for answer in answers:
                message = _decoded(answer)
                if message.get_attr("RTA_TABLE") == self._table and message["family"] == family:
                    destination = message.get_attr("RTA_DST") or ("0.0.0.0" if family == INET else "::")  # noqa: S104
                    found.append(_network(f"{destination}/{message['dst_len']}"))
        return found

    def _route_request(self, number: int, prefix: Network, gateway: Address | None) -> Request:
        attributes: list[tuple[str, Any]] = [
            ("RTA_TABLE", self._table),
            ("RTA_DST", str(prefix.network_address)),
        ]
        if gateway is not None and family_of(gateway) == _family(prefix):
            attributes.append(("RTA_GATEWAY", str(gateway)))
        elif gateway is not None:
            attributes.append(("RTA_VIA", {"family": family_of(gateway), "addr": str(gateway)}))
        new = number == _NEWROUTE
        fields = {"family": _family(prefix), "dst_len": prefix.prefixlen}
        if new:
            fields |= {"proto": _STATIC, "type": _UNICAST}
        else:
            fields |= {"scope": 255}  # RT_SCOPE_NOWHERE: whatever its scope is
        flags = _REQUEST | _ACK | (_CREATE | _REPLACE if new else 0)
        what = f"route {prefix} via {gateway}" if new else f"remove the route to {prefix}"
        return _message(rtmsg, number, flags, fields, attributes, what=what)

    def _rule_request(self, number: int, family: int) -> Request:
        new = number == _NEWRULE
        return _message(
            fibmsg,
            number,
            _REQUEST | _ACK | (_CREATE | _EXCL if new else 0),
            {"family": family, "action": 1},
            [("FRA_PRIORITY", self._priority), ("FRA_TABLE", self._table)],
            what=f"{'add' if new else 'remove'} the rule that leads to routing table {self._table}",
        )


def is_local(route: Netlink, address: Address) -> bool:
    """Whether `address` is one of this host. Errors: KernelError where the kernel cannot be asked."""
    request = _message(
        rtmsg,
        _GETROUTE,
        _REQUEST | _ACK,
        {"family": family_of(address), "dst_len": address.max_prefixlen},
        [("RTA_DST", str(address))],
        what=f"find the way to {address}",
    )
    outcome = route.transact([request])[0]
    return bool(outcome.answers) and _decoded(outcome.answers[0])["type"] == _LOCAL


def way_to(route: Netlink, source: Address, destination: Address) -> tuple[bool, int]:
    """Whether packets between these two stay on this host, and the device they leave by (0: no way there).

    Errors: KernelError.
    """
    request = _message(
        rtmsg,
        _GETROUTE,
        _REQUEST | _ACK,
        {
            "family": family_of(destination),
            "dst_len": destination.max_prefixlen,
            "src_len": source.max_prefixlen,
        },
        [("RTA_DST", str(destination)), ("RTA_SRC", str(source))],
        what=f"find the way to {destination}",
    )
    outcome = route.transact([request])[0]
    if not outcome.answers:
        return False, 0
    answer = _decoded(outcome.answers[0])
    return answer["type"] == _LOCAL, int(answer.get_attr("RTA_OIF") or 0)


def _message(
    kind: Any,
    number: int,
    flags: int,
    fields: dict[str, int],
    attributes: list[tuple[str, Any]],
    *,
    what: str,
) -> Request:
    message = kind()
    message.update(fields)
    message["attrs"] = [list(pair) for pair in attributes]
    message["header"] = {"type": number, "flags": flags}
    message.encode()
    return Request(Secret(bytes(message.data)), what)


def _decoded(answer: bytes) -> Any:
    message = rtmsg(answer)
    message.decode()
    return message


def _network(prefix: str | Network) -> Network:
    return ip_network(str(prefix), strict=False)


def _family(prefix: Network) -> int:
    return INET if isinstance(prefix, IPv4Network) else INET6


def _gateway(prefix: Network, gateways: Sequence[Address]) -> Address | None:
    same = next((gateway for gateway in gateways if family_of(gateway) == _family(prefix)), None)
    if same is None and isinstance(prefix, IPv4Network):
        return next((gateway for gateway in gateways if not isinstance(gateway, IPv4Address)), None)
    return same


def _unfit(prefix: IPv4Network | IPv6Network, gateway: Address | None) -> str:
    if prefix.prefixlen == 0:
        return "that would be everything"
    if gateway is None:
        return "no inner address of its family is known for that gateway"
    if gateway in prefix:
        return f"the gateway {gateway} is inside"
    return ""
