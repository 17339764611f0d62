"""A relayed mobile node that sends from another place than before: its IKE shows where (I/O).

Its NAT gives it another port, or it has roamed. ESP is passed on by address and port, so the first IKE
request that comes from elsewhere makes the new place known, and is passed on itself. The gateway that serves
the SA decides whether the mobile node is there, because only that can authenticate it; for that gateway the
mobile node's NAT has other addresses now.
"""

from __future__ import annotations

import asyncio
import logging
import socket

from ikectx.errors import IkectxError
from ikectx.net.bypass import bypass
from ikectx.sa.context import Endpoint
from ikectx.sa.name import SaName
from ikectx.wire.ikev2 import add_marker
from mobike_ext.packet_io import udp_datagram
from vici_bridge.away.absences import Away
from vici_bridge.kernel.nat_rule import NatRule

log = logging.getLogger(__name__)


async def passed_on(away: Away, datagrams: tuple[bytes, ...], local: Endpoint, remote: Endpoint) -> bool:
    """Whether these, one IKE message from `remote` to `local`, are of an SA whose mobile node is relayed."""
    row = away.relayed(SaName(datagrams[0][:8], datagrams[0][8:16]))
    if row is None:
        return False
    try:
        guest = away.roamed(row, remote, local)
        if guest is not None:
            await asyncio.to_thread(_send, guest, datagrams)
    except (IkectxError, OSError) as error:
        log.error("%s at %s is not relayed: %s", row.mn, remote, error)
    return True


def _send(rule: NatRule, datagrams: tuple[bytes, ...]) -> None:
    """Send what came before the rule was there, as the rule would have. Errors: OSError."""
    here, there = Endpoint(rule.ours.address, rule.port), Endpoint(rule.to, rule.ours.port)
    family = socket.AF_INET6 if rule.to.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
        bypass(raw)
        raw.bind((str(here.address), 0))
        for datagram in datagrams:
            marked = add_marker(datagram, here, there)
            raw.sendto(udp_datagram(here, there, marked), (str(there.address), 0))
