"""The environment that charon's updown plugin gives a script, for SAs that charon did not set up. Pure.

Source: updown_listener.c of strongSwan 5.9.8 to 6.1. A test compares each name with a call of charon's own.
PLUTO_DNS*, which are servers that charon as a client was assigned with a virtual IP, never occur: such an SA
is not moved.
"""

from __future__ import annotations

from ikectx.sa.context import ChildContext, IkeContext, Mark, TrafficSelector
from ikectx.sa.relocate import same_host

from .views import COND_EAP_AUTHENTICATED, COND_NAT_ANY, COND_NAT_FAKE, COND_NAT_HERE, COND_NAT_THERE

_ICMP = (1, 58)
_NAT = COND_NAT_HERE | COND_NAT_THERE | COND_NAT_FAKE | COND_NAT_ANY


def _client(selector: TrafficSelector) -> str:
    """The selector as "network/prefix", the next larger subnet where it is no prefix (as charon does)."""
    start = int(selector.start)
    inside = (start ^ int(selector.end)).bit_length()
    return f"{type(selector.start)(start >> inside << inside)}/{selector.start.max_prefixlen - inside}"


def _ports(mine: TrafficSelector, theirs: TrafficSelector) -> tuple[str, str]:
    """PLUTO_MY_PORT and PLUTO_PEER_PORT: of ICMP the type and the code, of one selector or the other."""
    if max(mine.protocol, theirs.protocol) in _ICMP:
        kind, code = divmod(max(mine.start_port, theirs.start_port), 256)
        return str(kind), str(code)
    return _port(mine), _port(theirs)


def _port(selector: TrafficSelector) -> str:
    if selector.start_port == selector.end_port or (selector.start_port, selector.end_port) == (0, 65535):
        return str(selector.start_port)
    return f"{selector.start_port}:{selector.end_port}"


def _mark(mark: Mark) -> str:
    return f"{mark[0]}/0x{mark[1]:08x}" if mark[0] else ""


def _sources(side: str, context: IkeContext) -> dict[str, str]:
    found: dict[str, str] = {}
    count = {4: 0, 6: 0}
    vips = context.local_vips if side == "MY" else context.remote_vips
    for vip in vips:
        count[vip.version] += 1
        found[f"PLUTO_{side}_SOURCEIP{vip.version}_{count[vip.version]}"] = str(vip)
    if vips:
        found[f"PLUTO_{side}_SOURCEIP"] = str(vips[0])
    return found


def updown_environment(
    context: IkeContext,
    child: ChildContext,
    pair: tuple[TrafficSelector, TrafficSelector],
    *,
    up: bool,
    interface: str,
    reqid: int,
    unique_id: int,
    host_access: bool = False,
) -> dict[str, str]:
    """The PLUTO_* environment of a call for one pair of selectors (ours, the mobile node's).

    `child` has its tags of this gateway. `host_access`: the child has `hostaccess = yes`, which charon does
    not report.
    """
    local_ts, remote_ts = pair
    v6 = local_ts.start.version == 6
    host = same_host(local_ts, context.local.address)
    my_port, peer_port = _ports(local_ts, remote_ts)
    eap = bool(context.conditions & COND_EAP_AUTHENTICATED)
    nat = bool(context.conditions & _NAT)
    tags = child.tags
    optional = {
        "PLUTO_XAUTH_ID": str(context.remote_eap_id or context.remote_id) if eap else "",
        "PLUTO_MARK_IN": _mark(tags.mark_in),
        "PLUTO_MARK_OUT": _mark(tags.mark_out),
        "PLUTO_IF_ID_IN": str(tags.if_id_in or ""),
        "PLUTO_IF_ID_OUT": str(tags.if_id_out or ""),
        "PLUTO_UDP_ENC": str(context.remote.port) if nat else "",
        "PLUTO_IPCOMP": "1" if child.ipcomp else "",
        "PLUTO_HOST_ACCESS": "1" if host_access else "",
    }
    return {
        "PLUTO_VERSION": "1.1",
        "PLUTO_VERB": f"{'up' if up else 'down'}-{'host' if host else 'client'}{'-v6' if v6 else ''}",
        "PLUTO_CONNECTION": child.name,
        "PLUTO_INTERFACE": interface or "unknown",
        "PLUTO_REQID": str(reqid),
        "PLUTO_PROTO": "esp",
        "PLUTO_UNIQUEID": str(unique_id),
        "PLUTO_ME": str(context.local.address),
        "PLUTO_MY_ID": str(context.local_id),
        "PLUTO_MY_CLIENT": _client(local_ts),
        "PLUTO_MY_PORT": my_port,
        "PLUTO_MY_PROTOCOL": str(local_ts.protocol),
        "PLUTO_PEER": str(context.remote.address),
        "PLUTO_PEER_ID": str(context.remote_id),
        "PLUTO_PEER_CLIENT": _client(remote_ts),
        "PLUTO_PEER_PORT": peer_port,
        "PLUTO_PEER_PROTOCOL": str(remote_ts.protocol),
        **_sources("MY", context),
        **_sources("PEER", context),
        **{name: value for name, value in optional.items() if value},
    }


def ts_pairs(child: ChildContext) -> list[tuple[TrafficSelector, TrafficSelector]]:
    """The selector pairs charon installs policies for: same family, compatible protocol."""
    return [
        (mine, theirs)
        for mine in child.local_ts
        for theirs in child.remote_ts
        if mine.start.version == theirs.start.version
        and (mine.protocol == theirs.protocol or not mine.protocol or not theirs.protocol)
    ]
