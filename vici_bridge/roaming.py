"""A relayed mobile node that sends from another place than before: its IKE or ESP shows where (I/O).

Its NAT gives it another port, or it has roamed. ESP is passed on by address and port, so the first IKE
request that comes from elsewhere makes the new place known, and is passed on itself. So does ESP in UDP under
an SPI of the mobile node's, because a NAT may forget a mapping that IKE does not use (`follow_esp`).

The gateway that serves the SA decides whether the mobile node is there, because only that can authenticate
it; for that gateway the mobile node's NAT has other addresses now, as its own kernel tells its charon once an
ESP packet that it has not seen before comes from there (XFRM_MSG_MAPPING). A recorded packet that somebody
sends from elsewhere is one that it has seen.
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
from vici_bridge.kernel.nat_relay import Stranger
from vici_bridge.kernel.nat_rule import NatRule

from .host import CharonHost

log = logging.getLogger(__name__)

LOOK = 0.5
"""Seconds between two looks."""


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


async def follow_esp(host: CharonHost) -> None:
    """Look for ESP of relayed mobile nodes that comes from other places, for ever.

    At most one new place for each of them at a time, because whoever has seen one packet can send such ESP.
    """
    while True:
        await asyncio.sleep(LOOK)
        try:
            strangers = host.nat.strangers() if host.away.passing.in_udp else []
            relays, followed = host.away.relays() if strangers else {}, set[str]()
            for one in strangers:
                row = next((relays[place] for place in one.known if place in relays), None)
                if row is not None and row.key not in followed and not _ours(host, one):
                    followed.add(row.key)
                    host.away.roamed(row, one.mn, one.ours)
        except IkectxError as error:
            log.error("ESP of relayed mobile nodes is not followed now: %s", error)


def _ours(host: CharonHost, stranger: Stranger) -> bool:
    """Whether the SPI is that of an SA here as well: then nobody knows whose packet it was."""
    return host.kernel is not None and host.kernel.get_sa(stranger.ours.address, stranger.spi) is not None


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
